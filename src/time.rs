//! How long something took, on the wall and in processor time.

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;
use std::iter::Sum;
use std::ops::{AddAssign, Sub};
use std::time::Instant;

/// A span of time: what passed, and what all threads of the process worked meanwhile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Time {
    /// Seconds that passed.
    pub wall_seconds: f64,
    /// Seconds of processor time.
    pub cpu_seconds: f64,
}

impl Time {
    /// Measures some work.
    pub fn of<T>(work: impl FnOnce() -> T) -> (T, Self) {
        let (wall, cpu) = (Instant::now(), processor_seconds());
        let result = work();
        let time =
            Self { wall_seconds: wall.elapsed().as_secs_f64(), cpu_seconds: processor_seconds() - cpu };
        (result, time)
    }

    /// Shares the time out in proportion to some weights.
    pub fn split<const N: usize>(self, weights: [f64; N]) -> [Self; N] {
        let sum: f64 = weights.iter().sum();
        weights.map(|weight| {
            let share = if sum > 0.0 { weight / sum } else { 0.0 };
            Self { wall_seconds: self.wall_seconds * share, cpu_seconds: self.cpu_seconds * share }
        })
    }
}

impl AddAssign for Time {
    fn add_assign(&mut self, other: Self) {
        self.wall_seconds += other.wall_seconds;
        self.cpu_seconds += other.cpu_seconds;
    }
}

impl Sum for Time {
    fn sum<I: Iterator<Item = Self>>(times: I) -> Self {
        times.fold(Self::default(), |mut sum, time| {
            sum += time;
            sum
        })
    }
}

impl Sub for Time {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self {
            wall_seconds: self.wall_seconds - other.wall_seconds,
            cpu_seconds: self.cpu_seconds - other.cpu_seconds,
        }
    }
}

/// Processor time of the process so far, all threads together.
fn processor_seconds() -> f64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up() {
        let time = Time { wall_seconds: 6.0, cpu_seconds: 12.0 };
        let [a, b] = time.split([1.0, 2.0]);
        assert_eq!((a.wall_seconds, b.cpu_seconds), (2.0, 8.0));
        assert_eq!(time.split([0.0, 0.0]), [Time::default(); 2]);
    }

    #[test]
    fn work_takes_processor_time() {
        let (sum, time) = Time::of(|| (0..3_000_000_u64).fold(0, |sum, n| sum + std::hint::black_box(n)));
        assert!(sum > 0 && time.cpu_seconds > 0.0 && time.wall_seconds > 0.0);
    }
}

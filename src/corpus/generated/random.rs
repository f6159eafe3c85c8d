//! Counter-based random numbers: every stream is a pure function of (seed, purpose, index).

use crate::random::{GOLDEN, finalise};

/// What a stream of random numbers is for; different purposes give unrelated streams.
#[derive(Clone, Copy, Debug)]
pub(super) enum Purpose {
    Training = 1,
    HeldOut,
    TraceChoice,
    Hops,
    EmptyThought,
}

/// `SplitMix64` (Steele, Lea and Flood, OOPSLA 2014).
#[derive(Clone, Debug)]
pub(super) struct Random {
    state: u64,
}

impl Random {
    /// The stream for item `index` of a purpose.
    pub(super) fn new(seed: u64, purpose: Purpose, index: u64) -> Self {
        let key = [purpose as u64, index]
            .into_iter()
            .fold(finalise(seed), |key, part| finalise(key ^ finalise(part.wrapping_add(GOLDEN))));
        Self { state: key }
    }

    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(GOLDEN);
        finalise(self.state)
    }

    /// Uniform in `0..bound`, without bias (Lemire, arXiv 1805.10941); 0 when `bound` is 0.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        let bound = bound.max(1) as u64;
        let surplus = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next()) * u128::from(bound);
            if product as u64 >= surplus {
                return (product >> 64) as usize;
            }
        }
    }

    /// Uniform in `low..=high`.
    pub(super) fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// True with the given probability.
    pub(super) fn chance(&mut self, probability: f64) -> bool {
        ((self.next() >> 11) as f64) * (0.5f64).powi(53) < probability
    }

    /// One of the items, which must not be empty.
    pub(super) fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// A uniform permutation (Fisher and Yates).
    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }

    /// `count` of the items in random order, without repetition (all of them if there are fewer).
    pub(super) fn sample<T: Clone>(&mut self, items: &[T], count: usize) -> Vec<T> {
        let mut items = items.to_vec();
        let count = count.min(items.len());
        for first in 0..count {
            let other = self.between(first, items.len() - 1);
            items.swap(first, other);
        }
        items.truncate(count);
        items
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_published_sequence() {
        let mut random = Random { state: 1_234_567 };
        let expected: [u64; 3] =
            [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423];
        assert_eq!(expected.map(|_| random.next()), expected);
    }

    #[test]
    fn draws_are_uniform_and_streams_are_unrelated() {
        let mut counts = [0u32; 7];
        for index in 0..7000 {
            counts[Random::new(3, Purpose::Training, index).below(7)] += 1;
        }
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
        let first = |seed, purpose| Random::new(seed, purpose, 5).next();
        assert_ne!(first(0, Purpose::Training), first(0, Purpose::HeldOut));
        assert_ne!(first(0, Purpose::Training), first(1, Purpose::Training));
    }

    #[test]
    fn samples_have_no_repetition() {
        let items: Vec<usize> = (0..20).collect();
        let mut sample = Random::new(0, Purpose::Hops, 0).sample(&items, 15);
        sample.sort_unstable();
        sample.dedup();
        assert_eq!(sample.len(), 15);
        assert_eq!(Random::new(0, Purpose::Hops, 0).sample(&items, 99).len(), 20);
    }
}

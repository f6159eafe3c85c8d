//! Elementary functions and reductions with fixed bits on every machine.

use super::LANES;
use super::simd::multiversion;
use rayon::prelude::*;

/// Columns that a task sums.
const COLUMNS_PER_TASK: usize = 256;

/// e^x to about 2 units in the last place; 0 below -87.3, capped above 88.
///
/// Range reduction by ln 2 in two parts and a degree-6 polynomial (Cephes `expf`).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // 1.5 * 2^23: adding it rounds to an integer, which the lowest bits of the sum then hold.
    const ROUND: f32 = 12_582_912.0;
    let bounded = x.clamp(-87.3, 88.0);
    let rounded = bounded.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = n.mul_add(-0.693_359_4, bounded);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4_f32;
    let p = p.mul_add(r, 1.398_199_9e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    let scale = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
    if x < -87.3 { 0.0 } else { p * scale }
}

/// Logistic function 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Sum of sixteen lanes as a balanced tree.
#[inline(always)]
pub fn sum_lanes(lanes: &[f32; LANES]) -> f32 {
    let mut tree = *lanes;
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            tree[lane] += tree[lane + half];
        }
        half /= 2;
    }
    tree[0]
}

/// Largest of sixteen lanes.
#[inline(always)]
fn max_lanes(lanes: &[f32; LANES]) -> f32 {
    lanes.iter().fold(f32::NEG_INFINITY, |best, value| best.max(*value))
}

multiversion! {
    /// Largest value; negative infinity for none.
    pub fn max(values: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let mut chunks = values.chunks_exact(LANES);
        for chunk in &mut chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane = if *value > *lane { *value } else { *lane };
            }
        }
        for (lane, value) in lanes.iter_mut().zip(chunks.remainder()) {
            *lane = lane.max(*value);
        }
        max_lanes(&lanes)
    }
}

multiversion! {
    /// Inner product of two equally long slices.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0.0_f32; LANES];
        let (mut a, mut b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        for (a, b) in (&mut a).zip(&mut b) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane = a.mul_add(*b, *lane);
            }
        }
        for ((lane, a), b) in lanes.iter_mut().zip(a.remainder()).zip(b.remainder()) {
            *lane = a.mul_add(*b, *lane);
        }
        sum_lanes(&lanes)
    }
}

multiversion! {
    /// Replaces each value x by e^((x - shift) * scale) and returns the sum of the results.
    pub fn exp_in_place(values: &mut [f32], shift: f32, scale: f32) -> f32 {
        let mut lanes = [0.0_f32; LANES];
        let mut chunks = values.chunks_exact_mut(LANES);
        for chunk in &mut chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *value = exp((*value - shift) * scale);
                *lane += *value;
            }
        }
        for (lane, value) in lanes.iter_mut().zip(chunks.into_remainder()) {
            *value = exp((*value - shift) * scale);
            *lane += *value;
        }
        sum_lanes(&lanes)
    }
}

multiversion! {
    /// Sum of e^((x - shift) * scale), and the same sum weighted by x.
    pub fn exp_sums(values: &[f32], shift: f32, scale: f32) -> (f32, f32) {
        let (mut plain, mut weighted) = ([0.0_f32; LANES], [0.0_f32; LANES]);
        let mut chunks = values.chunks_exact(LANES);
        for chunk in &mut chunks {
            for lane in 0..LANES {
                let e = exp((chunk[lane] - shift) * scale);
                plain[lane] += e;
                weighted[lane] = e.mul_add(chunk[lane], weighted[lane]);
            }
        }
        for (lane, value) in chunks.remainder().iter().enumerate() {
            let e = exp((*value - shift) * scale);
            plain[lane] += e;
            weighted[lane] = e.mul_add(*value, weighted[lane]);
        }
        (sum_lanes(&plain), sum_lanes(&weighted))
    }
}

multiversion! {
    /// Sum in double precision, over sixteen lanes.
    pub fn sum(values: &[f32]) -> f64 {
        let mut lanes = [0.0_f64; LANES];
        let (chunks, rest) = values.as_chunks::<LANES>();
        for chunk in chunks {
            for (lane, value) in lanes.iter_mut().zip(chunk) {
                *lane += f64::from(*value);
            }
        }
        for (lane, value) in lanes.iter_mut().zip(rest) {
            *lane += f64::from(*value);
        }
        lanes.iter().sum()
    }
}

multiversion! {
    /// Adds `source` to `target`, element by element.
    pub fn add(target: &mut [f32], source: &[f32]) {
        for (target, source) in target.iter_mut().zip(source) {
            *target += *source;
        }
    }
}

/// Adds every row of `rows [count, n]` to `target [n]`, in their order.
pub fn add_rows(target: &mut [f32], rows: &[f32]) {
    let n = target.len();
    let columns = target.par_chunks_mut(COLUMNS_PER_TASK).enumerate();
    columns.for_each(|(at, target)| {
        for row in rows.chunks_exact(n) {
            add(target, &row[at * COLUMNS_PER_TASK..][..target.len()]);
        }
    });
}

multiversion! {
    /// Multiplies every value by `factor`.
    pub fn scale(values: &mut [f32], factor: f32) {
        for value in values {
            *value *= factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_over_its_range() {
        let worst = (-870..=870)
            .map(|tenth| tenth as f32 * 0.1 + 0.037)
            .map(|x| ((f64::from(exp(x)) / f64::from(x).exp()) - 1.0).abs())
            .fold(0.0, f64::max);
        assert!(worst < 3e-7, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1000.0), 0.0);
    }

    #[test]
    fn reductions_agree_with_double_precision() {
        let values: Vec<f32> = (0..1003).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.02).collect();
        let exact: f64 = values.iter().map(|v| f64::from(*v).exp()).sum();
        let (sum, weighted) = exp_sums(&values, 0.0, 1.0);
        assert!((f64::from(sum) / exact - 1.0).abs() < 1e-5);
        let exact: f64 = values.iter().map(|v| f64::from(*v).exp() * f64::from(*v)).sum();
        assert!((f64::from(weighted) - exact).abs() < 1e-2);
        assert_eq!(max(&values), values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        assert!((super::sum(&values) - values.iter().map(|v| f64::from(*v)).sum::<f64>()).abs() < 1e-9);
        let exact: f64 = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
        assert!((f64::from(dot(&values, &values)) / exact - 1.0).abs() < 1e-5);
    }
}

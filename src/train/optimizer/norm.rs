//! The gradient's global norm and the factor that clips it.

use super::CHUNK;
use rayon::prelude::*;

/// Added to the norm in the clipping factor, as PyTorch's `clip_grad_norm_` does.
const CLIP_EPSILON: f64 = 1e-6;

/// L2 norm: `f64` sums over fixed chunks, added in the order of the chunks, so that the bits do
/// not depend on the number of threads.
pub(super) fn global_norm(values: &[f32]) -> f64 {
    let partial: Vec<f64> = values.par_chunks(CHUNK).map(sum_of_squares).collect();
    partial.iter().sum::<f64>().sqrt()
}

/// Sum of squares from the first value to the last.
pub(super) fn sum_of_squares(values: &[f32]) -> f64 {
    values.iter().map(|&value| f64::from(value) * f64::from(value)).sum()
}

/// The factor for every gradient, and whether the norm exceeded the limit (0 = no limit).
pub(super) fn clip_factor(norm: f64, max_norm: f32) -> (f32, bool) {
    let max_norm = f64::from(max_norm);
    if max_norm > 0.0 && norm > max_norm {
        ((max_norm / (norm + CLIP_EPSILON)) as f32, true)
    } else {
        (1.0, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_norm_is_the_root_of_the_sum_of_squares() {
        assert_eq!(global_norm(&[]), 0.0);
        assert_eq!(global_norm(&[3.0, -4.0]), 5.0);
        assert_eq!(global_norm(&vec![2.0; 3 * CHUNK + 4]), 2.0 * ((3 * CHUNK + 4) as f64).sqrt());
        assert_eq!(global_norm(&[f32::MAX; 4]), 2.0 * f64::from(f32::MAX));
        assert!(!global_norm(&[1.0, f32::NAN]).is_finite());
    }

    #[test]
    fn only_larger_norms_are_clipped() {
        assert_eq!(clip_factor(4.0, 1.0), ((1.0 / 4.000_001) as f32, true));
        assert_eq!(clip_factor(1.0, 1.0), (1.0, false));
        assert_eq!(clip_factor(4.0, 0.0), (1.0, false));
    }
}

//! Group-relative advantages.

use crate::config::AdvantageScale;

/// Added to a group's standard deviation before the division, as TRL does.
const STD_EPSILON: f64 = 1e-4;

/// Advantages of one group, the rollouts of one task.
///
/// ```text
/// A_i = r_i - mean(r)                         AdvantageScale::None  (Dr. GRPO, arXiv 2503.20783)
/// A_i = (r_i - mean(r)) / (std(r) + 1e-4)     AdvantageScale::Std   (GRPO, arXiv 2402.03300)
/// ```
///
/// with the unbiased standard deviation. A group without variance has advantages of exactly 0.
pub fn advantages(rewards: &[f32], scale: AdvantageScale) -> Vec<f32> {
    if is_uniform(rewards) {
        return vec![0.0; rewards.len()];
    }
    let mean = rewards.iter().copied().map(f64::from).sum::<f64>() / rewards.len() as f64;
    let divisor = match scale {
        AdvantageScale::None => 1.0,
        AdvantageScale::Std => unbiased_std(rewards, mean) + STD_EPSILON,
    };
    rewards.iter().map(|&reward| ((f64::from(reward) - mean) / divisor) as f32).collect()
}

/// Whether all rewards are equal, so that the group carries no gradient.
pub fn is_uniform(rewards: &[f32]) -> bool {
    rewards.windows(2).all(|pair| pair[0] == pair[1])
}

/// Standard deviation with divisor n - 1 of at least two values.
fn unbiased_std(values: &[f32], mean: f64) -> f64 {
    let squares: f64 = values.iter().map(|&value| (f64::from(value) - mean).powi(2)).sum();
    (squares / (values.len() - 1) as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    #[test]
    fn matches_values_worked_out_by_hand() {
        let rewards = [1.0, 0.0, 0.0, 0.0];
        assert_eq!(advantages(&rewards, AdvantageScale::None), [0.75, -0.25, -0.25, -0.25]);
        // Squares 0.5625 + 3 x 0.0625 = 0.75; std = sqrt(0.75 / 3) = 0.5.
        let expected = [0.75 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001, -0.25 / 0.5001];
        for (value, expected) in advantages(&rewards, AdvantageScale::Std).iter().zip(expected) {
            assert!((f64::from(*value) - expected).abs() < 1e-7);
        }
    }

    #[test]
    fn groups_without_variance_carry_nothing() {
        for rewards in [&[][..], &[1.0], &[0.1; 7], &[0.0; 8]] {
            assert!(is_uniform(rewards));
            for scale in [AdvantageScale::None, AdvantageScale::Std] {
                assert_eq!(advantages(rewards, scale), vec![0.0; rewards.len()]);
            }
        }
        assert!(!is_uniform(&[0.0, 0.0, 1.0]));
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(0), ..ProptestConfig::default() })]

        #[test]
        fn advantages_sum_to_zero_and_keep_the_order(rewards in prop::collection::vec(0.0_f32..1.0, 2..32)) {
            for scale in [AdvantageScale::None, AdvantageScale::Std] {
                let values = advantages(&rewards, scale);
                let sum: f64 = values.iter().copied().map(f64::from).sum();
                prop_assert!(sum.abs() < 1e-5 * rewards.len() as f64);
                for (left, right) in rewards.iter().zip(&rewards[1..]).zip(values.iter().zip(&values[1..])) {
                    prop_assert!(left.0 > left.1 || right.0 <= right.1);
                }
            }
        }
    }
}

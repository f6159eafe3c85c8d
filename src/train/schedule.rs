//! Learning rate over the steps of a stage.

use crate::config::{OptimizerConfig, Schedule};
use std::f64::consts::PI;

/// Learning rate of `step` (counted from 0) in a stage of `total` steps.
///
/// Step s of `warmup_steps` has (s + 1) / `warmup_steps` of the peak rate. The decay covers the
/// last `decay_share` of the steps, but never begins before the warm-up has ended; it is on its
/// way to `final_share` of the peak, which it would reach at step `total`, just after the last.
pub fn learning_rate(config: &OptimizerConfig, step: u64, total: u64) -> f32 {
    let peak = f64::from(config.learning_rate);
    if step < config.warmup_steps {
        return (peak * (step + 1) as f64 / config.warmup_steps as f64) as f32;
    }
    let remaining = remaining_decay(config, step as f64, total as f64);
    let shape = match config.schedule {
        Schedule::Constant => return config.learning_rate,
        Schedule::Linear => remaining,
        Schedule::Cosine => (1.0 - (PI * remaining).cos()) / 2.0,
    };
    let floor = f64::from(config.final_share);
    (peak * (floor + (1.0 - floor) * shape)) as f32
}

/// Share of the decay that lies ahead: 1 before it begins, 0 once the stage is over.
fn remaining_decay(config: &OptimizerConfig, step: f64, total: f64) -> f64 {
    let start = (total * (1.0 - f64::from(config.decay_share))).max(config.warmup_steps as f64);
    if step >= total {
        0.0
    } else if step <= start {
        1.0
    } else {
        (total - step) / (total - start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    fn config(schedule: Schedule, warmup_steps: u64, decay_share: f32) -> OptimizerConfig {
        OptimizerConfig {
            learning_rate: 1.0,
            schedule,
            warmup_steps,
            decay_share,
            final_share: 0.1,
            ..OptimizerConfig::default()
        }
    }

    fn rates(config: &OptimizerConfig, total: u64) -> Vec<f32> {
        (0..total).map(|step| learning_rate(config, step, total)).collect()
    }

    fn assert_close(values: &[f32], expected: &[f32]) {
        assert_eq!(values.len(), expected.len());
        for (value, expected) in values.iter().zip(expected) {
            assert!((value - expected).abs() < 1e-6, "{values:?} is not {expected:?}");
        }
    }

    #[test]
    fn shapes_worked_out_by_hand() {
        assert_close(&rates(&config(Schedule::Constant, 4, 1.0), 6), &[0.25, 0.5, 0.75, 1.0, 1.0, 1.0]);
        assert_close(&rates(&config(Schedule::Linear, 0, 0.5), 8), &[1., 1., 1., 1., 1., 0.775, 0.55, 0.325]);
        assert_close(&rates(&config(Schedule::Linear, 2, 1.0), 5), &[0.5, 1.0, 1.0, 0.7, 0.4]);
        assert_close(&rates(&config(Schedule::Cosine, 0, 1.0), 4), &[1.0, 0.868_198, 0.55, 0.231_802]);
    }

    #[test]
    fn degenerate_stages_have_a_rate() {
        assert_eq!(learning_rate(&config(Schedule::Linear, 10, 1.0), 2, 3), 0.3);
        assert_eq!(learning_rate(&config(Schedule::Linear, 0, 0.0), 4, 5), 1.0);
        assert_eq!(learning_rate(&config(Schedule::Linear, 0, 0.0), 5, 5), 0.1);
        assert_eq!(learning_rate(&config(Schedule::Cosine, 0, 1.0), 0, 0), 0.1);
        assert_eq!(learning_rate(&config(Schedule::Constant, 0, 1.0), 9, 3), 1.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(0), ..ProptestConfig::default() })]

        #[test]
        fn the_rate_rises_in_the_warmup_then_never_rises(
            warmup in 0_u64..20, share in 0.0_f32..=1.0, total in 1_u64..60, cosine: bool,
        ) {
            let schedule = if cosine { Schedule::Cosine } else { Schedule::Linear };
            let config = config(schedule, warmup, share);
            let rates = rates(&config, total);
            for (step, pair) in rates.windows(2).enumerate() {
                let rising = (step as u64) + 1 < warmup;
                let ordered = if rising { pair[1] > pair[0] } else { pair[1] <= pair[0] };
                prop_assert!(ordered, "step {}: {:?}", step, pair);
            }
            for (step, rate) in rates.iter().enumerate() {
                prop_assert!(*rate <= 1.0 && (*rate >= 0.1 || (step as u64) < warmup));
            }
        }
    }
}

//! AdamW: Adam with decoupled weight decay (arXiv 1711.05101), in PyTorch's arrangement.

use super::CHUNK;
use crate::config::OptimizerConfig;
use rayon::prelude::*;

/// Running moments of one parameter.
#[derive(Clone, Debug)]
pub(super) struct Adamw {
    pub(super) first_moment: Vec<f32>,
    pub(super) second_moment: Vec<f32>,
}

/// What all parameters share in one step:
///
/// ```text
/// g = scale gradient
/// m = beta1 m + (1 - beta1) g
/// v = beta2 v + (1 - beta2) g^2
/// p = (1 - rate decay) p - rate / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + epsilon)
/// ```
#[derive(Clone, Copy, Debug)]
pub(in crate::train) struct AdamwStep {
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    /// 1 - rate x weight decay.
    keep: f32,
    /// Rate over the bias correction of the first moment.
    rate: f32,
    /// Root of the bias correction of the second moment.
    second_correction: f32,
    scale: f32,
}

impl AdamwStep {
    /// The step number `count`, from 1, at a learning rate, with gradients scaled by `scale`.
    pub(in crate::train) fn new(
        config: &OptimizerConfig,
        learning_rate: f32,
        scale: f32,
        count: u64,
    ) -> Self {
        let count = i32::try_from(count).unwrap_or(i32::MAX);
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(count);
        Self {
            beta1: config.beta1,
            beta2: config.beta2,
            epsilon: config.epsilon,
            keep: 1.0 - learning_rate * config.weight_decay,
            rate: (f64::from(learning_rate) / correction(config.beta1)) as f32,
            second_correction: correction(config.beta2).sqrt() as f32,
            scale,
        }
    }
}

#[cfg(feature = "cuda")]
impl AdamwStep {
    /// The same step as a device takes it, which scales gradients by what it finds itself. `seed` rounds moments of bf16.
    pub(in crate::train) fn on_device(&self, seed: u64) -> crate::cuda::optimizer::AdamwStep {
        let Self { beta1, beta2, epsilon, keep, rate, second_correction, .. } = *self;
        crate::cuda::optimizer::AdamwStep { beta1, beta2, epsilon, keep, rate, second_correction, seed }
    }
}

impl Adamw {
    pub(super) fn new(length: usize) -> Self {
        Self { first_moment: vec![0.0; length], second_moment: vec![0.0; length] }
    }

    /// Updates one parameter; `decayed` says whether weight decay applies to it.
    pub(super) fn step(
        &mut self,
        step: &AdamwStep,
        decayed: bool,
        parameters: &mut [f32],
        gradients: &[f32],
    ) {
        let step = AdamwStep { keep: if decayed { step.keep } else { 1.0 }, ..*step };
        parameters
            .par_chunks_mut(CHUNK)
            .zip(gradients.par_chunks(CHUNK))
            .zip(self.first_moment.par_chunks_mut(CHUNK))
            .zip(self.second_moment.par_chunks_mut(CHUNK))
            .for_each(|(((parameters, gradients), first), second)| {
                step.update(parameters, gradients, first, second);
            });
    }
}

impl AdamwStep {
    fn update(&self, parameters: &mut [f32], gradients: &[f32], first: &mut [f32], second: &mut [f32]) {
        let moments = first.iter_mut().zip(second);
        for ((parameter, gradient), (first, second)) in parameters.iter_mut().zip(gradients).zip(moments) {
            let gradient = gradient * self.scale;
            *first = self.beta1 * *first + (1.0 - self.beta1) * gradient;
            *second = self.beta2 * *second + (1.0 - self.beta2) * gradient * gradient;
            let root = second.sqrt() / self.second_correction + self.epsilon;
            *parameter = *parameter * self.keep - self.rate * *first / root;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    fn config() -> OptimizerConfig {
        OptimizerConfig { learning_rate: 0.1, weight_decay: 0.01, ..OptimizerConfig::default() }
    }

    /// Three steps of `torch.optim.AdamW(lr=0.1, weight_decay=0.01)` on one number, worked out
    /// with the formula above in 50-digit decimals.
    #[test]
    fn follows_pytorch_over_three_steps() {
        let mut state = Adamw::new(1);
        let mut parameter = [1.0_f32];
        let expected = [
            (0.5_f32, 0.899, 0.05, 0.000_25),
            (-0.25, 0.871_467_3, 0.02, 0.000_312_25),
            (2.0, 0.803_531, 0.218, 0.004_311_938),
        ];
        for (count, (gradient, value, first, second)) in (1..).zip(expected) {
            let step = AdamwStep::new(&config(), 0.1, 1.0, count);
            state.step(&step, true, &mut parameter, &[gradient]);
            assert!((parameter[0] - value).abs() < 1e-6, "step {count}: {} is not {value}", parameter[0]);
            assert!((state.first_moment[0] - first).abs() < 1e-7);
            assert!((state.second_moment[0] - second).abs() < 1e-6 * second.max(0.1));
        }
    }

    /// The textbook form (Kingma and Ba, with bias-corrected moments) in `f64`.
    fn reference(config: &OptimizerConfig, mut parameter: f64, gradients: &[f32], scale: f64) -> f64 {
        let [beta1, beta2] = [config.beta1, config.beta2].map(f64::from);
        let (rate, decay) = (f64::from(config.learning_rate), f64::from(config.weight_decay));
        let (mut first, mut second) = (0.0, 0.0);
        for (count, &gradient) in (1..).zip(gradients) {
            let gradient = f64::from(gradient) * scale;
            first = beta1 * first + (1.0 - beta1) * gradient;
            second = beta2 * second + (1.0 - beta2) * gradient.powi(2);
            let first_unbiased = first / (1.0 - beta1.powi(count));
            let second_unbiased = second / (1.0 - beta2.powi(count));
            parameter -= rate * decay * parameter;
            parameter -= rate * first_unbiased / (second_unbiased.sqrt() + f64::from(config.epsilon));
        }
        parameter
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(0), ..ProptestConfig::default() })]

        #[test]
        fn agrees_with_the_textbook_in_f64(
            start in -2.0_f32..2.0, gradients in prop::collection::vec(-3.0_f32..3.0, 1..40),
            scale in 0.1_f32..1.0, decay in 0.0_f32..0.2, rate in 1e-4_f32..1e-1, beta2 in 0.9_f32..0.999,
        ) {
            let config = OptimizerConfig { learning_rate: rate, weight_decay: decay, beta2, ..config() };
            let mut state = Adamw::new(1);
            let mut parameter = [start];
            for (count, &gradient) in (1..).zip(&gradients) {
                let step = AdamwStep::new(&config, rate, scale, count);
                state.step(&step, true, &mut parameter, &[gradient]);
            }
            let expected = reference(&config, f64::from(start), &gradients, f64::from(scale));
            prop_assert!((f64::from(parameter[0]) - expected).abs() < 2e-5 * expected.abs().max(1.0));
        }
    }
}

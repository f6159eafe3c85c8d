//! optimizer.cu against `train::optimizer`.

use crate::support::{Arg, FORMATS, Gpu, Memory, assert_close, suffix, values};
use rpt::config::{OptimizerConfig, Schedule};
use rpt::kernels::dtype::Dtype;
use rpt::train::optimizer::{Optimizer, ParameterGroup, ParameterKind};

/// Elements of all parameters: neither chunks nor parameters are multiples of a vector.
const LENGTH: usize = 3 * 515 + 1000 + 7;

fn groups() -> Vec<ParameterGroup> {
    let group = |name: &str, start: usize, rows: usize, columns: usize, kind| ParameterGroup {
        name: name.into(),
        range: start..start + rows * columns,
        rows,
        columns,
        kind,
    };
    vec![
        group("matrix", 0, 3, 515, ParameterKind::Matrix),
        group("embedding", 1545, 10, 100, ParameterKind::Embedding),
        group("vector", 2545, 1, 7, ParameterKind::Vector),
    ]
}

fn config(max_grad_norm: f32) -> OptimizerConfig {
    OptimizerConfig {
        learning_rate: 0.01,
        weight_decay: 0.1,
        warmup_steps: 0,
        schedule: Schedule::Constant,
        max_grad_norm,
        ..OptimizerConfig::default()
    }
}

/// Chunks of at most 400 elements, as bytes: start, length, decayed.
fn chunks(gpu: &Gpu) -> (Memory, usize) {
    let mut words = Vec::new();
    for group in groups() {
        for start in group.range.clone().step_by(400) {
            let length = (group.range.end - start).min(400);
            words.extend([start as u32, 0, length as u32, u32::from(group.kind == ParameterKind::Matrix)]);
        }
    }
    (gpu.words(&words), words.len() / 4)
}

/// Parameters and state on the device.
struct State {
    dtype: Dtype,
    moments: Dtype,
    parameters: Memory,
    first: Memory,
    second: Memory,
    weights: Memory,
    average: Memory,
    clip: Memory,
}

impl State {
    fn new(gpu: &Gpu, dtype: Dtype, moments: Dtype, parameters: &[f32]) -> Self {
        let zeros = vec![0.0; parameters.len()];
        Self {
            dtype,
            moments,
            parameters: gpu.floats(parameters),
            first: gpu.stored(moments, &zeros),
            second: gpu.stored(moments, &zeros),
            weights: gpu.stored(dtype, &zeros),
            average: gpu.floats(parameters),
            clip: gpu.words(&[u32::MAX; 4]),
        }
    }

    /// Norm, then step number `count` from 1.
    fn step(&self, gpu: &Gpu, config: &OptimizerConfig, gradients: &[f32], count: i32) {
        let gradients = gpu.floats(gradients);
        let parts = LENGTH.div_ceil(16384);
        let partial = gpu.longs(&vec![u64::MAX; parts]);
        let arguments = [Arg::To(&gradients), Arg::Long(LENGTH as u64), Arg::To(&partial)];
        gpu.launch("sums_of_squares", (parts, 1), 256, &arguments);
        let arguments =
            [Arg::To(&partial), Arg::Int(parts), Arg::Float(config.max_grad_norm), Arg::To(&self.clip)];
        gpu.launch("clip_gradient", (1, 1), 256, &arguments);
        let correction = |beta: f32| 1.0 - f64::from(beta).powi(count);
        let (chunks, count_of_chunks) = chunks(gpu);
        let moments = if self.moments == Dtype::Bf16 { "moments_bf16_" } else { "" };
        gpu.launch(
            &format!("adamw_{moments}{}", suffix(self.dtype)),
            (count_of_chunks, 1),
            256,
            &[
                Arg::To(&chunks),
                Arg::To(&gradients),
                Arg::To(&self.clip),
                Arg::Float(config.beta1),
                Arg::Float(config.beta2),
                Arg::Float(config.epsilon),
                Arg::Float(1.0 - config.learning_rate * config.weight_decay),
                Arg::Float((f64::from(config.learning_rate) / correction(config.beta1)) as f32),
                Arg::Float(correction(config.beta2).sqrt() as f32),
                Arg::Long(count as u64 * 0x1234_5678_9abc),
                Arg::To(&self.parameters),
                Arg::To(&self.first),
                Arg::To(&self.second),
                Arg::To(&self.weights),
                Arg::To(&self.average),
                Arg::Float(0.9),
            ],
        );
    }

    /// Norm, factor, refusal.
    fn clip(&self) -> (f64, f32, u32) {
        let words = self.clip.words();
        let norm = f64::from_bits(u64::from(words[0]) | u64::from(words[1]) << 32);
        (norm, f32::from_bits(words[2]), words[3])
    }

    fn everything(&self) -> Vec<Vec<f32>> {
        let moments = [&self.first, &self.second].map(|moment| moment.stored(self.moments));
        let [first, second] = moments;
        vec![self.parameters.floats(), first, second, self.weights.stored(self.dtype), self.average.floats()]
    }
}

#[test]
fn steps_agree_with_the_cpu() {
    let gpu = Gpu::new();
    for dtype in FORMATS {
        for max_grad_norm in [0.0, 1.0] {
            let config = config(max_grad_norm);
            let mut expected = values(1, LENGTH);
            let mut average = expected.clone();
            let state = State::new(&gpu, dtype, Dtype::F32, &expected);
            let mut optimizer = Optimizer::new(&config, groups(), 10).unwrap();
            for count in 1..=3 {
                let gradients = values(10 + count as u64, LENGTH);
                let stats = optimizer.step(&mut expected, &gradients).unwrap();
                average
                    .iter_mut()
                    .zip(&expected)
                    .for_each(|(average, value)| *average = 0.9 * *average + (1.0 - 0.9) * value);
                state.step(&gpu, &config, &gradients, count);
                let (norm, scale, refused) = state.clip();
                assert!((norm / stats.gradient_norm - 1.0).abs() < 1e-12 && refused == 0);
                assert_eq!(scale < 1.0, stats.clipped);
            }
            assert_close(&state.parameters.floats(), &expected, 1e-6);
            for ((name, moment), actual) in
                optimizer_moments(&optimizer).into_iter().zip([&state.first, &state.second])
            {
                assert_close(&actual.floats(), &moment, 1e-6);
                assert!(!name.is_empty());
            }
            assert_close(&state.average.floats(), &average, 1e-6);
            let mut weights = state.parameters.floats();
            dtype.round(&mut weights);
            assert_eq!(state.weights.stored(dtype), weights);
        }
    }
}

/// First and second moments of all parameters, flat.
fn optimizer_moments(optimizer: &Optimizer) -> Vec<(String, Vec<f32>)> {
    ["first_moment", "second_moment"]
        .into_iter()
        .map(|part| {
            let moments = optimizer.state().into_iter().filter(|(name, _)| name.ends_with(part));
            (part.to_string(), moments.flat_map(|(_, values)| values.to_vec()).collect())
        })
        .collect()
}

#[test]
fn gradients_that_are_not_finite_change_nothing() {
    let gpu = Gpu::new();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let state = State::new(&gpu, Dtype::Bf16, Dtype::Bf16, &values(2, LENGTH));
        state.step(&gpu, &config(1.0), &values(3, LENGTH), 1);
        let before = state.everything();
        let mut gradients = values(4, LENGTH);
        gradients[LENGTH - 1] = bad;
        state.step(&gpu, &config(1.0), &gradients, 2);
        assert_eq!(state.clip().2, 1);
        assert_eq!(state.everything(), before);
        state.step(&gpu, &config(1.0), &values(4, LENGTH), 2);
        assert_eq!(state.clip().2, 0);
        assert_ne!(state.everything(), before);
    }
}

/// Rounded to the nearest, a second moment near 1 would never move by the 0.001 of a step.
#[test]
fn moments_in_bf16_follow_those_in_f32_on_average_and_repeat_their_bits() {
    let gpu = Gpu::new();
    let run = |moments| {
        let state = State::new(&gpu, Dtype::F32, moments, &vec![0.5; LENGTH]);
        for count in 1..=40 {
            state.step(&gpu, &config(0.0), &vec![0.25; LENGTH], count);
        }
        state.everything()
    };
    let (exact, rounded) = (run(Dtype::F32), run(Dtype::Bf16));
    let mean =
        |values: &[f32]| values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len() as f64;
    for moment in [1, 2] {
        assert!((mean(&rounded[moment]) / mean(&exact[moment]) - 1.0).abs() < 1e-3);
    }
    assert_eq!(run(Dtype::Bf16), rounded);
}

//! Launches of optimizer.cu against `train::optimizer`.

use crate::cuda_emulator::device;
use crate::support::{Format, assert_close, assert_refused, read, rounded, store, values};
use half::bf16;
use rpt::config::{OptimizerConfig, Schedule};
use rpt::cuda::optimizer::{AdamwState, AdamwStep, Chunks, ClipFigures, adamw, clip};
use rpt::cuda::{Buffer, Device, Result};
use rpt::train::optimizer::{Optimizer, ParameterGroup, ParameterKind};
use std::ops::Range;

/// Rows of the matrix: longer than what a block takes, and no multiple of a vector.
const COLUMNS: usize = 5501;
/// Elements of all parameters.
const LENGTH: usize = 3 * COLUMNS + 1000 + 7;

fn groups() -> Vec<ParameterGroup> {
    let group = |name: &str, start: usize, rows: usize, columns: usize, kind| ParameterGroup {
        name: name.into(),
        range: start..start + rows * columns,
        rows,
        columns,
        kind,
    };
    vec![
        group("matrix", 0, 3, COLUMNS, ParameterKind::Matrix),
        group("embedding", 3 * COLUMNS, 10, 100, ParameterKind::Embedding),
        group("vector", 3 * COLUMNS + 1000, 1, 7, ParameterKind::Vector),
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

/// All parameters, of which matrices decay.
fn parts() -> Vec<(Range<usize>, bool)> {
    groups().into_iter().map(|group| (group.range, group.kind == ParameterKind::Matrix)).collect()
}

/// The same in parts of at most 400 elements.
fn small_parts() -> Vec<(Range<usize>, bool)> {
    let cut = |(range, decays): (Range<usize>, bool)| {
        let parts = range.clone().step_by(400).map(move |start| (start..range.end.min(start + 400), decays));
        parts.collect::<Vec<_>>()
    };
    parts().into_iter().flat_map(cut).collect()
}

/// Parameters and state on the device.
struct State<T, M> {
    parameters: Buffer<f32>,
    first: Buffer<M>,
    second: Buffer<M>,
    weights: Buffer<T>,
    average: Buffer<f32>,
}

impl<T: Format, M: Format> State<T, M> {
    fn new(device: &Device, parameters: &[f32]) -> Self {
        let zeros = vec![0.0; parameters.len()];
        Self {
            parameters: store(device, parameters),
            first: store(device, &zeros),
            second: store(device, &zeros),
            weights: store(device, &zeros),
            average: store(device, parameters),
        }
    }

    /// Norm, then step number `count` from 1.
    fn step(
        &mut self,
        device: &Device,
        parts: &[(Range<usize>, bool)],
        config: &OptimizerConfig,
        gradients: &[f32],
        count: i32,
    ) -> ClipFigures {
        let gradients = store::<f32>(device, gradients);
        let decision = clip(device, (&gradients).into(), config.max_grad_norm).unwrap();
        let chunks = Chunks::new(device, parts).unwrap();
        let step = step(config, count);
        adamw(device, &chunks, &step, &decision, (&gradients).into(), self.borrow()).unwrap();
        decision.read().unwrap()
    }

    fn borrow(&mut self) -> AdamwState<'_, T, M> {
        AdamwState {
            parameters: (&mut self.parameters).into(),
            first: (&mut self.first).into(),
            second: (&mut self.second).into(),
            weights: Some((&mut self.weights).into()),
            average: Some(((&mut self.average).into(), 0.9)),
        }
    }

    fn everything(&self) -> [Vec<f32>; 5] {
        let (parameters, average) = (read(&self.parameters), read(&self.average));
        [parameters, read(&self.first), read(&self.second), read(&self.weights), average]
    }
}

fn step(config: &OptimizerConfig, count: i32) -> AdamwStep {
    let correction = |beta: f32| 1.0 - f64::from(beta).powi(count);
    AdamwStep {
        beta1: config.beta1,
        beta2: config.beta2,
        epsilon: config.epsilon,
        keep: 1.0 - config.learning_rate * config.weight_decay,
        rate: (f64::from(config.learning_rate) / correction(config.beta1)) as f32,
        second_correction: correction(config.beta2).sqrt() as f32,
        seed: count as u64 * 0x1234_5678_9abc,
    }
}

fn steps_agree<T: Format>() {
    let device = device();
    for max_grad_norm in [0.0, 1.0] {
        let config = config(max_grad_norm);
        let mut expected = values(1, LENGTH);
        let mut average = expected.clone();
        let mut state = State::<T, f32>::new(&device, &expected);
        let mut optimizer = Optimizer::new(&config, groups(), 10).unwrap();
        for count in 1..=3 {
            let gradients = values(10 + count as u64, LENGTH);
            let stats = optimizer.step(&mut expected, &gradients).unwrap();
            let follow = |(average, value): (&mut f32, &f32)| *average = 0.9 * *average + (1.0 - 0.9) * value;
            average.iter_mut().zip(&expected).for_each(follow);
            let clip = state.step(&device, &small_parts(), &config, &gradients, count);
            assert!((clip.norm / stats.gradient_norm - 1.0).abs() < 1e-12 && !clip.refused);
            assert_eq!(clip.scale < 1.0, stats.clipped);
        }
        let [parameters, first, second, weights, averages] = state.everything();
        assert_close(&parameters, &expected, 1e-6);
        for ((name, moment), actual) in optimizer_moments(&optimizer).into_iter().zip([first, second]) {
            assert_close(&actual, &moment, 1e-6);
            assert!(!name.is_empty());
        }
        assert_close(&averages, &average, 1e-6);
        assert_eq!(weights, rounded::<T>(&parameters));
    }
}

#[test]
fn steps_agree_with_the_cpu() {
    steps_agree::<f32>();
    steps_agree::<bf16>();
}

#[test]
fn how_parameters_are_cut_does_not_matter() {
    let device = device();
    let mut small = State::<bf16, bf16>::new(&device, &values(5, LENGTH));
    let mut whole = State::<bf16, bf16>::new(&device, &values(5, LENGTH));
    let mut parts = parts();
    parts.reverse();
    for count in 1..=2 {
        let gradients = values(6 + count as u64, LENGTH);
        small.step(&device, &small_parts(), &config(1.0), &gradients, count);
        whole.step(&device, &parts, &config(1.0), &gradients, count);
    }
    assert_eq!(small.everything(), whole.everything());
}

#[test]
fn what_is_in_no_part_stays() {
    let device = device();
    let mut state = State::<f32, f32>::new(&device, &values(5, LENGTH));
    let before = state.everything();
    let parts = [(3..10, true), (12..12, true), (20..LENGTH - 5, false)];
    state.step(&device, &parts, &config(1.0), &values(6, LENGTH), 1);
    let after = state.everything();
    for at in [0..3, 10..20, LENGTH - 5..LENGTH] {
        assert!(before.iter().zip(&after).all(|(before, after)| before[at.clone()] == after[at.clone()]));
    }
    for at in [3..10, 20..LENGTH - 5] {
        assert!(before[0][at.clone()].iter().zip(&after[0][at]).all(|(before, after)| before != after));
    }
}

#[test]
fn weights_and_averages_may_be_left_out() {
    let device = device();
    let (mut all, mut few) = (
        State::<f32, f32>::new(&device, &values(5, LENGTH)),
        State::<f32, f32>::new(&device, &values(5, LENGTH)),
    );
    let gradients = values(6, LENGTH);
    all.step(&device, &parts(), &config(1.0), &gradients, 1);
    let gradients = store::<f32>(&device, &gradients);
    let (decision, chunks) =
        (clip(&device, (&gradients).into(), 1.0).unwrap(), Chunks::new(&device, &parts()).unwrap());
    let state = AdamwState { weights: None, average: None, ..few.borrow() };
    adamw(&device, &chunks, &step(&config(1.0), 1), &decision, (&gradients).into(), state).unwrap();
    assert_eq!(few.everything()[..3], all.everything()[..3]);
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
    let device = device();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut state = State::<bf16, bf16>::new(&device, &values(2, LENGTH));
        let mut step = |gradients: &[f32], count| {
            let clip = state.step(&device, &small_parts(), &config(1.0), gradients, count);
            (clip.refused, state.everything())
        };
        let (_, before) = step(&values(3, LENGTH), 1);
        let mut gradients = values(4, LENGTH);
        gradients[LENGTH - 1] = bad;
        assert_eq!(step(&gradients, 2), (true, before.clone()));
        let (refused, after) = step(&values(4, LENGTH), 2);
        assert!(!refused && after != before);
    }
}

/// Rounded to the nearest, a second moment near 1 would never move by the 0.001 of a step.
fn steady<M: Format>() -> [Vec<f32>; 5] {
    let (device, length) = (device(), 2552);
    let mut state = State::<f32, M>::new(&device, &vec![0.5; length]);
    for count in 1..=40 {
        state.step(&device, &[(0..length, true)], &config(0.0), &vec![0.25; length], count);
    }
    state.everything()
}

#[test]
fn moments_in_bf16_follow_those_in_f32_on_average_and_repeat_their_bits() {
    let (exact, rounded) = (steady::<f32>(), steady::<bf16>());
    let mean =
        |values: &[f32]| values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len() as f64;
    for moment in [1, 2] {
        assert!((mean(&rounded[moment]) / mean(&exact[moment]) - 1.0).abs() < 1e-3);
    }
    assert_eq!(steady::<bf16>(), rounded);
}

#[test]
fn without_gradients_the_norm_is_zero() {
    let device = device();
    let figures = clip(&device, (&store::<f32>(&device, &[])).into(), 1.0).unwrap().read().unwrap();
    assert_eq!(figures, ClipFigures { norm: 0.0, scale: 1.0, refused: false });
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = device();
    let chunks = |parts: &[(Range<usize>, bool)]| Chunks::new(&device, parts);
    assert_refused(chunks(&[(8..10, true), (0..9, false)]), "the parts 0..9 and 8..10 overlap");
    assert_refused(chunks(&[(0..10, true), (3..5, false), (20..21, true)]), "overlap");
    let mut lengths = [8; 6];
    let run = |parts: &[(Range<usize>, bool)], lengths: [usize; 6]| -> Result<()> {
        let [gradients, parameters, first, second, weights, average] =
            lengths.map(|length| store::<f32>(&device, &vec![0.0; length]));
        let (mut parameters, mut first, mut second) = (parameters, first, second);
        let (mut weights, mut average) = (weights, average);
        let state = AdamwState::<f32, f32> {
            parameters: (&mut parameters).into(),
            first: (&mut first).into(),
            second: (&mut second).into(),
            weights: Some((&mut weights).into()),
            average: Some(((&mut average).into(), 0.9)),
        };
        let decision = clip(&device, (&gradients).into(), 1.0)?;
        let (chunks, step) = (chunks(parts)?, step(&config(1.0), 1));
        adamw(&device, &chunks, &step, &decision, (&gradients).into(), state)
    };
    run(&[], [0; 6]).unwrap();
    run(&[(2..8, true)], lengths).unwrap();
    let whats = ["gradients", "parameters", "first moments", "second moments", "weights", "averages"];
    for (at, what) in whats.into_iter().enumerate() {
        lengths[at] = 7;
        assert_refused(run(&[(2..8, true)], lengths), &format!("{what}: 7 elements where 8 are"));
        lengths[at] = 8;
    }
}

//! Optimisers over flat `f32` parameters.
//!
//! A model lays its parameters out in one slice and describes it by [`ParameterGroup`]s. One
//! [`Optimizer::step`] measures the gradient's global norm, clips, and updates every group by its
//! rule: AdamW everywhere, or Muon on the matrices of the decoder layers with AdamW on the rest.
//!
//! Weight decay is decoupled and applies to [`ParameterKind::Matrix`] alone: embeddings have none
//! because a token that a step does not meet must not fade, and neither have norms and biases.
//!
//! With `ema_decay`, a running average follows the parameters: a = decay a + (1 - decay) p after every
//! update, beginning with the parameters before the first (Polyak & Juditsky, doi 10.1137/0330046, with a window).
//!
//! Results do not depend on the number of threads: every sum runs in a fixed order. Memory is two
//! floats per parameter under AdamW and one under Muon, one more for the average, plus, for each
//! thread at work on a matrix, a few copies of that matrix.

mod adamw;
mod muon;
mod norm;

use crate::config::{OptimizerConfig, OptimizerKind};
use crate::train::schedule::learning_rate;
use adamw::Adamw;
pub(super) use adamw::AdamwStep;
use muon::{Muon, MuonStep};
use rayon::prelude::*;
use std::ops::Range;

/// Elements that one task of a thread works on; fixes the order of summation of the norm.
const CHUNK: usize = 4096;

/// What role a parameter plays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    /// A weight matrix of a decoder layer.
    Matrix,
    /// An embedding or output head: one row per token of the vocabulary.
    Embedding,
    /// A norm's weight or a bias.
    Vector,
}

/// One parameter's place in the flat slice.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterGroup {
    /// The parameter's name, unique within the model.
    pub name: String,
    /// Its elements, row-major.
    pub range: Range<usize>,
    /// Rows of the matrix (1 for a vector).
    pub rows: usize,
    /// Columns of the matrix.
    pub columns: usize,
    /// Its role.
    pub kind: ParameterKind,
}

/// What one step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepStats {
    /// Global L2 norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Learning rate of the step.
    pub learning_rate: f32,
    /// The norm exceeded `max_grad_norm`.
    pub clipped: bool,
}

/// Why an optimiser refused.
#[derive(Debug, thiserror::Error)]
pub enum OptimizerError {
    /// Groups do not tile the parameters.
    #[error("parameter {group}: {reason}")]
    Layout {
        /// The group at fault.
        group: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A slice does not have the length of the layout.
    #[error("{what} has {found} elements, but the layout describes {expected}")]
    Length {
        /// Which slice.
        what: &'static str,
        /// Elements that the groups describe.
        expected: usize,
        /// Elements that were given.
        found: usize,
    },
    /// A gradient holds an infinity or a NaN.
    #[error(
        "step {step}: the gradient of {group} is not finite at row {row}, column {column} \
         ({elements} elements of all gradients are not)"
    )]
    NonFiniteGradient {
        /// The step that was refused, from 0.
        step: u64,
        /// The first parameter with such an element.
        group: String,
        /// Row of that element.
        row: usize,
        /// Column of that element.
        column: usize,
        /// Such elements in all parameters.
        elements: usize,
    },
}

impl OptimizerError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Layout { .. } | Self::Length { .. } => None,
            Self::NonFiniteGradient { .. } => Some(
                "parameters and optimiser state were left as they were; resume from the last checkpoint \
                 with a lower learning_rate or max_grad_norm, or a longer warmup_steps"
                    .into(),
            ),
        }
    }
}

/// Updates flat parameters from flat gradients.
#[derive(Clone, Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    groups: Vec<Group>,
    total_steps: u64,
    step_count: u64,
}

/// A parameter with the state of its rule.
#[derive(Clone, Debug)]
struct Group {
    layout: ParameterGroup,
    rule: Rule,
    /// A running average of the parameter; empty where none is kept.
    average: Vec<f32>,
}

#[derive(Clone, Debug)]
enum Rule {
    Adamw(Adamw),
    Muon(Muon),
}

impl Optimizer {
    /// An optimiser for a stage of `total_steps` steps, its state at zero.
    ///
    /// # Errors
    /// The groups, in order, must tile the parameters without gap or overlap, have the sizes that
    /// their rows and columns say, and have unique names.
    pub fn new(
        config: &OptimizerConfig,
        groups: Vec<ParameterGroup>,
        total_steps: u64,
    ) -> Result<Self, OptimizerError> {
        check_layout(&groups)?;
        let groups = groups.into_iter().map(|layout| Group::new(layout, config.kind)).collect();
        Ok(Self { config: config.clone(), groups, total_steps, step_count: 0 })
    }

    /// Begins the running average, if one is to be kept, with these parameters. Without this call none is.
    ///
    /// # Errors
    /// When their number is another.
    pub fn begin_average(&mut self, parameters: &[f32]) -> Result<(), OptimizerError> {
        self.check_length("the parameter slice", parameters.len())?;
        if self.config.ema_decay > 0.0 {
            for group in &mut self.groups {
                group.average = parameters[group.layout.range.clone()].to_vec();
            }
        }
        Ok(())
    }

    /// One update of all parameters, which their average follows.
    ///
    /// Gradients whose global norm exceeds `max_grad_norm` are scaled by
    /// `max_grad_norm / (norm + 1e-6)`, as PyTorch does.
    ///
    /// # Errors
    /// Slices that do not fit the layout, and gradients that are not finite, are refused before
    /// anything is changed.
    pub fn step(&mut self, parameters: &mut [f32], gradients: &[f32]) -> Result<StepStats, OptimizerError> {
        self.check_length("the parameter slice", parameters.len())?;
        self.check_length("the gradient slice", gradients.len())?;
        let gradient_norm = norm::global_norm(gradients);
        if !gradient_norm.is_finite() {
            let groups = self.groups.iter().map(|group| &group.layout);
            return Err(locate_non_finite(groups, gradients, self.step_count));
        }
        let learning_rate = learning_rate(&self.config, self.step_count, self.total_steps);
        let (scale, clipped) = norm::clip_factor(gradient_norm, self.config.max_grad_norm);
        self.step_count += 1;
        self.update(parameters, gradients, learning_rate, scale);
        Ok(StepStats { gradient_norm, learning_rate, clipped })
    }

    fn update(&mut self, parameters: &mut [f32], gradients: &[f32], learning_rate: f32, scale: f32) {
        let adamw = AdamwStep::new(&self.config, learning_rate, scale, self.step_count);
        let muon = MuonStep::new(&self.config, learning_rate, scale);
        let decay = self.config.ema_decay;
        split(&mut self.groups, parameters).into_par_iter().for_each(|(group, parameters)| {
            let gradients = &gradients[group.layout.range.clone()];
            let decayed = group.layout.kind == ParameterKind::Matrix;
            match &mut group.rule {
                Rule::Adamw(state) => state.step(&adamw, decayed, parameters, gradients),
                Rule::Muon(state) => state.step(&muon, parameters, gradients),
            }
            follow(&mut group.average, parameters, decay);
        });
    }

    /// Updates made so far.
    pub fn step_count(&self) -> u64 {
        self.step_count
    }

    /// Sets the number of updates made so far, on resuming.
    pub fn set_step_count(&mut self, step_count: u64) {
        self.step_count = step_count;
    }

    /// The state to save, by name, in the order of the groups: `NAME.first_moment` and
    /// `NAME.second_moment`, or `NAME.momentum`, and [`ema_name`] where an average is kept, each as long
    /// as its parameter.
    pub fn state(&self) -> Vec<(String, &[f32])> {
        let named = |group: &Group, part: &str| format!("{}.{part}", group.layout.name);
        let mut state: Vec<(String, &[f32])> = Vec::new();
        for group in &self.groups {
            match &group.rule {
                Rule::Adamw(rule) => {
                    state.push((named(group, "first_moment"), &rule.first_moment));
                    state.push((named(group, "second_moment"), &rule.second_moment));
                }
                Rule::Muon(rule) => state.push((named(group, "momentum"), &rule.momentum)),
            }
            if !group.average.is_empty() {
                state.push((ema_name(&group.layout.name), &group.average));
            }
        }
        state
    }

    /// The same state, to be filled on resuming.
    pub fn state_mut(&mut self) -> Vec<(String, &mut [f32])> {
        let mut state: Vec<(String, &mut [f32])> = Vec::new();
        for Group { layout, rule, average } in &mut self.groups {
            match rule {
                Rule::Adamw(rule) => {
                    state.push((format!("{}.first_moment", layout.name), &mut rule.first_moment));
                    state.push((format!("{}.second_moment", layout.name), &mut rule.second_moment));
                }
                Rule::Muon(rule) => state.push((format!("{}.momentum", layout.name), &mut rule.momentum)),
            }
            if !average.is_empty() {
                state.push((ema_name(&layout.name), average));
            }
        }
        state
    }

    fn check_length(&self, what: &'static str, found: usize) -> Result<(), OptimizerError> {
        let expected = self.groups.last().map_or(0, |group| group.layout.range.end);
        if found == expected { Ok(()) } else { Err(OptimizerError::Length { what, expected, found }) }
    }
}

impl Group {
    fn new(layout: ParameterGroup, kind: OptimizerKind) -> Self {
        let rule = match (kind, layout.kind) {
            (OptimizerKind::Muon, ParameterKind::Matrix) => {
                Rule::Muon(Muon::new(layout.rows, layout.columns))
            }
            _ => Rule::Adamw(Adamw::new(layout.range.len())),
        };
        Self { layout, rule, average: Vec::new() }
    }
}

/// Name of a parameter's running average in the state.
pub fn ema_name(parameter: &str) -> String {
    format!("{parameter}.ema")
}

/// Moves an average, if there is one, towards the values.
fn follow(average: &mut [f32], values: &[f32], decay: f32) {
    average.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).for_each(|(average, values)| {
        for (average, value) in average.iter_mut().zip(values) {
            *average = decay * *average + (1.0 - decay) * value;
        }
    });
}

/// Describes the first element that is not finite. There is one when the norm is not finite:
/// in `f64`, squares of finite `f32` do not overflow.
pub(super) fn locate_non_finite<'a>(
    mut groups: impl Iterator<Item = &'a ParameterGroup>,
    gradients: &[f32],
    step: u64,
) -> OptimizerError {
    let first = gradients.iter().position(|value| !value.is_finite()).unwrap_or_default();
    let elements = gradients.iter().filter(|value| !value.is_finite()).count();
    let layout = groups.find(|layout| layout.range.contains(&first));
    let (group, offset, columns) = layout.map_or((String::new(), 0, 1), |layout| {
        (layout.name.clone(), first - layout.range.start, layout.columns)
    });
    OptimizerError::NonFiniteGradient {
        step,
        group,
        row: offset / columns,
        column: offset % columns,
        elements,
    }
}

/// Pairs every group with its part of the parameters.
fn split<'a>(groups: &'a mut [Group], mut parameters: &'a mut [f32]) -> Vec<(&'a mut Group, &'a mut [f32])> {
    let own = |group: &'a mut Group| {
        let (own, rest) = std::mem::take(&mut parameters).split_at_mut(group.layout.range.len());
        parameters = rest;
        (group, own)
    };
    groups.iter_mut().map(own).collect()
}

pub(super) fn check_layout(groups: &[ParameterGroup]) -> Result<(), OptimizerError> {
    let mut names = std::collections::BTreeSet::new();
    let mut end = 0;
    for group in groups {
        let refuse = |reason: String| Err(OptimizerError::Layout { group: group.name.clone(), reason });
        let Range { start, end: next } = group.range;
        if start != end || next < start {
            return refuse(format!(
                "has range {start}..{next}, but must start at {end}, where its forerunner ends"
            ));
        }
        if group.rows.checked_mul(group.columns) != Some(next - start) {
            return refuse(format!(
                "has {} elements but shape {} x {}",
                next - start,
                group.rows,
                group.columns
            ));
        }
        if !names.insert(&group.name) {
            return refuse("appears twice".into());
        }
        end = next;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Schedule;

    fn group(name: &str, start: usize, rows: usize, columns: usize, kind: ParameterKind) -> ParameterGroup {
        ParameterGroup { name: name.into(), range: start..start + rows * columns, rows, columns, kind }
    }

    /// An embedding longer than a chunk, two matrices and a vector.
    fn layout() -> Vec<ParameterGroup> {
        vec![
            group("embedding", 0, 300, 20, ParameterKind::Embedding),
            group("up", 6000, 24, 20, ParameterKind::Matrix),
            group("norm", 6480, 1, 20, ParameterKind::Vector),
            group("down", 6500, 20, 24, ParameterKind::Matrix),
        ]
    }

    const LENGTH: usize = 6980;

    /// A fixed sequence of values in [-1, 1): a multiplicative hash of the index.
    fn noise(length: usize, seed: u64) -> Vec<f32> {
        let value = |index: u64| {
            let hash =
                (index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(seed.wrapping_mul(0xd1b5_4a32));
            let hash = (hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (hash >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
        };
        (0..length as u64).map(value).collect()
    }

    fn config(kind: OptimizerKind) -> OptimizerConfig {
        OptimizerConfig {
            kind,
            learning_rate: 0.01,
            warmup_steps: 2,
            schedule: Schedule::Linear,
            weight_decay: 0.1,
            ..OptimizerConfig::default()
        }
    }

    fn train(optimizer: &mut Optimizer, parameters: &mut [f32], steps: Range<u64>) {
        for step in steps {
            optimizer.step(parameters, &noise(LENGTH, step)).unwrap();
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        for kind in [OptimizerKind::Adamw, OptimizerKind::Muon] {
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut parameters = noise(LENGTH, 77);
                let mut optimizer = Optimizer::new(&config(kind), layout(), 5).unwrap();
                let stats: Vec<StepStats> = (0..5)
                    .map(|step| {
                        pool.install(|| optimizer.step(&mut parameters, &noise(LENGTH, step)).unwrap())
                    })
                    .collect();
                (parameters, stats)
            };
            assert_eq!(run(1), run(3));
        }
    }

    #[test]
    fn a_restored_optimizer_goes_on_bit_for_bit() {
        for kind in [OptimizerKind::Adamw, OptimizerKind::Muon] {
            let config = OptimizerConfig { ema_decay: 0.9, ..config(kind) };
            let new = || {
                let mut optimizer = Optimizer::new(&config, layout(), 6).unwrap();
                optimizer.begin_average(&noise(LENGTH, 77)).unwrap();
                optimizer
            };
            let (mut whole, mut expected) = (new(), noise(LENGTH, 77));
            train(&mut whole, &mut expected, 0..6);

            let mut first = new();
            let mut parameters = noise(LENGTH, 77);
            train(&mut first, &mut parameters, 0..3);
            let mut second = new();
            for ((name, saved), (restored, slot)) in first.state().into_iter().zip(second.state_mut()) {
                assert_eq!(name, restored);
                slot.copy_from_slice(saved);
            }
            second.set_step_count(first.step_count());
            train(&mut second, &mut parameters, 3..6);
            assert_eq!(parameters, expected);
            assert_eq!(second.state(), whole.state());
            assert_eq!(second.step_count(), 6);
        }
    }

    #[test]
    fn state_is_named_after_parameters() {
        let optimizer = Optimizer::new(&config(OptimizerKind::Muon), layout(), 1).unwrap();
        let names: Vec<(String, usize)> =
            optimizer.state().into_iter().map(|(name, values)| (name, values.len())).collect();
        let expected = [
            ("embedding.first_moment", 6000),
            ("embedding.second_moment", 6000),
            ("up.momentum", 480),
            ("norm.first_moment", 20),
            ("norm.second_moment", 20),
            ("down.momentum", 480),
        ];
        assert_eq!(names, expected.map(|(name, length)| (name.to_string(), length)));
    }

    #[test]
    fn the_average_is_a_weighted_sum_of_all_parameters_that_were() {
        for kind in [OptimizerKind::Adamw, OptimizerKind::Muon] {
            let config = OptimizerConfig { ema_decay: 0.75, ..config(kind) };
            let mut optimizer = Optimizer::new(&config, layout(), 4).unwrap();
            let mut parameters = noise(LENGTH, 77);
            optimizer.begin_average(&parameters).unwrap();
            let mut were = vec![parameters.clone()];
            for step in 0..4 {
                optimizer.step(&mut parameters, &noise(LENGTH, step)).unwrap();
                were.push(parameters.clone());
            }
            // Of five: the start with 0.75^4, then 0.25 0.75^(4 - k).
            let weights = [0.316_406_25, 0.105_468_75, 0.140_625, 0.1875, 0.25];
            let state: std::collections::BTreeMap<_, _> = optimizer.state().into_iter().collect();
            for group in layout() {
                let average = state[&ema_name(&group.name)];
                for (at, average) in group.range.zip(average) {
                    let exact: f64 = were.iter().zip(weights).map(|(were, w)| w * f64::from(were[at])).sum();
                    assert!((f64::from(*average) - exact).abs() < 1e-6, "{}: {average} {exact}", group.name);
                }
            }
        }
    }

    #[test]
    fn only_matrices_decay() {
        for kind in [OptimizerKind::Adamw, OptimizerKind::Muon] {
            let mut optimizer = Optimizer::new(&config(kind), layout(), 5).unwrap();
            let mut parameters = vec![1.0; LENGTH];
            let stats = optimizer.step(&mut parameters, &vec![0.0; LENGTH]).unwrap();
            assert_eq!((stats.gradient_norm, stats.learning_rate, stats.clipped), (0.0, 0.005, false));
            for group in layout() {
                let expected = if group.kind == ParameterKind::Matrix { 1.0 - 0.005_f32 * 0.1 } else { 1.0 };
                assert!(parameters[group.range].iter().all(|&value| value == expected), "{}", group.name);
            }
        }
    }

    #[test]
    fn gradients_that_are_not_finite_change_nothing() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut optimizer = Optimizer::new(&config(OptimizerKind::Muon), layout(), 5).unwrap();
            let mut parameters = noise(LENGTH, 77);
            train(&mut optimizer, &mut parameters, 0..1);
            let before = (parameters.clone(), format!("{:?}", optimizer.state()));
            let mut gradients = noise(LENGTH, 1);
            (gradients[6023], gradients[6900]) = (bad, bad);
            let error = optimizer.step(&mut parameters, &gradients).unwrap_err();
            assert_eq!(
                error.to_string(),
                "step 1: the gradient of up is not finite at row 1, column 3 \
                 (2 elements of all gradients are not)"
            );
            assert!(error.hint().is_some());
            assert_eq!((parameters, format!("{:?}", optimizer.state())), before);
            assert_eq!(optimizer.step_count(), 1);
        }
    }

    #[test]
    fn layouts_that_do_not_tile_are_refused() {
        let kind = ParameterKind::Matrix;
        let cases = [
            vec![group("a", 1, 2, 2, kind)],
            vec![group("a", 0, 2, 2, kind), group("b", 5, 1, 1, kind)],
            vec![group("a", 0, 2, 2, kind), group("b", 3, 1, 1, kind)],
            vec![group("a", 0, 2, 2, kind), group("a", 4, 1, 1, kind)],
            vec![ParameterGroup { rows: 3, ..group("a", 0, 2, 2, kind) }],
            vec![ParameterGroup { rows: usize::MAX, ..group("a", 0, 2, 2, kind) }],
        ];
        for groups in cases {
            let result = Optimizer::new(&OptimizerConfig::default(), groups, 1);
            assert!(matches!(result, Err(OptimizerError::Layout { .. })));
        }
    }

    #[test]
    fn slices_must_fit_the_layout() {
        let mut optimizer = Optimizer::new(&OptimizerConfig::default(), layout(), 1).unwrap();
        let (mut short, mut right) = (vec![0.0; 3], vec![0.0; LENGTH]);
        let refused =
            |result| matches!(result, Err(OptimizerError::Length { expected: LENGTH, found: 3, .. }));
        assert!(refused(optimizer.step(&mut short, &right.clone())));
        assert!(refused(optimizer.step(&mut right, &short)));
        let mut empty = Optimizer::new(&OptimizerConfig::default(), Vec::new(), 1).unwrap();
        assert_eq!(empty.step(&mut [], &[]).unwrap().gradient_norm, 0.0);
    }
}

//! Parameters in full precision and the optimiser's state in the machine's memory.

use super::optimizer::{Optimizer, OptimizerError, ParameterGroup, StepStats};
use super::trainer::{TrainError, TrainerState};
use crate::config::OptimizerConfig;
use rayon::prelude::*;
use std::borrow::Cow;

/// What an update changes besides the weights that a decoder computes with.
pub(super) struct MachineStore {
    parameters: Vec<f32>,
    optimizer: Optimizer,
}

impl MachineStore {
    pub(super) fn new(
        parameters: Vec<f32>,
        groups: Vec<ParameterGroup>,
        config: &OptimizerConfig,
        total_steps: u64,
    ) -> Result<Self, OptimizerError> {
        let mut optimizer = Optimizer::new(config, groups, total_steps)?;
        optimizer.begin_average(&parameters)?;
        Ok(Self { parameters, optimizer })
    }

    /// Updates made so far.
    pub(super) fn updates(&self) -> u64 {
        self.optimizer.step_count()
    }

    /// The parameters, which a decoder's weights are rounded from after every update.
    pub(super) fn parameters(&self) -> &[f32] {
        &self.parameters
    }

    /// Moves the parameters by their gradients.
    pub(super) fn step(&mut self, gradients: &[f32]) -> Result<StepStats, TrainError> {
        let update = self.updates();
        let stats = self.optimizer.step(&mut self.parameters, gradients)?;
        let count = self.parameters.par_iter().filter(|value| !value.is_finite()).count();
        if count > 0 { Err(TrainError::NonFiniteWeights { update, count }) } else { Ok(stats) }
    }

    pub(super) fn state(&self) -> TrainerState<'_> {
        let optimizer = self.optimizer.state().into_iter();
        TrainerState {
            parameters: Cow::Borrowed(&self.parameters),
            optimizer: optimizer.map(|(name, values)| (name, Cow::Borrowed(values))).collect(),
            updates: self.updates(),
        }
    }

    pub(super) fn restore<E>(
        &mut self,
        updates: u64,
        read: &mut impl FnMut(&str, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.optimizer.set_step_count(updates);
        self.optimizer.state_mut().into_iter().try_for_each(|(name, values)| read(&name, values))
    }
}

//! The trainer on a CUDA device: gradients lie there beside the decoder's weights, and so do parameters and moments,
//! unless they are offloaded.

mod pass;
mod store;

use super::batch::MicroBatch;
use super::objective::{Objective, Totals};
use super::optimizer::{ParameterGroup, StepStats};
use super::trainer::{TrainError, TrainerState, UpdateStats, UpdateTimes};
use crate::config::OptimizerConfig;
use crate::cuda::{Buffer, Device, SliceMut};
use crate::model::device::{DeviceDecoder, Format};
use crate::model::{Decoder, ModelError, Schedule, on_device};
use crate::time::Time;
use pass::{Marks, Pass};
use store::Store;

/// Share of the free memory that the tape of a micro-batch may take, in percent; the rest is for the backward pass and
/// the logits.
const TAPE_PERCENT: u64 = 50;

/// Gradients, and what they move.
pub(in crate::train) struct DeviceTrainer {
    device: Device,
    gradients: Buffer<f32>,
    store: Store,
    limits: Limits,
}

/// What memory allows, found out as it runs short.
#[derive(Clone, Copy)]
struct Limits {
    /// Micro-batches of more tokens compute their layers again in the backward pass.
    tokens_on_tape: u64,
    /// Micro-batches of more tokens run by schedule, so many at a time.
    tokens: usize,
}

impl Limits {
    /// The next smaller ones, for an update whose largest micro-batch has so many tokens; none below one token.
    fn smaller(self, largest: usize) -> Option<Self> {
        if self.tokens_on_tape > 0 {
            return Some(Self { tokens_on_tape: 0, ..self });
        }
        let tokens = largest.min(self.tokens) / 2;
        (tokens > 0).then_some(Self { tokens, ..self })
    }
}

impl DeviceTrainer {
    /// A trainer of `decoder`, whose parameters are rounded from `parameters`.
    pub(in crate::train) fn new(
        device: &Device,
        decoder: &Decoder,
        parameters: Vec<f32>,
        groups: Vec<ParameterGroup>,
        config: &OptimizerConfig,
        total_steps: u64,
    ) -> Result<Self, TrainError> {
        if decoder.trainable().len() != decoder.layout().len() {
            return Err(TrainError::OnlyOnCpu { what: "training an adapter" });
        }
        Ok(Self {
            gradients: device.allocate("the gradients", parameters.len())?,
            store: Store::new(device, parameters, groups, config, total_steps)?,
            limits: Limits { tokens_on_tape: u64::MAX, tokens: usize::MAX },
            device: device.clone(),
        })
    }

    pub(in crate::train) fn state(&self) -> Result<TrainerState<'_>, TrainError> {
        self.store.state()
    }

    pub(in crate::train) fn restore<E: From<TrainError>>(
        &mut self,
        updates: u64,
        read: &mut impl FnMut(&str, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.store.restore(updates, read)
    }

    pub(in crate::train) fn update(
        &mut self,
        decoder: &mut Decoder,
        batches: &[MicroBatch],
        objective: Objective,
        reference: Option<&Decoder>,
        activation_bytes: Option<u64>,
    ) -> Result<UpdateStats, TrainError> {
        let Some(there) = decoder.on_device_mut()? else {
            return Err(TrainError::OnlyOnCpu { what: "a decoder that is not there" });
        };
        on_device!(there, decoder => {
            let pass = Pass { decoder, reference, objective };
            let (totals, [forward, backward], retries) = self.accumulate_all(&pass, batches, activation_bytes)?;
            totals.check(self.store.updates())?;
            let (stats, optimizer) = Time::of(|| self.store.step(decoder, &self.gradients));
            let StepStats { gradient_norm, learning_rate, .. } = stats?;
            let times = UpdateTimes { forward, backward, optimizer };
            Ok(UpdateStats { totals, gradient_norm, learning_rate, retries, times })
        })
    }

    /// Gradients of all micro-batches. Where memory does not suffice all is begun again with smaller ones, so that nothing
    /// is added twice.
    fn accumulate_all<T: Format>(
        &mut self,
        pass: &Pass<T>,
        batches: &[MicroBatch],
        activation_bytes: Option<u64>,
    ) -> Result<(Totals, [Time; 2], u64), TrainError> {
        let mut retries = 0;
        loop {
            let (done, passes) = Time::of(|| self.attempt(pass, batches, activation_bytes));
            let largest = batches.iter().map(|batch| batch.forest.ids().len()).max().unwrap_or(0);
            match done {
                Ok((totals, seconds)) => return Ok((totals, passes.split(seconds), retries)),
                Err(ModelError::Cuda(error)) if error.is_out_of_memory() => {
                    match self.limits.smaller(largest) {
                        Some(limits) => self.limits = limits,
                        None => return Err(error.into()),
                    }
                }
                Err(error) => return Err(error.into()),
            }
            retries += 1;
        }
    }

    fn attempt<T: Format>(
        &mut self,
        pass: &Pass<T>,
        batches: &[MicroBatch],
        activation_bytes: Option<u64>,
    ) -> Result<(Totals, [f64; 2]), ModelError> {
        SliceMut::from(&mut self.gradients).fill_with_zeros()?;
        let (mut totals, mut marks) = (Totals::default(), Marks::default());
        let tokens = self.tokens_at_a_time(pass.decoder, activation_bytes);
        for batch in batches {
            let recompute = self.recomputes(pass.decoder, batch, activation_bytes)?;
            for schedule in Schedule::of(&batch.forest, tokens, tokens) {
                let gradients = &mut self.gradients;
                totals.absorb(&pass.accumulate(batch, &schedule, recompute, gradients, &mut marks)?);
            }
        }
        Ok((totals, marks.seconds()?))
    }

    /// Micro-batches of more tokens run by schedule: those that have run out of memory, and those whose layers' inputs alone
    /// are more than activations may take. What is free at the moment decides nothing here, since it would decide the order of
    /// sums.
    fn tokens_at_a_time<T: Format>(
        &self,
        decoder: &DeviceDecoder<T>,
        activation_bytes: Option<u64>,
    ) -> usize {
        let allowed = activation_bytes.map(|bytes| bytes / decoder.input_bytes_per_token().max(1) as u64);
        let allowed = allowed.and_then(|tokens| usize::try_from(tokens).ok());
        self.limits.tokens.min(allowed.unwrap_or(usize::MAX))
    }

    /// Whether the tape of a micro-batch would take too much.
    fn recomputes<T: Format>(
        &self,
        decoder: &DeviceDecoder<T>,
        batch: &MicroBatch,
        activation_bytes: Option<u64>,
    ) -> Result<bool, ModelError> {
        let tokens = batch.forest.ids().len() as u64;
        let needed = tokens * decoder.tape_bytes_per_token() as u64;
        let allowed = match activation_bytes {
            Some(bytes) => bytes,
            None => self.device.memory()?.free as u64 / 100 * TAPE_PERCENT,
        };
        Ok(tokens > self.limits.tokens_on_tape || needed > allowed)
    }
}

//! The trainer on a CUDA device: parameters, moments and gradients lie there, and so do the decoder's weights.

use super::batch::{Component, MicroBatch};
use super::objective::{Objective, Totals, rows_and_tokens};
use super::optimizer::{AdamwStep, ParameterGroup, ParameterKind, check_layout, locate_non_finite};
use super::schedule::learning_rate;
use super::trainer::{TrainError, TrainerState, UpdateStats, UpdateTimes};
use crate::config::{OptimizerConfig, OptimizerKind};
use crate::cuda::optimizer::{self, AdamwState, Chunks, Clip};
use crate::cuda::{Buffer, Device, Event, Slice, SliceMut};
use crate::model::device::{DeviceDecoder, DeviceTape, Format};
use crate::model::{Decoder, ModelError, Targets, TokenGradient, TokenScore, on_device};
use crate::time::Time;
use std::borrow::Cow;

/// Share of the free memory that the tape of a micro-batch may take, in percent; the rest is for the backward pass and
/// the logits.
const TAPE_PERCENT: u64 = 50;

/// Parameters, gradients and the optimiser in a device's memory.
pub(super) struct DeviceTrainer {
    device: Device,
    config: OptimizerConfig,
    groups: Vec<ParameterGroup>,
    total_steps: u64,
    updates: u64,
    chunks: Chunks,
    /// The parameters in full precision, which the decoder's are rounded from in every update.
    parameters: Buffer<f32>,
    first_moments: Buffer<f32>,
    second_moments: Buffer<f32>,
    gradients: Buffer<f32>,
    limits: Limits,
}

/// What memory allows, found out as it runs short.
#[derive(Clone, Copy)]
struct Limits {
    /// Micro-batches of more tokens compute their layers again in the backward pass.
    tokens_on_tape: u64,
    /// Micro-batches of more tokens are split.
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

/// What all micro-batches of an update share.
struct Pass<'a, T> {
    decoder: &'a DeviceDecoder<T>,
    reference: Option<&'a Decoder>,
    objective: Objective<'a>,
}

/// Marks around the passes of micro-batches.
struct Marks {
    start: Event,
    middle: Event,
    end: Event,
}

impl DeviceTrainer {
    /// A trainer of `decoder`, whose parameters are rounded from `parameters`.
    pub(super) fn new(
        device: &Device,
        decoder: &Decoder,
        parameters: &[f32],
        groups: Vec<ParameterGroup>,
        config: &OptimizerConfig,
        total_steps: u64,
    ) -> Result<Self, TrainError> {
        if config.kind != OptimizerKind::Adamw {
            return Err(TrainError::OnlyOnCpu { what: "the optimiser Muon" });
        }
        if decoder.trainable().len() != decoder.layout().len() {
            return Err(TrainError::OnlyOnCpu { what: "training an adapter" });
        }
        check_layout(&groups)?;
        let parts: Vec<_> =
            groups.iter().map(|group| (group.range.clone(), group.kind == ParameterKind::Matrix)).collect();
        let count = parameters.len();
        Ok(Self {
            chunks: Chunks::new(device, &parts)?,
            parameters: device.upload("the parameters", parameters)?,
            first_moments: device.zeroed("the first moments", count)?,
            second_moments: device.zeroed("the second moments", count)?,
            gradients: device.zeroed("the gradients", count)?,
            limits: Limits { tokens_on_tape: u64::MAX, tokens: usize::MAX },
            device: device.clone(),
            config: config.clone(),
            groups,
            total_steps,
            updates: 0,
        })
    }

    pub(super) fn state(&self) -> Result<TrainerState<'_>, TrainError> {
        let mut optimizer = Vec::with_capacity(2 * self.groups.len());
        for group in &self.groups {
            for (part, moments) in
                [("first_moment", &self.first_moments), ("second_moment", &self.second_moments)]
            {
                let values = moments.slice(group.range.clone())?.download()?;
                optimizer.push((format!("{}.{part}", group.name), Cow::Owned(values)));
            }
        }
        let parameters = Cow::Owned(self.parameters.download()?);
        Ok(TrainerState { parameters, optimizer, updates: self.updates })
    }

    pub(super) fn restore<E: From<TrainError>>(
        &mut self,
        updates: u64,
        read: &mut impl FnMut(&str, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.updates = updates;
        for group in &self.groups {
            let mut values = vec![0.0; group.range.len()];
            for (part, moments) in
                [("first_moment", &mut self.first_moments), ("second_moment", &mut self.second_moments)]
            {
                read(&format!("{}.{part}", group.name), &mut values)?;
                let slice = moments.slice_mut(group.range.clone());
                slice.and_then(|mut slice| slice.upload(&values)).map_err(TrainError::from)?;
            }
        }
        Ok(())
    }

    pub(super) fn update(
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
            totals.check(self.updates)?;
            let (stats, optimizer) = Time::of(|| self.step(decoder));
            let (gradient_norm, learning_rate) = stats?;
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
        let (mut totals, mut marks) = (Totals::default(), Vec::with_capacity(batches.len()));
        for batch in batches {
            let parts = batch.split(self.limits.tokens);
            for batch in parts.iter() {
                let recompute = self.recomputes(pass.decoder, batch, activation_bytes)?;
                let (sums, mark) = pass.accumulate(batch, recompute, &mut self.gradients)?;
                totals.absorb(&sums);
                marks.push(mark);
            }
        }
        let mut seconds = [0.0; 2];
        for Marks { start, middle, end } in &marks {
            seconds[0] += f64::from(middle.milliseconds_since(start)?) / 1e3;
            seconds[1] += f64::from(end.milliseconds_since(middle)?) / 1e3;
        }
        Ok((totals, seconds))
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

    /// Moves the parameters by the gradients; returns the gradient's norm and the learning rate.
    fn step<T: Format>(&mut self, decoder: &mut DeviceDecoder<T>) -> Result<(f64, f32), TrainError> {
        let rate = learning_rate(&self.config, self.updates, self.total_steps);
        let clip = optimizer::clip(&self.device, Slice::from(&self.gradients), self.config.max_grad_norm)?;
        let figures = clip.read()?;
        if figures.refused {
            let gradients = self.gradients.download()?;
            return Err(locate_non_finite(self.groups.iter(), &gradients, self.updates).into());
        }
        self.updates += 1;
        self.move_parameters(decoder, rate, &clip)?;
        self.check_parameters()?;
        Ok((figures.norm, rate))
    }

    fn move_parameters<T: Format>(
        &mut self,
        decoder: &mut DeviceDecoder<T>,
        rate: f32,
        clip: &Clip,
    ) -> Result<(), TrainError> {
        let step = AdamwStep::new(&self.config, rate, 1.0, self.updates);
        let state = AdamwState::<T, f32> {
            parameters: SliceMut::from(&mut self.parameters),
            first: SliceMut::from(&mut self.first_moments),
            second: SliceMut::from(&mut self.second_moments),
            weights: Some(SliceMut::from(decoder.weights_mut())),
            average: None,
        };
        let step = step.on_device(self.updates);
        Ok(optimizer::adamw(&self.device, &self.chunks, &step, clip, Slice::from(&self.gradients), state)?)
    }

    /// The sum of squares is finite when all parameters are.
    fn check_parameters(&self) -> Result<(), TrainError> {
        if !optimizer::clip(&self.device, Slice::from(&self.parameters), 0.0)?.read()?.refused {
            return Ok(());
        }
        let count = self.parameters.download()?.iter().filter(|value| !value.is_finite()).count();
        Err(TrainError::NonFiniteWeights { update: self.updates - 1, count })
    }
}

impl<T: Format> Pass<'_, T> {
    /// Adds one micro-batch's gradient.
    fn accumulate(
        &self,
        batch: &MicroBatch,
        recompute: bool,
        gradients: &mut Buffer<f32>,
    ) -> Result<(Totals, Marks), ModelError> {
        let (decoder, device) = (self.decoder, self.decoder.device());
        let marks = Marks { start: device.event()?, middle: device.event()?, end: device.event()? };
        marks.start.record()?;
        let there = decoder.batch(&batch.forest)?;
        let mut tape = DeviceTape::new(recompute);
        let x = decoder.forward(&there, Some(&mut tape))?;
        let mut totals = Totals::default();
        let reference = self.reference_logprobs(batch, &mut totals)?;
        marks.middle.record()?;
        let mut grad_x = device.zeroed("the gradient of the residual stream", x.len())?;
        for kind in self.kinds(batch) {
            let Kind { rows, tokens, places, inverse_temperature } = &kind;
            let targets = Targets { rows, tokens, inverse_temperature: *inverse_temperature };
            let derivative = |at: usize, score: &TokenScore| {
                let target = places[at];
                let reference = reference.as_ref().map(|logprobs| logprobs[target]);
                match self.objective.token(&batch.targets[target].component, score, reference, &mut totals) {
                    TokenGradient::Logprob(slope) | TokenGradient::PolicyLogprob(slope) => slope,
                }
            };
            decoder.head_backward(&there, &x, &targets, derivative, &mut grad_x, gradients)?;
        }
        drop(x);
        decoder.backward(&there, tape, grad_x, gradients)?;
        marks.end.record()?;
        let config = decoder.config();
        let passes = if recompute { 4 } else { 3 };
        totals.flops += passes * config.layer_flops(there.rows(), there.plan.pairs());
        totals.flops += 3 * config.head_flops(batch.targets.len());
        Ok((totals, marks))
    }

    /// Targets by the temperature of the log-probability that their loss is made of.
    fn kinds(&self, batch: &MicroBatch) -> Vec<Kind> {
        let (rows, tokens) = rows_and_tokens(batch);
        let policy = |at: &usize| matches!(batch.targets[*at].component, Component::Policy { .. });
        let (policies, likelihoods): (Vec<usize>, Vec<usize>) = (0..rows.len()).partition(policy);
        let kind = |places: Vec<usize>, inverse_temperature: f32| Kind {
            rows: places.iter().map(|at| rows[*at]).collect(),
            tokens: places.iter().map(|at| tokens[*at]).collect(),
            places,
            inverse_temperature,
        };
        let kinds = [kind(policies, self.objective.inverse_temperature), kind(likelihoods, 1.0)];
        kinds.into_iter().filter(|kind| !kind.places.is_empty()).collect()
    }

    /// The reference model's log-probabilities of the targets.
    fn reference_logprobs(
        &self,
        batch: &MicroBatch,
        totals: &mut Totals,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let Some(reference) = self.reference else { return Ok(None) };
        let Some(reference) = reference.on_device()? else { return Ok(None) };
        let (rows, tokens) = rows_and_tokens(batch);
        let inverse_temperature = self.objective.inverse_temperature;
        let targets = Targets { rows: &rows, tokens: &tokens, inverse_temperature };
        on_device!(&**reference, reference => {
            let there = reference.batch(&batch.forest)?;
            let x = reference.forward(&there, None)?;
            let scores = reference.score(&there, &x, &targets)?;
            totals.flops += reference.config().layer_flops(there.rows(), there.plan.pairs());
            totals.flops += reference.config().head_flops(rows.len());
            Ok(Some(scores.iter().map(|score| score.policy_logprob).collect()))
        })
    }
}

/// Targets whose loss is made of log-probabilities at one temperature.
struct Kind {
    rows: Vec<usize>,
    tokens: Vec<u32>,
    /// Their numbers in the micro-batch.
    places: Vec<usize>,
    inverse_temperature: f32,
}

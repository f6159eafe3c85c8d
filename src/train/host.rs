//! The trainer on the CPU: micro-batches are dealt to gradient buffers that are summed in order.

use super::batch::MicroBatch;
use super::objective::{Objective, Totals, rows_and_tokens};
use super::optimizer::{Optimizer, OptimizerError, ParameterGroup, StepStats};
use super::trainer::{TrainError, TrainerState, UpdateStats, UpdateTimes};
use crate::config::OptimizerConfig;
use crate::kernels::elementary::add;
use crate::model::{Decoder, KvCache, ModelError, Tape, Targets, TokenScore, Workspace};
use crate::time::Time;
use rayon::prelude::*;
use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Gradient buffers that micro-batches are spread over, whatever the number of threads.
const LANES: usize = 4;
/// Parameters above which one gradient buffer serves, with parallelism inside each operation.
const LANES_UP_TO: usize = 16 << 20;

/// Bytes of activations that all gradient lanes may hold unless a caller says otherwise.
const ACTIVATION_BYTES: u64 = 2 << 30;

/// Parameters, gradients and the optimiser in the machine's memory.
pub(super) struct HostTrainer {
    /// The parameters in full precision, which the decoder's are rounded from after every update.
    parameters: Vec<f32>,
    optimizer: Optimizer,
    lanes: Vec<Lane>,
    /// Buffers that no lane is using: as many come to be as lanes ever ran at a time.
    spare: Mutex<Vec<Buffers>>,
}

/// One gradient buffer.
struct Lane {
    gradients: Vec<f32>,
    /// Seconds of the last update in forward and backward passes.
    seconds: (f64, f64),
}

/// Everything else that a forward and backward pass needs.
struct Buffers {
    workspace: Workspace,
    tape: Tape,
    cache: KvCache,
}

/// What all micro-batches of an update share.
#[derive(Clone, Copy)]
struct Pass<'a> {
    decoder: &'a Decoder,
    reference: Option<&'a Decoder>,
    objective: Objective<'a>,
}

impl HostTrainer {
    /// A trainer of `decoder`, whose parameters are rounded from `parameters`.
    pub(super) fn new(
        decoder: &Decoder,
        parameters: Vec<f32>,
        groups: Vec<ParameterGroup>,
        config: &OptimizerConfig,
        steps: u64,
    ) -> Result<Self, OptimizerError> {
        let optimizer = Optimizer::new(config, groups, steps)?;
        let lanes = (0..Self::gradient_buffers(decoder.layout().len()))
            .map(|_| Lane { gradients: vec![0.0; parameters.len()], seconds: (0.0, 0.0) })
            .collect();
        Ok(Self { parameters, optimizer, lanes, spare: Mutex::default() })
    }

    /// Gradient buffers for a number of parameters.
    pub(super) fn gradient_buffers(parameters: usize) -> usize {
        if parameters <= LANES_UP_TO { LANES } else { 1 }
    }

    pub(super) fn state(&self) -> TrainerState<'_> {
        let optimizer = self.optimizer.state().into_iter();
        TrainerState {
            parameters: Cow::Borrowed(&self.parameters),
            optimizer: optimizer.map(|(name, values)| (name, Cow::Borrowed(values))).collect(),
            updates: self.optimizer.step_count(),
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

    pub(super) fn update(
        &mut self,
        decoder: &mut Decoder,
        batches: &[MicroBatch],
        objective: Objective,
        reference: Option<&Decoder>,
        activation_bytes: Option<u64>,
    ) -> Result<UpdateStats, TrainError> {
        let pass = Pass { decoder, reference, objective };
        let count = self.lanes.len();
        let bytes = activation_bytes.unwrap_or(ACTIVATION_BYTES);
        let tokens_on_tape = bytes / (count * decoder.tape_bytes_per_token()).max(1) as u64;
        let spare = &self.spare;
        let in_lane = |(number, lane): (usize, &mut Lane)| {
            lane.gradients.fill(0.0);
            lane.seconds = (0.0, 0.0);
            let mut buffers = Buffers::take(spare, pass.decoder);
            let mut totals = Totals::default();
            for batch in batches.iter().skip(number).step_by(count) {
                buffers.tape.recompute = batch.forest.ids().len() as u64 > tokens_on_tape;
                totals.absorb(&lane.accumulate(pass, batch, &mut buffers)?);
            }
            totals.flops = buffers.workspace.flops;
            buffers.give_back(spare);
            Ok(totals)
        };
        let (parts, passes): (Vec<Result<Totals, ModelError>>, _) =
            Time::of(|| self.lanes.par_iter_mut().enumerate().map(in_lane).collect());
        let mut totals = Totals::default();
        for part in parts {
            totals.absorb(&part?);
        }
        totals.check(self.optimizer.step_count())?;
        let (stats, optimizer) = Time::of(|| self.step(decoder));
        let StepStats { gradient_norm, learning_rate, .. } = stats?;
        let seconds = self.lanes.iter().map(|lane| lane.seconds);
        let (forward, backward) = seconds.fold((0.0, 0.0), |sum, lane| (sum.0 + lane.0, sum.1 + lane.1));
        let [forward, backward] = passes.split([forward, backward]);
        let times = UpdateTimes { forward, backward, optimizer };
        Ok(UpdateStats { totals, gradient_norm, learning_rate, retries: 0, times })
    }

    /// Moves the parameters by the lanes' gradients.
    fn step(&mut self, decoder: &mut Decoder) -> Result<StepStats, TrainError> {
        let update = self.optimizer.step_count();
        let (first, others) = self.lanes.split_at_mut(1);
        for lane in others {
            add(&mut first[0].gradients, &lane.gradients);
        }
        let (optimizer, gradients) = (&mut self.optimizer, &first[0].gradients);
        let stats = optimizer.step(&mut self.parameters, gradients)?;
        let count = self.parameters.iter().filter(|value| !value.is_finite()).count();
        if count > 0 {
            return Err(TrainError::NonFiniteWeights { update, count });
        }
        decoder.set_parameters(&self.parameters);
        Ok(stats)
    }
}

impl Buffers {
    /// Buffers that are free, or new ones; what they hold is of no use any more.
    fn take(spare: &Mutex<Vec<Self>>, decoder: &Decoder) -> Self {
        let free = spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut buffers = free.unwrap_or_else(|| Self {
            workspace: Workspace::default(),
            tape: Tape::default(),
            cache: decoder.new_cache(),
        });
        buffers.workspace.flops = 0;
        buffers
    }

    fn give_back(self, spare: &Mutex<Vec<Self>>) {
        spare.lock().unwrap_or_else(PoisonError::into_inner).push(self);
    }
}

impl Lane {
    /// Adds one micro-batch's gradient.
    fn accumulate(
        &mut self,
        pass: Pass,
        batch: &MicroBatch,
        buffers: &mut Buffers,
    ) -> Result<Totals, ModelError> {
        let forest = &batch.forest;
        let (rows, tokens) = rows_and_tokens(batch);
        let (Self { gradients, seconds }, Buffers { workspace, tape, cache }) = (self, buffers);
        cache.clear();
        let extensions = forest.enter(cache);
        let start = Instant::now();
        pass.decoder.forward(forest.ids(), &extensions, cache, workspace, Some(tape))?;
        let reference = match pass.reference {
            None => None,
            Some(reference) => {
                Some(pass.reference_logprobs(reference, batch, &rows, &tokens, &mut workspace.flops)?)
            }
        };
        let middle = Instant::now();
        let mut totals = Totals::default();
        let gradient = |at: usize, score: &TokenScore| {
            let reference = reference.as_ref().map(|logprobs| logprobs[at]);
            pass.objective.token(&batch.targets[at].component, score, reference, &mut totals)
        };
        let inverse_temperature = pass.objective.inverse_temperature;
        let targets = Targets { rows: &rows, tokens: &tokens, inverse_temperature };
        pass.decoder.backward(tape, cache, &targets, gradient, gradients, workspace);
        seconds.0 += (middle - start).as_secs_f64();
        seconds.1 += middle.elapsed().as_secs_f64();
        Ok(totals)
    }
}

impl Pass<'_> {
    /// The reference model's log-probabilities of the same targets.
    fn reference_logprobs(
        &self,
        reference: &Decoder,
        batch: &MicroBatch,
        rows: &[usize],
        tokens: &[u32],
        flops: &mut u64,
    ) -> Result<Vec<f32>, ModelError> {
        let (mut cache, mut workspace) = (reference.new_cache(), Workspace::default());
        let extensions = batch.forest.enter(&mut cache);
        reference.forward(batch.forest.ids(), &extensions, &mut cache, &mut workspace, None)?;
        let states = reference.hidden(&workspace, rows);
        let scores = reference.score(&states, tokens, self.objective.inverse_temperature, &mut workspace);
        *flops += workspace.flops;
        Ok(scores.iter().map(|score| score.policy_logprob).collect())
    }
}

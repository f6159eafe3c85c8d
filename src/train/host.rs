//! The trainer on the CPU: micro-batches are dealt to gradient buffers that are summed in order.

use super::batch::MicroBatch;
use super::machine::MachineStore;
use super::objective::{Objective, Totals};
use super::optimizer::{OptimizerError, ParameterGroup, StepStats};
use super::step::Step;
use super::trainer::{TrainError, TrainerState, UpdateStats, UpdateTimes};
use crate::config::OptimizerConfig;
use crate::kernels::elementary::add;
use crate::kernels::parallel;
use crate::model::{
    Carried, Decoder, Forest, KvCache, ModelError, NodeId, PrefixGradients, Schedule, Tape, Targets,
    TokenScore, Workspace,
};
use crate::time::Time;
use rayon::prelude::*;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Gradient buffers that micro-batches are spread over at most, whatever the number of threads.
const LANES: usize = 4;
/// Bytes of gradient buffers beyond which fewer serve, with more parallelism inside each operation.
const LANE_BYTES: usize = 256 << 20;

/// Bytes of activations that all gradient lanes may hold unless a caller says otherwise.
const ACTIVATION_BYTES: u64 = 2 << 30;
/// Tokens behind a prefix that a lane computes at a time, as far as the prefix does not grow by it too much: more take memory
/// and are no faster where prefixes are shorter than some thousand tokens.
const TOKENS_AT_ONCE: usize = 1024;
/// The same where there is one lane, so that all threads share each operation.
const TOKENS_ON_ALL_THREADS: usize = 4096;

/// Parameters, gradients and the optimiser in the machine's memory.
pub(super) struct HostTrainer {
    store: MachineStore,
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

/// Everything else that forward and backward passes need.
struct Buffers {
    policy: Side,
    prefix_tape: Tape,
    part_tape: Tape,
    carried: PrefixGradients,
}

/// One model on its way through a schedule.
struct Side {
    workspace: Workspace,
    cache: KvCache,
    /// The segments of the prefix.
    prefix: Vec<NodeId>,
    prefix_rows: usize,
    /// The segments of the part that is computed now.
    part: Vec<NodeId>,
}

/// How many tokens a lane may hold.
#[derive(Clone, Copy)]
struct Limits {
    /// With all that the backward pass needs.
    tokens_on_tape: usize,
    /// With the inputs of layers, which are computed again.
    tokens: usize,
    /// Behind a prefix.
    at_once: usize,
}

impl Limits {
    /// For each of the lanes that activations of so many bytes are shared by.
    fn of(decoder: &Decoder, bytes: u64, lanes: usize) -> Self {
        let tokens = |bytes_per_token: usize| {
            usize::try_from(bytes / (lanes * bytes_per_token).max(1) as u64).unwrap_or(usize::MAX)
        };
        Self {
            tokens_on_tape: tokens(decoder.tape_bytes_per_token()),
            tokens: tokens(decoder.input_bytes_per_token()),
            at_once: if lanes > 1 { TOKENS_AT_ONCE } else { TOKENS_ON_ALL_THREADS },
        }
    }

    /// In which parts a forest is computed, and whether its layers are computed again: where no parts of a fair size are small
    /// enough that all is held which the backward pass needs.
    fn schedules(self, forest: &Forest) -> (Vec<Schedule>, bool) {
        let kept = Schedule::of(forest, self.tokens_on_tape, self.at_once);
        if kept.iter().all(|schedule| schedule.held(forest) <= self.tokens_on_tape) {
            return (kept, false);
        }
        (Schedule::of(forest, self.tokens, self.at_once), true)
    }
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
        let lanes = (0..Self::gradient_buffers(decoder.layout().len()))
            .map(|_| Lane { gradients: vec![0.0; parameters.len()], seconds: (0.0, 0.0) })
            .collect();
        Ok(Self {
            store: MachineStore::new(parameters, groups, config, steps)?,
            lanes,
            spare: Mutex::default(),
        })
    }

    /// Gradient buffers for a number of parameters: four, two or one, which share the micro-batches of a step evenly.
    pub(super) fn gradient_buffers(parameters: usize) -> usize {
        let room = LANE_BYTES / (size_of::<f32>() * parameters.max(1));
        1 << room.clamp(1, LANES).ilog2()
    }

    pub(super) fn state(&self) -> TrainerState<'_> {
        self.store.state()
    }

    pub(super) fn restore<E>(
        &mut self,
        updates: u64,
        read: &mut impl FnMut(&str, &mut [f32]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.store.restore(updates, read)
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
        let limits = Limits::of(decoder, activation_bytes.unwrap_or(ACTIVATION_BYTES), count);
        let spare = &self.spare;
        let in_lane = |(number, lane): (usize, &mut Lane)| {
            parallel::clear(&mut lane.gradients);
            lane.seconds = (0.0, 0.0);
            let mut buffers = Buffers::take(spare, pass.decoder);
            let mut totals = Totals::default();
            for batch in batches.iter().skip(number).step_by(count) {
                totals.absorb(&lane.accumulate(pass, batch, limits, &mut buffers)?);
            }
            totals.flops = buffers.policy.workspace.flops;
            buffers.give_back(spare);
            Ok(totals)
        };
        let (parts, passes): (Vec<Result<Totals, ModelError>>, _) =
            Time::of(|| self.lanes.par_iter_mut().enumerate().map(in_lane).collect());
        let mut totals = Totals::default();
        for part in parts {
            totals.absorb(&part?);
        }
        totals.check(self.store.updates())?;
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
        let (first, others) = self.lanes.split_at_mut(1);
        for lane in others {
            add(&mut first[0].gradients, &lane.gradients);
        }
        let stats = self.store.step(&first[0].gradients)?;
        decoder.set_parameters(self.store.parameters());
        Ok(stats)
    }
}

impl Buffers {
    /// Buffers that are free, or new ones; what they hold is of no use any more.
    fn take(spare: &Mutex<Vec<Self>>, decoder: &Decoder) -> Self {
        let free = spare.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut buffers = free.unwrap_or_else(|| Self {
            policy: Side::new(decoder),
            prefix_tape: Tape::default(),
            part_tape: Tape::default(),
            carried: PrefixGradients::default(),
        });
        buffers.policy.workspace.flops = 0;
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
        limits: Limits,
        buffers: &mut Buffers,
    ) -> Result<Totals, ModelError> {
        let (schedules, recompute) = limits.schedules(&batch.forest);
        (buffers.prefix_tape.recompute, buffers.part_tape.recompute) = (recompute, recompute);
        let mut totals = Totals::default();
        let mut reference = pass.reference.map(Side::new);
        for schedule in schedules {
            self.follow(pass, batch, &schedule, buffers, reference.as_mut(), &mut totals)?;
        }
        Ok(totals)
    }

    fn follow(
        &mut self,
        pass: Pass,
        batch: &MicroBatch,
        schedule: &Schedule,
        buffers: &mut Buffers,
        mut reference: Option<&mut Side>,
        totals: &mut Totals,
    ) -> Result<(), ModelError> {
        let Buffers { policy, prefix_tape, part_tape, carried } = buffers;
        policy.clear();
        if let Some(reference) = &mut reference {
            reference.clear();
        }
        let (prefix, parts) = Step::all(batch, schedule);
        let wanted = self.forward(pass, &prefix, policy, reference.as_deref_mut(), prefix_tape)?;
        policy.keep(&prefix);
        if let Some(reference) = &mut reference {
            reference.keep(&prefix);
        }
        carried.reset(pass.decoder.config(), prefix.len());
        for step in parts {
            let wanted = self.forward(pass, &step, policy, reference.as_deref_mut(), part_tape)?;
            let carried = Carried::ToPrefix(carried);
            self.backward(pass, &step, wanted.as_deref(), policy, part_tape, carried, totals);
            policy.release();
            if let Some(reference) = &mut reference {
                reference.release();
            }
        }
        let carried = Carried::FromParts(carried);
        self.backward(pass, &prefix, wanted.as_deref(), policy, prefix_tape, carried, totals);
        Ok(())
    }

    /// The forward pass; returns the reference model's log-probabilities of the targets.
    fn forward(
        &mut self,
        pass: Pass,
        step: &Step,
        policy: &mut Side,
        reference: Option<&mut Side>,
        tape: &mut Tape,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let start = Instant::now();
        policy.forward(pass.decoder, step, Some(tape))?;
        let logprobs = match pass.reference.zip(reference) {
            None => None,
            Some((decoder, side)) => {
                let inverse_temperature = pass.objective.inverse_temperature;
                let logprobs = side.logprobs(decoder, step, inverse_temperature)?;
                policy.workspace.flops += std::mem::take(&mut side.workspace.flops);
                Some(logprobs)
            }
        };
        self.seconds.0 += start.elapsed().as_secs_f64();
        Ok(logprobs)
    }

    fn backward(
        &mut self,
        pass: Pass,
        step: &Step,
        reference: Option<&[f32]>,
        policy: &mut Side,
        tape: &Tape,
        carried: Carried,
        totals: &mut Totals,
    ) {
        if step.len() == 0 {
            return;
        }
        let start = Instant::now();
        let gradient = |at: usize, score: &TokenScore| {
            let reference = reference.map(|logprobs| logprobs[at]);
            pass.objective.token(&step.batch.targets[at].component, score, reference, totals)
        };
        let inverse_temperature = pass.objective.inverse_temperature;
        let targets = Targets { rows: &step.rows, tokens: &step.tokens, inverse_temperature };
        let Side { cache, workspace, .. } = policy;
        let gradients = &mut self.gradients;
        pass.decoder.backward_in_schedule(tape, cache, &targets, gradient, carried, gradients, workspace);
        self.seconds.1 += start.elapsed().as_secs_f64();
    }
}

impl Side {
    fn new(decoder: &Decoder) -> Self {
        Self {
            workspace: Workspace::default(),
            cache: decoder.new_cache(),
            prefix: Vec::new(),
            prefix_rows: 0,
            part: Vec::new(),
        }
    }

    /// Forgets all segments.
    fn clear(&mut self) {
        self.cache.clear();
        self.prefix.clear();
        self.prefix_rows = 0;
        self.part.clear();
    }

    /// Computes what a step has behind its path.
    fn forward(&mut self, decoder: &Decoder, step: &Step, tape: Option<&mut Tape>) -> Result<(), ModelError> {
        let path: Vec<NodeId> = step.path.iter().map(|place| self.prefix[*place]).collect();
        let forest = &step.batch.forest;
        let extensions = forest.enter_behind(&mut self.cache, &path, self.prefix_rows);
        self.part = extensions.iter().map(|extension| extension.node).collect();
        if step.len() == 0 {
            return Ok(());
        }
        let ids = &forest.ids()[step.start..];
        decoder.forward(ids, &extensions, &mut self.cache, &mut self.workspace, tape)
    }

    /// Log-probabilities of a step's targets.
    fn logprobs(
        &mut self,
        decoder: &Decoder,
        step: &Step,
        inverse_temperature: f32,
    ) -> Result<Vec<f32>, ModelError> {
        self.forward(decoder, step, None)?;
        let states = decoder.hidden(&self.workspace, &step.rows);
        let scores = decoder.score(&states, &step.tokens, inverse_temperature, &mut self.workspace);
        Ok(scores.iter().map(|score| score.policy_logprob).collect())
    }

    /// What was computed last is the prefix.
    fn keep(&mut self, step: &Step) {
        self.prefix = std::mem::take(&mut self.part);
        self.prefix_rows = step.len();
    }

    /// What was computed last is not needed any more.
    fn release(&mut self) {
        // Children come behind their parents.
        self.part.drain(..).rev().for_each(|node| self.cache.release(node));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_computed_again_only_where_no_parts_fit() {
        let mut forest = Forest::default();
        let trunk = forest.add(None, &[0; 300]);
        for _ in 0..8 {
            let footer = forest.add(Some(trunk), &[0; 20]);
            (0..4).for_each(|_| _ = forest.add(Some(footer), &[0; 40]));
        }
        let planned = |tokens_on_tape, at_once| {
            let (schedules, again) = Limits { tokens_on_tape, tokens: 10_000, at_once }.schedules(&forest);
            let [schedule] = &schedules[..] else { unreachable!() };
            (schedule.parts.len(), schedule.held(&forest), again)
        };
        assert_eq!(planned(10_000, 10_000), (1, 1740, false));
        assert_eq!(planned(10_000, 400), (4, 660, false));
        assert_eq!(planned(700, 10_000), (4, 660, false));
        // The trunk alone has no room.
        assert_eq!(planned(299, 400), (4, 660, true));
    }

    #[test]
    fn gradient_buffers_have_bounded_room_and_one_there_always_is() {
        let buffers = HostTrainer::gradient_buffers;
        assert_eq!([0, 1, 16 << 20, 20_000_000, 32 << 20].map(buffers), [4, 4, 4, 2, 2]);
        assert_eq!([(32 << 20) + 1, 500_000_000, usize::MAX / 4].map(buffers), [1, 1, 1]);
        assert!(
            (1..64 << 20).step_by(99_991).all(|parameters| 4 * parameters * buffers(parameters) <= 256 << 20)
        );
    }
}

//! The trainer: executes micro-batches and updates the decoder.

use super::batch::{Component, MicroBatch};
use super::loss::{PolicyLoss, PolicyToken};
use super::optimizer::{Optimizer, OptimizerError, ParameterGroup, ParameterKind, StepStats};
use crate::config::OptimizerConfig;
use crate::kernels::elementary::add;
use crate::model::{Decoder, KvCache, ModelError, Role, Tape, Targets, TokenGradient, TokenScore, Workspace};
use crate::time::Time;
use rayon::prelude::*;
use std::ops::AddAssign;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Gradient buffers that micro-batches are spread over, whatever the number of threads.
const LANES: usize = 4;
/// Parameters above which one gradient buffer serves, with parallelism inside each operation.
const LANES_UP_TO: usize = 16 << 20;

/// Why an update did not happen.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// The model could not be run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The optimiser refused.
    #[error(transparent)]
    Optimizer(#[from] OptimizerError),
    /// The loss is not a number.
    #[error("the loss of update {update} is {loss}: the update was not made")]
    NonFiniteLoss {
        /// Number of the update, from 0.
        update: u64,
        /// The loss.
        loss: f64,
    },
    /// An update would have left the weights infinite or not a number.
    #[error("update {update} left {count} weights that are not finite: it will not be committed")]
    NonFiniteWeights {
        /// Number of the update, from 0.
        update: u64,
        /// How many weights.
        count: usize,
    },
}

impl TrainError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Model(error) => error.hint(),
            Self::Optimizer(error) => error.hint(),
            Self::NonFiniteLoss { .. } | Self::NonFiniteWeights { .. } => Some(
                "lower optimizer.learning_rate or raise optimizer.warmup_steps; a changed pipeline needs a directory of \
                 its own (--out)"
                    .into(),
            ),
        }
    }
}

/// Sums over the targets of an update.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Totals {
    /// Weighted policy loss, divergence included.
    pub policy_loss: f64,
    /// Weighted likelihood loss.
    pub likelihood_loss: f64,
    /// Policy tokens.
    pub policy_tokens: u64,
    /// Likelihood tokens.
    pub likelihood_tokens: u64,
    /// Entropy of the policy tokens' distributions at temperature 1, summed, in nats.
    pub entropy: f64,
    /// Estimated divergence from the reference, summed.
    pub kl: f64,
    /// Policy tokens whose ratio was clipped.
    pub clipped: u64,
    /// Policy tokens whose log-probability differs from the engine's in any bit.
    pub mismatched: u64,
    /// Largest difference from the engine's log-probability.
    pub largest_mismatch: f32,
    /// Floating-point operations, counted from shapes.
    pub flops: u64,
}

impl Totals {
    /// Adds the sums of another part of the same step.
    pub fn absorb(&mut self, other: &Self) {
        self.policy_loss += other.policy_loss;
        self.likelihood_loss += other.likelihood_loss;
        self.policy_tokens += other.policy_tokens;
        self.likelihood_tokens += other.likelihood_tokens;
        self.entropy += other.entropy;
        self.kl += other.kl;
        self.clipped += other.clipped;
        self.mismatched += other.mismatched;
        self.largest_mismatch = self.largest_mismatch.max(other.largest_mismatch);
        self.flops += other.flops;
    }
}

/// What one update did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UpdateStats {
    /// Sums over its targets.
    pub totals: Totals,
    /// Global norm of the gradient before clipping.
    pub gradient_norm: f64,
    /// Learning rate.
    pub learning_rate: f32,
    /// How long its parts took.
    pub times: UpdateTimes,
}

/// How long the parts of an update took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UpdateTimes {
    /// Forward passes through the layers, and those of the reference model.
    pub forward: Time,
    /// Backward passes, with the head, whose forward pass goes along with them.
    pub backward: Time,
    /// The optimiser, with rounding and packing of the weights.
    pub optimizer: Time,
}

impl AddAssign for UpdateTimes {
    fn add_assign(&mut self, other: Self) {
        self.forward += other.forward;
        self.backward += other.backward;
        self.optimizer += other.optimizer;
    }
}

/// Bytes of activations that all gradient lanes may hold unless [`Trainer::activation_bytes`] is set.
const ACTIVATION_BYTES: u64 = 2 << 30;

/// A decoder with its optimiser.
pub struct Trainer {
    decoder: Decoder,
    /// The parameters in full precision, which the decoder's are rounded from after every update.
    parameters: Vec<f32>,
    /// Bytes of activations that all lanes together may hold; where a micro-batch needs more, its
    /// layers are computed again in the backward pass.
    pub activation_bytes: u64,
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
    loss: &'a PolicyLoss,
    inverse_temperature: f32,
}

impl Trainer {
    /// A trainer for a stage of `steps` updates.
    ///
    /// # Errors
    /// When the optimiser refuses the decoder's layout.
    pub fn new(decoder: Decoder, config: &OptimizerConfig, steps: u64) -> Result<Self, TrainError> {
        let parameters = decoder.parameters();
        Self::resume(decoder, parameters, config, steps)
    }

    /// A trainer that goes on with parameters in full precision, of which the decoder's are rounded.
    ///
    /// # Errors
    /// As [`Trainer::new`].
    pub fn resume(
        decoder: Decoder,
        parameters: Vec<f32>,
        config: &OptimizerConfig,
        steps: u64,
    ) -> Result<Self, TrainError> {
        let optimizer = Optimizer::new(config, parameter_groups(&decoder), steps)?;
        let lanes = (0..Self::gradient_buffers(decoder.layout().len()))
            .map(|_| Lane { gradients: vec![0.0; parameters.len()], seconds: (0.0, 0.0) })
            .collect();
        let (activation_bytes, spare) = (ACTIVATION_BYTES, Mutex::default());
        Ok(Self { decoder, parameters, activation_bytes, optimizer, lanes, spare })
    }

    /// Gradient buffers for a number of parameters.
    pub fn gradient_buffers(parameters: usize) -> usize {
        if parameters <= LANES_UP_TO { LANES } else { 1 }
    }

    /// The decoder as it is now.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Gives the decoder back.
    pub fn into_decoder(self) -> Decoder {
        self.decoder
    }

    /// The optimiser, for checkpoints.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// The optimiser, for resuming.
    pub fn optimizer_mut(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    /// The parameters in full precision, laid out as the decoder's layout says.
    pub fn parameters(&self) -> &[f32] {
        &self.parameters
    }

    /// One update from some micro-batches. The result depends on the micro-batches alone, not on
    /// the number of threads.
    ///
    /// # Errors
    /// When the model cannot be run, or loss, gradient or weights are not finite. In the first
    /// two cases nothing has changed.
    pub fn update(
        &mut self,
        batches: &[MicroBatch],
        loss: &PolicyLoss,
        inverse_temperature: f32,
        reference: Option<&Decoder>,
    ) -> Result<UpdateStats, TrainError> {
        let pass = Pass { decoder: &self.decoder, reference, loss, inverse_temperature };
        let count = self.lanes.len();
        let tokens_on_tape =
            self.activation_bytes / (count * self.decoder.tape_bytes_per_token()).max(1) as u64;
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
        let loss = totals.policy_loss + totals.likelihood_loss;
        let update = self.optimizer.step_count();
        if !loss.is_finite() {
            return Err(TrainError::NonFiniteLoss { update, loss });
        }
        let (stats, optimizer) = Time::of(|| self.step(update));
        let StepStats { gradient_norm, learning_rate, .. } = stats?;
        let seconds = self.lanes.iter().map(|lane| lane.seconds);
        let (forward, backward) = seconds.fold((0.0, 0.0), |sum, lane| (sum.0 + lane.0, sum.1 + lane.1));
        let [forward, backward] = passes.split([forward, backward]);
        let times = UpdateTimes { forward, backward, optimizer };
        Ok(UpdateStats { totals, gradient_norm, learning_rate, times })
    }

    /// Moves the parameters by the lanes' gradients.
    fn step(&mut self, update: u64) -> Result<StepStats, TrainError> {
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
        self.decoder.set_parameters(&self.parameters);
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
        let (rows, tokens): (Vec<usize>, Vec<u32>) = batch
            .targets
            .iter()
            .filter_map(|target| Some((forest.row_before(target.segment, target.at)?, target.token)))
            .unzip();
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
            pass.token_gradient(&batch.targets[at].component, score, reference, &mut totals)
        };
        let inverse_temperature = pass.inverse_temperature;
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
        let scores = reference.score(&states, tokens, self.inverse_temperature, &mut workspace);
        *flops += workspace.flops;
        Ok(scores.iter().map(|score| score.policy_logprob).collect())
    }

    fn token_gradient(
        &self,
        component: &Component,
        score: &TokenScore,
        reference: Option<f32>,
        totals: &mut Totals,
    ) -> TokenGradient {
        match *component {
            Component::Likelihood { weight } => {
                totals.likelihood_loss -= f64::from(weight) * f64::from(score.logprob);
                totals.likelihood_tokens += 1;
                TokenGradient::Logprob(-weight)
            }
            Component::Policy { weight, advantage, old_logprob, engine_logprob } => {
                let loss = self.loss.token(&PolicyToken {
                    logprob: score.policy_logprob,
                    old_logprob,
                    reference_logprob: reference,
                    advantage,
                });
                totals.policy_loss += f64::from(weight) * f64::from(loss.loss);
                totals.policy_tokens += 1;
                totals.entropy += f64::from(score.entropy);
                totals.kl += f64::from(loss.kl);
                totals.clipped += u64::from(loss.clipped_low || loss.clipped_high);
                totals.mismatched += u64::from(score.logprob.to_bits() != engine_logprob.to_bits());
                totals.largest_mismatch = totals.largest_mismatch.max((score.logprob - engine_logprob).abs());
                TokenGradient::PolicyLogprob(weight * loss.gradient)
            }
        }
    }
}

fn parameter_groups(decoder: &Decoder) -> Vec<ParameterGroup> {
    let kind = |role| match role {
        Role::Matrix => ParameterKind::Matrix,
        Role::Embedding => ParameterKind::Embedding,
        Role::Norm | Role::Bias => ParameterKind::Vector,
    };
    decoder
        .trainable()
        .parameters()
        .iter()
        .map(|parameter| ParameterGroup {
            name: parameter.name.clone(),
            range: parameter.range.clone(),
            rows: parameter.rows,
            columns: parameter.columns,
            kind: kind(parameter.role),
        })
        .collect()
}

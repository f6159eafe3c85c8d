//! One schedule of a micro-batch: forward, loss, backward.

use super::super::batch::{Component, MicroBatch};
use super::super::objective::{Objective, Totals};
use super::super::step::Step;
use crate::cuda::{Buffer, Device, Event};
use crate::model::device::{Batch, DeviceDecoder, DevicePrefix, DeviceTape, Format};
use crate::model::{Decoder, ModelError, Schedule, Targets, TokenGradient, TokenScore, on_device};

/// What all micro-batches of an update share.
pub(super) struct Pass<'a, T> {
    pub(super) decoder: &'a DeviceDecoder<T>,
    pub(super) reference: Option<&'a Decoder>,
    pub(super) objective: Objective<'a>,
}

/// Marks before and behind the passes of an update.
#[derive(Default)]
pub(super) struct Marks {
    forward: Vec<[Event; 2]>,
    backward: Vec<[Event; 2]>,
}

impl Marks {
    /// Seconds of forward and of backward passes.
    pub(super) fn seconds(&self) -> Result<[f64; 2], ModelError> {
        let mut seconds = [0.0; 2];
        for (seconds, spans) in seconds.iter_mut().zip([&self.forward, &self.backward]) {
            for [start, end] in spans {
                *seconds += f64::from(end.milliseconds_since(start)?) / 1e3;
            }
        }
        Ok(seconds)
    }
}

/// A mark here.
fn mark(device: &Device) -> Result<Event, ModelError> {
    let mark = device.event()?;
    mark.record()?;
    Ok(mark)
}

/// One model on its way through a schedule.
struct Side<'a, T> {
    decoder: &'a DeviceDecoder<T>,
    /// Nothing where the prefix has no rows.
    prefix: Option<DevicePrefix<T>>,
}

impl<'a, T: Format> Side<'a, T> {
    fn new(decoder: &'a DeviceDecoder<T>) -> Self {
        Self { decoder, prefix: None }
    }

    /// The rows of the prefix, if there are any, which are to be computed next.
    fn begin(&mut self, prefix: &Step) -> Result<Option<Batch>, ModelError> {
        if prefix.len() == 0 {
            return Ok(None);
        }
        let there = self.decoder.batch(&prefix.batch.forest)?;
        self.prefix = Some(DevicePrefix::new(self.decoder, &there)?);
        Ok(Some(there))
    }

    /// The rows of a part, if there are any.
    fn part(&self, step: &Step) -> Result<Option<Batch>, ModelError> {
        let forest = &step.batch.forest;
        match &self.prefix {
            _ if step.len() == 0 => Ok(None),
            Some(prefix) => self.decoder.batch_behind(forest, prefix, &step.path).map(Some),
            None => self.decoder.batch(forest).map(Some),
        }
    }

    /// Log-probabilities of a step's targets.
    fn logprobs(
        &mut self,
        there: Option<&Batch>,
        step: &Step,
        inverse_temperature: f32,
        totals: &mut Totals,
    ) -> Result<Vec<f32>, ModelError> {
        let Some(there) = there else { return Ok(Vec::new()) };
        let x = self.forward(there, None)?;
        let targets = Targets { rows: &step.rows, tokens: &step.tokens, inverse_temperature };
        let scores = self.decoder.score(there, &x, &targets)?;
        totals.flops += self.decoder.config().layer_flops(there.rows(), there.plan.pairs());
        totals.flops += self.decoder.config().head_flops(step.rows.len());
        Ok(scores.iter().map(|score| score.policy_logprob).collect())
    }

    fn forward(
        &mut self,
        there: &Batch,
        tape: Option<&mut DeviceTape<T>>,
    ) -> Result<Buffer<f32>, ModelError> {
        Ok(self.decoder.forward_in_schedule(there, self.prefix.as_mut(), tape)?)
    }
}

/// A step whose backward pass is to come.
struct Forwarded<T> {
    there: Batch,
    tape: DeviceTape<T>,
    x: Buffer<f32>,
}

/// What the backward passes of a schedule add to.
struct Sums<'a> {
    gradients: &'a mut Buffer<f32>,
    totals: Totals,
}

impl<T: Format> Pass<'_, T> {
    /// Adds the gradient of one schedule of a micro-batch.
    pub(super) fn accumulate(
        &self,
        batch: &MicroBatch,
        schedule: &Schedule,
        recompute: bool,
        gradients: &mut Buffer<f32>,
        marks: &mut Marks,
    ) -> Result<Totals, ModelError> {
        let mut sums = Sums { gradients, totals: Totals::default() };
        let start = mark(self.decoder.device())?;
        let mut reference = self.reference_logprobs(batch, schedule, &mut sums.totals)?.into_iter();
        marks.forward.push([start, mark(self.decoder.device())?]);
        let mut side = Side::new(self.decoder);
        let (prefix, parts) = Step::all(batch, schedule);
        let prefix_reference = reference.next();
        let first = match side.begin(&prefix)? {
            Some(there) => Some(self.forward(there, &mut side, recompute, marks)?),
            None => None,
        };
        for step in parts {
            let reference = reference.next();
            if let Some(there) = side.part(&step)? {
                let done = self.forward(there, &mut side, recompute, marks)?;
                self.backward(&step, done, &mut side, reference.as_deref(), &mut sums, marks)?;
            }
        }
        if let Some(first) = first {
            self.backward(&prefix, first, &mut side, prefix_reference.as_deref(), &mut sums, marks)?;
        }
        Ok(sums.totals)
    }

    fn forward(
        &self,
        there: Batch,
        side: &mut Side<T>,
        recompute: bool,
        marks: &mut Marks,
    ) -> Result<Forwarded<T>, ModelError> {
        let start = mark(self.decoder.device())?;
        let mut tape = DeviceTape::new(recompute);
        let x = side.forward(&there, Some(&mut tape))?;
        marks.forward.push([start, mark(self.decoder.device())?]);
        Ok(Forwarded { there, tape, x })
    }

    fn backward(
        &self,
        step: &Step,
        done: Forwarded<T>,
        side: &mut Side<T>,
        reference: Option<&[f32]>,
        sums: &mut Sums,
        marks: &mut Marks,
    ) -> Result<(), ModelError> {
        let (decoder, device) = (self.decoder, self.decoder.device());
        let (Forwarded { there, tape, x }, Sums { gradients, totals }) = (done, sums);
        let start = mark(device)?;
        let mut grad_x = device.zeroed("the gradient of the residual stream", x.len())?;
        for kind in self.kinds(step) {
            let Kind { rows, tokens, places, inverse_temperature } = &kind;
            let targets = Targets { rows, tokens, inverse_temperature: *inverse_temperature };
            let derivative = |at: usize, score: &TokenScore| {
                let target = &step.batch.targets[places[at]];
                let reference = reference.map(|logprobs| logprobs[places[at]]);
                match self.objective.token(&target.component, score, reference, totals) {
                    TokenGradient::Logprob(slope) | TokenGradient::PolicyLogprob(slope) => slope,
                }
            };
            decoder.head_backward(&there, &x, &targets, derivative, &mut grad_x, gradients)?;
        }
        drop(x);
        let passes = if tape.recompute { 4 } else { 3 };
        decoder.backward_in_schedule(&there, side.prefix.as_mut(), tape, grad_x, gradients)?;
        marks.backward.push([start, mark(device)?]);
        let config = decoder.config();
        totals.flops += passes * config.layer_flops(there.rows(), there.plan.pairs());
        totals.flops += 3 * config.head_flops(step.rows.len());
        Ok(())
    }

    /// Targets by the temperature of the log-probability that their loss is made of.
    fn kinds(&self, step: &Step) -> Vec<Kind> {
        let policy = |at: &usize| matches!(step.batch.targets[*at].component, Component::Policy { .. });
        let (policies, likelihoods): (Vec<usize>, Vec<usize>) = (0..step.rows.len()).partition(policy);
        let kind = |places: Vec<usize>, inverse_temperature: f32| Kind {
            rows: places.iter().map(|at| step.rows[*at]).collect(),
            tokens: places.iter().map(|at| step.tokens[*at]).collect(),
            places,
            inverse_temperature,
        };
        let kinds = [kind(policies, self.objective.inverse_temperature), kind(likelihoods, 1.0)];
        kinds.into_iter().filter(|kind| !kind.places.is_empty()).collect()
    }

    /// The reference model's log-probabilities of the targets of every step, if there is such a model.
    fn reference_logprobs(
        &self,
        batch: &MicroBatch,
        schedule: &Schedule,
        totals: &mut Totals,
    ) -> Result<Vec<Vec<f32>>, ModelError> {
        let Some(reference) = self.reference else { return Ok(Vec::new()) };
        let Some(reference) = reference.on_device()? else { return Ok(Vec::new()) };
        let (prefix, parts) = Step::all(batch, schedule);
        let inverse_temperature = self.objective.inverse_temperature;
        on_device!(&**reference, reference => {
            let mut side = Side::new(reference);
            let there = side.begin(&prefix)?;
            let mut all = vec![side.logprobs(there.as_ref(), &prefix, inverse_temperature, totals)?];
            for step in parts {
                let there = side.part(&step)?;
                all.push(side.logprobs(there.as_ref(), &step, inverse_temperature, totals)?);
            }
            Ok(all)
        })
    }
}

/// Targets whose loss is made of log-probabilities at one temperature.
struct Kind {
    rows: Vec<usize>,
    tokens: Vec<u32>,
    /// Their numbers in the step.
    places: Vec<usize>,
    inverse_temperature: f32,
}

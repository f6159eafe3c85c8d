//! One micro-batch: forward, loss, backward.

use super::super::batch::{Component, MicroBatch};
use super::super::objective::{Objective, Totals, rows_and_tokens};
use crate::cuda::{Buffer, Event};
use crate::model::device::{DeviceDecoder, DeviceTape, Format};
use crate::model::{Decoder, ModelError, Targets, TokenGradient, TokenScore, on_device};

/// What all micro-batches of an update share.
pub(super) struct Pass<'a, T> {
    pub(super) decoder: &'a DeviceDecoder<T>,
    pub(super) reference: Option<&'a Decoder>,
    pub(super) objective: Objective<'a>,
}

/// Marks around the passes of micro-batches.
pub(super) struct Marks {
    pub(super) start: Event,
    pub(super) middle: Event,
    pub(super) end: Event,
}

impl<T: Format> Pass<'_, T> {
    /// Adds one micro-batch's gradient.
    pub(super) fn accumulate(
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

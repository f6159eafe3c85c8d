//! Where drawn tokens arrive on the host.

use crate::cuda::sampling::Drawn;
use crate::cuda::{Device, Number, Pinned, Result, Slice};
use crate::rollout::Draw;

/// Page-locked memory for the tokens of one step: copies to it run beside the host.
#[derive(Debug)]
pub(super) struct Landing {
    tokens: Pinned<u32>,
    /// Of the model, of the policy, and of the distribution that was drawn from.
    logprobs: [Pinned<f32>; 3],
}

impl Landing {
    /// For so many rows.
    ///
    /// # Errors
    /// When the host cannot lock the memory.
    pub(super) fn new(device: &Device, rows: usize) -> Result<Self> {
        let floats = || device.pinned(rows);
        Ok(Self { tokens: device.pinned(rows)?, logprobs: [floats()?, floats()?, floats()?] })
    }

    /// Asks for a copy of what was drawn, of as many rows.
    ///
    /// # Errors
    /// When there are other numbers of rows, or the device has failed.
    pub(super) fn copy(&mut self, drawn: &Drawn) -> Result<()> {
        let [logprobs, policy, sampling] = &mut self.logprobs;
        copy(&drawn.tokens, &mut self.tokens)?;
        copy(&drawn.logprobs, logprobs)?;
        copy(&drawn.policy_logprobs, policy)?;
        copy(&drawn.sampling_logprobs, sampling)
    }

    /// What was drawn, once it is here.
    ///
    /// # Errors
    /// When the device has failed.
    pub(super) fn draws(&self) -> Result<Vec<Draw>> {
        let (tokens, [logprobs, policy, sampling]) = (self.tokens.read()?, &self.logprobs);
        let (logprobs, policy, sampling) = (logprobs.read()?, policy.read()?, sampling.read()?);
        let draw = |row: usize| Draw {
            token: tokens[row],
            logprob: logprobs[row],
            policy_logprob: policy[row],
            sampling_logprob: sampling[row],
        };
        Ok((0..tokens.len()).map(draw).collect())
    }
}

fn copy<'a, T: Number>(from: impl Into<Slice<'a, T>>, to: &mut Pinned<T>) -> Result<()> {
    from.into().download_to(to)
}

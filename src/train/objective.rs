//! What the loss makes of the scores of targets, and its sums over an update.

use super::batch::Component;
use super::loss::{PolicyLoss, PolicyToken};
use super::trainer::TrainError;
use crate::model::{TokenGradient, TokenScore};

/// Difference from the engine's log-probability above which a token is counted as one of large mismatch.
pub const LARGE_MISMATCH: f32 = 1e-2;

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
    /// Differences from the engine's log-probabilities, summed without their signs.
    pub mismatch: f64,
    /// Policy tokens whose difference is above [`LARGE_MISMATCH`].
    pub large_mismatches: u64,
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
        self.mismatch += other.mismatch;
        self.large_mismatches += other.large_mismatches;
        self.flops += other.flops;
    }
}

/// The loss of an update.
#[derive(Clone, Copy)]
pub(super) struct Objective<'a> {
    pub(super) loss: &'a PolicyLoss,
    /// Inverse temperature of the policy.
    pub(super) inverse_temperature: f32,
}

impl Objective<'_> {
    /// The derivative of the loss with respect to a target's log-probability; its share of the sums goes to `totals`.
    pub(super) fn token(
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
                totals.compare(score.logprob, engine_logprob);
                TokenGradient::PolicyLogprob(weight * loss.gradient)
            }
        }
    }
}

impl Totals {
    /// Whether update number `update` may be made.
    ///
    /// # Errors
    /// When its loss is not finite.
    pub(super) fn check(&self, update: u64) -> Result<(), TrainError> {
        let loss = self.policy_loss + self.likelihood_loss;
        if loss.is_finite() { Ok(()) } else { Err(TrainError::NonFiniteLoss { update, loss }) }
    }

    /// Mean difference from the engine's log-probabilities over the policy tokens, without its sign.
    pub fn mean_gap(&self) -> f64 {
        self.mismatch / self.policy_tokens.max(1) as f64
    }

    /// Law 2: how far the trainer's log-probability of a token is from the engine's.
    fn compare(&mut self, logprob: f32, engine_logprob: f32) {
        let mismatch = (logprob - engine_logprob).abs();
        self.mismatched += u64::from(logprob.to_bits() != engine_logprob.to_bits());
        self.largest_mismatch = self.largest_mismatch.max(mismatch);
        self.mismatch += f64::from(mismatch);
        self.large_mismatches += u64::from(mismatch > LARGE_MISMATCH);
    }
}

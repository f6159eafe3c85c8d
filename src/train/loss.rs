//! The clipped policy loss per token, its derivative, and how tokens are averaged.
//!
//! The loss of a step is the weighted sum of token losses, with the weights of [`token_weights`].
//! Derivatives are taken with respect to the new log-probability; the backward pass of the model
//! starts from weight x derivative.

use crate::config::{KlEstimator, LossMean, TrainConfig};

/// What is known about one sampled token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyToken {
    /// Log-probability under the policy that is trained.
    pub logprob: f32,
    /// Log-probability under the policy as it was when the token was sampled.
    pub old_logprob: f32,
    /// Log-probability under the reference model; needed where the divergence has a weight.
    pub reference_logprob: Option<f32>,
    /// Advantage of the token's rollout.
    pub advantage: f32,
}

/// Loss of one token, before the token's weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLoss {
    /// The loss.
    pub loss: f32,
    /// Derivative of the loss with respect to the new log-probability.
    pub gradient: f32,
    /// Importance ratio rho of the new to the old policy.
    pub ratio: f32,
    /// Estimate of the divergence from the reference model, without its weight (0 if unused).
    pub kl: f32,
    /// A negative advantage had its ratio clipped at 1 - `clip_low`.
    pub clipped_low: bool,
    /// A positive advantage had its ratio clipped at 1 + `clip_high`, or capped.
    pub clipped_high: bool,
}

/// A penalty on the divergence from the reference model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KlPenalty {
    /// Factor of the penalty.
    pub weight: f32,
    /// Estimator of the divergence.
    pub estimator: KlEstimator,
    /// Multiply the estimate by the importance ratio, so that its gradient stays unbiased when
    /// the policy has moved away from the one that sampled.
    pub importance_weighted: bool,
}

/// The clipped surrogate of PPO with an optional divergence penalty.
///
/// ```text
/// rho  = exp(logprob - old_logprob)
/// loss = -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) + weight KL
/// ```
///
/// (arXiv 2402.03300 eq. 3; separate clip widths: arXiv 2503.14476.) With
/// x = logprob - `reference_logprob`, KL and its derivative are
///
/// | estimator | plain | derivative | importance weighted | derivative |
/// |---|---|---|---|---|
/// | k2 | x^2 / 2 | x | sg(rho) x^2 / 2 | rho x |
/// | k3 | exp(-x) + x - 1 | 1 - exp(-x) | rho (exp(-x) + x - 1) | rho x |
///
/// where sg stops the gradient. rho x is the unbiased estimate of the exact divergence's gradient;
/// see arXiv 2510.01555 for k2, and for k3 arXiv 2512.02556, as TRL's `use_bias_correction_kl`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PolicyLoss {
    /// Lower clip width.
    pub clip_low: f32,
    /// Upper clip width.
    pub clip_high: f32,
    /// Weigh tokens by their ratio, at most this, instead of clipping it:
    ///
    /// ```text
    /// loss = -sg(min(rho, cap)) A logprob + weight KL
    /// ```
    ///
    /// (CISPO, arXiv 2506.13585 eq. 4, as TRL has it.) In the first update of a step rho is the ratio of trainer to
    /// engine, and this is truncated importance sampling.
    pub cap: Option<f32>,
    /// Penalty on the divergence from the reference model.
    pub kl: Option<KlPenalty>,
}

impl PolicyLoss {
    /// The loss that a `[train]` section describes.
    ///
    /// k2 is importance weighted, which changes nothing on-policy and keeps it right off-policy;
    /// k3 is the plain term of GRPO (arXiv 2402.03300 eq. 4).
    pub fn new(config: &TrainConfig) -> Self {
        let recipe = config.recipe();
        let kl = (config.kl_weight != 0.0).then(|| KlPenalty {
            weight: config.kl_weight,
            estimator: config.kl_estimator,
            importance_weighted: config.kl_estimator == KlEstimator::K2,
        });
        Self { clip_low: recipe.clip_low, clip_high: recipe.clip_high, cap: config.importance_cap, kl }
    }

    /// Loss and derivative of one token.
    ///
    /// Input that is not finite gives output that is not finite, and so does a penalty without a
    /// reference log-probability: the optimiser refuses such a gradient, so neither passes unseen.
    pub fn token(&self, token: &PolicyToken) -> TokenLoss {
        let ratio = (f64::from(token.logprob) - f64::from(token.old_logprob)).exp();
        let advantage = f64::from(token.advantage);
        let Surrogate { value, slope, clipped_low, clipped_high } = match self.cap {
            None => self.clipped(ratio, advantage),
            Some(cap) => capped(ratio, advantage, token.logprob, cap),
        };
        let penalty = self.kl.map(|kl| kl.evaluate(token, ratio)).unwrap_or_default();
        TokenLoss {
            loss: (penalty.weighted - value) as f32,
            gradient: (penalty.gradient - slope) as f32,
            ratio: ratio as f32,
            kl: penalty.kl as f32,
            clipped_low,
            clipped_high,
        }
    }
}

/// What is to be maximised for a token, and its derivative.
struct Surrogate {
    value: f64,
    slope: f64,
    clipped_low: bool,
    clipped_high: bool,
}

impl PolicyLoss {
    /// PPO's clipped ratio.
    fn clipped(&self, ratio: f64, advantage: f64) -> Surrogate {
        let (lower, upper) = (1.0 - f64::from(self.clip_low), 1.0 + f64::from(self.clip_high));
        let clipped_low = ratio < lower && advantage < 0.0;
        let clipped_high = ratio > upper && advantage > 0.0;
        let (value, slope) = match (clipped_low, clipped_high) {
            (true, _) => (lower * advantage, 0.0),
            (_, true) => (upper * advantage, 0.0),
            _ => (ratio * advantage, ratio * advantage),
        };
        Surrogate { value, slope, clipped_low, clipped_high }
    }
}

/// The log-probability, weighted by the capped ratio.
fn capped(ratio: f64, advantage: f64, logprob: f32, cap: f32) -> Surrogate {
    let slope = ratio.min(f64::from(cap)) * advantage;
    let clipped_high = ratio > f64::from(cap) && advantage > 0.0;
    Surrogate { value: slope * f64::from(logprob), slope, clipped_low: false, clipped_high }
}

/// A divergence estimate, the same times its weight, and the derivative of the latter.
#[derive(Clone, Copy, Debug, Default)]
struct Penalty {
    kl: f64,
    weighted: f64,
    gradient: f64,
}

impl KlPenalty {
    fn evaluate(self, token: &PolicyToken, ratio: f64) -> Penalty {
        let reference = token.reference_logprob.map_or(f64::NAN, f64::from);
        let x = f64::from(token.logprob) - reference;
        let (plain, plain_gradient) = match self.estimator {
            KlEstimator::K2 => (x * x / 2.0, x),
            KlEstimator::K3 => ((-x).exp_m1() + x, -(-x).exp_m1()),
        };
        let (kl, gradient) =
            if self.importance_weighted { (ratio * plain, ratio * x) } else { (plain, plain_gradient) };
        let weight = f64::from(self.weight);
        Penalty { kl, weighted: weight * kl, gradient: weight * gradient }
    }
}

/// Weight of each token of each sequence in the loss of a step.
///
/// `lengths` are the scored tokens of every sequence of the step, whatever micro-batches they are
/// computed in. With n sequences of lengths l, a token of sequence i weighs
///
/// ```text
/// LossMean::Token      1 / sum(l)                 DAPO; TRL: dapo, bnpo
/// LossMean::Sequence   1 / (n l_i)                GRPO; TRL: grpo
/// LossMean::Constant   1 / (n max_new_tokens)     Dr. GRPO; TRL: dr_grpo
/// ```
///
/// A sequence without tokens counts in n and weighs nothing.
pub fn token_weights(lengths: &[usize], mean: LossMean, max_new_tokens: usize) -> Vec<f32> {
    let sequences = lengths.len() as f64;
    let tokens = lengths.iter().sum::<usize>() as f64;
    let weight = |length: usize| match mean {
        LossMean::Token => 1.0 / tokens,
        LossMean::Sequence => 1.0 / (sequences * length as f64),
        LossMean::Constant => 1.0 / (sequences * max_new_tokens as f64),
    };
    lengths.iter().map(|&length| if length == 0 { 0.0 } else { weight(length) as f32 }).collect()
}

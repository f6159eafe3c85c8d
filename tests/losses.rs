//! Losses, gradients and advantages against TRL's own, computed by `GRPOTrainer._compute_loss`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, clippy::print_stderr, missing_docs)]

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rpt::config::{AdvantageScale, KlEstimator, LossMean, TrainConfig};
use rpt::train::advantage::advantages;
use rpt::train::loss::{KlPenalty, PolicyLoss, PolicyToken, TokenLoss, token_weights};
use serde_json::Value;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/peers/golden/trl_loss_golden.json");
const TOLERANCE: f64 = 1e-6;

/// Cases of the golden file that are not implemented, by a part of their name, and why.
const NOT_IMPLEMENTED: [(&str, &str); 13] = [
    ("luspo", "sequences weigh their length"),
    ("sapo", "smooth gate in place of the clip"),
    ("vespo", "soft weight on the sequence ratio"),
    ("gspo", "sequence-level ratio"),
    ("delta", "two-sided clip"),
    ("scale_batch", "standard deviation over the batch, which ties groups together"),
    ("tis_", "correction for a sampler that differs from the trainer: here they are one arithmetic"),
    ("off_policy_mask", "drops whole sequences far off-policy"),
    ("entropy_bonus", "no bonus in any recipe for reinforcement pre-training"),
    ("top_entropy", "training on the tokens of highest entropy only"),
    ("bnpo_ga4", "divides by micro-batches: here weights are those of the whole step"),
    ("dr_grpo_ga4", "divides by micro-batches: here weights are those of the whole step"),
    ("grpo_ga4", "divides by micro-batches: here weights are those of the whole step"),
];

fn golden() -> Option<Value> {
    let Ok(text) = std::fs::read_to_string(GOLDEN) else {
        eprintln!("SKIPPED: {GOLDEN} is absent, TRL's losses were not compared");
        return None;
    };
    Some(serde_json::from_str(&text).unwrap())
}

fn row(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|item| item.as_f64().unwrap()).collect()
}

fn rows(value: &Value) -> Vec<Vec<f64>> {
    value.as_array().unwrap().iter().map(row).collect()
}

fn number(config: &Value, key: &str) -> f32 {
    config[key].as_f64().unwrap() as f32
}

fn loss_mean(config: &Value) -> LossMean {
    match config["loss_type"].as_str().unwrap() {
        "grpo" => LossMean::Sequence,
        "bnpo" | "dapo" | "cispo" => LossMean::Token,
        "dr_grpo" => LossMean::Constant,
        other => panic!("loss type {other} is neither implemented nor listed as missing"),
    }
}

fn policy_loss(config: &Value) -> PolicyLoss {
    let beta = number(config, "beta");
    let kl = (beta != 0.0).then(|| KlPenalty {
        weight: beta,
        estimator: KlEstimator::K3,
        importance_weighted: config["use_bias_correction_kl"].as_bool().unwrap(),
    });
    let cap = (config["loss_type"] == "cispo").then(|| number(config, "eps_high"));
    PolicyLoss { clip_low: number(config, "eps_low"), clip_high: number(config, "eps_high"), cap, kl }
}

/// A token's sequence, place, loss and weight.
type Scored = (usize, usize, TokenLoss, f64);

fn evaluate(inputs: &Value, case: &Value) -> Vec<Scored> {
    let config = &case["config"];
    let loss = policy_loss(config);
    let [logprobs, old, reference, mask] = ["logps", "old", "ref", "mask"].map(|key| rows(&inputs[key]));
    let lengths: Vec<usize> = mask.iter().map(|row| row.iter().sum::<f64>() as usize).collect();
    let limit = config["max_completion_length"].as_u64().unwrap() as usize;
    let weights = token_weights(&lengths, loss_mean(config), limit);
    let on_policy = config["on_policy"].as_bool().unwrap();
    let advantages = row(&case["advantages"]);
    let mut scored = Vec::new();
    for (sequence, &length) in lengths.iter().enumerate() {
        for place in 0..length {
            let logprob = logprobs[sequence][place] as f32;
            let token = PolicyToken {
                logprob,
                old_logprob: if on_policy { logprob } else { old[sequence][place] as f32 },
                reference_logprob: Some(reference[sequence][place] as f32),
                advantage: advantages[sequence] as f32,
            };
            scored.push((sequence, place, loss.token(&token), f64::from(weights[sequence])));
        }
    }
    scored
}

/// Losses are compared relative to the size of their terms, which nearly cancel in some cases.
fn check_loss(name: &str, case: &Value, scored: &[Scored]) {
    let terms = scored.iter().map(|(_, _, token, weight)| weight * f64::from(token.loss));
    let size: f64 = terms.clone().map(f64::abs).sum();
    let (loss, expected) = (terms.sum::<f64>(), case["loss"].as_f64().unwrap());
    assert!((loss - expected).abs() <= TOLERANCE * size, "{name}: loss {loss} is not {expected}");
}

/// TRL's penalties carry rounding of their own size, beside which a clipped token has no gradient.
fn check_gradients(name: &str, case: &Value, scored: &[Scored]) {
    let penalty = f64::from(number(&case["config"], "beta"));
    let mut expected = rows(&case["grad"]);
    for (sequence, place, token, weight) in scored {
        let expected = std::mem::take(&mut expected[*sequence][*place]);
        let gradient = weight * f64::from(token.gradient);
        let error = (gradient - expected).abs();
        assert!(
            error <= TOLERANCE * expected.abs().max(penalty * weight),
            "{name}: gradient {gradient} at ({sequence}, {place}) is not {expected}"
        );
    }
    assert!(
        expected.concat().iter().all(|&gradient| gradient == 0.0),
        "{name}: masked tokens have gradients"
    );
}

fn check_metrics(name: &str, case: &Value, scored: &[Scored]) {
    let metrics = &case["metrics"];
    let mean = |value: &dyn Fn(&TokenLoss) -> f64| {
        scored.iter().map(|(_, _, token, _)| value(token)).sum::<f64>() / scored.len() as f64
    };
    let low = mean(&|token| f64::from(u8::from(token.clipped_low)));
    let high = mean(&|token| f64::from(u8::from(token.clipped_high)));
    let mut values = match metrics.get("cispo_clip_ratio") {
        Some(_) => vec![("cispo_clip_ratio", high)],
        None => vec![("clip_ratio/low_mean", low), ("clip_ratio/high_mean", high)],
    };
    if metrics.get("kl").is_some() {
        values.push(("kl", mean(&|token| f64::from(token.kl))));
    }
    for (key, value) in values {
        let expected = metrics[key].as_f64().unwrap();
        assert!((value - expected).abs() <= TOLERANCE, "{name}: {key} {value} is not {expected}");
    }
}

#[test]
fn losses_and_gradients_are_those_of_trl() {
    let Some(golden) = golden() else { return };
    let mut compared = 0;
    for (name, case) in golden["cases"].as_object().unwrap() {
        let missing = NOT_IMPLEMENTED.iter().find(|(part, _)| name.contains(part));
        if let Some((_, reason)) = missing {
            println!("{name}: not implemented: {reason}");
            continue;
        }
        let scored = evaluate(&golden["inputs"], case);
        check_loss(name, case, &scored);
        check_gradients(name, case, &scored);
        check_metrics(name, case, &scored);
        compared += 1;
    }
    assert_eq!(compared, 25);
}

#[test]
fn advantages_are_those_of_trl() {
    let Some(golden) = golden() else { return };
    let rewards: Vec<f32> = row(&golden["inputs"]["rewards"]).iter().map(|&reward| reward as f32).collect();
    for (key, scale) in [("group", AdvantageScale::Std), ("none", AdvantageScale::None)] {
        let values = rewards.chunks(4).flat_map(|group| advantages(group, scale));
        for (value, expected) in values.zip(row(&golden["advantages"][key])) {
            assert!((f64::from(value) - expected).abs() <= TOLERANCE * expected.abs(), "{key}: {value}");
        }
    }
}

fn penalty(estimator: KlEstimator, importance_weighted: bool) -> PolicyLoss {
    let kl = KlPenalty { weight: 1.0, estimator, importance_weighted };
    PolicyLoss { clip_low: 0.2, clip_high: 0.2, cap: None, kl: Some(kl) }
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
    logits.iter().map(|logit| logit.exp() / sum).collect()
}

/// Exact divergence of softmax(logits) from the reference.
fn divergence(logits: &[f64], reference: &[f64]) -> f64 {
    softmax(logits).iter().zip(reference).map(|(p, q)| p * (p / q).ln()).sum()
}

proptest! {
    #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(0), failure_persistence: None, ..ProptestConfig::default() })]

    /// Summed over a whole vocabulary, weighted penalties have the gradient of the exact divergence.
    #[test]
    fn weighted_penalties_have_the_gradient_of_the_divergence(
        logits in prop::collection::vec(-1.0_f64..1.0, 5), old in prop::collection::vec(-1.0_f64..1.0, 5),
        reference in prop::collection::vec(-1.0_f64..1.0, 5), k2: bool,
    ) {
        let (new, old, reference) = (softmax(&logits), softmax(&old), softmax(&reference));
        let loss = penalty(if k2 { KlEstimator::K2 } else { KlEstimator::K3 }, true);
        let slopes: Vec<f64> = (0..5).map(|token| {
            let [logprob, old_logprob, reference] =
                [&new, &old, &reference].map(|probabilities| probabilities[token].ln() as f32);
            let reference_logprob = Some(reference);
            let token_loss = loss.token(&PolicyToken { logprob, old_logprob, reference_logprob, advantage: 0.0 });
            old[token] * f64::from(token_loss.gradient)
        }).collect();
        for index in 0..5 {
            // d log p_token / d logit_index = [token = index] - p_index.
            let estimate = slopes[index] - new[index] * slopes.iter().sum::<f64>();
            let shifted = |by: f64| {
                let mut logits = logits.clone();
                logits[index] += by;
                divergence(&logits, &reference)
            };
            let exact = (shifted(1e-5) - shifted(-1e-5)) / 2e-5;
            prop_assert!((estimate - exact).abs() < 1e-5, "{} is not {}", estimate, exact);
        }
    }

    /// Derivatives agree with differences of the losses, wherever the loss has no detached factor.
    #[test]
    fn gradients_are_slopes(
        logprob in -4.0_f32..-0.1, drift in -0.5_f32..0.5, gap in -1.0_f32..1.0, advantage in -2.0_f32..2.0,
        choice in 0..3_usize,
    ) {
        let loss = [penalty(KlEstimator::K2, false), penalty(KlEstimator::K3, false), penalty(KlEstimator::K3, true)][choice];
        let at = |by: f32| {
            let reference_logprob = Some(logprob - gap);
            loss.token(&PolicyToken { logprob: logprob + by, old_logprob: logprob - drift, reference_logprob, advantage })
        };
        let (below, above) = (at(-1e-2), at(1e-2));
        let crossed = (below.clipped_low, below.clipped_high) != (above.clipped_low, above.clipped_high);
        prop_assume!(!crossed);
        let slope = (above.loss - below.loss) / 2e-2;
        prop_assert!((slope - at(0.0).gradient).abs() < 2e-3, "{} is not {}", at(0.0).gradient, slope);
    }

    #[test]
    fn weights_average(lengths in prop::collection::vec(0_usize..9, 1..12)) {
        let total = |mean| -> f64 {
            let weights = token_weights(&lengths, mean, 8);
            weights.iter().zip(&lengths).map(|(&weight, &length)| f64::from(weight) * length as f64).sum()
        };
        let count = |kept: &dyn Fn(usize) -> usize| lengths.iter().map(|&length| kept(length)).sum::<usize>() as f64;
        let sequences = lengths.len() as f64;
        prop_assert!((total(LossMean::Token) - f64::from(u8::from(count(&|length| length) > 0.0))).abs() < 1e-5);
        prop_assert!((total(LossMean::Sequence) - count(&|length| length.min(1)) / sequences).abs() < 1e-5);
        prop_assert!((total(LossMean::Constant) - count(&|length| length) / (8.0 * sequences)).abs() < 1e-5);
    }
}

#[test]
fn on_policy_the_gradient_is_the_advantage_bit_for_bit() {
    let loss = PolicyLoss::new(&TrainConfig::default());
    for advantage in [-1.375_f32, 0.3, 0.0, 7.0] {
        let token = PolicyToken { logprob: -1.7, old_logprob: -1.7, reference_logprob: None, advantage };
        let result = loss.token(&token);
        assert_eq!((result.ratio, result.loss, result.gradient), (1.0, -advantage, -advantage));
        assert!(!result.clipped_low && !result.clipped_high);
    }
}

#[test]
fn a_penalty_without_reference_does_not_pass_unseen() {
    let token = PolicyToken { logprob: -1.0, old_logprob: -1.0, reference_logprob: None, advantage: 1.0 };
    let result = penalty(KlEstimator::K2, true).token(&token);
    assert!(result.loss.is_nan() && result.gradient.is_nan());
}

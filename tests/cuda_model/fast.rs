//! The fast mode: the vendor's products, whose bits depend on the number of rows, and attention cut to fill the device.

use crate::engine::{SAMPLES, WARM, engine, prompts, tokenizer};
use crate::support::{decoder, fast_settings};
use rpt::config::TrainConfig;
use rpt::config::{LossMean, OptimizerConfig};
use rpt::model::Dtype;
use rpt::rollout::Sampling;
use rpt::train::loss::PolicyLoss;
use rpt::train::{ScoredGroup, Totals, Trainer, policy_batches};

#[test]
fn replies_are_those_of_the_cpu() {
    let tokenizer = tokenizer();
    for (family, sampling) in [(0, Sampling::GREEDY), (1, WARM), (2, WARM)] {
        let here = decoder(family, Dtype::F32);
        let there = here.clone().on(Some(&fast_settings()));
        let expected = engine(&here, &tokenizer, sampling).generate(&prompts(7), SAMPLES).unwrap();
        let found = engine(&there, &tokenizer, sampling).generate(&prompts(7), SAMPLES).unwrap();
        let again = engine(&there, &tokenizer, sampling).generate(&prompts(7), SAMPLES).unwrap();
        assert_eq!(found.groups, again.groups, "a run repeats bit for bit");
        assert_eq!(found.flops, expected.flops);
        for (found, expected) in found.groups.iter().flatten().zip(expected.groups.iter().flatten()) {
            assert_eq!((&found.tokens, found.finish), (&expected.tokens, expected.finish));
            for (found, expected) in found.logprobs.iter().zip(&expected.logprobs) {
                assert!((found - expected).abs() < 1e-4, "{found} {expected}");
            }
        }
    }
}

/// What the trainer finds of replies that the engine has just sampled.
fn first_update(dtype: Dtype) -> Totals {
    let tokenizer = tokenizer();
    let there = decoder(1, dtype).on(Some(&fast_settings()));
    let prompts = prompts(3);
    let generation = engine(&there, &tokenizer, WARM).generate(&prompts, SAMPLES).unwrap();
    let groups = prompts.iter().zip(&generation.groups);
    let groups: Vec<ScoredGroup> = groups
        .map(|(prompt, rollouts)| ScoredGroup { prompt, rollouts, advantages: vec![1.0; SAMPLES] })
        .collect();
    let batches = policy_batches(&groups, LossMean::Token, 21, 0.0, 100);
    let mut trainer = Trainer::new(there, &OptimizerConfig::default(), 1).unwrap();
    trainer.update(&batches, &PolicyLoss::new(&TrainConfig::default()), 1.0, None).unwrap().totals
}

#[test]
fn the_difference_between_engine_and_trainer_is_measured() {
    for (dtype, limit) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 2e-2)] {
        let totals = first_update(dtype);
        assert!(totals.mismatched > 0 && totals.mean_gap() > 0.0, "{totals:?}");
        assert!(totals.mean_gap() < limit && totals.largest_mismatch < 10.0 * limit as f32, "{totals:?}");
        assert!(totals.large_mismatches <= totals.mismatched);
        assert_eq!(dtype == Dtype::F32, totals.large_mismatches == 0, "{totals:?}");
    }
}

//! Parity with transformers on the golden checkpoints.

use crate::support::settings;
use rpt::model::{Decoder, Dtype};
use serde_json::Value;
use std::path::PathBuf;

fn numbers(value: &Value) -> impl Iterator<Item = f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap())
}

#[test]
fn log_probabilities_are_those_of_transformers() {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/peers/golden"));
    if !root.is_dir() {
        eprintln!("SKIPPED: {} is absent, devices were not compared with transformers", root.display());
        return;
    }
    for name in ["qwen2-pico", "qwen3-pico", "llama-pico"] {
        let text = std::fs::read_to_string(root.join(name).join("golden.json")).unwrap();
        let golden: Value = serde_json::from_str(&text).unwrap();
        for (dtype, tolerance) in [(Dtype::F32, 1e-4), (Dtype::Bf16, 2e-2)] {
            let decoder = Decoder::load_as(&root.join(name), Some(dtype)).unwrap().on(Some(&settings()));
            for sequence in golden["sequences"].as_array().unwrap() {
                let ids: Vec<u32> = numbers(&sequence["ids"]).map(|id| id as u32).collect();
                let scores = decoder.score_sequence(&ids).unwrap();
                for (score, expected) in scores.iter().zip(numbers(&sequence["logprobs"])) {
                    let apart = (f64::from(score.logprob) - expected).abs();
                    assert!(apart < tolerance, "{name} {dtype:?}: {} is not {expected}", score.logprob);
                }
            }
        }
    }
}

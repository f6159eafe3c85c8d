//! Parity with transformers on the golden checkpoints: log-probabilities, entropies, greedy
//! continuations, logits and gradients of three architectures.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use rpt::model::{Decoder, Forest, Tape, Targets, TokenGradient, TokenScore, Workspace};
use serde_json::Value;

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn ids(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|x| x as u32).collect()
}

fn hidden(decoder: &Decoder, ids: &[u32]) -> (Vec<f32>, Workspace) {
    let mut forest = Forest::default();
    forest.add(None, ids);
    let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(ids, &extensions, &mut cache, &mut workspace, None).unwrap();
    let rows: Vec<usize> = (0..ids.len()).collect();
    (decoder.hidden(&workspace, &rows), workspace)
}

fn greedy(decoder: &Decoder, ids: &[u32], count: usize) -> Vec<u32> {
    let mut ids = ids.to_vec();
    let prompt = ids.len();
    let mut logits = Vec::new();
    while ids.len() < prompt + count {
        let (states, mut workspace) = hidden(decoder, &ids);
        let width = decoder.config().hidden_size;
        decoder.logits(&states[states.len() - width..], &mut logits, &mut workspace);
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        ids.push(best as u32);
    }
    ids.split_off(prompt)
}

fn check(name: &str) {
    let Some(directory) = common::shared::path(&format!("peers/golden/{name}")) else { return };
    let decoder = Decoder::load(&directory).unwrap();
    let golden: Value =
        serde_json::from_str(&std::fs::read_to_string(directory.join("golden.json")).unwrap()).unwrap();
    for (at, sequence) in golden["sequences"].as_array().unwrap().iter().enumerate() {
        let tokens = ids(&sequence["ids"]);
        let (states, mut workspace) = hidden(&decoder, &tokens);
        let width = decoder.config().hidden_size;
        let next: Vec<u32> = tokens[1..].iter().copied().chain([0]).collect();
        let scores = decoder.score(&states, &next, 1.0, &mut workspace);
        for (score, expected) in scores.iter().zip(numbers(&sequence["logprobs"])) {
            assert!((f64::from(score.logprob) - expected).abs() < 1e-5, "{name} {at}: {score:?} {expected}");
        }
        for (score, expected) in scores.iter().zip(numbers(&sequence["entropy"])) {
            assert!((f64::from(score.entropy) - expected).abs() < 1e-5, "{name} {at}: {score:?} {expected}");
        }
        let mut logits = Vec::new();
        decoder.logits(&states[states.len() - width..], &mut logits, &mut workspace);
        let top = ids(&sequence["last_top5"]);
        for (id, expected) in top.iter().zip(numbers(&sequence["last_top5_logits"])) {
            assert!((f64::from(logits[*id as usize]) - expected).abs() < 1e-5);
        }
        assert_eq!(greedy(&decoder, &tokens, 16), ids(&sequence["greedy"]), "{name} {at}");
    }
    check_gradients(name, &decoder, &golden);
}

fn check_gradients(name: &str, decoder: &Decoder, golden: &Value) {
    let Some(expected) = golden.get("seq2_grads").and_then(Value::as_object) else { return };
    let tokens = ids(&golden["sequences"][2]["ids"]);
    let mut forest = Forest::default();
    forest.add(None, &tokens);
    let (mut cache, mut workspace, mut tape) = (decoder.new_cache(), Workspace::default(), Tape::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(&tokens, &extensions, &mut cache, &mut workspace, Some(&mut tape)).unwrap();
    let rows: Vec<usize> = (0..tokens.len() - 1).collect();
    let coefficient = -1.0 / rows.len() as f32;
    let targets = Targets { rows: &rows, tokens: &tokens[1..], inverse_temperature: 1.0 };
    let gradient = |_: usize, _: &TokenScore| TokenGradient::Logprob(coefficient);
    let mut gradients = vec![0.0; decoder.parameters().len()];
    decoder.backward(&tape, &mut cache, &targets, gradient, &mut gradients, &mut workspace);
    for parameter in decoder.layout().parameters() {
        let grad = &gradients[parameter.range.clone()];
        let expected = &expected[&parameter.name];
        let norm = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let expected_norm = expected["l2"].as_f64().unwrap();
        assert!(
            (norm / expected_norm - 1.0).abs() < 1e-3,
            "{name} {}: {norm} {expected_norm}",
            parameter.name
        );
        for (got, want) in grad.iter().zip(numbers(&expected["first"])) {
            let error = (f64::from(*got) - want).abs();
            assert!(error < 1e-4 * expected_norm.max(1e-3), "{name} {}: {got} {want}", parameter.name);
        }
    }
}

#[test]
fn qwen2_agrees_with_transformers() {
    check("qwen2-pico");
}

#[test]
fn qwen3_agrees_with_transformers() {
    check("qwen3-pico");
}

#[test]
fn llama_agrees_with_transformers() {
    check("llama-pico");
}

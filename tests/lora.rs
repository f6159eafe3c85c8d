//! Low-rank adapters.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::{model, random_forest};
use rpt::config::{OptimizerConfig, TrainConfig};
use rpt::model::{
    Decoder, Dtype, Forest, LoraShape, MODULES, ModelError, Tape, Targets, TokenGradient, TokenScore,
    Workspace,
};
use rpt::random::Stream;
use rpt::train::loss::PolicyLoss;
use rpt::train::{Component, MicroBatch, Target, Trainer};
use std::fs;

const VOCAB: usize = 97;

fn shape(modules: &[&str]) -> LoraShape {
    LoraShape { rank: 3, alpha: 6.0, modules: modules.iter().map(|name| (*name).to_owned()).collect() }
}

/// An adapter that changes something: B starts at zero otherwise.
fn adapted(kind: usize, modules: &[&str]) -> Decoder {
    let mut decoder = model(kind, VOCAB).with_adapter(shape(modules), 5).unwrap();
    let stream = Stream::new(9, "adapter");
    let values: Vec<f32> =
        (0..decoder.trainable().len()).map(|at| 0.1 * stream.normal(at as u64) as f32).collect();
    decoder.set_parameters(&values);
    decoder
}

fn rows_and_tokens(forest: &Forest) -> (Vec<usize>, Vec<u32>) {
    let segments = forest.segments().iter().enumerate();
    let places = segments.flat_map(|(number, segment)| (0..segment.length).map(move |at| (number, at)));
    places
        .filter_map(|(segment, at)| {
            let row = forest.row_before(segment, at)?;
            Some((row, forest.ids()[forest.segments()[segment].row + at]))
        })
        .unzip()
}

fn objective(decoder: &Decoder, forest: &Forest) -> f64 {
    let (rows, tokens) = rows_and_tokens(forest);
    let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(forest.ids(), &extensions, &mut cache, &mut workspace, None).unwrap();
    let states = decoder.hidden(&workspace, &rows);
    let scores = decoder.score(&states, &tokens, 1.0, &mut workspace);
    scores.iter().map(|score| f64::from(score.logprob)).sum()
}

fn gradient(decoder: &Decoder, forest: &Forest) -> Vec<f32> {
    let (rows, tokens) = rows_and_tokens(forest);
    let (mut cache, mut workspace, mut tape) = (decoder.new_cache(), Workspace::default(), Tape::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(forest.ids(), &extensions, &mut cache, &mut workspace, Some(&mut tape)).unwrap();
    let mut gradients = vec![0.0; decoder.trainable().len()];
    let targets = Targets { rows: &rows, tokens: &tokens, inverse_temperature: 1.0 };
    let gradient = |_: usize, _: &TokenScore| TokenGradient::Logprob(1.0);
    decoder.backward(&tape, &mut cache, &targets, gradient, &mut gradients, &mut workspace);
    gradients
}

#[test]
fn a_new_adapter_changes_nothing() {
    for kind in 0..5 {
        let plain = model(kind, VOCAB);
        let forest = random_forest(kind as u64, VOCAB as u64);
        let adapted = plain.clone().with_adapter(shape(&MODULES), 1).unwrap();
        assert_eq!(objective(&plain, &forest).to_bits(), objective(&adapted, &forest).to_bits());
    }
}

/// By definition: the gradient of A and B is that of W = W0 + alpha / rank B A.
#[test]
fn gradients_are_those_of_the_merged_matrices() {
    for kind in 0..3 {
        let decoder = adapted(kind, &MODULES);
        let forest = random_forest(50 + kind as u64, VOCAB as u64);
        let gradients = gradient(&decoder, &forest);
        // A decoder of the merged weights has the gradient of every whole matrix.
        let directory = tempfile::tempdir().unwrap();
        decoder.save(directory.path(), &[1], None).unwrap();
        let merged = Decoder::load(directory.path()).unwrap();
        assert_eq!(objective(&merged, &forest).to_bits(), objective(&decoder, &forest).to_bits());
        let whole = gradient(&merged, &forest);
        let values = decoder.parameters();
        for pair in decoder.trainable().parameters().chunks(2) {
            let name = pair[0].name.trim_start_matches("base_model.model.").replace(".lora_A", "");
            let matrix = merged.layout().parameters().iter().find(|matrix| matrix.name == name).unwrap();
            let full = &whole[matrix.range.clone()];
            let (rank, inputs) = (pair[0].rows, pair[0].columns);
            let (a, b) = (&values[pair[0].range.clone()], &values[pair[1].range.clone()]);
            let scale = 2.0_f64;
            let product = |at: &dyn Fn(usize) -> f32, count: usize| -> f64 {
                (0..count).map(|at_| f64::from(at(at_))).sum::<f64>() * scale
            };
            let largest = |values: &[f32]| values.iter().fold(1e-3_f64, |m, v| m.max(f64::from(v.abs())));
            let grad_a = &gradients[pair[0].range.clone()];
            for r in 0..rank {
                for i in 0..inputs {
                    let expected = product(&|o| b[o * rank + r] * full[o * inputs + i], matrix.rows);
                    assert!(
                        (expected - f64::from(grad_a[r * inputs + i])).abs() < 1e-4 * largest(grad_a),
                        "{name}"
                    );
                }
            }
            let grad_b = &gradients[pair[1].range.clone()];
            for o in 0..matrix.rows {
                for r in 0..rank {
                    let expected = product(&|i| a[r * inputs + i] * full[o * inputs + i], inputs);
                    assert!(
                        (expected - f64::from(grad_b[o * rank + r])).abs() < 1e-4 * largest(grad_b),
                        "{name}"
                    );
                }
            }
        }
    }
}

#[test]
fn an_adapter_comes_back_from_its_files() {
    for kind in 0..5 {
        let decoder = adapted(kind, &["q_proj", "v_proj", "down_proj"]);
        let directory = tempfile::tempdir().unwrap();
        decoder.save_adapter(directory.path(), "base").unwrap();
        let again = model(kind, VOCAB).with_adapter_of(directory.path()).unwrap();
        assert_eq!(again.parameters(), decoder.parameters());
        let forest = random_forest(80, VOCAB as u64);
        assert_eq!(objective(&again, &forest).to_bits(), objective(&decoder, &forest).to_bits());
    }
    assert!(model(0, VOCAB).save_adapter(tempfile::tempdir().unwrap().path(), "base").is_err());
}

#[test]
fn adapters_that_would_mean_something_else_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    adapted(0, &["q_proj"]).save_adapter(directory.path(), "base").unwrap();
    let path = directory.path().join("adapter_config.json");
    let whole: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (key, value) in [
        ("use_dora", serde_json::json!(true)),
        ("use_rslora", serde_json::json!(true)),
        ("bias", serde_json::json!("all")),
        ("modules_to_save", serde_json::json!(["lm_head"])),
        ("rank_pattern", serde_json::json!({"q_proj": 4})),
        ("peft_type", serde_json::json!("IA3")),
        ("target_modules", serde_json::json!(["lm_head"])),
        ("target_modules", serde_json::json!(".*_proj")),
        ("r", serde_json::json!(0)),
        ("lora_alpha", serde_json::json!("x")),
    ] {
        let mut changed = whole.clone();
        changed[key] = value;
        fs::write(&path, changed.to_string()).unwrap();
        let error = model(0, VOCAB).with_adapter_of(directory.path()).unwrap_err();
        assert!(error.to_string().contains(key), "{key}: {error}");
    }
    let mut other = whole.clone();
    other["r"] = serde_json::json!(4);
    fs::write(&path, other.to_string()).unwrap();
    let error = model(0, VOCAB).with_adapter_of(directory.path()).unwrap_err();
    assert!(matches!(&error, ModelError::Weights { problems, .. } if problems.len() == 4), "{error}");
    let nowhere = model(0, VOCAB).with_adapter(shape(&["c_attn"]), 0).unwrap_err();
    assert!(nowhere.to_string().contains("c_attn"));
}

/// Training moves the adapter alone, and the log-probability in the right direction.
#[test]
fn an_update_trains_the_adapter_and_nothing_else() {
    for kind in [0, 3] {
        let decoder = model(kind, VOCAB).with_adapter(shape(&MODULES), 1).unwrap();
        let mut forest = Forest::default();
        let segment = forest.add(None, &[5, 9, 2, 7, 7, 3]);
        let component = Component::Likelihood { weight: 0.2 };
        let target = |at: usize| Target { segment, at, token: forest.ids()[at], component };
        let targets = (1..6).map(target).collect();
        let before = objective(&decoder, &forest);
        let base = tempfile::tempdir().unwrap();
        model(kind, VOCAB).save(base.path(), &[1], None).unwrap();
        let config = OptimizerConfig { learning_rate: 0.01, ..OptimizerConfig::default() };
        let batch = [MicroBatch { forest: forest.clone(), targets }];
        let mut trainer = Trainer::new(decoder, &config, 20).unwrap();
        for _ in 0..20 {
            trainer.update(&batch, &PolicyLoss::new(&TrainConfig::default()), 1.0, None).unwrap();
        }
        let trained = trainer.into_decoder().unwrap();
        assert!(objective(&trained, &forest) > before + 1.0);
        let merged = tempfile::tempdir().unwrap();
        trained.save(merged.path(), &[1], None).unwrap();
        let [before, after] = [base.path(), merged.path()]
            .map(|directory| Decoder::load_as(directory, Some(Dtype::F32)).unwrap());
        let [old, new] = [&before, &after].map(Decoder::parameters);
        for parameter in before.layout().parameters() {
            let same = old[parameter.range.clone()] == new[parameter.range.clone()];
            let adapted = MODULES.iter().any(|module| parameter.name.ends_with(&format!("{module}.weight")));
            assert_eq!(same, !adapted, "{}", parameter.name);
        }
    }
}

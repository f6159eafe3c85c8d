//! Whole runs with `device = "cuda"` through the real binary: on a GPU where there is one, otherwise on the emulated device.

#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/run.rs"]
mod common;
mod cuda_emulator;

use common::{Workplace, assert_same_result, json, metrics, newest, succeeded};
use std::fs;
use std::process::{Command, Output};

/// As little as passes through every stage on a device: the emulated one is slow.
const ON_DEVICE: [&str; 24] = [
    "model.device=cuda",
    "model.batch_invariant=true",
    "tokenizer.train.vocab_size=300",
    "tokenizer.train.documents=20",
    "model.scratch.num_hidden_layers=1",
    "model.scratch.intermediate_size=40",
    "pretrain.steps=2",
    "pretrain.documents_per_step=1",
    "pretrain.optimizer.kind=adamw",
    "tasks.max_documents=4",
    "tasks.max_document_tokens=60",
    "cold_start.steps=2",
    "cold_start.traces_per_step=1",
    "cold_start.ntp_documents_per_step=1",
    "cold_start.optimizer.kind=adamw",
    "rollout.max_new_tokens=6",
    "train.steps=3",
    "train.tasks_per_step=2",
    "train.drop_uniform_groups_from=100",
    "eval.max_documents=1",
    "eval.max_positions=2",
    "eval.probe_every=0",
    "controls.more_cold_start=false",
    "run.checkpoint_every=1",
];

fn on_device(place: &Workplace, command: &str, run: &str, settings: &[&str]) -> Output {
    let mut process = place.command(command, run, &[ON_DEVICE.as_slice(), settings].concat());
    cuda_emulator::lend(&mut process);
    process.output().unwrap()
}

fn rpt(arguments: &[&str]) -> Output {
    let mut process = Command::new(env!("CARGO_BIN_EXE_rpt"));
    process.args(arguments);
    cuda_emulator::lend(&mut process);
    process.output().unwrap()
}

#[test]
fn a_run_on_a_device_is_exact_and_goes_on_where_it_stopped() {
    let place = Workplace::new("cuda-run");
    succeeded(&on_device(&place, "run", "whole", &[]));
    let whole = place.path("whole");
    let steps: Vec<_> = metrics(&whole).into_iter().filter(|line| line["stage"] == "train").collect();
    assert_eq!(steps.len(), 3);
    for step in steps.iter().filter(|step| step.contains_key("logprob_gap")) {
        assert_eq!(step["mismatched_tokens"], 0, "{step:?}");
        assert_eq!(step["logprob_gap"], 0.0);
    }
    assert!(steps.iter().any(|step| step.contains_key("logprob_gap")));
    succeeded(&rpt(&["verify", whole.to_str().unwrap()]));

    place.copy("whole", "again");
    let again = place.path("again");
    fs::remove_file(again.join("summary.json")).unwrap();
    fs::remove_dir_all(again.join("eval")).unwrap();
    for stage in ["train", "continued_ntp", "clean_traces"] {
        fs::remove_dir_all(newest(&again, stage)).unwrap();
    }
    let said = succeeded(&on_device(&place, "run", "again", &[]));
    assert!(said.contains("train: going on from step 2 of 3"), "{said}");
    assert_same_result(&again, &whole);
    assert!(json(&again.join("summary.json")).is_object());
}

#[test]
fn the_fast_mode_measures_its_gap_and_stops_where_that_is_too_large() {
    let place = Workplace::new("cuda-fast");
    let fast = ["model.batch_invariant=false", "model.dtype=bf16", "train.importance_cap=2.0"];
    succeeded(&on_device(&place, "train", "fast", &fast));
    let gaps = |run: &str| -> Vec<f64> {
        let lines = metrics(&place.path(run)).into_iter();
        lines.filter_map(|line| line.get("logprob_gap/mean")?.as_f64()).collect()
    };
    let narrow = [fast.as_slice(), &["rollout.kv_cache=fp8"]].concat();
    succeeded(&on_device(&place, "train", "narrow", &narrow));
    let largest = |gaps: &[f64]| gaps.iter().copied().fold(0.0, f64::max);
    let (gaps, narrow) = (gaps("fast"), gaps("narrow"));
    assert!(largest(&gaps) > 0.0 && largest(&gaps) < 0.02, "{gaps:?}");
    assert!(largest(&narrow) > largest(&gaps) && largest(&narrow) < 0.2, "{narrow:?} {gaps:?}");
    let strict = [fast.as_slice(), &["train.max_logprob_gap=0"]].concat();
    let output = on_device(&place, "train", "strict", &strict);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("train.max_logprob_gap is 0"), "{said}");
    assert!(said.contains("hint: set model.batch_invariant = true"), "{said}");
}

#[test]
fn a_model_says_the_same_on_a_device_as_on_the_cpu() {
    let place = Workplace::new("cuda-commands");
    succeeded(&on_device(&place, "run", "run", &["train.steps=1"]));
    let (run, model) = (place.path("run"), place.path("model"));
    let (run, model) = (run.to_str().unwrap(), model.to_str().unwrap());
    succeeded(&rpt(&["export", run, "--out", model]));
    let said = |arguments: &[&str]| -> serde_json::Value {
        let output = rpt(arguments);
        succeeded(&output);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let device = ["--device", "cuda", "--batch-invariant"];
    let logprobs = ["logprobs", "--model", model, "--text", "the fox met the owl", "--json"];
    let here = said(&logprobs);
    let there = said(&[logprobs.as_slice(), &device].concat());
    assert_eq!(here["ids"], there["ids"]);
    for (here, there) in
        here["logprobs"].as_array().unwrap().iter().zip(there["logprobs"].as_array().unwrap())
    {
        assert!((here.as_f64().unwrap() - there.as_f64().unwrap()).abs() < 1e-4);
    }
    let rollout =
        ["rollout", "--run", run, "--text", "the fox", "--samples", "2", "--max-new-tokens", "5", "--json"];
    let (here, there) = (said(&rollout), said(&[rollout.as_slice(), &device].concat()));
    for sample in 0..2 {
        assert_eq!(here["replies"][sample]["tokens"], there["replies"][sample]["tokens"]);
    }
    let bench = ["bench", "step", "--model", model, "--workload", "1,20,2,2,3", "--rounds", "1", "--json"];
    let figures = said(&[bench.as_slice(), &device].concat());
    assert!(figures["wall_seconds_per_step"].as_f64().unwrap() > 0.0, "{figures}");
}

#[test]
fn a_machine_without_a_driver_is_told_so_before_anything_is_written() {
    if cuda_emulator::driver().is_none() {
        return;
    }
    let place = Workplace::new("cuda-no-driver");
    let output = place.command("run", "run", &ON_DEVICE).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && said.contains("no CUDA driver") && said.contains("hint:"), "{said}");
    assert!(!place.path("run").exists());
}

#[test]
fn what_only_the_cpu_can_do_is_refused_with_a_hint() {
    let place = Workplace::new("cuda-refused");
    for (setting, key) in [
        ("train.optimizer.kind=muon", "train.optimizer"),
        ("model.dtype=f16", "model.dtype"),
        ("tasks.top_k=65", "tasks.top_k"),
    ] {
        let output = on_device(&place, "run", "run", &[setting]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(key) && said.contains("hint:"), "{said}");
    }
}

//! Short runs of the quickstart through the real binary, and what they leave behind.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, missing_docs)]

use rpt::report::{RolloutRow, read_rows};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::SystemTime;

pub(crate) const STAGES: [&str; 6] =
    ["pretrain", "cold_start", "train", "continued_ntp", "more_cold_start", "clean_traces"];

/// Seconds of training in which every stage moves the weights and some rollouts earn a reward.
const SHORT: [&str; 18] = [
    "pretrain.steps=40",
    "tasks.max_documents=60",
    "tasks.min_entropy=0.05",
    "cold_start.steps=80",
    "cold_start.ntp_weight=0.1",
    "cold_start.optimizer.learning_rate=0.01",
    "rollout.temperature=0.9",
    "train.steps=24",
    "train.kl_weight=0.05",
    "train.ntp_weight=0.1",
    "train.drop_uniform_groups_from=12",
    "train.optimizer.ema_decay=0.9",
    "eval.max_documents=6",
    "eval.max_positions=40",
    "eval.resamples=100",
    "eval.probe_every=6",
    "eval.probe_positions=8",
    "run.checkpoint_every=5",
];

/// As little as passes through every operation, in shapes that fill no vector: for slow
/// instruction sets, and for runs that fail.
pub(crate) const TINY: [&str; 16] = [
    "tokenizer.train.vocab_size=300",
    "tokenizer.train.documents=20",
    "model.scratch.hidden_size=24",
    "model.scratch.num_hidden_layers=1",
    "model.scratch.intermediate_size=40",
    "pretrain.steps=4",
    "pretrain.documents_per_step=1",
    "tasks.max_documents=6",
    "cold_start.steps=3",
    "cold_start.traces_per_step=2",
    "cold_start.ntp_documents_per_step=1",
    "train.steps=2",
    "train.tasks_per_step=2",
    "eval.max_documents=2",
    "eval.max_positions=4",
    "controls.more_cold_start=false",
];

/// A place for the runs of one test file: its generated corpus and its run directories.
pub(crate) struct Workplace(PathBuf);

impl Workplace {
    /// An empty place of that name, with the recipe of a small corpus of ordinary words.
    pub(crate) fn new(name: &str) -> Self {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = fs::remove_dir_all(&root);
        fs::create_dir_all(root.join("corpus")).unwrap();
        let recipe = repository().join("corpora/quickstart/corpus.toml");
        let mut recipe: toml::Table = fs::read_to_string(recipe).unwrap().parse().unwrap();
        let sizes: toml::Table = "stories.documents = 300\nstories.chains = 2\nstories.max_pairs = 9\n\
            stories.start_pairs = 7\nheld_out.documents = 24\nheld_out.longest_chain = 8\n\
            traces.count = 20\ntraces.empty_thoughts = 300"
            .parse()
            .unwrap();
        for (section, values) in sizes {
            recipe[&section].as_table_mut().unwrap().extend(values.as_table().unwrap().clone());
        }
        fs::write(root.join("corpus/corpus.toml"), recipe.to_string()).unwrap();
        Self(root)
    }

    pub(crate) fn path(&self, run: &str) -> PathBuf {
        self.0.join(run)
    }

    /// `rpt COMMAND` of the short pipeline into a run directory, with further settings.
    pub(crate) fn command(&self, command: &str, run: &str, settings: &[&str]) -> Command {
        let mut process = Command::new(env!("CARGO_BIN_EXE_rpt"));
        process.current_dir(repository()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        process.args([command, "pipelines/quickstart-short.toml", "--out"]).arg(self.path(run));
        process.arg("--set").arg(format!("corpus.source={}", self.path("corpus").display()));
        for setting in SHORT.iter().chain(settings) {
            process.args(["--set", setting]);
        }
        process
    }

    /// Runs the short pipeline to its end; returns what it said on standard error.
    pub(crate) fn run(&self, run: &str, settings: &[&str]) -> String {
        succeeded(&self.command("run", run, settings).output().unwrap())
    }

    /// Copies a run directory.
    pub(crate) fn copy(&self, from: &str, to: &str) -> PathBuf {
        copy_directory(&self.path(from), &self.path(to));
        self.path(to)
    }
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Standard error of a process that must have succeeded.
pub(crate) fn succeeded(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(output.status.success(), "{}: {text}", output.status);
    text
}

/// All files below a directory.
pub(crate) fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

fn copy_directory(from: &Path, to: &Path) {
    for file in files(from).iter().filter(|file| !file.is_symlink()) {
        let target = to.join(file.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(file, target).unwrap();
    }
}

/// Content and time of the last change of every file and directory.
pub(crate) fn snapshot(directory: &Path) -> BTreeMap<PathBuf, (Option<SystemTime>, Vec<u8>)> {
    let mut found = BTreeMap::new();
    for file in files(directory) {
        let parent = file.parent().unwrap().to_path_buf();
        let changed = |path: &Path| fs::symlink_metadata(path).unwrap().modified().ok();
        found.insert(file.clone(), (changed(&file), fs::read(&file).unwrap()));
        found.insert(parent.clone(), (changed(&parent), Vec::new()));
    }
    found
}

/// Checkpoints of a stage, oldest first.
pub(crate) fn checkpoints(run: &Path, stage: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(run.join("checkpoints").join(stage)) else { return Vec::new() };
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| !path.file_name().unwrap().to_str().unwrap().starts_with('.'));
    found.sort();
    found
}

/// A stage's newest checkpoint.
pub(crate) fn newest(run: &Path, stage: &str) -> PathBuf {
    checkpoints(run, stage).pop().unwrap_or_else(|| panic!("{stage} has no checkpoint"))
}

/// The file of a checkpoint that holds the weights.
pub(crate) fn weights(checkpoint: &Path) -> PathBuf {
    checkpoint.join("model-00001-of-00001.safetensors")
}

pub(crate) fn optimizer_state(checkpoint: &Path) -> PathBuf {
    checkpoint.join("optimizer-00001-of-00001.safetensors")
}

/// Flips one bit in the middle of a file.
pub(crate) fn flip(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(file, bytes).unwrap();
}

pub(crate) fn json(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

/// The metrics without times.
pub(crate) fn metrics(run: &Path) -> Vec<serde_json::Map<String, Value>> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let mut lines: Vec<serde_json::Map<String, Value>> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in &mut lines {
        line.retain(|key, _| !key.starts_with("seconds"));
    }
    lines
}

pub(crate) fn rollouts(run: &Path) -> Vec<RolloutRow> {
    read_rows(&run.join("rollouts")).unwrap().map(Result::unwrap).collect()
}

fn same_bytes(one: &Path, other: &Path) {
    assert!(fs::read(one).unwrap() == fs::read(other).unwrap(), "{} {}", one.display(), other.display());
}

/// Asserts that two finished runs of one pipeline have the same result: weights and optimiser state
/// of every stage, evaluations, ledger, summary and tasks to the last bit, and metrics and rollouts
/// in everything but times.
pub(crate) fn assert_same_result(one: &Path, other: &Path) {
    for stage in STAGES {
        let (last, expected) = (checkpoints(one, stage).pop(), checkpoints(other, stage).pop());
        let name = |path: &Option<PathBuf>| path.as_ref().map(|path| path.file_name().unwrap().to_owned());
        assert_eq!(name(&last), name(&expected), "{stage}");
        for (last, expected) in last.iter().zip(&expected) {
            same_bytes(&weights(last), &weights(expected));
            same_bytes(&optimizer_state(last), &optimizer_state(expected));
        }
    }
    for part in ["eval", "tasks", "tokenizer", "corpus", "ledger.jsonl", "pipeline.toml"] {
        let of = |run: &Path| {
            let path = run.join(part);
            if path.is_file() { vec![path] } else { fs::read_dir(&path).map_or(Vec::new(), |_| files(&path)) }
        };
        let hidden = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with('.');
        let relative = |run: &Path| -> Vec<PathBuf> {
            of(run)
                .iter()
                .filter(|path| !hidden(path))
                .map(|path| path.strip_prefix(run).unwrap().into())
                .collect()
        };
        assert_eq!(relative(one), relative(other));
        for path in relative(one) {
            same_bytes(&one.join(&path), &other.join(&path));
        }
    }
    let summary = |run: &Path| {
        let mut summary = json(&run.join("summary.json"));
        summary.as_object_mut().unwrap().remove("seconds");
        summary
    };
    assert_eq!(summary(one), summary(other));
    assert_eq!(metrics(one), metrics(other));
    assert!(rollouts(one) == rollouts(other), "the rollout logs differ");
}

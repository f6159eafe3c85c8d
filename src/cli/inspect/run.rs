//! Run directories and checkpoints, from the files that say how far a run is.

use super::read;
use anyhow::Context;
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// How deep below `checkpoints/` a checkpoint may lie.
const DEPTH: usize = 2;

/// The pipeline, the last step of every stage, and the checkpoints.
pub(super) fn inspect(directory: &Path) -> anyhow::Result<Value> {
    let path = directory.join("pipeline.toml");
    let pipeline = rpt::config::parse(&read(&path)?, &path.display().to_string(), &[]);
    let pipeline = pipeline.map_err(rpt::Error::from)?;
    let Progress { stage, steps, unreadable_lines } = Progress::read(&directory.join("metrics.jsonl"))?;
    let mut checkpoints = Vec::new();
    find_checkpoints(&directory.join("checkpoints"), DEPTH, &mut checkpoints);
    Ok(json!({
        "kind": "run",
        "path": directory,
        "stage": stage,
        "steps": steps,
        "unreadable_metrics_lines": unreadable_lines,
        "checkpoints": checkpoints,
        "report": directory.join("report.html").is_file(),
        "pipeline": pipeline,
    }))
}

/// How far the metrics log says a run is.
#[derive(Default)]
struct Progress {
    /// The stage of the last line.
    stage: Option<String>,
    /// The last step of each stage, in their order.
    steps: Map<String, Value>,
    unreadable_lines: u64,
}

impl Progress {
    /// Reads the log a line at a time; without one nothing has been trained.
    fn read(path: &Path) -> anyhow::Result<Self> {
        let mut progress = Self::default();
        if !path.exists() {
            return Ok(progress);
        }
        let context = || format!("cannot read {}", path.display());
        for line in BufReader::new(File::open(path).with_context(context)?).lines() {
            progress.add(&line.with_context(context)?);
        }
        Ok(progress)
    }

    fn add(&mut self, line: &str) {
        let value: Value = serde_json::from_str(line).unwrap_or_default();
        match (value["stage"].as_str(), value["step"].as_u64()) {
            (Some(stage), Some(step)) => {
                self.steps.insert(stage.to_owned(), step.into());
                self.stage = Some(stage.to_owned());
            }
            _ => self.unreadable_lines += 1,
        }
    }
}

fn find_checkpoints(directory: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut paths: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("step-") && path.join("manifest.json").is_file() {
            found.push(path);
        } else if depth > 1 && !name.starts_with('.') {
            find_checkpoints(&path, depth - 1, found);
        }
    }
}

/// What a checkpoint's manifest lists; `rpt verify` checks the content.
pub(super) fn inspect_checkpoint(directory: &Path) -> anyhow::Result<Value> {
    let path = directory.join("manifest.json");
    let manifest: Value =
        serde_json::from_str(&read(&path)?).with_context(|| format!("{} is damaged", path.display()))?;
    let mut files = Map::new();
    for file in manifest["files"].as_array().into_iter().flatten() {
        files.insert(file["name"].as_str().unwrap_or_default().to_owned(), file["bytes"].clone());
    }
    let bytes = files.values().filter_map(Value::as_u64).fold(0, u64::saturating_add);
    Ok(json!({
        "kind": "checkpoint",
        "path": directory,
        "step": manifest["step"],
        "identity": manifest["identity"],
        "bytes": bytes,
        "files": files,
    }))
}

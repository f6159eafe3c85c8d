//! Task directories.

use super::super::output;
use anyhow::Context;
use rpt::pipeline::RunDirectory;
use rpt::tasks::{EntropyHistogram, Manifest, TaskDocument, TaskShards};
use rpt::tokenize::Tokenizer;
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Tokens of context that a sample shows.
const CONTEXT_TOKENS: usize = 48;
/// Bars of the histogram for people, and the characters of the longest.
const BARS: usize = 16;
const BAR_LENGTH: u64 = 48;

/// Counts, the entropy histogram, and tasks of documents spread over the shards.
pub(super) fn inspect(directory: &Path, samples: usize, tokenizer: Option<&Path>) -> anyhow::Result<Value> {
    let manifest = Manifest::load(directory).map_err(rpt::Error::from)?;
    let tokenizer = find_tokenizer(directory, tokenizer, &manifest.fingerprints.tokenizer)?;
    let mut counts = serde_json::to_value(&manifest.counts)?;
    let entropy = counts.as_object_mut().and_then(|counts| counts.shift_remove("entropy"));
    Ok(json!({
        "kind": "tasks",
        "path": directory,
        "schema_version": manifest.schema_version,
        "fingerprints": manifest.fingerprints,
        "shards": manifest.shards.len(),
        "documents": manifest.documents(),
        "positions": manifest.positions(),
        "counts": counts,
        "entropy": entropy,
        "sample": sample(directory, &manifest, samples, tokenizer.as_ref())?,
    }))
}

/// The tokenizer that was named, or the one that the tasks were built with: near them, or named by
/// the pipeline of their run.
fn find_tokenizer(
    directory: &Path,
    named: Option<&Path>,
    fingerprint: &str,
) -> anyhow::Result<Option<Tokenizer>> {
    let near = || directory.ancestors().take(3).flat_map(places).find(|path| is_that(path, fingerprint));
    let Some(path) = named.map(Path::to_path_buf).or_else(near) else {
        return Ok(tokenizer_of_run(directory).filter(|tokenizer| tokenizer.fingerprint() == fingerprint));
    };
    Ok(Some(Tokenizer::load(&path).map_err(rpt::Error::from)?))
}

fn tokenizer_of_run(tasks: &Path) -> Option<Tokenizer> {
    let run = tasks.ancestors().take(3).find(|directory| directory.join("pipeline.toml").is_file())?;
    Some(RunDirectory::open(run).ok()?.tokenizer().ok()?.0)
}

fn places(directory: &Path) -> [PathBuf; 3] {
    ["tokenizer.json", "tokenizer/tokenizer.json", "model/tokenizer.json"].map(|name| directory.join(name))
}

fn is_that(path: &Path, fingerprint: &str) -> bool {
    std::fs::read(path).is_ok_and(|json| blake3::hash(&json).to_hex().as_str() == fingerprint)
}

fn sample(
    directory: &Path,
    manifest: &Manifest,
    samples: usize,
    tokenizer: Option<&Tokenizer>,
) -> anyhow::Result<Vec<Value>> {
    let shards = TaskShards::open(directory, &manifest.fingerprints).map_err(rpt::Error::from)?;
    let count = (samples as u64).min(shards.documents());
    let rows = (0..count).map(|number| number * shards.documents() / count);
    rows.map(|row| {
        let document = shards.document(row).map_err(rpt::Error::from)?;
        task(&document, tokenizer).with_context(|| format!("task document {row} has no position"))
    })
    .collect()
}

/// The first position of a document: in text where the tokenizer is known, else in ids.
fn task(document: &TaskDocument, tokenizer: Option<&Tokenizer>) -> Option<Value> {
    let position = document.positions.first()?;
    let at = (position.index as usize).min(document.tokens.len());
    let context = &document.tokens[at.saturating_sub(CONTEXT_TOKENS)..at];
    let truth = document.tokens.get(at..=at).unwrap_or_default();
    let spell =
        |ids: &[u32]| tokenizer.map_or_else(|| json!(ids), |tokenizer| json!(tokenizer.decode_lossy(ids)));
    Some(json!({
        "document": document.id,
        "index": position.index,
        "label": position.label,
        "entropy": position.entropy,
        "truth_probability": position.truth_probability,
        "cut": at > CONTEXT_TOKENS,
        "context": spell(context),
        "truth": spell(truth),
        "proxy_top": spell(&[position.proxy_top]),
    }))
}

/// The same for people: bars for the histogram, and tasks with the predicted token in brackets.
pub(super) fn for_people(value: &Value) -> String {
    let mut short = value.clone();
    if let Some(map) = short.as_object_mut() {
        map.retain(|key, _| !matches!(key.as_str(), "entropy" | "sample"));
    }
    let mut text = output::outline(&short);
    if let Ok(histogram) = serde_json::from_value::<EntropyHistogram>(value["entropy"].clone()) {
        text.push_str(&bars(&histogram));
    }
    for task in value["sample"].as_array().into_iter().flatten() {
        text.push_str(&boundary(task));
    }
    text
}

fn bars(histogram: &EntropyHistogram) -> String {
    let bins: Vec<u64> = histogram
        .bins
        .chunks(histogram.bins.len().div_ceil(BARS).max(1))
        .map(|bins| bins.iter().fold(0_u64, |sum, bin| sum.saturating_add(*bin)))
        .collect();
    let most = bins.iter().copied().max().unwrap_or(0).max(1);
    let width = histogram.upper / bins.len().max(1) as f32;
    let mut text = String::from("entropy of all positions with enough context (nats):\n");
    for (at, count) in bins.iter().enumerate() {
        let (low, high) = (width * at as f32, width * (at + 1) as f32);
        let length = (u128::from(*count) * u128::from(BAR_LENGTH)).div_ceil(u128::from(most)) as usize;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {low:.2}-{high:.2} {count:>10} {}", "#".repeat(length));
    }
    text
}

/// `context⟦next token⟧`: the prompt ends where the bracket opens.
fn boundary(task: &Value) -> String {
    let spelled = |key: &str| task[key].as_str().map_or_else(|| task[key].to_string(), str::to_owned);
    let start = if task["cut"] == true { "…" } else { "" };
    format!(
        "task {}:{} (entropy {:.2}, proxy says {:?}):\n{start}{}⟦{}⟧\n",
        task["document"].as_str().unwrap_or_default(),
        task["index"],
        task["entropy"].as_f64().unwrap_or(f64::NAN),
        spelled("proxy_top"),
        spelled("context"),
        spelled("truth"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_counts() {
        let mut histogram = EntropyHistogram::new(16);
        histogram.bins[0] = 10;
        histogram.bins[63] = 5;
        let text = bars(&histogram);
        let lengths: Vec<usize> = text.lines().skip(1).map(|line| line.matches('#').count()).collect();
        assert_eq!((lengths.len(), lengths[0], lengths[15]), (16, 48, 24));
        assert_eq!(lengths[1..15].iter().sum::<usize>(), 0);
    }

    #[test]
    fn the_prompt_ends_where_the_bracket_opens() {
        let task = json!({"document": "d", "index": 3, "entropy": 1.5, "cut": true, "context": "a b", "truth": " c"});
        assert!(boundary(&task).ends_with("\n…a b⟦ c⟧\n"));
    }
}

//! Task directories.

use super::super::output;
use anyhow::Context;
use rpt::pipeline::RunDirectory;
use rpt::tasks::{
    EntropyHistogram, Fingerprints, LengthHistogram, Manifest, PromptTemplate, TaskDocument, TaskShards,
};
use rpt::tokenize::Tokenizer;
use serde::Deserialize;
use serde_json::{Value, json};
use std::fmt::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Directories that are searched for a run or tokenizer: a unit of tasks is the deepest place in a run.
const ABOVE: usize = 4;
/// Tokens of context that a sample shows.
const CONTEXT_TOKENS: usize = 48;
/// Bars of the histogram for people, and the characters of the longest.
const BARS: usize = 16;
const BAR_LENGTH: u64 = 48;

/// Counts, the entropy histogram, and tasks of documents spread over the shards.
pub(super) fn inspect(directory: &Path, samples: usize, tokenizer: Option<&Path>) -> anyhow::Result<Value> {
    let manifest = Manifest::load(directory).map_err(rpt::Error::from)?;
    let spelling = Spelling::find(directory, tokenizer, &manifest.fingerprints)?;
    let shards = TaskShards::open(directory, &manifest.fingerprints).map_err(rpt::Error::from)?;
    let mut counts = serde_json::to_value(&manifest.counts)?;
    let mut apart = |name: &str| counts.as_object_mut().and_then(|counts| counts.shift_remove(name));
    let (lengths, entropy) = (apart("lengths"), apart("entropy"));
    Ok(json!({
        "kind": "tasks",
        "path": directory,
        "schema_version": manifest.schema_version,
        "fingerprints": manifest.fingerprints,
        "shards": manifest.shards.len(),
        "documents": manifest.documents(),
        "positions": manifest.positions(),
        "sources": manifest.sources,
        "corpus": manifest.corpus,
        "counts": counts,
        "top_drops": top_drops(&manifest),
        "lengths": lengths,
        "entropy": entropy,
        "sample": sample(&shards, 0..shards.documents(), samples, &spelling)?,
    }))
}

/// Whether a path is a shard beside the manifest of its directory.
pub(super) fn is_shard(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "arrow")
        && path.with_file_name("tasks.json").is_file()
}

/// What one shard holds: its entry in the manifest, lengths, the entropies of its positions, and tasks.
pub(super) fn inspect_shard(path: &Path, samples: usize, tokenizer: Option<&Path>) -> anyhow::Result<Value> {
    let directory = path.parent().unwrap_or(Path::new(""));
    let manifest = Manifest::load(directory).map_err(rpt::Error::from)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let number = manifest.shards.iter().position(|shard| shard.file == name);
    let number = number.with_context(|| format!("{} is not in the manifest beside it", path.display()))?;
    let first: u64 = manifest.shards[..number].iter().map(|shard| shard.documents).sum();
    let rows = first..first + manifest.shards[number].documents;
    let spelling = Spelling::find(directory, tokenizer, &manifest.fingerprints)?;
    let shards = TaskShards::open(directory, &manifest.fingerprints).map_err(rpt::Error::from)?;
    let top_k = manifest.counts.entropy.upper.exp().round() as usize;
    let (mut lengths, mut entropy) = (LengthHistogram::default(), EntropyHistogram::new(top_k));
    for row in rows.clone() {
        let document = shards.document(row).map_err(rpt::Error::from)?;
        lengths.add(document.tokens.len());
        document.positions.iter().for_each(|position| entropy.add(position.entropy));
    }
    Ok(json!({
        "kind": "task shard",
        "path": path,
        "shard": manifest.shards[number],
        "fingerprints": manifest.fingerprints,
        "lengths": lengths,
        "entropy": entropy,
        "sample": sample(&shards, rows, samples, &spelling)?,
    }))
}

/// What was left out most often, in the corpus and of its tokens.
fn top_drops(manifest: &Manifest) -> Vec<Value> {
    let of_corpus = manifest.corpus.dropped.iter().map(|(reason, count)| (reason.as_str(), *count));
    let mut drops: Vec<_> = of_corpus.chain(manifest.counts.dropped.reasons()).collect();
    drops.retain(|(_, count)| *count > 0);
    drops.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    drops.into_iter().map(|(reason, count)| json!({ "reason": reason, "count": count })).collect()
}

/// How the tokens of tasks are spelled, and what stands around them in a prompt.
struct Spelling {
    tokenizer: Option<Tokenizer>,
    template: Option<PromptTemplate>,
}

impl Spelling {
    fn find(directory: &Path, named: Option<&Path>, expected: &Fingerprints) -> anyhow::Result<Self> {
        let tokenizer = find_tokenizer(directory, named, &expected.tokenizer)?;
        let of_run = || run_of(directory)?.template().ok();
        let template = of_run().filter(|template| {
            tokenizer.as_ref().is_some_and(|tokenizer| Fingerprints::of(tokenizer, template) == *expected)
        });
        Ok(Self { tokenizer, template })
    }

    /// Text where the tokenizer is known, else ids.
    fn spell(&self, ids: &[u32]) -> Value {
        self.tokenizer.as_ref().map_or_else(|| json!(ids), |tokenizer| json!(tokenizer.decode_lossy(ids)))
    }
}

/// The tokenizer that was named, or the one that the tasks were built with: near them, or named by
/// the pipeline of their run.
fn find_tokenizer(
    directory: &Path,
    named: Option<&Path>,
    fingerprint: &str,
) -> anyhow::Result<Option<Tokenizer>> {
    let near = || directory.ancestors().take(ABOVE).flat_map(places).find(|path| is_that(path, fingerprint));
    let Some(path) = named.map(Path::to_path_buf).or_else(near) else {
        return Ok(tokenizer_of_run(directory).filter(|tokenizer| tokenizer.fingerprint() == fingerprint));
    };
    Ok(Some(Tokenizer::load(&path).map_err(rpt::Error::from)?))
}

fn tokenizer_of_run(tasks: &Path) -> Option<Tokenizer> {
    Some(run_of(tasks)?.tokenizer().ok()?.0)
}

/// The run that tasks, or a unit of them, lie in.
fn run_of(tasks: &Path) -> Option<RunDirectory> {
    let run = tasks.ancestors().take(ABOVE).find(|directory| directory.join("pipeline.toml").is_file())?;
    RunDirectory::open(run).ok()
}

fn places(directory: &Path) -> [PathBuf; 3] {
    ["tokenizer.json", "tokenizer/tokenizer.json", "model/tokenizer.json"].map(|name| directory.join(name))
}

fn is_that(path: &Path, fingerprint: &str) -> bool {
    std::fs::read(path).is_ok_and(|json| blake3::hash(&json).to_hex().as_str() == fingerprint)
}

/// Tasks of documents spread over some rows.
fn sample(
    shards: &TaskShards,
    rows: Range<u64>,
    samples: usize,
    spelling: &Spelling,
) -> anyhow::Result<Vec<Value>> {
    let length = rows.end - rows.start;
    let count = (samples as u64).min(length);
    let chosen = (0..count).map(|number| rows.start + number * length / count);
    chosen
        .map(|row| {
            let document = shards.document(row).map_err(rpt::Error::from)?;
            task(&document, spelling).with_context(|| format!("task document {row} has no position"))
        })
        .collect()
}

/// The first position of a document, as the model sees it where the template is known.
fn task(document: &TaskDocument, spelling: &Spelling) -> Option<Value> {
    let position = document.positions.first()?;
    let at = (position.index as usize).min(document.tokens.len());
    let context = &document.tokens[at.saturating_sub(CONTEXT_TOKENS)..at];
    let truth = document.tokens.get(at..=at).unwrap_or_default();
    let around = |part: fn(&PromptTemplate) -> &Vec<u32>| {
        spelling.template.as_ref().map(|template| spelling.spell(part(template)))
    };
    Some(json!({
        "document": document.id,
        "index": position.index,
        "label": position.label,
        "entropy": position.entropy,
        "truth_probability": position.truth_probability,
        "header": around(|template| &template.header),
        "cut": at > CONTEXT_TOKENS,
        "context": spelling.spell(context),
        "footer": around(|template| &template.footer),
        "truth": spelling.spell(truth),
        "proxy_top": spelling.spell(&[position.proxy_top]),
    }))
}

/// The same for people: bars for the histogram, and tasks with the predicted token in brackets.
pub(super) fn for_people(value: &Value) -> String {
    let mut short = value.clone();
    if let Some(map) = short.as_object_mut() {
        map.retain(|key, _| !matches!(key.as_str(), "lengths" | "entropy" | "sample"));
    }
    let mut text = output::outline(&short);
    text.push_str(&length_bars("length of the pieces (tokens):", &value["lengths"]));
    if let Ok(histogram) = serde_json::from_value::<EntropyHistogram>(value["entropy"].clone()) {
        // A shard holds the positions that were chosen, the manifest the entropy of all.
        let of = if value["kind"] == "tasks" { "all positions with enough context" } else { "the positions" };
        text.push_str(&bars(&format!("entropy of {of} (nats):"), bands(&histogram)));
    }
    for task in value["sample"].as_array().into_iter().flatten() {
        text.push_str(&boundary(task));
    }
    text
}

/// Bars for a [`LengthHistogram`], if that is what the value is.
pub(super) fn length_bars(title: &str, lengths: &Value) -> String {
    let Ok(lengths) = LengthHistogram::deserialize(lengths) else { return String::new() };
    let name = |bin: usize| format!("{}-{}", 1_u128 << bin, (2_u128 << bin) - 1);
    bars(title, lengths.bins.iter().enumerate().map(|(bin, count)| (name(bin), *count)).collect())
}

/// Bands of entropy with their counts.
fn bands(histogram: &EntropyHistogram) -> Vec<(String, u64)> {
    let bins: Vec<u64> = histogram
        .bins
        .chunks(histogram.bins.len().div_ceil(BARS).max(1))
        .map(|bins| bins.iter().fold(0_u64, |sum, bin| sum.saturating_add(*bin)))
        .collect();
    let width = histogram.upper / bins.len().max(1) as f32;
    let name = |at: usize| format!("{:.2}-{:.2}", width * at as f32, width * (at + 1) as f32);
    bins.into_iter().enumerate().map(|(at, count)| (name(at), count)).collect()
}

fn bars(title: &str, bins: Vec<(String, u64)>) -> String {
    let most = bins.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
    let mut text = format!("{title}\n");
    for (name, count) in bins {
        let length = (u128::from(count) * u128::from(BAR_LENGTH)).div_ceil(u128::from(most)) as usize;
        // Writing to a string cannot fail.
        let _ = writeln!(text, "  {name:>13} {count:>10} {}", "#".repeat(length));
    }
    text
}

/// `prompt⟦next token⟧`: the prompt ends where the bracket opens.
fn boundary(task: &Value) -> String {
    let spelled = |key: &str| match &task[key] {
        Value::Null => String::new(),
        value => value.as_str().map_or_else(|| value.to_string(), str::to_owned),
    };
    let start = if task["cut"] == true { "…" } else { "" };
    format!(
        "task {}:{} (entropy {:.2}, proxy says {:?}):\n{}{start}{}{}⟦{}⟧\n",
        task["document"].as_str().unwrap_or_default(),
        task["index"],
        task["entropy"].as_f64().unwrap_or(f64::NAN),
        spelled("proxy_top"),
        spelled("header"),
        spelled("context"),
        spelled("footer"),
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
        let text = bars("title", bands(&histogram));
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

//! summary.json, the tables and the report: the end of a run.

use super::directory::stage_figures;
use super::materials::{load_traces, read_json, write_json};
use super::run::{Paths, Run, resolved_text};
use super::{PipelineError, Trained};
use crate::config::{Loaded, Pipeline};
use crate::error::Error;
use crate::eval::{Breakdown, Evaluation};
use crate::report::{
    Curves, DataSummary, Histogram, ReportInput, Table, TableLabel, TableRow, sample_rows, table_text,
    write_report,
};
use crate::tasks::{Manifest, TaskCounts};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Rows of the table: name in summary.json, name for people.
const ROWS: [(&str, &str); 6] = [
    ("plain_ntp", "plain next-token prediction"),
    ("continued_ntp", "next-token training continued, same compute"),
    ("reasoning_before", "reasoning, before RPT (after the cold start)"),
    ("more_cold_start", "control: more cold start, same compute"),
    ("clean_traces", "control: clean traces, same compute"),
    ("reasoning_after", "reasoning, after RPT"),
];

/// Whether the directory holds a finished run of this pipeline.
///
/// # Errors
/// When its files cannot be read.
pub(super) fn is_finished(loaded: &Loaded, directory: &Path) -> Result<bool, Error> {
    let paths = Paths(directory.to_path_buf());
    let same = std::fs::read_to_string(paths.pipeline())
        .is_ok_and(|text| resolved_text(&loaded.pipeline).is_ok_and(|wanted| wanted == text));
    Ok(same && read_json::<Value>(&paths.summary())?.is_some())
}

/// Writes the report and then the summary, which marks the run as finished.
pub(super) fn write(run: &Run, trained: &Trained) -> Result<(), Error> {
    if let Some(train) = &trained.train {
        let balance = train.state.source.ledger.balance();
        if !balance.balanced {
            return Err(PipelineError::Malformed {
                path: run.paths.ledger(),
                message: "the ledger does not balance".into(),
            }
            .into());
        }
    }
    let covered = match &run.sources.traces {
        Some(traces) if run.pipeline.cold_start.is_some() => load_traces(traces)?.1,
        _ => BTreeSet::new(),
    };
    let evaluations = evaluations(&run.paths)?;
    let summary = summary(run, trained, &evaluations, &covered)?;
    for table in tables(&evaluations, &covered) {
        run.log.say(format!("\n{}", table_text(&table)));
    }
    let report = report(&run.paths, &run.pipeline, &evaluations, &covered)?;
    write_json(&run.paths.summary(), &summary)?;
    run.log.say(format!("report: {}", report.display()));
    Ok(())
}

/// Writes the report of a run directory again.
pub(super) fn report_again(paths: &Paths, pipeline: &Pipeline) -> Result<PathBuf, Error> {
    report(paths, pipeline, &evaluations(paths)?, &covered(paths)?)
}

/// The tables of a run directory.
pub(super) fn tables_of(paths: &Paths) -> Result<Vec<Table>, Error> {
    Ok(tables(&evaluations(paths)?, &covered(paths)?))
}

/// Labels that the traces cover, as the summary says.
fn covered(paths: &Paths) -> Result<BTreeSet<String>, Error> {
    let summary: Option<Value> = read_json(&paths.summary())?;
    Ok(summary
        .as_ref()
        .and_then(|summary| summary["covered_by_traces"].as_array())
        .map(|labels| labels.iter().filter_map(|label| label.as_str().map(String::from)).collect())
        .unwrap_or_default())
}

fn report(
    paths: &Paths,
    pipeline: &Pipeline,
    evaluations: &BTreeMap<&'static str, Evaluation>,
    covered: &BTreeSet<String>,
) -> Result<PathBuf, Error> {
    let name = paths.0.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let mut lines = vec![("corpus".to_string(), pipeline.corpus.place())];
    let mut add = |key: &str, value: String| lines.push((key.to_string(), value));
    add("seed", pipeline.seed.to_string());
    for (stage, figures) in stage_figures(paths, pipeline)? {
        let flops = figures["flops"].as_f64().unwrap_or(0.0);
        add(
            &stage,
            format!(
                "{} of {} steps, {} tokens, {flops:.2e} operations, {:.1} s",
                figures["step"],
                figures["steps"],
                figures["tokens"],
                figures["seconds"].as_f64().unwrap_or(0.0)
            ),
        );
    }
    let rollouts = paths.rollouts();
    let input = ReportInput {
        title: format!("Reinforcement pre-training: {name}"),
        summary: lines,
        tables: tables(evaluations, covered),
        data: ["train", "eval"].iter().filter_map(|split| data(paths, split)).collect(),
        curves: if paths.metrics().exists() { Curves::read(&paths.metrics())? } else { Curves::default() },
        pipeline: resolved_text(pipeline)?,
        rollouts: if rollouts.exists() { sample_rows(&rollouts, 12)? } else { Vec::new() },
    };
    Ok(write_report(&paths.0, &input)?)
}

/// What the corpus of a split became, if its tasks are built.
fn data(paths: &Paths, split: &str) -> Option<DataSummary> {
    let manifest = Manifest::load(&paths.tasks(split)).ok()?;
    let (corpus, counts) = (&manifest.corpus, &manifest.counts);
    let named = |(name, count): (&str, u64)| (name.to_owned(), count);
    let there = [
        ("files", corpus.files),
        ("documents read", corpus.documents),
        ("bytes of text", corpus.bytes),
        ("quarantined places", corpus.quarantined_total),
        ("tokens", counts.tokens),
        ("pieces with positions", manifest.documents()),
        ("positions", counts.positions),
    ];
    let mut dropped: Vec<_> = corpus.dropped.iter().map(|(reason, count)| (reason.clone(), *count)).collect();
    dropped.extend(counts.dropped.reasons().map(named));
    dropped.retain(|(_, count)| *count > 0);
    dropped.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    Some(DataSummary {
        name: format!("tasks/{split}"),
        counts: there.map(named).to_vec(),
        dropped,
        quarantined: corpus.quarantined.iter().map(ToString::to_string).collect(),
        histograms: histograms(counts),
    })
}

fn histograms(counts: &TaskCounts) -> Vec<Histogram> {
    let length = |bin: usize| format!("{}–{} tokens", 1_u128 << bin, (2_u128 << bin) - 1);
    let width = counts.entropy.upper / counts.entropy.bins.len().max(1) as f32;
    let entropy = |bin: usize| format!("{:.2}–{:.2} nats", width * bin as f32, width * (bin + 1) as f32);
    let bins = |counts: &[u64], name: &dyn Fn(usize) -> String| {
        counts.iter().enumerate().map(|(bin, count)| (name(bin), *count)).collect()
    };
    let all = [
        ("Length of the pieces", bins(&counts.lengths.bins, &length)),
        ("Entropy under the proxy, of positions with enough context", bins(&counts.entropy.bins, &entropy)),
    ];
    let drawn = all.into_iter().map(|(title, bins): (&str, Vec<_>)| Histogram { title: title.into(), bins });
    drawn.filter(|histogram| histogram.bins.iter().any(|(_, count)| *count > 0)).collect()
}

fn evaluations(paths: &Paths) -> Result<BTreeMap<&'static str, Evaluation>, Error> {
    let mut found = BTreeMap::new();
    for (name, _) in ROWS {
        if let Some(evaluation) = read_json(&paths.evaluation(name))? {
            found.insert(name, evaluation);
        }
    }
    Ok(found)
}

fn summary(
    run: &Run,
    trained: &Trained,
    evaluations: &BTreeMap<&'static str, Evaluation>,
    covered: &BTreeSet<String>,
) -> Result<Value, Error> {
    let marked = evaluations.values().any(|evaluation| evaluation.marked.is_some());
    let rows = |part: fn(&Evaluation) -> &Option<Breakdown>| -> Vec<Value> {
        let found = ROWS.iter().filter_map(|(name, _)| Some((*name, part(evaluations.get(name)?).as_ref()?)));
        found.map(|(name, breakdown)| row(name, breakdown)).collect()
    };
    let band = rows(|evaluation| &evaluation.band);
    let (mut seconds, mut tokens, mut flops) = (Map::new(), Map::new(), Map::new());
    for (stage, figures) in stage_figures(&run.paths, &run.pipeline)? {
        seconds.insert(stage.clone(), figures["seconds"].clone());
        tokens.insert(stage.clone(), figures["tokens"].clone());
        flops.insert(stage, figures["flops"].clone());
    }
    Ok(json!({
        "table": if marked { rows(|evaluation| &evaluation.marked) } else { band.clone() },
        "table_entropy_band": band,
        "covered_by_traces": covered,
        "seconds": seconds,
        "tokens": tokens,
        "flops": flops,
        "ledger": trained.train.as_ref().map(|train| train.state.source.ledger.balance()),
        "seed": run.pipeline.seed,
        "identity": run.identity,
    }))
}

fn row(name: &str, breakdown: &Breakdown) -> Value {
    json!({
        "name": name,
        "accuracy": breakdown.all.accuracy,
        "ci": breakdown.all.ci,
        "n": breakdown.all.n,
        "by_band": breakdown.by_band,
    })
}

/// The two tables: marked positions by label, and the entropy band by entropy.
fn tables(evaluations: &BTreeMap<&'static str, Evaluation>, covered: &BTreeSet<String>) -> Vec<Table> {
    let note = "Intervals: 95 %, bootstrap over documents. Greedy decoding.".to_string();
    let marked = table(evaluations, covered, |evaluation| evaluation.marked.as_ref()).map(|table| Table {
        title: "Accuracy at marked positions".into(),
        caption: "Positions that the held-out corpus marks, by label.".into(),
        label_heading: "label".into(),
        footnotes: vec![note.clone()],
        ..table
    });
    let band = table(evaluations, &BTreeSet::new(), |evaluation| evaluation.band.as_ref()).map(|table| Table {
        title: "Accuracy over the entropy band".into(),
        caption: "Every held-out position inside the entropy bounds, by entropy in nats; words that nobody can \
                  predict are among them."
            .into(),
        label_heading: "entropy".into(),
        footnotes: vec![note],
        ..table
    });
    marked.into_iter().chain(band).collect()
}

fn table(
    evaluations: &BTreeMap<&'static str, Evaluation>,
    covered: &BTreeSet<String>,
    part: fn(&Evaluation) -> Option<&Breakdown>,
) -> Option<Table> {
    let found: Vec<(&str, &str, &Breakdown)> = ROWS
        .iter()
        .filter_map(|(name, words)| Some((*name, *words, part(evaluations.get(name)?)?)))
        .collect();
    let names: BTreeSet<&String> =
        found.iter().flat_map(|(_, _, breakdown)| breakdown.by_band.keys()).collect();
    let labels = names
        .iter()
        .map(|name| TableLabel { name: (*name).clone(), covered_by_traces: covered.contains(*name) })
        .collect();
    let rows: Vec<TableRow> = found
        .iter()
        .map(|(name, words, breakdown)| TableRow {
            name: (*words).into(),
            accuracy: Some(breakdown.all.accuracy),
            interval: Some(breakdown.all.ci),
            n: Some(breakdown.all.n),
            values: names.iter().map(|name| Some(breakdown.by_band.get(*name)?.accuracy)).collect(),
            flops: None,
            emphasis: *name == "reasoning_after",
        })
        .collect();
    let (title, caption, label_heading) = (String::new(), String::new(), String::new());
    (!rows.is_empty()).then_some(Table { title, caption, label_heading, labels, rows, footnotes: Vec::new() })
}

//! Corpora: parquet files and JSON lines, here or in a store.

use super::tasks::length_bars;
use crate::cli::output;
use rpt::config::CorpusConfig;
use rpt::corpus::{Corpus, CorpusError, Document};
use rpt::tasks::LengthHistogram;
use serde_json::{Map, Value, json};

/// Files that are listed one by one.
const LISTED: usize = 32;
/// Characters of a sample that are shown.
const SHOWN: usize = 240;

/// Reads all documents (or so many) with the bound on memory that every reader of the corpus has.
pub(super) fn inspect(
    source: &str,
    text_column: &str,
    max_documents: Option<u64>,
    samples: usize,
) -> rpt::Result<Value> {
    let corpus = Corpus::open(&CorpusConfig {
        text_column: text_column.into(),
        max_quarantined: u64::MAX,
        min_bytes: 0,
        max_documents,
        ..CorpusConfig::new(source)
    })?;
    let files = corpus.summaries(LISTED);
    let mut documents = corpus.documents();
    let (mut shown, mut lengths) = (Vec::new(), LengthHistogram::default());
    for document in documents.by_ref() {
        let document = match document {
            Ok(document) => document,
            Err(CorpusError::Empty { .. }) => break,
            Err(error) => return Err(error.into()),
        };
        lengths.add(document.text.len());
        if shown.len() < samples {
            shown.push(sample(&document));
        }
    }
    let counts = documents.counts();
    let columns = files.iter().map(|file| &file.columns).find(|columns| !columns.is_empty());
    let columns = columns.map(|columns| {
        let column = |(name, data_type): &(String, String)| (name.clone(), json!(data_type));
        columns.iter().map(column).collect::<Map<_, _>>()
    });
    Ok(json!({
        "kind": "corpus",
        "source": source,
        "files": corpus.files().count(),
        "listed": files,
        "columns": columns,
        "documents": counts.documents,
        "bytes": counts.bytes,
        "row_groups": counts.row_groups,
        "dropped": counts.dropped,
        "quarantined": counts.quarantined_total,
        "first_quarantined": counts.quarantined.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "lengths": lengths,
        "sample": shown,
    }))
}

/// The same for people, with bars for the lengths.
pub(super) fn for_people(value: &Value) -> String {
    let mut short = value.clone();
    let lengths = short.as_object_mut().and_then(|map| map.shift_remove("lengths")).unwrap_or_default();
    output::outline(&short) + &length_bars("length of the documents (bytes):", &lengths)
}

fn sample(document: &Document) -> Value {
    let mut text: String = document.text.chars().take(SHOWN).collect();
    if text.len() < document.text.len() {
        text.push('…');
    }
    json!({ "id": document.id, "bytes": document.text.len(), "text": text })
}

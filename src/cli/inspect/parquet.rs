//! Parquet files of text.

use parquet::arrow::parquet_to_arrow_schema;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use rpt::config::CorpusConfig;
use rpt::corpus::{Corpus, CorpusError, Document};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

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
    let files: Vec<PathBuf> = corpus.files().map(Path::to_path_buf).collect();
    let mut documents = corpus.documents();
    let mut shown = Vec::new();
    for document in documents.by_ref() {
        match document {
            Ok(document) if shown.len() < samples => shown.push(sample(&document)),
            Ok(_) | Err(CorpusError::Empty { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let counts = documents.counts();
    Ok(json!({
        "kind": "parquet",
        "source": source,
        "files": files.len(),
        "listed": files.iter().take(LISTED).map(|path| listing(path)).collect::<Vec<_>>(),
        "columns": files.iter().find_map(|path| columns(path)),
        "documents": counts.documents,
        "bytes": counts.bytes,
        "row_groups": counts.row_groups,
        "dropped": counts.dropped,
        "quarantined": counts.quarantined_total,
        "first_quarantined": counts.quarantined.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "sample": shown,
    }))
}

fn sample(document: &Document) -> Value {
    let mut text: String = document.text.chars().take(SHOWN).collect();
    if text.len() < document.text.len() {
        text.push('…');
    }
    json!({ "id": document.id, "bytes": document.text.len(), "text": text })
}

fn listing(path: &Path) -> Value {
    let rows = footer(path).map(|footer| footer.file_metadata().num_rows());
    json!({ "file": path, "bytes": path.metadata().map(|metadata| metadata.len()).ok(), "rows": rows })
}

/// Names and types of the top-level columns.
fn columns(path: &Path) -> Option<Map<String, Value>> {
    let footer = footer(path)?;
    let schema = parquet_to_arrow_schema(footer.file_metadata().schema_descr(), None).ok()?;
    let column = |field: &std::sync::Arc<arrow::datatypes::Field>| {
        (field.name().clone(), Value::String(field.data_type().to_string()))
    };
    Some(schema.fields().iter().map(column).collect())
}

/// The footer, if it can be read; that of a damaged file may make the decoder panic.
fn footer(path: &Path) -> Option<ParquetMetaData> {
    let read =
        || ParquetMetaDataReader::new().parse_and_finish(&File::open(path).map_err(ParquetError::from)?);
    catch_unwind(read).ok()?.ok()
}

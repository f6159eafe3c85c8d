//! Files of other writers, and rows of every size.

use super::{config, plain, read_all, strings, write};
use arrow::array::{ArrayRef, Int64Array, StructArray};
use arrow::datatypes::{DataType, Field};
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use rpt::config::CorpusConfig;
use rpt::corpus::{Corpus, CorpusError};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use tempfile::TempDir;

#[derive(Deserialize)]
struct Expected {
    ids: Vec<i64>,
    texts: Vec<Option<String>>,
    files: BTreeMap<String, Columns>,
}

#[derive(Deserialize)]
struct Columns {
    text: String,
    id: String,
    rows: String,
}

#[test]
fn files_of_pyarrow_duckdb_and_polars_read_as_they_were_written() {
    let directory = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/variants"));
    let text = fs::read_to_string(directory.join("expected.json")).unwrap();
    let expected: Expected = serde_json::from_str(&text).unwrap();
    assert!(expected.files.len() > 30);
    for (name, Columns { text, id, rows }) in expected.files {
        let config = CorpusConfig {
            text_column: text,
            id_column: Some(id),
            min_bytes: 0,
            ..config(directory.join(&name))
        };
        let result = read_all(&config);
        if rows != "all" {
            assert!(matches!(result, Err(CorpusError::Empty { .. })), "{name}");
            continue;
        }
        let (documents, counts) = result.unwrap();
        let found: Vec<_> = documents.into_iter().map(|document| (document.id, document.text)).collect();
        let wanted = expected.ids.iter().zip(&expected.texts);
        let wanted: Vec<_> = wanted.filter_map(|(id, text)| Some((id.to_string(), text.clone()?))).collect();
        assert_eq!(found, wanted, "{name}");
        let nulls = expected.texts.iter().filter(|text| text.is_none()).count() as u64;
        assert_eq!(
            (counts.quarantined_total, &counts.dropped),
            (0, &[("null_text".to_owned(), nulls)].into()),
            "{name}"
        );
    }
}

#[test]
fn columns_lie_in_structs_and_their_nulls_count() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.parquet");
    let field = |name: &str, data_type| Arc::new(Field::new(name, data_type, true));
    let id: ArrayRef = Arc::new(Int64Array::from_iter_values(7..10));
    let inner: ArrayRef = Arc::new(StructArray::new(
        vec![field("text", DataType::Utf8), field("id", DataType::Int64)].into(),
        vec![strings(&["a", "b", "c"]), id],
        Some(vec![true, false, true].into()),
    ));
    write(&path, vec![("message", inner), ("text", strings(&["x", "y", "z"]))], plain());
    let read = |text: &str, id: &str| {
        read_all(&CorpusConfig { text_column: text.into(), id_column: Some(id.into()), ..config(&path) })
    };
    let (documents, counts) = read("message.text", "message.id").unwrap();
    let parts: Vec<_> =
        documents.iter().map(|document| (document.id.as_str(), document.text.as_str())).collect();
    assert_eq!(parts, [("7", "a"), ("9", "c")]);
    assert_eq!(counts.dropped, [("null_text".to_owned(), 1)].into());
    let error = read("message.texts", "message.id").unwrap_err().to_string();
    assert!(error.contains("no column `message.texts`; its columns are message, text"), "{error}");
    let error = read("message", "message.id").unwrap_err().to_string();
    assert!(error.contains("not text"), "{error}");
}

#[test]
fn documents_of_a_hundred_megabytes_pass() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.parquet");
    let words = "a document of some length ";
    let texts =
        [words.to_owned(), words.repeat((100 << 20) / words.len()), "x".repeat(3 << 20), words.into()];
    for compression in
        [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(ZstdLevel::default())]
    {
        let properties = WriterProperties::builder().set_compression(compression).build();
        write(&path, vec![("text", strings(&texts))], properties);
        let (documents, _) = read_all(&config(&path)).unwrap();
        assert!(documents.iter().map(|document| &document.text).eq(&texts), "{compression:?}");
    }
}

/// Many small rows, then large ones that the footer's averages say nothing about.
#[test]
fn rows_of_very_different_sizes_are_read_and_restarted() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.parquet");
    let large = |row: usize| format!("{row} ").repeat(if row.is_multiple_of(7) { 600_000 } else { 1 });
    let texts: Vec<String> =
        (0..100_000).map(|row| if row < 99_400 { row.to_string() } else { large(row) }).collect();
    let properties =
        WriterProperties::builder().set_dictionary_enabled(false).set_compression(Compression::SNAPPY);
    write(&path, vec![("text", strings(&texts))], properties.build());
    let corpus = Corpus::open(&config(&path)).unwrap();
    let mut stream = corpus.documents();
    let mut middle = None;
    for (row, text) in texts.iter().enumerate() {
        assert!(stream.next().unwrap().unwrap().text == *text, "row {row}");
        if row == 99_777 {
            middle = Some(stream.cursor());
        }
    }
    let mut rest = corpus.documents_from(middle.unwrap());
    assert!(rest.by_ref().map(|document| document.unwrap().text).eq(texts[99_778..].iter().cloned()));
    assert_eq!(rest.counts().quarantined_total, 0);
}

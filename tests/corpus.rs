#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]
//! Reading parquet corpora: every writer's variants, damage of every kind, exact restarts.

#[path = "corpus/generated.rs"]
mod generated;
#[path = "corpus/json_lines.rs"]
mod json_lines;
#[path = "corpus/operations.rs"]
mod operations;
#[path = "corpus/writers.rs"]
mod writers;

use arrow::array::{
    Array, ArrayRef, BinaryArray, DictionaryArray, Int32Array, Int64Array, LargeStringArray, ListArray,
    RecordBatch, StringArray, StringViewArray, StructArray, UInt64Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Int32Type};
use parquet::arrow::ArrowWriter;
use parquet::basic::{BrotliLevel, Compression, Encoding, GzipLevel, ZstdLevel};
use parquet::data_type::ByteArrayType;
use parquet::file::properties::{WriterProperties, WriterVersion};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::ColumnPath;
use proptest::prelude::*;
use proptest::test_runner::{RngSeed, TestRunner};
use rpt::config::CorpusConfig;
use rpt::corpus::{Corpus, CorpusCounts, CorpusError, Cursor, Document, read_traces};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

pub(crate) fn config(source: impl AsRef<Path>) -> CorpusConfig {
    CorpusConfig::new(source.as_ref().to_str().unwrap())
}

pub(crate) fn write(path: &Path, columns: Vec<(&str, ArrayRef)>, properties: WriterProperties) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer =
        ArrowWriter::try_new(fs::File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

pub(crate) fn plain() -> WriterProperties {
    WriterProperties::builder().build()
}

pub(crate) fn row_groups(rows: usize) -> WriterProperties {
    WriterProperties::builder().set_max_row_group_row_count(Some(rows)).build()
}

pub(crate) fn strings<S: AsRef<str>>(texts: &[S]) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(texts))
}

pub(crate) fn numbered(name: &str, count: usize) -> Vec<String> {
    (0..count)
        .map(|index| format!("{name} document {index}, of some length: {}", "x".repeat(index % 37)))
        .collect()
}

pub(crate) fn read_all(config: &CorpusConfig) -> Result<(Vec<Document>, CorpusCounts), CorpusError> {
    let mut stream = Corpus::open(config)?.documents();
    let documents = stream.by_ref().collect::<Result<Vec<_>, _>>()?;
    Ok((documents, stream.counts().clone()))
}

pub(crate) fn texts(config: &CorpusConfig) -> Vec<String> {
    read_all(config).unwrap().0.into_iter().map(|document| document.text).collect()
}

/// Columns of a whole file as strings, by the plainest use of the parquet crate.
fn reference(path: &Path, name: &str) -> Vec<String> {
    let file = fs::File::open(path).unwrap();
    let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReader::try_new(file, 1024).unwrap();
    let column = |batch: RecordBatch| {
        let column = arrow::compute::cast(batch.column_by_name(name).unwrap(), &DataType::Utf8).unwrap();
        let column = column.as_any().downcast_ref::<StringArray>().unwrap().clone();
        column.iter().map(|text| text.unwrap().to_owned()).collect::<Vec<_>>()
    };
    reader.flat_map(|batch| column(batch.unwrap())).collect()
}

#[test]
fn every_codec_encoding_and_page_version_reads_the_same() {
    let directory = TempDir::new().unwrap();
    let expected = numbered("é漢", 700);
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::LZ4,
        Compression::LZ4_RAW,
        Compression::GZIP(GzipLevel::default()),
        Compression::BROTLI(BrotliLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
    ] {
        for version in [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0] {
            let path = directory.path().join("file.parquet");
            let properties =
                WriterProperties::builder().set_compression(compression).set_writer_version(version);
            write(&path, vec![("text", strings(&expected))], properties.build());
            assert_eq!(texts(&config(&path)), expected, "{compression:?} {version:?}");
        }
    }
    for encoding in [Encoding::PLAIN, Encoding::DELTA_BYTE_ARRAY, Encoding::DELTA_LENGTH_BYTE_ARRAY] {
        let path = directory.path().join("file.parquet");
        let properties = WriterProperties::builder().set_dictionary_enabled(false);
        let properties = properties.set_column_encoding(ColumnPath::from("text"), encoding);
        write(&path, vec![("text", strings(&expected))], properties.build());
        assert_eq!(texts(&config(&path)), expected, "{encoding:?}");
    }
}

#[test]
fn every_string_type_reads_the_same() {
    let directory = TempDir::new().unwrap();
    let expected = numbered("a", 300);
    let borrowed = expected.iter().map(String::as_str);
    let columns: [ArrayRef; 4] = [
        strings(&expected),
        Arc::new(LargeStringArray::from_iter_values(borrowed.clone())),
        Arc::new(StringViewArray::from_iter_values(borrowed.clone())),
        Arc::new(borrowed.collect::<DictionaryArray<Int32Type>>()),
    ];
    for column in columns {
        let path = directory.path().join("file.parquet");
        let data_type = column.data_type().clone();
        write(&path, vec![("text", column)], plain());
        assert_eq!(texts(&config(&path)), expected, "{data_type}");
    }
}

#[test]
fn names_come_from_the_id_column_or_from_file_and_row() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("sub/file.parquet");
    let ids: ArrayRef = Arc::new(StringArray::from(vec![Some("one"), None, Some("three")]));
    let numbers: ArrayRef = Arc::new(UInt64Array::from(vec![7, u64::MAX, 0]));
    let columns = vec![("name", ids), ("number", numbers), ("text", strings(&["a", "b", "c"]))];
    write(&path, columns, row_groups(2));
    let ids = |source: &Path, id_column: Option<&str>| {
        let config = CorpusConfig { id_column: id_column.map(Into::into), ..config(source) };
        read_all(&config).unwrap().0.into_iter().map(|document| document.id).collect::<Vec<_>>()
    };
    assert_eq!(ids(&path, None), ["file.parquet:0", "file.parquet:1", "file.parquet:2"]);
    assert_eq!(ids(directory.path(), None)[2], "sub/file.parquet:2");
    assert_eq!(ids(directory.path(), Some("name")), ["one", "sub/file.parquet:1", "three"]);
    assert_eq!(ids(&path, Some("number")), ["7", "18446744073709551615", "0"]);
}

#[test]
fn nulls_and_short_documents_are_dropped_and_counted() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.parquet");
    let column: ArrayRef =
        Arc::new(StringArray::from(vec![Some("long enough"), None, Some("é"), Some(""), Some("abc")]));
    write(&path, vec![("text", column)], row_groups(3));
    let (documents, counts) = read_all(&CorpusConfig { min_bytes: 3, ..config(&path) }).unwrap();
    assert_eq!(
        documents.iter().map(|document| document.text.as_str()).collect::<Vec<_>>(),
        ["long enough", "abc"]
    );
    assert_eq!(documents[1].id, "file.parquet:4");
    assert_eq!(counts.dropped, [("null_text".into(), 1), ("too_short".into(), 2)].into());
    assert_eq!((counts.files, counts.row_groups, counts.documents, counts.bytes), (1, 2, 2, 14));
}

#[test]
fn damage_in_a_column_that_is_not_read_does_no_harm() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.parquet");
    let expected = numbered("a", 200);
    let other: ArrayRef = Arc::new(BinaryArray::from_iter_values((0..200).map(|_| [b'#'; 64])));
    let properties = WriterProperties::builder().set_dictionary_enabled(false).build();
    write(&path, vec![("other", other), ("text", strings(&expected))], properties);
    let mut bytes = fs::read(&path).unwrap();
    bytes[4..2000].fill(0xff);
    fs::write(&path, bytes).unwrap();
    assert_eq!(texts(&config(&path)), expected);
}

#[test]
fn directories_and_globs_give_files_in_path_order() {
    let directory = TempDir::new().unwrap();
    for name in ["b.parquet", "a/z.parquet", "a/deep/er.parquet", "c.parquet"] {
        write(&directory.path().join(name), vec![("text", strings(&[name]))], plain());
    }
    fs::write(directory.path().join("a/notes.txt"), "no parquet").unwrap();
    fs::write(directory.path().join(".b.parquet"), "hidden").unwrap();
    std::os::unix::fs::symlink(directory.path(), directory.path().join("a/loop")).unwrap();
    assert_eq!(
        texts(&config(directory.path())),
        ["a/deep/er.parquet", "a/z.parquet", "b.parquet", "c.parquet"]
    );
    assert_eq!(texts(&config(directory.path().join("[bc].parquet"))), ["b.parquet", "c.parquet"]);
    let (documents, _) = read_all(&config(directory.path().join("a/*/*.parquet"))).unwrap();
    assert!(documents.iter().any(|document| document.id == "deep/er.parquet:0"), "{documents:?}");
}

#[test]
fn mistakes_in_the_source_are_named_with_advice() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("corpus.parquet");
    let binary: ArrayRef = Arc::new(BinaryArray::from_iter_values([b"\xff\xfe"]));
    write(&path, vec![("content", strings(&["a"])), ("blob", binary)], plain());
    let fail = |config: &CorpusConfig| {
        let error = Corpus::open(config).unwrap_err();
        (error.to_string(), error.hint().unwrap())
    };
    let (message, hint) = fail(&CorpusConfig { text_column: "contents".into(), ..config(&path) });
    assert!(message.ends_with("no column `contents`; its columns are content, blob"), "{message}");
    assert_eq!(hint, "did you mean `content`?");
    let (message, _) = fail(&CorpusConfig { text_column: "blob".into(), ..config(&path) });
    assert!(message.ends_with("column `blob` holds Binary, not text (a UTF-8 string)"), "{message}");
    let id_column = Some("blob".into());
    let (message, _) = fail(&CorpusConfig { text_column: "content".into(), id_column, ..config(&path) });
    assert!(message.contains("not names"), "{message}");
    let (_, hint) = fail(&config(directory.path().join("corpse.parquet")));
    assert!(hint.contains("corpus.parquet"), "{hint}");
    let empty = TempDir::new().unwrap();
    assert!(matches!(Corpus::open(&config(empty.path())), Err(CorpusError::NoFiles { .. })));
    assert!(matches!(
        Corpus::open(&config(empty.path().join("*.parquet"))),
        Err(CorpusError::NoFiles { .. })
    ));
    assert!(matches!(Corpus::open(&config("a***b/[")), Err(CorpusError::Pattern { .. })));
    let (message, hint) = fail(&config("other://u:secret@bucket/prefix?secret"));
    assert!(message.contains("other://bucket/prefix is not a local path"), "{message}");
    assert!(cfg!(feature = "remote") || hint.contains("--features remote"), "{hint}");
    fs::write(&path, "PAR1 not at all PAR1").unwrap();
    assert!(matches!(Corpus::open(&config(&path)), Err(CorpusError::Unreadable { .. })));
}

#[test]
fn a_corpus_without_documents_is_an_error() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.parquet");
    let none: [&str; 0] = [];
    write(&path, vec![("text", strings(&none))], plain());
    assert!(matches!(read_all(&config(&path)), Err(CorpusError::Empty { .. })));
    write(&path, vec![("text", strings(&["a", "b"]))], plain());
    let error = read_all(&CorpusConfig { min_bytes: 2, ..config(&path) }).unwrap_err();
    assert!(error.to_string().contains("too_short: 2"), "{error}");
    assert!(read_all(&CorpusConfig { max_documents: Some(0), ..config(&path) }).unwrap().0.is_empty());
}

/// A corpus with small row groups, nulls and, in the middle, a row group and a file that are damaged.
fn damaged_corpus(directory: &Path) {
    let text = |name: &str, count| -> ArrayRef {
        let texts = numbered(name, count);
        let texts = texts.iter().enumerate().map(|(index, text)| (index % 7 != 3).then_some(text));
        Arc::new(texts.collect::<StringArray>())
    };
    let properties = || {
        let properties = WriterProperties::builder().set_dictionary_enabled(false);
        properties
            .set_max_row_group_row_count(Some(600))
            .set_data_page_row_count_limit(100)
            .set_write_batch_size(50)
            .build()
    };
    for name in ["a", "b", "c", "d"] {
        write(&directory.join(format!("{name}.parquet")), vec![("text", text(name, 1300))], properties());
    }
    // Invalid UTF-8 in row 400 of the second row group of b: all rows before it are intact.
    let path = directory.join("b.parquet");
    let mut bytes = fs::read(&path).unwrap();
    let victim = b"b document 1000,";
    let at = bytes.windows(victim.len()).position(|window| window == victim).unwrap();
    bytes[at] = 0xff;
    fs::write(&path, bytes).unwrap();
    let path = directory.join("c.parquet");
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
}

#[test]
fn damaged_places_are_quarantined_and_the_rest_is_read() {
    let directory = TempDir::new().unwrap();
    damaged_corpus(directory.path());
    let (documents, counts) = read_all(&config(directory.path())).unwrap();
    let texts: std::collections::BTreeSet<_> =
        documents.iter().map(|document| document.text.as_str()).collect();
    let expected = |name: &str, rows: std::ops::Range<usize>| {
        let all = numbered(name, 1300);
        rows.filter(|row| row % 7 != 3).all(|row| texts.contains(all[row].as_str()))
    };
    assert!(expected("a", 0..1300) && expected("d", 0..1300));
    assert!(expected("b", 0..1000) && expected("b", 1200..1300));
    assert!(!documents.iter().any(|document| document.text.starts_with('c')));
    assert_eq!(counts.quarantined_total, 2);
    let [group, file] = &counts.quarantined[..] else { panic!("{:?}", counts.quarantined) };
    assert_eq!(
        (group.file.file_name().unwrap(), group.row_group, group.rows_read),
        ("b.parquet".as_ref(), Some(1), 400)
    );
    assert_eq!((file.file.file_name().unwrap(), file.row_group), ("c.parquet".as_ref(), None));
    assert!(!documents.iter().any(|document| document.text.contains(char::REPLACEMENT_CHARACTER)));
}

#[test]
fn too_much_damage_ends_the_stream_with_what_was_found() {
    let directory = TempDir::new().unwrap();
    damaged_corpus(directory.path());
    let corpus = Corpus::open(&CorpusConfig { max_quarantined: 1, ..config(directory.path()) }).unwrap();
    let mut stream = corpus.documents();
    let error = stream.find_map(Result::err).unwrap();
    let message = error.to_string();
    assert!(message.contains("b.parquet row group 1") && message.contains("c.parquet"), "{message}");
    assert!(error.hint().unwrap().contains("max_quarantined"));
    assert!(stream.next().is_none(), "a stream ends after its error");
}

#[test]
fn reading_restarts_exactly_at_every_document() {
    let directory = TempDir::new().unwrap();
    damaged_corpus(directory.path());
    let config = CorpusConfig { max_quarantined: 2, max_documents: Some(2900), ..config(directory.path()) };
    let corpus = Corpus::open(&config).unwrap();
    let mut stream = corpus.documents();
    let mut after = vec![stream.cursor()];
    let mut documents = Vec::new();
    while let Some(document) = stream.next() {
        documents.push(document.unwrap());
        after.push(stream.cursor());
    }
    assert_eq!(documents.len(), 2900);
    for (index, cursor) in after.iter().enumerate() {
        let saved: Cursor = serde_json::from_str(&serde_json::to_string(cursor).unwrap()).unwrap();
        // All that follows at some cursors, a few documents and their cursors at all of them.
        let count = if index % 97 == 0 { usize::MAX } else { 3 };
        let mut stream = corpus.documents_from(saved);
        for (offset, expected) in documents[index..].iter().take(count).enumerate() {
            assert_eq!(&stream.next().unwrap().unwrap(), expected);
            assert_eq!(stream.cursor(), after[index + offset + 1]);
        }
        if count == usize::MAX || index == documents.len() {
            assert!(stream.next().is_none());
        }
    }
}

#[test]
fn the_quarantine_limit_holds_across_restarts() {
    let directory = TempDir::new().unwrap();
    damaged_corpus(directory.path());
    let corpus = Corpus::open(&CorpusConfig { max_quarantined: 1, ..config(directory.path()) }).unwrap();
    let mut stream = corpus.documents();
    while stream.cursor().quarantined == 0 {
        stream.next().unwrap().unwrap();
    }
    let restarted = corpus.documents_from(stream.cursor());
    assert!(matches!(restarted.last(), Some(Err(CorpusError::TooManyQuarantined { total: 2, .. }))));
}

#[test]
fn the_fingerprint_tells_corpora_apart() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.parquet");
    let fingerprint = || Corpus::open(&config(directory.path())).unwrap().fingerprint().unwrap();
    write(&path, vec![("text", strings(&["one"]))], plain());
    let first = fingerprint();
    assert_eq!(first, fingerprint());
    write(&path, vec![("text", strings(&["two"]))], plain());
    assert_ne!(first, fingerprint());
}

/// Every byte of a small file is a fair target: the footer, page headers, levels, lengths, text.
fn small_file(path: &Path, compression: Compression, version: WriterVersion) -> Vec<u8> {
    let properties = WriterProperties::builder().set_compression(compression).set_writer_version(version);
    let properties =
        properties.set_max_row_group_row_count(Some(40)).set_data_page_row_count_limit(20).build();
    let id: ArrayRef = Arc::new(Int64Array::from_iter_values(0..120));
    write(path, vec![("id", id), ("text", strings(&numbered("é", 120)))], properties);
    fs::read(path).unwrap()
}

/// How reading a possibly damaged file went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// It was refused when it was opened.
    Refused,
    /// It could be read in part.
    Quarantined,
    /// The damage could not be noticed.
    Read,
}

/// Reads a possibly damaged file to its end; what matters most is that it returns.
fn fate(path: &Path) -> Fate {
    let config = CorpusConfig { id_column: Some("id".into()), max_quarantined: 3, ..config(path) };
    let Ok(corpus) = Corpus::open(&config) else { return Fate::Refused };
    let mut stream = corpus.documents();
    let documents = stream.by_ref().take(100_000).filter_map(Result::ok).count() as u64;
    assert_eq!(stream.counts().documents, documents);
    if stream.counts().quarantined_total > 0 { Fate::Quarantined } else { Fate::Read }
}

#[test]
fn no_corruption_panics() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.parquet");
    let fates = RefCell::new(BTreeMap::new());
    let codecs = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::ZSTD(ZstdLevel::default()),
        Compression::LZ4_RAW,
    ];
    let versions = [WriterVersion::PARQUET_1_0, WriterVersion::PARQUET_2_0];
    let flips = prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..6);
    let cases = (
        flips,
        any::<bool>(),
        prop::sample::select(codecs.to_vec()),
        prop::sample::select(versions.to_vec()),
    );
    let config = ProptestConfig { cases: 1000, rng_seed: RngSeed::Fixed(7), ..ProptestConfig::default() };
    let outcome = TestRunner::new(config).run(&cases, |(flips, near_end, codec, version)| {
        let mut bytes = small_file(&path, codec, version);
        // Half of the cases aim at the footer.
        let first = if near_end { bytes.len() - bytes.len() / 4 } else { 0 };
        for (index, bit) in &flips {
            let at = first + index.index(bytes.len() - first);
            bytes[at] ^= 1 << bit;
        }
        fs::write(&path, &bytes).unwrap();
        *fates.borrow_mut().entry(fate(&path)).or_insert(0) += 1;
        Ok(())
    });
    outcome.unwrap();
    let fates = fates.into_inner();
    assert!(
        fates.len() == 3 && fates.values().all(|count| *count >= 50),
        "the damage is too uniform: {fates:?}"
    );
}

#[test]
fn json_text_that_is_not_utf8_is_quarantined() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.parquet");
    let schema = parse_message_type("message m { required binary text (JSON); }").unwrap();
    let file = fs::File::create(&path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema.into(), plain().into()).unwrap();
    for value in [&b"{}"[..], b"\xff{}"] {
        let mut group = writer.next_row_group().unwrap();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&[value.to_vec().into()], None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
    }
    writer.close().unwrap();
    let (documents, counts) = read_all(&config(&path)).unwrap();
    assert_eq!(documents.iter().map(|document| document.text.as_str()).collect::<Vec<_>>(), ["{}"]);
    assert_eq!((counts.quarantined_total, counts.quarantined[0].row_group), (1, Some(1)));
    assert!(counts.quarantined[0].reason.contains("utf-8"), "{:?}", counts.quarantined);
}

#[test]
fn no_truncation_panics() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.parquet");
    let bytes = small_file(&path, Compression::SNAPPY, WriterVersion::PARQUET_1_0);
    for length in (0..bytes.len()).step_by(23) {
        fs::write(&path, &bytes[..length]).unwrap();
        fate(&path);
        // A footer that belongs to a longer file.
        let cut = [&bytes[..length / 2], &bytes[bytes.len() / 2..]].concat();
        fs::write(&path, cut).unwrap();
        fate(&path);
    }
}

fn marks_column(offsets: Vec<Option<i32>>, lengths: &[usize]) -> ArrayRef {
    let labels: ArrayRef = strings(&(0..offsets.len()).map(|index| format!("k{index}")).collect::<Vec<_>>());
    let offsets: ArrayRef = Arc::new(Int32Array::from(offsets));
    let fields: Fields =
        vec![Field::new("label", DataType::Utf8, true), Field::new("offset", DataType::Int32, true)].into();
    let parts = StructArray::new(fields.clone(), vec![labels, offsets], None);
    let element = Arc::new(Field::new("element", DataType::Struct(fields), true));
    let lengths = OffsetBuffer::from_lengths(lengths.iter().copied());
    Arc::new(ListArray::new(element, lengths, Arc::new(parts), None))
}

#[test]
fn positions_become_marks_and_bad_ones_are_counted() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("file.parquet");
    let marks = marks_column(vec![Some(0), Some(2), None, Some(1), Some(3), Some(-1)], &[3, 0, 3]);
    write(&path, vec![("positions", marks), ("text", strings(&["abc", "b", "éa"]))], plain());
    let (documents, counts) = read_all(&config(&path)).unwrap();
    let marks = |index: usize| -> Vec<(u64, String)> {
        documents[index].marks.iter().map(|mark| (mark.offset, mark.label.clone())).collect()
    };
    assert_eq!(marks(0), [(0, "k0".into()), (2, "k1".into())]);
    assert!(marks(1).is_empty() && marks(2).is_empty());
    assert_eq!(counts.dropped, [("mark_outside_text".into(), 4)].into());
    let other: ArrayRef = Arc::new(Int32Array::from(vec![1]));
    write(&path, vec![("positions", other), ("text", strings(&["abc"]))], plain());
    assert!(read_all(&config(&path)).unwrap().0[0].marks.is_empty());
}

#[test]
fn traces_are_read_and_checked() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("traces.parquet");
    let write = |offset: i32, prediction: &str, label: Option<&str>| {
        let offset: ArrayRef = Arc::new(Int32Array::from(vec![offset]));
        let text = |text: &str| strings(&[text]);
        let mut columns = vec![
            ("prediction", text(prediction)),
            ("offset", offset),
            ("text", text("é zoo")),
            ("thought", text("")),
        ];
        columns.extend(label.map(|label| ("label", text(label))));
        write(&path, columns, plain());
        read_traces(path.to_str().unwrap())
    };
    let traces = write(2, " zoo", Some("1")).unwrap();
    assert_eq!(
        (traces[0].offset, traces[0].prediction.as_str(), traces[0].label.as_deref()),
        (2, " zoo", Some("1"))
    );
    assert_eq!(write(2, " zoo", None).unwrap()[0].label, None);
    for (offset, prediction) in [(1, " zoo"), (-1, " zoo"), (6, " zoo"), (2, "")] {
        let error = write(offset, prediction, None).unwrap_err();
        assert!(matches!(error, CorpusError::BadTrace { row: 0, .. }), "{error}");
    }
    self::write(&path, vec![("text", strings(&["a"]))], plain());
    assert!(matches!(read_traces(path.to_str().unwrap()), Err(CorpusError::NoColumn { .. })));
}

#[test]
fn shared_corpora_read_as_the_parquet_crate_reads_them() {
    let shared = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/corpora"));
    if !shared.is_dir() {
        println!("SKIPPED: {} is absent, real corpora were NOT read", shared.display());
        return;
    }
    let rows =
        [("omnimath-train", 2421), ("omnimath-valid", 200), ("gsm8k-train", 7473), ("tinyshakespeare", 261)];
    for (name, rows) in rows {
        let path = shared.join(format!("{name}.parquet"));
        let config = CorpusConfig { id_column: Some("id".into()), ..config(&path) };
        let (documents, counts) = read_all(&config).unwrap();
        assert_eq!((documents.len(), counts.quarantined_total), (rows, 0), "{name}");
        let part = |part: fn(&Document) -> &String| documents.iter().map(part).cloned().collect::<Vec<_>>();
        assert_eq!(part(|document| &document.text), reference(&path, "text"), "{name}");
        assert_eq!(part(|document| &document.id), reference(&path, "id"), "{name}");
    }
}

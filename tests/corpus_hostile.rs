//! Whatever the files of a corpus hold, they are read, quarantined or refused: no panic escapes, nothing
//! hangs, and nothing takes more than 512 MB.
//!
//! Each case damages valid files, by its number alone; `tests/common/fuzz.rs` says how to repeat one.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/fuzz.rs"]
mod fuzz;
#[path = "common/meter.rs"]
mod meter;
#[path = "common/mutate.rs"]
mod mutate;

use arrow::array::{ArrayRef, Int32Array, Int64Array, ListArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields};
use flate2::write::GzEncoder;
use fuzz::{alone, in_memory, run_case, run_cases};
use meter::{Meter, measure};
use mutate::{Draw, damage};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};
use parquet::schema::types::ColumnPath;
use rpt::config::CorpusConfig;
use rpt::corpus::{Corpus, Document};
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[global_allocator]
static METER: Meter = Meter;

/// Bytes that reading a damaged file of up to 256 KiB may take at one time.
const MOST: usize = 512_000_000;
/// Documents after which a stream is left: damage may multiply them, but not without bound.
const DOCUMENTS: usize = 20_000;

/// How reading a possibly damaged file went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// It was refused when it was opened.
    Refused,
    /// It could be read in part, and what could not is named.
    Quarantined,
    /// It holds no documents, or others: damage that cannot be noticed.
    Other,
    /// The documents are those of the undamaged file.
    Same,
}

/// A file to damage, with its documents.
struct Original {
    name: String,
    text: String,
    id: String,
    bytes: Vec<u8>,
    documents: Vec<Document>,
}

fn config(path: &Path, text: &str, id: &str) -> CorpusConfig {
    CorpusConfig {
        text_column: text.into(),
        id_column: Some(id.into()),
        max_quarantined: 1000,
        min_bytes: 0,
        ..CorpusConfig::new(path.to_str().unwrap())
    }
}

/// Reads a file to its end; sometimes from the middle again, which must go on as before.
fn fate(path: &Path, original: &Original, restart: Option<usize>) -> Fate {
    let Ok(corpus) = Corpus::open(&config(path, &original.text, &original.id)) else { return Fate::Refused };
    corpus.fingerprint().unwrap();
    let mut stream = corpus.documents();
    let (mut documents, mut failed) = (Vec::new(), false);
    for document in stream.by_ref().take(DOCUMENTS) {
        match document {
            Ok(document) => documents.push(document),
            Err(_) => failed = true,
        }
    }
    for place in &stream.counts().quarantined {
        assert!(place.file == path && !place.reason.is_empty(), "{place:?}");
        assert!(place.rows_read == 0 || place.row_group.is_some(), "{place:?}");
    }
    if let Some(at) = restart.filter(|_| !documents.is_empty()) {
        let at = at % documents.len();
        let mut again = corpus.documents();
        again.by_ref().take(at + 1).for_each(drop);
        let rest = corpus.documents_from(again.cursor()).take(DOCUMENTS - at - 1).filter_map(Result::ok);
        assert!(rest.eq(documents[at + 1..].iter().cloned()), "restarted after document {at}");
    }
    match stream.counts().quarantined_total {
        0 if !failed && documents == original.documents => Fate::Same,
        0 => Fate::Other,
        _ => Fate::Quarantined,
    }
}

fn fuzz(
    kind: &'static str,
    cases: u64,
    originals: &[Original],
    make: impl Fn(&mut Draw, &Original) -> Vec<u8>,
) {
    let (directory, mut fates) = (in_memory(), BTreeMap::new());
    run_cases(kind, cases, |numbers, most| {
        for case in numbers {
            let mut draw = Draw::new(kind, case);
            let original = draw.pick(originals);
            let bytes = make(&mut draw, original);
            let restart = draw.one_in(4).then(|| draw.below(1000));
            let path = directory.path().join(&original.name);
            fs::write(&path, &bytes).unwrap();
            let fate = run_case(case, MOST, most, || fate(&path, original, restart))
                .map_err(|failure| format!("({}) {failure}", original.name))?;
            *fates.entry(fate).or_insert(0_u64) += 1;
            fs::remove_file(&path).unwrap();
        }
        Ok(format!("{fates:?}"))
    });
    assert!(fates.values().sum::<u64>() < 1000 || fates.len() >= 3, "the damage is too uniform: {fates:?}");
}

fn original(name: &str, text: &str, id: &str, bytes: Vec<u8>) -> Original {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(name);
    fs::write(&path, &bytes).unwrap();
    let corpus = Corpus::open(&config(&path, text, id)).unwrap();
    let documents = corpus.documents().filter_map(Result::ok).collect();
    Original { name: name.into(), text: text.into(), id: id.into(), bytes, documents }
}

/// Files of other writers, and of this one with marked positions in every codec.
fn parquet_files() -> Vec<Original> {
    let directory = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/corpus/variants"));
    let expected: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(directory.join("expected.json")).unwrap()).unwrap();
    let read = |(name, columns): (&String, &serde_json::Value)| {
        let column = |key: &str| columns[key].as_str().unwrap();
        original(name, column("text"), column("id"), fs::read(directory.join(name)).unwrap())
    };
    let mut files: Vec<Original> = expected["files"].as_object().unwrap().iter().map(read).collect();
    let codecs = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::LZ4,
        Compression::GZIP(parquet::basic::GzipLevel::default()),
        Compression::BROTLI(parquet::basic::BrotliLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
    ];
    for (number, codec) in codecs.into_iter().enumerate() {
        let encodings = [Encoding::DELTA_BYTE_ARRAY, Encoding::DELTA_LENGTH_BYTE_ARRAY, Encoding::PLAIN];
        let properties = WriterProperties::builder()
            .set_compression(codec)
            .set_max_row_group_row_count(Some(25))
            .set_data_page_row_count_limit(10)
            .set_write_batch_size(5)
            .set_dictionary_enabled(number % 2 == 0)
            .set_column_encoding(ColumnPath::from("text"), encodings[number % 3])
            .set_writer_version(if number < 3 {
                WriterVersion::PARQUET_1_0
            } else {
                WriterVersion::PARQUET_2_0
            });
        files.push(original(&format!("marked-{number}.parquet"), "text", "id", marked(properties.build())));
    }
    files
}

fn marked(properties: WriterProperties) -> Vec<u8> {
    let texts: Vec<Option<String>> = (0..60)
        .map(|row| (row % 9 != 4).then(|| format!("é text {row} {}", "more ".repeat(row % 11))))
        .collect();
    let labels: ArrayRef = Arc::new(StringArray::from_iter_values((0..120).map(|at| format!("k{}", at % 5))));
    let offsets: ArrayRef = Arc::new(Int32Array::from_iter_values((0..120).map(|at| at % 7)));
    let fields: Fields =
        vec![Field::new("label", DataType::Utf8, true), Field::new("offset", DataType::Int32, true)].into();
    let element = Arc::new(Field::new("element", DataType::Struct(fields.clone()), true));
    let parts = StructArray::new(fields, vec![labels, offsets], None);
    let lengths = OffsetBuffer::from_lengths((0..60).map(|row| row % 5));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("id", Arc::new(Int64Array::from_iter_values(0..60))),
        ("text", Arc::new(StringArray::from(texts))),
        ("positions", Arc::new(ListArray::new(element, lengths, Arc::new(parts), None))),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

/// Integers, lists and strings of Thrift that claim much, and pieces of pages that do.
const CLAIMS: [&[u8]; 14] = [
    b"\xff\xff\xff\xff\x0f",
    b"\xfe\xff\xff\xff\x0f",
    b"\xfe\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\x80\x80\x80\x80\x04",
    b"\x80\x80\x80\x80\x80\x20",
    b"\x80\x80\x40",
    b"\x01",
    b"\x00",
    b"\xfc\xff\xff\xff\xff\x07",
    b"\x19\xfc\xff\xff\x3f",
    b"\x1c\x1c\x1c\x1c\x1c\x1c",
    b"\xff\xff\xff\x7f",
    b"\x80\x01\x04\xff\xff\xff\xff\xff\xff\x0f",
    b"PAR1",
];

/// Where an integer of several bytes is replaced by another.
fn claim(draw: &mut Draw, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        return;
    }
    let at = draw.below(bytes.len());
    let integer = bytes[at..].iter().take(10).position(|byte| byte & 0x80 == 0).unwrap_or(0);
    let end = (at + integer + 1).min(bytes.len());
    drop(bytes.splice(at..end, draw.pick(&CLAIMS).to_vec()));
}

/// Body and footer of a parquet file.
fn halves(bytes: &[u8]) -> (&[u8], &[u8]) {
    let (content, suffix) = bytes.split_at(bytes.len() - 8);
    let length = u32::from_le_bytes(suffix[..4].try_into().unwrap()) as usize;
    content.split_at(content.len() - length)
}

fn damaged_parquet(draw: &mut Draw, start: &Original, all: &[Original]) -> Vec<u8> {
    if draw.one_in(12) {
        let mut bytes = start.bytes.clone();
        match draw.below(3) {
            0 => bytes.truncate(draw.below(bytes.len())),
            1 => {
                let other = &draw.pick(all).bytes;
                let (first, second) = (draw.below(bytes.len()), draw.below(other.len()));
                bytes.truncate(first);
                bytes.extend_from_slice(&other[second..]);
            }
            _ => (0..draw.few()).for_each(|_| damage(draw, &mut bytes, &CLAIMS)),
        }
        return bytes;
    }
    let (body, footer) = halves(&start.bytes);
    let (mut body, mut footer) = (body.to_vec(), footer.to_vec());
    for _ in 0..draw.few() {
        match draw.below(8) {
            // In place: what lies behind keeps its place.
            0..=2 => {
                let at = draw.below(body.len());
                body[at] ^= 1 << draw.below(8);
            }
            3 => {
                let at = draw.below(body.len());
                let claim = draw.pick(&CLAIMS);
                body.iter_mut().skip(at).zip(*claim).for_each(|(byte, other)| *byte = *other);
            }
            4 => damage(draw, &mut body, &CLAIMS),
            5 => {
                let at = draw.below(footer.len().max(1));
                footer.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1 << draw.below(8));
            }
            6 => claim(draw, &mut footer),
            _ => damage(draw, &mut footer, &CLAIMS),
        }
        if body.is_empty() {
            body.push(0);
        }
    }
    let length = (footer.len() as u32).to_le_bytes();
    [&body, &footer, &length[..], b"PAR1"].concat()
}

#[test]
fn any_parquet_file_is_read_quarantined_or_refused() {
    let files = parquet_files();
    fuzz("parquet", 8000, &files, |draw, start| damaged_parquet(draw, start, &files));
}

#[test]
fn any_footer_is_read_quarantined_or_refused() {
    let files = parquet_files();
    fuzz("footers", 3000, &files, |draw, start| {
        let (body, footer) = halves(&start.bytes);
        let mut footer = footer.to_vec();
        for _ in 0..draw.few() {
            if draw.one_in(3) { damage(draw, &mut footer, &CLAIMS) } else { claim(draw, &mut footer) }
        }
        [body, &footer, &(footer.len() as u32).to_le_bytes()[..], b"PAR1"].concat()
    });
}

#[test]
fn a_schema_that_claims_children_without_number_is_refused_before_memory_is_taken() {
    let files = parquet_files();
    let start = files.iter().find(|file| file.name == "pyarrow-none-v1.parquet").unwrap();
    let (body, footer) = halves(&start.bytes);
    // The root of the schema: its name, then two children.
    let root = b"schema\x15\x04";
    let at = footer.windows(root.len()).position(|window| window == root).unwrap() + root.len() - 1;
    let footer = [&footer[..at], b"\xfe\xff\xff\xff\x0f", &footer[at + 1..]].concat();
    let bytes = [body, &footer, &(footer.len() as u32).to_le_bytes()[..], b"PAR1"].concat();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("claims.parquet");
    fs::write(&path, bytes).unwrap();
    let alone = alone();
    let (result, taken) = measure(0, || Corpus::open(&config(&path, "text", "id")));
    drop(alone);
    let error = result.unwrap_err().to_string();
    assert!(error.contains("the schema in its footer is not a tree"), "{error}");
    assert!(taken.peak < 1_000_000, "{taken:?}");
}

const SPLINTERS: [&[u8]; 10] = [
    b"{",
    b"}",
    b"\"",
    b"\n",
    b"\\u",
    b"\xff\xfe",
    b"\0",
    b"{\"text\":",
    b"[[[[[[[[[[[[[[[[[[[[[[[[[[",
    b"\xef\xbb\xbf",
];

#[test]
fn any_lines_are_read_quarantined_or_refused() {
    let line = |row: usize| {
        format!("{{\"id\": {row}, \"text\": \"line {row} {}\", \"n\": [1, {{}}]}}\n", "é ".repeat(row % 40))
    };
    let plain: Vec<u8> = (0..400).flat_map(|row| line(row).into_bytes()).collect();
    let gzip = |content: &[u8]| {
        let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    };
    let zstd = |content: &[u8]| zstd::encode_all(content, 3).unwrap();
    let (first, second) = plain.split_at(plain.len() / 2);
    let originals = [
        original("plain.jsonl", "text", "id", plain.clone()),
        original("gzip.jsonl.gz", "text", "id", [gzip(first), gzip(second)].concat()),
        original("zstd.jsonl.zst", "text", "id", [zstd(first), zstd(second)].concat()),
        original(
            "bomb.jsonl.gz",
            "text",
            "id",
            gzip(&[&plain[..], &vec![b' '; 1 << 19], b"\n", &plain].concat()),
        ),
    ];
    fuzz("lines", 3000, &originals, |draw, start| {
        let mut bytes = start.bytes.clone();
        for _ in 0..draw.few() {
            damage(draw, &mut bytes, &SPLINTERS);
        }
        bytes
    });
}

//! Inputs that a run cannot use: each is refused with what failed, a hint and an exit code, and none
//! with a panic. Every test breaks one thing of a pipeline that works.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/command.rs"]
mod command;

use arrow::array::{ArrayRef, Int64Array, StringArray};
use command::{PIPELINE, refuses, rpt, succeeds, texts, write_columns, write_texts};
use parquet::column::writer::ColumnWriter;
use parquet::data_type::ByteArray;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use rpt::config::{ScratchModel, TokenizerConfig};
use rpt::model::{Decoder, Dtype};
use rpt::tokenize::{SpecialTokens, train_byte_level_bpe};
use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::Arc;
use tempfile::TempDir;

/// A pipeline that works, in a directory of its own.
struct Bench {
    directory: TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { directory: tempfile::tempdir().unwrap() };
        write_texts(&bench.corpus(), &texts(12));
        let source = bench.corpus();
        fs::write(bench.path("tiny.toml"), PIPELINE.replace("SOURCE", source.to_str().unwrap())).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn corpus(&self) -> PathBuf {
        self.path("corpus.parquet")
    }

    /// Replaces a part of the pipeline file.
    fn change(&self, from: &str, to: &str) {
        let text = fs::read_to_string(self.path("tiny.toml")).unwrap();
        assert!(text.contains(from), "{from}");
        fs::write(self.path("tiny.toml"), text.replace(from, to)).unwrap();
    }

    fn arguments(&self, command: &str, sets: &[&str]) -> Vec<String> {
        let (pipeline, out) = (self.path("tiny.toml"), self.path("run"));
        let fixed = [command, pipeline.to_str().unwrap(), "--out", out.to_str().unwrap()];
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        fixed.into_iter().chain(sets).map(String::from).collect()
    }

    fn run(&self, sets: &[&str]) -> Output {
        rpt(self.arguments("run", sets))
    }

    fn prepare(&self, sets: &[&str]) -> Output {
        rpt(self.arguments("prepare", sets))
    }
}

/// A model directory whose tokenizer has more ids than the model has embeddings.
fn write_mismatched_model(directory: &Path) {
    let shape: ScratchModel = toml::from_str(
        "hidden_size = 16\nnum_hidden_layers = 1\nnum_attention_heads = 2\nintermediate_size = 32\n",
    )
    .unwrap();
    let tokenizer = train_byte_level_bpe(texts(50).into_iter(), 280).unwrap();
    let special = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default()).unwrap();
    let decoder = Decoder::from_scratch(&shape, Dtype::F32, tokenizer.vocab_size() - 10, 1);
    decoder.save(directory, &[special.eos], special.bos).unwrap();
    tokenizer.save(directory, &special).unwrap();
}

/// A column that claims to be text and is not UTF-8.
fn write_invalid_text(path: &Path) {
    let schema = Arc::new(parse_message_type("message m { required binary text (UTF8); }").unwrap());
    let properties = Arc::new(WriterProperties::builder().set_dictionary_enabled(false).build());
    let mut file = SerializedFileWriter::new(File::create(path).unwrap(), schema, properties).unwrap();
    let mut group = file.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let ColumnWriter::ByteArrayColumnWriter(writer) = column.untyped() else { panic!("not bytes") };
    writer.write_batch(&[ByteArray::from(vec![b'a', 0xff, 0xfe, b'b'])], None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    file.close().unwrap();
}

#[test]
fn the_pipeline_that_the_other_tests_break_works() {
    let bench = Bench::new();
    let out = bench.path("run");
    assert_eq!(succeeds(bench.arguments("run", &[])).trim_end(), out.to_str().unwrap());
    let again = bench.run(&[]);
    assert!(again.status.success(), "{}", command::stderr(&again));
    assert!(command::stderr(&again).contains("already finished"));
}

#[test]
fn a_dry_run_touches_nothing() {
    let bench = Bench::new();
    let plan = succeeds(bench.arguments("run", &[]).into_iter().chain(["--dry-run".into()]));
    assert!(!plan.is_empty());
    let plan = succeeds(bench.arguments("run", &[]).into_iter().chain(["--dry-run".into(), "--json".into()]));
    assert!(serde_json::from_str::<serde_json::Value>(&plan).unwrap().is_object());
    assert!(!bench.path("run").exists());
}

#[test]
fn an_unknown_key() {
    let bench = Bench::new();
    bench.change("min_context", "min_contxt");
    refuses(&bench.run(&[]), 2, &["min_contxt", "did you mean `min_context`?"]);
}

#[test]
fn a_value_of_the_wrong_type() {
    let bench = Bench::new();
    refuses(&bench.run(&["train.steps=many"]), 2, &["invalid type", "steps"]);
}

#[test]
fn a_missing_pipeline_file() {
    let bench = Bench::new();
    fs::remove_file(bench.path("tiny.toml")).unwrap();
    refuses(&bench.run(&[]), 2, &["tiny.toml", "pipeline file"]);
}

#[test]
fn a_pipeline_file_that_is_not_utf8() {
    let bench = Bench::new();
    fs::write(bench.path("tiny.toml"), [0xff, 0xfe]).unwrap();
    refuses(&bench.run(&[]), 2, &["tiny.toml", "UTF-8"]);
}

#[test]
fn a_missing_corpus() {
    let bench = Bench::new();
    fs::rename(bench.corpus(), bench.path("corpos.parquet")).unwrap();
    refuses(&bench.prepare(&[]), 1, &["corpus.parquet does not exist", "did you mean"]);
}

#[test]
fn an_empty_corpus() {
    let bench = Bench::new();
    write_texts(&bench.corpus(), &[]);
    refuses(&bench.prepare(&[]), 1, &["holds no documents"]);
}

#[test]
fn no_text_column() {
    let bench = Bench::new();
    let column = Arc::new(StringArray::from(vec!["a"])) as ArrayRef;
    write_columns(&bench.corpus(), vec![("txt", column)]);
    refuses(&bench.prepare(&[]), 1, &["no column `text`", "did you mean `txt`?"]);
}

#[test]
fn a_text_column_of_the_wrong_type() {
    let bench = Bench::new();
    let column = Arc::new(Int64Array::from(vec![1])) as ArrayRef;
    write_columns(&bench.corpus(), vec![("text", column)]);
    refuses(&bench.prepare(&[]), 1, &["column `text` holds Int64"]);
}

#[test]
fn a_truncated_parquet_file() {
    let bench = Bench::new();
    let bytes = fs::read(bench.corpus()).unwrap();
    fs::write(bench.corpus(), &bytes[..bytes.len() / 2]).unwrap();
    refuses(&bench.prepare(&[]), 1, &["corpus.parquet is not a readable parquet file"]);
}

#[test]
fn text_that_is_not_utf8() {
    let bench = Bench::new();
    write_invalid_text(&bench.corpus());
    refuses(&bench.prepare(&[]), 1, &["holds no documents", "quarantined", "UTF"]);
}

#[test]
fn vocabularies_that_do_not_match() {
    let bench = Bench::new();
    let model = bench.path("model");
    write_mismatched_model(&model);
    let text = fs::read_to_string(bench.path("tiny.toml")).unwrap();
    let start = text.find("[tokenizer.train]").unwrap();
    let end = text.find("[tasks]").unwrap();
    bench.change(&text[start..end], &format!("[model]\npath = {:?}\n", model.to_str().unwrap()));
    refuses(&bench.prepare(&[]), 1, &["the tokenizer has ids up to", "do not belong together"]);
}

#[test]
fn a_threshold_that_leaves_no_position() {
    let bench = Bench::new();
    let output = bench.prepare(&["tasks.max_entropy=0.0001"]);
    refuses(&output, 1, &["no position of the corpus became a task", "tasks.max_entropy"]);
}

#[test]
fn a_context_longer_than_the_model() {
    let bench = Bench::new();
    let output = bench.run(&["model.scratch.max_position_embeddings=32"]);
    let code = output.status.code().unwrap();
    assert!([1, 2].contains(&code));
    refuses(&output, code, &["32", "position", "max_document_tokens"]);
}

#[test]
fn a_full_disk() {
    if !Path::new("/dev/full").exists() {
        eprintln!("SKIPPED: there is no /dev/full here to stand for a full disk");
        return;
    }
    let bench = Bench::new();
    succeeds(bench.arguments("prepare", &[]));
    let metrics = bench.path("run/metrics.jsonl");
    if metrics.exists() {
        fs::remove_file(&metrics).unwrap();
    }
    symlink("/dev/full", &metrics).unwrap();
    refuses(&bench.run(&[]), 1, &["metrics.jsonl", "No space left", "free some space"]);
}

#[test]
fn the_run_directory_of_another_pipeline() {
    let bench = Bench::new();
    succeeds(bench.arguments("prepare", &[]));
    let before = fs::read(bench.path("run/pipeline.toml")).unwrap();
    let output = bench.run(&["seed=4"]);
    let code = output.status.code().unwrap();
    assert!([1, 2].contains(&code));
    refuses(&output, code, &["pipeline"]);
    assert_eq!(fs::read(bench.path("run/pipeline.toml")).unwrap(), before, "it is left as it was");
}

#[test]
fn a_corpus_that_changed_meanwhile() {
    let bench = Bench::new();
    succeeds(bench.arguments("prepare", &[]));
    write_texts(&bench.corpus(), &texts(13));
    refuses(&bench.run(&[]), 1, &["corpus.parquet", "has changed since this run began"]);
}

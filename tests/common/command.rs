//! The real binary, and inputs for it.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, missing_docs)]

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

pub(crate) const RPT: &str = env!("CARGO_BIN_EXE_rpt");

/// A pipeline of seconds that trains a model from scratch on the corpus `SOURCE`.
pub(crate) const PIPELINE: &str = r#"
seed = 3
[corpus]
source = "SOURCE"
[tokenizer.train]
vocab_size = 280
[model.scratch]
hidden_size = 16
num_hidden_layers = 1
num_attention_heads = 2
intermediate_size = 32
max_position_embeddings = 192
[tasks]
template = "plain"
min_entropy = 0.0
max_entropy = 3.0
min_context = 4
positions_per_document = 2
max_document_tokens = 64
[rollout]
samples_per_task = 2
max_new_tokens = 4
[reward]
answer = "rest"
[train]
steps = 2
tasks_per_step = 2
min_initial_reward = 0.0
min_initial_mixed_groups = 0.0
[run]
checkpoint_every = 1
"#;

/// Runs `rpt` with its input closed.
pub(crate) fn rpt<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Output {
    Command::new(RPT).args(arguments).stdin(Stdio::null()).output().unwrap()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Standard output of a call that must succeed.
pub(crate) fn succeeds<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> String {
    let output = rpt(arguments);
    assert!(output.status.success(), "{}", stderr(&output));
    stdout(&output)
}

/// Asserts a failure that is said well: the exit code, `error:` first with these words in it, one
/// `hint:` line, nothing on standard output, and no panic.
pub(crate) fn refuses(output: &Output, code: i32, words: &[&str]) {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    let error = text.lines().position(|line| line.starts_with("error: ")).unwrap_or_else(|| panic!("{text}"));
    let said = text.lines().skip(error).collect::<Vec<_>>().join("\n");
    for word in words {
        assert!(said.contains(word), "no `{word}` in: {text}");
    }
    assert_eq!(text.lines().filter(|line| line.starts_with("hint: ")).count(), 1, "{text}");
    assert!(!text.contains("panicked"), "{text}");
    assert_eq!(stdout(output), "", "{text}");
}

pub(crate) fn write_columns(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

/// A parquet file with a column `text`.
pub(crate) fn write_texts(path: &Path, texts: &[String]) {
    let column = Arc::new(StringArray::from_iter_values(texts)) as ArrayRef;
    write_columns(path, vec![("text", column)]);
}

/// Documents of a few sentences each.
pub(crate) fn texts(count: usize) -> Vec<String> {
    let (names, things) = (["Ann", "Bob", "Carl", "Dora"], ["a tree", "the sea", "two dogs"]);
    let sentence = |at: usize| format!("{} sees {} on day {at}. ", names[at % 4], things[at % 3]);
    (0..count).map(|at| (at..at + 5).map(sentence).collect()).collect()
}

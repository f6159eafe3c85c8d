//! Repositories as people publish them.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, missing_docs)]

use crate::command::{texts, write_texts};
use crate::common;
use crate::server::{Files, RemoteFile};
use rpt::config::TokenizerConfig;
use rpt::tokenize::{SpecialTokens, train_byte_level_bpe};
use std::fs;
use std::path::Path;

pub(crate) fn small(content: &str) -> RemoteFile {
    RemoteFile { content: content.into(), large: false }
}

pub(crate) fn has_extension(name: &str, extensions: &[&str]) -> bool {
    Path::new(name).extension().is_some_and(|found| extensions.iter().any(|extension| found == *extension))
}

/// The files of a directory; weights and parquet are stored apart.
pub(crate) fn files_of(directory: &Path) -> Files {
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    let file = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        let large = has_extension(&name, &["safetensors", "parquet"]);
        (name, RemoteFile { content: fs::read(entry.path()).unwrap(), large })
    };
    entries.map(file).collect()
}

/// A random model with its tokenizer.
pub(crate) fn write_model(directory: &Path) {
    let tokenizer = train_byte_level_bpe(texts(50).into_iter(), 300).unwrap();
    let special = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default()).unwrap();
    common::model(0, tokenizer.vocab_size()).save(directory, &[special.eos], special.bos).unwrap();
    tokenizer.save(directory, &special).unwrap();
}

/// A repository as people publish them, with things that are none of a program's business.
pub(crate) fn model_files() -> Files {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let mut files = files_of(directory.path());
    files.insert("README.md".into(), small("# Tiny\n"));
    files.insert("LICENSE".into(), small(""));
    files.insert("pytorch_model.bin".into(), RemoteFile { content: b"pickle".to_vec(), large: true });
    files.insert("modeling_tiny.py".into(), small("import os\n"));
    files
}

pub(crate) fn parquet(count: usize) -> RemoteFile {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x.parquet");
    write_texts(&path, &texts(count));
    RemoteFile { content: fs::read(path).unwrap(), large: true }
}

/// Two training files, one for testing, and a card.
pub(crate) fn dataset_files() -> Files {
    [
        ("README.md", small("# Texts\n")),
        ("data/train-0.parquet", parquet(12)),
        ("data/train-1.parquet", parquet(5)),
        ("data/test-0.parquet", parquet(3)),
    ]
    .map(|(name, file)| (name.to_owned(), file))
    .into()
}

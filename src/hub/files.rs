//! Which files of a repository are needed: data and settings, never code or pickle.

use super::reference::is_relative;
use super::{HubError, HubReference};
use glob::{MatchOptions, Pattern};
use serde_json::Value;
use std::collections::BTreeSet;

/// The list of a sharded model's weight files.
pub(super) const INDEX: &str = "model.safetensors.index.json";
const WEIGHTS: &str = "model.safetensors";
const CONFIGURATION: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
/// Read beside a tokenizer where they are there.
const BESIDE_TOKENIZER: [&str; 5] = [
    CONFIGURATION,
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
];

/// What is wanted of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Selection {
    /// Configuration, tokenizer and safetensors weights of a model, with its card and licence.
    Model,
    /// The tokenizer of a model and what is read beside it.
    Tokenizer,
    /// The configuration of a model alone.
    Configuration,
    /// The parquet files of a dataset that the reference names or, where it names none, those of JSON lines.
    Dataset,
}

impl Selection {
    /// The files of a repository that are wanted, but the shards that an index among them names.
    ///
    /// # Errors
    /// When something that is needed is not there.
    pub(super) fn of(
        self,
        reference: &HubReference,
        names: &BTreeSet<&str>,
    ) -> Result<Vec<String>, HubError> {
        let wanted = |wants: &dyn Fn(&str) -> bool| -> Vec<String> {
            names.iter().filter(|name| wants(name)).map(|name| (*name).to_owned()).collect()
        };
        let mut wanted_names = wanted(&|name| self.wants(reference, names, name));
        if self == Self::Dataset && wanted_names.is_empty() {
            wanted_names = wanted(&|name| is_of_corpus(name) && is_named(reference.files.as_deref(), name));
        }
        let has = |name: &str| names.contains(name);
        match self {
            Self::Dataset if wanted_names.is_empty() => Err(no_parquet(reference)),
            Self::Model | Self::Configuration if !has(CONFIGURATION) => Err(lacks(reference, CONFIGURATION)),
            Self::Tokenizer if !has(TOKENIZER) => Err(lacks(reference, TOKENIZER)),
            Self::Model if !has(INDEX) && !has(WEIGHTS) => Err(no_safetensors(reference)),
            _ => Ok(wanted_names),
        }
    }

    fn wants(self, reference: &HubReference, names: &BTreeSet<&str>, name: &str) -> bool {
        match self {
            Self::Configuration => name == CONFIGURATION,
            Self::Tokenizer => name == TOKENIZER || BESIDE_TOKENIZER.contains(&name),
            // A model is loaded from its index where it has one.
            Self::Model => {
                let weights = if names.contains(INDEX) { INDEX } else { WEIGHTS };
                name == weights || is_about(name) || Self::Tokenizer.wants(reference, names, name)
            }
            Self::Dataset => {
                is_of_corpus(name) && is_parquet(name) && is_named(reference.files.as_deref(), name)
            }
        }
    }
}

/// A model's card and its licence, whose terms may ask that they stay together: nothing reads them.
pub(super) fn is_about(name: &str) -> bool {
    name == "README.md" || (name.starts_with("LICENSE") && !name.contains('/'))
}

/// As the reader of corpora sees it: hidden files are none of a corpus.
fn is_of_corpus(name: &str) -> bool {
    crate::corpus::has_known_ending(name) && !name.split('/').any(|part| part.starts_with('.'))
}

fn is_parquet(name: &str) -> bool {
    std::path::Path::new(name).extension().is_some_and(|extension| extension == "parquet")
}

/// Whether a file is meant by the files of a reference: itself, its directory, or a glob.
fn is_named(files: Option<&str>, name: &str) -> bool {
    let Some(files) = files else { return true };
    let options = MatchOptions { require_literal_separator: true, ..MatchOptions::default() };
    name == files
        || name.strip_prefix(files).is_some_and(|rest| rest.starts_with('/'))
        || Pattern::new(files).is_ok_and(|pattern| pattern.matches_with(name, options))
}

/// The weight files that an index names, each once; `names` are those of the repository, if they are known.
///
/// # Errors
/// When it is no index, or names what is not a plain file of the repository.
pub(super) fn shards(
    reference: &HubReference,
    index: &str,
    names: Option<&BTreeSet<&str>>,
) -> Result<Vec<String>, HubError> {
    let value: Value = serde_json::from_str(index).unwrap_or_default();
    let Some(map) = value["weight_map"].as_object() else {
        return Err(lacks(reference, "weight_map in model.safetensors.index.json"));
    };
    let shards: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    check_names(reference, shards.iter().copied())?;
    let is_listed = |name: &str| names.is_none_or(|names| names.contains(name));
    match shards.iter().find(|name| !is_listed(name) || !is_safetensors(name)) {
        Some(name) => Err(lacks(reference, name)),
        None => Ok(shards.into_iter().map(str::to_owned).collect()),
    }
}

fn is_safetensors(name: &str) -> bool {
    std::path::Path::new(name).extension().is_some_and(|extension| extension == "safetensors")
}

/// Refuses a repository that lists what would lie outside of its directory.
pub(super) fn check_names<'a>(
    reference: &HubReference,
    mut names: impl Iterator<Item = &'a str>,
) -> Result<(), HubError> {
    match names.find(|name| !is_relative(name)) {
        Some(name) => Err(HubError::HostileName { reference: reference.to_string(), name: name.into() }),
        None => Ok(()),
    }
}

fn lacks(reference: &HubReference, what: &str) -> HubError {
    HubError::NoFiles {
        reference: reference.to_string(),
        message: format!("has no {what}"),
        hint: "name a repository in the format of transformers: config.json, tokenizer.json, safetensors weights".into(),
    }
}

fn no_safetensors(reference: &HubReference) -> HubError {
    HubError::NoFiles {
        reference: reference.to_string(),
        message: "has no safetensors weights".into(),
        hint: "pickled weights can run code and are never read: look for a revision with safetensors (refs/pr/1 often has \
               them), or convert the model"
            .into(),
    }
}

fn no_parquet(reference: &HubReference) -> HubError {
    let message = match &reference.files {
        Some(files) => format!("has no parquet or JSON-lines files that {files} names"),
        None => "has no parquet or JSON-lines files".into(),
    };
    let converted = HubReference { files: None, ..reference.at("refs/convert/parquet") };
    let hint = format!("the Hub converts most datasets: try {converted}");
    HubError::NoFiles { reference: reference.to_string(), message, hint }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select(selection: Selection, reference: &str, names: &[&str]) -> Result<Vec<String>, HubError> {
        selection.of(&HubReference::parse(reference).unwrap(), &names.iter().copied().collect())
    }

    #[test]
    fn a_model_is_its_settings_and_safetensors_and_never_pickle_or_code() {
        let names = [
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "pytorch_model.bin",
            "modeling.py",
            "README.md",
            "LICENSE.txt",
            "onnx/model.onnx",
            "onnx/config.json",
            "consolidated.00.pth",
            "chat_template.jinja",
            "vocab.json",
        ];
        let found = select(Selection::Model, "hf://o/n", &names).unwrap();
        let expected = [
            "LICENSE.txt",
            "README.md",
            "chat_template.jinja",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
        ];
        assert_eq!(found, expected);
        assert_eq!(select(Selection::Configuration, "hf://o/n", &names).unwrap(), ["config.json"]);
        let both = ["config.json", "model.safetensors", INDEX];
        assert_eq!(select(Selection::Model, "hf://o/n", &both).unwrap(), ["config.json", INDEX]);
        let error = select(Selection::Model, "hf://o/n", &["config.json", "pytorch_model.bin"]).unwrap_err();
        assert!(error.hint().unwrap().contains("pickle"), "{error}");
    }

    #[test]
    fn a_dataset_is_the_parquet_files_that_are_named() {
        let names =
            ["data/train-0.parquet", "data/test-0.parquet", "more/deep/x.parquet", "a.csv", ".x/y.parquet"];
        let found = |files: &str| select(Selection::Dataset, &format!("hf://datasets/o/n{files}"), &names);
        assert_eq!(found("").unwrap().len(), 3);
        assert_eq!(found("/data").unwrap().len(), 2);
        assert_eq!(found("/data/train-*.parquet").unwrap(), ["data/train-0.parquet"]);
        assert_eq!(found("/more/*.parquet").map_or(0, |found| found.len()), 0);
        assert_eq!(found("/**/x.parquet").unwrap(), ["more/deep/x.parquet"]);
        assert_eq!(
            select(Selection::Dataset, "hf://datasets/o/n", &["a.jsonl.gz", "b.csv"]).unwrap(),
            ["a.jsonl.gz"]
        );
        assert_eq!(
            select(Selection::Dataset, "hf://datasets/o/n", &["a.jsonl", "b.parquet"]).unwrap(),
            ["b.parquet"]
        );
        let error = select(Selection::Dataset, "hf://datasets/o/n", &["a.csv"]).unwrap_err();
        assert!(error.hint().unwrap().contains("hf://datasets/o/n@refs/convert/parquet"), "{error}");
    }

    #[test]
    fn an_index_names_plain_files_of_the_repository_once() {
        let reference = HubReference::parse("hf://o/n").unwrap();
        let names = BTreeSet::from(["a.safetensors", "b.safetensors", "c.bin"]);
        let of = |shard: &str| {
            let index =
                format!(r#"{{"weight_map":{{"x":"b.safetensors","y":"{shard}","z":"b.safetensors"}}}}"#);
            shards(&reference, &index, Some(&names))
        };
        assert_eq!(of("a.safetensors").unwrap(), ["a.safetensors", "b.safetensors"]);
        for hostile in ["../x.safetensors", "/etc/x.safetensors", "a//b", ""] {
            assert!(matches!(of(hostile), Err(HubError::HostileName { .. })), "{hostile}");
        }
        assert!(matches!(of("absent.safetensors"), Err(HubError::NoFiles { .. })));
        assert!(matches!(of("c.bin"), Err(HubError::NoFiles { .. })));
        assert!(shards(&reference, "[]", Some(&names)).is_err());
    }
}

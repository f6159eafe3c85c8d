//! `[corpus]`: where text comes from, and what is done to documents before anything reads them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `[corpus]`: unlabeled text in parquet files or JSON lines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CorpusConfig {
    /// A parquet or JSON-lines file, a directory of them, a glob, a directory with a `corpus.toml` that
    /// describes a generated corpus, a place in a store (`s3://bucket/prefix`, `gs://`, `az://`,
    /// `https://host/file.parquet`), or a dataset of the Hugging Face Hub:
    /// `hf://datasets/owner/name[@revision][/files]`. Several sources go into `mixture` instead.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// Column or key that holds the text, or a path to it with dots between the names of structs.
    #[serde(default = "default_text_column")]
    pub text_column: String,
    /// Column or key that holds a document's name; without it `file:row` is used.
    #[serde(default)]
    pub id_column: Option<String>,
    /// Files or row groups that may be quarantined before the run stops.
    #[serde(default = "default_max_quarantined")]
    pub max_quarantined: u64,
    /// Documents with fewer bytes are dropped (and counted).
    #[serde(default = "default_min_bytes")]
    pub min_bytes: usize,
    /// Documents with more bytes are dropped (and counted).
    #[serde(default)]
    pub max_bytes: Option<usize>,
    /// Read at most so many documents.
    #[serde(default)]
    pub max_documents: Option<u64>,
    /// Unicode normal form that texts are brought into.
    #[serde(default)]
    pub normalization: Option<Normalization>,
    /// Share of the documents that is read, each drawn by itself; default: all.
    #[serde(default)]
    pub rate: Option<f64>,
    /// Key of these draws; default: the pipeline's `seed`.
    #[serde(default)]
    pub seed: Option<u64>,
    /// Drop documents that repeat an earlier one.
    #[serde(default)]
    pub deduplicate: Option<Deduplication>,
    /// Drop documents that share a run of words with held-out text.
    #[serde(default)]
    pub decontaminate: Option<Decontamination>,
    /// Sources by name, read in the order of their names.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub mixture: BTreeMap<String, MixtureSource>,
}

/// `[corpus.mixture.NAME]`: one of several sources.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MixtureSource {
    /// Where its files are, as `corpus.source`.
    pub source: String,
    /// Share of its documents that is read, beside `corpus.rate`; default: all.
    #[serde(default)]
    pub rate: Option<f64>,
    /// Its share of the text, in proportion to the weights of the others: rates are derived from the
    /// sizes of the sources, and the one that is scarcest for its weight is read whole.
    #[serde(default)]
    pub weight: Option<f64>,
    /// Column of the text, where it is another than `corpus.text_column`.
    #[serde(default)]
    pub text_column: Option<String>,
    /// Column of the names, where it is another than `corpus.id_column`.
    #[serde(default)]
    pub id_column: Option<String>,
}

/// Unicode normal forms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// Canonical composition.
    Nfc,
    /// Compatibility composition, which also changes what characters look like.
    Nfkc,
}

/// `[corpus.deduplicate]`: which documents repeat an earlier one, in the order of the corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Deduplication {
    /// Drop documents with the same text.
    pub exact: bool,
    /// Drop documents with nearly the same words, by `MinHash` (Broder, 1997) with bands: two that share
    /// the part `J` of their runs of words are found with probability `1 - (1 - J^rows)^bands`.
    pub near: bool,
    /// Words in a run.
    pub shingle_words: usize,
    /// Bands of a signature.
    pub bands: usize,
    /// Minima in a band.
    pub rows: usize,
}

impl Default for Deduplication {
    fn default() -> Self {
        Self { exact: true, near: false, shingle_words: 5, bands: 14, rows: 8 }
    }
}

/// `[corpus.decontaminate]`: text that must not be trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Decontamination {
    /// Where it is, as `corpus.source`; default: the held-out text of `eval`.
    pub source: Option<String>,
    /// Column of its text, where it is another than `corpus.text_column`.
    pub text_column: Option<String>,
    /// Words in a run that no document may share with it (13 in GPT-3, arXiv 2005.14165 appendix C). Letters
    /// are compared in lower case, and what is neither letter nor digit is left out.
    pub words: usize,
}

impl Default for Decontamination {
    fn default() -> Self {
        Self { source: None, text_column: None, words: 13 }
    }
}

impl CorpusConfig {
    /// A source with all defaults.
    pub fn new(source: impl Into<String>) -> Self {
        Self {
            source: source.into(),
            text_column: default_text_column(),
            id_column: None,
            max_quarantined: default_max_quarantined(),
            min_bytes: default_min_bytes(),
            max_bytes: None,
            max_documents: None,
            normalization: None,
            rate: None,
            seed: None,
            deduplicate: None,
            decontaminate: None,
            mixture: BTreeMap::new(),
        }
    }

    /// Another source with the same columns, every document of which counts: for text to test on.
    #[must_use]
    pub fn untouched(&self, source: String) -> Self {
        Self {
            text_column: self.text_column.clone(),
            id_column: self.id_column.clone(),
            max_quarantined: self.max_quarantined,
            min_bytes: self.min_bytes,
            ..Self::new(source)
        }
    }

    /// The source, or the names of several.
    pub fn place(&self) -> String {
        if self.mixture.is_empty() {
            return self.source.clone();
        }
        let sources = self.mixture.iter().map(|(name, part)| format!("{name} ({})", part.source));
        sources.collect::<Vec<_>>().join(", ")
    }
}

fn default_text_column() -> String {
    "text".into()
}
fn default_max_quarantined() -> u64 {
    16
}
fn default_min_bytes() -> usize {
    1
}

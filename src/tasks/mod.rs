//! From documents to verifiable next-token tasks.
//!
//! [`TaskBuilder`] tokenizes documents, has a [`Proxy`] model score every position and keeps
//! those worth thinking about; the result lies in memory-mapped task shards ([`TaskShards`]).
//! [`TaskStream`] issues the positions in an order that is a pure function of the seed. A
//! [`PromptTemplate`] turns the text before a position into a prompt, and a [`Truth`] holds the
//! bytes that a prediction is compared with.

mod build;
mod codec;
mod counts;
mod cut;
mod draw;
mod kept;
mod manifest;
mod score;
mod select;
mod shard;
mod stream;
mod template;
mod truth;
mod units;
mod writer;

pub use build::TaskBuilder;
pub use counts::{Dropped, EntropyHistogram, LengthHistogram, TaskCounts};
pub use cut::LOOK_AHEAD_TOKENS;
pub use kept::{KeptScores, ScoreKey};
pub use manifest::{Fingerprints, Manifest, SCHEMA_VERSION, ShardEntry};
pub use score::{ComparedProxies, PositionScore, Proxy, score_row, top_k_entropy};
pub use shard::TaskShards;
pub use stream::{TaskCursor, TaskStream};
pub use template::{ChatFormat, PromptTemplate};
pub use truth::{TRUTH_TOKENS, Truth};
pub use units::{OpenUnit, TaskUnits};
pub use writer::ShardWriter;

use arrow::error::ArrowError;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum TasksError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A directory holds no manifest: its tasks were never finished.
    #[error("{path}: no tasks.json, so the task shards are missing or unfinished")]
    Unfinished {
        /// The directory.
        path: PathBuf,
    },
    /// A file is not what was written.
    #[error("{path}: damaged task data: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The shards were written by another version of the program.
    #[error("{path}: task shards have schema version {found}, this program reads {SCHEMA_VERSION}")]
    Version {
        /// The manifest.
        path: PathBuf,
        /// The version found.
        found: u32,
    },
    /// The shards were built with another tokenizer or template.
    #[error("{path}: the tasks were built with another {what} ({found}, now {expected})")]
    Mismatch {
        /// The manifest.
        path: PathBuf,
        /// `tokenizer` or `template`.
        what: &'static str,
        /// Fingerprint in the manifest.
        found: String,
        /// Fingerprint of what is used now.
        expected: String,
    },
    /// There is no such row or position.
    #[error("{path}: {what} {index} of {count} does not exist")]
    OutOfRange {
        /// The directory.
        path: PathBuf,
        /// `row` or `position`.
        what: &'static str,
        /// The one asked for.
        index: u64,
        /// How many there are.
        count: u64,
    },
    /// Not one position of the corpus became a task.
    #[error("no position of the corpus became a task: of {} tokens in {} documents, {dropped}", .counts.tokens, .counts.documents)]
    NoPositions {
        /// What was seen.
        counts: Box<TaskCounts>,
        /// The reasons, in words.
        dropped: String,
    },
    /// The proxy's answer does not fit the question.
    #[error("the proxy model returned {found} {what} where {expected} were expected")]
    ProxyShape {
        /// `pieces` or `scores`.
        what: &'static str,
        /// How many came back.
        found: usize,
        /// How many were asked for.
        expected: usize,
    },
}

impl TasksError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unfinished { .. } => Some("run `rpt prepare` to build the tasks".into()),
            Self::Damaged { .. } | Self::Version { .. } | Self::Mismatch { .. } => {
                Some("remove the directory and run `rpt prepare` to build the tasks again".into())
            }
            Self::NoPositions { counts, .. } => Some(counts.entropy.advice()),
            Self::Io { .. } | Self::OutOfRange { .. } | Self::ProxyShape { .. } => None,
        }
    }

    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }

    fn arrow(path: &Path) -> impl FnOnce(ArrowError) -> Self + '_ {
        move |error| {
            Self::io(path)(match error {
                ArrowError::IoError(_, source) => source,
                other => std::io::Error::other(other),
            })
        }
    }

    fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.to_owned(), what: what.into() }
    }
}

/// A tokenized document with the positions that became tasks.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskDocument {
    /// The document's name; pieces of a long document end in `#1`, `#2`, ...
    pub id: String,
    /// Token ids, without header or footer.
    pub tokens: Vec<u32>,
    /// The tokens run to the end of the document; else it is a piece that more text follows.
    pub ends_document: bool,
    /// Candidate positions, ascending by index.
    pub positions: Vec<Position>,
}

/// A position whose token is to be predicted from everything before it.
#[derive(Clone, Debug, PartialEq)]
pub struct Position {
    /// Index into the document's tokens of the token to predict.
    pub index: u32,
    /// Entropy of the proxy over its top-k next tokens, renormalised, in nats.
    pub entropy: f32,
    /// Probability that the proxy gives the true token.
    pub truth_probability: f32,
    /// The proxy's most probable next token.
    pub proxy_top: u32,
    /// Label of an evaluation corpus, if the position is marked.
    pub label: Option<String>,
}

/// One task: a position of a document, issued under an ordinal.
#[derive(Clone, Debug)]
pub struct Task {
    /// Number of the task in the run's order, from 0.
    pub ordinal: u64,
    /// Epoch in which it was issued.
    pub epoch: u64,
    /// The document, shared by its tasks.
    pub document: Arc<TaskDocument>,
    /// Which of the document's positions.
    pub position: usize,
}

impl Task {
    /// The position to predict.
    pub fn position(&self) -> &Position {
        &self.document.positions[self.position]
    }
}

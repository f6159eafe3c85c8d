//! From documents to verifiable next-token tasks.

use std::sync::Arc;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum TasksError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl TasksError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        None
    }
}

/// A tokenized document with the positions that became tasks.
#[derive(Clone, Debug, PartialEq)]
pub struct TaskDocument {
    /// The document's name; pieces of a long document end in `#1`, `#2`, ...
    pub id: String,
    /// Token ids, without header or footer.
    pub tokens: Vec<u32>,
    /// Bytes of text behind each token.
    pub byte_lengths: Vec<u32>,
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

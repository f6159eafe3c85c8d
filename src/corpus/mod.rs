//! Unlabeled text from parquet files, streamed with bounded memory.

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl CorpusError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        None
    }
}

/// One document of a corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Name: the id column's value, or `file:row`.
    pub id: String,
    /// Its text.
    pub text: String,
    /// Positions that an evaluation corpus marks (empty for ordinary text).
    pub marks: Vec<Mark>,
}

/// A marked position: the prediction that starts `offset` bytes into the text, under a label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Bytes of text before the prediction.
    pub offset: u64,
    /// Group under which the position is scored, for example a chain length.
    pub label: String,
}

/// A worked example of a reply, for the cold start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The whole document.
    pub text: String,
    /// Bytes of text before the prediction.
    pub offset: u64,
    /// What is thought.
    pub thought: String,
    /// What is predicted.
    pub prediction: String,
    /// Group that the trace covers, if any.
    pub label: Option<String>,
}

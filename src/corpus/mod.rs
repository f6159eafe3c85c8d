//! Unlabeled text from parquet and JSON-lines files, streamed with bounded memory.
//!
//! [`Corpus::open`] resolves a source (a file, a directory, a glob; with the cargo feature `remote` also
//! in an object store or on a web server) to a stable list of files and checks the columns.
//! [`Corpus::documents`] streams them, one record batch at a time; its [`Cursor`] restarts the stream
//! exactly after any document. Damaged files and row groups are quarantined and counted, never fatal
//! until there are too many; every row before the damage is delivered. [`read_traces`] reads worked
//! examples, and [`generated`] makes the quickstart corpus.
//!
//! Between a row and its document stand what `operations.rs` does to it by itself, and the duplicates that
//! a [`DuplicateSearch`] found beforehand.
//!
//! A file is a `Shard` over a `Blob` of bytes. What a parquet file claims
//! of itself is checked before the parquet crate sees it: the footer in `footer.rs`, page headers and
//! decompressed pages in `pages.rs`. Damage in a page without a checksum that still decodes to valid
//! UTF-8 cannot be noticed.

mod blob;
mod columns;
mod counts;
mod duplicates;
mod error;
mod footer;
pub mod generated;
mod guard;
mod held_out;
mod json_fields;
mod json_lines;
mod mixture;
mod operations;
mod pages;
mod reader;
#[cfg(feature = "remote")]
mod remote;
mod row_groups;
mod shard;
mod source;
mod summary;
mod thrift;
mod traces;
mod units;
mod words;

pub use counts::{CorpusCounts, Quarantined};
pub use duplicates::{DuplicateSearch, Duplicates};
pub use error::CorpusError;
pub use generated::generated_recipe;
pub use reader::{Corpus, Cursor, Documents};
pub(crate) use source::has_known_ending;
pub use summary::FileSummary;
pub use traces::read_traces;
pub use units::{SourceRange, Unit};

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

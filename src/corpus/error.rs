//! What can go wrong with a corpus, and what to do about it.

use super::source::Format;
use std::io;
use std::path::{Path, PathBuf};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum CorpusError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The source does not exist.
    #[error("corpus source {place} does not exist")]
    Missing {
        /// The source as it was given.
        place: String,
        /// An existing path with nearly the same name.
        nearest: Option<PathBuf>,
    },
    /// The source is in a store that this build cannot read.
    #[error("corpus source {place} is not a local path")]
    Remote {
        /// The source, without what may be secret.
        place: String,
    },
    /// The address of a source cannot be used as it is.
    #[error("corpus source {place} {message}")]
    Address {
        /// The source, without what may be secret.
        place: String,
        /// What is wrong with it.
        message: String,
    },
    /// A store did not give what was asked of it.
    #[error("{place}: {message}")]
    Store {
        /// Address of the source or the file.
        place: String,
        /// What the store, or the network, said.
        message: String,
    },
    /// The source looks like a glob but is not a valid one.
    #[error("corpus source {place} is not a valid glob: {message}")]
    Pattern {
        /// The source as it was given.
        place: String,
        /// What is wrong with it.
        message: String,
    },
    /// The source exists but there is no file of a corpus in it.
    #[error("corpus source {place} holds no parquet or JSON-lines file")]
    NoFiles {
        /// The source as it was given.
        place: String,
    },
    /// Every file was read and not one document came out.
    #[error("corpus source {place} holds no documents ({dropped})")]
    Empty {
        /// The source as it was given.
        place: String,
        /// What was dropped, by name.
        dropped: String,
    },
    /// A file cannot be opened or decoded.
    #[error("{file} is not a readable {} file: {reason}", kind(file))]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What the decoder said.
        reason: String,
    },
    /// A named column is missing.
    #[error("{file} has no column `{column}`; its columns are {}", columns.join(", "))]
    NoColumn {
        /// The file.
        file: PathBuf,
        /// The column asked for.
        column: String,
        /// The columns there are.
        columns: Vec<String>,
    },
    /// A named column holds something else.
    #[error("{file}: column `{column}` holds {found}, not {expected}")]
    WrongType {
        /// The file.
        file: PathBuf,
        /// The column.
        column: String,
        /// Its type.
        found: String,
        /// What it should hold.
        expected: &'static str,
    },
    /// More files and row groups are damaged than the pipeline allows.
    #[error("{total} damaged files or row groups are more than max_quarantined = {limit} allows: {first}")]
    TooManyQuarantined {
        /// Number of quarantined places.
        total: u64,
        /// The limit.
        limit: u64,
        /// The first few of them.
        first: String,
    },
    /// There are more files, or rows in one, than places of documents can be told apart.
    #[error("a corpus of more than {} files, or a file of more than {} rows, cannot be de-duplicated", 1_u64 << 25, 1_u64 << 38)]
    TooLarge,
    /// A worked example does not fit its own text.
    #[error("{file}: trace {row}: {message}")]
    BadTrace {
        /// The file.
        file: PathBuf,
        /// Row of the file, from 0.
        row: u64,
        /// What is wrong.
        message: String,
    },
    /// The recipe of a generated corpus was refused.
    #[error("{path}: {message}")]
    Recipe {
        /// The recipe file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A parquet file could not be written.
    #[error("cannot write {path}: {message}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the encoder said.
        message: String,
    },
}

#[cfg(not(feature = "remote"))]
const REMOTE_HINT: &str = "build with `cargo build --release --features remote` to read s3://, gs://, az:// and https://, \
                           or copy the files to a local directory; the Hugging Face Hub is hf://datasets/owner/name";
#[cfg(feature = "remote")]
const REMOTE_HINT: &str =
    "stores are s3://, gs://, az:// and https://; the Hugging Face Hub is hf://datasets/owner/name";

impl CorpusError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        let advice = match self {
            Self::Io { .. } | Self::Write { .. } => {
                "check that the path exists, its permissions and the free space".into()
            }
            Self::Missing { nearest: Some(path), .. } => format!("did you mean {}?", path.display()),
            Self::Missing { .. } => {
                "give a parquet or JSON-lines file, a directory of them, or a glob in quotes".into()
            }
            Self::Remote { .. } => REMOTE_HINT.into(),
            Self::Address { .. } => {
                "credentials belong into the environment; addresses are s3://bucket/prefix, gs://bucket/prefix, \
                 az://container/prefix and https://host/file.parquet"
                    .into()
            }
            Self::Store { .. } => {
                "check the address, the credentials and AWS_ENDPOINT_URL, AWS_REGION or their like in the environment; \
                 public buckets are read with AWS_SKIP_SIGNATURE=true (GOOGLE_, AZURE_ as well)"
                    .into()
            }
            Self::Pattern { .. } => "a glob looks like data/**/*.parquet".into(),
            Self::NoFiles { .. } => {
                "directories are searched recursively for names that end in .parquet or .jsonl (also .gz, .zst) and do \
                 not start with a dot"
                    .into()
            }
            Self::Empty { .. } => "check corpus.text_column and corpus.min_bytes".into(),
            Self::Unreadable { .. } => {
                "the file may be cut off or of another format than its name says: write or copy it again".into()
            }
            Self::NoColumn { column, columns, .. } => column_hint(column, columns),
            Self::WrongType { .. } => "name another column, or write this one with the expected type".into(),
            Self::TooManyQuarantined { .. } => {
                "repair or remove the damaged files, or raise corpus.max_quarantined".into()
            }
            Self::TooLarge => "merge small files, or split the corpus into several".into(),
            Self::BadTrace { .. } => {
                "offset counts the UTF-8 bytes of text before the prediction; only label may be null".into()
            }
            Self::Recipe { .. } => "corpora/quickstart/README.md explains every key".into(),
        };
        Some(advice)
    }

    /// An input/output error at a path.
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }
}

fn column_hint(column: &str, columns: &[String]) -> String {
    nearest(column, columns.iter().map(String::as_str)).map_or_else(
        || "name the column that holds the text, for example text_column = \"content\"".into(),
        |name| format!("did you mean `{name}`?"),
    )
}

/// The candidate most like `name`, if any is alike at all.
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const ALIKE: f64 = 0.7;
    let lower = name.to_lowercase();
    candidates
        .map(|candidate| (strsim::jaro_winkler(&lower, &candidate.to_lowercase()), candidate))
        .filter(|(likeness, _)| *likeness > ALIKE)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// What a file should be, by its name.
fn kind(file: &Path) -> &'static str {
    match Format::of(&file.to_string_lossy()) {
        Some(Format::Lines(_)) => "JSON-lines",
        Some(Format::Parquet) | None => "parquet",
    }
}

/// An address without user name, password, query and fragment: any of them may be secret.
pub(super) fn without_secrets(address: &str) -> String {
    let address = address.split(['?', '#']).next().unwrap_or_default();
    let Some((scheme, rest)) = address.split_once("://") else { return address.into() };
    let (host, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let host = host.rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{host}{path}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_shown_without_what_may_be_secret() {
        for address in
            ["https://u:secret@host/a?sig=secret#secret", "https://host/a?secret", "https://secret@host/a"]
        {
            assert_eq!(without_secrets(address), "https://host/a");
        }
        assert_eq!(without_secrets("s3://bucket/a@b/c"), "s3://bucket/a@b/c");
    }
}

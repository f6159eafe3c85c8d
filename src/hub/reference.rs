//! `hf://` references: how a model or dataset of the Hub is named.

use super::HubError;
use std::fmt;

const SCHEME: &str = "hf://";
const DATASETS: &str = "datasets/";
const DEFAULT_REVISION: &str = "main";
/// Revisions whose names hold slashes, as the Hub itself makes them.
const SPECIAL: [&str; 2] = ["refs/convert/", "refs/pr/"];

/// Whether a path of a pipeline file or command line names something on the Hub.
pub fn is_remote(text: &str) -> bool {
    text.starts_with(SCHEME)
}

/// Kind of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RepositoryKind {
    /// Weights, configuration and tokenizer.
    Model,
    /// Parquet files.
    Dataset,
}

impl RepositoryKind {
    /// The plural by which addresses and the cache know it.
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }
}

/// A repository of the Hub at a revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubReference {
    /// Model or dataset.
    pub kind: RepositoryKind,
    /// `owner/name`.
    pub repository: String,
    /// Branch, tag, commit, `refs/pr/N` or `refs/convert/parquet`.
    pub revision: String,
    /// Files of a dataset: a file, a directory or a glob; all parquet files without it.
    pub files: Option<String>,
}

impl HubReference {
    /// Reads `hf://owner/name[@revision]` or `hf://datasets/owner/name[@revision][/files]`.
    ///
    /// In a revision a slash is written `%2F`, except in `refs/convert/parquet` and `refs/pr/N`.
    ///
    /// # Errors
    /// [`HubError::Reference`] says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, HubError> {
        let refuse =
            |message: &str| HubError::Reference { reference: text.into(), message: message.to_owned() };
        let rest = text.strip_prefix(SCHEME).ok_or_else(|| refuse("it does not start with hf://"))?;
        let (kind, rest) = match rest.strip_prefix(DATASETS) {
            Some(rest) => (RepositoryKind::Dataset, rest),
            None => (RepositoryKind::Model, rest),
        };
        let (repository, revision, files) = split(rest);
        if kind == RepositoryKind::Model && files.is_some() {
            return Err(refuse("a model is named as a whole"));
        }
        check_repository(repository).map_err(refuse)?;
        let revision = revision.unwrap_or(DEFAULT_REVISION).replace("%2F", "/").replace("%2f", "/");
        if !is_revision(&revision) {
            return Err(refuse("its revision is not the name of a branch, tag or commit"));
        }
        let files =
            files.map(|files| files.trim_end_matches('/').to_owned()).filter(|files| !files.is_empty());
        if files.as_deref().is_some_and(|files| !is_relative(files)) {
            return Err(refuse("its files are not below the repository"));
        }
        Ok(Self { kind, repository: repository.into(), revision, files })
    }

    /// The repository and its revision, without the files: what a commit belongs to.
    pub fn key(&self) -> String {
        let kind = if self.kind == RepositoryKind::Dataset { DATASETS } else { "" };
        format!("{SCHEME}{kind}{}@{}", self.repository, self.revision)
    }

    /// The same at one commit.
    #[must_use]
    pub fn at(&self, commit: &str) -> Self {
        Self { revision: commit.into(), ..self.clone() }
    }
}

impl fmt::Display for HubReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files = self.files.as_ref().map_or_else(String::new, |files| format!("/{files}"));
        write!(f, "{}{files}", self.key())
    }
}

/// `owner/name`, the revision behind the `@`, and what follows the next slash.
fn split(rest: &str) -> (&str, Option<&str>, Option<&str>) {
    let name_end = rest.match_indices('/').nth(1).map_or(rest.len(), |(at, _)| at);
    let Some((repository, after)) = rest.split_once('@').filter(|(before, _)| before.len() <= name_end)
    else {
        return (&rest[..name_end], None, rest.get(name_end + 1..));
    };
    let special = SPECIAL.iter().find(|prefix| after.starts_with(**prefix)).map_or(0, |prefix| prefix.len());
    match after[special..].split_once('/') {
        Some((revision, files)) => (repository, Some(&after[..special + revision.len()]), Some(files)),
        None => (repository, Some(after), None),
    }
}

/// The rules of the Hub, which also make the name safe as a part of a path and an address.
fn check_repository(repository: &str) -> Result<(), &'static str> {
    let plain = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
            && !part.starts_with(['-', '.'])
            && !part.ends_with(['-', '.'])
            && !part.contains("--")
            && !part.contains("..")
    };
    match repository.split_once('/') {
        Some((owner, name)) if plain(owner) && plain(name) && repository.len() <= 96 => Ok(()),
        Some(_) => Err("owner and name are letters, digits, `-`, `_` and `.`"),
        None => Err("it needs an owner and a name"),
    }
}

/// A revision becomes a path below `refs/`.
fn is_revision(revision: &str) -> bool {
    revision.len() <= 255
        && is_relative(revision)
        && !revision.bytes().any(|byte| byte.is_ascii_control() || b" ~^:?*[".contains(&byte))
}

/// Whether a name has only plain parts, separated by single slashes: no way out of a directory.
pub(super) fn is_relative(name: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && part != "." && part != "..";
    name.split('/').all(plain) && !name.contains(['\\', '\0'])
}

/// Whether a revision is the full hash of a commit.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> HubReference {
        HubReference::parse(text).unwrap()
    }

    #[test]
    fn references_are_read() {
        let model = parse("hf://Qwen/Qwen2.5-0.5B");
        assert_eq!((model.kind, model.revision.as_str()), (RepositoryKind::Model, "main"));
        assert_eq!(model.repository, "Qwen/Qwen2.5-0.5B");
        assert_eq!(parse("hf://o/n@refs/pr/7").revision, "refs/pr/7");
        assert_eq!(parse("hf://o/n@v1.0").to_string(), "hf://o/n@v1.0");

        let dataset = parse("hf://datasets/o/n@refs/convert/parquet/default/train/*.parquet");
        assert_eq!(
            (dataset.kind, dataset.revision.as_str()),
            (RepositoryKind::Dataset, "refs/convert/parquet")
        );
        assert_eq!(dataset.files.as_deref(), Some("default/train/*.parquet"));
        assert_eq!(dataset.key(), "hf://datasets/o/n@refs/convert/parquet");
        assert_eq!(parse("hf://datasets/o/n/data/").files.as_deref(), Some("data"));
        assert_eq!(parse("hf://datasets/o/n/a@b.parquet").files.as_deref(), Some("a@b.parquet"));
        assert_eq!(parse("hf://datasets/o/n@a%2Fb").revision, "a/b");
        assert_eq!(parse("hf://datasets/o/n").files, None);
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        let long = format!("hf://o/{}", "n".repeat(96));
        for text in [
            "hf://",
            "hf://n",
            "hf://datasets/n",
            "hf://o/",
            "hf:///n",
            "hf://../n",
            "hf://o/..",
            "hf://o/n@",
            "hf://o/n@../x",
            "hf://o/n@a//b",
            "hf://o/n/config.json",
            "hf://o/n m",
            "hf://o/a--b",
            "hf://o/n@a\\b",
            "hf://o/n@a\nb",
            "hf://o/n?x=1",
            "hf://datasets/o/n/../x",
            "hf://datasets/o/n//x",
            "models/base",
            "hf://user:secret@host/n",
            &long,
        ] {
            let error = HubReference::parse(text).unwrap_err();
            assert!(matches!(error, HubError::Reference { .. }) && error.hint().is_some(), "{text}");
        }
    }
}

//! Reading the cache that `huggingface_hub` and this room share.
//!
//! ```text
//! HF_HUB_CACHE/models--owner--name/        or datasets--owner--name
//!   refs/main                              the commit of a branch or tag
//!   snapshots/COMMIT/config.json           a link to ../../blobs/HASH
//!   blobs/HASH                             a content under its own hash
//!   blobs/HASH.incomplete                  a download that has not ended
//!   trees/COMMIT.json                      the listing of a commit, as Python keeps it
//!   .rpt/COMMIT.json                       the same, as we keep it
//! HF_HUB_CACHE/.locks/models--owner--name/HASH.lock
//! ```
//!
//! Our listings have a place of their own because Python takes one of its own for a promise that a
//! snapshot without some of the files is broken, and we leave out what we have no use for.

use super::listing::Listing;
use super::reference::is_commit;
use super::{HubError, HubReference};
use std::fs;
use std::path::{Path, PathBuf};

/// Where a repository lies in the cache.
#[derive(Clone, Debug)]
pub(super) struct RepositoryCache {
    /// The repository's directory.
    pub(super) root: PathBuf,
    /// Directory of the locks of its blobs.
    #[cfg(feature = "hub")]
    pub(super) locks: PathBuf,
}

impl RepositoryCache {
    pub(super) fn new(cache: &Path, reference: &HubReference) -> Self {
        let name = format!("{}--{}", reference.kind.plural(), reference.repository.replace('/', "--"));
        Self {
            root: cache.join(&name),
            #[cfg(feature = "hub")]
            locks: cache.join(".locks").join(&name),
        }
    }

    /// The directory with the files of a commit.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// Where the commit of a branch or tag is noted.
    pub(super) fn reference(&self, revision: &str) -> PathBuf {
        self.root.join("refs").join(revision)
    }

    /// Where our listing of a commit is.
    pub(super) fn listing_path(&self, commit: &str) -> PathBuf {
        self.root.join(".rpt").join(format!("{commit}.json"))
    }

    /// The commit that a revision is known to be.
    ///
    /// # Errors
    /// When what is noted cannot be read.
    pub(super) fn commit(&self, revision: &str) -> Result<Option<String>, HubError> {
        if is_commit(revision) {
            return Ok(Some(revision.to_owned()));
        }
        let noted = read_if_there(&self.reference(revision))?;
        Ok(noted.map(|text| text.trim().to_owned()).filter(|commit| is_commit(commit)))
    }

    /// The listing of a commit, if either of the two keeps one.
    ///
    /// # Errors
    /// When one is there and cannot be read.
    pub(super) fn listing(&self, commit: &str) -> Result<Option<Listing>, HubError> {
        for path in [self.listing_path(commit), self.root.join("trees").join(format!("{commit}.json"))] {
            if let Some(listing) = read_if_there(&path)?.as_deref().and_then(Listing::parse) {
                return Ok(Some(listing));
            }
        }
        Ok(None)
    }

    /// Size of a file of a snapshot, if it is there.
    pub(super) fn size(&self, commit: &str, name: &str) -> Option<u64> {
        Some(fs::metadata(self.snapshot(commit).join(name)).ok().filter(fs::Metadata::is_file)?.len())
    }
}

fn read_if_there(path: &Path) -> Result<Option<String>, HubError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) =>
        {
            Ok(None)
        }
        Err(error) => Err(HubError::io(path)(error)),
    }
}

/// Names of all files below a directory, with `/` between its parts; no directory is entered through a link.
pub(super) fn names_below(root: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut waiting = vec![(root.to_path_buf(), String::new())];
    while let Some((directory, prefix)) = waiting.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => waiting.push((entry.path(), format!("{name}/"))),
                Ok(_) if entry.path().is_file() => names.push(name),
                _ => {}
            }
        }
    }
    names.sort();
    names
}

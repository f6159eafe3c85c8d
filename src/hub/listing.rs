//! The files of a repository at one commit, with sizes and hashes.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const FORMAT_VERSION: u32 = 1;

/// Files by name. Stored in the form in which `huggingface_hub` keeps it, which is read too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listing {
    format_version: u32,
    pub(super) files: BTreeMap<String, Entry>,
}

/// A file: its size, and what its blob is called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// In bytes.
    pub(super) size: u64,
    /// Git's hash of the file, or of the pointer to it if it is stored apart.
    blob_id: String,
    /// SHA-256 of the content of a file that is stored apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
}

/// What proves a content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hash<'a> {
    /// SHA-256 of the content.
    Sha256(&'a str),
    /// SHA-1 of `blob SIZE\0` and the content, as git names it.
    Git(&'a str),
}

impl<'a> Hash<'a> {
    /// Name of the blob.
    pub(super) fn name(self) -> &'a str {
        match self {
            Self::Sha256(name) | Self::Git(name) => name,
        }
    }
}

impl Listing {
    /// A stored listing; `None` where it is of another version or damaged, which asks for a new one.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let listing: Self = serde_json::from_str(text).ok()?;
        (listing.format_version == FORMAT_VERSION && listing.files.values().all(Entry::is_named))
            .then_some(listing)
    }

    /// Whether a snapshot has the file with its listed size.
    pub(super) fn has_size(&self, name: &str, size: u64) -> bool {
        self.files.get(name).is_some_and(|entry| entry.size == size)
    }
}

impl Entry {
    /// What proves the content.
    pub(super) fn hash(&self) -> Hash<'_> {
        self.lfs_sha256.as_deref().map_or(Hash::Git(&self.blob_id), Hash::Sha256)
    }

    /// Whether the hash is one: it becomes a file name.
    fn is_named(&self) -> bool {
        let length = match self.hash() {
            Hash::Sha256(_) => 64,
            Hash::Git(_) => 40,
        };
        let name = self.hash().name();
        name.len() == length
            && name.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    }
}

#[cfg(feature = "hub")]
mod answer {
    use super::{Entry, FORMAT_VERSION, Listing};
    use crate::hub::reference::is_commit;
    use serde::Deserialize;

    /// What the Hub says about a repository at a revision, asked with `blobs=true`.
    #[derive(Deserialize)]
    pub(in crate::hub) struct Answer {
        sha: String,
        siblings: Vec<Sibling>,
    }

    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Sibling {
        rfilename: String,
        size: Option<u64>,
        blob_id: Option<String>,
        lfs: Option<Lfs>,
    }

    #[derive(Deserialize)]
    struct Lfs {
        sha256: String,
        size: u64,
    }

    impl Answer {
        /// The commit and its files.
        ///
        /// # Errors
        /// In words, what the answer lacks.
        pub(in crate::hub) fn read(json: &[u8]) -> Result<(String, Listing), String> {
            let answer: Self = serde_json::from_slice(json)
                .map_err(|error| format!("not the listing of a repository: {error}"))?;
            if !is_commit(&answer.sha) {
                return Err("the listing names no commit".into());
            }
            let files = answer.siblings.into_iter().map(Sibling::entry).collect::<Result<_, _>>()?;
            Ok((answer.sha, Listing { format_version: FORMAT_VERSION, files }))
        }
    }

    impl Sibling {
        fn entry(self) -> Result<(String, Entry), String> {
            let Self { rfilename, size, blob_id, lfs } = self;
            let (lfs_sha256, lfs_size) = lfs.map(|lfs| (lfs.sha256, lfs.size)).unzip();
            let entry = lfs_size.or(size).zip(blob_id).map(|(size, blob_id)| Entry {
                size,
                blob_id,
                lfs_sha256,
                lfs_size,
            });
            match entry.filter(Entry::is_named) {
                Some(entry) => Ok((rfilename, entry)),
                None => Err(format!("the listing has no size and hash of {rfilename:?}")),
            }
        }
    }
}

#[cfg(feature = "hub")]
pub(super) use answer::Answer;

//! Why a model or dataset of the Hub cannot be had, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

/// What went wrong. No message holds a token or the query of an address, which may be a signature.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A reference cannot be read.
    #[error("{reference} names nothing on the Hub: {message}")]
    Reference {
        /// The reference as it was given.
        reference: String,
        /// What is wrong with it.
        message: String,
    },
    /// An environment variable does not hold what it should.
    #[error("{variable} {message}")]
    Settings {
        /// Name of the variable.
        variable: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The cache does not hold it, and nothing may or can be downloaded.
    #[error("{reference} is not in the cache, and {reason}")]
    NotCached {
        /// The reference.
        reference: String,
        /// Why nothing can be downloaded.
        reason: String,
        /// Files to put into the cache by hand.
        layout: String,
    },
    /// The cache holds a part of it, and nothing may or can be downloaded.
    #[error(
        "{reference} is only partly in the cache ({missing} files are missing, the first is {first}), and {reason}"
    )]
    Incomplete {
        /// The reference.
        reference: String,
        /// Number of missing files.
        missing: usize,
        /// The first of them, where it belongs.
        first: PathBuf,
        /// Why nothing can be downloaded.
        reason: String,
    },
    /// The Hub cannot be reached.
    #[error("cannot reach {address}: {message}")]
    Unreachable {
        /// Address without its query.
        address: String,
        /// What the network said.
        message: String,
    },
    /// The Hub does not know the repository, or hides it.
    #[error("{reference}: the Hub knows no such {what}, or does not show it ({address})")]
    NotFound {
        /// The reference.
        reference: String,
        /// Repository, revision or file.
        what: &'static str,
        /// Address without its query.
        address: String,
    },
    /// The repository is there and may not be read.
    #[error("{reference}: access is denied (status {status}, {})", with_or_without(*token))]
    Denied {
        /// The reference.
        reference: String,
        /// 401 or 403.
        status: u16,
        /// Whether a token was shown.
        token: bool,
        /// Where a user can ask for access.
        page: String,
    },
    /// The server asks for a longer pause than a program should make.
    #[error("{address} asks to wait {seconds} s before the next request")]
    Limited {
        /// Address without its query.
        address: String,
        /// The pause.
        seconds: u64,
    },
    /// The server failed, or answered something that cannot be used.
    #[error("{address}: {message}")]
    Answer {
        /// Address without its query.
        address: String,
        /// What is wrong.
        message: String,
    },
    /// A file name of the repository leads out of its directory.
    #[error("{reference} is refused: it lists a file named {name:?}")]
    HostileName {
        /// The reference.
        reference: String,
        /// The name.
        name: String,
    },
    /// The repository has no file of the kind that is needed.
    #[error("{reference} {message}")]
    NoFiles {
        /// The reference.
        reference: String,
        /// What it lacks.
        message: String,
        /// What to do.
        hint: String,
    },
    /// A downloaded file is not the one that the Hub lists; it is not kept.
    #[error("{address} was refused: its {what} is {found}, but the Hub lists {listed}")]
    Mismatch {
        /// Address without its query.
        address: String,
        /// Size in bytes or hash.
        what: &'static str,
        /// What came.
        found: String,
        /// What was promised.
        listed: String,
    },
    /// A signal asked for a stop.
    #[error("interrupted while downloading {reference}")]
    Interrupted {
        /// The reference.
        reference: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl HubError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Reference { .. } => {
                "write hf://owner/name, hf://owner/name@revision, or hf://datasets/owner/name for a dataset; a slash in \
                 a revision is written %2F"
                    .into()
            }
            Self::Settings { .. } => "correct or unset the variable".into(),
            Self::NotCached { layout, .. } => layout.clone(),
            Self::Incomplete { first, .. } => format!(
                "run the same command once where the Hub can be reached, or put the files into {} by hand",
                first.parent().unwrap_or(first).display()
            ),
            Self::Unreachable { .. } => {
                "check the network, HF_ENDPOINT and HTTPS_PROXY, and run the same command again: the download goes on where it \
                 stopped"
                    .into()
            }
            Self::NotFound { what: "repository", .. } => {
                "check the spelling; private and gated repositories are only shown to a token that may read them: set \
                 HF_TOKEN"
                    .into()
            }
            Self::NotFound { .. } => "check the spelling of the revision; the default is main".into(),
            Self::Denied { token: false, page, .. } => {
                format!("set HF_TOKEN to a token that may read it; a gated repository also needs consent at {page}")
            }
            Self::Denied { page, .. } => {
                format!("check that HF_TOKEN is valid, and that its account was given access at {page}")
            }
            Self::Limited { .. } => {
                "run the same command later: the download goes on where it stopped; a token (HF_TOKEN) has higher limits"
                    .into()
            }
            Self::Answer { .. } => {
                "run the same command again: the download goes on where it stopped; check HF_ENDPOINT if it is set".into()
            }
            Self::HostileName { .. } => "such a name would be written outside of the cache: report the repository".into(),
            Self::NoFiles { hint, .. } => hint.clone(),
            Self::Mismatch { .. } => {
                "run the same command again; if it happens twice, a proxy or mirror changes files: check HTTPS_PROXY and \
                 HF_ENDPOINT"
                    .into()
            }
            Self::Interrupted { .. } => "run the same command again to go on".into(),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                "the disk is full: free space, or point HF_HOME at another disk".into()
            }
            Self::Io { .. } => "check the permissions of the cache; HF_HOME moves it".into(),
        })
    }

    /// An input/output error at a path.
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }
}

fn with_or_without(token: bool) -> &'static str {
    if token { "with a token" } else { "without a token" }
}

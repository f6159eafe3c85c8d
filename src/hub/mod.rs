//! Models and datasets of the Hugging Face Hub by name.
//!
//! `hf://owner/name[@revision]` is a model and `hf://datasets/owner/name[@revision][/files]` the
//! parquet files of a dataset ([`HubReference`]). [`Hub::fetch`] turns one into a local directory: the
//! snapshot of one commit in the cache that Python's `huggingface_hub` uses too, so that either finds
//! what the other has downloaded. What is in the cache is used without a request.
//!
//! Reading the cache works in every build. Downloading needs the cargo feature `hub`: every file is
//! checked against the size and the hash that the Hub lists before its name appears in the cache, a
//! broken download goes on where it stopped, and nothing that can run code (pickle) is fetched.

mod cache;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod download;
mod error;
mod files;
mod listing;
mod reference;
mod settings;
mod snapshot;
#[cfg(feature = "hub")]
mod store;
#[cfg(feature = "hub")]
mod transfer;

pub use error::HubError;
pub use files::Selection;
pub use reference::{HubReference, RepositoryKind, is_remote};
pub use settings::{HubSettings, Token};
pub use snapshot::{Snapshot, resolve, resolve_dataset, resolve_model};

use std::sync::atomic::AtomicBool;

/// The Hub and its cache, as a command or a run uses them.
pub struct Hub<'a> {
    /// Where the Hub and the cache are.
    pub settings: HubSettings,
    /// Hears what is downloaded and which commit is used, a line at a time.
    pub say: &'a dyn Fn(&str),
    /// Set when a signal asks for a stop: a download ends then, and goes on the next time.
    pub interrupt: Option<&'a AtomicBool>,
}

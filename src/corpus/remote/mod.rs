//! Corpora in object stores and on web servers (cargo feature `remote`).
//!
//! [`resolve`] lists a source; a [`RemoteFile`] reads ranges of one of its files, fetching ahead within
//! bounds. `store.rs` is the only place that knows of asynchronous code; `transport.rs` sends every
//! request, with its retries. Secrets come from the environment and stay in the store's requests: what
//! is said to the user is composed here, never taken from requests.

mod ahead;
mod store;
mod transport;

use super::error::{CorpusError, without_secrets};
use super::source::{Format, Place, SourceFile, is_pattern};
use ahead::Ahead;
use bytes::Bytes;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use store::{Listed, Store, StoreError};

/// A file in a store.
#[derive(Clone, Debug)]
pub(super) struct RemoteObject {
    store: Arc<Store>,
    key: String,
    pub(super) length: u64,
    /// Changes when the file does.
    tag: Option<String>,
    /// Why the store did not give what was read last.
    failure: Arc<Mutex<Option<String>>>,
}

impl RemoteObject {
    /// Why the store did not give what was read last, if it did not: then, the file is not damaged.
    pub(super) fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// An open file in a store.
pub(super) struct RemoteFile {
    ahead: Ahead,
    failure: Arc<Mutex<Option<String>>>,
}

impl RemoteFile {
    pub(super) fn open(object: &RemoteObject) -> Self {
        let object = object.clone();
        let (length, failure) = (object.length, object.failure.clone());
        let fetch = move |range: Range<u64>| {
            let bytes = object.store.range(&object.key, range, object.tag.as_deref());
            bytes.map_err(|error| error.to_string())
        };
        Self { ahead: Ahead::new(length, Box::new(fetch)), failure }
    }

    pub(super) fn read(&self, range: Range<u64>) -> io::Result<Bytes> {
        self.ahead.read(range).map_err(|message| {
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(message.clone());
            io::Error::other(message)
        })
    }

    pub(super) fn expect(&self, now: &[Range<u64>], next: &[Range<u64>]) {
        self.ahead.expect(now, next);
    }
}

/// A source's address, taken apart.
struct Address {
    /// Everything before the key, for example `s3://bucket/`.
    root: String,
    key: String,
}

impl Address {
    /// Addresses with user names, passwords or queries are refused: they would be written into the
    /// manifests of a run, and run out.
    fn parse(source: &str) -> Result<Self, CorpusError> {
        let place = without_secrets(source);
        let refuse = |message: &str| CorpusError::Address { place: place.clone(), message: message.into() };
        let (scheme, rest) = source.split_once("://").ok_or_else(|| refuse("has no scheme"))?;
        let web = matches!(scheme, "http" | "https");
        if !web && !matches!(scheme, "s3" | "gs" | "az") {
            return Err(CorpusError::Remote { place });
        }
        let (host, key) = rest.split_once('/').unwrap_or((rest, ""));
        if host.contains('@') || (web && source.contains(['?', '#'])) {
            return Err(refuse("must not carry credentials or a query"));
        }
        if host.is_empty() || (web && key.is_empty()) {
            return Err(refuse("names no place"));
        }
        if web && is_pattern(key) {
            return Err(refuse("is a glob, but web servers list no files"));
        }
        Ok(Self { root: format!("{scheme}://{host}/"), key: key.trim_end_matches('/').into() })
    }
}

/// The files of a source, ordered by the parts of their keys, as those of a directory are.
pub(super) fn resolve(source: &str) -> Result<Vec<SourceFile>, CorpusError> {
    let address = Address::parse(source)?;
    let place = without_secrets(source);
    let failed = |error: StoreError| CorpusError::Store { place: place.clone(), message: error.to_string() };
    let store = Arc::new(Store::open(&address.root).map_err(failed)?);
    let (base, mut listed) = list(&store, &address, &place).map_err(|error| match error {
        Unlisted::Pattern(error) => error,
        Unlisted::Store(error) => failed(error),
    })?;
    if listed.is_empty() {
        return Err(CorpusError::NoFiles { place });
    }
    listed.sort_by(|a, b| a.key.split('/').cmp(b.key.split('/')));
    let file = |Listed { key, length, tag }: Listed| SourceFile {
        path: PathBuf::from(format!("{}{key}", address.root)),
        name: store.name(key.get(base..).unwrap_or_default()),
        part: 0,
        place: Place::Remote(RemoteObject {
            store: store.clone(),
            key,
            length,
            tag,
            failure: Arc::default(),
        }),
    };
    Ok(listed.into_iter().map(file).collect())
}

enum Unlisted {
    Pattern(CorpusError),
    Store(StoreError),
}

impl From<StoreError> for Unlisted {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// The objects of a source, and how many bytes of their keys are not part of a name.
fn list(store: &Store, address: &Address, place: &str) -> Result<(usize, Vec<Listed>), Unlisted> {
    let key = address.key.as_str();
    if is_pattern(key) {
        let pattern = glob::Pattern::new(key).map_err(|error| {
            let message = error.msg.into();
            Unlisted::Pattern(CorpusError::Pattern { place: place.into(), message })
        })?;
        let literal: Vec<&str> = key.split('/').take_while(|part| !is_pattern(part)).collect();
        let prefix = literal.join("/");
        let options = glob::MatchOptions { require_literal_separator: true, ..glob::MatchOptions::new() };
        let all = store.list(&prefix)?;
        let found = all.into_iter().filter(|object| pattern.matches_with(&object.key, options));
        return Ok((below(&prefix), found.collect()));
    }
    let single = if key.is_empty() { None } else { store.find(key)? };
    if let Some(object) = single {
        return Ok((key.rfind('/').map_or(0, |slash| slash + 1), vec![object]));
    }
    let base = below(key);
    let listed = store.list(key)?.into_iter().filter(|object| {
        let name = object.key.get(base..).unwrap_or_default();
        Format::of(name).is_some() && !name.split('/').any(|part| part.starts_with('.'))
    });
    Ok((base, listed.collect()))
}

/// Length of a prefix with the `/` behind it.
fn below(prefix: &str) -> usize {
    if prefix.is_empty() { 0 } else { prefix.len() + 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart_and_secrets_are_refused() {
        let parts = |source: &str| Address::parse(source).map(|address| (address.root, address.key));
        assert_eq!(parts("s3://bucket").unwrap(), ("s3://bucket/".into(), String::new()));
        assert_eq!(parts("gs://bucket/a/b/").unwrap(), ("gs://bucket/".into(), "a/b".into()));
        assert_eq!(parts("s3://b/a?.parquet").unwrap().1, "a?.parquet");
        for bad in [
            "https://u:secret@h/a",
            "https://h/a?sig=secret",
            "s3://secret@b/a",
            "https://h/",
            "s3:///a",
            "https://h/*",
        ] {
            let error = Address::parse(bad).err().unwrap().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
        assert!(matches!(Address::parse("ftp://h/a"), Err(CorpusError::Remote { .. })));
    }
}

//! From a reference to a local directory: out of the cache if it is there, from the Hub otherwise.

use super::cache::{RepositoryCache, names_below};
use super::files::{INDEX, check_names, is_about, shards};
use super::listing::Listing;
use super::{Hub, HubError, HubReference, HubSettings, RepositoryKind, Selection, is_remote};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A repository at one commit, on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Holds the wanted files; others may lie beside them.
    pub directory: PathBuf,
    /// The commit.
    pub commit: String,
}

/// The local directory of a model: of a commit of the Hub for `hf://owner/name`, the path itself otherwise.
///
/// # Errors
/// When the reference is not one of a model, or its files cannot be had.
pub fn resolve_model(path: &Path, say: &dyn Fn(&str)) -> Result<PathBuf, HubError> {
    match path.to_str().filter(|text| is_remote(text)) {
        Some(text) => fetch(&HubReference::parse(text)?.expect_kind(RepositoryKind::Model)?, say),
        None => Ok(path.to_path_buf()),
    }
}

/// The local source of a corpus: a directory, file or glob below a commit of the Hub for
/// `hf://datasets/owner/name`, the path itself otherwise.
///
/// # Errors
/// When the reference is not one of a dataset, or its files cannot be had.
pub fn resolve_dataset(path: &Path, say: &dyn Fn(&str)) -> Result<PathBuf, HubError> {
    match path.to_str().filter(|text| is_remote(text)) {
        Some(text) => fetch(&HubReference::parse(text)?.expect_kind(RepositoryKind::Dataset)?, say),
        None => Ok(path.to_path_buf()),
    }
}

/// The local place of a model or dataset, whichever the path names.
///
/// # Errors
/// When it is no reference, or its files cannot be had.
pub fn resolve(path: &Path, say: &dyn Fn(&str)) -> Result<PathBuf, HubError> {
    match path.to_str().filter(|text| is_remote(text)) {
        Some(text) => fetch(&HubReference::parse(text)?, say),
        None => Ok(path.to_path_buf()),
    }
}

fn fetch(reference: &HubReference, say: &dyn Fn(&str)) -> Result<PathBuf, HubError> {
    let hub = Hub { settings: HubSettings::from_env()?, say, interrupt: None };
    let selection = match reference.kind {
        RepositoryKind::Model => Selection::Model,
        RepositoryKind::Dataset => Selection::Dataset,
    };
    Ok(reference.below(&hub.fetch(reference, selection)?.directory))
}

impl HubReference {
    /// The same, if it is of that kind.
    ///
    /// # Errors
    /// [`HubError::Reference`] if it is of the other.
    pub fn expect_kind(self, kind: RepositoryKind) -> Result<Self, HubError> {
        if self.kind == kind {
            return Ok(self);
        }
        let message = match kind {
            RepositoryKind::Model => "a model is needed here, and this is a dataset",
            RepositoryKind::Dataset => "a dataset is needed here, and this is a model",
        };
        Err(HubError::Reference { reference: self.to_string(), message: message.into() })
    }

    /// Its files below a snapshot's directory, as a source of a corpus.
    pub fn below(&self, directory: &Path) -> PathBuf {
        match &self.files {
            Some(files) if files.contains(['*', '?', '[']) => {
                Path::new(&glob::Pattern::escape(&directory.to_string_lossy())).join(files)
            }
            Some(files) => directory.join(files),
            None => directory.to_path_buf(),
        }
    }
}

impl Hub<'_> {
    /// The wanted files of a repository, of which every one is on this machine then.
    ///
    /// A revision whose commit and files the cache knows is used without a request, so that a name means
    /// the same until the cache forgets it. Where nothing can be downloaded, the cache serves as it is.
    ///
    /// # Errors
    /// When files are missing and cannot be had, or are not what the Hub lists.
    pub fn fetch(&self, reference: &HubReference, selection: Selection) -> Result<Snapshot, HubError> {
        let cache = RepositoryCache::new(&self.settings.cache, reference);
        if let Some(snapshot) = complete(&cache, reference, selection)? {
            (self.say)(&format!("{reference} is commit {}, from the cache", snapshot.commit));
            return Ok(snapshot);
        }
        let reason = match self.obtain(&cache, reference, selection) {
            Ok(snapshot) => return Ok(snapshot),
            Err(Absent::Because(reason)) => reason,
            Err(Absent::Failed(error)) => return Err(error),
        };
        let snapshot = Self::as_it_is(&cache, reference, selection, &reason)?;
        let commit = &snapshot.commit;
        (self.say)(&format!(
            "{reference} is taken to be commit {commit} as the cache holds it, without a list of its files: {reason}"
        ));
        Ok(snapshot)
    }

    #[cfg(not(feature = "hub"))]
    #[expect(clippy::unused_self, reason = "with the feature it downloads")]
    fn obtain(&self, _: &RepositoryCache, _: &HubReference, _: Selection) -> Result<Snapshot, Absent> {
        Err(Absent::Because("this program was built without the feature `hub`, so it cannot download".into()))
    }

    #[cfg(feature = "hub")]
    fn obtain(
        &self,
        cache: &RepositoryCache,
        reference: &HubReference,
        selection: Selection,
    ) -> Result<Snapshot, Absent> {
        if self.settings.offline {
            return Err(Absent::Because("HF_HUB_OFFLINE forbids to download it".into()));
        }
        self.download(cache, reference, selection)
    }

    /// The snapshot of the last known commit, if what cannot be done without is there.
    fn as_it_is(
        cache: &RepositoryCache,
        reference: &HubReference,
        selection: Selection,
        reason: &str,
    ) -> Result<Snapshot, HubError> {
        let not_cached = || not_cached(cache, reference, selection, reason);
        let commit = cache.commit(&reference.revision)?.ok_or_else(not_cached)?;
        let directory = cache.snapshot(&commit);
        let missing = |missing: &[String]| HubError::Incomplete {
            reference: reference.to_string(),
            missing: missing.len(),
            first: directory.join(missing.first().map_or("", String::as_str)),
            reason: reason.to_owned(),
        };
        if let Some(listing) = cache.listing(&commit)? {
            return Err(missing(&missing_files(cache, &commit, reference, selection, &listing)?));
        }
        let names = names_below(&directory);
        let names: BTreeSet<&str> = names.iter().map(String::as_str).collect();
        let wanted = selection.of(reference, &names).map_err(|_| not_cached())?;
        let shards = shards_of(&directory, reference, &wanted, None)?;
        let absent: Vec<String> = shards.into_iter().filter(|name| !names.contains(name.as_str())).collect();
        if absent.is_empty() { Ok(Snapshot { directory, commit }) } else { Err(missing(&absent)) }
    }
}

fn not_cached(
    cache: &RepositoryCache,
    reference: &HubReference,
    selection: Selection,
    reason: &str,
) -> HubError {
    let files = match selection {
        Selection::Model => "config.json, tokenizer.json, tokenizer_config.json and the safetensors files",
        Selection::Tokenizer => "tokenizer.json and tokenizer_config.json",
        Selection::Configuration => "config.json",
        Selection::Dataset => "the parquet or JSON-lines files",
    };
    let commit = cache.commit(&reference.revision).ok().flatten();
    let noted = match &commit {
        Some(_) => String::new(),
        None => format!(
            "the commit's 40 hexadecimal digits into {}, and ",
            cache.reference(&reference.revision).display()
        ),
    };
    let snapshot = cache.snapshot(commit.as_deref().unwrap_or("COMMIT"));
    let layout = format!(
        "name a local directory, run once where the Hub can be reached (with a program built with `--features hub`, or \
         `hf download`), or put it there by hand: {noted}{files} into {}",
        snapshot.display()
    );
    HubError::NotCached { reference: reference.to_string(), reason: reason.into(), layout }
}

/// Why a snapshot could not be downloaded.
pub(super) enum Absent {
    /// The Hub was not asked, or not reached: the cache as it is may serve.
    Because(String),
    /// The Hub was reached and something went wrong.
    #[cfg_attr(not(feature = "hub"), expect(dead_code, reason = "nobody is asked without the feature"))]
    Failed(HubError),
}

#[cfg(feature = "hub")]
impl From<HubError> for Absent {
    fn from(error: HubError) -> Self {
        Self::Failed(error)
    }
}

/// The snapshot that a listing proves to be complete.
pub(super) fn complete(
    cache: &RepositoryCache,
    reference: &HubReference,
    selection: Selection,
) -> Result<Option<Snapshot>, HubError> {
    let Some(commit) = cache.commit(&reference.revision)? else { return Ok(None) };
    let Some(listing) = cache.listing(&commit)? else { return Ok(None) };
    let missing = missing_files(cache, &commit, reference, selection, &listing)?;
    // Who filled the cache may have had no use for a card.
    Ok(missing
        .iter()
        .all(|name| is_about(name))
        .then(|| Snapshot { directory: cache.snapshot(&commit), commit }))
}

/// Wanted files that a snapshot lacks or holds in another size. Shards are known once their index is there.
pub(super) fn missing_files(
    cache: &RepositoryCache,
    commit: &str,
    reference: &HubReference,
    selection: Selection,
    listing: &Listing,
) -> Result<Vec<String>, HubError> {
    check_names(reference, listing.files.keys().map(String::as_str))?;
    let names: BTreeSet<&str> = listing.files.keys().map(String::as_str).collect();
    let is_missing =
        |name: &String| !cache.size(commit, name).is_some_and(|size| listing.has_size(name, size));
    let wanted = selection.of(reference, &names)?;
    let missing: Vec<String> = wanted.iter().filter(|name| is_missing(name)).cloned().collect();
    if missing.iter().any(|name| name == INDEX) {
        return Ok(missing);
    }
    let shards = shards_of(&cache.snapshot(commit), reference, &wanted, Some(&names))?;
    Ok(missing.into_iter().chain(shards.into_iter().filter(is_missing)).collect())
}

/// The shards that the index of a snapshot names, if an index is among the wanted files.
fn shards_of(
    directory: &Path,
    reference: &HubReference,
    wanted: &[String],
    names: Option<&BTreeSet<&str>>,
) -> Result<Vec<String>, HubError> {
    if !wanted.iter().any(|name| name == INDEX) {
        return Ok(Vec::new());
    }
    let path = directory.join(INDEX);
    let index = std::fs::read_to_string(&path).map_err(HubError::io(&path))?;
    shards(reference, &index, names)
}

//! What the cache lacks of a repository, from the Hub.

use super::cache::RepositoryCache;
use super::client::Client;
use super::listing::{Entry, Listing};
use super::snapshot::{Absent, missing_files};
use super::store::remove;
use super::transfer::Transfer;
use super::{Hub, HubError, HubReference, Selection, Snapshot};
use std::fs;

/// Shards are known when the index is there, so the second look finds what is left.
const LOOKS: usize = 2;

impl Hub<'_> {
    /// Asks for the commit of a revision and fetches the wanted files that are missing.
    pub(super) fn download(
        &self,
        cache: &RepositoryCache,
        reference: &HubReference,
        selection: Selection,
    ) -> Result<Snapshot, Absent> {
        let client = Client::new(self, reference)?;
        let (commit, listing) = client.listing().map_err(|error| match error {
            HubError::Unreachable { .. } => Absent::Because(error.to_string()),
            error => Absent::Failed(error),
        })?;
        (self.say)(&format!("{reference} is commit {commit}"));
        for look in 0..LOOKS {
            let missing = missing_files(cache, &commit, reference, selection, &listing)?;
            if look == 0 {
                match cache.keep_listing(&commit, &listing) {
                    // A cache that nobody may write can be complete.
                    Err(error) if missing.is_empty() => {
                        (self.say)(&format!("the listing is not kept: {error}"));
                    }
                    kept => kept?,
                }
            }
            for (number, name) in missing.iter().enumerate() {
                self.obtain_file(&client, cache, &commit, name, &listing, (number + 1, missing.len()))?;
            }
        }
        cache.note_commit(&reference.revision, &commit)?;
        Ok(Snapshot { directory: cache.snapshot(&commit), commit })
    }

    fn obtain_file(
        &self,
        client: &Client,
        cache: &RepositoryCache,
        commit: &str,
        name: &str,
        listing: &Listing,
        (number, count): (usize, usize),
    ) -> Result<(), HubError> {
        let Some(entry) = listing.files.get(name) else { return Ok(()) };
        let _lock = cache.lock(entry.hash(), client)?;
        if !is_there(cache, entry)? {
            (self.say)(&format!("downloading file {number} of {count}: {name}, {}", describe(entry.size)));
            let transfer = Transfer::new(client, cache, commit, name, entry);
            let (part, blob) = (transfer.run()?, cache.blob(entry.hash()));
            if let Err(error) = fs::rename(part, &blob) {
                // Where locks do nothing, another process may have been as quick.
                is_there(cache, entry)?.then_some(()).ok_or_else(|| HubError::io(&blob)(error))?;
            }
        }
        cache.link(commit, name, entry.hash())
    }
}

/// Whether a content is there; one of another size is removed.
fn is_there(cache: &RepositoryCache, entry: &Entry) -> Result<bool, HubError> {
    let blob = cache.blob(entry.hash());
    match fs::metadata(&blob).map(|metadata| metadata.len()) {
        Ok(size) if size == entry.size => Ok(true),
        Ok(_) => remove(&blob).map(|()| false),
        Err(_) => Ok(false),
    }
}

fn describe(bytes: u64) -> String {
    if bytes < 1 << 20 { format!("{bytes} bytes") } else { format!("{:.1} MiB", bytes as f64 / 1_048_576.0) }
}

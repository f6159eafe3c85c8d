//! Writing the cache: locks, links, and contents that are only named after what they prove to be.

use super::HubError;
use super::cache::RepositoryCache;
use super::client::Client;
use super::listing::{Entry, Hash, Listing};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const CHUNK_BYTES: usize = 1 << 18;

impl RepositoryCache {
    /// Where a content is, once it is proven.
    pub(super) fn blob(&self, hash: Hash) -> PathBuf {
        self.root.join("blobs").join(hash.name())
    }

    /// Where a content is until then.
    pub(super) fn part(&self, hash: Hash) -> PathBuf {
        self.root.join("blobs").join(format!("{}.incomplete", hash.name()))
    }

    /// Waits until no other process or thread is downloading a content. `huggingface_hub` takes the
    /// same lock (`flock`), which ends with the process that holds it.
    pub(super) fn lock(&self, hash: Hash, client: &Client) -> Result<File, HubError> {
        let path = self.locks.join(format!("{}.lock", hash.name()));
        create_parent(&path)?;
        let mut said = false;
        loop {
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
            let file = file.map_err(HubError::io(&path))?;
            match file.try_lock() {
                // A lock on a file that was removed meanwhile keeps nobody out.
                Ok(()) if is_still(&file, &path) => return Ok(file),
                Ok(()) => continue,
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(source)) => return Err(HubError::io(&path)(source)),
            }
            if !said {
                (client.hub.say)(&format!("waiting for another process that downloads {}", client.reference));
                said = true;
            }
            client.nap()?;
        }
    }

    /// Makes a content appear under its name in a snapshot.
    pub(super) fn link(&self, commit: &str, name: &str, hash: Hash) -> Result<(), HubError> {
        let pointer = self.snapshot(commit).join(name);
        create_parent(&pointer)?;
        let up = "../".repeat(2 + name.split('/').count() - 1);
        let target = format!("{up}blobs/{}", hash.name());
        replace(&pointer, |temporary| {
            symlink(&target, temporary)
                .or_else(|_| fs::hard_link(self.blob(hash), temporary))
                .or_else(|_| fs::copy(self.blob(hash), temporary).map(drop))
        })
    }

    /// Notes which commit a branch or tag is, unless that is known.
    pub(super) fn note_commit(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if self.commit(revision)?.as_deref() == Some(commit) {
            return Ok(());
        }
        write(&self.reference(revision), commit.as_bytes())
    }

    /// Keeps the listing of a commit.
    pub(super) fn keep_listing(&self, commit: &str, listing: &Listing) -> Result<(), HubError> {
        let path = self.listing_path(commit);
        let json =
            serde_json::to_vec(listing).map_err(|error| HubError::io(&path)(io::Error::other(error)))?;
        write(&path, &json)
    }
}

/// Whether a content is what the listing says; if not, what it is.
pub(super) fn check_content(
    path: &Path,
    entry: &Entry,
    client: &Client,
) -> Result<Result<(), String>, HubError> {
    let found = match entry.hash() {
        Hash::Sha256(_) => digest(path, Sha256::new(), client)?,
        Hash::Git(_) => digest(path, Sha1::new().chain_update(format!("blob {}\0", entry.size)), client)?,
    };
    Ok(if found == entry.hash().name() { Ok(()) } else { Err(found) })
}

fn digest(path: &Path, mut hasher: impl Digest, client: &Client) -> Result<String, HubError> {
    let mut file = File::open(path).map_err(HubError::io(path))?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        client.check_interrupt()?;
        match file.read(&mut chunk).map_err(HubError::io(path))? {
            0 => return Ok(hex(&hasher.finalize())),
            read => hasher.update(&chunk[..read]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.filter_map(|digit| char::from_digit(u32::from(digit), 16)).collect()
}

/// Removes a file that may not be there.
pub(super) fn remove(path: &Path) -> Result<(), HubError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(HubError::io(path)(error)),
        _ => Ok(()),
    }
}

pub(super) fn create_parent(path: &Path) -> Result<(), HubError> {
    let parent = path.parent().unwrap_or(path);
    fs::create_dir_all(parent).map_err(HubError::io(parent))
}

/// Writes a small file so that nobody ever reads a part of it.
fn write(path: &Path, bytes: &[u8]) -> Result<(), HubError> {
    create_parent(path)?;
    replace(path, |temporary| {
        let mut file = File::create_new(temporary)?;
        file.write_all(bytes)?;
        file.sync_all()
    })
}

/// Makes something under a temporary name and gives it its own.
fn replace(path: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), HubError> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.tmp-{}-{count}", std::process::id()));
    make(&temporary).and_then(|()| fs::rename(&temporary, path)).map_err(|source| {
        // The error to report is the first one.
        let _ = fs::remove_file(&temporary);
        HubError::io(path)(source)
    })
}

#[cfg(unix)]
fn symlink(target: &str, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(not(unix))]
fn symlink(_target: &str, _path: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

#[cfg(unix)]
fn is_still(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    file.metadata().map(place).ok() == fs::metadata(path).map(place).ok()
}

#[cfg(not(unix))]
fn is_still(_file: &File, _path: &Path) -> bool {
    true
}

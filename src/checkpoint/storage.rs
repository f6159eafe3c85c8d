//! The file-system operations that durability rests on, and single files written with them.

use super::CheckpointError;
use super::error::at;
use std::fs::{self, File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A file being written.
pub trait StorageFile: Write {
    /// Waits until the content is on the medium.
    ///
    /// # Errors
    /// What the system says.
    fn sync(&mut self) -> io::Result<()>;
}

/// Every operation through which this room changes the disk, so that each can be made to fail.
pub trait Storage: std::fmt::Debug + Send + Sync {
    /// Creates a directory that does not exist yet.
    ///
    /// # Errors
    /// What the system says.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Creates a file that does not exist yet.
    ///
    /// # Errors
    /// What the system says.
    fn create(&self, path: &Path) -> io::Result<Box<dyn StorageFile>>;
    /// Renames a file (replacing one of that name) or a directory.
    ///
    /// # Errors
    /// What the system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Waits until the names in a directory are on the medium.
    ///
    /// # Errors
    /// What the system says.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a file or a symbolic link.
    ///
    /// # Errors
    /// What the system says.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    ///
    /// # Errors
    /// What the system says.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
}

/// The file system itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct Disk;

impl StorageFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl Storage for Disk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        Ok(Box::new(OpenOptions::new().write(true).create_new(true).open(path)?))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }
}

/// Directory that holds a path's name (`.` for a bare name).
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Creates a directory and its missing ancestors, durably.
pub(super) fn ensure_dir(storage: &dyn Storage, path: &Path) -> Result<(), CheckpointError> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = parent(path);
    ensure_dir(storage, parent)?;
    storage.create_dir(path).map_err(at(path))?;
    storage.sync_dir(parent).map_err(at(parent))
}

/// Removes a directory with everything in it; links are removed and never followed.
pub(super) fn remove_tree(storage: &dyn Storage, path: &Path) -> Result<(), CheckpointError> {
    if !fs::symlink_metadata(path).map_err(at(path))?.is_dir() {
        return storage.remove_file(path).map_err(at(path));
    }
    for entry in fs::read_dir(path).map_err(at(path))? {
        remove_tree(storage, &entry.map_err(at(path))?.path())?;
    }
    storage.remove_dir(path).map_err(at(path))
}

/// Replaces a file so that a reader, or a machine that starts after a crash, sees the old content or
/// the new content and nothing in between.
///
/// # Errors
/// The path with what the system said; the file has its old or its new content then.
pub fn atomic_write(path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    atomic_write_on(&Disk, path, bytes)
}

/// [`atomic_write`] on a given storage.
///
/// # Errors
/// The path with what the system said; the file has its old or its new content then.
pub fn atomic_write_on(storage: &dyn Storage, path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
    let temporary = temporary_name(path).map_err(at(path))?;
    let replaced = write_synced(storage, &temporary, bytes).and_then(|()| storage.rename(&temporary, path));
    if let Err(source) = replaced {
        // The error to report is the first one; a file left behind by a dying disk harms nobody.
        let _ = storage.remove_file(&temporary);
        return Err(at(path)(source));
    }
    storage.sync_dir(parent(path)).map_err(at(path))
}

fn write_synced(storage: &dyn Storage, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = storage.create(path)?;
    file.write_all(bytes)?;
    file.sync()
}

/// `.NAME.tmp-TAG-COUNT` beside the file: no two writers share one, on whatever machines they are.
pub(crate) fn temporary_name(path: &Path) -> io::Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.to_string_lossy();
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let tag = RandomState::new().hash_one(std::process::id());
    Ok(parent(path).join(format!(".{name}.tmp-{tag:016x}-{count}")))
}

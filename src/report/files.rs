//! Files that exist completely or not at all.

use super::ReportError;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

/// Names the file in an error of the system.
pub(super) fn at(path: &Path) -> impl FnOnce(std::io::Error) -> ReportError {
    let path = path.to_owned();
    move |source| ReportError::Io { path, source }
}

/// Name under which `path` is written until it is complete.
pub(super) fn temporary(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// Makes the finished `file` durable and gives it its name.
pub(super) fn publish(file: &File, unfinished: &Path, path: &Path) -> Result<(), ReportError> {
    file.sync_all().map_err(at(unfinished))?;
    std::fs::rename(unfinished, path).map_err(at(path))?;
    sync_directory(path.parent().unwrap_or(Path::new(".")))
}

/// Makes the names within a directory durable.
pub(super) fn sync_directory(directory: &Path) -> Result<(), ReportError> {
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    File::open(directory).and_then(|handle| handle.sync_all()).map_err(at(directory))
}

/// Writes a whole file, replacing one of that name only when the new one is complete.
pub(super) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), ReportError> {
    let unfinished = temporary(path);
    let mut file = File::create(&unfinished).map_err(at(&unfinished))?;
    file.write_all(bytes).map_err(at(&unfinished))?;
    publish(&file, &unfinished, path)
}

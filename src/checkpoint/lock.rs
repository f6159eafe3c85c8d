//! One writer per run directory.

use super::CheckpointError;
use super::error::at;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

/// An advisory lock on a directory (`flock` on `DIR/.lock`), held until it is dropped: exclusive, or shared
/// by workers that stay out of each other's way.
///
/// The system releases it when the process ends, however it ends; the file itself stays.
#[derive(Debug)]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Takes the lock without waiting and writes this process's number into the file.
    ///
    /// # Errors
    /// [`CheckpointError::Locked`] if another process holds it, or what the system said.
    pub fn acquire(directory: &Path) -> Result<Self, CheckpointError> {
        let (mut file, path) = open(directory)?;
        locked(file.try_lock(), &file, &path)?;
        write_process(&mut file).map_err(at(&path))?;
        Ok(Self { _file: file })
    }

    /// Takes the lock without waiting, beside others that share it.
    ///
    /// # Errors
    /// As [`RunLock::acquire`].
    pub fn share(directory: &Path) -> Result<Self, CheckpointError> {
        let (file, path) = open(directory)?;
        locked(file.try_lock_shared(), &file, &path)?;
        Ok(Self { _file: file })
    }
}

fn open(directory: &Path) -> Result<(File, PathBuf), CheckpointError> {
    let path = directory.join(".lock");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    Ok((file.map_err(at(&path))?, path))
}

fn locked(taken: Result<(), TryLockError>, file: &File, path: &Path) -> Result<(), CheckpointError> {
    taken.map_err(|error| match error {
        TryLockError::WouldBlock => CheckpointError::Locked { holder: holder(file), path: path.to_owned() },
        TryLockError::Error(source) => at(path)(source),
    })
}

fn write_process(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

/// Who holds the lock, as far as the file says.
fn holder(file: &File) -> String {
    let mut text = String::new();
    let read = file.take(32).read_to_string(&mut text);
    match (read, text.trim().parse::<u32>()) {
        (Ok(_), Ok(process)) => format!("process {process}"),
        _ => "another process".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_writer_is_refused_until_the_first_ends() {
        let directory = tempfile::tempdir().unwrap();
        let first = RunLock::acquire(directory.path()).unwrap();
        let error = RunLock::acquire(directory.path()).unwrap_err();
        assert!(error.to_string().contains(&format!("process {}", std::process::id())), "{error}");
        assert!(error.hint().is_some());
        drop(first);
        RunLock::acquire(directory.path()).unwrap();
    }

    #[test]
    fn a_lock_file_left_behind_locks_nobody_out() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join(".lock"), "12345678901234567890 and more").unwrap();
        let _lock = RunLock::acquire(directory.path()).unwrap();
        let text = std::fs::read_to_string(directory.path().join(".lock")).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
    }
}

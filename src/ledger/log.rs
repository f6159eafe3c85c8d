//! `ledger.jsonl`: the records of all closed steps, one a line.

use super::error::at;
use super::record::Chain;
use super::verify::Lines;
use super::{Digest, LedgerError, LineFault, StepRecord};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A position in the file. The default is its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerMark {
    /// Bytes before it.
    pub bytes: u64,
    /// Digest of the last record before it.
    pub digest: Digest,
}

/// What was cut off behind the mark when the file was opened: steps that ran after the checkpoint and
/// run again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CutTail {
    /// Lines, a torn last one included.
    pub lines: u64,
    /// Bytes.
    pub bytes: u64,
}

impl fmt::Display for CutTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "cut {} lines ({} bytes) off the ledger: steps after the checkpoint, which run again",
            self.lines, self.bytes
        )
    }
}

/// The file, open for appending.
#[derive(Debug)]
pub struct LedgerLog {
    path: PathBuf,
    file: File,
    mark: LedgerMark,
}

impl LedgerLog {
    /// Opens the file (creating it if the mark is its start) and cuts off what stands behind the mark. What stands
    /// before it is verified.
    ///
    /// # Errors
    /// A file that does not hold what the mark was made with, or what the system said. The file is
    /// unchanged then.
    pub fn open(path: &Path, resume_at: LedgerMark) -> Result<(Self, CutTail), LedgerError> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(resume_at.bytes == 0)
            .truncate(false)
            .open(path)
            .map_err(at(path))?;
        check_before(path, &file, resume_at)?;
        // A file whose name is lost in a crash of the machine is lost.
        sync_parent(path).map_err(at(path))?;
        let cut = measure_tail(&mut file, resume_at.bytes).map_err(at(path))?;
        if cut.bytes > 0 {
            file.set_len(resume_at.bytes).map_err(at(path))?;
            file.sync_all().map_err(at(path))?;
        }
        Ok((Self { path: path.to_owned(), file, mark: resume_at }, cut))
    }

    /// Where the file ends now.
    pub fn mark(&self) -> LedgerMark {
        self.mark
    }

    /// Appends a record; the system has it when this returns. The new mark.
    ///
    /// # Errors
    /// A record that does not continue the file, or what the system said. The file ends where it did
    /// before then, and the same record can be appended again.
    pub fn append(&mut self, record: &StepRecord) -> Result<LedgerMark, LedgerError> {
        let chain = || LedgerError::Chain { path: self.path.clone(), step: record.step };
        if record.chained(self.mark.digest).map_err(|_| chain())? != record.digest {
            return Err(chain());
        }
        let line = record.line().map_err(|_| chain())?;
        if let Err(source) = self.file.write_all_at(&line, self.mark.bytes) {
            // A torn line is harmless: the next append overwrites it and the next open cuts it off.
            let _ = self.file.set_len(self.mark.bytes);
            return Err(at(&self.path)(source));
        }
        self.mark = LedgerMark { bytes: self.mark.bytes + line.len() as u64, digest: record.digest };
        Ok(self.mark)
    }

    /// Waits until everything is on the medium: to be called before a checkpoint saves the mark.
    ///
    /// # Errors
    /// What the system said.
    pub fn sync(&self) -> Result<LedgerMark, LedgerError> {
        self.file.sync_all().map_err(at(&self.path))?;
        Ok(self.mark)
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

/// Verifies that the lines before the mark are those that it was made with.
fn check_before(path: &Path, file: &File, mark: LedgerMark) -> Result<(), LedgerError> {
    let wrong = |reason: String| LedgerError::Mark { path: path.to_owned(), reason };
    let size = file.metadata().map_err(at(path))?.len();
    if size < mark.bytes {
        return Err(wrong(format!("it has {size} bytes instead of at least {}", mark.bytes)));
    }
    let mut chain = Chain::default();
    let mut lines = Lines::new(file.take(mark.bytes));
    while let Some(line) = lines.next_line().map_err(at(path))? {
        line.and_then(|line| chain.extend(&StepRecord::parse(line)?)).map_err(|fault: LineFault| {
            LedgerError::Line { path: path.to_owned(), line: lines.number(), fault }
        })?;
    }
    if chain.digest == mark.digest {
        return Ok(());
    }
    Err(wrong(format!("its digest there is {} instead of {}", chain.digest, mark.digest)))
}

/// Lines and bytes from an offset to the end.
fn measure_tail(file: &mut File, offset: u64) -> io::Result<CutTail> {
    file.seek(SeekFrom::Start(offset))?;
    let mut reader = BufReader::new(file);
    let (mut tail, mut last) = (CutTail::default(), b'\n');
    loop {
        let buffer = reader.fill_buf()?;
        let Some(end) = buffer.last() else { break };
        last = *end;
        let count = buffer.len();
        tail.bytes += count as u64;
        tail.lines += buffer.split(|byte| *byte == b'\n').skip(1).count() as u64;
        reader.consume(count);
    }
    tail.lines += u64::from(last != b'\n');
    Ok(tail)
}

//! Reading `ledger.jsonl` again, for `rpt verify`.

use super::balance::Balance;
use super::error::at;
use super::record::Chain;
use super::{Digest, LedgerError, LedgerSnapshot, LineFault, StepRecord};
use serde::Serialize;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// A record has some hundred bytes; a longer line is not one.
const MAX_LINE_BYTES: usize = 1 << 20;

/// What `ledger.jsonl` holds, up to the first damaged line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LedgerReport {
    /// The file.
    pub path: PathBuf,
    /// Intact lines, each one step.
    pub steps: u64,
    /// The last step.
    pub last_step: Option<u64>,
    /// Tasks: every ordinal below is recorded exactly once.
    pub frontier: u64,
    /// Sums over all steps.
    pub balance: Balance,
    /// Digest of the last record.
    pub digest: Digest,
    /// Whether the file goes through the point that a checkpoint saved, if one was given. It may go on
    /// behind it.
    pub holds_checkpoint: Option<bool>,
    /// The first damaged line and what is wrong with it.
    pub fault: Option<String>,
}

impl LedgerReport {
    /// Whether every line is intact, the sums balance and the checkpoint's point is there.
    pub fn intact(&self) -> bool {
        self.fault.is_none() && self.balance.balanced && self.holds_checkpoint != Some(false)
    }
}

/// Reads a ledger file line by line and checks the chain of digests, that ordinals follow each other
/// without gap or overlap, and that every line and their sums balance. A file that was cut at the end
/// of a line is a shorter, intact file, unless it is now too short for `checkpoint`.
///
/// # Errors
/// What the system said. Damage is in the report.
pub fn verify_file(path: &Path, checkpoint: Option<&LedgerSnapshot>) -> Result<LedgerReport, LedgerError> {
    let mut lines = Lines::new(File::open(path).map_err(at(path))?);
    let mut chain = Chain::default();
    let mut holds = checkpoint.map(|snapshot| snapshot.is_at(&chain));
    let (mut fault, mut steps) = (None, 0);
    while let Some(line) = lines.next_line().map_err(at(path))? {
        if let Err(found) = line.and_then(|line| chain.extend(&StepRecord::parse(line)?)) {
            fault = Some(format!("line {}: {found}", lines.number()));
            break;
        }
        steps += 1;
        holds = checkpoint.map(|snapshot| holds == Some(true) || snapshot.is_at(&chain));
    }
    Ok(LedgerReport {
        path: path.to_owned(),
        steps,
        last_step: chain.last_step,
        frontier: chain.frontier,
        balance: Balance::of(chain.totals),
        digest: chain.digest,
        holds_checkpoint: holds,
        fault,
    })
}

/// Lines of bounded length, each with its end.
pub(super) struct Lines<R> {
    reader: BufReader<R>,
    line: Vec<u8>,
    number: u64,
}

impl<R: Read> Lines<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader: BufReader::new(reader), line: Vec::new(), number: 0 }
    }

    /// Number of the line read last, from 1.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// The next line; `None` at the end.
    pub(super) fn next_line(&mut self) -> io::Result<Option<Result<&[u8], LineFault>>> {
        self.line.clear();
        let mut limited = self.reader.by_ref().take(MAX_LINE_BYTES as u64);
        if limited.read_until(b'\n', &mut self.line)? == 0 {
            return Ok(None);
        }
        self.number += 1;
        if self.line.len() == MAX_LINE_BYTES && !self.line.ends_with(b"\n") {
            return Ok(Some(Err(LineFault::TooLong(MAX_LINE_BYTES))));
        }
        Ok(Some(Ok(&self.line)))
    }
}

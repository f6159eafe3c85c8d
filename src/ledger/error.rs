//! What can go wrong with the ledger.

use super::AttemptState;
use std::io;
use std::path::{Path, PathBuf};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Ordinals are issued consecutively.
    #[error("task {ordinal} was issued, task {expected} is the next")]
    OutOfOrder {
        /// Ordinal that was asked for.
        ordinal: u64,
        /// Ordinal that is next.
        expected: u64,
    },
    /// A task without samples would vanish from every count.
    #[error("task {ordinal} was issued without samples")]
    NoSamples {
        /// The task.
        ordinal: u64,
    },
    /// More than a ledger can count.
    #[error("the ledger cannot count beyond {}", super::MAX_COUNT)]
    Full,
    /// A task that was never issued.
    #[error("task {ordinal} was not issued")]
    NotIssued {
        /// The task.
        ordinal: u64,
    },
    /// A task whose attempts were trained or dropped already.
    #[error("task {ordinal} is closed already")]
    Closed {
        /// The task.
        ordinal: u64,
    },
    /// A sample beyond those issued.
    #[error("task {ordinal} has {samples} samples, there is no sample {sample}")]
    NoSuchSample {
        /// The task.
        ordinal: u64,
        /// The sample, from 0.
        sample: u32,
        /// Samples that were issued.
        samples: u32,
    },
    /// A transition that skips or repeats a state.
    #[error("sample {sample} of task {ordinal} is {state} and cannot become {wanted}")]
    Illegal {
        /// The task.
        ordinal: u64,
        /// The sample, from 0.
        sample: u32,
        /// Where it is.
        state: AttemptState,
        /// Where it was to go.
        wanted: &'static str,
    },
    /// A step cannot be closed while an attempt is open.
    #[error("step {step} cannot be closed: sample {sample} of task {ordinal} is {state}")]
    StillOpen {
        /// The step.
        step: u64,
        /// The first open task.
        ordinal: u64,
        /// Its least advanced sample.
        sample: u32,
        /// Where that sample is.
        state: AttemptState,
    },
    /// Steps are closed in ascending order.
    #[error("step {step} was closed after step {last}")]
    StepOrder {
        /// The step.
        step: u64,
        /// The step closed before.
        last: u64,
    },
    /// A snapshot that no ledger could have made.
    #[error("the ledger snapshot does not balance: {0}")]
    Snapshot(String),
    /// A record that does not continue the file.
    #[error("{path}: the record of step {step} does not continue the file")]
    Chain {
        /// The file.
        path: PathBuf,
        /// Step of the record.
        step: u64,
    },
    /// A line of the file is damaged.
    #[error("{path}: line {line}: {fault}")]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong with it.
        fault: LineFault,
    },
    /// The file is not the one that the checkpoint was made beside.
    #[error("{path}: the file does not hold what the checkpoint was made with: {reason}")]
    Mark {
        /// The file.
        path: PathBuf,
        /// What is different.
        reason: String,
    },
}

impl LedgerError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Io { path, source } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Some(format!(
                    "the disk or quota behind {} is full; free some space and run the same command again",
                    path.display()
                )),
                _ => None,
            },
            Self::Line { .. } | Self::Mark { .. } => Some(
                "the file was changed outside of rpt; restore it from a copy. `rpt verify` checks the whole run"
                    .into(),
            ),
            Self::Snapshot(_) => Some("resume from an older checkpoint".into()),
            Self::OutOfOrder { .. }
            | Self::NoSamples { .. }
            | Self::Full
            | Self::NotIssued { .. }
            | Self::Closed { .. }
            | Self::NoSuchSample { .. }
            | Self::Illegal { .. }
            | Self::StillOpen { .. }
            | Self::StepOrder { .. }
            | Self::Chain { .. } => Some("this is a defect of rpt: nothing was lost, please report it".into()),
        }
    }
}

/// Attaches a path to a system error.
pub(super) fn at(path: &Path) -> impl FnOnce(io::Error) -> LedgerError + '_ {
    move |source| LedgerError::Io { path: path.to_owned(), source }
}

/// What is wrong with a line of `ledger.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LineFault {
    /// The last line has no end.
    #[error("it is cut off")]
    Torn,
    /// Longer than any record.
    #[error("it is longer than {0} bytes")]
    TooLong(usize),
    /// Not a record in the form that this program writes.
    #[error("it is not a record: {0}")]
    Form(String),
    /// Something in it, or in a line before it, was changed.
    #[error("it does not match its digest")]
    Digest,
    /// A task is missing or recorded twice.
    #[error("it starts at task {found}, the line before ends before task {expected}")]
    Ordinals {
        /// First ordinal in the line.
        found: u64,
        /// Frontier of the lines before.
        expected: u64,
    },
    /// Steps do not ascend.
    #[error("step {step} follows step {last}")]
    Steps {
        /// Step of the line.
        step: u64,
        /// Step of the line before.
        last: u64,
    },
    /// Its counts contradict each other.
    #[error("it does not balance: {0}")]
    Unbalanced(String),
}

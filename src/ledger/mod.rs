//! The ledger: every attempt at a task is issued, generated, scored and then trained or dropped with
//! a named reason, exactly once, whatever crashes.
//!
//! An attempt is one sample of one task: (ordinal, sample). Ordinals are issued consecutively from 0.
//!
//! ```text
//! issued -> generated -> scored -> trained
//!    \__________\__________\_____> dropped(reason)
//! ```
//!
//! - [`Ledger`] is the state machine. Attempts that are open live in a small map, bounded by one step;
//!   closed ones become counts and the *frontier*: every ordinal below it is closed.
//! - A [`StepRecord`] closes a step. Its digest chains it to all records before it.
//! - [`LedgerSnapshot`] is what a checkpoint saves: the totals after the last closed step. The position
//!   it names is the trained frontier and never how far a reader ran ahead; what was in flight when a
//!   run died is issued again.
//! - [`LedgerLog`] keeps the records in `ledger.jsonl`, one a line. A checkpoint saves its
//!   [`LedgerMark`]; a resumed run cuts the file back to the mark and goes on from there, so the file is
//!   the one that an uninterrupted run writes. Call [`LedgerLog::sync`] before the checkpoint commits.
//! - [`verify_file`] reads it all again and checks chain, ordinals and sums.
//!
//! This room knows nothing about tasks, rewards or training.

mod attempts;
mod balance;
mod error;
mod log;
mod record;
mod verify;

pub use attempts::{AttemptState, Ledger, LedgerSnapshot};
pub use balance::{Balance, DropReason};
pub use error::{LedgerError, LineFault};
pub use log::{CutTail, LedgerLog, LedgerMark};
pub use record::{Digest, StepRecord};
pub use verify::{LedgerReport, verify_file};

/// Largest ordinal or count: beyond it JSON readers lose digits.
pub const MAX_COUNT: u64 = 1 << 53;

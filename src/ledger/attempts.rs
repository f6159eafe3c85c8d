//! The state machine of attempts.

use super::balance::{Balance, Counts, DropReason, count_up};
use super::record::{Chain, StepRecord};
use super::{Digest, LedgerError, LineFault, MAX_COUNT};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Where an open attempt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AttemptState {
    /// Handed out.
    Issued,
    /// Its reply was sampled.
    Generated,
    /// Its reply was scored.
    Scored,
}

impl fmt::Display for AttemptState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Issued => "issued",
            Self::Generated => "generated",
            Self::Scored => "scored",
        })
    }
}

/// What a checkpoint saves of the ledger: everything up to the last closed step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LedgerSnapshot {
    /// Every task below it is trained or dropped; the next one to issue.
    frontier: u64,
    last_step: Option<u64>,
    totals: Counts,
    digest: Digest,
}

impl LedgerSnapshot {
    /// The trained frontier: every task below it is trained or dropped, none from it on is.
    pub fn frontier(&self) -> u64 {
        self.frontier
    }

    /// The last closed step.
    pub fn last_step(&self) -> Option<u64> {
        self.last_step
    }

    /// Digest of the last closed step's record.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// What became of every attempt up to the last closed step.
    pub fn balance(&self) -> Balance {
        Balance::of(self.totals.clone())
    }

    /// Whether a chain of records has got exactly here.
    pub(super) fn is_at(&self, chain: &Chain) -> bool {
        (self.frontier, self.last_step, self.digest) == (chain.frontier, chain.last_step, chain.digest)
            && self.totals == chain.totals
    }

    fn check(&self) -> Result<(), String> {
        self.totals.check_closed()?;
        if self.frontier > self.totals.issued || (self.frontier == 0) != (self.totals.issued == 0) {
            return Err(format!("{} tasks with {} attempts", self.frontier, self.totals.issued));
        }
        if self.last_step.is_none() && self.totals.issued > 0 {
            return Err("there are attempts and no step".into());
        }
        Ok(())
    }
}

/// The exactly-once record of a run.
///
/// Memory: one byte for each open attempt, and the counts.
#[derive(Clone, Debug, Default)]
pub struct Ledger {
    /// Up to the last closed step.
    closed: LedgerSnapshot,
    /// Since then.
    current: Counts,
    next_ordinal: u64,
    /// Samples of each open task.
    open: BTreeMap<u64, Vec<AttemptState>>,
}

impl Ledger {
    /// The ledger of a run that has not started.
    pub fn new() -> Self {
        Self::default()
    }

    /// Goes on from a checkpoint.
    ///
    /// # Errors
    /// [`LedgerError::Snapshot`] for a snapshot that no ledger could have made.
    pub fn restore(snapshot: LedgerSnapshot) -> Result<Self, LedgerError> {
        snapshot.check().map_err(LedgerError::Snapshot)?;
        Ok(Self { next_ordinal: snapshot.frontier, closed: snapshot, ..Self::default() })
    }

    /// What a checkpoint saves: everything up to the last closed step. Attempts since then are not in
    /// it; a run that goes on from it issues them again.
    pub fn snapshot(&self) -> LedgerSnapshot {
        self.closed.clone()
    }

    /// The next ordinal to issue.
    pub fn next_ordinal(&self) -> u64 {
        self.next_ordinal
    }

    /// Every task below it is trained or dropped.
    pub fn frontier(&self) -> u64 {
        self.open.first_key_value().map_or(self.next_ordinal, |(ordinal, _)| *ordinal)
    }

    /// Number of tasks that are neither trained nor dropped.
    pub fn open_tasks(&self) -> usize {
        self.open.len()
    }

    /// Hands out a task with its samples.
    ///
    /// # Errors
    /// An ordinal that is not the next one, or no samples.
    pub fn issue(&mut self, ordinal: u64, samples: u32) -> Result<(), LedgerError> {
        if ordinal != self.next_ordinal {
            return Err(LedgerError::OutOfOrder { ordinal, expected: self.next_ordinal });
        }
        if samples == 0 {
            return Err(LedgerError::NoSamples { ordinal });
        }
        let issued = self.current.issued.saturating_add(u64::from(samples));
        if self.closed.totals.issued.saturating_add(issued) > MAX_COUNT {
            return Err(LedgerError::Full);
        }
        self.open.insert(ordinal, vec![AttemptState::Issued; samples as usize]);
        self.current.issued = issued;
        self.next_ordinal += 1;
        Ok(())
    }

    /// A reply was sampled.
    ///
    /// # Errors
    /// An attempt that is not in state `issued`.
    pub fn generated(&mut self, ordinal: u64, sample: u32) -> Result<(), LedgerError> {
        self.advance(ordinal, sample, AttemptState::Issued, AttemptState::Generated)?;
        self.current.generated += 1;
        Ok(())
    }

    /// A reply was scored, with an outcome of this name.
    ///
    /// # Errors
    /// An attempt that is not in state `generated`.
    pub fn scored(&mut self, ordinal: u64, sample: u32, outcome: &'static str) -> Result<(), LedgerError> {
        self.advance(ordinal, sample, AttemptState::Generated, AttemptState::Scored)?;
        self.current.scored += 1;
        match self.current.outcomes.get_mut(outcome) {
            Some(count) => *count += 1,
            None => count_up(&mut self.current.outcomes, outcome.to_owned(), 1),
        }
        Ok(())
    }

    /// An optimiser step was made from all samples of a task.
    ///
    /// # Errors
    /// A task that is not open or has a sample that is not in state `scored`.
    pub fn trained(&mut self, ordinal: u64) -> Result<(), LedgerError> {
        let samples = self.task(ordinal)?;
        let behind = samples.iter().zip(0..).find(|(state, _)| **state != AttemptState::Scored);
        if let Some((state, sample)) = behind {
            return Err(LedgerError::Illegal { ordinal, sample, state: *state, wanted: "trained" });
        }
        self.current.trained += self.close(ordinal);
        Ok(())
    }

    /// No optimiser step is made from any sample of a task, whatever state they are in.
    ///
    /// # Errors
    /// A task that is not open.
    pub fn dropped(&mut self, ordinal: u64, reason: DropReason) -> Result<(), LedgerError> {
        self.task(ordinal)?;
        let samples = self.close(ordinal);
        count_up(&mut self.current.dropped, reason, samples);
        Ok(())
    }

    /// Closes a step: makes its record and moves its counts into the totals.
    ///
    /// # Errors
    /// An attempt that is still open, or a step that is not later than the last. Nothing changes then.
    pub fn close_step(&mut self, step: u64) -> Result<StepRecord, LedgerError> {
        if let Some(last) = self.closed.last_step.filter(|last| step <= *last) {
            return Err(LedgerError::StepOrder { step, last });
        }
        if let Some((ordinal, samples)) = self.open.first_key_value() {
            let (state, sample) = samples.iter().copied().zip(0..).min().unwrap_or((AttemptState::Issued, 0));
            return Err(LedgerError::StillOpen { step, ordinal: *ordinal, sample, state });
        }
        let ordinals = self.closed.frontier..self.next_ordinal;
        let record = StepRecord::sealed(step, ordinals, self.current.clone(), self.closed.digest)
            .map_err(|fault: LineFault| LedgerError::Snapshot(fault.to_string()))?;
        self.closed.totals.add(&std::mem::take(&mut self.current));
        self.closed.frontier = self.next_ordinal;
        self.closed.last_step = Some(step);
        self.closed.digest = record.digest;
        Ok(record)
    }

    /// What became of every attempt so far, open ones included.
    pub fn balance(&self) -> Balance {
        let mut counts = self.closed.totals.clone();
        counts.add(&self.current);
        Balance::of(counts)
    }

    fn advance(
        &mut self,
        ordinal: u64,
        sample: u32,
        from: AttemptState,
        to: AttemptState,
    ) -> Result<(), LedgerError> {
        let samples = self.task(ordinal)?;
        let count = samples.len() as u32;
        let wanted = if to == AttemptState::Generated { "generated" } else { "scored" };
        match samples.get_mut(sample as usize) {
            None => Err(LedgerError::NoSuchSample { ordinal, sample, samples: count }),
            Some(state) if *state != from => {
                Err(LedgerError::Illegal { ordinal, sample, state: *state, wanted })
            }
            Some(state) => {
                *state = to;
                Ok(())
            }
        }
    }

    fn task(&mut self, ordinal: u64) -> Result<&mut Vec<AttemptState>, LedgerError> {
        let issued = ordinal < self.next_ordinal;
        self.open.get_mut(&ordinal).ok_or(if issued {
            LedgerError::Closed { ordinal }
        } else {
            LedgerError::NotIssued { ordinal }
        })
    }

    /// Forgets an open task; how many samples it had.
    fn close(&mut self, ordinal: u64) -> u64 {
        self.open.remove(&ordinal).map_or(0, |samples| samples.len() as u64)
    }
}

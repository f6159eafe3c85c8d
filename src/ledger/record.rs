//! The record of one step, and the chain that ties records together.

use super::balance::{Counts, DropReason};
use super::{LineFault, MAX_COUNT};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::collections::BTreeMap;
use std::fmt;

/// A BLAKE3 digest; hexadecimal in files. The default, all zeros, stands before the first record.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest(blake3::Hash);

impl Default for Digest {
    fn default() -> Self {
        Self(blake3::Hash::from_bytes([0; blake3::OUT_LEN]))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        blake3::Hash::from_hex(text).map(Self).map_err(de::Error::custom)
    }
}

/// What became of the attempts of one step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepRecord {
    /// The step.
    pub step: u64,
    /// Its first task.
    pub first_ordinal: u64,
    /// Number of its tasks; their ordinals are consecutive.
    pub ordinals: u64,
    /// Attempts issued.
    pub issued: u64,
    /// Attempts whose reply was sampled.
    pub generated: u64,
    /// Attempts whose reply was scored.
    pub scored: u64,
    /// Attempts that the optimiser step was made from.
    pub trained: u64,
    /// Attempts that were dropped, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Scored attempts by the name of their outcome.
    pub outcomes: BTreeMap<String, u64>,
    /// BLAKE3 of this record's JSON with the digest of the record before in this place.
    pub digest: Digest,
}

impl StepRecord {
    /// A record that continues a chain.
    pub(super) fn sealed(
        step: u64,
        ordinals: std::ops::Range<u64>,
        counts: Counts,
        previous: Digest,
    ) -> Result<Self, LineFault> {
        let open = Self {
            step,
            first_ordinal: ordinals.start,
            ordinals: ordinals.end.saturating_sub(ordinals.start),
            issued: counts.issued,
            generated: counts.generated,
            scored: counts.scored,
            trained: counts.trained,
            dropped: counts.dropped,
            outcomes: counts.outcomes,
            digest: previous,
        };
        let digest = open.chained(previous)?;
        Ok(Self { digest, ..open })
    }

    /// The digest that this record must have after a record with digest `previous`.
    pub(super) fn chained(&self, previous: Digest) -> Result<Digest, LineFault> {
        let open = Self { digest: previous, ..self.clone() };
        Ok(Digest(blake3::hash(&open.body()?)))
    }

    fn body(&self) -> Result<Vec<u8>, LineFault> {
        serde_json::to_vec(self).map_err(|error| LineFault::Form(error.to_string()))
    }

    /// The one form in which this record is written.
    pub(super) fn line(&self) -> Result<Vec<u8>, LineFault> {
        let mut line = self.body()?;
        line.push(b'\n');
        Ok(line)
    }

    /// Reads a line; any form but the one that [`Self::line`] writes is refused.
    pub(super) fn parse(line: &[u8]) -> Result<Self, LineFault> {
        let body = line.strip_suffix(b"\n").ok_or(LineFault::Torn)?;
        let record: Self =
            serde_json::from_slice(body).map_err(|error| LineFault::Form(error.to_string()))?;
        if record.body()? != body {
            return Err(LineFault::Form("it was written by something else".into()));
        }
        Ok(record)
    }

    /// Its counts.
    pub(super) fn counts(&self) -> Counts {
        Counts {
            issued: self.issued,
            generated: self.generated,
            scored: self.scored,
            trained: self.trained,
            dropped: self.dropped.clone(),
            outcomes: self.outcomes.clone(),
        }
    }
}

/// Where a chain of records has got to.
#[derive(Clone, Debug, Default)]
pub(super) struct Chain {
    pub(super) digest: Digest,
    /// Every ordinal below it is recorded.
    pub(super) frontier: u64,
    pub(super) last_step: Option<u64>,
    pub(super) totals: Counts,
}

impl Chain {
    /// Takes the next record, or says why it cannot be the next.
    pub(super) fn extend(&mut self, record: &StepRecord) -> Result<(), LineFault> {
        if record.chained(self.digest)? != record.digest {
            return Err(LineFault::Digest);
        }
        if record.first_ordinal != self.frontier {
            return Err(LineFault::Ordinals { found: record.first_ordinal, expected: self.frontier });
        }
        if let Some(last) = self.last_step.filter(|last| record.step <= *last) {
            return Err(LineFault::Steps { step: record.step, last });
        }
        let counts = record.counts();
        counts.check_closed().map_err(LineFault::Unbalanced)?;
        if record.ordinals > record.issued || (record.ordinals == 0) != (record.issued == 0) {
            let tasks = format!("{} tasks with {} attempts", record.ordinals, record.issued);
            return Err(LineFault::Unbalanced(tasks));
        }
        let frontier = self.frontier.saturating_add(record.ordinals);
        if frontier > MAX_COUNT {
            return Err(LineFault::Unbalanced(format!("task {frontier} is beyond any run")));
        }
        self.totals.add(&counts);
        self.frontier = frontier;
        self.last_step = Some(record.step);
        self.digest = record.digest;
        Ok(())
    }
}

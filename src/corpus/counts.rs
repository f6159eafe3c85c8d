//! What a pass over a corpus read, dropped and quarantined.

use super::error::CorpusError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// Quarantined places that are kept in full; beyond that they are only counted.
const LISTED: usize = 16;

/// Rows dropped because their text is null.
pub(super) const NULL_TEXT: &str = "null_text";
/// Rows dropped because their text has fewer bytes than `min_bytes`.
pub(super) const TOO_SHORT: &str = "too_short";
/// Rows dropped because their text has more bytes than `max_bytes`.
pub(super) const TOO_LONG: &str = "too_long";
/// Rows that `rate`, or the weights of a mixture, leave out.
pub(super) const NOT_DRAWN: &str = "not_drawn";
/// Rows dropped because they share a run of words with held-out text.
pub(super) const HELD_OUT: &str = "in_held_out_text";
/// Rows dropped because an earlier document has the same text.
pub(super) const DUPLICATE: &str = "duplicate";
/// Rows dropped because an earlier document has nearly the same words.
pub(super) const NEAR_DUPLICATE: &str = "near_duplicate";
/// Lines dropped because they are not a JSON object.
pub(super) const BAD_JSON: &str = "bad_json";
/// Lines dropped because they are empty.
pub(super) const BLANK_LINE: &str = "blank_line";
/// Lines dropped because no reader should have to hold them.
pub(super) const LONG_LINE: &str = "line_too_long";
/// Lines dropped because they are not UTF-8.
pub(super) const NOT_UTF8: &str = "not_utf8";
/// Lines dropped because they lack the key of the text.
pub(super) const NO_TEXT: &str = "no_text";
/// Lines dropped because their text is a number, a list or the like.
pub(super) const TEXT_NOT_STRING: &str = "text_not_string";
/// Marks dropped because they are null or do not point into their text at a character boundary.
pub(super) const BAD_MARK: &str = "mark_outside_text";

/// A file or row group that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quarantined {
    /// The file.
    pub file: PathBuf,
    /// The row group, or nothing when the whole file is unreadable.
    pub row_group: Option<usize>,
    /// Rows of the row group that had been read before the damage was met. Their documents stay delivered.
    pub rows_read: u64,
    /// What the decoder said.
    pub reason: String,
}

impl fmt::Display for Quarantined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(row_group) = self.row_group {
            write!(f, " row group {row_group} after {} rows", self.rows_read)?;
        }
        write!(f, ": {}", self.reason)
    }
}

/// Counters of one pass, from its cursor on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorpusCounts {
    /// Files opened.
    pub files: u64,
    /// Row groups read to their end.
    pub row_groups: u64,
    /// Documents delivered.
    pub documents: u64,
    /// Bytes of their text.
    pub bytes: u64,
    /// Rows and marks that were left out, by reason.
    pub dropped: BTreeMap<String, u64>,
    /// The first few quarantined places.
    pub quarantined: Vec<Quarantined>,
    /// Number of quarantined places.
    pub quarantined_total: u64,
}

impl CorpusCounts {
    pub(super) fn drop_one(&mut self, reason: &'static str) {
        match self.dropped.get_mut(reason) {
            Some(count) => *count += 1,
            None => drop(self.dropped.insert(reason.to_owned(), 1)),
        }
    }

    pub(super) fn quarantine(&mut self, place: Quarantined) {
        self.quarantined_total += 1;
        if self.quarantined.len() < LISTED {
            self.quarantined.push(place);
        }
    }

    /// Adds the counts of a later part of the same corpus.
    pub fn add(&mut self, part: Self) {
        self.files += part.files;
        self.row_groups += part.row_groups;
        self.documents += part.documents;
        self.bytes += part.bytes;
        for (reason, count) in part.dropped {
            *self.dropped.entry(reason).or_default() += count;
        }
        self.quarantined.extend(part.quarantined);
        self.quarantined.truncate(LISTED);
        self.quarantined_total += part.quarantined_total;
    }

    /// Refuses more quarantined places than `limit`.
    ///
    /// # Errors
    /// Names the first of them.
    pub fn check_quarantined(&self, limit: u64) -> Result<(), CorpusError> {
        let total = self.quarantined_total;
        if total <= limit {
            return Ok(());
        }
        Err(CorpusError::TooManyQuarantined { total, limit, first: self.first_quarantined() })
    }

    /// What was left out, in words.
    pub(super) fn losses(&self) -> String {
        let dropped = self.dropped.iter().map(|(reason, count)| format!("{reason}: {count}"));
        let quarantined = self.quarantined.first().map(|first| format!("quarantined: {first}"));
        let losses: Vec<_> = dropped.chain(quarantined).collect();
        if losses.is_empty() { "there are no rows".into() } else { losses.join(", ") }
    }

    /// The first quarantined places, in words.
    pub(super) fn first_quarantined(&self) -> String {
        let first: Vec<_> = self.quarantined.iter().take(3).map(ToString::to_string).collect();
        first.join("; ")
    }
}

//! Counts, and when they balance.

use super::MAX_COUNT;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Why attempts were not trained on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// Every sample of the task earned the same reward, so there is nothing to learn from it.
    ZeroVariance,
    /// A log-probability, reward or gradient was infinite or not a number.
    NotFinite,
    /// The run was stopped before the task was finished.
    Interrupted,
    /// Prompt and reply do not fit into the model or the memory.
    TooLong,
    /// The step was full before it was this task's turn.
    Surplus,
}

impl DropReason {
    /// The name in files and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::ZeroVariance => "zero_variance",
            Self::NotFinite => "not_finite",
            Self::Interrupted => "interrupted",
            Self::TooLong => "too_long",
            Self::Surplus => "surplus",
        }
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Counts of attempts. Each state counts everything that ever reached it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Counts {
    pub(super) issued: u64,
    pub(super) generated: u64,
    pub(super) scored: u64,
    pub(super) trained: u64,
    pub(super) dropped: BTreeMap<DropReason, u64>,
    pub(super) outcomes: BTreeMap<String, u64>,
}

impl Counts {
    pub(super) fn dropped_total(&self) -> u64 {
        total(&self.dropped)
    }

    /// Adds another set of counts; totals stay exact below [`MAX_COUNT`] and saturate far beyond it.
    pub(super) fn add(&mut self, other: &Self) {
        self.issued = self.issued.saturating_add(other.issued);
        self.generated = self.generated.saturating_add(other.generated);
        self.scored = self.scored.saturating_add(other.scored);
        self.trained = self.trained.saturating_add(other.trained);
        other.dropped.iter().for_each(|(reason, count)| count_up(&mut self.dropped, *reason, *count));
        other.outcomes.iter().for_each(|(name, count)| count_up(&mut self.outcomes, name.clone(), *count));
    }

    /// Whether these can be the counts of closed attempts: each one trained or dropped, trained ones
    /// scored, scored ones generated, generated ones issued, and one outcome for each scored one.
    ///
    /// # Errors
    /// The first rule that is broken.
    pub(super) fn check_closed(&self) -> Result<(), String> {
        let (dropped, outcomes) = (self.dropped_total(), total(&self.outcomes));
        let rules = [
            (self.issued <= MAX_COUNT, format!("{} issued is beyond any run", self.issued)),
            (
                self.trained.saturating_add(dropped) == self.issued,
                format!("{} trained and {dropped} dropped of {} issued", self.trained, self.issued),
            ),
            (
                self.generated <= self.issued,
                format!("{} generated of {} issued", self.generated, self.issued),
            ),
            (
                self.scored <= self.generated,
                format!("{} scored of {} generated", self.scored, self.generated),
            ),
            (self.trained <= self.scored, format!("{} trained of {} scored", self.trained, self.scored)),
            (outcomes == self.scored, format!("{outcomes} outcomes of {} scored", self.scored)),
        ];
        rules.into_iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, broken)| Err(broken))
    }
}

/// Sum of all counts in a map.
pub(super) fn total<K>(counts: &BTreeMap<K, u64>) -> u64 {
    counts.values().fold(0, |sum, count| sum.saturating_add(*count))
}

/// Adds to one count of a map.
pub(super) fn count_up<K: Ord>(counts: &mut BTreeMap<K, u64>, key: K, by: u64) {
    let count = counts.entry(key).or_default();
    *count = count.saturating_add(by);
}

/// What became of every attempt so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Balance {
    /// Attempts issued.
    pub issued: u64,
    /// Attempts whose reply was sampled.
    pub generated: u64,
    /// Attempts whose reply was scored.
    pub scored: u64,
    /// Attempts that an optimiser step was made from.
    pub trained: u64,
    /// Attempts that were dropped, by reason.
    pub dropped: BTreeMap<DropReason, u64>,
    /// Scored attempts by the name of their outcome.
    pub outcomes: BTreeMap<String, u64>,
    /// Attempts that are neither trained nor dropped yet.
    pub open: u64,
    /// Whether nothing is open and every count agrees.
    pub balanced: bool,
}

impl Balance {
    /// The balance of these counts.
    pub(super) fn of(counts: Counts) -> Self {
        let balanced = counts.check_closed().is_ok();
        let closed = counts.trained.saturating_add(counts.dropped_total());
        Self {
            open: counts.issued.saturating_sub(closed),
            issued: counts.issued,
            generated: counts.generated,
            scored: counts.scored,
            trained: counts.trained,
            dropped: counts.dropped,
            outcomes: counts.outcomes,
            balanced,
        }
    }
}

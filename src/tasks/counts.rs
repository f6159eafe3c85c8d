//! What became of a corpus: every token and mark is a position or has a reason why not.

use serde::{Deserialize, Serialize};
use std::ops::AddAssign;

/// Result of building tasks.
///
/// `tokens` = `positions` + the token reasons of [`Dropped`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskCounts {
    /// Documents read.
    pub documents: u64,
    /// Pieces that documents were cut into.
    pub pieces: u64,
    /// Tokens of those pieces, each counted once (look-ahead is not).
    pub tokens: u64,
    /// Positions that became tasks.
    pub positions: u64,
    /// Those of them that carry a label.
    pub marked_positions: u64,
    /// Documents whose tokens do not spell their exact text (normalisers, unknown characters).
    pub respelled_documents: u64,
    /// Lengths of the pieces in tokens.
    pub lengths: LengthHistogram,
    /// Entropy of the proxy at every position with enough context.
    pub entropy: EntropyHistogram,
    /// What did not become a task, by reason.
    pub dropped: Dropped,
}

impl TaskCounts {
    pub(super) fn new(top_k: usize) -> Self {
        Self {
            documents: 0,
            pieces: 0,
            tokens: 0,
            positions: 0,
            marked_positions: 0,
            respelled_documents: 0,
            lengths: LengthHistogram::default(),
            entropy: EntropyHistogram::new(top_k),
            dropped: Dropped::default(),
        }
    }
}

impl AddAssign<&Self> for TaskCounts {
    fn add_assign(&mut self, part: &Self) {
        self.documents += part.documents;
        self.pieces += part.pieces;
        self.tokens += part.tokens;
        self.positions += part.positions;
        self.marked_positions += part.marked_positions;
        self.respelled_documents += part.respelled_documents;
        self.lengths += &part.lengths;
        for (count, part) in self.entropy.bins.iter_mut().zip(&part.entropy.bins) {
            *count += part;
        }
        self.dropped += &part.dropped;
    }
}

impl AddAssign<&Self> for Dropped {
    fn add_assign(&mut self, part: &Self) {
        self.empty_documents += part.empty_documents;
        self.documents_not_encoded += part.documents_not_encoded;
        self.pieces_too_short += part.pieces_too_short;
        self.pieces_without_position += part.pieces_without_position;
        self.tokens_before_min_context += part.tokens_before_min_context;
        self.tokens_below_min_entropy += part.tokens_below_min_entropy;
        self.tokens_above_max_entropy += part.tokens_above_max_entropy;
        self.tokens_below_top_share += part.tokens_below_top_share;
        self.tokens_below_min_loss_gap += part.tokens_below_min_loss_gap;
        self.tokens_not_drawn += part.tokens_not_drawn;
        self.tokens_over_document_limit += part.tokens_over_document_limit;
        self.tokens_not_finite += part.tokens_not_finite;
        self.marks_off_boundary += part.marks_off_boundary;
        self.marks_repeated += part.marks_repeated;
        self.marks_not_selected += part.marks_not_selected;
    }
}

/// Counts of what did not become a task.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// Documents without a token.
    pub empty_documents: u64,
    /// Documents that the tokenizer refused; their marks are not counted.
    pub documents_not_encoded: u64,
    /// Pieces not longer than the least context.
    pub pieces_too_short: u64,
    /// Longer pieces without a position.
    pub pieces_without_position: u64,
    /// Tokens with too little context before them.
    pub tokens_before_min_context: u64,
    /// Tokens below the entropy band.
    pub tokens_below_min_entropy: u64,
    /// Tokens above the entropy band.
    pub tokens_above_max_entropy: u64,
    /// Tokens inside the band whose entropy is not among the document's highest.
    pub tokens_below_top_share: u64,
    /// Tokens that the larger model does not find enough more probable than the proxy.
    pub tokens_below_min_loss_gap: u64,
    /// Tokens that a random selection did not draw.
    pub tokens_not_drawn: u64,
    /// Candidates beyond `positions_per_document`.
    pub tokens_over_document_limit: u64,
    /// Tokens whose score is not a number.
    pub tokens_not_finite: u64,
    /// Marks that do not fall on the start of a token.
    pub marks_off_boundary: u64,
    /// Marks on a position that carries another mark already.
    pub marks_repeated: u64,
    /// Marks on a position that did not become a task.
    pub marks_not_selected: u64,
}

impl std::fmt::Display for Dropped {
    /// The reasons for tokens, those that occurred.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reasons = [
            (self.tokens_before_min_context, "have too little context"),
            (self.tokens_below_min_entropy, "are below the entropy band"),
            (self.tokens_above_max_entropy, "are above the entropy band"),
            (self.tokens_below_min_loss_gap, "are not predicted enough better by the larger model"),
            (self.tokens_not_drawn, "were not drawn"),
            (self.tokens_not_finite, "have no finite score"),
        ];
        let occurred = reasons.iter().filter(|(count, _)| *count > 0);
        let words: Vec<String> = occurred.map(|(count, reason)| format!("{count} {reason}")).collect();
        formatter.write_str(if words.is_empty() { "none were seen" } else { "" })?;
        formatter.write_str(&words.join(", "))
    }
}

impl Dropped {
    /// Every reason with its count.
    pub fn reasons(&self) -> [(&'static str, u64); 15] {
        [
            ("empty_documents", self.empty_documents),
            ("documents_not_encoded", self.documents_not_encoded),
            ("pieces_too_short", self.pieces_too_short),
            ("pieces_without_position", self.pieces_without_position),
            ("tokens_before_min_context", self.tokens_before_min_context),
            ("tokens_below_min_entropy", self.tokens_below_min_entropy),
            ("tokens_above_max_entropy", self.tokens_above_max_entropy),
            ("tokens_below_top_share", self.tokens_below_top_share),
            ("tokens_below_min_loss_gap", self.tokens_below_min_loss_gap),
            ("tokens_not_drawn", self.tokens_not_drawn),
            ("tokens_over_document_limit", self.tokens_over_document_limit),
            ("tokens_not_finite", self.tokens_not_finite),
            ("marks_off_boundary", self.marks_off_boundary),
            ("marks_repeated", self.marks_repeated),
            ("marks_not_selected", self.marks_not_selected),
        ]
    }
}

/// Counts of lengths: bin b holds those from 2^b up to 2^(b + 1) - 1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LengthHistogram {
    /// Counts per bin, up to the last that is not empty.
    pub bins: Vec<u64>,
}

impl LengthHistogram {
    /// Counts a length of at least 1.
    pub fn add(&mut self, length: usize) {
        let Some(bin) = length.checked_ilog2() else { return };
        let bins = self.bins.len().max(bin as usize + 1);
        self.bins.resize(bins, 0);
        self.bins[bin as usize] += 1;
    }
}

impl AddAssign<&Self> for LengthHistogram {
    fn add_assign(&mut self, part: &Self) {
        self.bins.resize(self.bins.len().max(part.bins.len()), 0);
        for (count, part) in self.bins.iter_mut().zip(&part.bins) {
            *count += part;
        }
    }
}

/// Number of bins of an [`EntropyHistogram`].
const BINS: usize = 64;

/// Counts of entropies in equal bins over [0, ln k], the range of an entropy over k tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EntropyHistogram {
    /// Upper end of the last bin, in nats.
    pub upper: f32,
    /// Counts per bin, ascending.
    pub bins: Vec<u64>,
}

impl EntropyHistogram {
    /// An empty histogram of entropies over `top_k` tokens.
    pub fn new(top_k: usize) -> Self {
        Self { upper: (top_k.max(2) as f32).ln(), bins: vec![0; BINS] }
    }

    /// Counts a finite entropy.
    pub fn add(&mut self, entropy: f32) {
        let bin = (entropy / self.upper * BINS as f32) as usize;
        self.bins[bin.min(BINS - 1)] += 1;
    }

    /// Upper end of the bin in which the given share of the entropies is reached, in nats.
    pub fn quantile(&self, share: f64) -> Option<f32> {
        let total: u64 = self.bins.iter().sum();
        let wanted = ((total as f64 * share).ceil() as u64).max(1);
        let mut reached = 0;
        let bin = self.bins.iter().position(|&count| {
            reached += count;
            reached >= wanted
        })?;
        Some(self.upper * (bin + 1) as f32 / self.bins.len() as f32)
    }

    /// Advice on the entropy band for a corpus without a position.
    pub(super) fn advice(&self) -> String {
        let quantile = |share| self.quantile(share);
        match (quantile(0.5), quantile(0.9), quantile(0.99)) {
            (Some(half), Some(most), Some(nearly_all)) => format!(
                "half of the positions have an entropy up to {half:.2} nats, 90 % up to {most:.2}, 99 % up to \
                 {nearly_all:.2}: set `tasks.min_entropy` and `tasks.max_entropy` accordingly"
            ),
            _ => "no position has `tasks.min_context` tokens before it: use longer documents or lower it"
                .into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_a_uniform_spread() {
        let mut histogram = EntropyHistogram::new(16);
        assert_eq!(histogram.quantile(0.5), None);
        for step in 0..6400 {
            histogram.add(histogram.upper * (step as f32 + 0.5) / 6400.0);
        }
        assert!(histogram.bins.iter().all(|&count| count == 100));
        assert_eq!(histogram.quantile(0.5), Some(histogram.upper / 2.0));
        assert_eq!(histogram.quantile(1.0), Some(histogram.upper));
    }

    #[test]
    fn entropies_at_the_ends_are_counted() {
        let mut histogram = EntropyHistogram::new(16);
        histogram.add(-1e-7);
        histogram.add(16_f32.ln() + 1e-6);
        assert_eq!((histogram.bins[0], histogram.bins[BINS - 1]), (1, 1));
    }

    #[test]
    fn lengths_are_counted_by_powers_of_two() {
        let mut lengths = LengthHistogram::default();
        for length in [1, 2, 3, 4, 7, 8, 0] {
            lengths.add(length);
        }
        assert_eq!(lengths.bins, [1, 2, 2, 1]);
        let mut sum = LengthHistogram { bins: vec![5] };
        sum += &lengths;
        assert_eq!(sum.bins, [6, 2, 2, 1]);
    }

    #[test]
    fn every_reason_is_listed_and_added() {
        let text = serde_json::to_value(Dropped::default()).unwrap();
        let names: Vec<&str> = text.as_object().unwrap().keys().map(String::as_str).collect();
        let one = names.iter().map(|name| ((*name).to_owned(), 1.into())).collect::<serde_json::Map<_, _>>();
        let one: Dropped = serde_json::from_value(one.into()).unwrap();
        let mut two = one.clone();
        two += &one;
        assert_eq!(two.reasons().map(|(_, count)| count), [2; 15]);
        assert_eq!(two.reasons().map(|(name, _)| name).to_vec(), names);
    }

    #[test]
    fn reasons_read_as_words() {
        let dropped = Dropped { tokens_below_min_entropy: 3, tokens_not_drawn: 1, ..Dropped::default() };
        assert_eq!(dropped.to_string(), "3 are below the entropy band, 1 were not drawn");
        assert_eq!(Dropped::default().to_string(), "none were seen");
    }
}

//! Which positions of a document are worth thinking about.

use super::counts::TaskCounts;
use super::{Position, draw};
use crate::config::{Selection, TasksConfig};
use std::collections::BTreeMap;

/// What a proxy model says of one position, given everything before it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PositionScore {
    /// Entropy over the k most probable next tokens, renormalised, in nats.
    pub entropy: f32,
    /// Probability of the true token over the whole vocabulary.
    pub truth_probability: f32,
    /// The most probable token (of equals, the lowest id).
    pub proxy_top: u32,
}

/// A model that scores positions of text.
pub trait Proxy: Sync {
    /// Scores every token of every piece. A piece is a sequence of token ids with its header;
    /// `scores[i][j]` is the score of token j of piece i given the tokens before it. Nothing comes
    /// before token 0: its score is [`PositionScore::default`].
    ///
    /// # Errors
    /// Fails when the model cannot be run.
    fn score(&self, pieces: &[Vec<u32>], top_k: usize) -> Result<Vec<Vec<PositionScore>>, crate::Error>;
}

/// Scores one row of logits over the vocabulary against the true token.
pub fn score_row(logits: &[f32], truth: u32, top_k: usize) -> PositionScore {
    let best = most_probable(logits, top_k);
    let Some(&(top_logit, proxy_top)) = best.first() else { return PositionScore::default() };
    let total: f64 = logits.iter().map(|&logit| f64::from((logit - top_logit).exp())).sum();
    let truth = logits.get(truth as usize).map_or(0.0, |&logit| f64::from(logit - top_logit).exp());
    PositionScore { entropy: entropy_of(&best), truth_probability: (truth / total) as f32, proxy_top }
}

/// Entropy in nats of softmax(logits), restricted to its `k` most probable tokens and
/// renormalised: H = -sum p ln p with p = exp(l) / sum of exp(l) over those k. Between 0 and
/// ln k; NaN if a logit among them is not finite.
pub fn top_k_entropy(logits: &[f32], k: usize) -> f32 {
    entropy_of(&most_probable(logits, k))
}

/// With m the largest logit and Z = sum exp(l - m): H = ln Z - sum exp(l - m) (l - m) / Z.
fn entropy_of(best: &[(f32, u32)]) -> f32 {
    let Some(&(top, _)) = best.first() else { return 0.0 };
    let (mut total, mut weighted) = (0.0_f64, 0.0_f64);
    for &(logit, _) in best {
        let distance = f64::from(logit) - f64::from(top);
        let weight = distance.exp();
        total += weight;
        // An impossible token adds nothing: x exp(x) tends to 0.
        if distance != f64::NEG_INFINITY {
            weighted += weight * distance;
        }
    }
    let entropy = total.ln() - weighted / total;
    // Not `max`, which would turn NaN into 0.
    if entropy < 0.0 { 0.0 } else { entropy as f32 }
}

/// The `k` largest logits with their ids, descending, lower ids first among equals. A NaN counts
/// as the largest, so that it shows in the result.
fn most_probable(logits: &[f32], k: usize) -> Vec<(f32, u32)> {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(k.min(logits.len()) + 1);
    for (&logit, id) in logits.iter().zip(0..) {
        // Nearly every logit of a large vocabulary fails this test.
        if best.len() >= k && best.last().is_none_or(|&(worst, _)| logit <= worst) {
            continue;
        }
        let place = best.partition_point(|&(better, _)| better.is_nan() || better >= logit);
        let place = if logit.is_nan() { 0 } else { place };
        best.insert(place, (logit, id));
        best.truncate(k);
    }
    best
}

/// One scored piece of a document.
pub(super) struct Scored<'a> {
    /// The piece's name, which keys its draws.
    pub(super) id: &'a str,
    /// Scores of the piece's own tokens.
    pub(super) scores: &'a [PositionScore],
    /// Labels by token index.
    pub(super) marks: &'a BTreeMap<u32, String>,
}

/// The rule by which positions are chosen.
pub(super) struct Rule<'a> {
    pub(super) settings: &'a TasksConfig,
    pub(super) seed: u64,
    /// Scores come from a proxy.
    pub(super) is_scored: bool,
    /// Marked positions are kept whatever their score.
    pub(super) keep_marked: bool,
}

/// Keys of the two kinds of draws, so that they are independent.
const RANDOM_SHARE: u64 = 1;
const DOCUMENT_LIMIT: u64 = 2;

impl Rule<'_> {
    /// Chooses the positions of a piece, ascending, and counts what it leaves.
    pub(super) fn choose(&self, piece: &Scored<'_>, counts: &mut TaskCounts) -> Vec<Position> {
        let document = draw::word_of(piece.id);
        let (mut kept, mut candidates) = (Vec::new(), Vec::new());
        for (score, index) in piece.scores.iter().zip(0_u32..) {
            let is_kept = self.keep_marked && index > 0 && piece.marks.contains_key(&index);
            // Evaluated for marked positions too, because it counts the entropy.
            let reason = self.refusal(document, index, score, counts);
            match reason {
                _ if is_kept && score.entropy.is_finite() => kept.push(index),
                None => candidates.push(index),
                Some(reason) => *reason += 1,
            }
        }
        candidates.sort_by_cached_key(|&index| {
            draw::bits(&[self.seed, DOCUMENT_LIMIT, document, u64::from(index)])
        });
        let over_limit = candidates.len().saturating_sub(self.settings.positions_per_document);
        counts.dropped.tokens_over_document_limit += over_limit as u64;
        candidates.truncate(self.settings.positions_per_document);
        kept.extend(candidates);
        kept.sort_unstable();
        kept.into_iter().map(|index| position(piece, index)).collect()
    }

    /// The counter of the reason why a token is no candidate, if there is a reason.
    fn refusal<'c>(
        &self,
        document: u64,
        index: u32,
        score: &PositionScore,
        counts: &'c mut TaskCounts,
    ) -> Option<&'c mut u64> {
        let (settings, dropped) = (self.settings, &mut counts.dropped);
        if (index as usize) < settings.min_context.max(1) {
            return Some(&mut dropped.tokens_before_min_context);
        }
        if !score.entropy.is_finite() || !score.truth_probability.is_finite() {
            return Some(&mut dropped.tokens_not_finite);
        }
        if self.is_scored {
            counts.entropy.add(score.entropy);
        }
        match settings.selection {
            Selection::Entropy if score.entropy <= settings.min_entropy => {
                Some(&mut dropped.tokens_below_min_entropy)
            }
            Selection::Entropy if score.entropy >= settings.max_entropy => {
                Some(&mut dropped.tokens_above_max_entropy)
            }
            Selection::Random if !self.is_drawn(document, index) => Some(&mut dropped.tokens_not_drawn),
            Selection::Entropy | Selection::Random | Selection::All => None,
        }
    }

    fn is_drawn(&self, document: u64, index: u32) -> bool {
        let key = [self.seed, RANDOM_SHARE, document, u64::from(index)];
        draw::uniform(&key) < f64::from(self.settings.random_share)
    }
}

fn position(piece: &Scored<'_>, index: u32) -> Position {
    let score = piece.scores[index as usize];
    Position {
        index,
        entropy: score.entropy,
        truth_probability: score.truth_probability,
        proxy_top: score.proxy_top,
        label: piece.marks.get(&index).cloned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reference_entropy(logits: &[f32], k: usize) -> f64 {
        let mut sorted: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted.truncate(k);
        let total: f64 = sorted.iter().map(|logit| logit.exp()).sum();
        sorted.iter().map(|logit| logit.exp() / total).map(|p| -p * p.ln()).sum()
    }

    proptest! {
        #[test]
        fn agrees_with_the_definition(logits in prop::collection::vec(-20.0_f32..20.0, 1..200), k in 1_usize..40) {
            let entropy = f64::from(top_k_entropy(&logits, k));
            prop_assert!((entropy - reference_entropy(&logits, k)).abs() < 1e-5);
            let score = score_row(&logits, 0, k);
            let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
            let truth = f64::from(logits[0]).exp() / total;
            prop_assert!((f64::from(score.truth_probability) - truth).abs() < 1e-6);
            let top = logits[score.proxy_top as usize];
            prop_assert!(logits.iter().all(|&logit| logit <= top));
        }
    }

    #[test]
    fn uniform_logits_have_the_largest_entropy() {
        for k in [1, 2, 16] {
            assert!((top_k_entropy(&[3.0; 1000], k) - (k as f32).ln()).abs() < 1e-6);
        }
        assert!((top_k_entropy(&[0.0; 4], 16) - 4_f32.ln()).abs() < 1e-6);
    }

    #[test]
    fn odd_rows_are_told_from_ordinary_ones() {
        assert_eq!(top_k_entropy(&[], 16), 0.0);
        assert_eq!(top_k_entropy(&[5.0, f32::NEG_INFINITY], 2), 0.0);
        assert!(top_k_entropy(&[1.0, f32::NAN, 2.0], 2).is_nan());
        assert!(top_k_entropy(&[f32::NEG_INFINITY; 4], 2).is_nan());
        assert_eq!(score_row(&[1.0, 7.0, 7.0], 99, 2).truth_probability, 0.0);
        assert_eq!(score_row(&[1.0, 7.0, 7.0], 0, 2).proxy_top, 1);
    }

    fn scores(entropies: &[f32]) -> Vec<PositionScore> {
        entropies
            .iter()
            .map(|&entropy| PositionScore { entropy, truth_probability: 0.5, proxy_top: 1 })
            .collect()
    }

    fn chosen(
        settings: &TasksConfig,
        seed: u64,
        keep_marked: bool,
        scores: &[PositionScore],
    ) -> (Vec<u32>, TaskCounts) {
        let marks = BTreeMap::from([(1, "one".to_owned()), (3, "three".to_owned())]);
        let mut counts = TaskCounts::new(16);
        let rule = Rule { settings, seed, is_scored: true, keep_marked };
        let positions = rule.choose(&Scored { id: "document", scores, marks: &marks }, &mut counts);
        (positions.iter().map(|position| position.index).collect(), counts)
    }

    #[test]
    fn the_entropy_band_is_open_at_both_ends() {
        let settings =
            TasksConfig { min_context: 2, min_entropy: 1.0, max_entropy: 2.0, ..TasksConfig::default() };
        let scores = scores(&[1.5, 1.5, 1.0, 1.1, 2.0, 1.9, 0.1, f32::NAN]);
        let (positions, counts) = chosen(&settings, 0, false, &scores);
        assert_eq!(positions, [3, 5]);
        let dropped = &counts.dropped;
        assert_eq!((dropped.tokens_before_min_context, dropped.tokens_not_finite), (2, 1));
        assert_eq!((dropped.tokens_below_min_entropy, dropped.tokens_above_max_entropy), (2, 1));
        assert_eq!(chosen(&settings, 0, true, &scores).0, [1, 3, 5]);
    }

    #[test]
    fn the_limit_draws_without_preference_and_repeatably() {
        let settings = TasksConfig { min_context: 1, positions_per_document: 8, ..TasksConfig::default() };
        let scores = scores(&[1.5; 101]);
        let mut hits = [0_u32; 101];
        for seed in 0..500 {
            let (positions, counts) = chosen(&settings, seed, false, &scores);
            assert_eq!(positions, chosen(&settings, seed, false, &scores).0);
            assert_eq!((positions.len(), counts.dropped.tokens_over_document_limit), (8, 92));
            for index in positions {
                hits[index as usize] += 1;
            }
        }
        assert!(hits[1..].iter().all(|&count| (15..75).contains(&count)), "{hits:?}");
    }

    #[test]
    fn a_random_selection_keeps_its_share() {
        let settings = TasksConfig {
            selection: Selection::Random,
            random_share: 0.25,
            min_context: 0,
            positions_per_document: usize::MAX,
            ..TasksConfig::default()
        };
        let (positions, counts) = chosen(&settings, 3, false, &scores(&[0.0; 4001]));
        assert!((900..1100).contains(&positions.len()), "{}", positions.len());
        assert_eq!(positions.len() as u64 + counts.dropped.tokens_not_drawn, 4000);
    }
}

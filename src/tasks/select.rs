//! Which positions of a document are worth thinking about.

use super::counts::TaskCounts;
use super::draw::Draws;
use super::{Position, PositionScore, draw};
use crate::config::{Selection, TasksConfig};
use std::collections::BTreeMap;

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

/// Names of three tiers; others are numbered.
const TIERS: [&str; 3] = ["easy", "medium", "hard"];

impl Rule<'_> {
    /// Chooses the positions of a piece, ascending, and counts what it leaves.
    pub(super) fn choose(&self, piece: &Scored<'_>, counts: &mut TaskCounts) -> Vec<Position> {
        let document = draw::word_of(piece.id);
        let share = Draws::new(&[self.seed, RANDOM_SHARE, document]);
        let (mut kept, mut candidates) = (Vec::new(), Vec::new());
        for (score, index) in piece.scores.iter().zip(0_u32..) {
            let is_kept = self.keep_marked && index > 0 && piece.marks.contains_key(&index);
            // Evaluated for marked positions too, because it counts the entropy.
            let reason = self.refusal(share, index, score, counts);
            match reason {
                _ if is_kept && score.entropy.is_finite() => kept.push(index),
                None => candidates.push(index),
                Some(reason) => *reason += 1,
            }
        }
        if self.settings.selection == Selection::Entropy {
            self.keep_top_share(piece, &mut candidates, counts);
        }
        let found = candidates.len();
        let chosen = self.limit(document, piece, candidates);
        counts.dropped.tokens_over_document_limit += (found - chosen.len()) as u64;
        kept.extend(chosen);
        kept.sort_unstable();
        kept.into_iter().map(|index| self.position(piece, index)).collect()
    }

    /// The counter of the reason why a token is no candidate, if there is a reason.
    fn refusal<'c>(
        &self,
        share: Draws,
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
        let by_entropy = matches!(settings.selection, Selection::Entropy | Selection::Tiers);
        match settings.selection {
            _ if by_entropy && score.entropy <= settings.min_entropy => {
                Some(&mut dropped.tokens_below_min_entropy)
            }
            Selection::Entropy | Selection::Tiers | Selection::LossGap
                if score.entropy >= settings.max_entropy =>
            {
                Some(&mut dropped.tokens_above_max_entropy)
            }
            Selection::LossGap if score.loss_gap().is_nan() || score.loss_gap() < settings.min_loss_gap => {
                Some(&mut dropped.tokens_below_min_loss_gap)
            }
            Selection::Random if share.uniform(u64::from(index)) >= f64::from(settings.random_share) => {
                Some(&mut dropped.tokens_not_drawn)
            }
            _ => None,
        }
    }

    /// Keeps the share of the candidates with the highest entropy; of equals, the earlier.
    fn keep_top_share(&self, piece: &Scored<'_>, candidates: &mut Vec<u32>, counts: &mut TaskCounts) {
        // In single precision, in which a share such as 0.4 of 5 is 2.
        let kept = (candidates.len() as f32 * self.settings.top_share).ceil() as usize;
        if kept >= candidates.len() {
            return;
        }
        let entropy = |index: &u32| piece.scores[*index as usize].entropy;
        candidates.sort_by(|a, b| entropy(b).total_cmp(&entropy(a)));
        counts.dropped.tokens_below_top_share += (candidates.len() - kept) as u64;
        candidates.truncate(kept);
    }

    /// At most `positions_per_document` candidates, the first in order of a draw; of tiers, equally many of
    /// each as far as they go.
    fn limit(&self, document: u64, piece: &Scored<'_>, mut candidates: Vec<u32>) -> Vec<u32> {
        candidates.sort_by_cached_key(|&index| {
            draw::bits(&[self.seed, DOCUMENT_LIMIT, document, u64::from(index)])
        });
        if self.settings.selection == Selection::Tiers {
            let mut taken = vec![0_usize; self.settings.tiers.len() + 1];
            candidates.sort_by_cached_key(|&index| {
                let taken = &mut taken[self.tier(&piece.scores[index as usize])];
                *taken += 1;
                *taken
            });
        }
        candidates.truncate(self.settings.positions_per_document);
        candidates
    }

    /// The tier of a position: the number of bounds that its entropy has passed.
    fn tier(&self, score: &PositionScore) -> usize {
        self.settings.tiers.iter().take_while(|&&bound| score.entropy > bound).count()
    }

    fn position(&self, piece: &Scored<'_>, index: u32) -> Position {
        let score = piece.scores[index as usize];
        let tier = || (self.settings.selection == Selection::Tiers).then(|| self.tier_name(&score));
        Position {
            index,
            entropy: score.entropy,
            truth_probability: score.truth_probability,
            proxy_top: score.proxy_top,
            label: piece.marks.get(&index).cloned().or_else(tier),
        }
    }

    fn tier_name(&self, score: &PositionScore) -> String {
        let (tier, bounds) = (self.tier(score), self.settings.tiers.len());
        if bounds + 1 == TIERS.len() { TIERS[tier].to_owned() } else { format!("tier {}", tier + 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(entropies: &[f32]) -> Vec<PositionScore> {
        entropies
            .iter()
            .map(|&entropy| PositionScore {
                entropy,
                truth_probability: 0.5,
                proxy_top: 1,
                ..PositionScore::default()
            })
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
    fn the_top_share_is_of_those_inside_the_bounds() {
        let settings = TasksConfig { min_context: 1, top_share: 0.4, ..TasksConfig::default() };
        let scores = scores(&[0.0, 1.1, 2.4, 1.2, 2.2, 1.3, 3.0, 0.2]);
        let (positions, counts) = chosen(&settings, 0, false, &scores);
        assert_eq!((positions, counts.dropped.tokens_below_top_share), (vec![2, 4], 3));
    }

    #[test]
    fn tiers_share_the_positions_of_a_document() {
        let settings = TasksConfig {
            selection: Selection::Tiers,
            min_context: 1,
            positions_per_document: 6,
            ..TasksConfig::default()
        };
        // Twenty easy positions, one of medium and four of high entropy.
        let entropies = [&[0.0][..], &[1.2; 20], &[1.7], &[2.3; 4], &[0.5, 9.0]].concat();
        let scores = scores(&entropies);
        let mut counts = TaskCounts::new(16);
        let rule = Rule { settings: &settings, seed: 1, is_scored: true, keep_marked: false };
        let piece = Scored { id: "document", scores: &scores, marks: &BTreeMap::new() };
        let positions = rule.choose(&piece, &mut counts);
        let labelled = |label: &str| positions.iter().filter(|p| p.label.as_deref() == Some(label)).count();
        // Three of one tier at most, since the second has but one; the first five places are two, one and two.
        assert_eq!((labelled("medium"), labelled("easy") + labelled("hard")), (1, 5));
        assert!(labelled("easy").abs_diff(labelled("hard")) == 1);
        assert_eq!(counts.dropped.tokens_over_document_limit, 25 - 6);
    }

    #[test]
    fn a_loss_gap_asks_for_a_larger_model_that_knows_better() {
        let settings = TasksConfig {
            selection: Selection::LossGap,
            min_context: 1,
            min_loss_gap: 0.5,
            ..TasksConfig::default()
        };
        let mut scores = scores(&[1.0, 0.1, 2.0, 2.6, 1.0, 1.0]);
        for (score, larger) in scores.iter_mut().zip([0.9, 0.9, 0.83, 0.9, 0.8, f32::NAN]) {
            score.larger_truth_probability = Some(larger);
        }
        // ln(0.83 / 0.5) = 0.507 and ln(0.8 / 0.5) = 0.47; the fourth is above the cap on the entropy.
        let (positions, counts) = chosen(&settings, 0, false, &scores);
        assert_eq!(positions, [1, 2]);
        assert_eq!(counts.dropped.tokens_below_min_loss_gap, 2);
        assert_eq!(counts.dropped.tokens_above_max_entropy, 1);
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

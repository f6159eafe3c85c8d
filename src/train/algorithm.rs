//! Group-relative policy optimisation (arXiv 2402.03300): from scored groups to per-token streams.

use super::batch::{Component, MicroBatch, Target, cut};
use super::loss::token_weights;
use crate::config::LossMean;
use crate::model::Forest;
use crate::rollout::{Prompt, Rollout, add_trunk};
use std::sync::Arc;

/// A task's rollouts with their advantages.
#[derive(Clone, Debug)]
pub struct ScoredGroup<'a> {
    /// What the rollouts continue.
    pub prompt: &'a Prompt,
    /// The rollouts.
    pub rollouts: &'a [Rollout],
    /// One advantage for each rollout.
    pub advantages: Vec<f32>,
}

impl ScoredGroup<'_> {
    fn tokens(&self) -> usize {
        let replies: usize = self.rollouts.iter().map(|rollout| rollout.tokens.len()).sum();
        self.prompt.footer.len() + replies
    }
}

/// Packs groups into micro-batches. Groups of one trunk stand together: the trunk is computed
/// once for all their rollouts. With `ntp_weight`, trunk tokens also carry a next-token loss.
pub fn policy_batches(
    groups: &[ScoredGroup],
    mean: LossMean,
    max_new_tokens: usize,
    ntp_weight: f32,
    tokens_per_micro_batch: usize,
) -> Vec<MicroBatch> {
    let lengths: Vec<usize> =
        groups.iter().flat_map(|group| group.rollouts.iter().map(|rollout| rollout.tokens.len())).collect();
    let weights = token_weights(&lengths, mean, max_new_tokens);
    let families: Vec<&[ScoredGroup]> =
        groups.chunk_by(|a, b| Arc::ptr_eq(&a.prompt.trunk, &b.prompt.trunk)).collect();
    let trunk_targets: usize = families.iter().map(|family| trunk_targets(family)).sum();
    let ntp_weight = ntp_weight / trunk_targets.max(1) as f32;
    let sizes: Vec<usize> = families
        .iter()
        .map(|family| trunk_length(family) + family.iter().map(ScoredGroup::tokens).sum::<usize>())
        .collect();
    let mut weights = weights.into_iter();
    cut(&sizes, tokens_per_micro_batch)
        .into_iter()
        .map(|part| {
            let mut batch = MicroBatch::default();
            for family in &families[part] {
                add_family(&mut batch, family, &mut weights, ntp_weight);
            }
            batch
        })
        .collect()
}

fn trunk_length(family: &[ScoredGroup]) -> usize {
    family.iter().map(|group| group.prompt.length).max().unwrap_or(0)
}

/// Trunk tokens that carry a next-token loss: those of the document that something precedes.
fn trunk_targets(family: &[ScoredGroup]) -> usize {
    trunk_length(family).saturating_sub(first_trunk_target(family))
}

fn first_trunk_target(family: &[ScoredGroup]) -> usize {
    family.first().map_or(1, |group| group.prompt.header.max(1))
}

fn add_family(
    batch: &mut MicroBatch,
    family: &[ScoredGroup],
    weights: &mut impl Iterator<Item = f32>,
    ntp_weight: f32,
) {
    let lengths = family.iter().map(|group| group.prompt.length);
    let ends = add_trunk(&mut batch.forest, family[0].prompt, lengths);
    if ntp_weight > 0.0 {
        let first = first_trunk_target(family);
        for segment in ends.values() {
            add_trunk_targets(batch, *segment, first, ntp_weight);
        }
    }
    for group in family {
        let parent = ends.get(&group.prompt.length).copied();
        let footer = batch.forest.add(parent, &group.prompt.footer);
        for (rollout, advantage) in group.rollouts.iter().zip(&group.advantages) {
            let weight = weights.next().unwrap_or(0.0);
            add_rollout(batch, footer, rollout, *advantage, weight);
        }
    }
}

fn add_trunk_targets(batch: &mut MicroBatch, segment: usize, first: usize, weight: f32) {
    let place = batch.forest.segments()[segment].clone();
    for at in 0..place.length {
        if place.position + at >= first {
            let token = batch.forest.ids()[place.row + at];
            batch.targets.push(Target { segment, at, token, component: Component::Likelihood { weight } });
        }
    }
}

/// A reply as a leaf: its last token is only predicted, never read.
fn add_rollout(batch: &mut MicroBatch, parent: usize, rollout: &Rollout, advantage: f32, weight: f32) {
    let Some((_, read)) = rollout.tokens.split_last() else { return };
    let forest: &mut Forest = &mut batch.forest;
    let segment = forest.add(Some(parent), read);
    for (at, token) in rollout.tokens.iter().enumerate() {
        let component = Component::Policy {
            weight,
            advantage,
            old_logprob: rollout.policy_logprobs[at],
            engine_logprob: rollout.logprobs[at],
        };
        batch.targets.push(Target { segment, at, token: *token, component });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::Finish;

    fn prompt(trunk: &Arc<[u32]>, length: usize, header: usize) -> Prompt {
        Prompt {
            ordinal: 0,
            trunk: Arc::clone(trunk),
            length,
            header,
            footer: [7, 8].into(),
            cuts: [].into(),
        }
    }

    fn rollout() -> Rollout {
        Rollout {
            ordinal: 0,
            sample: 0,
            tokens: vec![1, 2],
            logprobs: vec![-1.0; 2],
            policy_logprobs: vec![-1.0; 2],
            sampling_logprobs: vec![-1.0; 2],
            finish: Finish::Eos,
            policy_version: 0,
        }
    }

    /// The next-token loss is a mean over the document tokens of all trunks, whatever the header.
    #[test]
    fn next_token_weights_add_up_to_the_setting() {
        let rollouts = [rollout()];
        for header in [0, 1, 5] {
            let trunks: [Arc<[u32]>; 2] = [(0..30).collect(), (10..22).collect()];
            let prompts = [
                prompt(&trunks[0], 9, header),
                prompt(&trunks[0], 28, header),
                prompt(&trunks[1], 11, header),
            ];
            let groups: Vec<ScoredGroup> = prompts
                .iter()
                .map(|prompt| ScoredGroup { prompt, rollouts: &rollouts, advantages: vec![1.0] })
                .collect();
            let batches = policy_batches(&groups, LossMean::Token, 4, 0.5, 1000);
            let weights: Vec<f32> = batches
                .iter()
                .flat_map(|batch| &batch.targets)
                .filter_map(|target| match target.component {
                    Component::Likelihood { weight } => Some(weight),
                    Component::Policy { .. } => None,
                })
                .collect();
            assert_eq!(weights.len(), 28 + 11 - 2 * header.max(1));
            assert!((weights.iter().sum::<f32>() - 0.5).abs() < 1e-6, "header {header}");
        }
    }
}

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
    let trunk_tokens: usize = families.iter().map(|family| trunk_length(family)).sum();
    let ntp_weight = ntp_weight / trunk_tokens.max(1) as f32;
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

fn add_family(
    batch: &mut MicroBatch,
    family: &[ScoredGroup],
    weights: &mut impl Iterator<Item = f32>,
    ntp_weight: f32,
) {
    let lengths = family.iter().map(|group| group.prompt.length);
    let trunk = &family[0].prompt.trunk;
    let ends = add_trunk(&mut batch.forest, trunk, lengths);
    if ntp_weight > 0.0 {
        let header = family[0].prompt.header;
        for segment in ends.values() {
            add_trunk_targets(batch, *segment, header, ntp_weight);
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

fn add_trunk_targets(batch: &mut MicroBatch, segment: usize, header: usize, weight: f32) {
    let place = batch.forest.segments()[segment].clone();
    for at in 0..place.length {
        if place.position + at >= header.max(1) {
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

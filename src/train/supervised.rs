//! Supervised stages: next-token pre-training and learning from traces.

use super::batch::{Component, MicroBatch, Target, cut};

/// A sequence whose tokens from `first_target` on are to be predicted.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// First token that is predicted (at least 1: nothing predicts the first token of all).
    pub first_target: usize,
    /// Weight of this example's kind; each kind's loss is a mean over its tokens.
    pub weight: f32,
}

impl Example {
    /// Tokens that are predicted.
    pub fn targets(&self) -> usize {
        self.ids.len().saturating_sub(self.first_target.max(1))
    }
}

/// Packs kinds of examples into micro-batches; the loss is the sum over kinds of
/// (weight x mean over the kind's target tokens).
pub fn supervised_batches(kinds: &[Vec<Example>], tokens_per_micro_batch: usize) -> Vec<MicroBatch> {
    let weighted: Vec<(&Example, f32)> = kinds
        .iter()
        .flat_map(|examples| {
            let targets: usize = examples.iter().map(Example::targets).sum();
            examples.iter().map(move |example| (example, example.weight / targets.max(1) as f32))
        })
        .collect();
    let sizes: Vec<usize> = weighted.iter().map(|(example, _)| example.ids.len()).collect();
    cut(&sizes, tokens_per_micro_batch)
        .into_iter()
        .map(|part| {
            let mut batch = MicroBatch::default();
            for (example, weight) in &weighted[part] {
                add_example(&mut batch, example, *weight);
            }
            batch
        })
        .collect()
}

fn add_example(batch: &mut MicroBatch, example: &Example, weight: f32) {
    let Some((_, read)) = example.ids.split_last() else { return };
    let segment = batch.forest.add(None, read);
    for at in example.first_target.max(1)..example.ids.len() {
        let component = Component::Likelihood { weight };
        batch.targets.push(Target { segment, at, token: example.ids[at], component });
    }
}

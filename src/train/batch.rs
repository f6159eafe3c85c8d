//! What the trainer executes: forests with targets.

use crate::model::Forest;
#[cfg(feature = "cuda")]
use std::borrow::Cow;

/// How a target enters the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Component {
    /// `-weight x log-probability` at temperature 1: next-token prediction and traces.
    Likelihood {
        /// Share of the token in the loss.
        weight: f32,
    },
    /// `weight x policy loss` of a sampled token.
    Policy {
        /// Share of the token in the loss.
        weight: f32,
        /// Advantage of its rollout.
        advantage: f32,
        /// The engine's log-probability under the policy that sampled it.
        old_logprob: f32,
        /// The engine's log-probability at temperature 1.
        engine_logprob: f32,
    },
}

/// A token to predict.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Segment of the forest that the token belongs to.
    pub segment: usize,
    /// Its place in the segment; the prediction comes from the token before it on the path.
    pub at: usize,
    /// The token.
    pub token: u32,
    /// How it enters the loss.
    pub component: Component,
}

/// A forest with targets: the unit of one forward and backward pass.
#[derive(Clone, Debug, Default)]
pub struct MicroBatch {
    /// The tokens.
    pub forest: Forest,
    /// What is to be predicted.
    pub targets: Vec<Target>,
}

impl MicroBatch {
    /// Parts of at most `tokens` tokens, or of a single path, that have the same targets together. Segments that several
    /// parts need are in each of them: what is shared is computed more than once, and the sum of the gradients stays.
    #[cfg(feature = "cuda")]
    pub(super) fn split(&self, tokens: usize) -> Cow<'_, [Self]> {
        if self.forest.ids().len() <= tokens {
            return Cow::Borrowed(std::slice::from_ref(self));
        }
        match self.halves() {
            None => Cow::Borrowed(std::slice::from_ref(self)),
            Some(halves) => halves.iter().flat_map(|half| half.split(tokens).into_owned()).collect(),
        }
    }

    /// Two parts whose leaves have about as many tokens.
    #[cfg(feature = "cuda")]
    fn halves(&self) -> Option<[Self; 2]> {
        let segments = self.forest.segments();
        let mut is_leaf = vec![true; segments.len()];
        segments.iter().filter_map(|segment| segment.parent).for_each(|parent| is_leaf[parent] = false);
        let leaves: Vec<usize> = (0..segments.len()).filter(|segment| is_leaf[*segment]).collect();
        if leaves.len() < 2 {
            return None;
        }
        let total: usize = leaves.iter().map(|leaf| segments[*leaf].length).sum();
        let mut sum = 0;
        let in_first = leaves.iter().take_while(|leaf| {
            sum += segments[**leaf].length;
            2 * sum <= total
        });
        let middle = in_first.count().clamp(1, leaves.len() - 1);
        let mut taken = vec![false; segments.len()];
        Some([&leaves[..middle], &leaves[middle..]].map(|leaves| self.part(leaves, &mut taken)))
    }

    /// The paths to some leaves, with the targets of those segments that no part has taken.
    #[cfg(feature = "cuda")]
    fn part(&self, leaves: &[usize], taken: &mut [bool]) -> Self {
        let segments = self.forest.segments();
        let mut wanted = vec![false; segments.len()];
        for leaf in leaves {
            let mut next = Some(*leaf);
            while let Some(segment) = next.filter(|segment| !wanted[*segment]) {
                wanted[segment] = true;
                next = segments[segment].parent;
            }
        }
        let (mut part, mut numbers) = (Self::default(), vec![0; segments.len()]);
        for (number, segment) in segments.iter().enumerate().filter(|(number, _)| wanted[*number]) {
            let parent = segment.parent.map(|parent| numbers[parent]);
            let ids = &self.forest.ids()[segment.row..segment.row + segment.length];
            numbers[number] = part.forest.add(parent, ids);
        }
        let own = self.targets.iter().filter(|target| wanted[target.segment] && !taken[target.segment]);
        part.targets = own.map(|target| Target { segment: numbers[target.segment], ..*target }).collect();
        taken.iter_mut().zip(wanted).for_each(|(taken, wanted)| *taken |= wanted);
        part
    }
}

/// Micro-batches that a step is cut into at least, so that gradient lanes have equal work.
const PARTS: usize = 4;

/// Cuts items of known sizes into runs of about equal size, none above `limit` unless a single
/// item is: a pure function of the sizes.
pub(super) fn cut(sizes: &[usize], limit: usize) -> Vec<std::ops::Range<usize>> {
    let total: usize = sizes.iter().sum();
    let limit = limit.min(total.div_ceil(PARTS)).max(1);
    let (mut parts, mut start, mut sum) = (Vec::new(), 0, 0);
    for (at, size) in sizes.iter().enumerate() {
        if sum > 0 && sum + size > limit {
            parts.push(start..at);
            (start, sum) = (at, 0);
        }
        sum += size;
    }
    if start < sizes.len() {
        parts.push(start..sizes.len());
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_everything_once_and_respect_the_limit() {
        let sizes = [5, 1, 9, 30, 2, 2, 2, 2, 8, 1];
        let parts = cut(&sizes, 10);
        let covered: Vec<usize> = parts.iter().cloned().flatten().collect();
        assert_eq!(covered, (0..sizes.len()).collect::<Vec<_>>());
        for part in parts {
            let sum: usize = sizes[part.clone()].iter().sum();
            assert!(sum <= 10 || part.len() == 1);
        }
        assert!(cut(&[], 10).is_empty());
    }

    #[cfg(feature = "cuda")]
    #[test]
    fn parts_of_a_micro_batch_have_its_targets_on_the_same_paths() {
        let mut batch = MicroBatch::default();
        for tree in 0..3 {
            let trunk = batch.forest.add(None, &[tree; 7]);
            let footer = batch.forest.add(Some(trunk), &[10 + tree; 2]);
            for reply in 0..4 {
                batch.forest.add(Some(footer), &vec![20 + reply; 3 + reply as usize]);
            }
        }
        let component = Component::Likelihood { weight: 1.0 };
        for (segment, place) in batch.forest.segments().iter().enumerate() {
            let target = |at| Target { segment, at, token: (10 * segment + at) as u32, component };
            batch.targets.extend((1..=place.length).map(target));
        }
        let path = |batch: &MicroBatch, target: &Target| {
            let (mut ids, mut next) = (Vec::new(), Some(target.segment));
            while let Some(segment) = next {
                let place = &batch.forest.segments()[segment];
                ids.push(batch.forest.ids()[place.row..place.row + place.length].to_vec());
                next = place.parent;
            }
            (target.token, target.at, ids)
        };
        let targets =
            |batch: &MicroBatch| batch.targets.iter().map(|target| path(batch, target)).collect::<Vec<_>>();
        let mut expected = targets(&batch);
        expected.sort();
        for limit in [usize::MAX, 60, 30, 20, 1] {
            let parts = batch.split(limit);
            assert!(parts.iter().all(|part| part.forest.ids().len() <= limit.max(15)), "{limit}");
            let mut found: Vec<_> = parts.iter().flat_map(targets).collect();
            found.sort();
            assert_eq!(found, expected, "{limit}");
        }
    }
}

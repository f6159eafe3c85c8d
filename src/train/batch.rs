//! What the trainer executes: forests with targets.

use crate::model::Forest;

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
    /// The segments `path`, computed before, and then `own`, with the targets that rows of the latter predict. Parents stand
    /// in front of their children.
    pub(super) fn excerpt(&self, path: &[usize], own: &[usize]) -> Self {
        let segments = self.forest.segments();
        let (mut excerpt, mut numbers) = (Self::default(), vec![None; segments.len()]);
        for segment in path.iter().chain(own) {
            let place = &segments[*segment];
            let parent = place.parent.and_then(|parent| numbers[parent]);
            let ids = &self.forest.ids()[place.row..place.row + place.length];
            numbers[*segment] = Some(excerpt.forest.add(parent, ids));
        }
        let targets = self.targets.iter().filter_map(|target| {
            let (segment, at) = self.forest.end_before(target.segment, target.at)?;
            let segment = numbers[segment].filter(|number| *number >= path.len())?;
            Some(Target { segment, at, ..*target })
        });
        excerpt.targets = targets.collect();
        excerpt
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
    use crate::model::Schedule;

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

    /// The tokens on the path to a target's prediction, and the target.
    fn path(batch: &MicroBatch, target: &Target) -> (Vec<Vec<u32>>, u32) {
        let (mut ids, mut next) = (Vec::new(), batch.forest.end_before(target.segment, target.at));
        while let Some((segment, at)) = next {
            let place = &batch.forest.segments()[segment];
            ids.push(batch.forest.ids()[place.row..place.row + at].to_vec());
            next = batch.forest.end_before(segment, 0);
        }
        (ids, target.token)
    }

    #[test]
    fn excerpts_of_a_schedule_have_all_targets_on_the_same_paths() {
        let mut batch = MicroBatch::default();
        for tree in 0..3 {
            let trunk = batch.forest.add(None, &[tree; 7]);
            let footer = batch.forest.add(Some(trunk), &[]);
            for reply in 0..4 {
                batch.forest.add(Some(footer), &vec![20 + reply; 3 * reply as usize]);
            }
        }
        let component = Component::Likelihood { weight: 1.0 };
        for (segment, place) in batch.forest.segments().iter().enumerate() {
            let target = |at| Target { segment, at, token: (10 * segment + at) as u32, component };
            batch.targets.extend((0..=place.length).map(target));
        }
        let predicted = batch.targets.iter().filter(|target| target.at > 0 || target.segment % 6 > 0);
        let mut expected: Vec<_> = predicted.map(|target| path(&batch, target)).collect();
        expected.sort();
        for limit in [usize::MAX, 60, 30, 20, 1] {
            let mut found = Vec::new();
            for schedule in Schedule::of(&batch.forest, limit, limit) {
                let mut excerpts = vec![batch.excerpt(&[], &schedule.prefix)];
                for part in &schedule.parts {
                    let path: Vec<usize> = part.path.iter().map(|place| schedule.prefix[*place]).collect();
                    excerpts.push(batch.excerpt(&path, &part.segments));
                }
                found.extend(excerpts.iter().flat_map(|excerpt| {
                    excerpt.targets.iter().map(|target| path(excerpt, target)).collect::<Vec<_>>()
                }));
            }
            found.sort();
            assert_eq!(found, expected, "{limit}");
        }
    }
}

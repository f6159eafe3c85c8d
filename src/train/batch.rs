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
}

//! What a trainer computes at a time of a micro-batch that runs by schedule.

use super::batch::{MicroBatch, Target};
use crate::model::Schedule;

/// Segments of a micro-batch that are computed together: the prefix of a schedule, or one of its parts.
pub(super) struct Step {
    /// The path that the segments continue, and they, with the targets that their rows predict.
    pub(super) batch: MicroBatch,
    /// The path, as places in the prefix.
    pub(super) path: Vec<usize>,
    /// Rows of the path.
    pub(super) start: usize,
    /// For each target the row, of those behind the path, that predicts it.
    pub(super) rows: Vec<usize>,
    /// The tokens of the targets.
    pub(super) tokens: Vec<u32>,
}

impl Step {
    /// The prefix and the parts, in the order of their forward passes.
    pub(super) fn all<'a>(
        batch: &'a MicroBatch,
        schedule: &'a Schedule,
    ) -> (Self, impl ExactSizeIterator<Item = Self> + 'a) {
        let prefix = Self::new(batch.excerpt(&[], &schedule.prefix), Vec::new());
        let parts = schedule.parts.iter().map(|part| {
            let path: Vec<usize> = part.path.iter().map(|place| schedule.prefix[*place]).collect();
            Self::new(batch.excerpt(&path, &part.segments), part.path.clone())
        });
        (prefix, parts)
    }

    fn new(batch: MicroBatch, path: Vec<usize>) -> Self {
        let start = batch.forest.rows_of_first(path.len());
        // An excerpt's targets have rows behind its path.
        let place = |target: &Target| {
            Some((batch.forest.row_before(target.segment, target.at)? - start, target.token))
        };
        let (rows, tokens) = batch.targets.iter().filter_map(place).unzip();
        Self { batch, path, start, rows, tokens }
    }

    /// Rows behind the path.
    pub(super) fn len(&self) -> usize {
        self.batch.forest.ids().len() - self.start
    }
}

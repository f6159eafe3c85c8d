//! A decoder as the proxy that scores positions.

use crate::error::Error;
use crate::model::{Decoder, Forest, ModelError, Workspace};
use crate::tasks::{PositionScore, Proxy, score_row};
use rayon::prelude::*;

/// Rows of logits that one thread holds at a time.
const ROWS_AT_ONCE: usize = 256;

/// Scores positions with a decoder.
pub struct ModelProxy<'a>(pub &'a Decoder);

impl Proxy for ModelProxy<'_> {
    fn score(&self, pieces: &[Vec<u32>], top_k: usize) -> Result<Vec<Vec<PositionScore>>, Error> {
        Ok(pieces
            .par_iter()
            .map(|piece| self.score_piece(piece, top_k))
            .collect::<Result<_, ModelError>>()?)
    }
}

impl ModelProxy<'_> {
    fn score_piece(&self, ids: &[u32], top_k: usize) -> Result<Vec<PositionScore>, ModelError> {
        let mut scores = vec![PositionScore::default(); ids.len()];
        for_each_logits(self.0, ids, &mut Workspace::default(), |row, logits| {
            if let Some(next) = ids.get(row + 1) {
                scores[row + 1] = score_row(logits, *next, top_k);
            }
        })?;
        Ok(scores)
    }
}

/// Runs the decoder over one sequence and calls `visit(row, logits)` for every row.
pub(super) fn for_each_logits(
    decoder: &Decoder,
    ids: &[u32],
    workspace: &mut Workspace,
    mut visit: impl FnMut(usize, &[f32]),
) -> Result<(), ModelError> {
    if ids.is_empty() {
        return Ok(());
    }
    let mut forest = Forest::default();
    forest.add(None, ids);
    let mut cache = decoder.new_cache();
    let extensions = forest.enter(&mut cache);
    decoder.forward(ids, &extensions, &mut cache, workspace, None)?;
    let rows: Vec<usize> = (0..ids.len()).collect();
    let mut logits = Vec::new();
    for rows in rows.chunks(ROWS_AT_ONCE) {
        let states = decoder.hidden(workspace, rows);
        decoder.logits(&states, &mut logits, workspace);
        for (row, logits) in rows.iter().zip(logits.chunks_exact(decoder.config().vocab_size)) {
            visit(*row, logits);
        }
    }
    Ok(())
}

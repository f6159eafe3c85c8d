//! A decoder as the proxy that scores positions.

use crate::error::Error;
use crate::model::{Decoder, Forest, ModelError, Workspace, on_device};
use crate::tasks::{PositionScore, Proxy, score_row};
use rayon::prelude::*;

/// Rows of logits that one thread holds at a time.
const ROWS_AT_ONCE: usize = 256;
/// Tokens that one forward pass reads: enough rows for the matrix products, and few enough that all
/// threads have work.
const TOKENS_TOGETHER: usize = 512;
/// The same on a device, which reads one after the other.
const TOKENS_TOGETHER_ON_DEVICE: usize = 16384;

/// Scores positions with a decoder.
pub struct ModelProxy<'a>(pub &'a Decoder);

impl Proxy for ModelProxy<'_> {
    fn score(&self, pieces: &[Vec<u32>], top_k: usize) -> Result<Vec<Vec<PositionScore>>, Error> {
        let score = |pieces| self.score_together(pieces, top_k);
        let scored: Vec<Vec<Vec<PositionScore>>> = match self.0.on_device()? {
            None => groups(pieces, TOKENS_TOGETHER).into_par_iter().map(score).collect::<Result<_, _>>()?,
            Some(_) => {
                groups(pieces, TOKENS_TOGETHER_ON_DEVICE).into_iter().map(score).collect::<Result<_, _>>()?
            }
        };
        Ok(scored.into_iter().flatten().collect())
    }
}

impl ModelProxy<'_> {
    fn score_together(
        &self,
        pieces: &[Vec<u32>],
        top_k: usize,
    ) -> Result<Vec<Vec<PositionScore>>, ModelError> {
        let mut scores: Vec<_> =
            pieces.iter().map(|piece| vec![PositionScore::default(); piece.len()]).collect();
        for_each_logits(self.0, pieces, &mut Workspace::default(), |piece, row, logits| {
            if let Some(next) = pieces[piece].get(row + 1) {
                scores[piece][row + 1] = score_row(logits, *next, top_k);
            }
        })?;
        Ok(scores)
    }
}

/// Runs of pieces with at most `limit` tokens; a longer piece is alone. They need no padding, so pieces of unlike
/// lengths may stand together.
fn groups(pieces: &[Vec<u32>], limit: usize) -> Vec<&[Vec<u32>]> {
    let (mut groups, mut start, mut tokens) = (Vec::new(), 0, 0);
    for (at, piece) in pieces.iter().enumerate() {
        if at > start && tokens + piece.len() > limit {
            groups.push(&pieces[start..at]);
            (start, tokens) = (at, 0);
        }
        tokens += piece.len();
    }
    if start < pieces.len() {
        groups.push(&pieces[start..]);
    }
    groups
}

/// Runs the decoder over some sequences and calls `visit(sequence, row, logits)` for every row of each.
pub(super) fn for_each_logits(
    decoder: &Decoder,
    sequences: &[Vec<u32>],
    workspace: &mut Workspace,
    mut visit: impl FnMut(usize, usize, &[f32]),
) -> Result<(), ModelError> {
    let mut forest = Forest::default();
    for sequence in sequences {
        forest.add(None, sequence);
    }
    if forest.ids().is_empty() {
        return Ok(());
    }
    let lengths = sequences.iter().enumerate();
    let places = lengths.flat_map(|(number, sequence)| (0..sequence.len()).map(move |row| (number, row)));
    let mut places = places.collect::<Vec<_>>().into_iter();
    let visit_rows = |logits: &[f32]| {
        let rows = logits.chunks_exact(decoder.config().vocab_size).zip(places.by_ref());
        rows.for_each(|(logits, (sequence, row))| visit(sequence, row, logits));
    };
    match decoder.on_device()? {
        None => host_logits(decoder, &forest, workspace, visit_rows),
        Some(device) => {
            on_device!(&**device, decoder => device_logits(decoder, &forest, workspace, visit_rows))
        }
    }
}

/// Calls `visit_rows` for the logits of all rows of a forest, some rows at a time.
fn host_logits(
    decoder: &Decoder,
    forest: &Forest,
    workspace: &mut Workspace,
    mut visit_rows: impl FnMut(&[f32]),
) -> Result<(), ModelError> {
    let mut cache = decoder.new_cache();
    let extensions = forest.enter(&mut cache);
    decoder.forward(forest.ids(), &extensions, &mut cache, workspace, None)?;
    let rows: Vec<usize> = (0..forest.ids().len()).collect();
    let mut logits = Vec::new();
    for rows in rows.chunks(ROWS_AT_ONCE) {
        let states = decoder.hidden(workspace, rows);
        decoder.logits(&states, &mut logits, workspace);
        visit_rows(&logits);
    }
    Ok(())
}

/// The same on a device.
#[cfg(feature = "cuda")]
fn device_logits<T: crate::model::device::Format>(
    decoder: &crate::model::device::DeviceDecoder<T>,
    forest: &Forest,
    workspace: &mut Workspace,
    mut visit_rows: impl FnMut(&[f32]),
) -> Result<(), ModelError> {
    let batch = decoder.batch(forest)?;
    let x = decoder.forward(&batch, None)?;
    let rows: Vec<usize> = (0..batch.rows()).collect();
    for rows in rows.chunks(decoder.rows_of_logits().min(ROWS_AT_ONCE)) {
        let places = crate::cuda::Indices::upload(decoder.device(), "rows to score", &batch.places(rows))?;
        visit_rows(&decoder.logits(&x, places.view())?.download()?);
    }
    let config = decoder.config();
    workspace.flops += config.layer_flops(batch.rows(), batch.plan.pairs()) + config.head_flops(batch.rows());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_hold_all_pieces_in_order_and_few_tokens() {
        let lengths = [3, 600, 500, 12, 0, 1, 511, 1, 512, 9];
        let pieces: Vec<Vec<u32>> = lengths.map(|length| vec![7; length]).to_vec();
        let groups = groups(&pieces, 512);
        assert_eq!(groups.concat(), pieces);
        for group in groups {
            let tokens: usize = group.iter().map(Vec::len).sum();
            assert!(group.len() == 1 || tokens <= 512, "{tokens}");
        }
        assert!(super::groups(&[], 512).is_empty());
    }
}

//! A decoder as the proxy that scores positions.

use crate::error::Error;
use crate::model::{Decoder, Forest, ModelError, Workspace};
use crate::tasks::{PositionScore, Proxy, score_row};
use rayon::prelude::*;

/// Rows of logits that one thread holds at a time.
const ROWS_AT_ONCE: usize = 256;
/// Tokens that one forward pass reads: enough rows for the matrix products, and few enough that all
/// threads have work.
const TOKENS_TOGETHER: usize = 512;

/// Scores positions with a decoder.
pub struct ModelProxy<'a>(pub &'a Decoder);

impl Proxy for ModelProxy<'_> {
    fn score(&self, pieces: &[Vec<u32>], top_k: usize) -> Result<Vec<Vec<PositionScore>>, Error> {
        let scored: Vec<Vec<Vec<PositionScore>>> = groups(pieces)
            .into_par_iter()
            .map(|pieces| self.score_together(pieces, top_k))
            .collect::<Result<_, ModelError>>()?;
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

/// Runs of pieces with about [`TOKENS_TOGETHER`] tokens; a longer piece is alone. They need no padding, so
/// pieces of unlike lengths may stand together.
fn groups(pieces: &[Vec<u32>]) -> Vec<&[Vec<u32>]> {
    let (mut groups, mut start, mut tokens) = (Vec::new(), 0, 0);
    for (at, piece) in pieces.iter().enumerate() {
        if at > start && tokens + piece.len() > TOKENS_TOGETHER {
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
    let mut cache = decoder.new_cache();
    let extensions = forest.enter(&mut cache);
    decoder.forward(forest.ids(), &extensions, &mut cache, workspace, None)?;
    let lengths = sequences.iter().enumerate();
    let places = lengths.flat_map(|(number, sequence)| (0..sequence.len()).map(move |row| (number, row)));
    let mut places = places.collect::<Vec<_>>().into_iter();
    let rows: Vec<usize> = (0..forest.ids().len()).collect();
    let mut logits = Vec::new();
    for rows in rows.chunks(ROWS_AT_ONCE) {
        let states = decoder.hidden(workspace, rows);
        decoder.logits(&states, &mut logits, workspace);
        for (logits, (sequence, row)) in logits.chunks_exact(decoder.config().vocab_size).zip(places.by_ref())
        {
            visit(sequence, row, logits);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_hold_all_pieces_in_order_and_few_tokens() {
        let lengths = [3, 600, 500, 12, 0, 1, 511, 1, 512, 9];
        let pieces: Vec<Vec<u32>> = lengths.map(|length| vec![7; length]).to_vec();
        let groups = groups(&pieces);
        assert_eq!(groups.concat(), pieces);
        for group in groups {
            let tokens: usize = group.iter().map(Vec::len).sum();
            assert!(group.len() == 1 || tokens <= TOKENS_TOGETHER, "{tokens}");
        }
        assert!(super::groups(&[]).is_empty());
    }
}

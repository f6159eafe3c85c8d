//! A decoder as the proxy that scores positions.

use crate::error::Error;
use crate::model::{Decoder, Forest, ModelError, Workspace, on_device};
use crate::rollout::argmax;
use crate::tasks::{PositionScore, Proxy, score_row};
use rayon::prelude::*;

/// Rows of logits that one thread holds at a time.
const ROWS_AT_ONCE: usize = 256;
/// Tokens that one forward pass reads: enough rows for the matrix products, and few enough that all
/// threads have work.
const TOKENS_TOGETHER: usize = 512;
/// The same on a device, which reads one group after the other.
const TOKENS_TOGETHER_ON_DEVICE: usize = 16384;

/// Scores positions with a decoder.
pub struct ModelProxy<'a>(pub &'a Decoder);

impl Proxy for ModelProxy<'_> {
    fn score(&self, pieces: &[Vec<u32>], top_k: usize) -> Result<Vec<Vec<PositionScore>>, Error> {
        let mut scores = if self.0.on_device()?.is_some() {
            rows_on_device(self.0, pieces, top_k)?.0
        } else {
            rows_on_host(self.0, pieces, |logits, next| score_row(logits, next, top_k))?.0
        };
        // What a row says is of the token behind it.
        for scores in &mut scores {
            scores.insert(0, PositionScore::default());
            scores.pop();
        }
        Ok(scores)
    }
}

/// The most probable token behind every token of some sequences, and the operations that this took.
pub(super) fn most_probable(
    decoder: &Decoder,
    sequences: &[Vec<u32>],
) -> Result<(Vec<Vec<u32>>, u64), ModelError> {
    if decoder.on_device()?.is_none() {
        return rows_on_host(decoder, sequences, |logits, _| argmax(logits) as u32);
    }
    let (scores, flops) = rows_on_device(decoder, sequences, 1)?;
    let tops = |scores: Vec<PositionScore>| scores.iter().map(|score| score.proxy_top).collect();
    Ok((scores.into_iter().map(tops).collect(), flops))
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

/// Sequences as trees of their own.
fn forest_of(sequences: &[Vec<u32>]) -> Forest {
    let mut forest = Forest::default();
    for sequence in sequences {
        forest.add(None, sequence);
    }
    forest
}

/// The tokens behind every token of some sequences; 0 behind the last ones.
fn nexts(sequences: &[Vec<u32>]) -> Vec<u32> {
    let next =
        |sequence: &Vec<u32>| sequence.iter().skip(1).copied().chain([0]).take(sequence.len()).collect();
    sequences.iter().flat_map(|sequence| -> Vec<u32> { next(sequence) }).collect()
}

/// Cuts values of consecutive rows into those of each sequence.
fn by_sequence<V>(sequences: &[Vec<u32>], values: Vec<V>) -> Vec<Vec<V>> {
    let mut values = values.into_iter();
    sequences.iter().map(|sequence| values.by_ref().take(sequence.len()).collect()).collect()
}

/// `of(logits, next token)` of every token of some sequences, and the operations that this took.
fn rows_on_host<V: Send>(
    decoder: &Decoder,
    sequences: &[Vec<u32>],
    of: impl Fn(&[f32], u32) -> V + Sync,
) -> Result<(Vec<Vec<V>>, u64), ModelError> {
    let group = |sequences: &[Vec<u32>]| group_on_host(decoder, sequences, &of);
    let groups: Vec<(Vec<Vec<V>>, u64)> =
        groups(sequences, TOKENS_TOGETHER).into_par_iter().map(group).collect::<Result<_, _>>()?;
    let flops = groups.iter().map(|(_, flops)| flops).sum();
    Ok((groups.into_iter().flat_map(|(values, _)| values).collect(), flops))
}

fn group_on_host<V>(
    decoder: &Decoder,
    sequences: &[Vec<u32>],
    of: impl Fn(&[f32], u32) -> V,
) -> Result<(Vec<Vec<V>>, u64), ModelError> {
    let forest = forest_of(sequences);
    if forest.ids().is_empty() {
        return Ok((by_sequence(sequences, Vec::new()), 0));
    }
    let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(forest.ids(), &extensions, &mut cache, &mut workspace, None)?;
    let rows: Vec<usize> = (0..forest.ids().len()).collect();
    let (mut logits, mut values) = (Vec::new(), Vec::with_capacity(rows.len()));
    let nexts = nexts(sequences);
    for (rows, nexts) in rows.chunks(ROWS_AT_ONCE).zip(nexts.chunks(ROWS_AT_ONCE)) {
        let states = decoder.hidden(&workspace, rows);
        decoder.logits(&states, &mut logits, &mut workspace);
        let logits = logits.chunks_exact(decoder.config().vocab_size);
        values.extend(logits.zip(nexts).map(|(logits, next)| of(logits, *next)));
    }
    Ok((by_sequence(sequences, values), workspace.flops))
}

/// What a decoder on a device says of the token behind every token of some sequences, and the operations that this took.
fn rows_on_device(
    decoder: &Decoder,
    sequences: &[Vec<u32>],
    top_k: usize,
) -> Result<(Vec<Vec<PositionScore>>, u64), ModelError> {
    let (mut all, mut flops) = (Vec::with_capacity(sequences.len()), 0);
    for group in groups(sequences, TOKENS_TOGETHER_ON_DEVICE) {
        all.extend(by_sequence(group, group_on_device(decoder, group, top_k, &mut flops)?));
    }
    Ok((all, flops))
}

#[cfg_attr(
    not(feature = "cuda"),
    expect(unused_variables, reason = "there is no device that would read them")
)]
fn group_on_device(
    decoder: &Decoder,
    sequences: &[Vec<u32>],
    top_k: usize,
    flops: &mut u64,
) -> Result<Vec<PositionScore>, ModelError> {
    match decoder.on_device()? {
        None => Ok(Vec::new()),
        Some(device) => on_device!(&**device, decoder => {
            forest_on_device(decoder, &forest_of(sequences), &nexts(sequences), top_k, flops)
        }),
    }
}

#[cfg(feature = "cuda")]
fn forest_on_device<T: crate::model::device::Format>(
    decoder: &crate::model::device::DeviceDecoder<T>,
    forest: &Forest,
    nexts: &[u32],
    top_k: usize,
    flops: &mut u64,
) -> Result<Vec<PositionScore>, ModelError> {
    use crate::cuda::{Indices, Slice, row_scores};
    if forest.ids().is_empty() {
        return Ok(Vec::new());
    }
    let (device, vocabulary) = (decoder.device(), decoder.config().vocab_size);
    let batch = decoder.batch(forest)?;
    let x = decoder.forward(&batch, None)?;
    let rows: Vec<usize> = (0..batch.rows()).collect();
    let (places, rows_at_once) = (batch.places(&rows), decoder.rows_of_logits());
    let mut scores = Vec::with_capacity(rows.len());
    for (places, nexts) in places.chunks(rows_at_once).zip(nexts.chunks(rows_at_once)) {
        let places = Indices::upload(device, "rows to score", places)?;
        let nexts = Indices::upload(device, "tokens to score", nexts)?;
        let logits = decoder.logits(&x, places.view())?;
        let found = row_scores::score(device, Slice::from(&logits), vocabulary, nexts.view(), top_k)?;
        let (entropies, tops) = (found.entropies.download()?, found.tops.download()?);
        let probabilities = found.target_probabilities.download()?;
        let found = entropies.into_iter().zip(probabilities).zip(tops);
        scores.extend(found.map(|((entropy, truth_probability), proxy_top)| PositionScore {
            entropy,
            truth_probability,
            proxy_top,
            larger_truth_probability: None,
        }));
    }
    *flops += decoder.config().layer_flops(batch.rows(), batch.plan.pairs());
    *flops += decoder.config().head_flops(batch.rows());
    Ok(scores)
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

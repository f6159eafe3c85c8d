//! What rows of logits say of one token each.

use super::lengths::{refuse, room, side};
use super::{Buffer, Device, IndexSlice, Result, Shape, Slice};

const THREADS: usize = 256;
/// Most tokens that an entropy is taken over.
pub const MOST_TOKENS: usize = 64;

/// One number of each kind for each row.
#[derive(Debug)]
pub struct RowScores {
    /// Entropy in nats over the most probable tokens, renormalised.
    pub entropies: Buffer<f32>,
    /// Probability of the given token over the whole vocabulary.
    pub target_probabilities: Buffer<f32>,
    /// The most probable token.
    pub tops: Buffer<u32>,
}

/// Scores rows of logits `[targets, vocabulary]` against a token each; entropies are over the `top_k` most
/// probable tokens, of which there may be 1 to [`MOST_TOKENS`].
///
/// # Errors
/// When lengths or tokens do not fit, memory does not suffice, or the device has failed.
pub fn score(
    device: &Device,
    logits: Slice<f32>,
    vocabulary: usize,
    targets: IndexSlice,
    top_k: usize,
) -> Result<RowScores> {
    let (name, rows) = ("score_rows", targets.len());
    targets.check("targets in the vocabulary", vocabulary)?;
    room("logits", rows.saturating_mul(vocabulary), logits.len())?;
    if top_k == 0 || top_k > MOST_TOKENS {
        return refuse(name, format!("entropy over {top_k} tokens, of 1 to {MOST_TOKENS}"));
    }
    let mut scores = RowScores {
        entropies: device.allocate("scores of rows", rows)?,
        target_probabilities: device.allocate("scores of rows", rows)?,
        tops: device.allocate("scores of rows", rows)?,
    };
    let kernel = device.kernel(name)?;
    let launch = kernel.with(Shape::of(rows, THREADS)).read(logits).value(side(name, vocabulary)?);
    let launch = launch.read(targets).value(top_k as i32).write(&mut scores.entropies);
    let launch = launch.write(&mut scores.target_probabilities).write(&mut scores.tops);
    // SAFETY: the parameters are those of the kernel; lengths and tokens were checked.
    unsafe { launch.launch()? };
    Ok(scores)
}

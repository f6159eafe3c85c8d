//! What a proxy model says of the positions of a text.

use super::lengths::{refuse, room, side};
use super::{Buffer, Device, IndexSlice, Result, Shape, Slice};

const THREADS: usize = 256;
/// Most tokens that an entropy is taken over.
pub const MOST_TOKENS: usize = 64;

/// One number of each kind for each row.
#[derive(Debug)]
pub struct Positions {
    /// Entropy in nats over the most probable tokens, renormalised.
    pub entropies: Buffer<f32>,
    /// Probability of the true token over the whole vocabulary.
    pub truth_probabilities: Buffer<f32>,
    /// The most probable token.
    pub tops: Buffer<u32>,
}

/// Scores rows of logits `[truths, vocabulary]` against the tokens that follow; entropies are over the `top_k` most
/// probable tokens, of which there may be 1 to [`MOST_TOKENS`].
///
/// # Errors
/// When lengths or tokens do not fit, memory does not suffice, or the device has failed.
pub fn score(
    device: &Device,
    logits: Slice<f32>,
    vocabulary: usize,
    truths: IndexSlice,
    top_k: usize,
) -> Result<Positions> {
    let (name, rows) = ("score_positions", truths.len());
    truths.check("true tokens in the vocabulary", vocabulary)?;
    room("logits", rows.saturating_mul(vocabulary), logits.len())?;
    if top_k == 0 || top_k > MOST_TOKENS {
        return refuse(name, format!("entropy over {top_k} tokens, of 1 to {MOST_TOKENS}"));
    }
    let mut positions = Positions {
        entropies: device.allocate("scores of positions", rows)?,
        truth_probabilities: device.allocate("scores of positions", rows)?,
        tops: device.allocate("scores of positions", rows)?,
    };
    let kernel = device.kernel(name)?;
    let launch = kernel.with(Shape::of(rows, THREADS)).read(logits).value(side(name, vocabulary)?);
    let launch = launch.read(truths).value(top_k as i32).write(&mut positions.entropies);
    let launch = launch.write(&mut positions.truth_probabilities).write(&mut positions.tops);
    // SAFETY: the parameters are those of the kernel; lengths and tokens were checked.
    unsafe { launch.launch()? };
    Ok(positions)
}

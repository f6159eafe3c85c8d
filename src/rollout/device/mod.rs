//! The engine on a CUDA device: shared prefixes are computed once, then all live replies grow together.
//!
//! Keys and values lie in pages. Replies grow in rounds: for a round each has pages for so many tokens more, and the step
//! that adds one to each is recorded once as a CUDA graph. The device goes from step to step by itself; the host reads the
//! tokens some steps later and looks for ends. What was drawn behind an end is cut off, so that the lag changes nothing.
//! Between rounds ended replies leave.
//!
//! Pages hold keys and values as they were computed, or rounded to eight bits. The tokens of a prompt see each other before
//! they are rounded, and each token of a reply is rounded when it comes: so the same is read however the work is divided.
//!
//! Where replies have no place free, the next prompts are computed beside the steps of a round, on the device's second
//! stream, whose blocks of threads give way to theirs: steps wait for memory, prompts for arithmetic. So there are replies
//! to take the places of those that end with the round. As rows of the steps themselves prompts would give these other rows
//! each time, and neither one graph nor one algorithm for each product.
//!
//! Every reply may become as long as the limit allows, but few do: they get pages as they grow. Whoever cannot get any
//! pauses. There are always enough free for the reply that holds most of them to become as long as it may; when it ends
//! there are enough for any other, so all replies end.

mod decode;
mod format;
mod landing;
mod pages;
mod prefill;
mod run;
mod waiting;

use super::Prompt;
use super::engine::{Engine, Generation};
use crate::config::CacheFormat;
use crate::cuda::attention::Cached;
use crate::cuda::paged::PAGE;
use crate::model::device::{DeviceDecoder, Format};
use crate::model::{Dtype, ModelError};
use format::PageFormat;
use half::bf16;
use pages::page_bytes;
use run::Run;
use waiting::Waiting;

/// A number format of models for whose keys and values there are pages.
pub trait Kept: Format + Cached<Widened = Self> {
    /// As [`generate`], with keys and values in pages of eight bits.
    ///
    /// # Errors
    /// As there; [`ModelError::CacheDtype`] when there are no kernels that read them.
    fn generate_quantized(
        engine: &Engine,
        decoder: &DeviceDecoder<Self>,
        prompts: &[Prompt],
        samples: usize,
        limits: Limits,
    ) -> Result<Generation, ModelError>;
}

impl Kept for f32 {
    fn generate_quantized(
        _: &Engine,
        _: &DeviceDecoder<Self>,
        _: &[Prompt],
        _: usize,
        _: Limits,
    ) -> Result<Generation, ModelError> {
        Err(ModelError::CacheDtype { dtype: Dtype::F32.name() })
    }
}

impl Kept for bf16 {
    fn generate_quantized(
        engine: &Engine,
        decoder: &DeviceDecoder<Self>,
        prompts: &[Prompt],
        samples: usize,
        limits: Limits,
    ) -> Result<Generation, ModelError> {
        generate_in::<Self, u8>(engine, decoder, prompts, samples, limits)
    }
}

/// Bounds of the engine on a device. Where rows have the same bits in every batch, none of them changes a result.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Replies that grow side by side.
    pub replies: usize,
    /// Tokens for which a reply gets pages at a time.
    pub room: usize,
    /// Steps that the device may be ahead of the host.
    pub lag: usize,
    /// Tokens of prompts that are computed together, unless those of one trunk are more.
    pub prompt_tokens: usize,
    /// The share of the device's free memory that keys and values may take.
    pub memory: f64,
    /// Most pages of sixteen positions.
    pub pages: usize,
    /// Whether rows of nobody make up the numbers, so that rounds have few different ones: the vendor's library looks for an
    /// algorithm for every shape of a product.
    pub padded: bool,
}

impl Limits {
    /// Replies beyond those that grow, to take the places of those that end: a round ends when half as many have.
    fn spare(&self) -> usize {
        self.replies.div_ceil(4)
    }

    /// Those that a decoder does best with. Own kernels take any number of rows.
    pub fn of<T: Format>(decoder: &DeviceDecoder<T>) -> Self {
        Self { padded: !decoder.is_batch_invariant(), ..Self::default() }
    }
}

impl Default for Limits {
    fn default() -> Self {
        // Page numbers times sixteen are below 2^31.
        let (replies, prompt_tokens, pages) = (512, 16 << 10, 1 << 26);
        Self { replies, room: 128, lag: 4, prompt_tokens, memory: 0.75, pages, padded: true }
    }
}

/// Samples replies on a device, as [`Engine::generate`] does. Prompts must fit the model's positions.
///
/// # Errors
/// When a token is outside the vocabulary, the device has no room for a single reply, no kernels for the engine's format of
/// keys and values, or has failed.
pub fn generate<T: Kept>(
    engine: &Engine,
    decoder: &DeviceDecoder<T>,
    prompts: &[Prompt],
    samples: usize,
    limits: Limits,
) -> Result<Generation, ModelError> {
    match engine.kv_cache {
        CacheFormat::Model => generate_in::<T, T>(engine, decoder, prompts, samples, limits),
        CacheFormat::Fp8 => T::generate_quantized(engine, decoder, prompts, samples, limits),
    }
}

/// As [`generate`], with pages in the format `S`.
fn generate_in<T: Format, S: PageFormat<T>>(
    engine: &Engine,
    decoder: &DeviceDecoder<T>,
    prompts: &[Prompt],
    samples: usize,
    limits: Limits,
) -> Result<Generation, ModelError> {
    let waiting = Waiting::new(prompts);
    let reply = reply_pages(engine.stop.max_new_tokens);
    let replies = (prompts.len() * samples).min(limits.replies.saturating_add(limits.spare() + samples));
    // The longest reply must fit beside its prompt.
    let (fewest, most) = (waiting.longest() + reply, waiting.pages() + reply * replies.max(1));
    let page_bytes = page_bytes::<T, S>(decoder.config()).max(1);
    let share = decoder.device().memory()?.free as f64 * limits.memory;
    let bytes = engine.cache_bytes.map_or(share, |bytes| share.min(bytes as f64));
    let mut pages = most.min((bytes / page_bytes as f64) as usize).min(limits.pages).max(fewest);
    let mut retries = 0;
    loop {
        let run = Run::<T, S>::new(engine, decoder, prompts, samples, limits, pages).and_then(Run::finish);
        match run {
            // Nothing has left this function yet, so that starting again with less is no harm.
            Err(ModelError::Cuda(error)) if error.is_out_of_memory() && pages > fewest => {
                pages = (pages / 2).max(fewest);
                retries += 1;
            }
            done => return done.map(|generation| Generation { retries, ..generation }),
        }
    }
}

/// Pages of a reply of so many tokens: the last one is never read.
fn reply_pages(tokens: usize) -> usize {
    tokens.saturating_sub(1).div_ceil(PAGE)
}

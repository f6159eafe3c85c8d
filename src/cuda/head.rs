//! Log-softmax, gather and entropy of logits, and their gradient.
//!
//! A row of logits may come whole or in chunks of the vocabulary; its scores have the same bits either way.

use super::gemm::Element;
use super::lengths::{refuse, room, side};
use super::{Buffer, Device, IndexSlice, Result, Shape, Slice, SliceMut};

const THREADS: usize = 256;
/// Rows, or blocks of them, that the warps of a block take.
const WARPS: usize = THREADS / 32;
/// Logits that a warp sums up; chunks begin at multiples.
const BLOCK: usize = 1024;
/// Sums of a block of logits.
const SUMS: usize = 4;

/// The token of each row, and the policy's temperature.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// One for each row.
    pub tokens: IndexSlice<'a>,
    /// 1 / temperature of the policy.
    pub inverse_temperature: f32,
}

/// Some columns of rows of logits.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// The first row from its first column on, and the other rows behind it.
    pub logits: Slice<'a, f32>,
    /// Elements between rows.
    pub stride: usize,
    /// The first column's place in the vocabulary, a multiple of 1024.
    pub first: usize,
    /// How many columns there are: a multiple of 1024, but for the vocabulary's last ones.
    pub width: usize,
}

impl Chunk<'_> {
    fn check(&self, kernel: &str, rows: usize, vocabulary: usize) -> Result<()> {
        let Self { stride, first, width, .. } = *self;
        let end = first.saturating_add(width);
        let in_blocks = first.is_multiple_of(BLOCK) && (width.is_multiple_of(BLOCK) || end == vocabulary);
        if stride < width || end > vocabulary || !in_blocks {
            let columns = format!("columns {first}..{end} of {vocabulary}, in rows {stride} apart");
            return refuse(
                kernel,
                format!("{columns}: they must be whole blocks of {BLOCK}, or the last ones"),
            );
        }
        let last = rows.saturating_sub(1).saturating_mul(stride).saturating_add(width);
        room("logits", if rows == 0 { 0 } else { last }, self.logits.len())
    }
}

/// What is known of each row's target.
#[derive(Debug)]
pub struct Scores {
    /// Log-probability at temperature 1.
    pub logprobs: Buffer<f32>,
    /// Log-probability at the policy's temperature.
    pub policy_logprobs: Buffer<f32>,
    /// Entropy of the row at temperature 1.
    pub entropies: Buffer<f32>,
    /// Log-sum of the row at the policy's temperature, for the gradient.
    pub log_sums: Buffer<f32>,
}

/// Sums over the chunks of rows of logits, which may come in any order.
#[derive(Debug)]
pub struct Sums<'a> {
    targets: Targets<'a>,
    vocabulary: usize,
    /// `[rows, blocks of the vocabulary, 4]`.
    blocks: Buffer<f32>,
    target_logits: Buffer<f32>,
}

impl<'a> Sums<'a> {
    /// For one row of `vocabulary` logits for each target.
    ///
    /// # Errors
    /// When a target is not in the vocabulary, or memory does not suffice.
    pub fn new(device: &Device, vocabulary: usize, targets: Targets<'a>) -> Result<Self> {
        targets.tokens.check("targets in the vocabulary", vocabulary)?;
        let (rows, blocks) = (targets.tokens.len(), vocabulary.div_ceil(BLOCK));
        let blocks = rows.saturating_mul(blocks).saturating_mul(SUMS);
        Ok(Self {
            targets,
            vocabulary,
            blocks: device.allocate("sums of logits", blocks)?,
            target_logits: device.allocate("logits of targets", rows)?,
        })
    }

    /// Adds a chunk of all rows.
    ///
    /// # Errors
    /// When the chunk does not fit, or the device has failed.
    pub fn add(&mut self, device: &Device, chunk: Chunk) -> Result<()> {
        let (name, rows) = ("head_sums", self.targets.tokens.len());
        chunk.check(name, rows, self.vocabulary)?;
        let warps = rows * chunk.width.div_ceil(BLOCK);
        let kernel = device.kernel(name)?;
        let launch = kernel.with(Shape::of(warps.div_ceil(WARPS), THREADS)).read(chunk.logits);
        let launch = launch.value(side(name, chunk.stride)?).value(side(name, chunk.width)?);
        let launch = launch.value(side(name, chunk.first)?).read(self.targets.tokens);
        let launch = launch.value(self.targets.inverse_temperature).write(&mut self.blocks);
        let launch =
            launch.value(side(name, self.vocabulary.div_ceil(BLOCK))?).write(&mut self.target_logits);
        // SAFETY: the parameters are those of the kernel; lengths and columns were checked.
        unsafe { launch.value(side(name, rows)?).launch() }
    }

    /// The scores, when all chunks have been added.
    ///
    /// # Errors
    /// When memory does not suffice, or the device has failed.
    pub fn scores(&self, device: &Device) -> Result<Scores> {
        let (name, rows) = ("head_scores", self.targets.tokens.len());
        let allocate = || device.allocate("scores of targets", rows);
        let mut scores = Scores {
            logprobs: allocate()?,
            policy_logprobs: allocate()?,
            entropies: allocate()?,
            log_sums: allocate()?,
        };
        let kernel = device.kernel(name)?;
        let launch = kernel.with(Shape::of(rows.div_ceil(WARPS), THREADS)).read(&self.blocks);
        let launch = launch.value(side(name, self.vocabulary.div_ceil(BLOCK))?).read(&self.target_logits);
        let launch = launch.value(self.targets.inverse_temperature).write(&mut scores.logprobs);
        let launch = launch.write(&mut scores.policy_logprobs).write(&mut scores.entropies);
        let launch = launch.write(&mut scores.log_sums).value(side(name, rows)?);
        // SAFETY: the parameters are those of the kernel; all buffers are as long as `new` and this function made them.
        unsafe { launch.launch()? };
        Ok(scores)
    }
}

/// Scores of the targets in whole rows of logits `[rows, vocabulary]`.
///
/// # Errors
/// When lengths or targets do not fit, memory does not suffice, or the device has failed.
pub fn score(device: &Device, logits: Slice<f32>, vocabulary: usize, targets: Targets) -> Result<Scores> {
    let mut sums = Sums::new(device, vocabulary, targets)?;
    sums.add(device, whole_rows(logits, vocabulary))?;
    sums.scores(device)
}

/// The gradient of `coefficients[row]` times the policy's log-probability of the row's target, with respect to whole rows
/// of logits `[rows, vocabulary]`; `log_sums` are those of the scores.
///
/// # Errors
/// When lengths or targets do not fit, or the device has failed.
pub fn gradient<T: Element>(
    device: &Device,
    logits: Slice<f32>,
    vocabulary: usize,
    targets: Targets,
    coefficients: Slice<f32>,
    log_sums: Slice<f32>,
    out: SliceMut<T>,
) -> Result<()> {
    let chunk = whole_rows(logits, vocabulary);
    chunk_gradient(device, chunk, vocabulary, targets, coefficients, log_sums, out)
}

/// As [`gradient`], with respect to a chunk: `out` is `[rows, chunk.width]`.
///
/// # Errors
/// As there.
pub fn chunk_gradient<T: Element>(
    device: &Device,
    chunk: Chunk,
    vocabulary: usize,
    targets: Targets,
    coefficients: Slice<f32>,
    log_sums: Slice<f32>,
    out: SliceMut<T>,
) -> Result<()> {
    let name = format!("head_gradient_{}", T::NAME);
    let rows = targets.tokens.len();
    targets.tokens.check("targets in the vocabulary", vocabulary)?;
    chunk.check(&name, rows, vocabulary)?;
    room("coefficients of targets", rows, coefficients.len())?;
    room("log-sums of logits", rows, log_sums.len())?;
    room("gradients of logits", rows.saturating_mul(chunk.width), out.len())?;
    let kernel = device.kernel(&name)?;
    let shape = Shape::grid(rows, chunk.width.div_ceil(THREADS * 4), THREADS);
    let (stride, width) = (side(&name, chunk.stride)?, side(&name, chunk.width)?);
    let launch = kernel.with(shape).read(chunk.logits).value(stride).value(width);
    let launch = launch.value(side(&name, chunk.first)?).read(targets.tokens).read(coefficients);
    let launch = launch.read(log_sums).value(targets.inverse_temperature).write(out).value(width);
    // SAFETY: the parameters are those of the kernel; lengths and columns were checked.
    unsafe { launch.launch() }
}

fn whole_rows(logits: Slice<f32>, vocabulary: usize) -> Chunk {
    Chunk { logits, stride: vocabulary, first: 0, width: vocabulary }
}

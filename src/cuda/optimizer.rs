//! AdamW over flat parameters. The norm of the gradient, clipping, and the refusal of gradients that are not finite are
//! decided on the device.

use super::gemm::Element;
use super::lengths::{refuse, room};
use super::{Buffer, Device, Launch, Result, Shape, Slice, SliceMut};
use std::ops::Range;

const THREADS: usize = 256;
/// Elements that a block takes.
const CHUNK: usize = 16384;

/// Which elements a step changes, and which of them decay.
#[derive(Debug)]
pub struct Chunks {
    /// For each a start, and a length with the decay in bit 32.
    table: Buffer<u64>,
    count: usize,
    /// Behind the last element.
    end: usize,
}

impl Chunks {
    /// Those of `parts`, each of which decays where its second half says so.
    ///
    /// # Errors
    /// When parts overlap; as [`Device::upload`].
    pub fn new(device: &Device, parts: &[(Range<usize>, bool)]) -> Result<Self> {
        let mut parts: Vec<_> = parts.iter().filter(|(range, _)| !range.is_empty()).cloned().collect();
        parts.sort_by_key(|(range, _)| range.start);
        if let Some([a, b]) = parts.array_windows().find(|[a, b]| a.0.end > b.0.start) {
            return refuse("adamw", format!("the parts {:?} and {:?} overlap", a.0, b.0));
        }
        let mut table = Vec::new();
        for (range, decays) in &parts {
            for start in range.clone().step_by(CHUNK) {
                let length = (range.end - start).min(CHUNK);
                table.extend([start as u64, length as u64 | u64::from(*decays) << 32]);
            }
        }
        let end = parts.last().map_or(0, |(range, _)| range.end);
        Ok(Self { count: table.len() / 2, table: device.upload("the chunks of an update", &table)?, end })
    }
}

/// What the gradient's norm decides for a step, on the device.
#[derive(Debug)]
pub struct Clip {
    /// The norm in f64, and the scale with the refusal in bit 32.
    figures: Buffer<u64>,
}

/// What the gradient's norm decides for a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipFigures {
    /// Global L2 norm of the gradient.
    pub norm: f64,
    /// Factor for every gradient: `max_norm` / (norm + 1e-6) where the norm exceeds `max_norm` > 0, else 1.
    pub scale: f32,
    /// Whether the norm is not finite, so that the update changes nothing.
    pub refused: bool,
}

impl Clip {
    /// The figures, after all work that was asked for before.
    ///
    /// # Errors
    /// While a graph is recorded, or when the device has failed.
    pub fn read(&self) -> Result<ClipFigures> {
        let mut figures = [0; 2];
        figures.copy_from_slice(&self.figures.download()?);
        let [norm, rest] = figures;
        let (scale, refused) = (f32::from_bits(rest as u32), rest >> 32 != 0);
        Ok(ClipFigures { norm: f64::from_bits(norm), scale, refused })
    }
}

/// The norm of all gradients, and what it decides; a `max_norm` of 0 clips nothing.
///
/// # Errors
/// When memory does not suffice, or the device has failed.
pub fn clip(device: &Device, gradients: Slice<f32>, max_norm: f32) -> Result<Clip> {
    let (length, parts) = (gradients.len(), gradients.len().div_ceil(CHUNK));
    let mut partial = device.allocate::<u64>("sums of squares of gradients", parts)?;
    let kernel = device.kernel("sums_of_squares")?;
    let launch = kernel.with(Shape::of(parts, THREADS)).read(gradients).value(length as u64);
    // SAFETY: the parameters are those of the kernel; there is one f64 for each of its blocks.
    unsafe { launch.write(&mut partial).launch()? };
    let mut figures = device.allocate("the gradient's norm", 2)?;
    let kernel = device.kernel("clip_gradient")?;
    let launch = kernel.with(Shape::of(1, THREADS)).read(&partial).value(parts as i32).value(max_norm);
    // SAFETY: the parameters are those of the kernel, which writes an f64, an f32 and a u32.
    unsafe { launch.write(&mut figures).launch()? };
    Ok(Clip { figures })
}

/// The figures of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamwStep {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// What is added to the root of the second moment.
    pub epsilon: f32,
    /// 1 - rate x weight decay, for parts that decay.
    pub keep: f32,
    /// Learning rate / (1 - beta1^t).
    pub rate: f32,
    /// sqrt(1 - beta2^t).
    pub second_correction: f32,
    /// For the rounding of moments in bf16: another in every step.
    pub seed: u64,
}

/// What a step changes; all parts are laid out alike.
#[derive(Debug)]
pub struct AdamwState<'a, T, M> {
    /// Parameters in full precision.
    pub parameters: SliceMut<'a, f32>,
    /// First moments.
    pub first: SliceMut<'a, M>,
    /// Second moments.
    pub second: SliceMut<'a, M>,
    /// The parameters as the model stores them.
    pub weights: Option<SliceMut<'a, T>>,
    /// A running average of the parameters, and its decay.
    pub average: Option<(SliceMut<'a, f32>, f32)>,
}

impl<T: Element, M: Element> AdamwState<'_, T, M> {
    fn check(&self, end: usize) -> Result<()> {
        room("parameters", end, self.parameters.len())?;
        room("first moments", end, self.first.len())?;
        room("second moments", end, self.second.len())?;
        self.weights.as_ref().map_or(Ok(()), |weights| room("weights", end, weights.len()))?;
        self.average.as_ref().map_or(Ok(()), |(average, _)| room("averages", end, average.len()))
    }
}

/// One step over all chunks, unless `clip` refuses it. Weights receive the parameters, and averages follow them.
///
/// # Errors
/// When lengths do not fit, or the device has failed.
pub fn adamw<T: Element, M: Element>(
    device: &Device,
    chunks: &Chunks,
    step: &AdamwStep,
    clip: &Clip,
    gradients: Slice<f32>,
    state: AdamwState<T, M>,
) -> Result<()> {
    room("gradients", chunks.end, gradients.len())?;
    state.check(chunks.end)?;
    let moments = if M::NAME == f32::NAME { String::new() } else { format!("moments_{}_", M::NAME) };
    let kernel = device.kernel(&format!("adamw_{moments}{}", T::NAME))?;
    let launch = kernel.with(Shape::of(chunks.count, THREADS)).read(&chunks.table);
    let launch = launch.read(gradients).read(&clip.figures);
    let AdamwStep { beta1, beta2, epsilon, keep, rate, second_correction, seed } = *step;
    let figures = [beta1, beta2, epsilon, keep, rate, second_correction];
    let launch = figures.into_iter().fold(launch, Launch::value).value(seed);
    let (average, decay) = state.average.unzip();
    let launch = launch.write(state.parameters).write(state.first).write(state.second);
    let launch = launch.write_optional(state.weights).write_optional(average);
    // SAFETY: the parameters are those of the kernel; chunks lie apart from each other and before their end, which was
    // checked to lie within all operands.
    unsafe { launch.value(decay.unwrap_or_default()).launch() }
}

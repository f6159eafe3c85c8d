//! The decoder on a CUDA device: the same model as [`Decoder`], with weights, activations and gradients in the
//! device's memory.
//!
//! Weights are one buffer in the number format of the model, laid out as [`Layout`] says; gradients are one of `f32`,
//! laid out alike. Rows are packed in depth-first pre-order (see [`crate::cuda::forest`]). The residual stream and
//! its gradient are `f32`; what goes into matrix products has the format of the weights.

mod backward;
mod forward;
mod head;
mod prefix;

pub use forward::{Attend, Batch, DeviceTape, Work};
pub use prefix::DevicePrefix;

use super::layout::Layout;
use super::{Decoder, DecoderConfig, Dtype, ModelError};
use crate::cuda::attention::Attention;
use crate::cuda::{Buffer, Device, Element, Gemm, Result, Slice, SliceMut};
use crate::kernels::rotary::RotaryTable;
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Weights that are rounded and copied to the device at a time.
const UPLOADED_TOGETHER: usize = 1 << 24;

/// A number format in which a decoder can compute on a device.
pub trait Format: Element {
    /// Rounds to the format.
    fn narrow(value: f32) -> Self;
    /// The number, exactly.
    fn widen(self) -> f32;
}

impl Format for f32 {
    fn narrow(value: f32) -> Self {
        value
    }
    fn widen(self) -> f32 {
        self
    }
}

impl Format for bf16 {
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn widen(self) -> f32 {
        self.to_f32()
    }
}

/// How a decoder computes on a device.
#[derive(Clone, Debug)]
pub struct DeviceSettings {
    /// The device.
    pub device: Device,
    /// Rows have the same bits in every batch, and training those of decoding, at a cost: products by our own kernels,
    /// attention in pieces of fixed length.
    pub batch_invariant: bool,
}

/// A decoder on a device, in the number format of its weights.
#[derive(Debug)]
pub enum OnDevice {
    /// Single precision.
    F32(DeviceDecoder<f32>),
    /// bfloat16, summed in single precision.
    Bf16(DeviceDecoder<bf16>),
}

impl OnDevice {
    /// Copies a decoder to a device.
    ///
    /// # Errors
    /// When its weights are f16, its heads are of a size that there are no kernels for, or the device has no room.
    pub fn new(settings: &DeviceSettings, decoder: &Decoder) -> std::result::Result<Self, ModelError> {
        match decoder.dtype() {
            Dtype::F32 => Ok(Self::F32(DeviceDecoder::new(settings, decoder)?)),
            Dtype::Bf16 => Ok(Self::Bf16(DeviceDecoder::new(settings, decoder)?)),
            Dtype::F16 => Err(ModelError::DeviceDtype { dtype: Dtype::F16.name() }),
        }
    }
}

/// A decoder's weights on a device, and what computes with them.
#[derive(Debug)]
pub struct DeviceDecoder<T> {
    device: Device,
    config: DecoderConfig,
    layout: Layout,
    rotary: RotaryTable,
    weights: Buffer<T>,
    /// Cosines and sines of the positions that were needed so far.
    angles: Mutex<Arc<Buffer<f32>>>,
    gemm: Gemm,
    attention: Attention,
    batch_invariant: bool,
}

impl<T: Format> DeviceDecoder<T> {
    /// Copies a decoder's weights to a device.
    ///
    /// # Errors
    /// When there are no kernels for its heads, or the device has no room.
    pub fn new(settings: &DeviceSettings, decoder: &Decoder) -> Result<Self> {
        let Decoder { config, layout, rotary, weights, .. } = decoder;
        let mut there = Self::of_shape(settings, config.clone(), layout.clone(), rotary.clone())?;
        for parameter in layout.parameters() {
            let mut values = vec![T::default(); parameter.range.len()];
            let rows = values.par_chunks_exact_mut(parameter.columns.max(1)).enumerate();
            rows.for_each_init(Vec::new, |wide, (row, out)| {
                wide.resize(out.len(), 0.0);
                weights.row(parameter, row, wide);
                out.iter_mut().zip(wide).for_each(|(out, value)| *out = T::narrow(*value));
            });
            there.weights.slice_mut(parameter.range.clone())?.upload(&values)?;
        }
        Ok(there)
    }

    /// With weights that are still to come.
    fn of_shape(
        settings: &DeviceSettings,
        config: DecoderConfig,
        layout: Layout,
        rotary: RotaryTable,
    ) -> Result<Self> {
        let DeviceSettings { device, batch_invariant } = settings;
        Ok(Self {
            weights: device.allocate("the weights", layout.len())?,
            angles: Mutex::new(Arc::new(device.allocate("angles", 0)?)),
            gemm: Gemm::new(device, *batch_invariant)?,
            attention: Attention::new(device, config.geometry(), *batch_invariant)?,
            batch_invariant: *batch_invariant,
            device: device.clone(),
            rotary,
            config,
            layout,
        })
    }

    /// Another with the same weights.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn duplicate(&self) -> Result<Self> {
        let settings = DeviceSettings { device: self.device.clone(), batch_invariant: self.batch_invariant };
        let (config, layout) = (self.config.clone(), self.layout.clone());
        let mut other = Self::of_shape(&settings, config, layout, self.rotary.clone())?;
        SliceMut::from(&mut other.weights).copy_from(&self.weights)?;
        Ok(other)
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The configuration.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Names and places of the parameters.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Attention of this model.
    pub fn attention(&self) -> &Attention {
        &self.attention
    }

    /// Whether rows have the same bits in every batch.
    pub fn is_batch_invariant(&self) -> bool {
        self.batch_invariant
    }

    /// All weights, for an optimiser.
    pub fn weights_mut(&mut self) -> &mut Buffer<T> {
        &mut self.weights
    }

    /// Brings the weights back to a decoder of the same shape.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn download(&self, decoder: &mut Decoder) -> Result<()> {
        for parameter in self.layout.parameters() {
            let values = self.weights.slice(parameter.range.clone())?.download()?;
            let values: Vec<f32> = values.into_iter().map(Format::widen).collect();
            decoder.weights.set_rows(parameter, 0, &values);
        }
        Ok(())
    }

    /// Replaces all weights by `parameters`, rounded; they are laid out as the layout says.
    ///
    /// # Errors
    /// When their number is another, or the device has failed.
    pub fn set_parameters(&mut self, parameters: &[f32]) -> Result<()> {
        let mut values = Vec::new();
        for (number, parameters) in parameters.chunks(UPLOADED_TOGETHER).enumerate() {
            values.clear();
            values.extend(parameters.iter().map(|value| T::narrow(*value)));
            let start = number * UPLOADED_TOGETHER;
            self.weights.slice_mut(start..start + values.len())?.upload(&values)?;
        }
        Ok(())
    }

    /// Bytes that a tape holds for each token of a forward pass, unless layers are computed again.
    pub fn tape_bytes_per_token(&self) -> usize {
        self.config.device_tape_bytes(size_of::<T>())
    }

    /// Bytes that a tape holds for each token where layers are computed again: their inputs.
    pub fn input_bytes_per_token(&self) -> usize {
        self.config.layers * self.config.hidden_size * size_of::<f32>()
    }

    fn weight(&self, range: &Range<usize>) -> Result<Slice<'_, T>> {
        self.weights.slice(range.clone())
    }

    /// Cosines and sines `[positions, head_dim]` of at least so many positions.
    pub(crate) fn angles(&self, positions: usize) -> Result<Arc<Buffer<f32>>> {
        let mut angles = self.angles.lock().unwrap_or_else(PoisonError::into_inner);
        let width = self.config.head_dim;
        if angles.len() < positions * width {
            let positions = positions.next_power_of_two().min(self.rotary.positions());
            let values: Vec<f32> =
                (0..positions).flat_map(|position| self.rotary.angles(position)).copied().collect();
            *angles = Arc::new(self.device.upload("angles", &values)?);
        }
        Ok(Arc::clone(&angles))
    }
}

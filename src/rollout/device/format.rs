//! Number formats of pages: the model's own, or eight bits with a scale for each page and head.

use super::pages::LayerPages;
use crate::cuda::attention::Cached;
use crate::cuda::quantized::QuantizedPages;
use crate::cuda::rotary::{PageWrites, Rotary};
use crate::cuda::{Buffer, Result, Slice};
use crate::model::device::{DeviceDecoder, Format};
use half::bf16;

/// A number format in which keys and values of a model in the format `T` are kept.
pub(super) trait PageFormat<T: Format>: Cached<Widened = T> {
    /// Whether each page and head has a scale.
    const SCALED: bool;

    /// Turns the projections of some rows of a layer, and keeps their keys and values where their slot is not negative.
    ///
    /// # Errors
    /// When lengths do not fit, or the device has failed.
    ///
    /// # Safety
    /// All slots must lie within the pages, also those that kernels write later where this is recorded.
    unsafe fn turn_and_keep(
        decoder: &DeviceDecoder<T>,
        rotary: &Rotary<T>,
        before: Option<Slice<T>>,
        qkv: &mut Buffer<T>,
        slots: Slice<i32>,
        pages: &mut LayerPages<Self>,
    ) -> Result<()>;
}

/// As they are.
impl<T: Format + Cached<Widened = T>> PageFormat<T> for T {
    const SCALED: bool = false;

    unsafe fn turn_and_keep(
        decoder: &DeviceDecoder<T>,
        rotary: &Rotary<T>,
        before: Option<Slice<T>>,
        qkv: &mut Buffer<T>,
        slots: Slice<i32>,
        pages: &mut LayerPages<T>,
    ) -> Result<()> {
        let LayerPages { keys, values, .. } = pages;
        let writes = PageWrites { slots, keys: keys.into(), values: values.into() };
        // SAFETY: as this function's.
        unsafe { rotary.forward_into_pages(decoder.device(), before, qkv.into(), writes) }
    }
}

/// Rounded to e4m3. The rows themselves stay as they are.
impl PageFormat<bf16> for u8 {
    const SCALED: bool = true;

    unsafe fn turn_and_keep(
        decoder: &DeviceDecoder<bf16>,
        rotary: &Rotary<bf16>,
        before: Option<Slice<bf16>>,
        qkv: &mut Buffer<bf16>,
        slots: Slice<i32>,
        pages: &mut LayerPages<Self>,
    ) -> Result<()> {
        rotary.forward(decoder.device(), before, (&mut *qkv).into())?;
        let LayerPages { keys, values, key_scales, value_scales } = pages;
        let mut pages = QuantizedPages {
            keys: keys.into(),
            values: values.into(),
            key_scales: key_scales.into(),
            value_scales: value_scales.into(),
        };
        // SAFETY: as this function's.
        unsafe { decoder.attention().store_quantized(Slice::from(&*qkv), slots, &mut pages) }
    }
}

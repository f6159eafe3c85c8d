//! Keys and values on their way into pages of eight-bit numbers (e4m3), with a scale for each page and head.

use super::attention::{Attention, THREADS};
use super::gemm::Element;
use super::lengths::room;
use super::paged::PAGE;
use super::{CudaError, Result, Shape, Slice, SliceMut};
use crate::kernels::attention::Geometry;

/// Where quantised keys and values go.
#[derive(Debug)]
pub struct QuantizedPages<'a> {
    /// Pages of `[kv_heads, 16, head_dim]`.
    pub keys: SliceMut<'a, u8>,
    /// As the keys.
    pub values: SliceMut<'a, u8>,
    /// `[pages, kv_heads]`.
    pub key_scales: SliceMut<'a, f32>,
    /// As those of the keys.
    pub value_scales: SliceMut<'a, f32>,
}

impl Attention {
    /// Stores the keys and values of fused rows `qkv` at `slots[row]` = page x 16 + lane, where that is not negative. Positions
    /// of one page stand in consecutive rows, and pages are filled from lane 0 on.
    ///
    /// # Errors
    /// When rows and slots differ in number, or the device has failed.
    ///
    /// # Safety
    /// All slots must lie within the pages.
    pub unsafe fn store_quantized<T: Element>(
        &self,
        qkv: Slice<T>,
        slots: Slice<i32>,
        pages: &mut QuantizedPages,
    ) -> Result<()> {
        let Geometry { heads, kv_heads, head_dim } = self.geometry();
        let rows = slots.len();
        room("queries, keys and values", rows * self.qkv_width(), qkv.len())?;
        if !pages.keys.len().is_multiple_of(PAGE * self.width(kv_heads)) {
            let (expected, found) = (PAGE * self.width(kv_heads), pages.keys.len());
            return Err(CudaError::Length { what: "whole pages", expected, found });
        }
        let kernel = self.device.kernel(&format!("store_fp8_pages_{}", T::NAME))?;
        let shape = Shape { blocks: [rows, kv_heads, 2], ..Shape::of(1, THREADS) };
        let start = |heads: usize| qkv.slice((heads * head_dim).min(qkv.len())..);
        let launch = kernel.with(shape).read(start(heads)?).read(start(heads + kv_heads)?);
        let launch = launch.value(self.qkv_width() as u32).read(slots);
        let launch = launch.write(&mut pages.keys).write(&mut pages.values);
        let launch = launch.write(&mut pages.key_scales).write(&mut pages.value_scales);
        let launch = launch.value(rows as i32).value(kv_heads as u32).value(head_dim as u32);
        // SAFETY: the parameters are those of the kernel; where slots lie is the caller's promise.
        unsafe { launch.launch() }
    }
}

//! SwiGLU: silu(gate) x up on rows that hold the gate and then the up half, forward and backward.

use super::gemm::Element;
use super::lengths::{room, rows_of, side};
use super::{Device, Result, Shape, Slice, SliceMut};

const THREADS: usize = 256;

/// out\[rows, inner\] = silu(gate) up of `gate_up` \[rows, 2 inner\], for as many rows as `out` has.
///
/// # Errors
/// When lengths do not fit, or the device has failed.
pub fn forward<T: Element>(device: &Device, gate_up: Slice<T>, out: SliceMut<T>, inner: usize) -> Result<()> {
    let name = format!("swiglu_forward_{}", T::NAME);
    let rows = rows_of("activated rows", out.len(), inner)?;
    room("gate and up rows", out.len().saturating_mul(2), gate_up.len())?;
    let kernel = device.kernel(&name)?;
    let launch = kernel.with(shape::<T>(rows, inner)).read(gate_up).write(out);
    // SAFETY: the parameters are those of the kernel; lengths were checked.
    unsafe { launch.value(side(&name, inner)?).launch() }
}

/// Replaces `gate_up` \[rows, 2 inner\] by its gradient, from that of the output; there are as many rows as `grad_out`
/// \[rows, inner\] has. `activated` receives the forward pass's output once more.
///
/// # Errors
/// When lengths do not fit, or the device has failed.
pub fn backward<T: Element>(
    device: &Device,
    grad_out: Slice<T>,
    gate_up: SliceMut<T>,
    activated: Option<SliceMut<T>>,
    inner: usize,
) -> Result<()> {
    let name = format!("swiglu_backward_{}", T::NAME);
    let rows = rows_of("gradients of activated rows", grad_out.len(), inner)?;
    room("gate and up rows", grad_out.len().saturating_mul(2), gate_up.len())?;
    activated.as_ref().map_or(Ok(()), |rows| room("activated rows", grad_out.len(), rows.len()))?;
    let kernel = device.kernel(&name)?;
    let launch = kernel.with(shape::<T>(rows, inner)).read(grad_out).write(gate_up);
    // SAFETY: the parameters are those of the kernel; lengths were checked.
    unsafe { launch.write_optional(activated).value(side(&name, inner)?).launch() }
}

/// A thread takes 16 bytes of a row.
fn shape<T>(rows: usize, inner: usize) -> Shape {
    Shape::grid(rows, inner.div_ceil(THREADS * 16 / size_of::<T>()), THREADS)
}

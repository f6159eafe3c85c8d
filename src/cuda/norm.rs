//! Root-mean-square normalisation of rows of the residual stream, forward and backward.

use super::gemm::{Element, gradient_suffix};
use super::indices::{IndexSlice, check_rows};
use super::lengths::{room, rows_of, same_length, side};
use super::{Buffer, Device, Result, Shape, Slice, SliceMut, reduce};

const THREADS: usize = 256;
/// Rows whose weight gradients one block of the backward pass adds up.
const ROWS: usize = 8;

/// A norm of rows that are as long as its weight.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a, T> {
    /// A factor for each column.
    pub weight: Slice<'a, T>,
    /// What is added to the mean of squares.
    pub epsilon: f32,
}

/// Rows of the residual stream: the first ones, or those at given places, which may repeat.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    /// `[rows of the stream, columns]`.
    pub values: Slice<'a, f32>,
    /// Which of them, in order.
    pub places: Option<IndexSlice<'a>>,
}

impl<'a> From<Slice<'a, f32>> for Rows<'a> {
    fn from(values: Slice<'a, f32>) -> Self {
        Self { values, places: None }
    }
}
impl<'a> From<&'a Buffer<f32>> for Rows<'a> {
    fn from(values: &'a Buffer<f32>) -> Self {
        Slice::from(values).into()
    }
}

/// out\[row\] = x\[row\] scale weight with scale = 1 / sqrt(mean(x\[row\]^2) + epsilon), for as many rows as `out` has;
/// `scales` receives the rows' scales, for the backward pass.
///
/// # Errors
/// When lengths or places do not fit, or the device has failed.
pub fn forward<T: Element>(
    device: &Device,
    norm: Norm<T>,
    x: Rows,
    out: SliceMut<T>,
    scales: Option<SliceMut<f32>>,
) -> Result<()> {
    let name = format!("norm_forward_{}", T::NAME);
    let columns = norm.weight.len();
    let rows = rows_of("normalised rows", out.len(), columns)?;
    check_rows("rows to normalise", x.places, rows, columns, x.values.len())?;
    scales.as_ref().map_or(Ok(()), |scales| room("scales of normalised rows", rows, scales.len()))?;
    let kernel = device.kernel(&name)?;
    let launch = kernel.with(Shape::of(rows, THREADS)).read(x.values).read_optional(x.places);
    let launch = launch.read(norm.weight).value(norm.epsilon).write(out).write_optional(scales);
    // SAFETY: the parameters are those of the kernel; lengths and places were checked.
    unsafe { launch.value(side(&name, columns)?).launch() }
}

/// Adds to the gradient of x, at `grad_places` or else at its first rows, and to that of the weight. There are as many rows
/// as `grad_out` has; `scales` are those of the forward pass. Places of the gradient must be different from each other.
///
/// # Errors
/// When lengths or places do not fit, memory does not suffice, or the device has failed.
pub fn backward<G: Element, T: Element>(
    device: &Device,
    norm: Norm<T>,
    x: Rows,
    scales: Slice<f32>,
    grad_out: Slice<G>,
    grad_x: SliceMut<f32>,
    grad_places: Option<IndexSlice>,
    grad_weight: SliceMut<f32>,
) -> Result<()> {
    let name = format!("norm_backward_{}", gradient_suffix::<G, T>());
    let columns = norm.weight.len();
    let rows = rows_of("gradients of normalised rows", grad_out.len(), columns)?;
    check_rows("rows that were normalised", x.places, rows, columns, x.values.len())?;
    check_rows("gradients of rows", grad_places, rows, columns, grad_x.len())?;
    room("scales of normalised rows", rows, scales.len())?;
    same_length("the gradient of a norm's weight", columns, grad_weight.len())?;
    let blocks = rows.div_ceil(ROWS);
    let mut partial = device.allocate("partial sums of a norm's gradient", blocks * columns)?;
    let kernel = device.kernel(&name)?;
    let launch = kernel.with(Shape::of(blocks, THREADS)).read(x.values).read_optional(x.places);
    let launch = launch.read(norm.weight).read(scales).read(grad_out).write(grad_x);
    let launch = launch.read_optional(grad_places).write(&mut partial);
    // SAFETY: the parameters are those of the kernel; lengths and places were checked.
    unsafe { launch.value(side(&name, rows)?).value(side(&name, columns)?).launch()? };
    reduce::add_partial_sums(device, (&partial).into(), grad_weight)
}

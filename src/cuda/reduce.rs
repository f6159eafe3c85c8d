//! Sums over rows, and element-wise passes that belong to no other operation.

use super::gemm::Element;
use super::lengths::{rows_of, same_length, side};
use super::{Device, Result, Shape, Slice, SliceMut};

const THREADS: usize = 256;
/// Elements that a block of an element-wise pass takes.
const ELEMENTS: usize = THREADS * 4;
/// Columns and rows that a block of the column sums takes.
const SUM_TILE: (usize, usize) = (128, 256);
/// Threads of a block that adds partial sums, and the columns that it takes.
const FINISH: (usize, usize) = (512, 32);

/// Adds the sum over rows `[rows, columns]` to `target` of `columns` elements.
///
/// # Errors
/// When lengths do not fit, memory does not suffice, or the device has failed.
pub fn add_column_sums<T: Element>(
    device: &Device,
    rows: Slice<T>,
    columns: usize,
    target: SliceMut<f32>,
) -> Result<()> {
    let name = format!("column_sums_{}", T::NAME);
    let count = rows_of("rows to sum", rows.len(), columns)?;
    same_length("sums of columns", columns, target.len())?;
    let blocks = (columns.div_ceil(SUM_TILE.0), count.div_ceil(SUM_TILE.1));
    let mut partial = device.allocate("partial sums of columns", blocks.1 * columns)?;
    let kernel = device.kernel(&name)?;
    let launch = kernel.with(Shape::grid(blocks.0, blocks.1, THREADS)).read(rows);
    let launch = launch.value(side(&name, count)?).value(side(&name, columns)?).write(&mut partial);
    // SAFETY: the parameters are those of the kernel; lengths were checked.
    unsafe { launch.launch()? };
    add_partial_sums(device, (&partial).into(), target)
}

/// Adds the sum over the parts of `partial` `[parts, target.len()]` to `target`, in an order that depends on the number of
/// parts alone.
///
/// # Errors
/// When lengths do not fit, or the device has failed.
pub fn add_partial_sums(device: &Device, partial: Slice<f32>, target: SliceMut<f32>) -> Result<()> {
    let name = "add_partial_sums";
    let columns = target.len();
    let parts = rows_of("partial sums", partial.len(), columns)?;
    let kernel = device.kernel(name)?;
    let blocks = if parts == 0 { 0 } else { columns.div_ceil(FINISH.1) };
    let launch = kernel.with(Shape::of(blocks, FINISH.0)).read(partial);
    let launch = launch.value(side(name, parts)?).value(side(name, columns)?);
    // SAFETY: the parameters are those of the kernel; lengths were checked.
    unsafe { launch.write(target).launch() }
}

/// to = from, rounded or widened where their types differ.
///
/// # Errors
/// When lengths differ, or the device has failed.
pub fn convert<A: Element, B: Element>(device: &Device, from: Slice<A>, mut to: SliceMut<B>) -> Result<()> {
    if let Some(from) = from.typed::<B>() {
        return to.copy_from(from);
    }
    let length = from.len();
    same_length("elements to convert", length, to.len())?;
    let kernel = device.kernel(&format!("convert_{}_{}", A::NAME, B::NAME))?;
    let launch = kernel.with(element_wise(length)).read(from).write(to);
    // SAFETY: the parameters are those of the kernel; lengths were checked.
    unsafe { launch.value(length as u64).launch() }
}

/// Adds a bias to every row of the residual stream `[rows, bias.len()]`.
///
/// # Errors
/// When lengths do not fit, or the device has failed.
pub fn add_bias<T: Element>(device: &Device, rows: SliceMut<f32>, bias: Slice<T>) -> Result<()> {
    let name = format!("add_bias_{}", T::NAME);
    let columns = bias.len();
    let count = rows_of("rows to add a bias to", rows.len(), columns)?;
    let kernel = device.kernel(&name)?;
    let launch = kernel.with(Shape::grid(count, columns.div_ceil(ELEMENTS), THREADS)).write(rows).read(bias);
    // SAFETY: the parameters are those of the kernel; lengths were checked.
    unsafe { launch.value(side(&name, columns)?).launch() }
}

fn element_wise(length: usize) -> Shape {
    Shape::of(length.div_ceil(ELEMENTS), THREADS)
}

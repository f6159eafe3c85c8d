//! Rows of a table, and sums of rows into rows of a table.

use super::gemm::Element;
use super::lengths::{room, side};
use super::{Device, IndexSlice, Indices, Result, Shape, Slice, SliceMut};

const GATHER_THREADS: usize = 256;
const SCATTER_THREADS: usize = 128;
/// Elements that a thread takes of a row.
const WIDTH: usize = 4;

/// out\[row\] = table\[ids\[row\]\], widened, for all ids.
///
/// # Errors
/// When lengths or ids do not fit, or the device has failed.
pub fn gather<T: Element>(
    device: &Device,
    table: Slice<T>,
    ids: IndexSlice,
    out: SliceMut<f32>,
    columns: usize,
) -> Result<()> {
    let name = format!("embedding_gather_{}", T::NAME);
    ids.check("rows of a table", table.len() / columns.max(1))?;
    room("gathered rows", ids.len().saturating_mul(columns), out.len())?;
    let kernel = device.kernel(&name)?;
    let shape = Shape::grid(ids.len(), columns.div_ceil(GATHER_THREADS * WIDTH), GATHER_THREADS);
    let launch = kernel.with(shape).read(table).read(ids).write(out);
    // SAFETY: the parameters are those of the kernel; lengths and ids were checked.
    unsafe { launch.value(side(&name, columns)?).launch() }
}

/// Rows that go to the same row of a table, found on the host. In a run they keep their order.
#[derive(Debug)]
pub struct Runs {
    order: Indices,
    starts: Indices,
    targets: Indices,
}

impl Runs {
    /// Runs of rows of which the i-th is to be added to row `targets[i]` of a table.
    ///
    /// # Errors
    /// As [`Indices::upload`].
    pub fn new(device: &Device, targets: &[u32]) -> Result<Self> {
        side("add_rows_by_run", targets.len())?;
        let mut order: Vec<usize> = (0..targets.len()).collect();
        order.sort_by_key(|row| targets[*row]);
        let (mut starts, mut distinct, mut end) = (vec![0], Vec::new(), 0);
        for run in order.chunk_by(|a, b| targets[*a] == targets[*b]) {
            distinct.push(targets[run[0]]);
            end += run.len() as u32;
            starts.push(end);
        }
        let order: Vec<u32> = order.into_iter().map(|row| row as u32).collect();
        let upload = |values: &[u32]| Indices::upload(device, "runs of rows", values);
        Ok(Self { order: upload(&order)?, starts: upload(&starts)?, targets: upload(&distinct)? })
    }
}

/// Adds rows to the rows of the table that they belong to, those of each in order.
///
/// # Errors
/// When there are fewer rows than the runs have or the table is shorter than they reach, or the device has failed.
pub fn add_rows(
    device: &Device,
    rows: Slice<f32>,
    runs: &Runs,
    table: SliceMut<f32>,
    columns: usize,
) -> Result<()> {
    let name = "add_rows_by_run";
    let Runs { order, starts, targets } = runs;
    order.view().check("rows to add", rows.len() / columns.max(1))?;
    targets.view().check("rows of a table", table.len() / columns.max(1))?;
    let kernel = device.kernel(name)?;
    let shape = Shape::grid(targets.len(), columns.div_ceil(SCATTER_THREADS * WIDTH), SCATTER_THREADS);
    let launch = kernel.with(shape).read(rows).read(order.view()).read(starts.view()).read(targets.view());
    // SAFETY: the parameters are those of the kernel; the runs are made by `Runs::new`, and how far they reach was checked.
    unsafe { launch.write(table).value(side(name, columns)?).launch() }
}

//! Launches of the attention kernels: over planned forests, forward and backward, and over pages.

use super::forest::{ForestPlan, TILE};
use super::gemm::Element;
use super::lengths::room;
use super::paged::PagedPlan;
use super::{Buffer, CudaError, Device, Launch, Number, Result, Shape, Slice, SliceMut};
use crate::kernels::attention::Geometry;
use half::bf16;

/// Threads of a block of every attention kernel.
pub(super) const THREADS: usize = 128;
/// The sizes of heads that there are kernels for; others take the next.
const HEAD_DIMS: [usize; 5] = [64, 80, 96, 128, 256];

/// A number format of cached keys and values; `u8` is e4m3.
pub trait Cached: Number {
    /// What it is widened to.
    type Widened: Element;
    /// As kernels' names have it.
    const NAME: &'static str;
}
impl Cached for f32 {
    type Widened = f32;
    const NAME: &'static str = "f32";
}
impl Cached for bf16 {
    type Widened = bf16;
    const NAME: &'static str = "bf16";
}
impl Cached for u8 {
    type Widened = bf16;
    const NAME: &'static str = "fp8";
}

/// A [`ForestPlan`] on the device.
#[derive(Debug)]
pub struct ForestTables {
    rows: usize,
    prefix_rows: usize,
    query_tiles: usize,
    slots: usize,
    untils: Buffer<u32>,
    key_tiles: Buffer<u32>,
    list_offsets: Buffer<u32>,
    lists: Buffer<u32>,
    order: Buffer<u32>,
    parts: Buffer<u32>,
    sums: Buffer<u32>,
}

impl ForestTables {
    /// Copies a plan.
    ///
    /// # Errors
    /// As [`Device::upload`].
    pub fn upload(device: &Device, plan: &ForestPlan) -> Result<Self> {
        let upload = |table: &[u32]| device.upload("the tables of a forest", table);
        let key_tiles: Vec<u32> = plan.key_tiles.iter().flat_map(|tile| tile.words()).collect();
        let parts: Vec<u32> = plan.parts.iter().flat_map(|part| part.words()).collect();
        let sums: Vec<u32> = plan.sums.iter().flat_map(|sum| sum.words()).collect();
        Ok(Self {
            rows: plan.rows(),
            prefix_rows: plan.prefix_rows,
            query_tiles: plan.query_tiles(),
            slots: plan.slots,
            untils: upload(&plan.untils)?,
            key_tiles: upload(&key_tiles)?,
            list_offsets: upload(&plan.list_offsets)?,
            lists: upload(&plan.lists)?,
            order: upload(&plan.order)?,
            parts: upload(&parts)?,
            sums: upload(&sums)?,
        })
    }

    /// Elements of log-sums and of deltas.
    pub fn statistics(&self, geometry: Geometry) -> usize {
        geometry.heads * self.query_tiles * TILE
    }

    /// Elements of the partial sums of the backward pass.
    pub fn partial_sums(&self, geometry: Geometry) -> usize {
        self.slots * geometry.kv_heads * 2 * TILE * geometry.head_dim
    }

    /// Elements of gradients, or of sums of gradients, of the prefix's keys and values.
    pub fn prefix_gradients(&self, geometry: Geometry) -> usize {
        self.prefix_rows * 2 * geometry.kv_heads * geometry.head_dim
    }
}

/// Keys and values that earlier launches have computed, in packed order.
#[derive(Clone, Copy, Debug)]
pub struct Prefix<'a, T> {
    /// `[prefix rows, stride]`, of which the first `kv_heads x head_dim` count.
    pub keys: Slice<'a, T>,
    /// As the keys.
    pub values: Slice<'a, T>,
    /// Elements between rows.
    pub stride: usize,
}

/// What attention over a forest reads.
#[derive(Clone, Copy, Debug)]
pub struct ForestInputs<'a, T> {
    /// Rotated queries and keys, and values, in packed order: `[rows, (heads + 2 kv_heads) x head_dim]`.
    pub qkv: Slice<'a, T>,
    /// Needed when the plan has one.
    pub prefix: Option<Prefix<'a, T>>,
}

/// What the backward pass reads besides the inputs.
#[derive(Clone, Copy, Debug)]
pub struct ForestSaved<'a, T> {
    /// The forward pass's output, `[rows, heads, head_dim]`.
    pub out: Slice<'a, T>,
    /// Gradient with respect to `out`.
    pub grad_out: Slice<'a, T>,
    /// The forward pass's log-sums, [`ForestTables::statistics`] elements.
    pub log_sums: Slice<'a, f32>,
}

/// Where the backward pass writes.
#[derive(Debug)]
pub struct ForestGradients<'a> {
    /// `[rows, (heads + 2 kv_heads) x head_dim]`, overwritten.
    pub qkv: SliceMut<'a, f32>,
    /// `[prefix rows, 2, kv_heads, head_dim]`: gradients of the prefix's keys and values are added to it.
    pub prefix: Option<SliceMut<'a, f32>>,
    /// `[rows, 2, kv_heads, head_dim]`: such sums of launches for which these rows were the prefix.
    pub carried: Option<Slice<'a, f32>>,
    /// Scratch of [`ForestTables::statistics`] elements.
    pub deltas: SliceMut<'a, f32>,
    /// Scratch of [`ForestTables::partial_sums`] elements.
    pub partial_sums: SliceMut<'a, f32>,
}

/// A [`PagedPlan`] on the device.
#[derive(Debug)]
pub struct PagedTables {
    queries: usize,
    most_queries: usize,
    partials: usize,
    items: Buffer<u32>,
    tiles: Buffer<u32>,
    entries: Buffer<u32>,
    rows: Buffer<u32>,
    list_offsets: Buffer<u32>,
    lists: Buffer<u32>,
}

impl PagedTables {
    /// Copies a plan.
    ///
    /// # Errors
    /// As [`Device::upload`].
    pub fn upload(device: &Device, plan: &PagedPlan) -> Result<Self> {
        let upload = |table: &[u32]| device.upload("the tables of paged attention", table);
        let items: Vec<u32> = plan.items.iter().flat_map(|item| item.words()).collect();
        let tiles: Vec<u32> = plan.tiles.iter().flat_map(|tile| tile.words()).collect();
        let entries: Vec<u32> = plan.entries.iter().flat_map(|entry| entry.words()).collect();
        Ok(Self {
            queries: plan.rows.len(),
            most_queries: plan.most_queries,
            partials: plan.partials,
            items: upload(&items)?,
            tiles: upload(&tiles)?,
            entries: upload(&entries)?,
            rows: upload(&plan.rows)?,
            list_offsets: upload(&plan.list_offsets)?,
            lists: upload(&plan.lists)?,
        })
    }

    /// Elements of the partial results' statistics.
    pub fn statistics(&self, geometry: Geometry) -> usize {
        self.partials * geometry.heads * 2
    }

    /// Elements of the partial results' values.
    pub fn values(&self, geometry: Geometry) -> usize {
        self.partials * geometry.heads * geometry.head_dim
    }
}

/// What attention over pages reads.
#[derive(Clone, Copy, Debug)]
pub struct PagedInputs<'a, S: Cached> {
    /// `[rows, stride]`, of which the first `heads x head_dim` are rotated queries.
    pub queries: Slice<'a, S::Widened>,
    /// Elements between rows of queries.
    pub stride: usize,
    /// Pages of `[kv_heads, 16, head_dim]`.
    pub keys: Slice<'a, S>,
    /// As the keys.
    pub values: Slice<'a, S>,
    /// `[pages, kv_heads]` for keys and for values; needed for e4m3 alone.
    pub scales: Option<(Slice<'a, f32>, Slice<'a, f32>)>,
    /// The page at each entry that the plan names.
    pub page_table: Slice<'a, u32>,
    /// For each row, the positions of the segment that grows for it; read for those rows alone.
    pub lengths: Slice<'a, u32>,
}

/// Attention of one model on one device.
#[derive(Clone, Debug)]
pub struct Attention {
    pub(super) device: Device,
    geometry: Geometry,
    batch_invariant: bool,
    /// The size of head that the kernels are made for.
    kernel_dim: usize,
}

impl Attention {
    /// Attention with these heads. With `batch_invariant` plans must be made for it too.
    ///
    /// # Errors
    /// [`CudaError::Launch`] when there are no kernels for such heads.
    pub fn new(device: &Device, geometry: Geometry, batch_invariant: bool) -> Result<Self> {
        let Geometry { heads, kv_heads, head_dim } = geometry;
        let kernel_dim =
            HEAD_DIMS.into_iter().find(|dim| *dim >= head_dim && head_dim > 0 && head_dim.is_multiple_of(16));
        match kernel_dim {
            Some(kernel_dim) if kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads) => {
                Ok(Self { device: device.clone(), geometry, batch_invariant, kernel_dim })
            }
            _ => Err(CudaError::Launch {
                kernel: "forest_attention".into(),
                reason: format!(
                    "{heads} heads of {head_dim} elements for {kv_heads} key/value heads: heads must be a multiple of \
                     key/value heads, and their size a multiple of 16 up to 256"
                ),
            }),
        }
    }

    /// The heads.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Attention of every row: `out [rows, heads, head_dim]`, and log-sums for the backward pass.
    ///
    /// # Errors
    /// When a buffer is too short, or the device has failed.
    pub fn forest<T: Element>(
        &self,
        tables: &ForestTables,
        inputs: &ForestInputs<T>,
        out: &mut SliceMut<T>,
        log_sums: &mut SliceMut<f32>,
    ) -> Result<()> {
        self.check_inputs(tables, inputs)?;
        room("attention output", tables.rows * self.width(self.geometry.heads), out.len())?;
        room("log-sums", tables.statistics(self.geometry), log_sums.len())?;
        let mode = if self.batch_invariant { "invariant_" } else { "" };
        let kernel = self.kernel(&format!("forest_attention_{mode}"), T::NAME)?;
        let totals = if self.batch_invariant { self.total_bytes(size_of::<T>()) } else { 0 };
        let shape =
            self.shape(tables.query_tiles, self.geometry.heads, self.tile_bytes(size_of::<T>()) + totals);
        let launch = self.keys(kernel.with(shape), inputs)?.value(tables.prefix_rows as u32);
        let launch = launch.read(&tables.key_tiles).read(&tables.untils).read(&tables.list_offsets);
        let launch = launch.read(&tables.lists).read(&tables.order).write(out).write(log_sums);
        // SAFETY: the parameters are those of the kernel; inputs and outputs have room for all rows, as checked above, and the
        // tables come from a plan.
        unsafe { self.sizes(launch, tables.rows).launch() }
    }

    /// Gradients of queries, keys and values.
    ///
    /// # Errors
    /// When a buffer is too short, or the device has failed.
    pub fn forest_backward<T: Element>(
        &self,
        tables: &ForestTables,
        inputs: &ForestInputs<T>,
        saved: &ForestSaved<T>,
        gradients: &mut ForestGradients,
    ) -> Result<()> {
        self.check_inputs(tables, inputs)?;
        self.check_gradients(tables, saved, gradients)?;
        self.deltas(tables, saved, gradients)?;
        self.key_gradients(tables, inputs, saved, gradients)?;
        self.add_partial_sums(tables, gradients)?;
        self.query_gradients(tables, inputs, saved, gradients)
    }

    fn check_inputs<T: Element>(&self, tables: &ForestTables, inputs: &ForestInputs<T>) -> Result<()> {
        room("queries, keys and values", tables.rows * self.qkv_width(), inputs.qkv.len())?;
        aligned("queries, keys and values", inputs.qkv, 0)?;
        let needed = |stride: usize| match tables.prefix_rows {
            0 => 0,
            rows => (rows - 1) * stride + self.width(self.geometry.kv_heads),
        };
        match &inputs.prefix {
            None => room("keys of the prefix", needed(0), 0),
            Some(Prefix { keys, values, stride }) => {
                aligned("keys of the prefix", *keys, *stride)?;
                aligned("values of the prefix", *values, *stride)?;
                room("keys of the prefix", needed(*stride), keys.len())?;
                room("values of the prefix", needed(*stride), values.len())
            }
        }
    }

    fn check_gradients<T: Element>(
        &self,
        tables: &ForestTables,
        saved: &ForestSaved<T>,
        gradients: &ForestGradients,
    ) -> Result<()> {
        let (rows, statistics) = (tables.rows, tables.statistics(self.geometry));
        let carried = rows * 2 * self.width(self.geometry.kv_heads);
        room("attention output", rows * self.width(self.geometry.heads), saved.out.len())?;
        room("gradient of attention output", rows * self.width(self.geometry.heads), saved.grad_out.len())?;
        aligned("gradient of attention output", saved.grad_out, 0)?;
        aligned("log-sums", saved.log_sums, 0)?;
        aligned("deltas", Slice::from(&gradients.deltas), 0)?;
        room("log-sums", statistics, saved.log_sums.len())?;
        room("deltas", statistics, gradients.deltas.len())?;
        room("partial sums", tables.partial_sums(self.geometry), gradients.partial_sums.len())?;
        room("gradients", rows * self.qkv_width(), gradients.qkv.len())?;
        let prefix = gradients.prefix.as_ref().map_or(0, SliceMut::len);
        room("gradients of the prefix", tables.prefix_gradients(self.geometry), prefix)?;
        gradients.carried.as_ref().map_or(Ok(()), |sums| room("carried gradients", carried, sums.len()))
    }

    fn deltas<T: Element>(
        &self,
        tables: &ForestTables,
        saved: &ForestSaved<T>,
        gradients: &mut ForestGradients,
    ) -> Result<()> {
        let Geometry { heads, head_dim, .. } = self.geometry;
        let kernel = self.device.kernel(&format!("attention_deltas_{}", T::NAME))?;
        let launch = kernel.with(Shape::of((tables.rows * heads).div_ceil(THREADS / 32), THREADS));
        let launch = launch.read(saved.out).read(saved.grad_out).write(&mut gradients.deltas);
        let launch = launch.value(tables.rows as u32).value(heads as u32).value(head_dim as u32);
        // SAFETY: the parameters are those of the kernel; lengths were checked.
        unsafe { launch.value((tables.query_tiles * TILE) as u32).launch() }
    }

    fn key_gradients<T: Element>(
        &self,
        tables: &ForestTables,
        inputs: &ForestInputs<T>,
        saved: &ForestSaved<T>,
        gradients: &mut ForestGradients,
    ) -> Result<()> {
        let kernel = self.kernel("attention_key_gradients_", T::NAME)?;
        let shape =
            self.shape(tables.parts.len() / 4, self.geometry.kv_heads, self.backward_bytes(size_of::<T>()));
        let launch = self.keys(kernel.with(shape), inputs)?.value(tables.prefix_rows as u32);
        let launch = statistics(launch, tables, saved, &gradients.deltas);
        let launch = launch.read(&tables.key_tiles).read(&tables.untils).read(&tables.parts);
        let launch = self.gradients(launch, &mut gradients.qkv, gradients.prefix.as_mut(), gradients.carried);
        let launch = launch.write(&mut gradients.partial_sums);
        // SAFETY: the parameters are those of the kernel; lengths were checked, and the tables come from a plan.
        unsafe { self.sizes(launch, tables.rows).launch() }
    }

    fn add_partial_sums(&self, tables: &ForestTables, gradients: &mut ForestGradients) -> Result<()> {
        let Geometry { heads, kv_heads, head_dim } = self.geometry;
        let kernel = self.device.kernel("attention_key_gradient_sums")?;
        let shape = Shape { blocks: [tables.sums.len() / 4, kv_heads, 2], ..Shape::of(1, THREADS) };
        let launch = kernel.with(shape).read(Slice::from(&gradients.partial_sums));
        let launch = launch.read(&tables.key_tiles).read(&tables.sums);
        let launch = self.gradients(launch, &mut gradients.qkv, gradients.prefix.as_mut(), gradients.carried);
        let launch = launch.value(tables.prefix_rows as u32).value(heads as u32);
        // SAFETY: the parameters are those of the kernel; lengths were checked, and the tables come from a plan.
        unsafe { launch.value(kv_heads as u32).value(head_dim as u32).launch() }
    }

    fn query_gradients<T: Element>(
        &self,
        tables: &ForestTables,
        inputs: &ForestInputs<T>,
        saved: &ForestSaved<T>,
        gradients: &mut ForestGradients,
    ) -> Result<()> {
        let kernel = self.kernel("attention_query_gradients_", T::NAME)?;
        let shape = self.shape(tables.query_tiles, self.geometry.heads, self.backward_bytes(size_of::<T>()));
        let launch = self.keys(kernel.with(shape), inputs)?.value(tables.prefix_rows as u32);
        let launch = statistics(launch, tables, saved, &gradients.deltas);
        let launch = launch.read(&tables.key_tiles).read(&tables.untils).read(&tables.list_offsets);
        let launch = launch.read(&tables.lists).read(&tables.order).write(&mut gradients.qkv);
        let launch = launch.value(self.qkv_width() as u32);
        // SAFETY: the parameters are those of the kernel; lengths were checked, and the tables come from a plan.
        unsafe { self.sizes(launch, tables.rows).launch() }
    }

    /// Attention of the plan's queries to their pages: `out [rows, heads, head_dim]` at the queries' rows. `statistics` and
    /// `values` are scratch of [`PagedTables::statistics`] and [`PagedTables::values`] elements. May be recorded.
    ///
    /// # Errors
    /// When scales are missing, or the device has failed.
    ///
    /// # Safety
    /// Rows, entries of the page table and pages that the plan and the tables name must lie within the buffers.
    pub unsafe fn paged<S: Cached>(
        &self,
        tables: &PagedTables,
        inputs: &PagedInputs<S>,
        statistics: &mut SliceMut<f32>,
        values: &mut SliceMut<f32>,
        out: &mut SliceMut<S::Widened>,
    ) -> Result<()> {
        room("statistics of partial results", tables.statistics(self.geometry), statistics.len())?;
        room("values of partial results", tables.values(self.geometry), values.len())?;
        aligned("queries", inputs.queries, inputs.stride)?;
        aligned("cached keys", inputs.keys, 0)?;
        aligned("cached values", inputs.values, 0)?;
        let group = self.geometry.heads / self.geometry.kv_heads;
        let kernel = self.kernel("decode_attention_", S::NAME)?;
        let bytes = self.tile_bytes(size_of::<S::Widened>()) + self.staging_bytes(size_of::<S>());
        let mut shape = self.shape(tables.items.len() / 8, self.geometry.kv_heads, bytes);
        shape.blocks[2] *= (tables.most_queries * group).div_ceil(TILE);
        let launch = kernel.with(shape).read(inputs.queries).value(inputs.stride as u32);
        let launch = launch.read(inputs.keys).read(inputs.values);
        let launch = match inputs.scales {
            Some((keys, values)) => launch.read(keys).read(values),
            None if size_of::<S>() > 1 => launch.missing().missing(),
            None => return Err(CudaError::Length { what: "scales of cached keys", expected: 1, found: 0 }),
        };
        let launch =
            launch.read(inputs.page_table).read(&tables.items).read(&tables.tiles).read(&tables.entries);
        let launch = launch.read(inputs.lengths).write(&mut *statistics).write(&mut *values);
        // SAFETY: the parameters are those of the kernel; what the tables name is the caller's promise.
        unsafe { self.heads(launch).value(self.scale()).launch()? };
        // SAFETY: as this function's.
        unsafe { self.merge(tables, statistics, values, out) }
    }

    /// # Safety
    /// As [`Attention::paged`].
    unsafe fn merge<T: Element>(
        &self,
        tables: &PagedTables,
        statistics: &SliceMut<f32>,
        values: &SliceMut<f32>,
        out: &mut SliceMut<T>,
    ) -> Result<()> {
        let Geometry { heads, head_dim, .. } = self.geometry;
        let kernel = self.device.kernel(&format!("merge_partial_attention_{}", T::NAME))?;
        let launch = kernel.with(Shape::grid(tables.queries, heads, head_dim.next_multiple_of(32)));
        let launch = launch.read(Slice::from(statistics)).read(Slice::from(values)).read(&tables.rows);
        let launch = launch.read(&tables.list_offsets).read(&tables.lists).write(out);
        // SAFETY: the parameters are those of the kernel; what the tables name is the caller's promise.
        unsafe { launch.value(heads as u32).value(head_dim as u32).launch() }
    }

    fn kernel(&self, stem: &str, format: &str) -> Result<super::Kernel> {
        self.device.kernel(&format!("{stem}{}_{format}", self.kernel_dim))
    }

    /// Blocks for `tiles` tiles of each of `heads` heads; wide heads are done in two halves.
    fn shape(&self, tiles: usize, heads: usize, shared_bytes: usize) -> Shape {
        let halves = self.kernel_dim / self.columns();
        Shape { blocks: [tiles, heads, halves], threads: [THREADS, 1, 1], shared_bytes }
    }

    /// Columns of the result of one block.
    fn columns(&self) -> usize {
        if self.kernel_dim > 128 { self.kernel_dim / 2 } else { self.kernel_dim }
    }

    /// Shared memory of queries, keys, values and scratch; see attention.cuh.
    fn tile_bytes(&self, element: usize) -> usize {
        let (row, value_row) = (self.kernel_dim * element + 16, self.columns() * element + 16);
        let scratch = if element == 4 { TILE * TILE * 4 } else { 0 };
        TILE * (2 * row + value_row) + scratch
    }

    /// Shared memory of the sum of partial results.
    fn total_bytes(&self, element: usize) -> usize {
        let columns = if element == 4 { self.columns().next_multiple_of(32) } else { self.columns() };
        TILE * columns * 4
    }

    /// Shared memory for keys and values that are stored narrower.
    fn staging_bytes(&self, element: usize) -> usize {
        if element == 1 { TILE * (self.kernel_dim + self.columns()) } else { 0 }
    }

    /// Shared memory of the backward pass; see `forest_attention_backward.cu`.
    fn backward_bytes(&self, element: usize) -> usize {
        let stages = if element == 4 && self.kernel_dim == 256 { 1 } else { 2 };
        let scratch = if element == 4 { TILE * 32 * 4 } else { 0 };
        (2 * TILE + stages * 64) * (self.kernel_dim * element + 16) + stages * 256 + scratch
    }

    pub(super) fn width(&self, heads: usize) -> usize {
        heads * self.geometry.head_dim
    }

    pub(super) fn qkv_width(&self) -> usize {
        self.width(self.geometry.heads + 2 * self.geometry.kv_heads)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.geometry.head_dim as f32).sqrt()
    }

    /// Queries, keys, values, and those of the prefix.
    fn keys<'a, T: Element>(&self, launch: Launch<'a>, inputs: &ForestInputs<'a, T>) -> Result<Launch<'a>> {
        let (queries, keys) = (self.width(self.geometry.heads), self.width(self.geometry.kv_heads));
        let stride = self.qkv_width();
        let part = |start: usize| inputs.qkv.slice(start.min(inputs.qkv.len())..);
        let (own_keys, own_values) = (part(queries)?, part(queries + keys)?);
        let launch = launch.read(inputs.qkv).value(stride as u32).read(own_keys).read(own_values);
        let prefix = inputs.prefix.unwrap_or(Prefix { keys: own_keys, values: own_values, stride });
        let launch = launch.value(stride as u32).read(prefix.keys).read(prefix.values);
        Ok(launch.value(prefix.stride as u32))
    }

    fn gradients<'a>(
        &self,
        launch: Launch<'a>,
        own: &'a mut SliceMut<f32>,
        prefix: Option<&'a mut SliceMut<f32>>,
        carried: Option<Slice<'a, f32>>,
    ) -> Launch<'a> {
        let launch = launch.write(own).value(self.qkv_width() as u32);
        launch.write_optional(prefix).read_optional(carried)
    }

    fn heads<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
        let Geometry { heads, kv_heads, head_dim } = self.geometry;
        launch.value(heads as u32).value(kv_heads as u32).value(head_dim as u32)
    }

    fn sizes<'a>(&self, launch: Launch<'a>, rows: usize) -> Launch<'a> {
        self.heads(launch.value(rows as u32)).value(self.scale())
    }
}

/// The gradient of the output, log-sums and deltas.
fn statistics<'a, T: Element>(
    launch: Launch<'a>,
    tables: &ForestTables,
    saved: &ForestSaved<'a, T>,
    deltas: &'a SliceMut<f32>,
) -> Launch<'a> {
    let launch = launch.read(saved.grad_out).read(saved.log_sums).read(Slice::from(deltas));
    launch.value((tables.query_tiles * TILE) as u32)
}

/// The kernels read 16 bytes at a time.
fn aligned<T: Number>(what: &str, rows: Slice<T>, stride: usize) -> Result<()> {
    if rows.address().is_multiple_of(16) && (stride * size_of::<T>()).is_multiple_of(16) {
        return Ok(());
    }
    Err(CudaError::Launch {
        kernel: "attention".into(),
        reason: format!(
            "{what}: their start, or the distance of {stride} elements between rows, is no multiple of 16 bytes"
        ),
    })
}

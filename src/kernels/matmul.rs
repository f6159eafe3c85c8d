//! Matrix products whose bits do not depend on the batch.
//!
//! The right-hand matrix is packed into panels of sixteen output columns. Every output element is
//! one chain of fused multiply-adds in order of the inner index, so neither the number of rows,
//! nor the tile shape, nor the number of threads, nor the instruction set changes a bit.

use super::parallel::{Disjoint, for_each_item};
use super::simd::{Isa, Lanes, isa};
use super::{LANES, pad};
use std::cell::RefCell;
use std::ops::Range;

/// Multiply-adds below which a product stays on one thread.
const SERIAL_PRODUCTS: usize = 1 << 20;
/// Rows that one task of a parallel product works on.
const ROWS_PER_TASK: usize = 96;
/// Steps of the inner dimension between two visits of the output.
const INNER_PER_BLOCK: usize = 256;
/// Panels that one task of a parallel product works on.
const PANELS_PER_TASK: usize = 16;

/// A matrix `[inner, columns]` packed into panels of sixteen columns.
#[derive(Clone, Debug, Default)]
pub struct Packed {
    values: Vec<f32>,
    inner: usize,
    columns: usize,
}

impl Packed {
    /// Inner dimension: the length of every chain.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// Output columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    fn reshape(&mut self, inner: usize, columns: usize) {
        self.inner = inner;
        self.columns = columns;
        self.values.clear();
        self.values.resize(pad(columns) * inner, 0.0);
    }

    /// Packs the transpose of a row-major `weight [columns, inner]`: the layout of a linear layer,
    /// for its forward product.
    pub fn pack_transposed(&mut self, weight: &[f32], columns: usize, inner: usize) {
        assert_eq!(weight.len(), columns * inner, "weight shape");
        self.reshape(inner, columns);
        let tasks = self.values.chunks_mut(LANES * inner.max(1)).enumerate();
        for (panel, values) in tasks {
            for lane in 0..LANES.min(columns - panel * LANES) {
                let row = &weight[(panel * LANES + lane) * inner..][..inner];
                for (k, value) in row.iter().enumerate() {
                    values[k * LANES + lane] = *value;
                }
            }
        }
    }

    /// Packs a row-major `matrix [inner, columns]` whose rows start `stride` elements apart.
    pub fn pack(&mut self, matrix: &[f32], inner: usize, columns: usize, stride: usize) {
        assert!(inner == 0 || matrix.len() >= (inner - 1) * stride + columns, "matrix shape");
        self.reshape(inner, columns);
        for (panel, values) in self.values.chunks_mut(LANES * inner.max(1)).enumerate() {
            let first = panel * LANES;
            let width = LANES.min(columns - first);
            for k in 0..inner {
                values[k * LANES..][..width].copy_from_slice(&matrix[k * stride + first..][..width]);
            }
        }
    }
}

/// The left-hand matrix: element (row, k) lies at `row * row_stride + k * inner_stride`.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    /// The elements.
    pub values: &'a [f32],
    /// Distance between rows.
    pub row_stride: usize,
    /// Distance between elements along the inner dimension.
    pub inner_stride: usize,
}

impl<'a> Left<'a> {
    /// A row-major matrix with rows of `columns` elements.
    pub fn rows(values: &'a [f32], columns: usize) -> Self {
        Self { values, row_stride: columns, inner_stride: 1 }
    }

    /// The transpose of a row-major matrix with rows of `columns` elements.
    pub fn transposed(values: &'a [f32], columns: usize) -> Self {
        Self { values, row_stride: 1, inner_stride: columns }
    }

    fn check(&self, rows: usize, inner: usize) {
        let last = (rows.max(1) - 1) * self.row_stride + (inner.max(1) - 1) * self.inner_stride;
        assert!(rows == 0 || inner == 0 || last < self.values.len(), "left matrix too small");
    }
}

/// `out [rows, columns] = left x right`, or `+=` when `accumulate`.
///
/// `out` is row-major with rows of `right.columns()` elements. With `accumulate` the chains go on
/// from the values in `out`.
pub fn matmul(left: Left, rows: usize, right: &Packed, out: &mut [f32], accumulate: bool) {
    let (inner, columns) = (right.inner, right.columns);
    left.check(rows, inner);
    assert_eq!(out.len(), rows * columns, "output shape");
    let panels = columns.div_ceil(LANES);
    let row_tasks = rows.div_ceil(ROWS_PER_TASK);
    let panel_tasks = panels.div_ceil(PANELS_PER_TASK);
    let shared = Disjoint::new(out);
    let parallel = rows * columns * inner > SERIAL_PRODUCTS;
    for_each_item(row_tasks * panel_tasks, parallel, |task| {
        let first_row = task / panel_tasks * ROWS_PER_TASK;
        let last_row = rows.min(first_row + ROWS_PER_TASK);
        let first_panel = task % panel_tasks * PANELS_PER_TASK;
        let last_panel = panels.min(first_panel + PANELS_PER_TASK);
        block(left, first_row..last_row, right, first_panel..last_panel, &shared, accumulate);
    });
}

thread_local! {
    static LEFT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// One task of a product: some rows times some panels.
///
/// A left matrix that is read across its rows (the transpose in a weight gradient) is first
/// copied, a block of the inner dimension at a time; the chains go on through `out` from block to
/// block, which changes no bit.
fn block(
    left: Left,
    rows: Range<usize>,
    right: &Packed,
    panels: Range<usize>,
    out: &Disjoint,
    accumulate: bool,
) {
    if left.inner_stride == 1 {
        let part = Part { left, rows, right, inner: 0..right.inner, accumulate };
        return part.sweep(panels, out);
    }
    LEFT.with_borrow_mut(|copy| {
        for first in (0..right.inner).step_by(INNER_PER_BLOCK) {
            let inner = first..right.inner.min(first + INNER_PER_BLOCK);
            copy_block(left, &rows, &inner, copy);
            let left = Left { values: copy, row_stride: 1, inner_stride: rows.len() };
            let accumulate = accumulate || first > 0;
            Part { left, rows: rows.clone(), right, inner, accumulate }.sweep(panels.clone(), out);
        }
    });
}

/// Copies some rows and some inner steps to `[inner, rows]`.
fn copy_block(left: Left, rows: &Range<usize>, inner: &Range<usize>, copy: &mut Vec<f32>) {
    copy.clear();
    for k in inner.clone() {
        let source = &left.values[k * left.inner_stride..];
        if left.row_stride == 1 {
            copy.extend_from_slice(&source[rows.clone()]);
        } else {
            copy.extend(rows.clone().map(|row| source[row * left.row_stride]));
        }
    }
}

/// Some rows of a product over some steps of the inner dimension.
struct Part<'a> {
    /// The left matrix; where it is a copied block, its rows start at `rows.start`.
    left: Left<'a>,
    rows: Range<usize>,
    right: &'a Packed,
    inner: Range<usize>,
    accumulate: bool,
}

impl Part<'_> {
    fn sweep(&self, panels: Range<usize>, out: &Disjoint) {
        let columns = self.right.columns;
        let mut panel = panels.start;
        while panel < panels.end {
            let left = columns - panel * LANES;
            let count = if panel + 1 < panels.end && left >= 2 * LANES { 2 } else { 1 };
            if left >= LANES {
                let operands = self.operands(panel, count);
                operands.check(self.rows.len(), count);
                let start = self.rows.start * columns + panel * LANES;
                let out = out.pointer(start, (self.rows.len() - 1) * columns + count * LANES);
                // SAFETY: the operands were checked, the output range lies inside the buffer, and
                // only these panels of these rows are touched, which belong to this task alone.
                unsafe { tiles_at(&operands, self.rows.len(), count, out, columns, self.accumulate) };
            } else {
                self.narrow(panel, left, out);
            }
            panel += count;
        }
    }

    fn operands(&self, panel: usize, count: usize) -> Operands<'_> {
        let size = LANES * self.right.inner;
        let skipped = if self.left.inner_stride == 1 { self.rows.start * self.left.row_stride } else { 0 };
        Operands {
            left: Left { values: &self.left.values[skipped.min(self.left.values.len())..], ..self.left },
            inner: self.inner.len(),
            right: &self.right.values[panel * size + self.inner.start * LANES..(panel + count) * size],
            right_stride: LANES,
            panel_stride: size,
        }
    }

    /// The last panel when it is narrower than sixteen columns: through a padded copy.
    fn narrow(&self, panel: usize, width: usize, out: &Disjoint) {
        let columns = self.right.columns;
        let mut padded = [0.0; ROWS_PER_TASK * LANES];
        for (at, row) in self.rows.clone().enumerate() {
            // SAFETY: these elements belong to this task alone.
            let source = unsafe { out.slice(row * columns + panel * LANES, width) };
            padded[at * LANES..][..width].copy_from_slice(source);
        }
        tiles(&self.operands(panel, 1), self.rows.len(), 1, &mut padded, LANES, self.accumulate);
        for (at, row) in self.rows.clone().enumerate() {
            // SAFETY: as above.
            let target = unsafe { out.slice(row * columns + panel * LANES, width) };
            target.copy_from_slice(&padded[at * LANES..][..width]);
        }
    }
}

/// A product of `left` rows with one or more panels of sixteen columns.
#[derive(Clone, Copy)]
pub(crate) struct Operands<'a> {
    /// Left-hand rows.
    pub(crate) left: Left<'a>,
    /// Length of every chain.
    pub(crate) inner: usize,
    /// The panels: element (k, lane) of panel p at `p * panel_stride + k * right_stride + lane`.
    pub(crate) right: &'a [f32],
    /// Distance between steps of the inner dimension.
    pub(crate) right_stride: usize,
    /// Distance between panels.
    pub(crate) panel_stride: usize,
}

impl Operands<'_> {
    fn check(&self, rows: usize, panels: usize) {
        self.left.check(rows, self.inner);
        if self.inner > 0 && panels > 0 {
            let last = (panels - 1) * self.panel_stride + (self.inner - 1) * self.right_stride + LANES;
            assert!(self.right.len() >= last, "panels too small");
        }
    }
}

/// `out[row * out_stride + panel * 16 + lane]` for `rows` rows and `panels` panels.
pub(crate) fn tiles(
    operands: &Operands,
    rows: usize,
    panels: usize,
    out: &mut [f32],
    out_stride: usize,
    accumulate: bool,
) {
    if rows == 0 || panels == 0 {
        return;
    }
    operands.check(rows, panels);
    assert!(out.len() >= (rows - 1) * out_stride + panels * LANES, "output too small");
    // SAFETY: the bounds of all three operands were checked above.
    unsafe { tiles_at(operands, rows, panels, out.as_mut_ptr(), out_stride, accumulate) }
}

/// As [`tiles`], to a place that other threads may be writing around.
///
/// # Safety
/// The operands were checked, and the rows x panels elements at `out` are the caller's alone.
unsafe fn tiles_at(
    operands: &Operands,
    rows: usize,
    panels: usize,
    out: *mut f32,
    out_stride: usize,
    accumulate: bool,
) {
    // SAFETY: bounds by the caller's promise; `isa` names an instruction set only after detecting it.
    unsafe {
        match isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => tiles_avx512(operands, rows, panels, out, out_stride, accumulate),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => tiles_avx2(operands, rows, panels, out, out_stride, accumulate),
            _ => tiles_portable(operands, rows, panels, out, out_stride, accumulate),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")]
unsafe fn tiles_avx512(
    operands: &Operands,
    rows: usize,
    panels: usize,
    out: *mut f32,
    stride: usize,
    accumulate: bool,
) {
    // SAFETY: bounds checked by `tiles`.
    unsafe { sweep::<super::simd::x86::Wide, 12>(operands, rows, panels, out, stride, accumulate) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn tiles_avx2(
    operands: &Operands,
    rows: usize,
    panels: usize,
    out: *mut f32,
    stride: usize,
    accumulate: bool,
) {
    // SAFETY: bounds checked by `tiles`.
    unsafe { sweep::<super::simd::x86::Pair, 6>(operands, rows, panels, out, stride, accumulate) }
}

unsafe fn tiles_portable(
    operands: &Operands,
    rows: usize,
    panels: usize,
    out: *mut f32,
    stride: usize,
    accumulate: bool,
) {
    // SAFETY: bounds checked by `tiles`.
    unsafe { sweep::<[f32; 16], 4>(operands, rows, panels, out, stride, accumulate) }
}

/// Covers rows and panels with register tiles of at most `ROWS` rows and two panels.
#[inline(always)]
unsafe fn sweep<V: Lanes, const ROWS: usize>(
    operands: &Operands,
    rows: usize,
    panels: usize,
    out: *mut f32,
    stride: usize,
    accumulate: bool,
) {
    // Two panels at once only where the register file holds twice the rows: AVX-512.
    let wide = ROWS >= 12;
    let mut panel = 0;
    while panel < panels {
        let count = if wide && panel + 1 < panels { 2 } else { 1 };
        let mut row = 0;
        while row < rows {
            let height = rows - row;
            // SAFETY: the tile lies inside the bounds that `tiles` checked.
            unsafe {
                row += match (height, count) {
                    (12.., 2) if wide => tile::<V, 12, 2>(operands, row, panel, out, stride, accumulate),
                    (8.., 2) => tile::<V, 8, 2>(operands, row, panel, out, stride, accumulate),
                    (4.., 2) => tile::<V, 4, 2>(operands, row, panel, out, stride, accumulate),
                    (2.., 2) => tile::<V, 2, 2>(operands, row, panel, out, stride, accumulate),
                    (_, 2) => tile::<V, 1, 2>(operands, row, panel, out, stride, accumulate),
                    (12.., _) if wide => tile::<V, 12, 1>(operands, row, panel, out, stride, accumulate),
                    (6.., _) => tile::<V, 6, 1>(operands, row, panel, out, stride, accumulate),
                    (4.., _) => tile::<V, 4, 1>(operands, row, panel, out, stride, accumulate),
                    (2.., _) => tile::<V, 2, 1>(operands, row, panel, out, stride, accumulate),
                    _ => tile::<V, 1, 1>(operands, row, panel, out, stride, accumulate),
                };
            }
        }
        panel += count;
    }
}

/// One register tile; returns its number of rows.
#[inline(always)]
unsafe fn tile<V: Lanes, const R: usize, const P: usize>(
    operands: &Operands,
    row: usize,
    panel: usize,
    out: *mut f32,
    stride: usize,
    accumulate: bool,
) -> usize {
    let Operands { left, inner, right, right_stride, panel_stride } = *operands;
    // SAFETY: `tiles` checked that every row, panel and step lies inside its slice.
    unsafe {
        let out_at = out.add(row * stride + panel * LANES);
        let mut sums = [[V::zero(); P]; R];
        if accumulate {
            for (r, sums) in sums.iter_mut().enumerate() {
                for (p, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(out_at.add(r * stride + p * LANES));
                }
            }
        }
        // One moving pointer per row and panel: the inner loop computes no other address.
        let mut rows = [left.values.as_ptr(); R];
        for (r, at) in rows.iter_mut().enumerate() {
            *at = at.add((row + r) * left.row_stride);
        }
        let mut panels = [right.as_ptr(); P];
        for (p, at) in panels.iter_mut().enumerate() {
            *at = at.add((panel + p) * panel_stride);
        }
        let (mut step, mut right_step) = (0_usize, 0_usize);
        for _ in 0..inner {
            let mut b = [V::zero(); P];
            for (b, at) in b.iter_mut().zip(panels) {
                *b = V::load(at.wrapping_add(right_step));
            }
            for (sums, at) in sums.iter_mut().zip(rows) {
                let a = *at.wrapping_add(step);
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = sum.add_product(a, b);
                }
            }
            step = step.wrapping_add(left.inner_stride);
            right_step = right_step.wrapping_add(right_stride);
        }
        for (r, sums) in sums.iter().enumerate() {
            for (p, sum) in sums.iter().enumerate() {
                sum.store(out_at.add(r * stride + p * LANES));
            }
        }
    }
    R
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut x = seed;
        (0..n)
            .map(|_| {
                x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (x >> 40) as f32 / (1 << 23) as f32 - 1.0
            })
            .collect()
    }

    /// The definition: one chain of fused multiply-adds in order of k.
    fn chain(a: &[f32], w: &[f32], row: usize, column: usize, inner: usize) -> f32 {
        (0..inner).fold(0.0, |sum, k| a[row * inner + k].mul_add(w[column * inner + k], sum))
    }

    #[test]
    fn every_element_is_one_chain_for_any_shape() {
        for (rows, columns, inner) in
            [(1, 1, 1), (1, 40, 7), (13, 33, 64), (25, 48, 3), (200, 300, 65), (7, 16, 0)]
        {
            let (a, w) = (values(rows * inner, 1), values(columns * inner, 2));
            let mut packed = Packed::default();
            packed.pack_transposed(&w, columns, inner);
            let mut out = vec![9.0; rows * columns];
            matmul(Left::rows(&a, inner), rows, &packed, &mut out, false);
            for row in 0..rows {
                for column in 0..columns {
                    assert_eq!(out[row * columns + column], chain(&a, &w, row, column, inner));
                }
            }
        }
    }

    #[test]
    fn one_row_has_the_bits_it_has_in_a_batch() {
        let (rows, columns, inner) = (130, 272, 96);
        let (a, w) = (values(rows * inner, 3), values(columns * inner, 4));
        let mut packed = Packed::default();
        packed.pack_transposed(&w, columns, inner);
        let mut all = vec![0.0; rows * columns];
        matmul(Left::rows(&a, inner), rows, &packed, &mut all, false);
        let mut one = vec![0.0; columns];
        for row in 0..rows {
            matmul(Left::rows(&a[row * inner..], inner), 1, &packed, &mut one, false);
            assert_eq!(one, all[row * columns..][..columns]);
        }
    }

    #[test]
    fn accumulation_goes_on_with_the_chain() {
        let (rows, columns, inner) = (14, 50, 40);
        let (a, w) = (values(rows * inner, 5), values(inner * columns, 6));
        let mut packed = Packed::default();
        packed.pack(&w, inner, columns, columns);
        let mut whole = vec![0.0; rows * columns];
        matmul(Left::rows(&a, inner), rows, &packed, &mut whole, false);
        let mut parts = vec![0.0; rows * columns];
        for (first, last) in [(0, 17), (17, 40)] {
            packed.pack(&w[first * columns..], last - first, columns, columns);
            let left = Left { values: &a[first..], row_stride: inner, inner_stride: 1 };
            matmul(left, rows, &packed, &mut parts, true);
        }
        assert_eq!(whole, parts);
    }

    #[test]
    fn a_transposed_left_matrix_gives_the_weight_gradient() {
        let (tokens, outputs, inputs) = (30, 20, 24);
        let (dy, x) = (values(tokens * outputs, 7), values(tokens * inputs, 8));
        let mut packed = Packed::default();
        packed.pack(&x, tokens, inputs, inputs);
        let mut out = vec![0.0; outputs * inputs];
        matmul(Left::transposed(&dy, outputs), outputs, &packed, &mut out, false);
        for o in 0..outputs {
            for i in 0..inputs {
                let exact =
                    (0..tokens).fold(0.0_f32, |sum, t| dy[t * outputs + o].mul_add(x[t * inputs + i], sum));
                assert_eq!(out[o * inputs + i], exact);
            }
        }
    }
}

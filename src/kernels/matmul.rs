//! Matrix products whose bits do not depend on the batch.
//!
//! The right-hand matrix is packed into panels of sixteen output columns. Every output element is
//! one chain of fused multiply-adds in order of the inner index, so neither the number of rows,
//! nor the tile shape, nor the number of threads, nor the instruction set changes a bit.

use super::LANES;
use super::packed::{Factor, Packed, Unpacked, for_values, steps};
use super::pairs::{self, PairChains};
use super::parallel::{Disjoint, for_each_item};
use super::simd::{Isa, Lanes, isa, prefetch};
#[cfg(target_arch = "x86_64")]
use super::simd::{has_bf16_products, x86};
use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Range, RangeInclusive};

/// Multiply-adds below which a product stays on one thread, unless its weights alone take long to read.
const SERIAL_PRODUCTS: usize = 1 << 20;
/// Weights below which a product of few rows stays on one thread.
const SERIAL_WEIGHTS: usize = 1 << 17;
/// Rows that one task of a parallel product works on.
pub(super) const ROWS_PER_TASK: usize = 96;
/// Steps of the inner dimension between two visits of the output.
const INNER_PER_BLOCK: usize = 256;
/// Rows so many elements apart, or a multiple, take each other's place in a core's nearest cache: they are copied first.
const COLLIDING_STRIDE: usize = 1024;
/// Steps of such rows that are copied together.
const ROW_STEPS_PER_BLOCK: usize = 1024;
/// Rows that do not take each other's place.
const FEW_ROWS: usize = 8;
/// Panels that one task of a parallel product works on at most.
const PANELS_PER_TASK: usize = 16;
/// The same where a task first copies its rows, which pays for more than those.
const PANELS_PER_COPY: usize = 64;
/// Panels that few rows take at once, and that all rows are done with before the next.
const PANELS_AT_ONCE: usize = 4;
/// Rows for which what comes after the panels in use is asked for. With fewer memory is busy all the time, since their tiles read
/// several panels at once; with more it is quick enough.
const ROWS_THAT_READ_AHEAD: RangeInclusive<usize> = 4..=64;
/// Panels that one task of a transposed product unpacks at a time.
const PANELS_PER_TRANSPOSE: usize = 8;

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

    /// Whether its rows take each other's place in a cache.
    fn collides(&self) -> bool {
        self.inner_stride == 1 && self.row_stride.is_multiple_of(COLLIDING_STRIDE)
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
    assert_eq!(out.len(), rows * right.columns(), "output shape");
    let out = Output { buffer: Disjoint::new(out), first: 0, stride: right.columns() };
    // SAFETY: the buffer is borrowed for the time of the call; its rows are as long as there are columns.
    unsafe { matmul_to(left, rows, right, out, accumulate) }
}

/// As [`matmul`], to some columns of a wider matrix.
///
/// # Safety
/// These columns are nobody else's during the call, the buffer outlives it, and its rows are at least as long as `right` has columns.
pub(super) unsafe fn matmul_to(left: Left, rows: usize, right: &Packed, out: Output, accumulate: bool) {
    let (inner, columns) = (right.inner(), right.columns());
    left.check(rows, inner);
    let panels = columns.div_ceil(LANES);
    let shares = shares(&left, rows, panels);
    let parallel = pays_in_parallel(rows, columns, inner);
    for_values!(&right.values, values => {
        let right = Panels { values, inner, first: 0, columns, stored: true };
        with_factors(&right, left, rows, |left| {
            for_each_item(rows.div_ceil(ROWS_PER_TASK) * shares, parallel, |task| {
                let panels = share(task % shares, shares, panels);
                block(left, row_block(task / shares, rows), &right, panels, out, accumulate);
            });
        });
    });
}

/// `out [rows, inner] = left [rows, columns] x right`, transposed, or `+=` when `accumulate`: for the
/// gradient of a linear layer's input. Chains run over the columns in their order.
pub fn matmul_transposed(left: &[f32], rows: usize, right: &Packed, out: &mut [f32], accumulate: bool) {
    let (inner, columns) = (right.inner(), right.columns());
    assert!(left.len() == rows * columns && out.len() == rows * inner, "product shape");
    let left = Left::rows(left, columns);
    let out = Output { buffer: Disjoint::new(out), first: 0, stride: inner };
    for_values!(&right.values, values => {
        let right = Panels { values, inner: columns, first: 0, columns: inner, stored: false };
        with_factors(&right, left, rows, |left| {
            transposed(left, rows, values, [inner, columns], out, accumulate);
        });
    });
}

/// Lends the rows of a left matrix in the form that the products need: rounded to pairs, where panels hold
/// pairs. A matrix that is read across its rows stays as it is.
fn with_factors<T: Factor>(right: &Panels<T>, left: Left, rows: usize, work: impl FnOnce(Left)) {
    thread_local! {
        static WORDS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    if T::STEPS == 1 || left.inner_stride != 1 {
        return work(left);
    }
    // Taken, not borrowed: while this thread waits for others it may work on another product.
    let mut words = WORDS.take();
    work(pairs::of_rows(left, rows, right.inner, &mut words));
    WORDS.set(words);
}

/// [`matmul_transposed`] for one format: unpacks some panels at a time.
fn transposed<T: Factor>(
    left: Left,
    rows: usize,
    values: &[T],
    [inner, columns]: [usize; 2],
    out: Output,
    accumulate: bool,
) {
    let panels = inner.div_ceil(LANES);
    let parallel = pays_in_parallel(rows, columns, inner);
    for_each_item(panels.div_ceil(PANELS_PER_TRANSPOSE), parallel, |task| {
        let first = task * PANELS_PER_TRANSPOSE;
        let group = first..panels.min(first + PANELS_PER_TRANSPOSE);
        let size = columns.div_ceil(T::STEPS) * LANES;
        T::Transposed::with_scratch(|scratch| {
            scratch.resize(group.len() * size, T::Transposed::default());
            for (panel, out) in group.clone().zip(scratch.chunks_exact_mut(size.max(1))) {
                T::transpose_panel(values, inner, columns, panel * LANES, out);
            }
            let right = Panels { values: scratch, inner: columns, first, columns: inner, stored: false };
            for task in 0..rows.div_ceil(ROWS_PER_TASK) {
                block(left, row_block(task, rows), &right, group.clone(), out, accumulate);
            }
        });
    });
}

fn pays_in_parallel(rows: usize, columns: usize, inner: usize) -> bool {
    rows * columns * inner > SERIAL_PRODUCTS || columns * inner > SERIAL_WEIGHTS
}

/// Into how many shares the panels are divided: where there is one block of rows, equally many for each thread, as far as
/// there are panels.
fn shares(left: &Left, rows: usize, panels: usize) -> usize {
    let threads = rayon::current_num_threads();
    match rows.div_ceil(ROWS_PER_TASK) {
        0 | 1 => panels.div_ceil(PANELS_PER_TASK).next_multiple_of(threads).min(panels.div_ceil(2)),
        blocks if left.collides() && blocks >= 4 * threads => panels.div_ceil(PANELS_PER_COPY),
        _ => panels.div_ceil(PANELS_PER_TASK),
    }
}

/// The panels of a share, all shares alike but for two panels, which some kernels take at once.
fn share(number: usize, shares: usize, panels: usize) -> Range<usize> {
    let bound = |number: usize| (panels.div_ceil(2) * number / shares * 2).min(panels);
    bound(number)..bound(number + 1)
}

fn row_block(number: usize, rows: usize) -> Range<usize> {
    number * ROWS_PER_TASK..rows.min((number + 1) * ROWS_PER_TASK)
}

/// Where a product goes: element (row, column) at `first + row * stride + column` of a buffer.
#[derive(Clone, Copy)]
pub(super) struct Output {
    /// The buffer, of which others may be writing other elements.
    pub(super) buffer: Disjoint,
    /// Place of the first element.
    pub(super) first: usize,
    /// Distance between rows.
    pub(super) stride: usize,
}

impl Output {
    fn at(&self, row: usize, column: usize) -> usize {
        self.first + row * self.stride + column
    }
}

/// Panels of a right-hand matrix, from number `first` on.
#[derive(Clone, Copy)]
struct Panels<'a, T> {
    values: &'a [T],
    /// Steps of every chain.
    inner: usize,
    first: usize,
    /// Output columns of the whole matrix.
    columns: usize,
    /// Whether they are weights, which have to be brought from memory, one panel behind the other.
    stored: bool,
}

impl<T: Factor> Panels<'_, T> {
    /// Factors of every column.
    fn steps(&self) -> usize {
        steps(self.values, self.inner)
    }
}

thread_local! {
    static LEFT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// One task of a product: some rows times some panels.
///
/// A left matrix that is read across its rows (the transpose in a weight gradient) is first
/// copied, a block of the inner dimension at a time; the chains go on through `out` from block to
/// block, which changes no bit.
fn block<T: Factor>(
    left: Left,
    rows: Range<usize>,
    right: &Panels<T>,
    panels: Range<usize>,
    out: Output,
    accumulate: bool,
) {
    let steps = right.steps();
    let copy_pays = left.collides() && rows.len() > FEW_ROWS && panels.len() > PANELS_PER_TASK;
    if left.inner_stride == 1 && !copy_pays {
        let part = Part { left, first_row: 0, rows, right, inner: 0..steps, accumulate };
        return part.sweep(panels, out);
    }
    let at_once = if left.inner_stride == 1 { ROW_STEPS_PER_BLOCK } else { INNER_PER_BLOCK };
    LEFT.with_borrow_mut(|copy| {
        for first in (0..steps).step_by(at_once) {
            let inner = first..steps.min(first + at_once);
            let left = match T::STEPS {
                _ if left.inner_stride == 1 => copy_rows(left, &rows, &inner, copy),
                1 => copy_block(left, &rows, &inner, copy),
                _ => pairs::copy_block(left, right.inner, &rows, &inner, copy),
            };
            let accumulate = accumulate || first > 0;
            let first_row = rows.start;
            Part { left, first_row, rows: rows.clone(), right, inner, accumulate }.sweep(panels.clone(), out);
        }
    });
}

/// Copies some rows and some inner steps to rows that lie a little further apart than they are long.
fn copy_rows<'a>(left: Left, rows: &Range<usize>, inner: &Range<usize>, copy: &'a mut Vec<f32>) -> Left<'a> {
    copy.clear();
    for row in rows.clone() {
        copy.extend_from_slice(&left.values[row * left.row_stride..][inner.clone()]);
        copy.extend_from_slice(&[0.0; LANES]);
    }
    Left { values: copy, row_stride: inner.len() + LANES, inner_stride: 1 }
}

/// Copies some rows and some inner steps to `[inner, rows]`.
fn copy_block<'a>(left: Left, rows: &Range<usize>, inner: &Range<usize>, copy: &'a mut Vec<f32>) -> Left<'a> {
    copy.clear();
    for k in inner.clone() {
        let source = &left.values[k * left.inner_stride..];
        if left.row_stride == 1 {
            copy.extend_from_slice(&source[rows.clone()]);
        } else {
            copy.extend(rows.clone().map(|row| source[row * left.row_stride]));
        }
    }
    Left { values: copy, row_stride: 1, inner_stride: rows.len() }
}

/// Some rows of a product over some steps of the inner dimension.
struct Part<'a, T> {
    left: Left<'a>,
    /// Number of the left matrix's first row: not 0 where it is a copied block.
    first_row: usize,
    rows: Range<usize>,
    right: &'a Panels<'a, T>,
    inner: Range<usize>,
    accumulate: bool,
}

impl<T: Factor> Part<'_, T> {
    fn sweep(&self, panels: Range<usize>, out: Output) {
        let columns = self.right.columns;
        let whole = panels.start..panels.end.min(columns / LANES);
        if !whole.is_empty() {
            let operands = self.operands(whole.start, whole.len());
            operands.check(self.rows.len(), whole.len());
            let start = out.at(self.rows.start, whole.start * LANES);
            let length = (self.rows.len() - 1) * out.stride + whole.len() * LANES;
            let first = out.buffer.pointer(start, length);
            let out = Target { first, stride: out.stride, accumulate: self.accumulate };
            // SAFETY: the operands were checked, the output range lies inside the buffer, and
            // only these panels of these rows are touched, which belong to this task alone.
            unsafe { tiles_at(&operands, self.rows.len(), whole.len(), out) };
        }
        if panels.end > whole.end {
            self.narrow(whole.end, columns % LANES, out);
        }
    }

    fn operands(&self, panel: usize, count: usize) -> Operands<'_, T> {
        let size = LANES * self.right.steps();
        let skipped = (self.rows.start - self.first_row) * self.left.row_stride;
        let at = panel - self.right.first;
        let whole = self.right.stored && self.inner.len() == self.right.steps();
        let next = self.right.values.get((at + PANELS_AT_ONCE) * size..).filter(|_| whole);
        Operands {
            left: Left { values: &self.left.values[skipped.min(self.left.values.len())..], ..self.left },
            inner: self.inner.len(),
            right: &self.right.values[at * size + self.inner.start * LANES..(at + count) * size],
            right_stride: LANES,
            panel_stride: size,
            next: next.unwrap_or_default(),
        }
    }

    /// The last panel when it is narrower than sixteen columns: through a padded copy.
    fn narrow(&self, panel: usize, width: usize, out: Output) {
        let mut padded = [0.0; ROWS_PER_TASK * LANES];
        for (at, row) in self.rows.clone().enumerate() {
            // SAFETY: these elements belong to this task alone.
            let source = unsafe { out.buffer.slice(out.at(row, panel * LANES), width) };
            padded[at * LANES..][..width].copy_from_slice(source);
        }
        tiles(&self.operands(panel, 1), self.rows.len(), 1, &mut padded, LANES, self.accumulate);
        for (at, row) in self.rows.clone().enumerate() {
            // SAFETY: as above.
            let target = unsafe { out.buffer.slice(out.at(row, panel * LANES), width) };
            target.copy_from_slice(&padded[at * LANES..][..width]);
        }
    }
}

/// A product of `left` rows with one or more panels of sixteen columns.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a, T = f32> {
    /// Left-hand rows.
    pub(super) left: Left<'a>,
    /// Length of every chain.
    pub(super) inner: usize,
    /// The panels: element (k, lane) of panel p at `p * panel_stride + k * right_stride + lane`.
    pub(super) right: &'a [T],
    /// Distance between steps of the inner dimension.
    pub(super) right_stride: usize,
    /// Distance between panels.
    pub(super) panel_stride: usize,
    /// What will be used once the first panels have been, or nothing: asked for as fast as panels are used.
    pub(super) next: &'a [T],
}

/// Where tiles go, once their range is checked: element (row, lane) of panel p at `row * stride + p * 16 + lane`.
#[derive(Clone, Copy)]
struct Target {
    first: *mut f32,
    stride: usize,
    /// Whether the chains go on from what is there.
    accumulate: bool,
}

impl<T> Operands<'_, T> {
    fn check(&self, rows: usize, panels: usize) {
        self.left.check(rows, self.inner);
        assert!(self.left.inner_stride == 1 || self.left.row_stride == 1, "left matrix with two strides");
        if self.inner > 0 && panels > 0 {
            let last = (panels - 1) * self.panel_stride + (self.inner - 1) * self.right_stride + LANES;
            assert!(self.right.len() >= last, "panels too small");
        }
    }
}

/// `out[row * out_stride + panel * 16 + lane]` for `rows` rows and `panels` panels.
pub(super) fn tiles<T: Factor>(
    operands: &Operands<T>,
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
    let out = Target { first: out.as_mut_ptr(), stride: out_stride, accumulate };
    // SAFETY: the bounds of all three operands were checked above.
    unsafe { tiles_at(operands, rows, panels, out) }
}

/// As [`tiles`], to a place that other threads may be writing around.
///
/// # Safety
/// The operands were checked, and the rows x panels elements of `out` are the caller's alone.
unsafe fn tiles_at<T: Factor>(operands: &Operands<T>, rows: usize, panels: usize, out: Target) {
    let tiles: unsafe fn(&Operands<T>, usize, usize, Target) = match (isa(), T::STEPS) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, 2) if has_bf16_products() => pairs_avx512,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512 | Isa::Avx2, 2) => pairs_avx2,
        (_, 2) => pairs_portable,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, _) => tiles_avx512,
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => tiles_avx2,
        _ => tiles_portable,
    };
    // SAFETY: bounds by the caller's promise; `isa` names an instruction set only after detecting it.
    unsafe { tiles(operands, rows, panels, out) }
}

/// A [`Sweep`] with some lanes, rows and steps, compiled for an instruction set.
macro_rules! tiles_with {
    ($(#[$attribute:meta])* $name:ident, $lanes:ty, $rows:literal, $steps:literal) => {
        $(#[$attribute])*
        unsafe fn $name<T: Factor>(operands: &Operands<T>, rows: usize, panels: usize, out: Target) {
            // SAFETY: bounds checked by `tiles`.
            unsafe {
                if operands.left.inner_stride != 1 {
                    Sweep::<$lanes, T, $rows, $steps, true, false>::new(operands, rows, out).run(panels);
                } else if !operands.next.is_empty() && ROWS_THAT_READ_AHEAD.contains(&rows) {
                    Sweep::<$lanes, T, $rows, $steps, false, true>::new(operands, rows, out).run(panels);
                } else {
                    Sweep::<$lanes, T, $rows, $steps, false, false>::new(operands, rows, out).run(panels);
                }
            }
        }
    };
}

tiles_with! {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512bf16,avx512f,avx512vl,avx512dq,avx512bw,avx2,f16c,fma")]
    pairs_avx512, x86::WidePairs, 12, 1
}
tiles_with! {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,f16c,fma")]
    pairs_avx2, PairChains, 4, 1
}
tiles_with! { pairs_portable, PairChains, 4, 1 }
tiles_with! {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,f16c,fma")]
    tiles_avx512, x86::Wide, 12, 1
}
// Four steps at once: half of this loop would else be counting, for which two threads that share a core have no room.
tiles_with! {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,f16c,fma")]
    tiles_avx2, x86::Pair, 6, 4
}
tiles_with! { tiles_portable, [f32; 16], 4, 1 }

/// Covers rows and panels with register tiles of at most `ROWS` rows, whose loop counts every `STEPS` steps.
/// `ACROSS` is a left matrix whose rows are adjacent, not its steps; with `AHEAD` what comes next is asked for.
struct Sweep<'a, V, T, const ROWS: usize, const STEPS: usize, const ACROSS: bool, const AHEAD: bool> {
    operands: &'a Operands<'a, T>,
    rows: usize,
    out: Target,
    /// What is asked for next, as fast as the panels at hand are used. Memory would else wait whenever a second tile of rows
    /// goes over panels that the first has brought near.
    ahead: *const u8,
    lanes: PhantomData<V>,
}

impl<'a, V: Lanes, T: Factor, const ROWS: usize, const STEPS: usize, const ACROSS: bool, const AHEAD: bool>
    Sweep<'a, V, T, ROWS, STEPS, ACROSS, AHEAD>
{
    fn new(operands: &'a Operands<'a, T>, rows: usize, out: Target) -> Self {
        Self { operands, rows, out, ahead: operands.next.as_ptr().cast(), lanes: PhantomData }
    }

    /// Goes over all rows and so many panels.
    ///
    /// # Safety
    /// They lie inside what `tiles` checked.
    #[inline(always)]
    unsafe fn run(mut self, panels: usize) {
        let few = self.rows % ROWS % 4;
        let (many, pair, single) = (self.rows - few, few & 2, few & 1);
        for first in (0..panels).step_by(PANELS_AT_ONCE) {
            let group = first..panels.min(first + PANELS_AT_ONCE);
            self.ahead = self.operands.next.as_ptr().wrapping_add(first * self.operands.inner * LANES).cast();
            // SAFETY: by the caller's promise.
            unsafe {
                self.many_rows(many, group.clone());
                self.few_rows(many, pair, group.clone());
                self.few_rows(many + pair, single, group);
            }
        }
    }

    /// The first rows, as many as tiles of four and more cover, of some panels: each of these is swept while it is in the
    /// nearest cache.
    ///
    /// # Safety
    /// They lie inside what `tiles` checked.
    #[inline(always)]
    unsafe fn many_rows(&mut self, rows: usize, panels: Range<usize>) {
        // Two panels at once only where the register file holds twelve rows of them: AVX-512.
        let wide = ROWS >= 12;
        let mut panel = panels.start;
        while panel < panels.end {
            let count = if wide && panel + 1 < panels.end { 2 } else { 1 };
            let mut row = 0;
            while row < rows {
                // SAFETY: by the caller's promise.
                let (height, _) = unsafe {
                    match (rows - row, count) {
                        (12.., 2) if wide => self.tile::<12, 2>(row, panel),
                        (8.., 2) => self.tile::<8, 2>(row, panel),
                        (_, 2) => self.tile::<4, 2>(row, panel),
                        (12.., _) if wide => self.tile::<12, 1>(row, panel),
                        (6.., _) if ROWS == 6 => self.tile::<6, 1>(row, panel),
                        _ => self.tile::<4, 1>(row, panel),
                    }
                };
                row += height;
            }
            panel += count;
        }
    }

    /// One or two rows, from `row` on, of some panels: several of these at once, since the sums of one alone would wait for
    /// each other.
    ///
    /// # Safety
    /// As [`Self::many_rows`].
    #[inline(always)]
    unsafe fn few_rows(&mut self, row: usize, rows: usize, panels: Range<usize>) {
        let mut panel = panels.start;
        while panel < panels.end && rows > 0 {
            // SAFETY: by the caller's promise.
            let (_, width) = unsafe {
                match (rows, panels.end - panel) {
                    (1, 4..) => self.tile::<1, 4>(row, panel),
                    (1, 2..) => self.tile::<1, 2>(row, panel),
                    (1, _) => self.tile::<1, 1>(row, panel),
                    (_, 4..) if ROWS >= 12 => self.tile::<2, 4>(row, panel),
                    (_, 2..) => self.tile::<2, 2>(row, panel),
                    _ => self.tile::<2, 1>(row, panel),
                }
            };
            panel += width;
        }
    }

    /// One register tile; returns its numbers of rows and panels.
    ///
    /// # Safety
    /// It lies inside what `tiles` checked.
    #[inline(always)]
    unsafe fn tile<const R: usize, const P: usize>(&mut self, row: usize, panel: usize) -> (usize, usize) {
        let Operands { left, inner, right, right_stride, panel_stride, .. } = *self.operands;
        let Target { first, stride, accumulate } = self.out;
        let (row_stride, inner_stride) = if ACROSS { (1, left.inner_stride) } else { (left.row_stride, 1) };
        // SAFETY: `tiles` checked that every row, panel and step lies inside its slice.
        unsafe {
            let out_at = first.add(row * stride + panel * LANES);
            let mut sums = [[V::zero(); P]; R];
            if accumulate {
                for (r, sums) in sums.iter_mut().enumerate() {
                    for (p, sum) in sums.iter_mut().enumerate() {
                        *sum = V::load(out_at.add(r * stride + p * LANES));
                    }
                }
            }
            let mut rows = [left.values.as_ptr(); R];
            for (r, at) in rows.iter_mut().enumerate() {
                *at = at.add((row + r) * row_stride);
            }
            let mut panels = [right.as_ptr(); P];
            for (p, at) in panels.iter_mut().enumerate() {
                *at = at.add((panel + p) * panel_stride);
            }
            let pace = (R * P * STEPS * size_of::<[T; LANES]>()).div_ceil(self.rows);
            for _ in 0..inner / STEPS {
                if AHEAD {
                    let start = self.ahead;
                    self.ahead = start.wrapping_add(pace);
                    prefetch(start, self.ahead);
                }
                for step in 0..STEPS {
                    add_step(&mut sums, &rows, if ACROSS { 0 } else { step }, &panels);
                    if ACROSS {
                        rows = rows.map(|at| at.wrapping_add(left.inner_stride));
                    }
                    panels = panels.map(|at| at.wrapping_add(right_stride));
                }
                if !ACROSS {
                    rows = rows.map(|at| at.wrapping_add(STEPS));
                }
            }
            for step in 0..inner % STEPS {
                add_step(&mut sums, &rows, step * inner_stride, &panels);
                panels = panels.map(|at| at.wrapping_add(right_stride));
            }
            for (r, sums) in sums.iter().enumerate() {
                for (p, sum) in sums.iter().enumerate() {
                    sum.store(out_at.add(r * stride + p * LANES));
                }
            }
        }
        (R, P)
    }
}

/// Adds the products of one step to a tile's sums: of an element of every row, and sixteen factors of every panel.
///
/// # Safety
/// These elements, `offset` behind every row's, and factors can be read.
#[inline(always)]
unsafe fn add_step<V: Lanes, T: Factor, const R: usize, const P: usize>(
    sums: &mut [[V; P]; R],
    rows: &[*const f32; R],
    offset: usize,
    panels: &[*const T; P],
) {
    // SAFETY: the caller vouches for the elements.
    unsafe {
        let mut b = [V::zero(); P];
        for (b, at) in b.iter_mut().zip(panels) {
            *b = T::load(*at);
        }
        for (sums, at) in sums.iter_mut().zip(rows) {
            let a = *at.wrapping_add(offset);
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = sum.add_product(a, b);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::dtype::Dtype;

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
        for (rows, columns, inner) in [
            (1, 1, 1),
            (1, 140, 7),
            (2, 100, 65),
            (3, 170, 40),
            (13, 33, 64),
            (25, 48, 3),
            (200, 300, 65),
            (7, 16, 0),
            (110, 33, 2048),
        ] {
            let (a, w) = (values(rows * inner, 1), values(columns * inner, 2));
            let packed = Packed::of_weight(Dtype::F32, &w, columns, inner);
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
    fn shares_take_every_panel_once_and_are_alike() {
        for panels in 1..200_usize {
            for shares in 1..=panels.div_ceil(2) {
                let all: Vec<_> = (0..shares).map(|number| share(number, shares, panels)).collect();
                let lengths = || all.iter().map(ExactSizeIterator::len);
                assert!(all.iter().cloned().flatten().eq(0..panels));
                assert!(
                    lengths().min() > Some(0) && lengths().max() <= lengths().min().map(|least| least + 2)
                );
            }
        }
    }

    #[test]
    fn one_row_has_the_bits_it_has_in_a_batch() {
        let (rows, columns, inner) = (130, 272, 96);
        let (a, w) = (values(rows * inner, 3), values(columns * inner, 4));
        let packed = Packed::of_weight(Dtype::F32, &w, columns, inner);
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
        for outputs in [1, 20, 97, 200] {
            let (tokens, inputs) = (30, 24);
            let (dy, x) = (values(tokens * outputs, 7), values(tokens * inputs, 8));
            let mut packed = Packed::default();
            packed.pack(&x, tokens, inputs, inputs);
            let mut out = vec![0.0; outputs * inputs];
            matmul(Left::transposed(&dy, outputs), outputs, &packed, &mut out, false);
            for o in 0..outputs {
                for i in 0..inputs {
                    let exact = (0..tokens)
                        .fold(0.0_f32, |sum, t| dy[t * outputs + o].mul_add(x[t * inputs + i], sum));
                    assert_eq!(out[o * inputs + i], exact);
                }
            }
        }
    }

    #[test]
    fn weights_of_every_format_have_the_bits_of_their_widened_values() {
        for dtype in Dtype::ALL {
            for (rows, columns, inner) in [(1, 40, 33), (14, 50, 40), (100, 272, 65)] {
                let (a, mut w) = (values(rows * inner, 9), values(columns * inner, 10));
                let packed = Packed::of_weight(dtype, &w, columns, inner);
                dtype.round(&mut w);
                let mut out = vec![0.0; rows * columns];
                matmul(Left::rows(&a, inner), rows, &packed, &mut out, false);
                for row in 0..rows {
                    for column in 0..columns {
                        assert_eq!(out[row * columns + column], chain(&a, &w, row, column, inner));
                    }
                }
            }
        }
    }

    #[test]
    fn a_transposed_product_runs_its_chains_over_the_columns() {
        for dtype in Dtype::ALL {
            for (rows, columns, inner) in [(1, 1, 1), (3, 40, 33), (100, 50, 300), (7, 16, 16), (0, 5, 5)] {
                let (dy, mut w) = (values(rows * columns, 11), values(columns * inner, 12));
                let packed = Packed::of_weight(dtype, &w, columns, inner);
                dtype.round(&mut w);
                let mut out = vec![0.5; rows * inner];
                matmul_transposed(&dy, rows, &packed, &mut out, true);
                for row in 0..rows {
                    for i in 0..inner {
                        let exact = (0..columns)
                            .fold(0.5_f32, |sum, o| dy[row * columns + o].mul_add(w[o * inner + i], sum));
                        assert_eq!(out[row * inner + i], exact);
                    }
                }
            }
        }
    }
}

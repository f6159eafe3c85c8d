//! The right-hand matrix of a product: panels of sixteen columns.

use super::dtype::{Dtype, Element, Products};
use super::pairs::{self, Pair};
use super::simd::Lanes;
use super::{LANES, pad};
use half::{bf16, f16};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Elements that one task packs at least.
pub(super) const ELEMENTS_PER_TASK: usize = 1 << 16;

/// A matrix `[inner, columns]` packed into panels of sixteen columns.
///
/// For a linear layer with `weight [outputs, inputs]` a column holds one output's weights: this is
/// the only place where a model's matrices are kept, in the model's number format.
#[derive(Clone, Debug)]
pub struct Packed {
    pub(super) values: Values,
    inner: usize,
    columns: usize,
}

/// The panels, in one of the formats.
#[derive(Clone, Debug)]
pub(super) enum Values {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    /// Of bf16, two inner steps together.
    Pairs(Vec<Pair>),
}

/// Evaluates an expression for the panels, whatever their format.
macro_rules! for_values {
    ($values:expr, $panels:ident => $body:expr) => {
        match $values {
            $crate::kernels::packed::Values::F32($panels) => $body,
            $crate::kernels::packed::Values::Bf16($panels) => $body,
            $crate::kernels::packed::Values::F16($panels) => $body,
            $crate::kernels::packed::Values::Pairs($panels) => $body,
        }
    };
}
pub(super) use for_values;

/// What panels are made of: numbers of one of the formats, or pairs of them.
pub(super) trait Factor: Copy + Default + Send + Sync + 'static {
    /// Inner steps of a chain that one factor holds.
    const STEPS: usize;
    /// What panels are unpacked to for products with the transpose.
    type Transposed: Unpacked;
    /// Reads sixteen factors into lanes.
    ///
    /// # Safety
    /// As [`Lanes::load`].
    unsafe fn load<V: Lanes>(from: *const Self) -> V;
    /// As [`Packed::set_columns`], for columns of panels with `inner` steps.
    fn set_columns(panels: &mut [Self], inner: usize, columns: &Range<usize>, weights: &[f32]);
    /// As [`Packed::column`].
    fn column(panels: &[Self], column: usize, out: &mut [f32]);
    /// Sixteen inner steps of every panel from `first` on, transposed: one panel of the matrix whose chains
    /// run over the columns. Steps past the end are zero.
    fn transpose_panel(
        panels: &[Self],
        inner: usize,
        columns: usize,
        first: usize,
        out: &mut [Self::Transposed],
    );
}

/// Factors that panels are unpacked to.
pub(super) trait Unpacked: Factor {
    /// Lends this thread's buffer for them.
    fn with_scratch<R>(work: impl FnOnce(&mut Vec<Self>) -> R) -> R;
}

/// Implements [`Unpacked`].
macro_rules! unpacked {
    ($factor:ty) => {
        impl Unpacked for $factor {
            fn with_scratch<R>(work: impl FnOnce(&mut Vec<Self>) -> R) -> R {
                thread_local! {
                    static SCRATCH: RefCell<Vec<$factor>> = const { RefCell::new(Vec::new()) };
                }
                SCRATCH.with_borrow_mut(work)
            }
        }
    };
}
unpacked!(f32);
unpacked!(Pair);

/// Implements [`Factor`] for a number format.
macro_rules! factor {
    ($element:ty, $load:ident) => {
        impl Factor for $element {
            const STEPS: usize = 1;
            type Transposed = f32;
            #[inline(always)]
            unsafe fn load<V: Lanes>(from: *const Self) -> V {
                // SAFETY: by the caller's promise.
                unsafe { V::$load(from) }
            }
            fn set_columns(panels: &mut [Self], inner: usize, columns: &Range<usize>, weights: &[f32]) {
                set_columns(panels, inner, columns, weights);
            }
            fn column(panels: &[Self], column: usize, out: &mut [f32]) {
                let start = column / LANES * LANES * out.len() + column % LANES;
                for (out, value) in out.iter_mut().zip(panels[start..].iter().step_by(LANES)) {
                    *out = value.widen_one();
                }
            }
            fn transpose_panel(panels: &[Self], inner: usize, columns: usize, first: usize, out: &mut [f32]) {
                transpose_panel(panels, inner, columns, first, out);
            }
        }
    };
}
factor!(f32, load);
factor!(bf16, load_bf16);
factor!(f16, load_f16);

impl Factor for Pair {
    const STEPS: usize = 2;
    type Transposed = Self;
    #[inline(always)]
    unsafe fn load<V: Lanes>(from: *const Self) -> V {
        // SAFETY: by the caller's promise; a pair is a 32-bit word.
        unsafe { V::load(from.cast()) }
    }
    fn set_columns(panels: &mut [Self], inner: usize, columns: &Range<usize>, weights: &[f32]) {
        pairs::set_columns(panels, inner, columns, weights);
    }
    fn column(panels: &[Self], column: usize, out: &mut [f32]) {
        pairs::column(panels, column, out);
    }
    fn transpose_panel(panels: &[Self], inner: usize, columns: usize, first: usize, out: &mut [Self]) {
        pairs::transpose_panel(panels, inner, columns, first, out);
    }
}

impl Default for Packed {
    fn default() -> Self {
        Self { values: Values::F32(Vec::new()), inner: 0, columns: 0 }
    }
}

impl Packed {
    /// The zero matrix.
    pub fn zeros(dtype: Dtype, inner: usize, columns: usize) -> Self {
        let length = pad(columns) * inner;
        let values = match dtype {
            Dtype::F32 => Values::F32(vec![0.0; length]),
            Dtype::Bf16 => Values::Bf16(vec![bf16::ZERO; length]),
            Dtype::F16 => Values::F16(vec![f16::ZERO; length]),
        };
        Self { values, inner, columns }
    }

    /// A linear layer's row-major `weight [columns, inner]`, for its forward product.
    pub fn of_weight(dtype: Dtype, weight: &[f32], columns: usize, inner: usize) -> Self {
        assert_eq!(weight.len(), columns * inner, "weight shape");
        let mut packed = Self::zeros(dtype, inner, columns);
        packed.set_columns(0, weight);
        packed
    }

    /// Inner dimension: the length of every chain.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// Output columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Replaces the columns from `first` on; `weights [count, inner]` is row-major. Values are rounded
    /// to the format.
    pub fn set_columns(&mut self, first: usize, weights: &[f32]) {
        if self.inner == 0 {
            return;
        }
        let (inner, columns) = (self.inner, first..first + weights.len() / self.inner);
        assert!(columns.end <= self.columns && weights.len().is_multiple_of(inner), "weight shape");
        for_values!(&mut self.values, panels => Factor::set_columns(panels, inner, &columns, weights));
    }

    /// Copies one column, widened, to `out [inner]`.
    pub fn column(&self, column: usize, out: &mut [f32]) {
        assert!(column < self.columns && out.len() == self.inner, "column out of range");
        for_values!(&self.values, panels => Factor::column(panels, column, out));
    }

    /// How products with this matrix are computed.
    pub fn products(&self) -> Products {
        match self.values {
            Values::Pairs(_) => Products::Bf16,
            _ => Products::F32,
        }
    }

    /// Changes how products with this matrix are computed; what is no bf16 yet is rounded to it.
    pub fn set_products(&mut self, products: Products) {
        if self.products() == products {
            return;
        }
        let lanes = pad(self.columns);
        let values = match products {
            Products::F32 => Values::Bf16(vec![bf16::ZERO; lanes * self.inner]),
            Products::Bf16 => Values::Pairs(vec![Pair::default(); lanes * self.inner.div_ceil(2)]),
        };
        let mut repacked = Self { values, ..*self };
        let mut columns = vec![0.0; self.inner * LANES];
        for first in (0..self.columns).step_by(LANES) {
            let count = LANES.min(self.columns - first);
            for (at, out) in columns.chunks_exact_mut(self.inner.max(1)).take(count).enumerate() {
                self.column(first + at, out);
            }
            repacked.set_columns(first, &columns[..count * self.inner]);
        }
        *self = repacked;
    }

    /// Makes this a matrix of passing values whose products are computed in that way.
    pub fn set_passing(&mut self, products: Products) {
        if self.products() == products {
            return;
        }
        let values = match products {
            Products::F32 => Values::F32(Vec::new()),
            Products::Bf16 => Values::Pairs(Vec::new()),
        };
        *self = Self { values, inner: 0, columns: 0 };
    }

    /// Packs a row-major `matrix [inner, columns]` of passing values whose rows start `stride` elements
    /// apart.
    pub fn pack(&mut self, matrix: &[f32], inner: usize, columns: usize, stride: usize) {
        assert!(inner == 0 || matrix.len() >= (inner - 1) * stride + columns, "matrix shape");
        self.reshape(inner, columns);
        match &mut self.values {
            Values::F32(panels) => pack(panels, matrix, inner, columns, stride),
            Values::Pairs(panels) => pairs::pack(panels, matrix, inner, columns, stride),
            // `reshape` leaves no other.
            Values::Bf16(_) | Values::F16(_) => {}
        }
    }

    /// Packs the transpose of a row-major `matrix [columns, inner]` of passing values.
    pub fn pack_transposed(&mut self, matrix: &[f32], columns: usize, inner: usize) {
        assert_eq!(matrix.len(), columns * inner, "matrix shape");
        self.reshape(inner, columns);
        self.set_columns(0, matrix);
    }

    /// A matrix of passing values of that shape, in the same memory.
    fn reshape(&mut self, inner: usize, columns: usize) {
        (self.inner, self.columns) = (inner, columns);
        if matches!(self.values, Values::Bf16(_) | Values::F16(_)) {
            self.values = Values::F32(Vec::new());
        }
        for_values!(&mut self.values, panels => reshape(panels, inner, columns));
    }
}

/// Makes panels of that shape, with zeros in lanes that have no column; the others are to be written.
fn reshape<T: Factor>(panels: &mut Vec<T>, inner: usize, columns: usize) {
    let size = steps(panels, inner) * LANES;
    panels.resize(columns.div_ceil(LANES) * size, T::default());
    if !columns.is_multiple_of(LANES) {
        let last = panels.len() - size;
        panels[last..].fill(T::default());
    }
}

/// Factors that hold `inner` steps of a chain.
pub(super) fn steps<T: Factor>(_: &[T], inner: usize) -> usize {
    inner.div_ceil(T::STEPS)
}

/// Packs a row-major `matrix [inner, columns]` whose rows start `stride` elements apart.
fn pack(panels: &mut [f32], matrix: &[f32], inner: usize, columns: usize, stride: usize) {
    let size = LANES * inner.max(1);
    let tasks = panels.par_chunks_mut(size).with_min_len(ELEMENTS_PER_TASK.div_ceil(size));
    tasks.enumerate().for_each(|(panel, values)| {
        let first = panel * LANES;
        let width = LANES.min(columns - first);
        for (out, row) in values.as_chunks_mut().0.iter_mut().zip(matrix[first..].chunks(stride)) {
            match row[..width].as_array::<LANES>() {
                // Of known length: moves instead of a call.
                Some(whole) => *out = *whole,
                None => out[..width].copy_from_slice(&row[..width]),
            }
        }
    });
}

fn set_columns<T: Element>(panels: &mut [T], inner: usize, columns: &Range<usize>, weights: &[f32]) {
    let size = LANES * inner;
    let first_panel = columns.start / LANES;
    let touched = &mut panels[first_panel * size..columns.end.div_ceil(LANES) * size];
    touched.par_chunks_mut(size).with_min_len(ELEMENTS_PER_TASK.div_ceil(size)).enumerate().for_each(
        |(at, panel)| {
            let first = (first_panel + at) * LANES;
            let lanes = columns.start.max(first)..columns.end.min(first + LANES);
            let rows = &weights[(lanes.start - columns.start) * inner..(lanes.end - columns.start) * inner];
            set_lanes(panel, inner, lanes.start - first, rows);
        },
    );
}

/// Writes some lanes of one panel; whole tiles are narrowed together.
fn set_lanes<T: Element>(panel: &mut [T], inner: usize, first: usize, rows: &[f32]) {
    let mut tile = [0.0; LANES * LANES];
    if rows.len() == LANES * inner {
        for (at, steps) in panel.chunks_mut(LANES * LANES).enumerate() {
            let width = steps.len() / LANES;
            for (lane, row) in rows.chunks_exact(inner).enumerate() {
                for (k, value) in row[at * LANES..][..width].iter().enumerate() {
                    tile[k * LANES + lane] = *value;
                }
            }
            T::narrow(&tile[..steps.len()], steps);
        }
        return;
    }
    for (lane, row) in rows.chunks_exact(inner).enumerate() {
        for (k, value) in row.iter().enumerate() {
            panel[k * LANES + first + lane] = T::narrow_one(*value);
        }
    }
}

/// As [`Factor::transpose_panel`], widened, to `out [columns, 16]`.
fn transpose_panel<T: Element>(panels: &[T], inner: usize, columns: usize, first: usize, out: &mut [f32]) {
    let width = LANES.min(inner - first);
    let mut buffer = [0.0; LANES * LANES];
    for (panel, out) in panels.chunks_exact(LANES * inner).zip(out.chunks_mut(LANES * LANES)) {
        let tile = T::widened(&panel[first * LANES..][..width * LANES], &mut buffer).as_chunks::<LANES>().0;
        for (lane, out) in out.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            for (out, step) in out.iter_mut().zip(tile) {
                *out = step[lane];
            }
            out[width..].fill(0.0);
        }
    }
    debug_assert!(out.len() == columns * LANES);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_come_back_rounded_to_the_format() {
        let (inner, columns) = (37, 50);
        let weight: Vec<f32> = (0..inner * columns).map(|i| (i as f32 * 0.37).sin()).collect();
        for dtype in Dtype::ALL {
            let whole = Packed::of_weight(dtype, &weight, columns, inner);
            let mut parts = Packed::zeros(dtype, inner, columns);
            for (first, last) in [(0, 3), (3, 40), (40, 50)] {
                parts.set_columns(first, &weight[first * inner..last * inner]);
            }
            let (mut column, mut from_parts) = (vec![0.0; inner], vec![0.0; inner]);
            for at in 0..columns {
                let mut expected = weight[at * inner..][..inner].to_vec();
                dtype.round(&mut expected);
                whole.column(at, &mut column);
                parts.column(at, &mut from_parts);
                assert_eq!((&column, &from_parts), (&expected, &expected));
            }
        }
    }
}

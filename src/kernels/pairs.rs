//! Pairs of bf16 numbers, and products of them: what `AVX512_BF16` multiplies.
//!
//! Both factors of a product are rounded to bf16 and stored two inner steps to a 32-bit word, the even
//! one in the lower half. An output element is one chain over the pairs in their order, each adding its
//! odd product and then its even one with fused multiply-adds that read and write numbers below the
//! normal range as zero. That is what the instruction does, so other machines get the same bits, slowly.

use super::LANES;
use super::matmul::{Left, ROWS_PER_TASK};
use super::packed::ELEMENTS_PER_TASK;
use super::parallel::for_each_row;
use super::simd::{Lanes, multiversion};
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// Two bf16 numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Pair(u32);

impl Pair {
    /// Rounds two numbers to the nearest, ties to even.
    #[inline(always)]
    pub(crate) fn of(even: f32, odd: f32) -> Self {
        Self(upper_half(even) >> 16 | upper_half(odd))
    }

    #[inline(always)]
    fn even(self) -> f32 {
        f32::from_bits(self.0 << 16)
    }

    #[inline(always)]
    fn odd(self) -> f32 {
        f32::from_bits(self.0 & 0xffff_0000)
    }

    /// The pair as a word that moves through registers of floating-point numbers.
    #[inline(always)]
    fn word(self) -> f32 {
        f32::from_bits(self.0)
    }
}

/// A number rounded to bf16, in the upper half of a word.
#[inline(always)]
fn upper_half(value: f32) -> u32 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) & 0xffff_0000;
    if value.is_nan() { bits & 0xffff_0000 | 0x0040_0000 } else { rounded }
}

/// Sixteen chains of products of pairs, on any machine.
#[derive(Clone, Copy)]
pub(super) struct PairChains([f32; LANES]);

/// Zero for numbers below the normal range.
#[inline(always)]
fn flushed(value: f32) -> f32 {
    if value.abs() < f32::MIN_POSITIVE { 0.0_f32.copysign(value) } else { value }
}

// SAFETY: plain loops; `load` and `store` touch exactly sixteen elements.
unsafe impl Lanes for PairChains {
    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for sixteen readable elements.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: as above.
        Self(unsafe { <[f32; LANES]>::load_bf16(from) })
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const half::f16) -> Self {
        // SAFETY: as above.
        Self(unsafe { <[f32; LANES]>::load_f16(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for sixteen writable elements.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn add_product(mut self, a: f32, b: Self) -> Self {
        let a = Pair(a.to_bits());
        for (lane, b) in self.0.iter_mut().zip(b.0) {
            let b = Pair(b.to_bits());
            let odd = flushed(flushed(a.odd()).mul_add(flushed(b.odd()), flushed(*lane)));
            *lane = flushed(flushed(a.even()).mul_add(flushed(b.even()), odd));
        }
        self
    }
}

multiversion! {
    /// Two numbers to a word.
    fn pair_row(row: &[f32], words: &mut [f32]) {
        let (pairs, last) = row.as_chunks::<2>();
        for ([even, odd], word) in pairs.iter().zip(words.iter_mut()) {
            *word = Pair::of(*even, *odd).word();
        }
        if let ([last], Some(word)) = (last, words.last_mut()) {
            *word = Pair::of(*last, 0.0).word();
        }
    }
}

multiversion! {
    /// Two rows to one of words.
    fn pair_rows(even: &[f32], odd: &[f32], words: &mut [f32]) {
        for ((even, odd), word) in even.iter().zip(odd).zip(words) {
            *word = Pair::of(*even, *odd).word();
        }
    }
}

/// A left matrix with `inner` steps that is read along its rows, as words.
pub(super) fn of_rows<'a>(left: Left, rows: usize, inner: usize, words: &'a mut Vec<f32>) -> Left<'a> {
    let pairs = inner.div_ceil(2);
    words.resize(rows * pairs, 0.0);
    for_each_row(words, pairs, |row, words| {
        pair_row(&left.values[row * left.row_stride..][..inner], words);
    });
    Left::rows(words, pairs)
}

/// Some rows and some pairs of the steps of a left matrix that is read across its rows, as words
/// `[pairs, rows]`.
pub(super) fn copy_block<'a>(
    left: Left,
    inner: usize,
    rows: &Range<usize>,
    pairs: &Range<usize>,
    copy: &'a mut Vec<f32>,
) -> Left<'a> {
    debug_assert_eq!(left.row_stride, 1, "a transposed matrix");
    copy.resize(rows.len() * pairs.len(), 0.0);
    let zeros = [0.0; ROWS_PER_TASK];
    for (pair, words) in pairs.clone().zip(copy.chunks_exact_mut(rows.len().max(1))) {
        let row = |step: usize| match left.values.get(step * left.inner_stride..) {
            Some(values) if step < inner => &values[rows.clone()],
            _ => &zeros[..rows.len()],
        };
        pair_rows(row(2 * pair), row(2 * pair + 1), words);
    }
    Left { values: copy, row_stride: 1, inner_stride: rows.len() }
}

/// Pairs that one task packs at least.
const PAIRS_PER_TASK: usize = 1 << 16;

/// Replaces some columns of panels with `inner` steps; `weights [columns, inner]` is row-major.
pub(super) fn set_columns(panels: &mut [Pair], inner: usize, columns: &Range<usize>, weights: &[f32]) {
    let size = LANES * inner.div_ceil(2);
    let first_panel = columns.start / LANES;
    let touched = &mut panels[first_panel * size..columns.end.div_ceil(LANES) * size];
    let tasks = touched.par_chunks_mut(size).with_min_len(PAIRS_PER_TASK.div_ceil(size));
    tasks.enumerate().for_each(|(at, panel)| {
        let first = (first_panel + at) * LANES;
        for column in columns.start.max(first)..columns.end.min(first + LANES) {
            let row = &weights[(column - columns.start) * inner..][..inner];
            let lane = panel[column - first..].iter_mut().step_by(LANES);
            for (pair, values) in lane.zip(row.chunks(2)) {
                *pair = Pair::of(values[0], values.get(1).copied().unwrap_or_default());
            }
        }
    });
}

/// Copies one column to `out [inner]`.
pub(super) fn column(panels: &[Pair], column: usize, out: &mut [f32]) {
    let start = column / LANES * LANES * out.len().div_ceil(2) + column % LANES;
    for (out, pair) in out.chunks_mut(2).zip(panels[start..].iter().step_by(LANES)) {
        for (out, value) in out.iter_mut().zip([pair.even(), pair.odd()]) {
            *out = value;
        }
    }
}

/// Packs a row-major `matrix [inner, columns]` whose rows start `stride` elements apart.
pub(super) fn pack(panels: &mut [Pair], matrix: &[f32], inner: usize, columns: usize, stride: usize) {
    let size = LANES * inner.div_ceil(2).max(1);
    let tasks = panels.par_chunks_mut(size).with_min_len(ELEMENTS_PER_TASK.div_ceil(size));
    tasks.enumerate().for_each(|(panel, pairs)| {
        let first = panel * LANES;
        pack_panel(pairs, &matrix[first..], inner, LANES.min(columns - first), stride);
    });
}

multiversion! {
    /// One panel of `width` columns.
    fn pack_panel(panel: &mut [Pair], matrix: &[f32], inner: usize, width: usize, stride: usize) {
        let (steps, _) = panel.as_chunks_mut::<LANES>();
        for (at, pairs) in steps.iter_mut().enumerate() {
            let (mut even, mut odd) = ([0.0; LANES], [0.0; LANES]);
            even[..width].copy_from_slice(&matrix[2 * at * stride..][..width]);
            if 2 * at + 1 < inner {
                odd[..width].copy_from_slice(&matrix[(2 * at + 1) * stride..][..width]);
            }
            for lane in 0..LANES {
                pairs[lane] = Pair::of(even[lane], odd[lane]);
            }
        }
    }
}

/// Sixteen inner steps of every panel from `first` on, transposed, to `out [columns / 2, 16]`: one panel
/// of the matrix whose chains run over the columns. Steps past the end are zero.
pub(super) fn transpose_panel(panels: &[Pair], inner: usize, columns: usize, first: usize, out: &mut [Pair]) {
    let size = LANES * inner.div_ceil(2);
    let steps = first / 2..inner.div_ceil(2).min(first / 2 + LANES / 2);
    out.fill(Pair::default());
    for (panel, out) in panels.chunks_exact(size).zip(out.chunks_mut(LANES * LANES / 2)) {
        for (at, step) in steps.clone().enumerate() {
            let (lanes, _) = panel[step * LANES..][..LANES].as_chunks::<2>();
            for ([left, right], out) in lanes.iter().zip(out.chunks_exact_mut(LANES)) {
                out[2 * at] = Pair(left.0 & 0xffff | right.0 << 16);
                out[2 * at + 1] = Pair(left.0 >> 16 | right.0 & 0xffff_0000);
            }
        }
    }
    debug_assert!(out.len() == columns.div_ceil(2) * LANES);
}

#[cfg(test)]
mod tests {
    use super::super::dtype::{Dtype, Products};
    use super::super::matmul::{matmul, matmul_transposed};
    use super::super::packed::Packed;
    use super::super::simd::has_bf16_products;
    use super::*;
    use crate::random::Stream;

    fn values(count: usize, seed: u64) -> Vec<f32> {
        let stream = Stream::new(seed, "pairs");
        (0..count as u64).map(|n| stream.normal(n) as f32).collect()
    }

    fn rounded(values: &[f32]) -> Vec<f32> {
        let mut values = values.to_vec();
        Dtype::Bf16.round(&mut values);
        values
    }

    /// The definition: for each pair the odd product, then the even one.
    fn chain(start: f32, a: impl Fn(usize) -> f32, b: impl Fn(usize) -> f32, inner: usize) -> f32 {
        (0..inner).step_by(2).fold(start, |sum, even| {
            let odd = if even + 1 < inner { a(even + 1).mul_add(b(even + 1), sum) } else { sum };
            a(even).mul_add(b(even), odd)
        })
    }

    #[test]
    fn every_element_is_one_chain_for_any_shape() {
        for (rows, columns, inner) in
            [(1, 1, 1), (1, 40, 7), (13, 33, 64), (25, 48, 3), (100, 300, 601), (7, 16, 0), (110, 33, 2048)]
        {
            let (a, w) = (values(rows * inner, 1), values(columns * inner, 2));
            let mut packed = Packed::of_weight(Dtype::Bf16, &w, columns, inner);
            packed.set_products(Products::Bf16);
            let (a_rounded, w) = (rounded(&a), rounded(&w));
            let mut out = vec![0.25; rows * columns];
            matmul(Left::rows(&a, inner), rows, &packed, &mut out, true);
            let mut one = vec![0.25; columns];
            for (row, out) in out.chunks(columns).enumerate() {
                for (column, out) in out.iter().enumerate() {
                    let exact = chain(0.25, |k| a_rounded[row * inner + k], |k| w[column * inner + k], inner);
                    assert_eq!(*out, exact);
                }
                one.fill(0.25);
                matmul(Left::rows(&a[row * inner..], inner), 1, &packed, &mut one, true);
                assert_eq!(one, out);
            }
        }
    }

    #[test]
    fn gradients_of_inputs_and_weights_are_chains_over_columns_and_rows() {
        for (rows, columns, inner) in [(1, 1, 1), (3, 40, 33), (101, 51, 300), (7, 16, 16), (0, 5, 5)] {
            let (dy, w, x) = (values(rows * columns, 3), values(columns * inner, 4), values(rows * inner, 5));
            let mut packed = Packed::of_weight(Dtype::Bf16, &w, columns, inner);
            packed.set_products(Products::Bf16);
            let mut grad_input = vec![0.5; rows * inner];
            matmul_transposed(&dy, rows, &packed, &mut grad_input, true);
            let mut inputs = Packed::default();
            inputs.set_passing(Products::Bf16);
            inputs.pack(&x, rows, inner, inner);
            let mut grad_weight = vec![0.5; columns * inner];
            matmul(Left::transposed(&dy, columns), columns, &inputs, &mut grad_weight, true);
            let (dy, w, x) = (rounded(&dy), rounded(&w), rounded(&x));
            for i in 0..inner {
                for row in 0..rows {
                    let exact = chain(0.5, |o| dy[row * columns + o], |o| w[o * inner + i], columns);
                    assert_eq!(grad_input[row * inner + i], exact);
                }
                for o in 0..columns {
                    let exact = chain(0.5, |row| dy[row * columns + o], |row| x[row * inner + i], rows);
                    assert_eq!(grad_weight[o * inner + i], exact);
                }
            }
        }
    }

    #[test]
    fn columns_come_back_rounded() {
        let (inner, columns) = (37, 50);
        let weight = values(inner * columns, 6);
        let mut packed = Packed::of_weight(Dtype::Bf16, &weight, columns, inner);
        packed.set_products(Products::Bf16);
        packed.set_columns(20, &weight[20 * inner..33 * inner]);
        let mut column = vec![0.0; inner];
        for _ in 0..2 {
            for at in 0..columns {
                packed.column(at, &mut column);
                assert_eq!(column, rounded(&weight[at * inner..][..inner]));
            }
            packed.set_products(Products::F32);
        }
    }

    /// Words whose pairs lie anywhere in the range of the format, most of them close together.
    fn words(seed: u64) -> [f32; LANES] {
        let stream = Stream::new(seed, "words");
        std::array::from_fn(|lane| {
            let half = |n: u64| {
                let bits = stream.bits(2 * lane as u64 + n) as u32;
                let exponent = match bits >> 16 & 3 {
                    0 => bits >> 18 & 0xff,
                    1 => bits >> 18 & 3,
                    _ => 120 + (bits >> 18 & 15),
                };
                let exponent = exponent.min(254);
                bits & 0x807f | exponent << 7
            };
            f32::from_bits(half(0) | half(1) << 16)
        })
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn the_instruction_and_its_stand_in_give_the_same_bits() {
        #[target_feature(enable = "avx512bf16,avx512f,avx512vl,avx512dq,avx512bw,avx2,f16c,fma")]
        unsafe fn instruction(sum: &mut [f32; LANES], a: f32, b: &[f32; LANES]) {
            use super::super::simd::x86::WidePairs;
            // SAFETY: sixteen elements each; the caller detected the instruction set.
            unsafe {
                let (old, b) = (WidePairs::load(sum.as_ptr()), WidePairs::load(b.as_ptr()));
                old.add_product(a, b).store(sum.as_mut_ptr());
            }
        }
        if !has_bf16_products() {
            eprintln!("SKIPPED: this machine has no AVX512_BF16");
            return;
        }
        for round in 0..20_000 {
            let (a, b) = (words(3 * round), words(3 * round + 1));
            let mut expected = words(3 * round + 2);
            let mut found = expected;
            // SAFETY: the instruction set was detected; sixteen elements each.
            unsafe {
                instruction(&mut expected, a[0], &b);
                let chains = PairChains::load(found.as_ptr()).add_product(a[0], PairChains::load(b.as_ptr()));
                chains.store(found.as_mut_ptr());
            }
            for lane in 0..LANES {
                let same = found[lane].to_bits() == expected[lane].to_bits()
                    || found[lane].is_nan() && expected[lane].is_nan();
                assert!(same, "{round} {lane}: {} {}", found[lane], expected[lane]);
            }
        }
    }
}

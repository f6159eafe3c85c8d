//! Matrix products against sums in double precision, and what the own kernel promises about bits.

use super::cuda_emulator::{device, emulated_device, in_child};
use half::bf16;
use rpt::cuda::gemm::{Element, Sum};
use rpt::cuda::{CudaError, Device, Gemm, Matrix, MatrixMut};

/// A number for each index that looks arbitrary, between -1 and 1.
fn value(at: usize) -> f32 {
    let bits = (at as u32 + 1).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(0x9e37_79b9);
    (bits >> 8) as f32 / (1 << 23) as f32 - 1.0
}

trait Tested: Element {
    fn of(value: f32) -> Self;
    fn as_f32(self) -> f32;
}
impl Tested for f32 {
    fn of(value: f32) -> Self {
        value
    }
    fn as_f32(self) -> f32 {
        self
    }
}
impl Tested for bf16 {
    fn of(value: f32) -> Self {
        bf16::from_f32(value)
    }
    fn as_f32(self) -> f32 {
        self.to_f32()
    }
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Forward,
    InputGradient,
    WeightGradient,
}
const KINDS: [Kind; 3] = [Kind::Forward, Kind::InputGradient, Kind::WeightGradient];

/// A product of m x k by k x n whose rows begin `gap` elements behind the end of the last.
#[derive(Clone, Copy, Debug)]
struct Case {
    kind: Kind,
    m: usize,
    n: usize,
    k: usize,
    gap: usize,
    accumulate: bool,
}

impl Case {
    /// Rows and columns of a and b as they lie.
    fn sides(&self) -> [(usize, usize); 2] {
        let Self { m, n, k, .. } = *self;
        match self.kind {
            Kind::Forward => [(m, k), (n, k)],
            Kind::InputGradient => [(m, k), (k, n)],
            Kind::WeightGradient => [(k, m), (k, n)],
        }
    }

    /// Places of a(row, at) and b(at, column).
    fn places(&self, row: usize, column: usize, at: usize) -> (usize, usize) {
        let [(_, a), (_, b)] = self.sides();
        let (a, b) = (a + self.gap, b + self.gap);
        match self.kind {
            Kind::Forward => (row * a + at, column * b + at),
            Kind::InputGradient => (row * a + at, at * b + column),
            Kind::WeightGradient => (at * a + row, at * b + column),
        }
    }

    fn operands<T: Tested>(&self) -> [Vec<T>; 2] {
        let values = |seed: usize, (rows, columns): (usize, usize)| {
            (0..rows * (columns + self.gap)).map(|at| T::of(value(at + seed))).collect()
        };
        let [a, b] = self.sides();
        [values(1, a), values(100_000, b)]
    }

    fn start(&self) -> Vec<f32> {
        (0..self.m * (self.n + self.gap)).map(|at| value(at + 7_000_000)).collect()
    }

    /// c as the device has it, with the gaps.
    fn run<T: Tested, U: Tested + Sum<T>>(&self, device: &Device, gemm: &Gemm) -> Vec<U> {
        let [a, b] = self.operands::<T>().map(|values| device.upload("operand", &values).unwrap());
        let start: Vec<U> = self.start().into_iter().map(U::of).collect();
        let mut c = device.upload("c", &start).unwrap();
        let [(a_rows, a_columns), (b_rows, b_columns)] = self.sides();
        let a = Matrix::with_stride(&a, a_rows, a_columns, a_columns + self.gap).unwrap();
        let b = Matrix::with_stride(&b, b_rows, b_columns, b_columns + self.gap).unwrap();
        let to = MatrixMut::with_stride(&mut c, self.m, self.n, self.n + self.gap).unwrap();
        match self.kind {
            Kind::Forward => gemm.forward(a, b, to, self.accumulate),
            Kind::InputGradient => gemm.input_gradient(a, b, to, self.accumulate),
            Kind::WeightGradient => gemm.weight_gradient(a, b, to, self.accumulate),
        }
        .unwrap();
        c.download().unwrap()
    }

    /// Checks every element against a sum in double precision, and that the gaps are untouched.
    fn check<T: Tested, U: Tested + Sum<T>>(&self, device: &Device, gemm: &Gemm) {
        let found = self.run::<T, U>(device, gemm);
        let [a, b] = self.operands::<T>();
        let start = self.start();
        for (at, (found, start)) in found.into_iter().zip(start).enumerate() {
            let (row, column) = (at / (self.n + self.gap), at % (self.n + self.gap));
            let (found, start) = (found.as_f32(), U::of(start).as_f32());
            if column >= self.n {
                assert_eq!(found.to_bits(), start.to_bits(), "{self:?} writes between rows");
                continue;
            }
            let products = (0..self.k).map(|at| {
                let (left, right) = self.places(row, column, at);
                f64::from(a[left].as_f32()) * f64::from(b[right].as_f32())
            });
            let expected = products.sum::<f64>() + if self.accumulate { f64::from(start) } else { 0.0 };
            let rounding = if U::NAME == "bf16" { expected.abs() / 128.0 } else { 0.0 };
            let error = (f64::from(found) - expected).abs();
            assert!(
                error <= 1e-5 * (1.0 + self.k as f64).sqrt() + rounding,
                "{self:?} {row} {column}: {found} {expected}"
            );
        }
    }
}

fn cases() -> Vec<Case> {
    let sides =
        [(1, 1, 1), (5, 40, 24), (33, 31, 129), (64, 70, 100), (130, 129, 47), (16, 200, 0), (3, 17, 260)];
    let mut cases = Vec::new();
    for kind in KINDS {
        for (index, (m, n, k)) in sides.into_iter().enumerate() {
            for gap in [0, 3, 8] {
                cases.push(Case { kind, m, n, k, gap, accumulate: (index + gap) % 2 == 0 });
            }
        }
    }
    cases
}

#[test]
fn products_of_every_shape_and_layout() {
    let device = device();
    let gemm = Gemm::new(&device, true).unwrap();
    for case in cases() {
        case.check::<bf16, f32>(&device, &gemm);
        case.check::<bf16, bf16>(&device, &gemm);
        case.check::<f32, f32>(&device, &gemm);
    }
}

#[test]
fn large_tiles_and_many_of_them() {
    let device = device();
    let gemm = Gemm::new(&device, true).unwrap();
    for kind in KINDS {
        Case { kind, m: 300, n: 257, k: 72, gap: 8, accumulate: true }.check::<bf16, f32>(&device, &gemm);
        Case { kind, m: 1100, n: 130, k: 20, gap: 4, accumulate: false }.check::<bf16, bf16>(&device, &gemm);
    }
}

#[test]
fn the_vendors_library_agrees() {
    let device = device();
    let gemm = match Gemm::new(&device, false) {
        Err(CudaError::NoBlas) => return println!("SKIPPED: cuBLASLt is not on this machine"),
        other => other.unwrap(),
    };
    for case in cases() {
        case.check::<f32, f32>(&device, &gemm);
        case.check::<bf16, f32>(&device, &gemm);
        case.check::<bf16, bf16>(&device, &gemm);
        let again = [case.run::<f32, f32>(&device, &gemm), case.run::<f32, f32>(&device, &gemm)];
        assert!(again[0].iter().zip(&again[1]).all(|(one, other)| one.to_bits() == other.to_bits()));
    }
}

#[test]
fn without_the_vendors_library_the_own_kernel_is_offered() {
    if emulated_device().is_none() {
        return;
    }
    let output = in_child("products::there_is_no_vendors_library", &[("RPT_EMULATED_NO_BLAS", "1")]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("no cuBLASLt") && said.contains("batch_invariant"), "{said}");
}

#[test]
#[ignore = "run by another, with a variable"]
fn there_is_no_vendors_library() {
    let error = Gemm::new(&device(), false).unwrap_err();
    assert!(matches!(error, CudaError::NoBlas));
    println!("{error}; {}", error.hint().unwrap());
}

/// The first rows of a product, of any number of rows: large ones have other tiles than small ones.
#[test]
fn a_row_has_the_bits_that_it_has_alone() {
    let device = device();
    let gemm = Gemm::new(&device, true).unwrap();
    for kind in [Kind::Forward, Kind::InputGradient] {
        let of = |m: usize| Case { kind, m, n: 264, k: 168, gap: 0, accumulate: false };
        let all = of(400).run::<bf16, f32>(&device, &gemm);
        let all_f32 = of(400).run::<f32, f32>(&device, &gemm);
        for m in [1, 17, 100, 300] {
            let same = |some: &[f32], all: &[f32]| {
                some.iter().zip(all).all(|(one, other)| one.to_bits() == other.to_bits())
            };
            assert!(same(&of(m).run::<bf16, f32>(&device, &gemm), &all), "{kind:?} {m}");
            assert!(same(&of(m).run::<f32, f32>(&device, &gemm), &all_f32), "{kind:?} {m}");
        }
    }
}

#[test]
fn single_precision_is_the_chain_of_the_cpu() {
    let device = device();
    let gemm = Gemm::new(&device, true).unwrap();
    for kind in KINDS {
        let case = Case { kind, m: 70, n: 66, k: 100, gap: 1, accumulate: false };
        let found = case.run::<f32, f32>(&device, &gemm);
        let [a, b] = case.operands::<f32>();
        for (row, column) in (0..70).flat_map(|row| (0..66).map(move |column| (row, column))) {
            let expected = (0..100).fold(0.0f32, |sum, at| {
                let (left, right) = case.places(row, column, at);
                a[left].mul_add(b[right], sum)
            });
            assert_eq!(found[row * 67 + column].to_bits(), expected.to_bits(), "{kind:?} {row} {column}");
        }
    }
}

#[test]
fn matrices_that_do_not_fit_are_refused() {
    let device = device();
    let gemm = Gemm::new(&device, true).unwrap();
    let x = device.zeroed::<f32>("x", 60).unwrap();
    let mut y = device.zeroed::<f32>("y", 60).unwrap();
    assert!(Matrix::new(&x, 7, 9).is_err() && Matrix::new(&x, usize::MAX, 2).is_err());
    assert!(Matrix::with_stride(&x, 6, 10, 9).is_err() && Matrix::with_stride(&x, 7, 9, 9).is_err());
    assert!(Matrix::with_stride(&x, 6, 9, 10).is_ok() && MatrixMut::new(&mut y, 61, 1).is_err());
    let (a, b) = (Matrix::new(&x, 6, 10).unwrap(), Matrix::new(&x, 10, 6).unwrap());
    let error = gemm.forward(a, b, MatrixMut::new(&mut y, 6, 10).unwrap(), false).unwrap_err();
    assert!(error.to_string().contains("[6, 10] times [6, 10]"), "{error}");
    let part = y.slice_mut(..36).unwrap();
    gemm.input_gradient(a, b, MatrixMut::new(part, 6, 6).unwrap(), false).unwrap();
    let nothing = y.slice_mut(..0).unwrap();
    gemm.input_gradient(
        Matrix::new(x.slice(..0).unwrap(), 0, 10).unwrap(),
        b,
        MatrixMut::new(nothing, 0, 6).unwrap(),
        false,
    )
    .unwrap();
}

#[test]
fn a_graph_holds_products() {
    let device = device();
    let gemm = Gemm::new(&device, true).unwrap();
    let x = device.upload("x", &(0..64 * 64).map(|at| bf16::of(value(at))).collect::<Vec<_>>()).unwrap();
    let mut y = device.zeroed::<f32>("y", 64 * 64).unwrap();
    let graph = device
        .record(|| {
            let matrix = Matrix::new(&x, 64, 64)?;
            gemm.forward(matrix, matrix, MatrixMut::new(&mut y, 64, 64)?, true)
        })
        .unwrap();
    drop(x);
    graph.launch().unwrap();
    let once = y.download().unwrap();
    graph.launch().unwrap();
    let twice = y.download().unwrap();
    assert!(
        once[0] > 0.0
            && once.iter().zip(twice).all(|(once, twice)| (2.0 * once).to_bits() == twice.to_bits())
    );
}

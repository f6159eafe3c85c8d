//! Launches of norm.cu against `kernels::norm`.

use crate::cuda_emulator::device;
use crate::support::{
    Format, assert_close, assert_refused, blank, check_gradient, dot, read, rounded, store, stored_values,
    values,
};
use half::bf16;
use rpt::cuda::norm::{Norm, Rows, backward, forward};
use rpt::cuda::{Device, Indices, Result};
use rpt::kernels::norm;

const EPSILON: f32 = 1e-5;

fn indices(device: &Device, rows: Option<&[u32]>) -> Option<Indices> {
    rows.map(|rows| Indices::upload(device, "rows", rows).unwrap())
}

/// Normalised rows and their scales.
fn run<T: Format>(
    device: &Device,
    x: &[f32],
    x_rows: Option<&[u32]>,
    weight: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let columns = weight.len();
    let rows = x_rows.map_or(x.len() / columns, <[u32]>::len);
    let (x, places) = (store::<f32>(device, x), indices(device, x_rows));
    let weight = store::<T>(device, weight);
    let (mut out, mut scales) = (blank::<T>(device, rows * columns), blank::<f32>(device, rows));
    let norm = Norm { weight: (&weight).into(), epsilon: EPSILON };
    let x = Rows { values: (&x).into(), places: places.as_ref().map(Indices::view) };
    forward(device, norm, x, (&mut out).into(), Some((&mut scales).into())).unwrap();
    let mut again = blank::<T>(device, rows * columns);
    forward(device, norm, x, (&mut again).into(), None).unwrap();
    assert_eq!(read(&again), read(&out), "scales may be left out");
    (read(&out), read(&scales))
}

fn agrees<T: Format>() {
    let device = device();
    for (rows, columns) in [(1, 8), (3, 64), (5, 37), (2, 1028), (2, 2051)] {
        let (x, weight) = (values(1, rows * columns), stored_values::<T>(2, columns));
        let x_rows: Vec<u32> = (0..rows + 2).map(|row| (row * 7 % rows) as u32).collect();
        let (out, scales) = run::<T>(&device, &x, Some(&x_rows), &weight);
        for (at, row) in x_rows.iter().enumerate() {
            let mut expected = vec![0.0; columns];
            let scale =
                norm::forward(&x[*row as usize * columns..][..columns], &weight, EPSILON, &mut expected);
            assert_close(&[scales[at]], &[scale], 1e-6);
            assert_close(&out[at * columns..][..columns], &expected, T::TOLERANCE);
        }
    }
}

#[test]
fn forward_agrees_with_the_cpu() {
    agrees::<f32>();
    agrees::<bf16>();
}

#[test]
fn a_row_alone_has_the_bits_it_has_among_others() {
    let device = device();
    for columns in [64, 37, 1028] {
        let (x, weight) = (values(3, 5 * columns), values(4, columns));
        let (all, scales) = run::<bf16>(&device, &x, None, &weight);
        for row in 0..5 {
            let (one, scale) = run::<bf16>(&device, &x[row * columns..][..columns], None, &weight);
            assert_eq!(one, all[row * columns..][..columns]);
            assert_eq!(scale, scales[row..=row]);
        }
    }
}

/// Inputs of a backward pass, and where its rows lie.
struct Case {
    columns: usize,
    x: Vec<f32>,
    weight: Vec<f32>,
    grad_out: Vec<f32>,
    grad_x: Vec<f32>,
    scales: usize,
    x_rows: Option<Vec<u32>>,
    grad_rows: Option<Vec<u32>>,
}

impl Case {
    fn new(rows: usize, columns: usize, gathered: bool) -> Self {
        Self {
            columns,
            x: values(5, rows * columns),
            weight: values(6, columns),
            grad_out: values(7, rows * columns),
            grad_x: values(8, rows * columns),
            scales: rows,
            x_rows: gathered.then(|| (0..rows).map(|row| (row / 2) as u32).collect()),
            grad_rows: gathered.then(|| (0..rows).rev().map(|row| row as u32).collect()),
        }
    }

    fn place(rows: Option<&Vec<u32>>, row: usize) -> usize {
        rows.map_or(row, |rows| rows[row] as usize)
    }

    fn row(values: &[f32], row: usize, columns: usize) -> &[f32] {
        &values[row * columns..][..columns]
    }

    fn scales(&self) -> Vec<f32> {
        let scale = |row| {
            let x = Self::row(&self.x, Self::place(self.x_rows.as_ref(), row), self.columns);
            norm::forward(x, &self.weight, EPSILON, &mut vec![0.0; self.columns])
        };
        (0..self.scales).map(scale).collect()
    }

    /// Gradients of the input and of the weight by the CPU.
    fn expected(&self) -> (Vec<f32>, Vec<f32>) {
        let (mut grad_x, mut grad_weight) = (self.grad_x.clone(), vec![0.5; self.columns]);
        for (row, scale) in self.scales().into_iter().enumerate() {
            let x = Self::row(&self.x, Self::place(self.x_rows.as_ref(), row), self.columns);
            let target =
                &mut grad_x[Self::place(self.grad_rows.as_ref(), row) * self.columns..][..self.columns];
            let grad_out = Self::row(&self.grad_out, row, self.columns);
            norm::backward(x, &self.weight, scale, grad_out, target, &mut grad_weight);
        }
        (grad_x, grad_weight)
    }

    /// The same by the device; `G` and `T` are the formats of `grad_out` and of the weight.
    fn try_run<G: Format, T: Format>(&self, device: &Device) -> Result<(Vec<f32>, Vec<f32>)> {
        let (x, weight) = (store::<f32>(device, &self.x), store::<T>(device, &self.weight));
        let scales = store::<f32>(device, &self.scales());
        let (grad_out, mut grad_x) = (store::<G>(device, &self.grad_out), store::<f32>(device, &self.grad_x));
        let x_rows = indices(device, self.x_rows.as_deref());
        let grad_rows = indices(device, self.grad_rows.as_deref());
        let mut grad_weight = store::<f32>(device, &vec![0.5; self.columns]);
        backward::<G, T>(
            device,
            Norm { weight: (&weight).into(), epsilon: EPSILON },
            Rows { values: (&x).into(), places: x_rows.as_ref().map(Indices::view) },
            (&scales).into(),
            (&grad_out).into(),
            (&mut grad_x).into(),
            grad_rows.as_ref().map(Indices::view),
            (&mut grad_weight).into(),
        )?;
        Ok((read(&grad_x), read(&grad_weight)))
    }

    fn run<G: Format, T: Format>(&self, device: &Device) -> (Vec<f32>, Vec<f32>) {
        self.try_run::<G, T>(device).unwrap()
    }
}

fn backward_agrees<G: Format, T: Format>() {
    let device = device();
    for (rows, columns, gathered) in [(1, 8, false), (9, 64, true), (19, 37, true), (3, 1028, false)] {
        let case = Case::new(rows, columns, gathered);
        let weight = rounded::<T>(&case.weight);
        let case = Case { weight, grad_out: rounded::<G>(&case.grad_out), ..case };
        let (expected, actual) = (case.expected(), case.run::<G, T>(&device));
        assert_close(&actual.0, &expected.0, 1e-5);
        assert_close(&actual.1, &expected.1, 1e-5);
        assert_eq!(actual, case.run::<G, T>(&device), "twice the same bits");
    }
}

#[test]
fn backward_agrees_with_the_cpu() {
    backward_agrees::<f32, f32>();
    backward_agrees::<bf16, bf16>();
    backward_agrees::<f32, bf16>();
}

#[test]
fn gradients_match_finite_differences() {
    let device = device();
    let case = Case { grad_x: vec![0.0; 24], ..Case::new(2, 12, false) };
    let (grad_x, grad_weight) = case.run::<f32, f32>(&device);
    let loss = |x: &[f32], weight: &[f32]| dot(&run::<f32>(&device, x, None, weight).0, &case.grad_out);
    check_gradient(&case.x, &grad_x, |x| loss(x, &case.weight));
    let grad_weight: Vec<f32> = grad_weight.iter().map(|grad| grad - 0.5).collect();
    check_gradient(&case.weight, &grad_weight, |weight| loss(&case.x, weight));
}

#[test]
fn a_forward_pass_that_does_not_fit_is_refused() {
    let device = device();
    let run = |x: usize, places: Option<&[u32]>, weight: usize, out: usize, scales: usize| {
        let (x, places) = (blank::<f32>(&device, x), indices(&device, places));
        let (weight, mut out) = (blank::<f32>(&device, weight), blank::<f32>(&device, out));
        let mut scales = blank::<f32>(&device, scales);
        let norm = Norm { weight: (&weight).into(), epsilon: EPSILON };
        let x = Rows { values: (&x).into(), places: places.as_ref().map(Indices::view) };
        forward(&device, norm, x, (&mut out).into(), Some((&mut scales).into()))
    };
    run(0, None, 4, 0, 0).unwrap();
    run(8, Some(&[1, 1, 0]), 4, 12, 3).unwrap();
    assert_refused(run(8, Some(&[1, 2, 0]), 4, 12, 3), "rows to normalise: index 2, where there are 2");
    assert_refused(run(8, Some(&[1, 1]), 4, 12, 3), "places of rows: 2 elements where 3 are");
    assert_refused(run(8, None, 4, 12, 3), "rows to normalise: 8 elements where 12 are");
    assert_refused(run(12, None, 4, 11, 3), "normalised rows: 11 elements where 12 are");
    assert_refused(run(12, None, 0, 12, 3), "normalised rows");
    assert_refused(run(12, None, 4, 12, 2), "scales of normalised rows: 2 elements where 3 are");
}

#[test]
fn a_backward_pass_that_does_not_fit_is_refused() {
    let device = device();
    let refused = |case: Case, what| assert_refused(case.try_run::<f32, f32>(&device), what);
    let case = || Case::new(4, 8, true);
    case().run::<f32, f32>(&device);
    let empty = Case { x_rows: None, grad_rows: None, ..Case::new(0, 8, false) };
    assert_eq!(empty.run::<f32, f32>(&device), (vec![], vec![0.5; 8]));
    refused(Case { grad_out: vec![0.0; 31], ..case() }, "gradients of normalised rows: 31");
    refused(Case { grad_out: vec![0.0; 40], ..case() }, "places of rows: 4 elements where 5 are");
    refused(Case { grad_x: vec![0.0; 31], ..case() }, "gradients of rows: index 3, where there are 3");
    refused(Case { grad_rows: Some(vec![0, 1, 2, 4]), ..case() }, "gradients of rows: index 4");
    refused(Case { scales: 3, ..case() }, "scales of normalised rows: 3 elements where 4 are");
    let short = Case { x: vec![0.0; 31], x_rows: None, scales: 3, ..case() };
    refused(short, "rows that were normalised: 31 elements where 32 are");
    let weight = vec![0.0; 16];
    refused(
        Case { weight, x_rows: None, scales: 0, ..case() },
        "gradients of rows: index 3, where there are 2",
    );
}

//! norm.cu against `kernels::norm`.

use crate::support::{Arg, FORMATS, Gpu, Memory, assert_close, tolerance, values};
use rpt::kernels::dtype::Dtype;
use rpt::kernels::norm;

const EPSILON: f32 = 1e-5;

fn forward(
    gpu: &Gpu,
    dtype: Dtype,
    x: &[f32],
    x_rows: Option<&[i32]>,
    weight: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let columns = weight.len();
    let rows = x_rows.map_or(x.len() / columns, <[i32]>::len);
    let (x, x_rows) = (gpu.floats(x), x_rows.map(|rows| gpu.ints(rows)));
    let weight = gpu.stored(dtype, weight);
    let (out, scales) =
        (gpu.stored(dtype, &vec![f32::NAN; rows * columns]), gpu.floats(&vec![f32::NAN; rows]));
    gpu.launch(
        &format!("norm_forward_{}", crate::support::suffix(dtype)),
        (rows, 1),
        256,
        &[
            Arg::To(&x),
            Arg::optional(x_rows.as_ref()),
            Arg::To(&weight),
            Arg::Float(EPSILON),
            Arg::To(&out),
            Arg::To(&scales),
            Arg::Int(columns),
        ],
    );
    (out.stored(dtype), scales.floats())
}

#[test]
fn forward_agrees_with_the_cpu() {
    let gpu = Gpu::new();
    for dtype in FORMATS {
        for (rows, columns) in [(1, 8), (3, 64), (5, 37), (2, 1028), (2, 2051)] {
            let (x, mut weight) = (values(1, rows * columns), values(2, columns));
            dtype.round(&mut weight);
            let x_rows: Vec<i32> = (0..rows + 2).map(|row| (row * 7 % rows) as i32).collect();
            let (out, scales) = forward(&gpu, dtype, &x, Some(&x_rows), &weight);
            for (at, row) in x_rows.iter().enumerate() {
                let mut expected = vec![0.0; columns];
                let scale =
                    norm::forward(&x[*row as usize * columns..][..columns], &weight, EPSILON, &mut expected);
                assert_close(&[scales[at]], &[scale], 1e-6);
                assert_close(&out[at * columns..][..columns], &expected, tolerance(dtype));
            }
        }
    }
}

#[test]
fn a_row_alone_has_the_bits_it_has_among_others() {
    let gpu = Gpu::new();
    for columns in [64, 37, 1028] {
        let (x, weight) = (values(3, 5 * columns), values(4, columns));
        let (all, scales) = forward(&gpu, Dtype::Bf16, &x, None, &weight);
        for row in 0..5 {
            let (one, scale) = forward(&gpu, Dtype::Bf16, &x[row * columns..][..columns], None, &weight);
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
    x_rows: Option<Vec<i32>>,
    grad_rows: Option<Vec<i32>>,
}

impl Case {
    fn new(rows: usize, columns: usize, gathered: bool) -> Self {
        Self {
            columns,
            x: values(5, rows * columns),
            weight: values(6, columns),
            grad_out: values(7, rows * columns),
            grad_x: values(8, rows * columns),
            x_rows: gathered.then(|| (0..rows).map(|row| (row / 2) as i32).collect()),
            grad_rows: gathered.then(|| (0..rows).rev().map(|row| row as i32).collect()),
        }
    }

    fn rows(&self) -> usize {
        self.grad_out.len() / self.columns
    }

    fn place(rows: Option<&Vec<i32>>, row: usize) -> usize {
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
        (0..self.rows()).map(scale).collect()
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

    /// The same by the device; `grad` and `dtype` are the formats of `grad_out` and of the weight.
    fn run(&self, gpu: &Gpu, grad: Dtype, dtype: Dtype) -> (Vec<f32>, Vec<f32>) {
        let blocks = self.rows().div_ceil(8);
        let rows = |rows: &Option<Vec<i32>>| rows.as_ref().map(|rows| gpu.ints(rows));
        let (x, weight, scales) =
            (gpu.floats(&self.x), gpu.stored(dtype, &self.weight), gpu.floats(&self.scales()));
        let (grad_out, grad_x) = (gpu.stored(grad, &self.grad_out), gpu.floats(&self.grad_x));
        let (x_rows, grad_rows) = (rows(&self.x_rows), rows(&self.grad_rows));
        let partial = gpu.floats(&vec![f32::NAN; blocks * self.columns]);
        gpu.launch(
            &crate::support::backward_name("norm_backward", grad, dtype),
            (blocks, 1),
            256,
            &[
                Arg::To(&x),
                Arg::optional(x_rows.as_ref()),
                Arg::To(&weight),
                Arg::To(&scales),
                Arg::To(&grad_out),
                Arg::To(&grad_x),
                Arg::optional(grad_rows.as_ref()),
                Arg::To(&partial),
                Arg::Int(self.rows()),
                Arg::Int(self.columns),
            ],
        );
        let grad_weight = gpu.floats(&vec![0.5; self.columns]);
        add_partial_sums(gpu, &partial, blocks, &grad_weight, self.columns);
        (grad_x.floats(), grad_weight.floats())
    }
}

/// Adds up partial sums into a gradient of `columns` elements.
pub(crate) fn add_partial_sums(gpu: &Gpu, partial: &Memory, parts: usize, target: &Memory, columns: usize) {
    let arguments = [Arg::To(partial), Arg::Int(parts), Arg::Int(columns), Arg::To(target)];
    gpu.launch("add_partial_sums", (columns.div_ceil(32), 1), 512, &arguments);
}

#[test]
fn backward_agrees_with_the_cpu() {
    let gpu = Gpu::new();
    for (grad, dtype) in [(Dtype::F32, Dtype::F32), (Dtype::Bf16, Dtype::Bf16), (Dtype::F32, Dtype::Bf16)] {
        for (rows, columns, gathered) in [(1, 8, false), (9, 64, true), (19, 37, true), (3, 1028, false)] {
            let mut case = Case::new(rows, columns, gathered);
            dtype.round(&mut case.weight);
            grad.round(&mut case.grad_out);
            let (expected, actual) = (case.expected(), case.run(&gpu, grad, dtype));
            assert_close(&actual.0, &expected.0, 1e-5);
            assert_close(&actual.1, &expected.1, 1e-5);
            assert_eq!(actual, case.run(&gpu, grad, dtype), "twice the same bits");
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let gpu = Gpu::new();
    let case = Case { grad_x: vec![0.0; 24], ..Case::new(2, 12, false) };
    let (grad_x, grad_weight) = case.run(&gpu, Dtype::F32, Dtype::F32);
    let loss = |x: &[f32], weight: &[f32]| {
        crate::support::dot(&forward(&gpu, Dtype::F32, x, None, weight).0, &case.grad_out)
    };
    crate::support::check_gradient(&case.x, &grad_x, |x| loss(x, &case.weight));
    let grad_weight: Vec<f32> = grad_weight.iter().map(|grad| grad - 0.5).collect();
    crate::support::check_gradient(&case.weight, &grad_weight, |weight| loss(&case.x, weight));
}

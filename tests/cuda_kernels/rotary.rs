//! rotary.cu against `kernels::rotary` and `kernels::norm`.

use crate::norm::add_partial_sums;
use crate::support::{
    Arg, FORMATS, Gpu, assert_close, backward_name, check_gradient, dot, suffix, tolerance, values,
};
use rpt::kernels::dtype::Dtype;
use rpt::kernels::elementary::add;
use rpt::kernels::norm;
use rpt::kernels::rotary::{Frequencies, RotaryTable};

const EPSILON: f32 = 1e-6;
const POSITIONS: usize = 40;
const PAGE: usize = 16;
const PAGES: usize = 3;

#[derive(Clone)]
struct Case {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    rows: usize,
    bias: Option<Vec<f32>>,
    /// Of queries, then of keys.
    weights: Option<[Vec<f32>; 2]>,
    frequencies: Frequencies,
    positions: Vec<i32>,
    slots: Vec<i32>,
}

impl Case {
    fn new(heads: usize, kv_heads: usize, dim: usize, rows: usize, biased: bool, normed: bool) -> Self {
        let width = (heads + 2 * kv_heads) * dim;
        Self {
            heads,
            kv_heads,
            dim,
            rows,
            bias: biased.then(|| values(1, width)),
            weights: normed.then(|| [values(2, dim), values(3, dim)]),
            frequencies: Frequencies { attention_factor: 1.1, ..Frequencies::new(10_000.0, dim) },
            positions: (0..rows).map(|row| (row * 7 % POSITIONS) as i32).collect(),
            slots: (0..rows)
                .map(|row| if row % 4 == 1 { -1 } else { (row * 5 % (PAGES * PAGE)) as i32 })
                .collect(),
        }
    }

    fn rounded(mut self, dtype: Dtype) -> Self {
        self.bias.iter_mut().for_each(|bias| dtype.round(bias));
        self.weights.iter_mut().flatten().for_each(|weight| dtype.round(weight));
        self
    }

    fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.dim
    }

    /// Cosines and sines of every position, as `RotaryTable` computes them.
    fn angles(&self) -> Vec<f32> {
        let factor = self.frequencies.attention_factor;
        let angle =
            |position: usize| self.frequencies.inverse.iter().map(move |i| f64::from(position as f32 * i));
        (0..POSITIONS)
            .flat_map(|position| {
                let cosines = angle(position).map(|angle| angle.cos() as f32 * factor);
                cosines.chain(angle(position).map(|angle| angle.sin() as f32 * factor)).collect::<Vec<_>>()
            })
            .collect()
    }

    fn table(&self) -> RotaryTable {
        RotaryTable::new(&self.frequencies, POSITIONS)
    }

    fn turned(&self) -> usize {
        (self.heads + self.kv_heads) * self.dim
    }

    /// The weight of a head's norm: 0 for queries, 1 for keys.
    fn which(&self, head: usize) -> usize {
        usize::from(head >= self.heads)
    }

    fn forward_by_cpu(&self, input: &[f32]) -> Vec<f32> {
        let mut out = input.to_vec();
        for (row, values) in out.chunks_exact_mut(self.width()).enumerate() {
            self.bias.iter().for_each(|bias| add(values, bias));
            for (head, values) in values[..self.turned()].chunks_exact_mut(self.dim).enumerate() {
                if let Some(weights) = &self.weights {
                    let before = values.to_vec();
                    norm::forward(&before, &weights[self.which(head)], EPSILON, values);
                }
            }
            self.table().rotate(&mut values[..self.turned()], self.positions[row] as usize);
        }
        out
    }

    /// Gradients of the input and of the two weights.
    fn backward_by_cpu(&self, input: &[f32], grad_out: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (mut grad, mut grad_weights) = (grad_out.to_vec(), vec![0.0; 2 * self.dim]);
        for (row, grad) in grad.chunks_exact_mut(self.width()).enumerate() {
            self.table().rotate_back(&mut grad[..self.turned()], self.positions[row] as usize);
            let Some(weights) = &self.weights else { continue };
            let mut x = input[row * self.width()..][..self.width()].to_vec();
            self.bias.iter().for_each(|bias| add(&mut x, bias));
            for (head, grad) in grad[..self.turned()].chunks_exact_mut(self.dim).enumerate() {
                let (x, which) = (&x[head * self.dim..][..self.dim], self.which(head));
                let mut grad_x = vec![0.0; self.dim];
                let scale = norm::forward(x, &weights[which], EPSILON, &mut vec![0.0; self.dim]);
                let grad_weight = &mut grad_weights[which * self.dim..][..self.dim];
                norm::backward(x, &weights[which], scale, grad, &mut grad_x, grad_weight);
                grad.copy_from_slice(&grad_x);
            }
        }
        (grad, grad_weights)
    }

    /// Rows, key pages and value pages after the forward pass.
    fn forward(&self, gpu: &Gpu, dtype: Dtype, input: &[f32], in_place: bool) -> [Vec<f32>; 3] {
        let pages = vec![9.0; PAGES * PAGE * self.kv_heads * self.dim];
        let (keys, values) = (gpu.stored(dtype, &pages), gpu.stored(dtype, &pages));
        let (input, apart) = (gpu.stored(dtype, input), gpu.stored(dtype, &vec![f32::NAN; input.len()]));
        let out = if in_place { &input } else { &apart };
        let bias = self.bias.as_ref().map(|bias| gpu.stored(dtype, bias));
        let weights =
            self.weights.as_ref().map(|weights| weights.clone().map(|weight| gpu.stored(dtype, &weight)));
        let (angles, positions) = (gpu.floats(&self.angles()), gpu.ints(&self.positions));
        let slots = gpu.ints(&self.slots);
        let lanes = (self.dim / 8).next_power_of_two();
        let units = self.rows * (self.heads + 2 * self.kv_heads);
        gpu.launch(
            &format!("rotary_forward_{}", suffix(dtype)),
            (units.div_ceil(256 / lanes), 1),
            256,
            &[
                Arg::optional((!in_place).then_some(&input)),
                Arg::optional(bias.as_ref()),
                Arg::optional(weights.as_ref().map(|weights| &weights[0])),
                Arg::optional(weights.as_ref().map(|weights| &weights[1])),
                Arg::Float(EPSILON),
                Arg::To(&angles),
                Arg::To(&positions),
                Arg::To(&slots),
                Arg::To(out),
                Arg::To(&keys),
                Arg::To(&values),
                Arg::Int(self.rows),
                Arg::Int(self.heads),
                Arg::Int(self.kv_heads),
                Arg::Int(self.dim),
            ],
        );
        [out.stored(dtype), keys.stored(dtype), values.stored(dtype)]
    }

    /// Gradients of the input and of the two weights.
    fn backward(
        &self,
        gpu: &Gpu,
        formats: (Dtype, Dtype),
        input: &[f32],
        grad_out: &[f32],
    ) -> (Vec<f32>, Vec<f32>) {
        let (grad_format, dtype) = formats;
        let (before, grad_out) = (gpu.stored(dtype, input), gpu.stored(grad_format, grad_out));
        let grad = gpu.stored(dtype, &vec![f32::NAN; input.len()]);
        let bias = self.bias.as_ref().map(|bias| gpu.stored(dtype, bias));
        let weights =
            self.weights.as_ref().map(|weights| weights.clone().map(|weight| gpu.stored(dtype, &weight)));
        let (angles, positions) = (gpu.floats(&self.angles()), gpu.ints(&self.positions));
        let blocks = self.rows.div_ceil(16);
        let partial = gpu.floats(&vec![f32::NAN; blocks * 2 * self.dim]);
        gpu.launch(
            &backward_name("rotary_backward", grad_format, dtype),
            (blocks, 1),
            256,
            &[
                Arg::To(&grad_out),
                Arg::optional(weights.as_ref().map(|_| &before)),
                Arg::optional(bias.as_ref()),
                Arg::optional(weights.as_ref().map(|weights| &weights[0])),
                Arg::optional(weights.as_ref().map(|weights| &weights[1])),
                Arg::Float(EPSILON),
                Arg::To(&angles),
                Arg::To(&positions),
                Arg::To(&grad),
                Arg::optional(weights.as_ref().map(|_| &partial)),
                Arg::Int(self.rows),
                Arg::Int(self.heads),
                Arg::Int(self.kv_heads),
                Arg::Int(self.dim),
            ],
        );
        let grad_weights = gpu.floats(&vec![0.0; 2 * self.dim]);
        if self.weights.is_some() {
            add_partial_sums(gpu, &partial, blocks, &grad_weights, 2 * self.dim);
        }
        (grad.stored(dtype), grad_weights.floats())
    }

    /// What the pages should hold: the rows' keys, then their values.
    fn pages(&self, out: &[f32]) -> [Vec<f32>; 2] {
        [self.heads, self.heads + self.kv_heads].map(|first| {
            let mut pages = vec![9.0; PAGES * PAGE * self.kv_heads * self.dim];
            for (row, slot) in self.slots.iter().enumerate().filter(|(_, slot)| **slot >= 0) {
                for head in 0..self.kv_heads {
                    let from = row * self.width() + (first + head) * self.dim;
                    let (page, lane) = (*slot as usize / PAGE, *slot as usize % PAGE);
                    let to = ((page * self.kv_heads + head) * PAGE + lane) * self.dim;
                    pages[to..to + self.dim].copy_from_slice(&out[from..from + self.dim]);
                }
            }
            pages
        })
    }
}

const SHAPES: [(usize, usize, usize, usize); 5] =
    [(1, 1, 8, 1), (4, 2, 64, 9), (3, 1, 80, 5), (2, 2, 128, 3), (2, 1, 256, 2)];

#[test]
fn forward_agrees_with_the_cpu_and_fills_the_cache() {
    let gpu = Gpu::new();
    for dtype in FORMATS {
        for (heads, kv_heads, dim, rows) in SHAPES {
            for (biased, normed) in [(false, false), (true, false), (true, true)] {
                let case = Case::new(heads, kv_heads, dim, rows, biased, normed).rounded(dtype);
                let mut input = values(4, rows * case.width());
                dtype.round(&mut input);
                let [out, keys, values] = case.forward(&gpu, dtype, &input, false);
                assert_close(&out, &case.forward_by_cpu(&input), tolerance(dtype));
                assert_eq!([keys, values], case.pages(&out));
                assert_eq!(case.forward(&gpu, dtype, &input, true)[0], out);
            }
        }
    }
}

#[test]
fn a_row_alone_has_the_bits_it_has_among_others() {
    let gpu = Gpu::new();
    let case = Case::new(3, 1, 80, 6, true, true).rounded(Dtype::Bf16);
    let (width, input) = (case.width(), values(5, 6 * case.width()));
    let [all, ..] = case.forward(&gpu, Dtype::Bf16, &input, false);
    for row in 0..6 {
        let one = Case { rows: 1, positions: vec![case.positions[row]], slots: vec![-1], ..case.clone() };
        let [alone, ..] = one.forward(&gpu, Dtype::Bf16, &input[row * width..][..width], false);
        assert_eq!(alone, all[row * width..][..width]);
    }
}

#[test]
fn backward_agrees_with_the_cpu() {
    let gpu = Gpu::new();
    for formats in [(Dtype::F32, Dtype::F32), (Dtype::Bf16, Dtype::Bf16), (Dtype::F32, Dtype::Bf16)] {
        for (heads, kv_heads, dim, rows) in [(1, 1, 8, 1), (4, 2, 64, 19), (3, 1, 80, 5), (2, 1, 256, 2)] {
            for (biased, normed) in [(false, false), (true, true)] {
                let case = Case::new(heads, kv_heads, dim, rows, biased, normed).rounded(formats.1);
                let (mut input, mut grad_out) =
                    (values(6, rows * case.width()), values(7, rows * case.width()));
                formats.1.round(&mut input);
                formats.0.round(&mut grad_out);
                let expected = case.backward_by_cpu(&input, &grad_out);
                let actual = case.backward(&gpu, formats, &input, &grad_out);
                assert_close(&actual.0, &expected.0, tolerance(formats.1));
                assert_close(&actual.1, &expected.1, 2e-5);
                assert_eq!(actual, case.backward(&gpu, formats, &input, &grad_out), "twice the same bits");
            }
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let gpu = Gpu::new();
    let case = Case::new(1, 1, 16, 1, true, true);
    let (input, grad_out) = (values(8, case.width()), values(9, case.width()));
    let (grad, grad_weights) = case.backward(&gpu, (Dtype::F32, Dtype::F32), &input, &grad_out);
    let loss = |case: &Case, input: &[f32]| dot(&case.forward(&gpu, Dtype::F32, input, false)[0], &grad_out);
    check_gradient(&input, &grad, |input| loss(&case, input));
    let weights = case.weights.clone().unwrap().concat();
    check_gradient(&weights, &grad_weights, |weights| {
        let (queries, keys) = weights.split_at(case.dim);
        loss(&Case { weights: Some([queries.to_vec(), keys.to_vec()]), ..case.clone() }, &input)
    });
}

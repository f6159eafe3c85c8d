//! Launches of rotary.cu against `kernels::rotary` and `kernels::norm`.

use crate::cuda_emulator::device;
use crate::support::{
    Format, assert_close, assert_refused, blank, check_gradient, dot, read, rounded, store, stored_values,
    upload, values,
};
use half::bf16;
use rpt::cuda::rotary::{PageWrites, Rotary};
use rpt::cuda::{Buffer, Device, Indices};
use rpt::kernels::attention::Geometry;
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
    bias: Option<Vec<f32>>,
    /// Of queries, then of keys.
    weights: Option<[Vec<f32>; 2]>,
    frequencies: Frequencies,
    positions: Vec<u32>,
    slots: Vec<i32>,
}

impl Case {
    fn new(heads: usize, kv_heads: usize, dim: usize, rows: usize, biased: bool, normed: bool) -> Self {
        let width = (heads + 2 * kv_heads) * dim;
        Self {
            heads,
            kv_heads,
            dim,
            bias: biased.then(|| values(1, width)),
            weights: normed.then(|| [values(2, dim), values(3, dim)]),
            frequencies: Frequencies { attention_factor: 1.1, ..Frequencies::new(10_000.0, dim) },
            positions: (0..rows).map(|row| (row * 7 % POSITIONS) as u32).collect(),
            slots: (0..rows)
                .map(|row| if row % 4 == 1 { -1 } else { (row * 5 % (PAGES * PAGE)) as i32 })
                .collect(),
        }
    }

    fn rounded<T: Format>(self) -> Self {
        let bias = self.bias.map(|bias| rounded::<T>(&bias));
        let weights = self.weights.map(|weights| weights.map(|weight| rounded::<T>(&weight)));
        Self { bias, weights, ..self }
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

    fn pages_of<T: Format>(&self, device: &Device) -> Buffer<T> {
        store(device, &vec![9.0; PAGES * PAGE * self.kv_heads * self.dim])
    }

    /// Rows, key pages and value pages after the forward pass.
    fn forward<T: Format>(&self, device: &Device, input: &[f32], in_place: bool) -> [Vec<f32>; 3] {
        let (mut keys, mut values) = (self.pages_of::<T>(device), self.pages_of::<T>(device));
        let input = store::<T>(device, input);
        let mut out = blank::<T>(device, input.len());
        if in_place {
            out.slice_mut(..).unwrap().copy_from(&input).unwrap();
        }
        let (constants, slots) = (Constants::new(device, self), upload(device, &self.slots));
        let pages =
            PageWrites { slots: (&slots).into(), keys: (&mut keys).into(), values: (&mut values).into() };
        let from = (!in_place).then_some((&input).into());
        // SAFETY: slots lie within the pages.
        unsafe { constants.rotary(self).forward_into_pages(device, from, (&mut out).into(), pages) }.unwrap();
        [read(&out), read(&keys), read(&values)]
    }

    fn forward_without_pages<T: Format>(&self, device: &Device, input: &[f32]) -> Vec<f32> {
        let (constants, mut rows) = (Constants::<T>::new(device, self), store::<T>(device, input));
        constants.rotary(self).forward(device, None, (&mut rows).into()).unwrap();
        read(&rows)
    }

    /// Gradients of the input and of the two weights; `G` and `T` are the formats of `grad_out` and of the rest.
    fn backward<G: Format, T: Format>(
        &self,
        device: &Device,
        input: &[f32],
        grad_out: &[f32],
    ) -> (Vec<f32>, Vec<f32>) {
        let (before, grad_out) = (store::<T>(device, input), store::<G>(device, grad_out));
        let (constants, mut grad) = (Constants::new(device, self), blank::<T>(device, input.len()));
        let mut grad_norms = store::<f32>(device, &vec![0.0; 2 * self.dim]);
        let normed = self.weights.is_some();
        let (before, norms) =
            (normed.then_some((&before).into()), normed.then_some((&mut grad_norms).into()));
        let rotary = constants.rotary(self);
        rotary.backward(device, (&grad_out).into(), before, (&mut grad).into(), norms).unwrap();
        (read(&grad), read(&grad_norms))
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

/// What a [`Case`] has on the device.
struct Constants<T> {
    bias: Option<Buffer<T>>,
    weights: Option<[Buffer<T>; 2]>,
    angles: Buffer<f32>,
    positions: Indices,
}

impl<T: Format> Constants<T> {
    fn new(device: &Device, case: &Case) -> Self {
        let weights = case.weights.as_ref();
        Self {
            bias: case.bias.as_ref().map(|bias| store(device, bias)),
            weights: weights.map(|weights| weights.each_ref().map(|weight| store(device, weight))),
            angles: upload(device, &case.angles()),
            positions: Indices::upload(device, "positions", &case.positions).unwrap(),
        }
    }

    fn rotary(&self, case: &Case) -> Rotary<'_, T> {
        Rotary {
            geometry: Geometry { heads: case.heads, kv_heads: case.kv_heads, head_dim: case.dim },
            bias: self.bias.as_ref().map(Into::into),
            norms: self.weights.as_ref().map(|[queries, keys]| (queries.into(), keys.into())),
            epsilon: EPSILON,
            angles: (&self.angles).into(),
            positions: self.positions.view(),
        }
    }
}

const SHAPES: [(usize, usize, usize, usize); 5] =
    [(1, 1, 8, 1), (4, 2, 64, 9), (3, 1, 80, 5), (2, 2, 128, 3), (2, 1, 256, 2)];

fn forward_agrees<T: Format>() {
    let device = device();
    for (heads, kv_heads, dim, rows) in SHAPES {
        for (biased, normed) in [(false, false), (true, false), (true, true)] {
            let case = Case::new(heads, kv_heads, dim, rows, biased, normed).rounded::<T>();
            let input = stored_values::<T>(4, rows * case.width());
            let [out, keys, values] = case.forward::<T>(&device, &input, false);
            assert_close(&out, &case.forward_by_cpu(&input), T::TOLERANCE);
            assert_eq!([keys, values], case.pages(&out));
            assert_eq!(case.forward::<T>(&device, &input, true)[0], out);
            assert_eq!(case.forward_without_pages::<T>(&device, &input), out);
        }
    }
}

#[test]
fn forward_agrees_with_the_cpu_and_fills_the_cache() {
    forward_agrees::<f32>();
    forward_agrees::<bf16>();
}

#[test]
fn a_row_alone_has_the_bits_it_has_among_others() {
    let device = device();
    let case = Case::new(3, 1, 80, 6, true, true).rounded::<bf16>();
    let (width, input) = (case.width(), values(5, 6 * case.width()));
    let [all, ..] = case.forward::<bf16>(&device, &input, false);
    for row in 0..6 {
        let one = Case { positions: vec![case.positions[row]], slots: vec![-1], ..case.clone() };
        let [alone, ..] = one.forward::<bf16>(&device, &input[row * width..][..width], false);
        assert_eq!(alone, all[row * width..][..width]);
    }
}

fn backward_agrees<G: Format, T: Format>() {
    let device = device();
    for (heads, kv_heads, dim, rows) in [(1, 1, 8, 1), (4, 2, 64, 19), (3, 1, 80, 5), (2, 1, 256, 2)] {
        for (biased, normed) in [(false, false), (true, true)] {
            let case = Case::new(heads, kv_heads, dim, rows, biased, normed).rounded::<T>();
            let input = stored_values::<T>(6, rows * case.width());
            let grad_out = stored_values::<G>(7, rows * case.width());
            let expected = case.backward_by_cpu(&input, &grad_out);
            let actual = case.backward::<G, T>(&device, &input, &grad_out);
            assert_close(&actual.0, &expected.0, T::TOLERANCE);
            assert_close(&actual.1, &expected.1, 2e-5);
            assert_eq!(actual, case.backward::<G, T>(&device, &input, &grad_out), "twice the same bits");
        }
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
    let case = Case::new(1, 1, 16, 1, true, true);
    let (input, grad_out) = (values(8, case.width()), values(9, case.width()));
    let (grad, grad_weights) = case.backward::<f32, f32>(&device, &input, &grad_out);
    let loss = |case: &Case, input: &[f32]| dot(&case.forward::<f32>(&device, input, false)[0], &grad_out);
    check_gradient(&input, &grad, |input| loss(&case, input));
    let weights = case.weights.clone().unwrap().concat();
    check_gradient(&weights, &grad_weights, |weights| {
        let (queries, keys) = weights.split_at(case.dim);
        loss(&Case { weights: Some([queries.to_vec(), keys.to_vec()]), ..case.clone() }, &input)
    });
}

#[test]
fn a_forward_pass_that_does_not_fit_is_refused() {
    let device = device();
    let case = Case::new(2, 1, 16, 3, true, true);
    let (constants, width) = (Constants::<f32>::new(&device, &case), case.width());
    let rotary = constants.rotary(&case);
    let run = |rotary: Rotary<f32>, from: usize, out: usize| {
        let (from, mut out) = (blank::<f32>(&device, from), blank::<f32>(&device, out));
        rotary.forward(&device, Some((&from).into()), (&mut out).into())
    };
    run(rotary, 3 * width, 3 * width).unwrap();
    run(Rotary { positions: rotary.positions.slice(..0).unwrap(), ..rotary }, 0, 0).unwrap();
    assert_refused(run(rotary, 3 * width - 1, 3 * width), "rows to rotate: 191 elements where 192 are");
    assert_refused(run(rotary, 3 * width, 3 * width - 1), "rotated rows: 191 elements where 192 are");
    let short = rotary.angles.slice(..14 * 16).unwrap();
    let what = "positions of rows: index 14, where there are 14";
    assert_refused(run(Rotary { angles: short, ..rotary }, 3 * width, 3 * width), what);
    let bias = rotary.bias.map(|bias| bias.slice(1..).unwrap());
    assert_refused(run(Rotary { bias, ..rotary }, 3 * width, 3 * width), "bias of queries, keys and values");
    let norms = rotary.norms.map(|(queries, keys)| (queries, keys.slice(1..).unwrap()));
    assert_refused(run(Rotary { norms, ..rotary }, 3 * width, 3 * width), "weight of the heads' norm");
    for (heads, kv_heads, head_dim) in [(0, 1, 16), (2, 0, 16), (2, 1, 0), (2, 1, 12), (2, 1, 264)] {
        let geometry = Geometry { heads, kv_heads, head_dim };
        assert_refused(run(Rotary { geometry, ..rotary }, 3 * width, 3 * width), "multiple of 8 up to 256");
    }
    let geometry = Geometry { heads: usize::MAX, kv_heads: 1, head_dim: 16 };
    assert_refused(run(Rotary { geometry, bias: None, ..rotary }, 3 * width, 3 * width), "rotated rows");
    let (mut keys, mut values) = (case.pages_of::<f32>(&device), case.pages_of::<f32>(&device));
    let (slots, mut out) = (upload(&device, &case.slots[..2]), blank::<f32>(&device, 3 * width));
    let pages = PageWrites { slots: (&slots).into(), keys: (&mut keys).into(), values: (&mut values).into() };
    // SAFETY: slots lie within the pages.
    let result = unsafe { rotary.forward_into_pages(&device, None, (&mut out).into(), pages) };
    assert_refused(result, "slots of keys and values: 2 elements where 3 are");
}

#[test]
fn a_backward_pass_that_does_not_fit_is_refused() {
    let device = device();
    let case = Case::new(2, 1, 16, 3, true, true);
    let (constants, all) = (Constants::<f32>::new(&device, &case), 3 * case.width());
    let rotary = constants.rotary(&case);
    let run = |rotary: &Rotary<f32>, lengths: [usize; 2], before: Option<usize>, norms: Option<usize>| {
        let [grad_out, grad] = lengths;
        let (grad_out, mut grad) = (blank::<f32>(&device, grad_out), blank::<f32>(&device, grad));
        let before = before.map(|length| blank::<f32>(&device, length));
        let mut norms = norms.map(|length| blank::<f32>(&device, length));
        let before = before.as_ref().map(Into::into);
        let norms = norms.as_mut().map(Into::into);
        rotary.backward(&device, (&grad_out).into(), before, (&mut grad).into(), norms)
    };
    run(&rotary, [all; 2], Some(all), Some(32)).unwrap();
    run(&rotary, [all; 2], Some(all), None).unwrap();
    let empty = Rotary { positions: rotary.positions.slice(..0).unwrap(), ..rotary };
    run(&empty, [0; 2], Some(0), Some(32)).unwrap();
    let refused = |rotary: &Rotary<f32>, lengths, before, norms, what| {
        assert_refused(run(rotary, lengths, before, norms), what);
    };
    refused(&rotary, [all - 1, all], Some(all), Some(32), "gradients of rotated rows: 191");
    refused(&rotary, [all, all - 1], Some(all), Some(32), "gradients of rows to rotate: 191");
    refused(&rotary, [all; 2], Some(all - 1), Some(32), "rows before norm and rotation: 191");
    refused(&rotary, [all; 2], None, Some(32), "rows before norm and rotation: 0");
    refused(&rotary, [all; 2], Some(all), Some(31), "gradients of the heads' norms: 31 elements where 32");
    let plain = Rotary { norms: None, ..rotary };
    run(&plain, [all; 2], None, None).unwrap();
    refused(&plain, [all; 2], None, Some(32), "gradients of the heads' norms: 32 elements where 0");
}

//! The backward pass over forests.

use crate::cuda_emulator::device;
use crate::reference::{
    Format, Forward, Problem, assert_close, bits, forest, geometry, numbers, random_forest, values,
};
use half::bf16;
use rpt::cuda::attention::{Attention, ForestGradients, ForestInputs, ForestSaved, ForestTables, Prefix};
use rpt::cuda::{Buffer, Device, Slice, SliceMut};
use rpt::kernels::attention::Geometry;
use rpt::model::Forest;

/// Scratch and results of a backward pass.
struct Backward {
    qkv: Buffer<f32>,
    prefix: Option<Buffer<f32>>,
    carried: Option<Buffer<f32>>,
}

impl Backward {
    fn new(device: &Device, elements: usize) -> Self {
        Self { qkv: device.allocate("gradients", elements).unwrap(), prefix: None, carried: None }
    }

    fn run<T: Format>(
        &mut self,
        attention: &Attention,
        device: &Device,
        tables: &ForestTables,
        inputs: &ForestInputs<T>,
        forward: &Forward<T>,
        grad_out: &[T],
    ) {
        let geometry = attention.geometry();
        let grad_out = device.upload("grad_out", grad_out).unwrap();
        let mut deltas = device.allocate("deltas", tables.statistics(geometry)).unwrap();
        let mut partial_sums = device.allocate("partial sums", tables.partial_sums(geometry)).unwrap();
        let saved = ForestSaved {
            out: Slice::from(&forward.out),
            grad_out: Slice::from(&grad_out),
            log_sums: Slice::from(&forward.log_sums),
        };
        let mut gradients = ForestGradients {
            qkv: SliceMut::from(&mut self.qkv),
            prefix: self.prefix.as_mut().map(SliceMut::from),
            carried: self.carried.as_ref().map(Slice::from),
            deltas: SliceMut::from(&mut deltas),
            partial_sums: SliceMut::from(&mut partial_sums),
        };
        attention.forest_backward(tables, inputs, &saved, &mut gradients).unwrap();
    }
}

/// Gradients on the device, all rows in one launch.
fn gradients<T: Format>(problem: &Problem<T>, grad_out: &[T], batch_invariant: bool) -> Vec<f32> {
    let device = device();
    let attention = Attention::new(&device, problem.geometry, batch_invariant).unwrap();
    let tables = ForestTables::upload(&device, &problem.plan(0, batch_invariant)).unwrap();
    let qkv = device.upload("qkv", &problem.qkv).unwrap();
    let inputs = ForestInputs { qkv: Slice::from(&qkv), prefix: None };
    let forward = Forward::new(&device, &attention, &tables, &inputs, problem.rows());
    let mut backward = Backward::new(&device, problem.qkv.len());
    backward.run(&attention, &device, &tables, &inputs, &forward, grad_out);
    backward.qkv.download().unwrap()
}

fn grad_out<T: Format>(problem: &Problem<T>) -> Vec<T> {
    numbers(77, problem.rows() * problem.geometry.heads * problem.geometry.head_dim)
}

fn agrees<T: Format>(geometry: Geometry, forest: Forest, batch_invariant: bool, what: &str) {
    let problem = Problem::<T>::new(geometry, forest, 6);
    let grad_out = grad_out(&problem);
    let found = gradients(&problem, &grad_out, batch_invariant);
    let expected = problem.backward(&values(&problem.qkv), &values(&grad_out));
    assert_close(&values(&found), &expected, T::GRADIENT, what);
}

const SHAPES: [(usize, usize, usize); 8] =
    [(1, 1, 64), (2, 1, 16), (4, 2, 80), (3, 1, 96), (2, 2, 128), (6, 1, 32), (2, 1, 144), (1, 1, 256)];

#[test]
fn f32_agrees_with_the_derivative() {
    for (number, (heads, kv_heads, dim)) in SHAPES.into_iter().enumerate() {
        let forest = random_forest(200 + number as u64, 130);
        let what = format!("f32 {heads} {kv_heads} {dim}");
        agrees::<f32>(geometry(heads, kv_heads, dim), forest, number % 2 == 0, &what);
    }
}

#[test]
fn bf16_agrees_with_the_derivative() {
    for (number, (heads, kv_heads, dim)) in SHAPES.into_iter().enumerate() {
        let forest = random_forest(300 + number as u64, 200);
        let what = format!("bf16 {heads} {kv_heads} {dim}");
        agrees::<bf16>(geometry(heads, kv_heads, dim), forest, number % 2 == 1, &what);
    }
}

/// A trunk that so many queries read that its work is split.
fn long_lists() -> Forest {
    let mut segments = vec![(None, 20), (Some(0), 70)];
    segments.extend((0..11).map(|_| (Some(1), 100)));
    forest(&segments)
}

#[test]
fn split_lists_agree_and_have_the_same_bits_again() {
    let problem = Problem::<bf16>::new(geometry(1, 1, 16), long_lists(), 2);
    assert!(problem.plan(0, false).slots > 0);
    agrees::<bf16>(problem.geometry, long_lists(), false, "split");
    agrees::<f32>(problem.geometry, long_lists(), true, "split");
    let grad_out = grad_out(&problem);
    let (first, second) = (gradients(&problem, &grad_out, false), gradients(&problem, &grad_out, false));
    assert_eq!(bits(&first), bits(&second));
}

type Segments = Vec<(Option<usize>, usize)>;

/// A trunk's keys and values, and launches of its branches that add up the trunk's gradients, before its own.
fn in_parts<T: Format>(geometry: Geometry, branches: &[Segments]) {
    let trunk = [(None, 70), (Some(0), 20)];
    let all: Segments = trunk.into_iter().chain(branches.iter().flatten().copied()).collect();
    let Geometry { heads, kv_heads, head_dim } = geometry;
    let whole = Problem::<T>::new(geometry, forest(&all), 8);
    let grad_out = grad_out(&whole);
    let expected = gradients(&whole, &grad_out, false);
    let (device, width, out_width) = (device(), whole.width(), heads * head_dim);
    let attention = Attention::new(&device, whole.geometry, false).unwrap();
    let places = whole.plan(0, false).packed.places();
    let pick = |values: &[T], rows: &[usize], width: usize| -> Vec<T> {
        rows.iter().flat_map(|row| values[row * width..][..width].to_vec()).collect()
    };
    let trunk_rows: Vec<usize> = (0..90).collect();
    let trunk_qkv = device.upload("trunk", &pick(&whole.qkv, &trunk_rows, width)).unwrap();
    let prefix = Prefix {
        keys: trunk_qkv.slice(heads * head_dim..).unwrap(),
        values: trunk_qkv.slice((heads + kv_heads) * head_dim..).unwrap(),
        stride: width,
    };
    let mut trunk_sums = Some(device.zeroed("sums", 90 * 2 * kv_heads * head_dim).unwrap());
    let mut found = vec![f32::NAN; expected.len()];
    let mut place = |rows: &[usize], gradients: &[f32]| {
        for (row, gradients) in rows.iter().zip(gradients.chunks_exact(width)) {
            found[row * width..][..width].copy_from_slice(gradients);
        }
    };
    let mut first_segment = 2;
    for branch in branches {
        let segments: Vec<_> = trunk.into_iter().chain(branch.clone()).collect();
        let part = Problem::<T>::new(whole.geometry, forest(&segments), 0);
        let plan = part.plan(2, false);
        let tables = ForestTables::upload(&device, &plan).unwrap();
        // Where the part's rows lie in the whole.
        let rows: Vec<usize> = plan
            .packed
            .sources()
            .skip(90)
            .map(|source| {
                let segments = part.forest.segments();
                let at = segments.iter().rposition(|segment| segment.row <= source).unwrap();
                let other = &whole.forest.segments()[first_segment + at - 2];
                places[other.row + source - segments[at].row] as usize
            })
            .collect();
        let qkv = device.upload("branches", &pick(&whole.qkv, &rows, width)).unwrap();
        let inputs = ForestInputs { qkv: Slice::from(&qkv), prefix: Some(prefix) };
        let forward = Forward::new(&device, &attention, &tables, &inputs, rows.len());
        let mut backward = Backward::new(&device, rows.len() * width);
        backward.prefix = trunk_sums.take();
        let grads = pick(&grad_out, &rows, out_width);
        backward.run(&attention, &device, &tables, &inputs, &forward, &grads);
        place(&rows, &backward.qkv.download().unwrap());
        trunk_sums = backward.prefix;
        first_segment += branch.len();
    }
    let part = Problem::<T>::new(whole.geometry, forest(&trunk), 0);
    let tables = ForestTables::upload(&device, &part.plan(0, false)).unwrap();
    let inputs = ForestInputs { qkv: Slice::from(&trunk_qkv), prefix: None };
    let forward = Forward::new(&device, &attention, &tables, &inputs, 90);
    let mut backward = Backward::new(&device, 90 * width);
    backward.carried = trunk_sums;
    backward.run(&attention, &device, &tables, &inputs, &forward, &pick(&grad_out, &trunk_rows, out_width));
    place(&trunk_rows, &backward.qkv.download().unwrap());
    assert_close(&values(&found), &values(&expected), T::GRADIENT, "in parts");
}

#[test]
fn a_tree_in_several_launches_has_the_gradients_of_one() {
    // Parents within a launch count the trunk's two segments first.
    let branches = [vec![(Some(1), 30), (Some(0), 66), (Some(1), 5)], vec![(Some(0), 9), (Some(1), 80)]];
    in_parts::<f32>(geometry(4, 2, 32), &branches);
    in_parts::<bf16>(geometry(4, 2, 32), &branches);
    let long = [vec![(Some(1), 110); 10], vec![(Some(1), 7)]];
    in_parts::<bf16>(geometry(1, 1, 16), &long);
}

#[test]
fn f32_gradients_are_differences_of_the_forward_pass() {
    let problem = Problem::<f32>::new(geometry(2, 1, 16), random_forest(4, 70), 4);
    let grad_out = grad_out(&problem);
    let gradients = gradients(&problem, &grad_out, false);
    let loss = |at: usize, step: f32| {
        let mut moved = Problem::<f32>::new(problem.geometry, random_forest(4, 70), 4);
        moved.qkv[at] += step;
        let out = moved.run(&device(), false).out.download().unwrap();
        out.iter().zip(&grad_out).map(|(out, grad)| f64::from(*out) * f64::from(*grad)).sum::<f64>()
    };
    for at in (0..problem.qkv.len()).step_by(problem.qkv.len() / 12) {
        let difference = (loss(at, 0.01) - loss(at, -0.01)) / 0.02;
        let gradient = f64::from(gradients[at]);
        assert!(
            (difference - gradient).abs() < 2e-3 * (1.0 + gradient.abs()),
            "{at}: {difference} {gradient}"
        );
    }
}

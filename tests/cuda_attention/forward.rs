//! The forward pass over forests.

use crate::cuda_emulator::device;
use crate::reference::{Format, Problem, assert_close, bits, forest, geometry, random_forest, values};
use half::bf16;
use rpt::cuda::attention::{Attention, ForestInputs, ForestTables};
use rpt::cuda::{CudaError, Slice, SliceMut};
use rpt::kernels::attention::Geometry;
use rpt::model::Forest;

const SHAPES: [(usize, usize, usize); 10] = [
    (1, 1, 64),
    (2, 1, 16),
    (4, 2, 80),
    (3, 1, 96),
    (2, 2, 128),
    (7, 1, 32),
    (1, 1, 112),
    (2, 1, 144),
    (1, 1, 256),
    (9, 3, 48),
];

fn agrees<T: Format>(geometry: Geometry, forest: Forest, batch_invariant: bool, what: &str) {
    let problem = Problem::<T>::new(geometry, forest, 5);
    let run = problem.run(&device(), batch_invariant);
    let (out, log_sums) = problem.forward(&values(&problem.qkv));
    assert_close(&values(&run.out.download().unwrap()), &out, T::OUT, what);
    let (rows, heads) = (problem.rows(), geometry.heads);
    let found = run.log_sums.download().unwrap();
    let stride = found.len() / heads;
    let found = (0..rows * heads).map(|at| f64::from(found[at % heads * stride + at / heads]));
    assert_close(&found.collect::<Vec<_>>(), &log_sums, 1e-5, what);
}

#[test]
fn f32_agrees_with_the_rule_of_who_sees_whom() {
    for (number, (heads, kv_heads, dim)) in SHAPES.into_iter().enumerate() {
        let what = format!("f32 {heads} {kv_heads} {dim}");
        agrees::<f32>(
            geometry(heads, kv_heads, dim),
            random_forest(number as u64, 150),
            number % 2 == 1,
            &what,
        );
    }
}

#[test]
fn bf16_agrees_with_the_rule_of_who_sees_whom() {
    for (number, (heads, kv_heads, dim)) in SHAPES.into_iter().enumerate() {
        let what = format!("bf16 {heads} {kv_heads} {dim}");
        agrees::<bf16>(
            geometry(heads, kv_heads, dim),
            random_forest(100 + number as u64, 200),
            number % 2 == 0,
            &what,
        );
    }
}

#[test]
fn special_forests_agree() {
    let chain: Vec<_> = (0..90).map(|at: usize| (at.checked_sub(1), 1 + at % 3)).collect();
    let roots = [(None, 3), (None, 64), (None, 0), (None, 65), (Some(2), 1)];
    let star: Vec<_> = [(None, 70)].into_iter().chain((0..20).map(|_| (Some(0), 7))).collect();
    let special: [&[(Option<usize>, usize)]; 4] = [&[(None, 1)], &chain, &roots, &star];
    for segments in special {
        for batch_invariant in [false, true] {
            agrees::<bf16>(geometry(2, 1, 64), forest(segments), batch_invariant, "special");
            agrees::<f32>(geometry(1, 1, 32), forest(segments), batch_invariant, "special");
        }
    }
}

/// Rows of the path to the end of a segment have the same bits in a forest of it alone.
fn a_path_alone<T: Format>() {
    let segments = [(None, 600), (Some(0), 30), (Some(1), 10), (Some(1), 20), (Some(0), 90), (None, 40)];
    let whole = Problem::<T>::new(geometry(2, 1, 64), forest(&segments), 3);
    let all = whole.run(&device(), true).out.download().unwrap();
    for path in [vec![0, 1, 3], vec![0, 4], vec![5]] {
        let alone: Vec<_> =
            path.iter().enumerate().map(|(at, segment)| (at.checked_sub(1), segments[*segment].1)).collect();
        let mut part = Problem::<T>::new(whole.geometry, forest(&alone), 0);
        let places = whole.plan(0, true).packed.places();
        let rows: Vec<usize> = path
            .iter()
            .flat_map(|segment| {
                let segment = &whole.forest.segments()[*segment];
                segment.row..segment.row + segment.length
            })
            .map(|row| places[row] as usize)
            .collect();
        part.qkv =
            rows.iter().flat_map(|row| whole.qkv[row * whole.width()..][..whole.width()].to_vec()).collect();
        let found = part.run(&device(), true).out.download().unwrap();
        let expected: Vec<T> = rows.iter().flat_map(|row| all[row * 128..][..128].to_vec()).collect();
        assert!(bits(&found) == bits(&expected), "path {path:?}");
    }
}

#[test]
fn a_path_alone_has_the_bits_it_has_in_a_forest() {
    a_path_alone::<f32>();
    a_path_alone::<bf16>();
}

#[test]
fn running_again_gives_the_same_bits() {
    let problem = Problem::<bf16>::new(geometry(4, 2, 64), random_forest(9, 200), 1);
    let first = problem.run(&device(), false);
    let second = problem.run(&device(), false);
    assert_eq!(bits(&first.out.download().unwrap()), bits(&second.out.download().unwrap()));
}

#[test]
fn what_does_not_fit_is_refused() {
    for (heads, kv_heads, dim) in [(1, 1, 24), (1, 1, 0), (1, 1, 272), (3, 2, 64), (0, 0, 64)] {
        let refused = Attention::new(&device(), geometry(heads, kv_heads, dim), false);
        assert!(matches!(refused, Err(CudaError::Launch { .. })), "{heads} {kv_heads} {dim}");
    }
    let device = device();
    let problem = Problem::<f32>::new(geometry(2, 1, 16), forest(&[(None, 10), (Some(0), 5)]), 1);
    let attention = Attention::new(&device, problem.geometry, false).unwrap();
    let tables = ForestTables::upload(&device, &problem.plan(0, false)).unwrap();
    let with_prefix = ForestTables::upload(&device, &problem.plan(1, false)).unwrap();
    let qkv = device.upload("qkv", &problem.qkv).unwrap();
    let (mut out, mut sums) =
        (device.allocate::<f32>("out", 15 * 32).unwrap(), device.allocate("sums", 128).unwrap());
    let mut attend = |tables: &ForestTables, qkv: Slice<f32>, out: &mut SliceMut<f32>| {
        attention.forest(tables, &ForestInputs { qkv, prefix: None }, out, &mut SliceMut::from(&mut sums))
    };
    let short = qkv.slice(1..).unwrap();
    let all = Slice::from(&qkv);
    assert!(matches!(attend(&tables, short, &mut SliceMut::from(&mut out)), Err(CudaError::Length { .. })));
    assert!(matches!(attend(&tables, all, &mut out.slice_mut(1..).unwrap()), Err(CudaError::Length { .. })));
    let shifted = device.upload("qkv", &[&[0.0], problem.qkv.as_slice()].concat()).unwrap();
    let refused = attend(&tables, shifted.slice(1..).unwrap(), &mut SliceMut::from(&mut out));
    assert!(matches!(refused, Err(CudaError::Launch { .. })), "not aligned");
    let missing = attend(&with_prefix, all, &mut SliceMut::from(&mut out));
    assert!(matches!(missing, Err(CudaError::Length { what: "keys of the prefix", .. })));
}

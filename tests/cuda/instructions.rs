//! The emulated instructions against their definition in the PTX manual.

use super::cuda_emulator::{Declaration, declarations, emulated_device};
use half::bf16;
use rpt::cuda::Shape;

/// A number for each index that looks arbitrary.
fn scrambled(at: usize) -> u32 {
    (at as u32 + 1).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(0x9e37_79b9)
}

fn value(at: usize) -> f32 {
    (scrambled(at) >> 8) as f32 / (1 << 23) as f32 - 1.0
}

#[test]
fn matrices_are_loaded_in_the_manuals_layout() {
    let Some(device) = emulated_device() else { return };
    let rows: Vec<u16> = (0..256).map(|at| scrambled(at) as u16).collect();
    let element = |matrix: usize, row: usize, column: usize| u32::from(rows[(8 * matrix + row) * 8 + column]);
    let input = device.upload("rows", &rows).unwrap();
    for (kind, matrices, transposed) in [(0, 4, false), (1, 4, true), (2, 2, false), (3, 2, true)] {
        let mut output = device.zeroed::<u32>("fragments", 128).unwrap();
        let kernel = device.kernel("test_ldmatrix").unwrap();
        // SAFETY: 32 rows of 8 elements in, 32 times 4 fragments out.
        unsafe { kernel.with(Shape::of(1, 32)).read(&input).write(&mut output).value(kind).launch() }
            .unwrap();
        let fragments = output.download().unwrap();
        for (lane, matrix) in (0..32).flat_map(|lane| (0..matrices).map(move |matrix| (lane, matrix))) {
            let at = |i: usize| {
                let (along, across) = (2 * (lane % 4) + i, lane / 4);
                if transposed { element(matrix, along, across) } else { element(matrix, across, along) }
            };
            assert_eq!(fragments[lane * 4 + matrix], at(1) << 16 | at(0), "{kind} {lane} {matrix}");
        }
    }
}

/// The manual's formulas for m16n8k16 with 16-bit operands: row and column of the i-th element of a lane.
fn place_a(lane: usize, i: usize) -> (usize, usize) {
    let row = if i < 2 || (4..6).contains(&i) { lane >> 2 } else { (lane >> 2) + 8 };
    (row, lane % 4 * 2 + (i & 1) + if i >= 4 { 8 } else { 0 })
}
fn place_b(lane: usize, i: usize) -> (usize, usize) {
    (lane % 4 * 2 + (i & 1) + if i >= 2 { 8 } else { 0 }, lane >> 2)
}
fn place_c(lane: usize, i: usize) -> (usize, usize) {
    (if i < 2 { lane >> 2 } else { (lane >> 2) + 8 }, lane % 4 * 2 + (i & 1))
}

#[test]
fn products_have_the_manuals_layout() {
    let Some(device) = emulated_device() else { return };
    let a = |row: usize, k: usize| bf16::from_f32(value(row * 16 + k));
    let b = |k: usize, column: usize| bf16::from_f32(value(1000 + k * 8 + column));
    let c = |row: usize, column: usize| value(2000 + row * 8 + column);
    let pair = |low: bf16, high: bf16| u32::from(high.to_bits()) << 16 | u32::from(low.to_bits());
    let pack = |registers: usize, element: &dyn Fn(usize, usize) -> bf16| -> Vec<u32> {
        let each = (0..32).flat_map(|lane| (0..registers).map(move |register| (lane, register)));
        each.map(|(lane, register)| pair(element(lane, 2 * register), element(lane, 2 * register + 1)))
            .collect()
    };
    let left = pack(4, &|lane, i| a(place_a(lane, i).0, place_a(lane, i).1));
    let right = pack(2, &|lane, i| b(place_b(lane, i).0, place_b(lane, i).1));
    let start: Vec<f32> =
        (0..128).map(|at| c(place_c(at / 4, at % 4).0, place_c(at / 4, at % 4).1)).collect();
    let (left, right) = (device.upload("a", &left).unwrap(), device.upload("b", &right).unwrap());
    let mut sum = device.upload("sum", &start).unwrap();
    let kernel = device.kernel("test_mma").unwrap();
    // SAFETY: 4, 2 and 4 registers for each of 32 lanes.
    unsafe { kernel.with(Shape::of(1, 32)).read(&left).read(&right).write(&mut sum).launch() }.unwrap();
    for (at, found) in sum.download().unwrap().into_iter().enumerate() {
        let (row, column) = place_c(at / 4, at % 4);
        let product = |k| f64::from(a(row, k).to_f32()) * f64::from(b(k, column).to_f32());
        let expected = f64::from(c(row, column)) + (0..16).map(product).sum::<f64>();
        assert!((f64::from(found) - expected).abs() < 1e-5, "{row} {column}: {found} {expected}");
    }
}

#[test]
fn reductions_add_by_a_fixed_tree_and_reach_every_thread() {
    let Some(device) = emulated_device() else { return };
    let (blocks, threads) = (6, 160);
    let values: Vec<f32> = (0..blocks * threads).map(value).collect();
    let input = device.upload("values", &values).unwrap();
    let mut sums = device.zeroed::<f32>("sums", values.len()).unwrap();
    let mut largest = device.zeroed::<f32>("largest", values.len()).unwrap();
    let kernel = device.kernel("test_reductions").unwrap();
    let launch = kernel.with(Shape::of(blocks, threads)).read(&input).write(&mut sums).write(&mut largest);
    // SAFETY: one value for each thread.
    unsafe { launch.launch() }.unwrap();
    let (sums, largest) = (sums.download().unwrap(), largest.download().unwrap());
    for (block, values) in values.chunks(threads).enumerate() {
        let warp = |lanes: &[f32]| {
            let mut lanes = lanes.to_vec();
            while lanes.len() > 1 {
                let (low, high) = lanes.split_at(lanes.len() / 2);
                lanes = low.iter().zip(high).map(|(low, high)| low + high).collect();
            }
            lanes[0]
        };
        let expected = values.chunks(32).map(warp).reduce(|sum, warp| sum + warp).unwrap();
        let most = values.iter().copied().fold(f32::MIN, f32::max);
        assert!(sums[block * threads..][..threads].iter().all(|sum| sum.to_bits() == expected.to_bits()));
        assert!(largest[block * threads..][..threads].iter().all(|found| *found == most));
    }
}

#[test]
fn background_copies_arrive_and_stop_at_the_end() {
    let Some(device) = emulated_device() else { return };
    let values: Vec<f32> = (0..4 * 150).map(value).collect();
    let input = device.upload("values", &values).unwrap();
    let mut output = device.allocate::<f32>("copy", 4 * 192).unwrap();
    let kernel = device.kernel("test_cp_async").unwrap();
    let launch = kernel.with(Shape::of(3, 64).shared(1024)).read(&input).write(&mut output).value(150);
    // SAFETY: 150 pieces in, 3 times 64 out, 16 bytes of shared memory for each thread.
    unsafe { launch.launch() }.unwrap();
    let found = output.download().unwrap();
    assert_eq!(found[..600], values);
    assert!(found[600..].iter().all(|zero| zero.to_bits() == 0));
}

#[test]
fn lanes_vote_add_and_shift() {
    let Some(device) = emulated_device() else { return };
    let values: Vec<i32> = (0..32).map(|at| (scrambled(at) % 100) as i32).collect();
    let input = device.upload("values", &values).unwrap();
    let mut output = device.zeroed::<i32>("results", 128).unwrap();
    let kernel = device.kernel("test_collectives").unwrap();
    // SAFETY: one value in and four out for each of 32 lanes.
    unsafe { kernel.with(Shape::of(1, 32)).read(&input).write(&mut output).launch() }.unwrap();
    let ballot = values.iter().rev().fold(0u32, |bits, value| bits << 1 | u32::from(value % 2 == 0));
    for (lane, found) in output.download().unwrap().chunks(4).enumerate() {
        let shifted = if lane < 3 { values[lane] } else { values[lane - 3] };
        assert_eq!(found, [ballot as i32, ballot.count_ones() as i32, values.iter().sum(), shifted]);
    }
}

#[test]
fn kernels_are_found_in_preprocessed_text() {
    let text = "extern \"C\" __attribute__((emulated_kernel)) void __attribute__((emulated_launch_bounds(128, (2))))\n\
                first(const float* __restrict__ x, int n) { f(x); }\n\
                template <int N> void helper();\n\
                extern \"C\" __attribute__((emulated_kernel)) __attribute__((emulated_launch_bounds(2 * (T))))\n\
                void second_f32 (float* y) {}\nextern \"C\" __attribute__((emulated_kernel)) void third() {}";
    let found = declarations(text);
    let expected = [("first", "128, (2)"), ("second_f32", "2 * (T)"), ("third", "")];
    let expected =
        expected.map(|(name, bounds)| Declaration { name: name.to_owned(), bounds: bounds.to_owned() });
    assert_eq!(found, expected);
}

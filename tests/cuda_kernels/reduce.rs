//! reduce.cu.

use crate::norm::add_partial_sums;
use crate::support::{Arg, FORMATS, Gpu, assert_close, suffix, values};
use rpt::kernels::dtype::Dtype;

#[test]
fn column_sums_agree_with_double_precision() {
    let gpu = Gpu::new();
    for dtype in FORMATS {
        for (rows, columns) in [(1, 4), (9, 37), (300, 5), (600, 132)] {
            let mut input = values(1, rows * columns);
            dtype.round(&mut input);
            let expected: Vec<f32> = (0..columns)
                .map(|column| {
                    let sum: f64 =
                        input.iter().skip(column).step_by(columns).map(|value| f64::from(*value)).sum();
                    (sum + 1.0) as f32
                })
                .collect();
            let parts = rows.div_ceil(256);
            let run = || {
                let (input, partial) =
                    (gpu.stored(dtype, &input), gpu.floats(&vec![f32::NAN; parts * columns]));
                let arguments = [Arg::To(&input), Arg::Int(rows), Arg::Int(columns), Arg::To(&partial)];
                let name = format!("column_sums_{}", suffix(dtype));
                gpu.launch(&name, (columns.div_ceil(128), parts), 256, &arguments);
                let target = gpu.floats(&vec![1.0; columns]);
                add_partial_sums(&gpu, &partial, parts, &target, columns);
                target.floats()
            };
            assert_close(&run(), &expected, 1e-5);
            assert_eq!(run(), run());
        }
    }
}

#[test]
fn many_partial_sums_are_added_once_each() {
    let gpu = Gpu::new();
    for parts in [1, 15, 16, 17, 100] {
        let partial: Vec<f32> = (0..parts * 33).map(|at| (at % 97) as f32).collect();
        let expected: Vec<f32> =
            (0..33).map(|column| partial.iter().skip(column).step_by(33).sum()).collect();
        let target = gpu.floats(&[0.0; 33]);
        add_partial_sums(&gpu, &gpu.floats(&partial), parts, &target, 33);
        assert_eq!(target.floats(), expected);
    }
}

#[test]
fn element_wise_passes_touch_every_element_once() {
    let gpu = Gpu::new();
    for length in [1_usize, 7, 1024, 2051] {
        let grid = (length.div_ceil(1024), 1);
        let (a, b) = (values(2, length), values(3, length));
        let (target, source) = (gpu.floats(&a), gpu.floats(&b));
        gpu.launch(
            "add_elements",
            grid,
            256,
            &[Arg::To(&target), Arg::To(&source), Arg::Long(length as u64)],
        );
        let sums: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        assert_eq!(target.floats(), sums);
        gpu.launch(
            "scale_elements",
            grid,
            256,
            &[Arg::To(&target), Arg::Float(0.3), Arg::Long(length as u64)],
        );
        assert_eq!(target.floats(), sums.iter().map(|sum| sum * 0.3).collect::<Vec<_>>());

        let narrow = gpu.stored(Dtype::Bf16, &vec![f32::NAN; length]);
        gpu.launch(
            "convert_f32_bf16",
            grid,
            256,
            &[Arg::To(&source), Arg::To(&narrow), Arg::Long(length as u64)],
        );
        gpu.launch(
            "convert_bf16_f32",
            grid,
            256,
            &[Arg::To(&narrow), Arg::To(&target), Arg::Long(length as u64)],
        );
        let mut rounded = b;
        Dtype::Bf16.round(&mut rounded);
        assert_eq!((narrow.stored(Dtype::Bf16), target.floats()), (rounded.clone(), rounded));
    }
}

#[test]
fn a_bias_is_added_to_every_row() {
    let gpu = Gpu::new();
    for dtype in FORMATS {
        for columns in [4, 37, 1032] {
            let (rows, mut bias) = (values(4, 3 * columns), values(5, columns));
            dtype.round(&mut bias);
            let (target, source) = (gpu.floats(&rows), gpu.stored(dtype, &bias));
            let arguments = [Arg::To(&target), Arg::To(&source), Arg::Int(columns)];
            gpu.launch(&format!("add_bias_{}", suffix(dtype)), (3, columns.div_ceil(1024)), 256, &arguments);
            let expected: Vec<f32> =
                rows.iter().zip(bias.iter().cycle()).map(|(row, bias)| row + bias).collect();
            assert_eq!(target.floats(), expected);
        }
    }
}

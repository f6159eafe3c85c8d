//! Launches of reduce.cu.

use crate::cuda_emulator::device;
use crate::support::{
    Format, assert_close, assert_refused, blank, read, rounded, store, stored_values, values,
};
use half::bf16;
use rpt::cuda::reduce::{add_bias, add_column_sums, add_partial_sums, convert};

fn column_sums<T: Format>() {
    let device = device();
    for (rows, columns) in [(1, 4), (9, 37), (300, 5), (600, 132)] {
        let input = stored_values::<T>(1, rows * columns);
        let expected: Vec<f32> = (0..columns)
            .map(|column| {
                let sum: f64 =
                    input.iter().skip(column).step_by(columns).map(|value| f64::from(*value)).sum();
                (sum + 1.0) as f32
            })
            .collect();
        let run = || {
            let (input, mut target) =
                (store::<T>(&device, &input), store::<f32>(&device, &vec![1.0; columns]));
            add_column_sums(&device, (&input).into(), columns, (&mut target).into()).unwrap();
            read(&target)
        };
        assert_close(&run(), &expected, 1e-5);
        assert_eq!(run(), run());
    }
}

#[test]
fn column_sums_agree_with_double_precision() {
    column_sums::<f32>();
    column_sums::<bf16>();
}

#[test]
fn many_partial_sums_are_added_once_each() {
    let device = device();
    for parts in [0, 1, 15, 16, 17, 100] {
        let partial: Vec<f32> = (0..parts * 33).map(|at| (at % 97) as f32).collect();
        let expected: Vec<f32> =
            (0..33).map(|column| partial.iter().skip(column).step_by(33).sum::<f32>() + 2.0).collect();
        let (partial, mut target) = (store::<f32>(&device, &partial), store::<f32>(&device, &[2.0; 33]));
        add_partial_sums(&device, (&partial).into(), (&mut target).into()).unwrap();
        assert_eq!(read(&target), expected);
    }
}

#[test]
fn element_wise_passes_touch_every_element_once() {
    let device = device();
    for length in [0_usize, 1, 7, 1024, 2051] {
        let b = values(3, length);
        let (mut target, source) = (blank::<f32>(&device, length), store::<f32>(&device, &b));
        let mut narrow = blank::<bf16>(&device, length);
        convert::<f32, bf16>(&device, (&source).into(), (&mut narrow).into()).unwrap();
        convert::<bf16, f32>(&device, (&narrow).into(), (&mut target).into()).unwrap();
        let expected = rounded::<bf16>(&b);
        assert_eq!((read(&narrow), read(&target)), (expected.clone(), expected));
        convert::<f32, f32>(&device, (&source).into(), (&mut target).into()).unwrap();
        assert_eq!(read(&target), b);
    }
}

fn bias<T: Format>() {
    let device = device();
    for columns in [4, 37, 1032] {
        let (rows, bias) = (values(4, 3 * columns), stored_values::<T>(5, columns));
        let (mut target, source) = (store::<f32>(&device, &rows), store::<T>(&device, &bias));
        add_bias(&device, (&mut target).into(), (&source).into()).unwrap();
        let expected: Vec<f32> = rows.iter().zip(bias.iter().cycle()).map(|(row, bias)| row + bias).collect();
        assert_eq!(read(&target), expected);
    }
}

#[test]
fn a_bias_is_added_to_every_row() {
    bias::<f32>();
    bias::<bf16>();
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = device();
    let nine = blank::<f32>(&device, 9);
    let (mut four, mut narrow) = (blank::<f32>(&device, 4), blank::<bf16>(&device, 8));
    let sums = "sums of columns: 4 elements where 3 are";
    assert_refused(add_column_sums(&device, (&nine).into(), 3, (&mut four).into()), sums);
    assert_refused(add_column_sums(&device, (&nine).into(), 4, (&mut four).into()), "rows to sum: 9");
    assert_refused(add_column_sums(&device, (&nine).into(), 0, (&mut four).into()), "rows to sum");
    assert_refused(add_partial_sums(&device, (&nine).into(), (&mut four).into()), "partial sums: 9");
    assert_refused(convert(&device, (&nine).into(), (&mut narrow).into()), "elements to convert");
    assert_refused(convert(&device, (&nine).into(), (&mut four).into()), "a copy on the device");
    let mut rows = blank::<f32>(&device, 9);
    assert_refused(add_bias(&device, (&mut rows).into(), (&narrow).into()), "rows to add a bias to: 9");
}

//! Launches of embedding.cu.

use crate::cuda_emulator::device;
use crate::support::{Format, assert_refused, blank, read, store, stored_values, values};
use half::bf16;
use rpt::cuda::embedding::{Runs, add_rows, gather};
use rpt::cuda::{CudaError, IndexSlice, Indices};
use rpt::kernels::elementary::add;

fn rows_of_the_table<T: Format>() {
    let device = device();
    for columns in [8, 37, 1030] {
        let table = stored_values::<T>(1, 11 * columns);
        let ids = [3_u32, 10, 0, 3];
        let on_device = store::<T>(&device, &table);
        let mut out = blank::<f32>(&device, 4 * columns);
        let indices = Indices::upload(&device, "ids", &ids).unwrap();
        gather(&device, (&on_device).into(), indices.view(), (&mut out).into(), columns).unwrap();
        let expected: Vec<f32> =
            ids.iter().flat_map(|id| table[*id as usize * columns..][..columns].to_vec()).collect();
        assert_eq!(read(&out), expected);
    }
}

#[test]
fn rows_are_those_of_the_table() {
    rows_of_the_table::<f32>();
    rows_of_the_table::<bf16>();
}

#[test]
fn runs_are_added_in_order_as_on_the_cpu() {
    let device = device();
    for columns in [8, 37, 516] {
        let ids: Vec<u32> = (0..30).map(|row: u32| [2, 5, 2, 2, 7][row as usize % 5]).collect();
        let (rows, table) = (values(2, ids.len() * columns), values(3, 9 * columns));
        let mut expected = table.clone();
        for (id, row) in ids.iter().zip(rows.chunks_exact(columns)) {
            add(&mut expected[*id as usize * columns..][..columns], row);
        }
        let (rows, mut table) = (store::<f32>(&device, &rows), store::<f32>(&device, &table));
        let runs = Runs::new(&device, &ids).unwrap();
        add_rows(&device, (&rows).into(), &runs, (&mut table).into(), columns).unwrap();
        assert_eq!(read(&table), expected);
    }
}

#[test]
fn indices_know_how_far_they_reach() {
    let device = device();
    let upload = |values: &[u32]| Indices::upload(&device, "ids", values);
    let indices = upload(&[4, 9, 2]).unwrap();
    let view = indices.view();
    assert_eq!((view.len(), view.below(), view.is_empty()), (3, 10, false));
    let part = view.slice(2..).unwrap();
    assert_eq!((part.len(), part.below()), (1, 10));
    assert_refused(view.slice(2..4), "a part of a buffer");
    let empty = upload(&[]).unwrap();
    assert_eq!((empty.len(), empty.view().below(), empty.is_empty()), (0, 0, true));
    assert_eq!(upload(&[i32::MAX as u32]).unwrap().view().below(), 1 << 31);
    let error = upload(&[0, 1 << 31]).unwrap_err();
    assert!(matches!(error, CudaError::Index { what: "ids", index: 0x8000_0000, .. }), "{error}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = device();
    let run = |rows: usize, ids: &[u32], out: usize, columns: usize| {
        let (table, mut out) = (blank::<f32>(&device, rows), blank::<f32>(&device, out));
        let ids = Indices::upload(&device, "ids", ids).unwrap();
        gather(&device, (&table).into(), IndexSlice::from(&ids), (&mut out).into(), columns)
    };
    run(0, &[], 0, 4).unwrap();
    run(12, &[2, 0], 8, 4).unwrap();
    assert_refused(run(12, &[2, 3], 8, 4), "rows of a table: index 3, where there are 3");
    assert_refused(run(11, &[2, 0], 8, 4), "rows of a table: index 2, where there are 2");
    assert_refused(run(12, &[2, 0], 7, 4), "gathered rows: 7 elements where 8 are");
    assert_refused(run(12, &[2, 0], 8, usize::MAX), "rows of a table");
    let run = |rows: usize, targets: &[u32], table: usize| {
        let (rows, mut table) = (blank::<f32>(&device, rows), blank::<f32>(&device, table));
        let runs = Runs::new(&device, targets).unwrap();
        add_rows(&device, (&rows).into(), &runs, (&mut table).into(), 4)
    };
    run(0, &[], 0).unwrap();
    run(8, &[2, 2], 12).unwrap();
    assert_refused(run(7, &[2, 2], 12), "rows to add: index 1, where there are 1");
    assert_refused(run(8, &[2, 3], 12), "rows of a table: index 3, where there are 3");
}

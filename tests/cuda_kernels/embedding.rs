//! embedding.cu.

use crate::support::{Arg, FORMATS, Gpu, suffix, values};
use rpt::kernels::elementary::add;

#[test]
fn rows_are_those_of_the_table() {
    let gpu = Gpu::new();
    for dtype in FORMATS {
        for columns in [8, 37, 1030] {
            let mut table = values(1, 11 * columns);
            dtype.round(&mut table);
            let ids = [3_u32, 10, 0, 3];
            let (on_device, out) = (gpu.stored(dtype, &table), gpu.floats(&vec![f32::NAN; 4 * columns]));
            let ids_on_device = gpu.words(&ids);
            let arguments = [Arg::To(&on_device), Arg::To(&ids_on_device), Arg::To(&out), Arg::Int(columns)];
            let name = format!("embedding_gather_{}", suffix(dtype));
            gpu.launch(&name, (4, columns.div_ceil(1024)), 256, &arguments);
            let expected: Vec<f32> =
                ids.iter().flat_map(|id| table[*id as usize * columns..][..columns].to_vec()).collect();
            assert_eq!(out.floats(), expected);
        }
    }
}

#[test]
fn runs_are_added_in_order_as_on_the_cpu() {
    let gpu = Gpu::new();
    for columns in [8, 37, 516] {
        let ids: Vec<u32> = (0..30).map(|row: u32| [2, 5, 2, 2, 7][row as usize % 5]).collect();
        let (rows, table) = (values(2, ids.len() * columns), values(3, 9 * columns));
        let mut expected = table.clone();
        for (id, row) in ids.iter().zip(rows.chunks_exact(columns)) {
            add(&mut expected[*id as usize * columns..][..columns], row);
        }
        let mut order: Vec<i32> = (0..ids.len() as i32).collect();
        order.sort_by_key(|row| ids[*row as usize]);
        let (mut starts, mut targets) = (Vec::new(), Vec::new());
        for (at, row) in order.iter().enumerate() {
            if targets.last() != Some(&ids[*row as usize]) {
                starts.push(at as i32);
                targets.push(ids[*row as usize]);
            }
        }
        starts.push(order.len() as i32);
        let (rows, order, starts) = (gpu.floats(&rows), gpu.ints(&order), gpu.ints(&starts));
        let (runs, table) = (gpu.words(&targets), gpu.floats(&table));
        let arguments = [
            Arg::To(&rows),
            Arg::To(&order),
            Arg::To(&starts),
            Arg::To(&runs),
            Arg::To(&table),
            Arg::Int(columns),
        ];
        gpu.launch("add_rows_by_run", (targets.len(), columns.div_ceil(512)), 128, &arguments);
        assert_eq!(table.floats(), expected);
    }
}

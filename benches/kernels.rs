//! Speed of the kernels on this machine: `cargo bench --bench kernels`.
//!
//! Prints one line per shape with the best of several runs; `RAYON_NUM_THREADS` sets the threads.
#![allow(clippy::print_stdout, missing_docs)]

use rpt::kernels::dtype::Dtype;
use rpt::kernels::matmul::{Left, matmul};
use rpt::kernels::packed::Packed;
use rpt::kernels::simd::isa;
use std::hint::black_box;
use std::time::Instant;

/// Best seconds of one call among runs of about 20 ms.
fn best(mut work: impl FnMut()) -> f64 {
    work();
    let start = Instant::now();
    work();
    let repeats = (0.02 / start.elapsed().as_secs_f64().max(1e-7)).ceil() as usize;
    (0..15)
        .map(|_| {
            let start = Instant::now();
            (0..repeats).for_each(|_| work());
            start.elapsed().as_secs_f64() / repeats as f64
        })
        .fold(f64::INFINITY, f64::min)
}

fn products() {
    let shapes = [
        (1, 1024, 4096),
        (16, 1024, 4096),
        (130, 192, 64),
        (540, 256, 64),
        (512, 512, 2048),
        (512, 2048, 512),
        (4096, 1024, 256),
        (1024, 1024, 1024),
        (2048, 2048, 2048),
    ];
    for (rows, columns, inner) in shapes {
        let (left, weight) = (vec![0.5; rows * inner], vec![0.25; columns * inner]);
        let packed = Packed::of_weight(Dtype::F32, &weight, columns, inner);
        let mut out = vec![0.0; rows * columns];
        let seconds = best(|| matmul(Left::rows(&left, inner), rows, black_box(&packed), &mut out, false));
        let rate = 2e-9 * (rows * columns * inner) as f64 / seconds;
        println!("forward   {rows:>5} x {columns:>5} x {inner:>5}  {rate:>7.1} GFLOP/s");
    }
}

fn weight_gradients() {
    for (tokens, outputs, inputs) in [(130, 192, 64), (540, 256, 64), (4096, 1024, 256)] {
        let (grad, input) = (vec![0.5; tokens * outputs], vec![0.25; tokens * inputs]);
        let mut packed = Packed::default();
        let mut out = vec![0.0; outputs * inputs];
        let seconds = best(|| {
            packed.pack(&input, tokens, inputs, inputs);
            matmul(Left::transposed(&grad, outputs), outputs, black_box(&packed), &mut out, false);
        });
        let rate = 2e-9 * (tokens * outputs * inputs) as f64 / seconds;
        println!(
            "gradient  {outputs:>5} x {inputs:>5} x {tokens:>5}  {rate:>7.1} GFLOP/s (packing included)"
        );
    }
}

fn main() {
    println!("{:?}, {} threads", isa(), rayon::current_num_threads());
    rayon::scope(|_| {
        products();
        weight_gradients();
    });
}

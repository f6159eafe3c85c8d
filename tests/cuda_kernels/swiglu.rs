//! swiglu.cu against `kernels::swiglu`.

use crate::support::{Arg, FORMATS, Gpu, assert_close, check_gradient, dot, suffix, tolerance, values};
use rpt::kernels::dtype::Dtype;
use rpt::kernels::swiglu;

fn grid(dtype: Dtype, rows: usize, inner: usize) -> (usize, usize) {
    (rows, inner.div_ceil(256 * 16 / dtype.bytes()))
}

fn forward(gpu: &Gpu, dtype: Dtype, gate_up: &[f32], inner: usize) -> Vec<f32> {
    let rows = gate_up.len() / (2 * inner);
    let (input, out) = (gpu.stored(dtype, gate_up), gpu.stored(dtype, &vec![f32::NAN; rows * inner]));
    let name = format!("swiglu_forward_{}", suffix(dtype));
    gpu.launch(&name, grid(dtype, rows, inner), 256, &[Arg::To(&input), Arg::To(&out), Arg::Int(inner)]);
    out.stored(dtype)
}

/// The gradient, and the output once more; in place where `in_place`.
fn backward(
    gpu: &Gpu,
    dtype: Dtype,
    gate_up: &[f32],
    grad_out: &[f32],
    inner: usize,
    in_place: bool,
) -> (Vec<f32>, Vec<f32>) {
    let rows = grad_out.len() / inner;
    let (input, grad_out) = (gpu.stored(dtype, gate_up), gpu.stored(dtype, grad_out));
    let activated = gpu.stored(dtype, &vec![f32::NAN; rows * inner]);
    let apart = gpu.stored(dtype, &vec![f32::NAN; gate_up.len()]);
    let grad = if in_place { &input } else { &apart };
    let input = Arg::optional((!in_place).then_some(&input));
    let arguments = [input, Arg::To(&grad_out), Arg::To(grad), Arg::To(&activated), Arg::Int(inner)];
    gpu.launch(&format!("swiglu_backward_{}", suffix(dtype)), grid(dtype, rows, inner), 256, &arguments);
    (grad.stored(dtype), activated.stored(dtype))
}

#[test]
fn both_passes_agree_with_the_cpu() {
    let gpu = Gpu::new();
    for dtype in FORMATS {
        for (rows, inner) in [(1, 8), (3, 64), (4, 37), (2, 2056)] {
            let (mut gate_up, mut grad_out) = (values(1, rows * 2 * inner), values(2, rows * inner));
            dtype.round(&mut gate_up);
            dtype.round(&mut grad_out);
            let (mut out, mut grad) = (vec![0.0; rows * inner], vec![0.0; rows * 2 * inner]);
            for row in 0..rows {
                let gate_up = &gate_up[row * 2 * inner..][..2 * inner];
                swiglu::forward(gate_up, &mut out[row * inner..][..inner]);
                swiglu::backward(
                    gate_up,
                    &grad_out[row * inner..][..inner],
                    &mut grad[row * 2 * inner..][..2 * inner],
                );
            }
            let forwards = forward(&gpu, dtype, &gate_up, inner);
            assert_close(&forwards, &out, tolerance(dtype));
            let (apart, activated) = backward(&gpu, dtype, &gate_up, &grad_out, inner, false);
            assert_close(&apart, &grad, tolerance(dtype));
            assert_eq!(activated, forwards);
            assert_eq!(backward(&gpu, dtype, &gate_up, &grad_out, inner, true).0, apart);
        }
    }
}

#[test]
fn a_row_alone_has_the_bits_it_has_among_others() {
    let gpu = Gpu::new();
    for dtype in FORMATS {
        let (inner, gate_up) = (37, values(3, 4 * 2 * 37));
        let all = forward(&gpu, dtype, &gate_up, inner);
        for row in 0..4 {
            let alone = forward(&gpu, dtype, &gate_up[row * 2 * inner..][..2 * inner], inner);
            assert_eq!(alone, all[row * inner..][..inner]);
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let gpu = Gpu::new();
    let (gate_up, grad_out) = (values(4, 20), values(5, 10));
    let (grad, _) = backward(&gpu, Dtype::F32, &gate_up, &grad_out, 10, false);
    check_gradient(&gate_up, &grad, |gate_up| dot(&forward(&gpu, Dtype::F32, gate_up, 10), &grad_out));
}

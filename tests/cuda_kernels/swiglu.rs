//! Launches of swiglu.cu against `kernels::swiglu`.

use crate::cuda_emulator::device;
use crate::support::{
    Format, assert_close, assert_refused, blank, check_gradient, dot, read, store, stored_values, values,
};
use half::bf16;
use rpt::cuda::{Device, swiglu as launches};
use rpt::kernels::swiglu;

fn forward<T: Format>(device: &Device, gate_up: &[f32], inner: usize) -> Vec<f32> {
    let (input, mut out) = (store::<T>(device, gate_up), blank::<T>(device, gate_up.len() / 2));
    launches::forward(device, (&input).into(), (&mut out).into(), inner).unwrap();
    read(&out)
}

/// The gradient, and the output once more.
fn backward<T: Format>(
    device: &Device,
    gate_up: &[f32],
    grad_out: &[f32],
    inner: usize,
) -> (Vec<f32>, Vec<f32>) {
    let (mut gate_up, grad_out) = (store::<T>(device, gate_up), store::<T>(device, grad_out));
    let mut activated = blank::<T>(device, grad_out.len());
    let again = Some((&mut activated).into());
    launches::backward(device, (&grad_out).into(), (&mut gate_up).into(), again, inner).unwrap();
    (read(&gate_up), read(&activated))
}

fn agrees<T: Format>() {
    let device = device();
    for (rows, inner) in [(1, 8), (3, 64), (4, 37), (2, 2056)] {
        let gate_up = stored_values::<T>(1, rows * 2 * inner);
        let grad_out = stored_values::<T>(2, rows * inner);
        let (mut out, mut grad) = (vec![0.0; rows * inner], vec![0.0; rows * 2 * inner]);
        for row in 0..rows {
            let gate_up = &gate_up[row * 2 * inner..][..2 * inner];
            swiglu::forward(gate_up, &mut out[row * inner..][..inner]);
        }
        swiglu::backward_rows(&gate_up, inner, &mut grad_out.clone(), &mut grad);
        let forwards = forward::<T>(&device, &gate_up, inner);
        assert_close(&forwards, &out, T::TOLERANCE);
        let (backwards, activated) = backward::<T>(&device, &gate_up, &grad_out, inner);
        assert_close(&backwards, &grad, T::TOLERANCE);
        assert_eq!(activated, forwards);
    }
}

#[test]
fn both_passes_agree_with_the_cpu() {
    agrees::<f32>();
    agrees::<bf16>();
}

#[test]
fn the_output_may_be_left_out() {
    let device = device();
    let (gate_up, grad_out) = (values(3, 24), values(4, 12));
    let mut alone = store::<f32>(&device, &gate_up);
    let grad = store::<f32>(&device, &grad_out);
    launches::backward(&device, (&grad).into(), (&mut alone).into(), None, 6).unwrap();
    assert_eq!(read(&alone), backward::<f32>(&device, &gate_up, &grad_out, 6).0);
}

fn rows_are_independent<T: Format>() {
    let (device, inner, gate_up) = (device(), 37, values(3, 4 * 2 * 37));
    let all = forward::<T>(&device, &gate_up, inner);
    for row in 0..4 {
        let alone = forward::<T>(&device, &gate_up[row * 2 * inner..][..2 * inner], inner);
        assert_eq!(alone, all[row * inner..][..inner]);
    }
}

#[test]
fn a_row_alone_has_the_bits_it_has_among_others() {
    rows_are_independent::<f32>();
    rows_are_independent::<bf16>();
}

#[test]
fn gradients_match_finite_differences() {
    let device = device();
    let (gate_up, grad_out) = (values(4, 20), values(5, 10));
    let (grad, _) = backward::<f32>(&device, &gate_up, &grad_out, 10);
    check_gradient(&gate_up, &grad, |gate_up| dot(&forward::<f32>(&device, gate_up, 10), &grad_out));
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = device();
    let run = |gate_up: usize, out: usize, inner: usize| {
        let (input, mut out) = (blank::<f32>(&device, gate_up), blank::<f32>(&device, out));
        launches::forward(&device, (&input).into(), (&mut out).into(), inner)
    };
    run(0, 0, 4).unwrap();
    run(16, 8, 4).unwrap();
    assert_refused(run(15, 8, 4), "gate and up rows: 15 elements where 16 are");
    assert_refused(run(16, 7, 4), "activated rows: 7 elements where 8 are");
    assert_refused(run(16, 8, 0), "activated rows");
    assert_refused(run(16, 8, usize::MAX), "activated rows");
    let run = |grad_out: usize, gate_up: usize, activated: usize| {
        let (grad_out, mut gate_up) = (blank::<f32>(&device, grad_out), blank::<f32>(&device, gate_up));
        let mut activated = blank::<f32>(&device, activated);
        let activated = Some((&mut activated).into());
        launches::backward(&device, (&grad_out).into(), (&mut gate_up).into(), activated, 4)
    };
    run(8, 16, 8).unwrap();
    assert_refused(run(8, 15, 8), "gate and up rows: 15");
    assert_refused(run(8, 16, 7), "activated rows: 7");
    assert_refused(run(7, 16, 8), "gradients of activated rows: 7");
}

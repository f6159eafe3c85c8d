//! SwiGLU (Shazeer, arXiv 2002.05202): silu(gate) * up, forward and backward.

use super::elementary::sigmoid;
use super::simd::multiversion;
use rayon::prelude::*;

/// Rows that one task works on.
const ROWS_PER_TASK: usize = 32;

multiversion! {
    /// `out = silu(gate) * up` for one row; `gate_up` holds the gate and then the up half.
    pub fn forward(gate_up: &[f32], out: &mut [f32]) {
        let (gate, up) = gate_up.split_at(out.len());
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = *gate * sigmoid(*gate) * *up;
        }
    }
}

multiversion! {
    /// As [`backward_rows`] for one row.
    fn backward(gate_up: &[f32], out: &mut [f32], grad: &mut [f32]) {
        let (gate, up) = gate_up.split_at(out.len());
        let (grad_gate, grad_up) = grad.split_at_mut(out.len());
        let values = gate.iter().zip(up).zip(out).zip(grad_gate.iter_mut().zip(grad_up));
        for (((gate, up), out), (grad_gate, grad_up)) in values {
            let s = sigmoid(*gate);
            let silu = *gate * s;
            *grad_up = *out * silu;
            *grad_gate = *out * *up * (s + silu * (1.0 - s));
            *out = silu * *up;
        }
    }
}

/// Gradients of rows with respect to gate and up, `[rows, 2 * inner]`, from `gate_up` of that shape; `out [rows, inner]`
/// holds the gradient of what [`forward`] gave, and then that again.
pub fn backward_rows(gate_up: &[f32], inner: usize, out: &mut [f32], grad: &mut [f32]) {
    assert!(gate_up.len() == 2 * out.len() && grad.len() == 2 * out.len(), "shapes of SwiGLU");
    let (run, inner) = (ROWS_PER_TASK * inner.max(1), inner.max(1));
    let runs = gate_up.par_chunks(2 * run).zip(out.par_chunks_mut(run)).zip(grad.par_chunks_mut(2 * run));
    runs.for_each(|((gate_up, out), grad)| {
        let rows = gate_up.chunks(2 * inner).zip(out.chunks_mut(inner)).zip(grad.chunks_mut(2 * inner));
        rows.for_each(|((gate_up, out), grad)| backward(gate_up, out, grad));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_match_finite_differences() {
        let gate_up: Vec<f32> = (0..20).map(|i| ((i * 13 % 17) as f32 - 8.0) * 0.25).collect();
        let g: Vec<f32> = (0..10).map(|i| (i as f32 - 4.5) * 0.2).collect();
        let loss = |v: &[f32]| {
            let mut out = vec![0.0; 10];
            forward(v, &mut out);
            out.iter().zip(&g).map(|(o, g)| f64::from(*o) * f64::from(*g)).sum::<f64>()
        };
        let (mut grad, mut out) = (vec![0.0; 20], g.clone());
        backward_rows(&gate_up, 10, &mut out, &mut grad);
        let mut forwarded = vec![0.0; 10];
        forward(&gate_up, &mut forwarded);
        assert_eq!(out, forwarded);
        for at in 0..20 {
            let (mut plus, mut minus) = (gate_up.clone(), gate_up.clone());
            plus[at] += 1e-2;
            minus[at] -= 1e-2;
            let numeric = (loss(&plus) - loss(&minus)) / 2e-2;
            assert!((numeric - f64::from(grad[at])).abs() < 1e-3);
        }
    }
}

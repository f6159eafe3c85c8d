//! SwiGLU (Shazeer, arXiv 2002.05202): silu(gate) * up, forward and backward.

use super::elementary::sigmoid;
use super::simd::multiversion;

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
    /// Gradients of one row with respect to gate and up, written to `grad` in the same layout.
    pub fn backward(gate_up: &[f32], grad_out: &[f32], grad: &mut [f32]) {
        let (gate, up) = gate_up.split_at(grad_out.len());
        let (grad_gate, grad_up) = grad.split_at_mut(grad_out.len());
        for at in 0..grad_out.len() {
            let s = sigmoid(gate[at]);
            let silu = gate[at] * s;
            grad_up[at] = grad_out[at] * silu;
            grad_gate[at] = grad_out[at] * up[at] * (s + silu * (1.0 - s));
        }
    }
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
        let mut grad = vec![0.0; 20];
        backward(&gate_up, &g, &mut grad);
        for at in 0..20 {
            let (mut plus, mut minus) = (gate_up.clone(), gate_up.clone());
            plus[at] += 1e-2;
            minus[at] -= 1e-2;
            let numeric = (loss(&plus) - loss(&minus)) / 2e-2;
            assert!((numeric - f64::from(grad[at])).abs() < 1e-3);
        }
    }
}

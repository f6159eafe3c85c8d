//! Root-mean-square normalisation (Zhang & Sennrich, arXiv 1910.07467), forward and backward.

use super::LANES;
use super::elementary::{add, dot, sum_lanes};
use super::simd::multiversion;
use rayon::prelude::*;

/// Rows that a task works on, and whose weight gradients are summed together.
pub const ROWS_PER_TASK: usize = 64;

multiversion! {
    /// `out = x * scale * weight` for one row.
    fn apply(x: &[f32], scale: f32, weight: &[f32], out: &mut [f32]) {
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = *x * scale * *weight;
        }
    }
}

/// What a row is multiplied by: 1 / sqrt(mean(x^2) + epsilon).
pub fn factor(x: &[f32], epsilon: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + epsilon).sqrt()
}

/// Normalises one row; returns the factor 1 / sqrt(mean(x^2) + epsilon) that the backward pass needs.
pub fn forward(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) -> f32 {
    let scale = factor(x, epsilon);
    apply(x, scale, weight, out);
    scale
}

multiversion! {
    /// [`forward`] in place.
    pub fn forward_in_place(x: &mut [f32], weight: &[f32], epsilon: f32) {
        let scale = factor(x, epsilon);
        for (x, weight) in x.iter_mut().zip(weight) {
            *x = *x * scale * *weight;
        }
    }
}

/// Normalises one row again from the factor that [`forward`] returned.
pub fn replay(x: &[f32], weight: &[f32], scale: f32, out: &mut [f32]) {
    apply(x, scale, weight, out);
}

multiversion! {
    /// Adds the input gradient of one row to `grad_x` and the weight gradient to `grad_weight`.
    ///
    /// With n elements, s the forward factor and g = `grad_out * weight`:
    /// dx = s * g - s^3 * x * mean(g * x), dw = `grad_out * x * s`.
    pub fn backward(
        x: &[f32],
        weight: &[f32],
        scale: f32,
        grad_out: &[f32],
        grad_x: &mut [f32],
        grad_weight: &mut [f32],
    ) {
        let n = x.len();
        let mut lanes = [0.0_f32; LANES];
        for at in 0..n {
            lanes[at % LANES] = (grad_out[at] * weight[at]).mul_add(x[at], lanes[at % LANES]);
        }
        let correction = scale * scale * scale * sum_lanes(&lanes) / n as f32;
        for at in 0..n {
            grad_x[at] += scale * grad_out[at] * weight[at] - correction * x[at];
            grad_weight[at] += grad_out[at] * x[at] * scale;
        }
    }
}

/// Normalises rows, `[rows, n]`, and writes the factor of each to `scales`.
pub fn forward_rows(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32], scales: &mut [f32]) {
    let n = weight.len();
    let rows = x.par_chunks_exact(n).zip(out.par_chunks_exact_mut(n)).zip(scales);
    rows.with_min_len(ROWS_PER_TASK).for_each(|((x, out), scale)| *scale = forward(x, weight, epsilon, out));
}

/// [`backward`] of rows, `[rows, n]`. Weight gradients are summed by runs of 64 rows, then in the runs' order.
pub fn backward_rows(
    x: &[f32],
    weight: &[f32],
    scales: &[f32],
    grad_out: &[f32],
    grad_x: &mut [f32],
    grad_weight: &mut [f32],
) {
    let n = weight.len();
    let run = n * ROWS_PER_TASK;
    let runs = x.par_chunks(run).zip(grad_out.par_chunks(run)).zip(grad_x.par_chunks_mut(run));
    let parts: Vec<Vec<f32>> = runs
        .zip(scales.par_chunks(ROWS_PER_TASK))
        .map(|(((x, grad_out), grad_x), scales)| {
            let mut part = vec![0.0; n];
            let rows = x.chunks_exact(n).zip(grad_out.chunks_exact(n)).zip(grad_x.chunks_exact_mut(n));
            for (((x, grad_out), grad_x), scale) in rows.zip(scales) {
                backward(x, weight, *scale, grad_out, grad_x, &mut part);
            }
            part
        })
        .collect();
    for part in &parts {
        add(grad_weight, part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gradients_match_finite_differences() {
        let n = 24;
        let x: Vec<f32> = (0..n).map(|i| ((i * 7 % 11) as f32 - 5.0) * 0.3).collect();
        let w: Vec<f32> = (0..n).map(|i| 1.0 + (i as f32) * 0.01).collect();
        let g: Vec<f32> = (0..n).map(|i| ((i * 5 % 7) as f32 - 3.0) * 0.1).collect();
        let loss = |x: &[f32], w: &[f32]| {
            let mut out = vec![0.0; n];
            forward(x, w, 1e-6, &mut out);
            out.iter().zip(&g).map(|(o, g)| f64::from(*o) * f64::from(*g)).sum::<f64>()
        };
        let (mut dx, mut dw, mut out) = (vec![0.0; n], vec![0.0; n], vec![0.0; n]);
        let scale = forward(&x, &w, 1e-6, &mut out);
        backward(&x, &w, scale, &g, &mut dx, &mut dw);
        for at in 0..n {
            let step = 1e-2;
            let shift = |v: &[f32], by: f32| {
                let mut v = v.to_vec();
                v[at] += by;
                v
            };
            let numeric = (loss(&shift(&x, step), &w) - loss(&shift(&x, -step), &w)) / f64::from(2.0 * step);
            assert!((numeric - f64::from(dx[at])).abs() < 1e-4, "{numeric} {}", dx[at]);
            let numeric = (loss(&x, &shift(&w, step)) - loss(&x, &shift(&w, -step))) / f64::from(2.0 * step);
            assert!((numeric - f64::from(dw[at])).abs() < 1e-4);
        }
    }
}

//! Muon: momentum, orthogonalised by Newton-Schulz iteration (<https://kellerjordan.github.io/posts/muon/>),
//! on AdamW's scale of learning rates (arXiv 2502.16982).

use super::norm::sum_of_squares;
use crate::config::OptimizerConfig;
use crate::kernels::matmul::{Left, matmul};
use crate::kernels::packed::Packed;

/// Newton-Schulz iterations.
const ITERATIONS: usize = 5;
/// Coefficients of X, of X X^T X and of (X X^T)^2 X in one iteration: slopes far above 1 near 0,
/// at the price of singular values that end near 1 instead of at 1.
const QUINTIC: [f32; 3] = [3.4445, -4.7750, 2.0315];
/// Keeps the division by the norm defined for a gradient of zero.
const NORM_EPSILON: f32 = 1e-7;
/// Root mean square of an update on AdamW's scale.
const UPDATE_SCALE: f32 = 0.2;

/// Momentum of one matrix.
#[derive(Clone, Debug)]
pub(super) struct Muon {
    rows: usize,
    columns: usize,
    pub(super) momentum: Vec<f32>,
}

/// What all matrices share in one step:
///
/// ```text
/// g = scale gradient
/// b = mu b + g
/// p = (1 - rate decay) p - 0.2 rate sqrt(max(rows, columns)) orthogonalize(g + mu b)
/// ```
#[derive(Clone, Copy, Debug)]
pub(super) struct MuonStep {
    momentum: f32,
    rate: f32,
    keep: f32,
    scale: f32,
}

impl MuonStep {
    /// A step at a learning rate, with gradients scaled by `scale`.
    pub(super) fn new(config: &OptimizerConfig, learning_rate: f32, scale: f32) -> Self {
        let keep = 1.0 - learning_rate * config.weight_decay;
        Self { momentum: config.momentum, rate: learning_rate, keep, scale }
    }
}

impl Muon {
    pub(super) fn new(rows: usize, columns: usize) -> Self {
        Self { rows, columns, momentum: vec![0.0; rows * columns] }
    }

    /// Updates one matrix. It runs on one thread: the optimiser works on many matrices at once.
    pub(super) fn step(&mut self, step: &MuonStep, parameters: &mut [f32], gradients: &[f32]) {
        let direction = orthogonalize(&self.nesterov(step, gradients), self.rows, self.columns);
        let rate = step.rate * UPDATE_SCALE * (self.rows.max(self.columns) as f32).sqrt();
        for (parameter, direction) in parameters.iter_mut().zip(direction) {
            *parameter = *parameter * step.keep - rate * direction;
        }
    }

    /// Accumulates the momentum and looks one step ahead along it.
    fn nesterov(&mut self, step: &MuonStep, gradients: &[f32]) -> Vec<f32> {
        let ahead = |(momentum, gradient): (&mut f32, &f32)| {
            let gradient = gradient * step.scale;
            *momentum = step.momentum * *momentum + gradient;
            gradient + step.momentum * *momentum
        };
        self.momentum.iter_mut().zip(gradients).map(ahead).collect()
    }
}

/// Moves every singular value of a `rows` x `columns` matrix near 1, keeping its singular vectors.
fn orthogonalize(matrix: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    // The products cost least when the shorter side comes first.
    if rows > columns {
        let flat = newton_schulz(transpose(matrix, rows, columns), columns, rows);
        return transpose(&flat, columns, rows);
    }
    newton_schulz(matrix.to_vec(), rows, columns)
}

fn newton_schulz(mut x: Vec<f32>, rows: usize, columns: usize) -> Vec<f32> {
    let norm = sum_of_squares(&x).sqrt() as f32 + NORM_EPSILON;
    for value in &mut x {
        *value /= norm;
    }
    let mut buffers = Buffers::new(rows, columns);
    for _ in 0..ITERATIONS {
        buffers.quintic(&mut x, rows, columns);
    }
    x
}

/// What the iterations of one matrix share.
struct Buffers {
    packed: Packed,
    gram: Vec<f32>,
    square: Vec<f32>,
    product: Vec<f32>,
}

impl Buffers {
    fn new(rows: usize, columns: usize) -> Self {
        let (gram, square) = (vec![0.0; rows * rows], vec![0.0; rows * rows]);
        Self { packed: Packed::default(), gram, square, product: vec![0.0; rows * columns] }
    }

    /// X becomes a X + (b M + c M M) X with M = X X^T.
    fn quintic(&mut self, x: &mut [f32], rows: usize, columns: usize) {
        let [a, b, c] = QUINTIC;
        let Self { packed, gram, square, product } = self;
        packed.pack_transposed(x, rows, columns);
        matmul(Left::rows(x, columns), rows, packed, gram, false);
        packed.pack(gram, rows, rows, rows);
        matmul(Left::rows(gram, rows), rows, packed, square, false);
        for (gram, square) in gram.iter_mut().zip(&*square) {
            *gram = b * *gram + c * square;
        }
        packed.pack(x, rows, columns, columns);
        matmul(Left::rows(gram, rows), rows, packed, product, false);
        for (x, product) in x.iter_mut().zip(&*product) {
            *x = a * *x + product;
        }
    }
}

/// The transpose of a row-major `rows` x `columns` matrix.
fn transpose(matrix: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let at = |place: usize| matrix[place % rows * columns + place / rows];
    (0..rows * columns).map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::test_runner::RngSeed;

    /// A matrix of any shape with values from a normal distribution (sums of twelve uniforms).
    fn matrix() -> impl Strategy<Value = (usize, usize, Vec<f32>)> {
        (1_usize..12, 1_usize..12).prop_flat_map(|(rows, columns)| {
            let value = prop::collection::vec(-0.5_f32..0.5, 12).prop_map(|parts| parts.iter().sum());
            (Just(rows), Just(columns), prop::collection::vec(value, rows * columns))
        })
    }

    /// X X^T or X^T X, whichever is smaller, in `f64`.
    fn small_gram(x: &[f32], rows: usize, columns: usize) -> Vec<Vec<f64>> {
        let at = |row: usize, column: usize| f64::from(x[row * columns + column]);
        let (side, inner) = (rows.min(columns), rows.max(columns));
        let value = |i: usize, j: usize, k: usize| {
            if rows <= columns { at(i, k) * at(j, k) } else { at(k, i) * at(k, j) }
        };
        let entry = |i: usize, j: usize| (0..inner).map(|k| value(i, j, k)).sum();
        (0..side).map(|i| (0..side).map(|j| entry(i, j)).collect()).collect()
    }

    /// Eigenvalues of a symmetric matrix by Jacobi rotations.
    fn eigenvalues(mut a: Vec<Vec<f64>>) -> Vec<f64> {
        let n = a.len();
        for _ in 0..30 {
            for (p, q) in (0..n).flat_map(|p| (p + 1..n).map(move |q| (p, q))) {
                let angle = 0.5 * (2.0 * a[p][q]).atan2(a[q][q] - a[p][p]);
                let (sin, cos) = angle.sin_cos();
                for row in &mut a {
                    (row[p], row[q]) = (cos * row[p] - sin * row[q], sin * row[p] + cos * row[q]);
                }
                let (top, bottom) = (a[p].clone(), a[q].clone());
                for k in 0..n {
                    (a[p][k], a[q][k]) = (cos * top[k] - sin * bottom[k], sin * top[k] + cos * bottom[k]);
                }
            }
        }
        (0..n).map(|k| a[k][k]).collect()
    }

    fn singular_values(x: &[f32], rows: usize, columns: usize) -> Vec<f64> {
        eigenvalues(small_gram(x, rows, columns)).into_iter().map(|value| value.max(0.0).sqrt()).collect()
    }

    #[test]
    fn a_diagonal_shows_what_happens_to_singular_values() {
        let x = [0.8_f32, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.1];
        let mut values = singular_values(&orthogonalize(&x, 3, 3), 3, 3);
        let norm = (0.64_f64 + 0.25 + 0.01).sqrt();
        let mut expected = [0.8, 0.5, 0.1].map(|value| {
            (0..ITERATIONS)
                .fold(value / norm, |s: f64, _| 3.4445 * s - 4.7750 * s.powi(3) + 2.0315 * s.powi(5))
        });
        values.sort_by(f64::total_cmp);
        expected.sort_by(f64::total_cmp);
        for (value, expected) in values.iter().zip(expected) {
            assert!((value - expected).abs() < 1e-5, "{value} is not {expected}");
            assert!((0.6..1.3).contains(value));
        }
    }

    #[test]
    fn a_gradient_of_zero_moves_nothing() {
        assert_eq!(orthogonalize(&[0.0; 6], 2, 3), [0.0; 6]);
        assert_eq!(orthogonalize(&[], 0, 3), [0.0; 0]);
    }

    #[test]
    fn momentum_looks_ahead() {
        let config = OptimizerConfig { momentum: 0.5, weight_decay: 0.0, ..OptimizerConfig::default() };
        let step = MuonStep::new(&config, 0.1, 0.5);
        let mut muon = Muon::new(1, 2);
        assert_eq!(muon.nesterov(&step, &[2.0, -4.0]), [1.5, -3.0]);
        assert_eq!(muon.nesterov(&step, &[0.0, 0.0]), [0.25, -0.5]);
        assert_eq!(muon.momentum, [0.5, -1.0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { rng_seed: RngSeed::Fixed(0), ..ProptestConfig::default() })]

        #[test]
        fn updates_are_nearly_orthogonal((rows, columns, x) in matrix()) {
            let before = singular_values(&x, rows, columns);
            let (largest, smallest) = before.iter().fold((0.0_f64, f64::MAX), |(high, low), &value| (high.max(value), low.min(value)));
            prop_assume!(smallest > 0.02 * largest);
            let after = singular_values(&orthogonalize(&x, rows, columns), rows, columns);
            prop_assert!(after.iter().all(|value| (0.6..1.3).contains(value)), "{:?} -> {:?}", before, after);
        }

        #[test]
        fn transposition_commutes((rows, columns, x) in matrix()) {
            let direct = orthogonalize(&x, rows, columns);
            let turned = orthogonalize(&transpose(&x, rows, columns), columns, rows);
            for (left, right) in direct.iter().zip(transpose(&turned, columns, rows)) {
                prop_assert!((left - right).abs() < 1e-3, "{} is not {}", left, right);
            }
        }

        #[test]
        fn the_step_has_the_scale_of_adamw((rows, columns, x) in matrix()) {
            let config = OptimizerConfig { weight_decay: 0.1, ..OptimizerConfig::default() };
            let step = MuonStep::new(&config, 0.01, 1.0);
            let mut muon = Muon::new(rows, columns);
            let mut parameters = vec![1.0; x.len()];
            muon.step(&step, &mut parameters, &x);
            let ahead: Vec<f32> = x.iter().map(|value| value * 1.95).collect();
            let factor = 0.01 * 0.2 * (rows.max(columns) as f32).sqrt();
            for (parameter, direction) in parameters.iter().zip(orthogonalize(&ahead, rows, columns)) {
                prop_assert!((parameter - (0.999 - factor * direction)).abs() < 1e-5);
            }
        }
    }
}

//! Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split layout of the
//! Hugging Face Llama and Qwen models: element i turns with element i + `head_dim` / 2.

/// Cosines and sines of every position.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    cosines: Vec<f32>,
    sines: Vec<f32>,
    half: usize,
}

impl RotaryTable {
    /// A table for positions `0..positions` from one inverse frequency per pair of elements.
    ///
    /// Angles are rounded to `f32` as transformers does, so that long positions agree with it.
    pub fn new(inverse_frequencies: &[f32], positions: usize) -> Self {
        let half = inverse_frequencies.len();
        let angle = |at: usize| f64::from((at / half) as f32 * inverse_frequencies[at % half]);
        let cosines = (0..positions * half).map(|at| angle(at).cos() as f32).collect();
        let sines = (0..positions * half).map(|at| angle(at).sin() as f32).collect();
        Self { cosines, sines, half }
    }

    /// Inverse frequencies `base^(-2i / head_dim)` of the default kind.
    pub fn inverse_frequencies(base: f64, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2).map(|i| 1.0 / (base as f32).powf((2 * i) as f32 / head_dim as f32)).collect()
    }

    /// Positions that the table covers.
    pub fn positions(&self) -> usize {
        self.cosines.len().checked_div(self.half).unwrap_or(usize::MAX)
    }

    /// Turns every head of one row by its position.
    pub fn rotate(&self, row: &mut [f32], position: usize) {
        self.turn(row, position, 1.0);
    }

    /// Turns back: the transpose of [`RotaryTable::rotate`], for its gradient.
    pub fn rotate_back(&self, row: &mut [f32], position: usize) {
        self.turn(row, position, -1.0);
    }

    fn turn(&self, row: &mut [f32], position: usize, direction: f32) {
        let cosines = &self.cosines[position * self.half..][..self.half];
        let sines = &self.sines[position * self.half..][..self.half];
        for head in row.chunks_exact_mut(2 * self.half) {
            let (first, second) = head.split_at_mut(self.half);
            for i in 0..self.half {
                let (a, b, sine) = (first[i], second[i], sines[i] * direction);
                first[i] = a * cosines[i] - b * sine;
                second[i] = b * cosines[i] + a * sine;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotation_keeps_length_and_turns_back() {
        let table = RotaryTable::new(&RotaryTable::inverse_frequencies(10_000.0, 8), 50);
        let row: Vec<f32> = (0..16).map(|i| i as f32 - 7.5).collect();
        let mut turned = row.clone();
        table.rotate(&mut turned, 37);
        let norm = |v: &[f32]| v.iter().map(|x| x * x).sum::<f32>();
        assert!((norm(&turned) - norm(&row)).abs() < 1e-3);
        table.rotate_back(&mut turned, 37);
        assert!(turned.iter().zip(&row).all(|(a, b)| (a - b).abs() < 1e-5));
    }

    #[test]
    fn inner_products_depend_on_distance_only() {
        let table = RotaryTable::new(&RotaryTable::inverse_frequencies(10_000.0, 4), 50);
        let product = |p: usize, q: usize| {
            let (mut a, mut b) = ([0.3, -1.0, 2.0, 0.5], [1.5, 0.2, -0.7, 1.0]);
            table.rotate(&mut a, p);
            table.rotate(&mut b, q);
            a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>()
        };
        assert!((product(5, 2) - product(45, 42)).abs() < 1e-5);
    }
}

//! Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split layout of the
//! Hugging Face Llama and Qwen models: element i turns with element i + `head_dim` / 2.

use std::sync::OnceLock;

/// How fast each pair of elements turns, and what the turned elements are multiplied by.
#[derive(Clone, Debug, PartialEq)]
pub struct Frequencies {
    /// Radians per position, one per pair.
    pub inverse: Vec<f32>,
    /// Factor on cosines and sines: 1 but for `YaRN` (Peng et al., arXiv 2309.00071).
    pub attention_factor: f32,
}

impl Frequencies {
    /// Inverse frequencies `base^(-2i / head_dim)` of the default kind.
    pub fn new(base: f64, head_dim: usize) -> Self {
        let inverse = Self::powers(base, head_dim).map(f32::recip).collect();
        Self { inverse, attention_factor: 1.0 }
    }

    /// `base^(2i / head_dim)` for each pair i; base, exponent and power are rounded to `f32`, as
    /// transformers does.
    pub fn powers(base: f64, head_dim: usize) -> impl Iterator<Item = f32> {
        let base = f64::from(base as f32);
        (0..head_dim / 2).map(move |i| base.powf(f64::from((2 * i) as f32 / head_dim as f32)) as f32)
    }
}

/// Positions whose cosines and sines are computed together.
const CHUNK: usize = 1024;

/// Cosines and sines of every position, times the attention factor; computed a chunk of positions at
/// a time when the first of them is asked for, since models allow more positions than a run uses.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    frequencies: Frequencies,
    positions: usize,
    /// Cosines, then sines, of each position of a chunk.
    chunks: Vec<OnceLock<Box<[f32]>>>,
}

impl RotaryTable {
    /// A table for positions `0..positions`.
    ///
    /// Angles are rounded to `f32` as transformers does, so that long positions agree with it.
    pub fn new(frequencies: &Frequencies, positions: usize) -> Self {
        let chunks = (0..positions.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect();
        Self { frequencies: frequencies.clone(), positions, chunks }
    }

    /// Positions that the table covers.
    pub fn positions(&self) -> usize {
        self.positions
    }

    fn half(&self) -> usize {
        self.frequencies.inverse.len()
    }

    /// Cosines, then sines, of one position: as many numbers as a head has elements.
    ///
    /// # Panics
    /// When the table does not cover the position.
    pub fn angles(&self, position: usize) -> &[f32] {
        let (chunk, row) = (position / CHUNK, position % CHUNK);
        let chunk_values = self.chunks[chunk].get_or_init(|| self.compute(chunk * CHUNK));
        &chunk_values[row * 2 * self.half()..][..2 * self.half()]
    }

    fn compute(&self, first: usize) -> Box<[f32]> {
        let mut values = vec![0.0; CHUNK * 2 * self.half()];
        let factor = self.frequencies.attention_factor;
        for (row, values) in values.chunks_exact_mut((2 * self.half()).max(1)).enumerate() {
            let (cosines, sines) = values.split_at_mut(self.half());
            for ((cosine, sine), inverse) in cosines.iter_mut().zip(sines).zip(&self.frequencies.inverse) {
                let angles = f64::from((first + row) as f32 * inverse).sin_cos();
                (*sine, *cosine) = (angles.0 as f32 * factor, angles.1 as f32 * factor);
            }
        }
        values.into()
    }

    /// Turns every head of one row by its position.
    pub fn rotate(&self, row: &mut [f32], position: usize) {
        self.turn(row, position, 1.0);
    }

    /// Turns back: the transpose (for an attention factor of 1, the inverse) of [`RotaryTable::rotate`], for its gradient.
    pub fn rotate_back(&self, row: &mut [f32], position: usize) {
        self.turn(row, position, -1.0);
    }

    fn turn(&self, row: &mut [f32], position: usize, direction: f32) {
        let (cosines, sines) = self.angles(position).split_at(self.half());
        for head in row.chunks_exact_mut(2 * self.half()) {
            let (first, second) = head.split_at_mut(self.half());
            for i in 0..cosines.len() {
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
        let table = RotaryTable::new(&Frequencies::new(10_000.0, 8), 50);
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
        let table = RotaryTable::new(&Frequencies::new(10_000.0, 4), 50);
        let product = |p: usize, q: usize| {
            let (mut a, mut b) = ([0.3, -1.0, 2.0, 0.5], [1.5, 0.2, -0.7, 1.0]);
            table.rotate(&mut a, p);
            table.rotate(&mut b, q);
            a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>()
        };
        assert!((product(5, 2) - product(45, 42)).abs() < 1e-5);
    }

    #[test]
    fn the_attention_factor_scales_both_ways() {
        let plain = Frequencies::new(10_000.0, 8);
        let scaled = Frequencies { attention_factor: 1.25, ..plain.clone() };
        let row: Vec<f32> = (0..8).map(|i| i as f32 - 3.5).collect();
        for turn in [RotaryTable::rotate, RotaryTable::rotate_back] {
            let turned = |frequencies| {
                let mut row = row.clone();
                turn(&RotaryTable::new(frequencies, 20), &mut row, 13);
                row
            };
            let (once, scaled) = (turned(&plain), turned(&scaled));
            assert!(once.iter().zip(scaled).all(|(a, b)| (1.25 * a - b).abs() < 1e-5));
        }
    }
}

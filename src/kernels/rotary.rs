//! Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split layout of the
//! Hugging Face Llama and Qwen models: element i turns with element i + `head_dim` / 2.

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

/// Cosines and sines of every position, times the attention factor.
#[derive(Clone, Debug)]
pub struct RotaryTable {
    cosines: Vec<f32>,
    sines: Vec<f32>,
    half: usize,
}

impl RotaryTable {
    /// A table for positions `0..positions`.
    ///
    /// Angles are rounded to `f32` as transformers does, so that long positions agree with it.
    pub fn new(frequencies: &Frequencies, positions: usize) -> Self {
        let half = frequencies.inverse.len();
        let angles = (0..positions)
            .flat_map(|position| frequencies.inverse.iter().map(move |inverse| position as f32 * inverse));
        let (cosines, sines) = angles
            .map(|angle| f64::from(angle).sin_cos())
            .map(|(sine, cosine)| (cosine as f32, sine as f32))
            .map(|(cosine, sine)| {
                (cosine * frequencies.attention_factor, sine * frequencies.attention_factor)
            })
            .unzip();
        Self { cosines, sines, half }
    }

    /// Positions that the table covers.
    pub fn positions(&self) -> usize {
        self.cosines.len().checked_div(self.half).unwrap_or(usize::MAX)
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

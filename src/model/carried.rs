//! Gradients that go from the parts of a schedule to its prefix.

use super::DecoderConfig;

/// Gradients of the keys and values of a prefix's rows, summed over the parts that see them.
#[derive(Debug, Default)]
pub struct PrefixGradients {
    rows: usize,
    /// Of each layer those of keys and of values, `[kv_heads, rows, padded head_dim]`.
    layers: Vec<[Vec<f32>; 2]>,
}

impl PrefixGradients {
    /// Begins with zeros for a prefix of `rows` rows.
    pub fn reset(&mut self, config: &DecoderConfig, rows: usize) {
        let length = config.kv_heads * rows * config.geometry().padded();
        self.rows = rows;
        self.layers.resize_with(config.layers, Default::default);
        for gradients in self.layers.iter_mut().flatten() {
            gradients.clear();
            gradients.resize(length, 0.0);
        }
    }
}

/// What a backward pass does with the gradients of a prefix's keys and values.
#[derive(Debug)]
pub enum Carried<'a> {
    /// There is no prefix.
    Nothing,
    /// The pass is over a part: its own are added.
    ToPrefix(&'a mut PrefixGradients),
    /// The pass is over the prefix: they are those of its own rows that others have found.
    FromParts(&'a PrefixGradients),
}

impl Carried<'_> {
    /// Rows of keys and values that stand before those of the pass.
    pub(super) fn rows_before(&self) -> usize {
        match self {
            Self::ToPrefix(prefix) => prefix.rows,
            Self::Nothing | Self::FromParts(_) => 0,
        }
    }

    /// Puts the sums so far at the start of each head of `[keys, values]`, `[heads, rows, padded]` each.
    pub(super) fn load(&self, layer: usize, heads: usize, targets: [&mut Vec<f32>; 2]) {
        let prefix = match self {
            Self::Nothing => return,
            Self::ToPrefix(prefix) => &**prefix,
            Self::FromParts(prefix) => prefix,
        };
        for (target, sums) in targets.into_iter().zip(&prefix.layers[layer]) {
            copy_heads(sums, target, heads);
        }
    }

    /// Takes the sums back from there.
    pub(super) fn store(&mut self, layer: usize, heads: usize, sources: [&Vec<f32>; 2]) {
        let Self::ToPrefix(prefix) = self else { return };
        for (source, sums) in sources.into_iter().zip(&mut prefix.layers[layer]) {
            copy_heads(source, sums, heads);
        }
    }
}

/// Copies the rows that both have of each head, its first ones.
fn copy_heads(from: &[f32], to: &mut [f32], heads: usize) {
    let (from_each, to_each) = (from.len() / heads, to.len() / heads);
    let shared = from_each.min(to_each);
    for head in 0..heads {
        to[head * to_each..][..shared].copy_from_slice(&from[head * from_each..][..shared]);
    }
}

//! The forward pass that rollout and training share.

use super::backward::BackwardBuffers;
use super::cache::Place;
use super::layout::{Matrix, Vector};
use super::lora::Adapter;
use super::placement::Placement;
use super::weights::{LayerWeights, Weights};
use super::{DecoderConfig, Dtype, Extension, KvCache, Layout, ModelError, Products};
use crate::kernels::attention::{self, Tile};
use crate::kernels::elementary::add;
use crate::kernels::head::{self, TokenScore};
use crate::kernels::matmul::{Left, matmul};
use crate::kernels::parallel::{self, for_each_row};
use crate::kernels::rotary::RotaryTable;
use crate::kernels::{norm, swiglu};
use rayon::prelude::*;
use std::mem::{swap, take};

/// A decoder: its weights, packed for the matrix products, and nothing twice.
#[derive(Clone, Debug)]
pub struct Decoder {
    pub(super) config: DecoderConfig,
    pub(super) layout: Layout,
    pub(super) weights: Weights,
    pub(super) rotary: RotaryTable,
    pub(super) adapter: Option<Adapter>,
    pub(super) placement: Placement,
}

/// Buffers of the forward pass, kept between calls.
#[derive(Debug, Default)]
pub struct Workspace {
    pub(super) x: Vec<f32>,
    pub(super) normed: Vec<f32>,
    pub(super) qkv: Vec<f32>,
    pub(super) attended: Vec<f32>,
    pub(super) log_sums: Vec<f32>,
    pub(super) gate_up: Vec<f32>,
    pub(super) activated: Vec<f32>,
    pub(super) positions: Vec<usize>,
    pub(super) places: Vec<Place>,
    tiles: Vec<Tile>,
    pub(super) backward: BackwardBuffers,
    /// Floating-point operations done so far, counted from shapes.
    pub flops: u64,
}

/// What one layer's backward pass needs.
#[derive(Debug, Default)]
pub(super) struct LayerTape {
    pub(super) input: Vec<f32>,
    pub(super) input_scales: Vec<f32>,
    /// Queries, keys and values before their norm (only with q/k norm).
    pub(super) before_norm: Vec<f32>,
    /// Rotated queries and keys, and values.
    pub(super) qkv: Vec<f32>,
    pub(super) attended: Vec<f32>,
    pub(super) log_sums: Vec<f32>,
    pub(super) middle: Vec<f32>,
    pub(super) middle_scales: Vec<f32>,
    pub(super) gate_up: Vec<f32>,
}

/// What a whole backward pass needs.
#[derive(Debug, Default)]
pub struct Tape {
    /// Keep only the input of each layer; the backward pass computes the rest again, with the same bits.
    pub recompute: bool,
    pub(super) layers: Vec<LayerTape>,
    pub(super) tiles: Vec<Tile>,
    pub(super) ids: Vec<u32>,
    pub(super) positions: Vec<usize>,
    /// The residual stream after the last layer, `[rows, hidden]`.
    pub(super) residual: Vec<f32>,
}

/// A buffer of exactly this length; its contents are to be overwritten.
pub(super) fn sized(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.resize(length, 0.0);
    &mut buffer[..]
}

fn copy_to(buffer: &mut Vec<f32>, values: &[f32]) {
    parallel::copy(values, sized(buffer, values.len()));
}

impl Decoder {
    /// A decoder from its flat parameters, rounded to `dtype`.
    ///
    /// # Panics
    /// When the number of parameters does not fit the configuration.
    pub fn new(config: DecoderConfig, dtype: Dtype, parameters: &[f32]) -> Self {
        let layout = Layout::new(&config);
        let weights = Weights::zeros(&config, dtype);
        let mut decoder = Self::of_weights(config, layout, weights);
        decoder.set_parameters(parameters);
        decoder
    }

    pub(super) fn of_weights(config: DecoderConfig, layout: Layout, weights: Weights) -> Self {
        let rotary = RotaryTable::new(&config.rotary(), config.max_positions);
        Self { config, layout, weights, rotary, adapter: None, placement: Placement::default() }
    }

    /// The configuration.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// Names and places of the parameters.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The same decoder with its products computed in another way.
    ///
    /// # Errors
    /// Products of bf16 need weights of bf16.
    pub fn with_products(mut self, products: Products) -> Result<Self, ModelError> {
        if products == Products::Bf16 && self.dtype() != Dtype::Bf16 {
            return Err(ModelError::Products { dtype: self.dtype().name() });
        }
        self.weights.set_products(products);
        Ok(self)
    }

    /// How products are computed.
    pub fn products(&self) -> Products {
        self.weights.products
    }

    /// The number format of the weights.
    pub fn dtype(&self) -> Dtype {
        self.weights.dtype
    }

    /// Names and places of the parameters that are trained: all, or those of the adapter.
    pub fn trainable(&self) -> &Layout {
        self.adapter.as_ref().map_or(&self.layout, |adapter| &adapter.layout)
    }

    /// A flat copy of the parameters that are trained, laid out as [`Decoder::trainable`] says.
    pub fn parameters(&self) -> Vec<f32> {
        if let Some(adapter) = &self.adapter {
            return adapter.values.clone();
        }
        let mut values = vec![0.0; self.layout.len()];
        for parameter in self.layout.parameters() {
            let rows = values[parameter.range.clone()].par_chunks_exact_mut(parameter.columns.max(1));
            rows.enumerate().for_each(|(row, out)| self.weights.row(parameter, row, out));
        }
        values
    }

    /// BLAKE3 of the shape and of every weight, in hexadecimal.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.config.to_json(self.dtype(), &[], None).to_string().as_bytes());
        let (mut row, mut bytes) = (Vec::new(), Vec::new());
        for parameter in self.layout.parameters() {
            row.resize(parameter.columns, 0.0);
            for at in 0..parameter.rows {
                self.weights.row(parameter, at, &mut row);
                bytes.clear();
                self.dtype().write(&row, &mut bytes);
                hasher.update(&bytes);
            }
        }
        hasher.finalize().to_hex().to_string()
    }

    /// Replaces the parameters that are trained; weights are rounded to the decoder's number format.
    ///
    /// # Panics
    /// When the number of parameters is another.
    pub fn set_parameters(&mut self, parameters: &[f32]) {
        assert_eq!(self.trainable().len(), parameters.len(), "parameters do not fit the configuration");
        self.placement.invalidate();
        if let Some(adapter) = &mut self.adapter {
            adapter.values.copy_from_slice(parameters);
            return adapter.merge_into(&mut self.weights);
        }
        for parameter in self.layout.parameters() {
            self.weights.set_rows(parameter, 0, &parameters[parameter.range.clone()]);
        }
    }

    /// A cache for this decoder.
    pub fn new_cache(&self) -> KvCache {
        KvCache::new(self.config.geometry(), self.config.layers)
    }

    /// Runs the decoder over the newest positions of some nodes.
    ///
    /// `ids[rows]` are the tokens of the extensions' rows. Keys and values go to the cache; the
    /// residual stream after the last layer, `[ids.len(), hidden]`, is left in `workspace` (see
    /// [`Decoder::hidden`]). With a tape, everything that the backward pass needs is kept.
    ///
    /// # Errors
    /// When a path is longer than the model's positions or a token is outside its vocabulary.
    pub fn forward(
        &self,
        ids: &[u32],
        extensions: &[Extension],
        cache: &mut KvCache,
        workspace: &mut Workspace,
        mut tape: Option<&mut Tape>,
    ) -> Result<(), ModelError> {
        let lengths = extensions.iter().map(|extension| cache.path_length(extension.node));
        self.config.check(ids, lengths.max().unwrap_or(0))?;
        let hidden = self.config.hidden_size;
        let mut tiles = take(&mut workspace.tiles);
        cache.tiles(extensions, &mut tiles);
        set_positions(&mut workspace.positions, ids.len(), extensions, cache);
        cache.places(extensions, &mut workspace.places);
        let embedding = self.weights.embedding();
        for_each_row(sized(&mut workspace.x, ids.len() * hidden), hidden, |row, x| {
            embedding.row(ids[row] as usize, x);
        });
        for layer in 0..self.config.layers {
            let layer_tape = tape.as_deref_mut().map(|tape| {
                tape.layers.resize_with(self.config.layers, LayerTape::default);
                (tape.recompute, &mut tape.layers[layer])
            });
            let whole = match layer_tape {
                Some((true, layer_tape)) => {
                    copy_to(&mut layer_tape.input, &workspace.x);
                    None
                }
                other => other.map(|(_, layer_tape)| layer_tape),
            };
            self.layer(layer, &tiles, cache, workspace, whole);
        }
        let pairs: usize = tiles.iter().map(Tile::pairs).sum();
        workspace.flops += self.config.layer_flops(ids.len(), pairs);
        if let Some(tape) = tape {
            copy_to(&mut tape.residual, &workspace.x);
            tape.positions.clone_from(&workspace.positions);
            tape.ids = ids.to_vec();
            tape.tiles = tiles;
        } else {
            // The nodes' pages are theirs alone again, so that they grow in place.
            for tile in &mut tiles {
                tile.pieces.clear();
            }
            workspace.tiles = tiles;
        }
        Ok(())
    }

    /// One layer on `workspace.x`; keys and values go to `workspace.places` of the cache.
    pub(super) fn layer(
        &self,
        layer: usize,
        tiles: &[Tile],
        cache: &mut KvCache,
        workspace: &mut Workspace,
        mut tape: Option<&mut LayerTape>,
    ) {
        let at = &self.weights.layers[layer];
        let (rows, width) = (workspace.positions.len(), self.config.qkv_width());
        if let Some(tape) = tape.as_deref_mut() {
            exchange(tape, workspace);
        }
        self.norm_rows(
            &workspace.x,
            &at[Vector::InputNorm],
            &mut workspace.normed,
            tape.as_deref_mut().map(|t| &mut t.input_scales),
        );
        if let Some(tape) = tape.as_deref_mut() {
            copy_to(&mut tape.input, &workspace.x);
        }
        let qkv = sized(&mut workspace.qkv, rows * width);
        matmul(Left::rows(&workspace.normed, self.config.hidden_size), rows, &at[Matrix::Qkv], qkv, false);
        self.finish_qkv(at, workspace, tape.as_deref_mut());
        let queries = self.config.heads * self.config.head_dim;
        cache.write(layer, &workspace.places, &workspace.qkv, width, queries);
        let attended = sized(&mut workspace.attended, rows * self.config.heads * self.config.head_dim);
        let log_sums = sized(&mut workspace.log_sums, rows * self.config.heads);
        let pages = cache.layer(layer);
        attention::forward(self.config.geometry(), tiles, pages, &workspace.qkv, width, attended, log_sums);
        matmul(Left::rows(attended, queries), rows, &at[Matrix::Output], &mut workspace.x, true);
        if self.config.output_bias() {
            let bias = &at[Vector::OutputBias];
            for_each_row(&mut workspace.x, self.config.hidden_size, |_, row| add(row, bias));
        }
        if let Some(tape) = tape.as_deref_mut() {
            copy_to(&mut tape.middle, &workspace.x);
        }
        self.feed_forward(at, workspace, tape.as_deref_mut());
        if let Some(tape) = tape {
            exchange(tape, workspace);
        }
    }

    fn feed_forward(&self, at: &LayerWeights, workspace: &mut Workspace, tape: Option<&mut LayerTape>) {
        let (rows, hidden, inner) =
            (workspace.positions.len(), self.config.hidden_size, self.config.intermediate_size);
        let scales = tape.map(|tape| &mut tape.middle_scales);
        self.norm_rows(&workspace.x, &at[Vector::PostNorm], &mut workspace.normed, scales);
        let gate_up = sized(&mut workspace.gate_up, rows * 2 * inner);
        matmul(Left::rows(&workspace.normed, hidden), rows, &at[Matrix::GateUp], gate_up, false);
        let gate_up = &workspace.gate_up;
        for_each_row(sized(&mut workspace.activated, rows * inner), inner, |row, out| {
            swiglu::forward(&gate_up[row * 2 * inner..][..2 * inner], out);
        });
        matmul(Left::rows(&workspace.activated, inner), rows, &at[Matrix::Down], &mut workspace.x, true);
    }

    /// RMS norm of every row, keeping the factors where a tape wants them.
    pub(super) fn norm_rows(
        &self,
        x: &[f32],
        weight: &[f32],
        out: &mut Vec<f32>,
        scales: Option<&mut Vec<f32>>,
    ) {
        let (hidden, epsilon) = (self.config.hidden_size, self.config.norm_epsilon);
        let out = sized(out, x.len());
        match scales {
            None => for_each_row(out, hidden, |row, out| {
                norm::forward(&x[row * hidden..][..hidden], weight, epsilon, out);
            }),
            Some(scales) => norm::forward_rows(x, weight, epsilon, out, sized(scales, x.len() / hidden)),
        }
    }

    /// Biases, q/k norms and rotary embedding, in place.
    fn finish_qkv(&self, at: &LayerWeights, workspace: &mut Workspace, tape: Option<&mut LayerTape>) {
        let (width, dim) = (self.config.qkv_width(), self.config.head_dim);
        let turned = (self.config.heads + self.config.kv_heads) * dim;
        if self.config.attention_bias {
            let bias = &at[Vector::QkvBias];
            for_each_row(&mut workspace.qkv, width, |_, row| add(row, bias));
        }
        if self.config.qk_norm {
            if let Some(tape) = tape {
                copy_to(&mut tape.before_norm, &workspace.qkv);
            }
            for_each_row(&mut workspace.qkv, width, |_, row| {
                for (head, values) in row[..turned].chunks_exact_mut(dim).enumerate() {
                    let weight = if head < self.config.heads { Vector::QueryNorm } else { Vector::KeyNorm };
                    norm::forward_in_place(values, &at[weight], self.config.norm_epsilon);
                }
            });
        }
        let positions = &workspace.positions;
        for_each_row(&mut workspace.qkv, width, |row, values| {
            self.rotary.rotate(&mut values[..turned], positions[row]);
        });
    }

    /// Normalised hidden states of some rows of the last forward pass, `[rows.len(), hidden]`.
    pub fn hidden(&self, workspace: &Workspace, rows: &[usize]) -> Vec<f32> {
        let hidden = self.config.hidden_size;
        let (weight, epsilon) = (&self.weights.final_norm, self.config.norm_epsilon);
        let mut out = vec![0.0; rows.len() * hidden];
        for_each_row(&mut out, hidden, |at, out| {
            norm::forward(&workspace.x[rows[at] * hidden..][..hidden], weight, epsilon, out);
        });
        out
    }

    /// Logits `[rows, vocabulary]` of normalised hidden states; the caller bounds the rows.
    pub fn logits(&self, hidden: &[f32], out: &mut Vec<f32>, workspace: &mut Workspace) {
        let rows = hidden.len() / self.config.hidden_size;
        let out = sized(out, rows * self.config.vocab_size);
        self.weights.head.logits(hidden, rows, out);
        workspace.flops += self.config.head_flops(rows);
    }

    /// Log-probability and entropy of one target for each normalised hidden state.
    pub fn score(
        &self,
        hidden: &[f32],
        targets: &[u32],
        inverse_temperature: f32,
        workspace: &mut Workspace,
    ) -> Vec<TokenScore> {
        workspace.flops += self.config.head_flops(targets.len());
        head::score(&self.weights.head, hidden, targets, inverse_temperature)
    }

    /// Bytes that a tape holds for each token of a forward pass, unless layers are computed again.
    pub fn tape_bytes_per_token(&self) -> usize {
        let c = &self.config;
        let before_norm = if c.qk_norm { c.qkv_width() } else { 0 };
        let attention = c.qkv_width() + before_norm + c.heads * (c.head_dim + 1);
        let values = 2 * (c.hidden_size + 1) + attention + 2 * c.intermediate_size;
        c.layers * values * size_of::<f32>()
    }

    /// Bytes that a tape holds for each token where layers are computed again: their inputs.
    pub fn input_bytes_per_token(&self) -> usize {
        self.config.layers * self.config.hidden_size * size_of::<f32>()
    }
}

/// Lends a tape's buffers to a workspace for a layer, or takes them back, filled: each keeps its own, since a long prefix's would
/// else go about among all.
fn exchange(tape: &mut LayerTape, workspace: &mut Workspace) {
    swap(&mut tape.qkv, &mut workspace.qkv);
    swap(&mut tape.attended, &mut workspace.attended);
    swap(&mut tape.log_sums, &mut workspace.log_sums);
    swap(&mut tape.gate_up, &mut workspace.gate_up);
}

fn set_positions(positions: &mut Vec<usize>, rows: usize, extensions: &[Extension], cache: &KvCache) {
    positions.clear();
    positions.resize(rows, 0);
    for extension in extensions {
        let first = cache.first_position(extension);
        for (at, row) in extension.rows.clone().enumerate() {
            positions[row] = first + at;
        }
    }
}

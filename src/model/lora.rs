//! Low-rank adapters (Hu et al., arXiv 2106.09685): `W = W0 + alpha / rank x B A`.
//!
//! The decoder always runs the merged matrices, so an adapter costs nothing in a forward pass and
//! rollout and training stay one arithmetic. Only A and B have gradients, and these come from the
//! passing values directly: the gradient of a whole matrix never exists.

use super::layout::{Layout, Matrix, Place, Role};
use super::weights::Weights;
use super::{DecoderConfig, ModelError};
use crate::kernels::matmul::{Left, matmul};
use crate::kernels::packed::Packed;
use crate::random::Stream;
use std::ops::Range;
use std::path::Path;

/// Modules that an adapter can stand on, as they are called in a model's tensors.
pub const MODULES: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
/// Rows of a matrix that are merged at a time.
const ROWS_AT_A_TIME: usize = 256;

/// Rank, scale and place of an adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraShape {
    /// Inner dimension of the product.
    pub rank: usize,
    /// Numerator of the factor on it.
    pub alpha: f32,
    /// Which of [`MODULES`].
    pub modules: Vec<String>,
}

impl LoraShape {
    /// The factor on the product.
    pub fn scale(&self) -> f32 {
        self.alpha / self.rank as f32
    }
}

/// An adapter with the matrices that it stands on.
#[derive(Clone, Debug)]
pub(super) struct Adapter {
    pub(super) shape: LoraShape,
    pub(super) layout: Layout,
    pub(super) targets: Vec<Target>,
    /// A and B of every target, as the layout says.
    pub(super) values: Vec<f32>,
    /// Each layer's matrices without the adapter; empty where no target is.
    base: Vec<[Packed; 4]>,
}

/// A module of a layer with its A `[rank, inputs]` and B `[outputs, rank]`.
#[derive(Clone, Debug)]
pub(super) struct Target {
    layer: usize,
    matrix: Matrix,
    /// First output of the module within the matrix.
    first: usize,
    outputs: usize,
    inputs: usize,
    a: Range<usize>,
    b: Range<usize>,
}

/// The module's place in the layer: its block, the matrix it is part of, and its outputs there.
fn module(config: &DecoderConfig, name: &str) -> Option<(&'static str, Matrix, Range<usize>)> {
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    Some(match name {
        "q_proj" => ("self_attn", Matrix::Qkv, 0..queries),
        "k_proj" => ("self_attn", Matrix::Qkv, queries..queries + keys),
        "v_proj" => ("self_attn", Matrix::Qkv, queries + keys..queries + 2 * keys),
        "o_proj" => ("self_attn", Matrix::Output, 0..hidden),
        "gate_proj" => ("mlp", Matrix::GateUp, 0..inner),
        "up_proj" => ("mlp", Matrix::GateUp, inner..2 * inner),
        "down_proj" => ("mlp", Matrix::Down, 0..hidden),
        _ => return None,
    })
}

impl Adapter {
    /// An adapter that changes nothing yet: B is zero, A uniform within `1 / sqrt(inputs)` as in PEFT.
    ///
    /// # Errors
    /// When the shape names no module or one that no layer has.
    pub(super) fn new(
        config: &DecoderConfig,
        weights: &Weights,
        shape: LoraShape,
        seed: u64,
    ) -> Result<Self, ModelError> {
        let refuse = |message| ModelError::Config { path: Path::new("lora").to_path_buf(), message };
        if shape.rank == 0 || shape.modules.is_empty() {
            return Err(refuse("an adapter needs a rank of at least 1 and at least one module".into()));
        }
        let (mut layout, mut targets) = (Layout::default(), Vec::new());
        for layer in 0..config.layers {
            for name in MODULES.iter().filter(|name| shape.modules.iter().any(|wanted| wanted == *name)) {
                let Some((block, matrix, outputs)) = module(config, name) else { continue };
                let inputs = weights.layers[layer][matrix].inner();
                let mut add = |part: &str, rows, columns| {
                    let name = format!("base_model.model.model.layers.{layer}.{block}.{name}.{part}.weight");
                    layout.add(name, rows, columns, Role::Matrix, Place::Adapter)
                };
                let (a, b) = (add("lora_A", shape.rank, inputs), add("lora_B", outputs.len(), shape.rank));
                let (first, outputs) = (outputs.start, outputs.len());
                targets.push(Target { layer, matrix, first, outputs, inputs, a, b });
            }
        }
        if let Some(name) = shape.modules.iter().find(|name| !MODULES.contains(&name.as_str())) {
            return Err(refuse(format!("there is no module `{name}`: modules are {}", MODULES.join(", "))));
        }
        let base = base_matrices(config, weights, &targets);
        let mut adapter = Self { shape, values: vec![0.0; layout.len()], layout, targets, base };
        adapter.initialise(seed);
        Ok(adapter)
    }

    fn initialise(&mut self, seed: u64) {
        for (target, parameter) in self.targets.iter().zip(self.layout.parameters().iter().step_by(2)) {
            let (stream, bound) = (Stream::new(seed, &parameter.name), 1.0 / (target.inputs as f64).sqrt());
            for (at, value) in self.values[target.a.clone()].iter_mut().enumerate() {
                *value = (bound * (2.0 * stream.uniform(at as u64) - 1.0)) as f32;
            }
        }
    }

    /// Writes `W0 + scale x B A` to the weights, rounded to their format.
    pub(super) fn merge_into(&self, weights: &mut Weights) {
        let (rank, scale) = (self.shape.rank, self.shape.scale());
        let (mut a, mut rows) = (Packed::default(), Vec::new());
        for target in &self.targets {
            a.pack(&self.values[target.a.clone()], rank, target.inputs, target.inputs);
            let b: Vec<f32> = self.values[target.b.clone()].iter().map(|value| value * scale).collect();
            let base = &self.base[target.layer][target.matrix as usize];
            for first in (0..target.outputs).step_by(ROWS_AT_A_TIME) {
                let count = ROWS_AT_A_TIME.min(target.outputs - first);
                rows.resize(count * target.inputs, 0.0);
                for (at, row) in rows.chunks_exact_mut(target.inputs).enumerate() {
                    base.column(target.first + first + at, row);
                }
                matmul(Left::rows(&b[first * rank..][..count * rank], rank), count, &a, &mut rows, true);
                weights.layers[target.layer][target.matrix].set_columns(target.first + first, &rows);
            }
        }
    }

    /// Adds to `gradients` those of A and B on one matrix, from the gradient of its output
    /// `[rows, width]` and its input `[rows, inputs]`.
    ///
    /// With `y = x W^T`: `dB = scale x dY^T (X A^T)` and `dA = scale x (dY B)^T X`.
    pub(super) fn add_gradient(
        &self,
        layer: usize,
        matrix: Matrix,
        grad_out: &[f32],
        width: usize,
        input: &[f32],
        gradients: &mut [f32],
    ) {
        let rank = self.shape.rank;
        let scaled = |values: &mut [f32]| values.iter_mut().for_each(|value| *value *= self.shape.scale());
        let on_matrix = |target: &&Target| target.layer == layer && target.matrix == matrix;
        for target in self.targets.iter().filter(on_matrix) {
            let rows = input.len() / target.inputs;
            if rows == 0 {
                continue;
            }
            let (mut right, mut low) = (Packed::default(), vec![0.0; rows * rank]);
            right.pack_transposed(&self.values[target.a.clone()], rank, target.inputs);
            matmul(Left::rows(input, target.inputs), rows, &right, &mut low, false);
            scaled(&mut low);
            let grads = &grad_out[target.first..];
            right.pack(&low, rows, rank, rank);
            let transposed = Left { values: grads, row_stride: 1, inner_stride: width };
            matmul(transposed, target.outputs, &right, &mut gradients[target.b.clone()], true);

            right.pack(&self.values[target.b.clone()], target.outputs, rank, rank);
            let plain = Left { values: grads, row_stride: width, inner_stride: 1 };
            matmul(plain, rows, &right, &mut low, false);
            scaled(&mut low);
            right.pack(input, rows, target.inputs, target.inputs);
            let left = Left::transposed(&low, rank);
            matmul(left, rank, &right, &mut gradients[target.a.clone()], true);
        }
    }
}

/// Copies of the matrices that some target stands on.
fn base_matrices(config: &DecoderConfig, weights: &Weights, targets: &[Target]) -> Vec<[Packed; 4]> {
    let all = [Matrix::Qkv, Matrix::Output, Matrix::GateUp, Matrix::Down];
    let copy = |layer: usize, matrix: Matrix| {
        let is_target = targets.iter().any(|target| target.layer == layer && target.matrix == matrix);
        if is_target { weights.layers[layer][matrix].clone() } else { Packed::default() }
    };
    (0..config.layers).map(|layer| all.map(|matrix| copy(layer, matrix))).collect()
}

//! Where each parameter lies in the flat buffer that holds them all.

use super::DecoderConfig;
use std::ops::Range;

/// What a parameter is, for initialisation and optimisers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A weight matrix of a decoder layer.
    Matrix,
    /// The embedding or the untied head.
    Embedding,
    /// A norm's weight.
    Norm,
    /// A bias.
    Bias,
}

/// One named tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parameter {
    /// Name in the Hugging Face layout.
    pub name: String,
    /// Place in the flat buffer.
    pub range: Range<usize>,
    /// Shape: `[rows, columns]`, or `[columns]` where `rows` is 1 and the role is no matrix.
    pub rows: usize,
    /// Last dimension.
    pub columns: usize,
    /// What it is.
    pub role: Role,
    pub(super) place: Place,
}

/// A matrix of a layer, as one product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Matrix {
    /// Queries, keys and values side by side.
    Qkv,
    Output,
    /// Gate and up side by side.
    GateUp,
    Down,
}

/// A vector of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vector {
    InputNorm,
    QkvBias,
    QueryNorm,
    KeyNorm,
    OutputBias,
    PostNorm,
}

/// Where a parameter lies in a decoder's [`Weights`](super::weights::Weights).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Embedding,
    FinalNorm,
    Head,
    /// From output `first` of a matrix on.
    Matrix {
        layer: usize,
        matrix: Matrix,
        first: usize,
    },
    /// From element `first` of a vector on.
    Vector {
        layer: usize,
        vector: Vector,
        first: usize,
    },
    /// In an adapter, not among the weights.
    Adapter,
}

impl Parameter {
    /// Whether it has one dimension only.
    pub fn is_vector(&self) -> bool {
        matches!(self.role, Role::Norm | Role::Bias)
    }

    /// The tensor's shape.
    pub fn shape(&self) -> Vec<usize> {
        if self.is_vector() { vec![self.columns] } else { vec![self.rows, self.columns] }
    }
}

/// Places of one layer's parameters. Queries, keys and values lie side by side and so do gate and
/// up, so that each group is one matrix product.
#[derive(Clone, Debug, Default)]
pub(super) struct LayerLayout {
    pub(super) input_norm: Range<usize>,
    pub(super) qkv: Range<usize>,
    pub(super) qkv_bias: Range<usize>,
    pub(super) q_norm: Range<usize>,
    pub(super) k_norm: Range<usize>,
    pub(super) output: Range<usize>,
    pub(super) output_bias: Range<usize>,
    pub(super) post_norm: Range<usize>,
    pub(super) gate_up: Range<usize>,
    pub(super) down: Range<usize>,
}

/// Places of all parameters.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    parameters: Vec<Parameter>,
    pub(super) layers: Vec<LayerLayout>,
    pub(super) embedding: Range<usize>,
    pub(super) final_norm: Range<usize>,
    pub(super) head: Range<usize>,
}

impl Layout {
    /// The layout of a configuration.
    pub fn new(config: &DecoderConfig) -> Self {
        let mut layout = Self::default();
        let hidden = config.hidden_size;
        let embedding = "model.embed_tokens.weight".into();
        layout.embedding =
            layout.add(embedding, config.vocab_size, hidden, Role::Embedding, Place::Embedding);
        for layer in 0..config.layers {
            let at = layout.add_layer(config, layer);
            layout.layers.push(at);
        }
        layout.final_norm = layout.add("model.norm.weight".into(), 1, hidden, Role::Norm, Place::FinalNorm);
        layout.head = if config.tied {
            layout.embedding.clone()
        } else {
            layout.add("lm_head.weight".into(), config.vocab_size, hidden, Role::Embedding, Place::Head)
        };
        layout
    }

    fn add_layer(&mut self, config: &DecoderConfig, layer: usize) -> LayerLayout {
        let (hidden, inner, dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (queries, keys) = (config.heads * dim, config.kv_heads * dim);
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let matrix = |matrix, first| Place::Matrix { layer, matrix, first };
        let vector = |vector, first| Place::Vector { layer, vector, first };
        let norm = |layout: &mut Self, part, length, place| {
            layout.add(name(part), 1, length, Role::Norm, vector(place, 0))
        };
        let mut at = LayerLayout {
            input_norm: norm(self, "input_layernorm.weight", hidden, Vector::InputNorm),
            ..LayerLayout::default()
        };
        let projections = [("q", 0, queries), ("k", queries, keys), ("v", queries + keys, keys)];
        let weights = projections.map(|(p, first, rows)| {
            let name = name(&format!("self_attn.{p}_proj.weight"));
            self.add(name, rows, hidden, Role::Matrix, matrix(Matrix::Qkv, first))
        });
        at.qkv = weights[0].start..weights[2].end;
        if config.attention_bias {
            let biases = projections.map(|(p, first, rows)| {
                let name = name(&format!("self_attn.{p}_proj.bias"));
                self.add(name, 1, rows, Role::Bias, vector(Vector::QkvBias, first))
            });
            at.qkv_bias = biases[0].start..biases[2].end;
        }
        if config.qk_norm {
            at.q_norm = norm(self, "self_attn.q_norm.weight", dim, Vector::QueryNorm);
            at.k_norm = norm(self, "self_attn.k_norm.weight", dim, Vector::KeyNorm);
        }
        let output = name("self_attn.o_proj.weight");
        at.output = self.add(output, hidden, queries, Role::Matrix, matrix(Matrix::Output, 0));
        if config.output_bias() {
            let bias = name("self_attn.o_proj.bias");
            at.output_bias = self.add(bias, 1, hidden, Role::Bias, vector(Vector::OutputBias, 0));
        }
        at.post_norm = norm(self, "post_attention_layernorm.weight", hidden, Vector::PostNorm);
        let feed = [("gate", 0), ("up", inner)].map(|(p, first)| {
            let name = name(&format!("mlp.{p}_proj.weight"));
            self.add(name, inner, hidden, Role::Matrix, matrix(Matrix::GateUp, first))
        });
        at.gate_up = feed[0].start..feed[1].end;
        at.down =
            self.add(name("mlp.down_proj.weight"), hidden, inner, Role::Matrix, matrix(Matrix::Down, 0));
        at
    }

    /// Adds a parameter after the others.
    pub(super) fn add(
        &mut self,
        name: String,
        rows: usize,
        columns: usize,
        role: Role,
        place: Place,
    ) -> Range<usize> {
        let start = self.len();
        let range = start..start + rows * columns;
        self.parameters.push(Parameter { name, range: range.clone(), rows, columns, role, place });
        range
    }

    /// The parameters in order of their places.
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.parameters.last().map_or(0, |parameter| parameter.range.end)
    }

    /// Whether there is no parameter.
    pub fn is_empty(&self) -> bool {
        self.parameters.is_empty()
    }
}

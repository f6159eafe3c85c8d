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
}

impl Parameter {
    /// The tensor's shape.
    pub fn shape(&self) -> Vec<usize> {
        match self.role {
            Role::Matrix | Role::Embedding => vec![self.rows, self.columns],
            Role::Norm | Role::Bias => vec![self.columns],
        }
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
        let (hidden, inner, dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (queries, keys) = (config.heads * dim, config.kv_heads * dim);
        layout.embedding =
            layout.add("model.embed_tokens.weight".into(), config.vocab_size, hidden, Role::Embedding);
        for layer in 0..config.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let mut at = LayerLayout {
                input_norm: layout.add(name("input_layernorm.weight"), 1, hidden, Role::Norm),
                ..LayerLayout::default()
            };
            let projections = [("q", queries), ("k", keys), ("v", keys)];
            let weights = projections.map(|(p, rows)| {
                layout.add(name(&format!("self_attn.{p}_proj.weight")), rows, hidden, Role::Matrix)
            });
            at.qkv = weights[0].start..weights[2].end;
            if config.attention_bias {
                let biases = projections.map(|(p, rows)| {
                    layout.add(name(&format!("self_attn.{p}_proj.bias")), 1, rows, Role::Bias)
                });
                at.qkv_bias = biases[0].start..biases[2].end;
            }
            if config.qk_norm {
                at.q_norm = layout.add(name("self_attn.q_norm.weight"), 1, dim, Role::Norm);
                at.k_norm = layout.add(name("self_attn.k_norm.weight"), 1, dim, Role::Norm);
            }
            at.output = layout.add(name("self_attn.o_proj.weight"), hidden, queries, Role::Matrix);
            if config.output_bias() {
                at.output_bias = layout.add(name("self_attn.o_proj.bias"), 1, hidden, Role::Bias);
            }
            at.post_norm = layout.add(name("post_attention_layernorm.weight"), 1, hidden, Role::Norm);
            let gate = layout.add(name("mlp.gate_proj.weight"), inner, hidden, Role::Matrix);
            let up = layout.add(name("mlp.up_proj.weight"), inner, hidden, Role::Matrix);
            at.gate_up = gate.start..up.end;
            at.down = layout.add(name("mlp.down_proj.weight"), hidden, inner, Role::Matrix);
            layout.layers.push(at);
        }
        layout.final_norm = layout.add("model.norm.weight".into(), 1, hidden, Role::Norm);
        layout.head = if config.tied {
            layout.embedding.clone()
        } else {
            layout.add("lm_head.weight".into(), config.vocab_size, hidden, Role::Embedding)
        };
        layout
    }

    fn add(&mut self, name: String, rows: usize, columns: usize, role: Role) -> Range<usize> {
        let start = self.len();
        let range = start..start + rows * columns;
        self.parameters.push(Parameter { name, range: range.clone(), rows, columns, role });
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

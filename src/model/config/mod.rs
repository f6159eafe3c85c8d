//! The shape of a decoder, read from a Hugging Face config.json.

mod read;
mod rope;

pub use rope::{Llama3, RopeScaling, Yarn};

use super::Dtype;
use super::ModelError;
use crate::config::ScratchModel;
use crate::kernels::attention::Geometry;
use crate::kernels::rotary::Frequencies;
use read::Reader;
use serde_json::{Value, json};
use std::path::Path;

/// The decoder families that are implemented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Biases on queries, keys and values.
    Qwen2,
    /// RMS norm of queries and keys.
    Qwen3,
    /// Neither.
    Llama,
}

impl Architecture {
    fn model_type(self) -> &'static str {
        match self {
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Llama => "llama",
        }
    }

    fn class(self) -> &'static str {
        match self {
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
        }
    }
}

/// Everything that decides what the decoder computes.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// Family, for config.json.
    pub architecture: Architecture,
    /// Entries of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of the SwiGLU block.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Longest sequence.
    pub max_positions: usize,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// How the rotary embedding is stretched past the positions of pre-training.
    pub rope_scaling: RopeScaling,
    /// Added to the mean square in RMS norms.
    pub norm_epsilon: f32,
    /// Biases on queries, keys and values and, except in Qwen2, on the attention's output.
    pub attention_bias: bool,
    /// RMS norm of queries and keys.
    pub qk_norm: bool,
    /// The head shares the embedding.
    pub tied: bool,
}

impl DecoderConfig {
    /// The shape of a model from scratch over a vocabulary.
    pub fn from_scratch(scratch: &ScratchModel, vocab_size: usize) -> Self {
        let architecture = match (scratch.qk_norm, scratch.attention_bias) {
            (true, _) => Architecture::Qwen3,
            (false, true) => Architecture::Qwen2,
            (false, false) => Architecture::Llama,
        };
        Self {
            architecture,
            vocab_size,
            hidden_size: scratch.hidden_size,
            intermediate_size: scratch.intermediate_size,
            layers: scratch.num_hidden_layers,
            heads: scratch.num_attention_heads,
            kv_heads: scratch.num_key_value_heads.unwrap_or(scratch.num_attention_heads),
            head_dim: scratch.hidden_size / scratch.num_attention_heads.max(1),
            max_positions: scratch.max_position_embeddings,
            rope_theta: scratch.rope_theta,
            rope_scaling: RopeScaling::Default,
            norm_epsilon: 1e-6,
            attention_bias: scratch.attention_bias,
            qk_norm: scratch.qk_norm,
            tied: scratch.tie_word_embeddings,
        }
    }

    /// Heads and their size.
    pub fn geometry(&self) -> Geometry {
        Geometry { heads: self.heads, kv_heads: self.kv_heads, head_dim: self.head_dim }
    }

    /// Elements of one row of queries, keys and values together.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Whether the attention's output has a bias too.
    pub fn output_bias(&self) -> bool {
        self.attention_bias && self.architecture != Architecture::Qwen2
    }

    /// Inverse frequencies and attention factor of the rotary embedding.
    pub fn rotary(&self) -> Frequencies {
        self.rope_scaling.frequencies(self.rope_theta, self.head_dim, self.max_positions)
    }

    /// Whether tokens are in the vocabulary and a path of `length` tokens fits the model's positions.
    ///
    /// # Errors
    /// When they are not, or it does not.
    pub(super) fn check(&self, ids: &[u32], length: usize) -> Result<(), ModelError> {
        let (vocabulary, limit) = (self.vocab_size, self.max_positions);
        if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
            return Err(ModelError::BadToken { id: *id, vocabulary });
        }
        match self.rope_scaling {
            _ if length <= limit => Ok(()),
            RopeScaling::Dynamic { .. } => Err(ModelError::DynamicRotary { length, limit }),
            _ => Err(ModelError::TooLong { length, limit }),
        }
    }

    /// Bytes that a device's tape holds for each token of a forward pass, in a format of `element` bytes, unless layers are
    /// computed again.
    pub(crate) fn device_tape_bytes(&self, element: usize) -> usize {
        let before = if self.qk_norm { self.qkv_width() } else { 0 };
        let stored = self.qkv_width() + before + self.heads * self.head_dim + 2 * self.intermediate_size;
        let single = 2 * (self.hidden_size + 1) + self.heads;
        self.layers * (stored * element + single * size_of::<f32>())
    }

    /// Bytes of a token's keys and values, in a format of `element` bytes.
    pub(crate) fn cached_bytes(&self, element: usize) -> usize {
        self.layers * 2 * self.kv_heads * self.head_dim * element
    }

    /// Operations of the layers' forward pass: 2 for each weight and row, 4 for each pair of query
    /// and visible key and element of a head.
    pub(crate) fn layer_flops(&self, rows: usize, pairs: usize) -> u64 {
        let queries = self.heads * self.head_dim;
        let matrices = self.hidden_size * (self.qkv_width() + queries + 3 * self.intermediate_size);
        (self.layers * (2 * rows * matrices + 4 * pairs * queries)) as u64
    }

    /// Operations of the head's forward pass.
    pub(crate) fn head_flops(&self, rows: usize) -> u64 {
        (2 * rows * self.vocab_size * self.hidden_size) as u64
    }

    /// Reads and checks `directory/config.json`.
    ///
    /// # Errors
    /// When it cannot be read or parsed, or asks for something that is not implemented.
    pub fn load(directory: &Path) -> Result<Self, ModelError> {
        let path = directory.join("config.json");
        Self::from_json(&path, &read::file(&path)?)
    }

    /// Checks the contents of a config.json; `path` names it in messages.
    ///
    /// Absent fields have the defaults of transformers' configuration classes.
    ///
    /// # Errors
    /// As [`DecoderConfig::load`], less reading.
    pub fn from_json(path: &Path, value: &Value) -> Result<Self, ModelError> {
        Reader::new(path, value).config()
    }

    /// config.json as transformers reads it; `rope_theta` and `rope_scaling` repeat what
    /// `rope_parameters` says, for programs that know the older spelling only.
    pub fn to_json(&self, dtype: Dtype, eos: &[u32], bos: Option<u32>) -> Value {
        let eos = if let [one] = eos { json!(one) } else { json!(eos) };
        let rope = self.rope_scaling.to_json(self.rope_theta);
        let mut json = json!({
            "architectures": [self.architecture.class()],
            "model_type": self.architecture.model_type(),
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_epsilon.to_string().parse::<f64>().unwrap_or(f64::from(self.norm_epsilon)),
            "rope_parameters": rope,
            "rope_theta": self.rope_theta,
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tied,
            "use_sliding_window": false,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "torch_dtype": dtype.name(),
        });
        if self.rope_scaling != RopeScaling::Default {
            json["rope_scaling"] = rope;
        }
        json
    }
}

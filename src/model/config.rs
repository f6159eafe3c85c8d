//! The shape of a decoder, read from a Hugging Face config.json.

use super::ModelError;
use crate::config::ScratchModel;
use crate::kernels::attention::Geometry;
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
    /// Added to the mean square in RMS norms.
    pub norm_epsilon: f32,
    /// Biases on queries, keys and values.
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

    /// Reads and checks `directory/config.json`.
    ///
    /// # Errors
    /// When it cannot be read or parsed, or asks for something that is not implemented.
    pub fn load(directory: &Path) -> Result<Self, ModelError> {
        let path = directory.join("config.json");
        let text =
            std::fs::read_to_string(&path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|error| ModelError::Config { path: path.clone(), message: error.to_string() })?;
        Self::from_json(&path, &value)
    }

    /// Checks the contents of a config.json; `path` names it in messages.
    ///
    /// # Errors
    /// As [`DecoderConfig::load`], less reading.
    pub fn from_json(path: &Path, value: &Value) -> Result<Self, ModelError> {
        Reader { path, value }.config()
    }

    /// config.json as transformers reads it.
    pub fn to_json(&self, eos: u32, bos: Option<u32>) -> Value {
        json!({
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
            "rope_theta": self.rope_theta,
            "attention_bias": self.attention_bias,
            "tie_word_embeddings": self.tied,
            "use_sliding_window": false,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "torch_dtype": "float32",
        })
    }
}

struct Reader<'a> {
    path: &'a Path,
    value: &'a Value,
}

impl Reader<'_> {
    fn bad(&self, message: String) -> ModelError {
        ModelError::Config { path: self.path.to_path_buf(), message }
    }

    fn unsupported(&self, what: String) -> ModelError {
        ModelError::Unsupported { path: self.path.to_path_buf(), what }
    }

    fn present(&self, key: &str) -> Option<&Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    fn size_or(&self, key: &str, default: Option<usize>) -> Result<usize, ModelError> {
        let Some(value) = self.present(key) else {
            return default.ok_or_else(|| self.bad(format!("no `{key}`")));
        };
        match value.as_u64() {
            Some(size) if size > 0 && size <= 1 << 32 => Ok(size as usize),
            _ => Err(self.bad(format!("`{key}` is {value}, not a positive whole number"))),
        }
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.present(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.bad(format!("`{key}` is {other}, not true or false"))),
        }
    }

    fn architecture(&self) -> Result<Architecture, ModelError> {
        match self.present("model_type").and_then(Value::as_str) {
            Some("qwen2") => Ok(Architecture::Qwen2),
            Some("qwen3") => Ok(Architecture::Qwen3),
            Some("llama") => Ok(Architecture::Llama),
            Some(other) => Err(self.unsupported(format!("model_type \"{other}\""))),
            None => Err(self.bad("no `model_type`".into())),
        }
    }

    /// The rotary base, from either spelling of the settings.
    fn rope_theta(&self) -> Result<f64, ModelError> {
        let nested = self.present("rope_parameters").or_else(|| self.present("rope_scaling"));
        if let Some(settings) = nested {
            let kind = settings.get("rope_type").or_else(|| settings.get("type")).and_then(Value::as_str);
            if !matches!(kind, None | Some("default")) {
                return Err(self.unsupported(format!("rope_type \"{}\"", kind.unwrap_or_default())));
            }
        }
        let theta = nested
            .and_then(|settings| settings.get("rope_theta"))
            .or_else(|| self.present("rope_theta"))
            .map_or(Some(10_000.0), Value::as_f64);
        theta
            .filter(|theta| *theta > 0.0)
            .ok_or_else(|| self.bad("`rope_theta` is not a positive number".into()))
    }

    fn refuse_unsupported(&self, architecture: Architecture) -> Result<(), ModelError> {
        let activation = self.present("hidden_act").and_then(Value::as_str).unwrap_or("silu");
        if activation != "silu" {
            return Err(self.unsupported(format!("hidden_act \"{activation}\"")));
        }
        if self.flag("use_sliding_window", false)? && self.present("sliding_window").is_some() {
            return Err(self.unsupported("an active sliding window (use_sliding_window)".into()));
        }
        if self.flag("mlp_bias", false)? {
            return Err(self.unsupported("mlp_bias".into()));
        }
        if architecture == Architecture::Llama && self.flag("attention_bias", false)? {
            return Err(self.unsupported("attention_bias on a Llama (it also biases the output)".into()));
        }
        Ok(())
    }

    fn config(&self) -> Result<DecoderConfig, ModelError> {
        let architecture = self.architecture()?;
        self.refuse_unsupported(architecture)?;
        let hidden_size = self.size_or("hidden_size", None)?;
        let heads = self.size_or("num_attention_heads", None)?;
        let kv_heads = self.size_or("num_key_value_heads", Some(heads))?;
        let head_dim = self.size_or("head_dim", Some(hidden_size / heads))?;
        if heads % kv_heads != 0 || head_dim % 2 != 0 {
            return Err(
                self.bad(format!("{heads} heads, {kv_heads} key/value heads of {head_dim} do not fit"))
            );
        }
        let epsilon = self.present("rms_norm_eps").map_or(Some(1e-6), Value::as_f64);
        Ok(DecoderConfig {
            architecture,
            vocab_size: self.size_or("vocab_size", None)?,
            hidden_size,
            intermediate_size: self.size_or("intermediate_size", None)?,
            layers: self.size_or("num_hidden_layers", None)?,
            heads,
            kv_heads,
            head_dim,
            max_positions: self.size_or("max_position_embeddings", Some(2048))?,
            rope_theta: self.rope_theta()?,
            norm_epsilon: epsilon.ok_or_else(|| self.bad("`rms_norm_eps` is not a number".into()))? as f32,
            attention_bias: self.flag("attention_bias", architecture == Architecture::Qwen2)?
                || architecture == Architecture::Qwen2,
            qk_norm: architecture == Architecture::Qwen3,
            tied: self.flag("tie_word_embeddings", false)?,
        })
    }
}

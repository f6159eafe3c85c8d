//! Reading config.json: typed fields, and what is refused by name.

use super::{Architecture, DecoderConfig, RopeScaling};
use crate::json::{self, shortened};
use crate::model::ModelError;
use serde_json::{Map, Value};
use std::path::Path;

/// Fields of other models that change what is computed unless null, false, zero or empty.
const REFUSED_UNLESS_OFF: [&str; 20] = [
    "add_cross_attention",
    "attention_multiplier",
    "attn_logit_softcapping",
    "clip_qkv",
    "compression_config",
    "final_logit_softcapping",
    "mlp_bias",
    "moe_intermediate_size",
    "mrope_section",
    "n_routed_experts",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "per_layer_config",
    "qk_layernorm",
    "quantization_config",
    "query_pre_attn_scalar",
    "rope_interleaved",
    "use_bidirectional_attention",
    "use_mrope",
];

/// Fields that change what is computed unless they are 1.
const REFUSED_UNLESS_ONE: [&str; 6] = [
    "embedding_multiplier",
    "logit_scale",
    "logits_scaling",
    "partial_rotary_factor",
    "pretraining_tp",
    "residual_multiplier",
];

/// The largest sizes that are read. They are several times those of any published model, small
/// enough that a broken file is named before memory is asked for, and no product of them overflows.
const LARGEST: [(&str, u64); 9] = [
    ("vocab_size", 1 << 24),
    ("hidden_size", 1 << 18),
    ("intermediate_size", 1 << 20),
    ("num_hidden_layers", 1 << 12),
    ("num_attention_heads", 1 << 14),
    ("num_key_value_heads", 1 << 14),
    ("head_dim", 1 << 14),
    ("max_position_embeddings", 1 << 24),
    ("original_max_position_embeddings", 1 << 24),
];

/// A JSON file.
pub(super) fn file(path: &Path) -> Result<Value, ModelError> {
    let bytes = json::read(path, json::SETTINGS)
        .map_err(|source| ModelError::Io { path: path.to_path_buf(), source })?;
    json::parse(&bytes, json::SETTINGS)
        .map_err(|message| ModelError::Config { path: path.to_path_buf(), message })
}

/// The fields of one JSON object of a file.
pub(super) struct Reader<'a> {
    path: &'a Path,
    value: &'a Value,
}

impl<'a> Reader<'a> {
    pub(super) fn new(path: &'a Path, value: &'a Value) -> Self {
        Self { path, value }
    }

    pub(super) fn bad(&self, message: String) -> ModelError {
        ModelError::Config { path: self.path.to_path_buf(), message: shortened(message) }
    }

    pub(super) fn unsupported(&self, what: String) -> ModelError {
        ModelError::Unsupported { path: self.path.to_path_buf(), what: shortened(what) }
    }

    /// A field that is there and not null.
    pub(super) fn present(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key).filter(|value| !value.is_null())
    }

    /// An object inside this one, unless it is absent or empty.
    pub(super) fn object(&self, key: &str) -> Result<Option<Reader<'a>>, ModelError> {
        match self.present(key) {
            None => Ok(None),
            Some(Value::Object(fields)) if fields.is_empty() => Ok(None),
            Some(value @ Value::Object(_)) => Ok(Some(Self::new(self.path, value))),
            Some(other) => Err(self.bad(format!("`{key}` is {other}, not an object"))),
        }
    }

    pub(super) fn fields(&self) -> Option<&'a Map<String, Value>> {
        self.value.as_object()
    }

    pub(super) fn size_or(&self, key: &str, default: Option<usize>) -> Result<usize, ModelError> {
        let Some(value) = self.present(key) else {
            return default.ok_or_else(|| self.bad(format!("no `{key}`")));
        };
        let largest = LARGEST.iter().find(|(name, _)| *name == key).map_or(1 << 32, |(_, largest)| *largest);
        match value.as_u64() {
            Some(size) if size > largest => {
                Err(self.bad(format!("`{key}` is {size}, more than the {largest} that are supported")))
            }
            Some(size) if size > 0 => Ok(size as usize),
            _ => Err(self.bad(format!("`{key}` is {value}, not a positive whole number"))),
        }
    }

    /// A size that has one default where the field is absent and another where it is null.
    fn size_with_defaults(&self, key: &str, absent: usize, null: usize) -> Result<usize, ModelError> {
        let default = if self.value.get(key).is_some() { null } else { absent };
        self.size_or(key, Some(default))
    }

    pub(super) fn flag(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.present(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(self.bad(format!("`{key}` is {other}, not true or false"))),
        }
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let not_number = |value| self.bad(format!("`{key}` is {value}, not a number"));
        self.present(key).map(|value| value.as_f64().ok_or_else(|| not_number(value))).transpose()
    }

    pub(super) fn positive(&self, key: &str, default: Option<f64>) -> Result<f64, ModelError> {
        match self.number(key)?.or(default) {
            None => Err(self.bad(format!("no `{key}`"))),
            Some(number) if is_positive(number) => Ok(number),
            Some(number) => Err(self.bad(format!("`{key}` is {number}, not a positive number of f32"))),
        }
    }

    /// The decoder that a config.json describes.
    pub(super) fn config(&self) -> Result<DecoderConfig, ModelError> {
        let architecture = self.architecture()?;
        self.refuse_unsupported()?;
        let qwen = architecture != Architecture::Llama;
        let hidden_size = self.size_or("hidden_size", None)?;
        let layers = self.size_or("num_hidden_layers", None)?;
        self.refuse_sliding_window(layers)?;
        let heads = self.size_or("num_attention_heads", None)?;
        let kv_heads =
            self.size_with_defaults("num_key_value_heads", if qwen { 32 } else { heads }, heads)?;
        let divided = hidden_size / heads;
        let absent_dim = if architecture == Architecture::Qwen3 { 128 } else { divided };
        let head_dim = self.size_with_defaults("head_dim", absent_dim, divided)?;
        if heads % kv_heads != 0 || head_dim == 0 || head_dim % 2 != 0 {
            return Err(
                self.bad(format!("{heads} heads, {kv_heads} key/value heads of {head_dim} do not fit"))
            );
        }
        let max_positions =
            self.size_or("max_position_embeddings", Some(if qwen { 32_768 } else { 2048 }))?;
        let (rope_theta, rope_scaling) = RopeScaling::read(self, max_positions)?;
        let config = DecoderConfig {
            architecture,
            vocab_size: self.size_or("vocab_size", None)?,
            hidden_size,
            intermediate_size: self.size_or("intermediate_size", None)?,
            layers,
            heads,
            kv_heads,
            head_dim,
            max_positions,
            rope_theta,
            rope_scaling,
            norm_epsilon: self.positive("rms_norm_eps", Some(1e-6))? as f32,
            attention_bias: self.flag("attention_bias", false)? || architecture == Architecture::Qwen2,
            qk_norm: architecture == Architecture::Qwen3,
            tied: self.flag("tie_word_embeddings", false)?,
        };
        self.check_rotary(config)
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

    fn refuse_unsupported(&self) -> Result<(), ModelError> {
        for key in REFUSED_UNLESS_OFF {
            if let Some(value) = self.present(key).filter(|value| !is_off(value)) {
                return Err(self.unsupported(format!("{key} {value}")));
            }
        }
        for key in REFUSED_UNLESS_ONE {
            self.refuse_unless_one(key)?;
        }
        if !self.flag("is_causal", true)? {
            return Err(self.unsupported("is_causal false".into()));
        }
        match self.present("hidden_act") {
            Some(activation) if activation != "silu" => {
                Err(self.unsupported(format!("hidden_act {activation}")))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn refuse_unless_one(&self, key: &str) -> Result<(), ModelError> {
        match self.present(key) {
            Some(value) if value.as_f64() != Some(1.0) => Err(self.unsupported(format!("{key} {value}"))),
            _ => Ok(()),
        }
    }

    /// Refuses layers that see a window only. Without `layer_types` they are those from
    /// `max_window_layers` on, where `use_sliding_window` is set and the window's size is not null.
    fn refuse_sliding_window(&self, layers: usize) -> Result<(), ModelError> {
        if let Some(types) = self.present("layer_types") {
            let full = |types: &Vec<Value>| types.iter().all(|kind| kind == "full_attention");
            let is_full = types.as_array().is_some_and(full);
            return if is_full { Ok(()) } else { Err(self.unsupported(format!("layer_types {types}"))) };
        }
        let window = self.value.get("sliding_window").is_none_or(|window| !window.is_null());
        let first = self.present("max_window_layers").map_or(Some(28), Value::as_u64);
        let reached = first.is_none_or(|first| first < layers as u64);
        if self.flag("use_sliding_window", false)? && window && reached {
            return Err(self.unsupported("an active sliding window (use_sliding_window)".into()));
        }
        Ok(())
    }

    fn check_rotary(&self, config: DecoderConfig) -> Result<DecoderConfig, ModelError> {
        let rotary = config.rotary();
        let finite = rotary.inverse.iter().all(|inverse| inverse.is_finite());
        if finite && rotary.attention_factor.is_finite() {
            return Ok(config);
        }
        Err(self.bad("the rotary settings (rope_theta, rope_parameters) give infinite frequencies".into()))
    }
}

/// Whether a number is positive and finite, also once it is rounded to `f32`.
fn is_positive(number: f64) -> bool {
    number as f32 > 0.0 && (number as f32).is_finite()
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::String(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(key: &str, value: Value) -> Result<DecoderConfig, String> {
        let mut config = json!({
            "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 2,
        });
        config[key] = value;
        Reader::new(Path::new("config.json"), &config).config().map_err(|error| error.to_string())
    }

    #[test]
    fn sizes_beyond_any_model_are_refused_by_name() {
        for (key, largest) in LARGEST {
            for size in [largest + 1, 1 << 33, 1 << 53, u64::MAX] {
                let error = read(key, json!(size)).err();
                let named = error.as_ref().is_some_and(|error| error.contains(&format!("`{key}` is {size}")));
                assert!(named || key.starts_with("original"), "{key}: {error:?}");
            }
        }
        // Two gigabytes of frequencies were once computed to see whether they are finite.
        assert!(read("head_dim", json!(1_u64 << 32)).is_err());
        assert!(read("head_dim", json!(1 << 14)).is_ok());
    }

    #[test]
    fn no_product_of_the_largest_sizes_overflows() {
        let largest = |key: &str| LARGEST.iter().find(|(name, _)| *name == key).map(|(_, size)| *size);
        let product =
            |keys: &[&str]| keys.iter().try_fold(4_u64, |bytes, key| bytes.checked_mul(largest(key)?));
        let layers = ["num_hidden_layers", "hidden_size"];
        assert!(product(&[&layers[..], &["num_attention_heads", "head_dim"]].concat()).is_some());
        assert!(product(&[&layers[..], &["intermediate_size"]].concat()).is_some());
        assert!(product(&["vocab_size", "hidden_size"]).is_some());
        assert!(product(&["max_position_embeddings", "head_dim"]).is_some());
    }

    #[test]
    fn numbers_that_f32_does_not_have_are_refused_by_name() {
        for key in ["rms_norm_eps", "rope_theta"] {
            for number in [json!(1e308), json!(-1.0), json!(1e-320), json!(0)] {
                assert!(read(key, number.clone()).is_err_and(|error| error.contains(key)), "{key} {number}");
            }
        }
    }

    #[test]
    fn messages_do_not_repeat_whole_files() {
        for key in ["hidden_size", "model_type", "hidden_act", "rope_scaling", "layer_types"] {
            let error = read(key, json!([format!("{key}{}", "x".repeat(1 << 20))])).unwrap_err();
            assert!(error.len() < 1000, "{key}");
        }
    }
}

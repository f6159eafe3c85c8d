//! Adapters as PEFT directories: `adapter_config.json` and `adapter_model.safetensors`.

use super::files::{read_rows, write_json, write_tensors};
use super::lora::{Adapter, LoraShape, MODULES};
use super::tensors::TensorFiles;
use super::{Decoder, Dtype, ModelError};
use crate::json;
use serde_json::{Value, json};
use std::path::Path;

/// Fields that would change what an adapter does, with the values that change nothing.
const UNSUPPORTED: [(&str, &[&str]); 12] = [
    ("use_dora", &["false"]),
    ("use_rslora", &["false"]),
    ("fan_in_fan_out", &["false"]),
    ("bias", &["\"none\""]),
    ("rank_pattern", &["{}"]),
    ("alpha_pattern", &["{}"]),
    ("layers_to_transform", &["[]"]),
    ("layers_pattern", &["[]"]),
    ("modules_to_save", &["[]"]),
    ("target_parameters", &["[]"]),
    ("exclude_modules", &["[]"]),
    ("lora_bias", &["false"]),
];

impl LoraShape {
    /// Reads the `adapter_config.json` of a directory.
    ///
    /// # Errors
    /// When it cannot be read, or asks for something that is not supported, by name.
    pub fn load(directory: &Path) -> Result<Self, ModelError> {
        let path = directory.join("adapter_config.json");
        let text = json::read(&path, json::SETTINGS).map_err(ModelError::io(&path))?;
        let bad = |message: String| ModelError::Config { path: path.clone(), message };
        let value = json::parse(&text, json::SETTINGS).map_err(&bad)?;
        let unsupported = |what: String| ModelError::Unsupported { path: path.clone(), what };
        if value["peft_type"] != "LORA" {
            return Err(unsupported(format!("`peft_type` {}", value["peft_type"])));
        }
        for (key, harmless) in UNSUPPORTED {
            let found = &value[key];
            if !found.is_null() && !harmless.contains(&found.to_string().as_str()) {
                return Err(unsupported(format!("`{key}` {found}")));
            }
        }
        let rank = value["r"].as_u64().filter(|rank| (1..=1 << 16).contains(rank));
        let alpha = value["lora_alpha"].as_f64().map(|alpha| alpha as f32).filter(|alpha| alpha.is_finite());
        Ok(Self {
            rank: rank.ok_or_else(|| bad(format!("`r` is {}, not a rank", value["r"])))? as usize,
            alpha: alpha
                .ok_or_else(|| bad(format!("`lora_alpha` is {}, not a number", value["lora_alpha"])))?,
            modules: modules(&value["target_modules"])
                .ok_or_else(|| unsupported(format!("`target_modules` {}", value["target_modules"])))?,
        })
    }
}

/// A list of modules, or all of them.
fn modules(value: &Value) -> Option<Vec<String>> {
    if value == "all-linear" {
        return Some(MODULES.map(String::from).to_vec());
    }
    let names: Option<Vec<String>> =
        value.as_array()?.iter().map(|name| name.as_str().map(String::from)).collect();
    names.filter(|names| names.iter().all(|name| MODULES.contains(&name.as_str())))
}

impl Decoder {
    /// Puts a new adapter on the decoder: from here on its parameters are the adapter's.
    ///
    /// # Errors
    /// When the shape names a module that no layer has.
    pub fn with_adapter(mut self, shape: LoraShape, seed: u64) -> Result<Self, ModelError> {
        self.adapter = Some(Adapter::new(self.config(), &self.weights, shape, seed)?);
        Ok(self)
    }

    /// Puts the adapter of a PEFT directory on the decoder.
    ///
    /// # Errors
    /// When files are missing or broken, or the adapter does not fit the decoder.
    pub fn with_adapter_of(self, directory: &Path) -> Result<Self, ModelError> {
        let mut decoder = self.with_adapter(LoraShape::load(directory)?, 0)?;
        let files = TensorFiles::open(&[directory.join("adapter_model.safetensors")])?;
        let refuse = |problems| ModelError::Weights { path: directory.to_path_buf(), problems };
        decoder.trainable().check_files(&files).map_err(refuse)?;
        let mut values = vec![0.0; decoder.trainable().len()];
        for parameter in decoder.trainable().parameters() {
            let into = &mut values[parameter.range.clone()];
            read_rows(&files, parameter, |first, rows| {
                into[first * parameter.columns..][..rows.len()].copy_from_slice(rows);
                Ok(())
            })
            .map_err(|problem| refuse(vec![problem]))?;
        }
        decoder.set_parameters(&values);
        Ok(decoder)
    }

    /// Writes the adapter as a PEFT directory, in `f32`; `base` names the model that it stands on.
    ///
    /// # Errors
    /// When there is no adapter, or a file cannot be written.
    pub fn save_adapter(&self, directory: &Path, base: &str) -> Result<(), ModelError> {
        let Some(adapter) = &self.adapter else {
            let message = "the model has no adapter".to_owned();
            return Err(ModelError::Config { path: directory.to_path_buf(), message });
        };
        std::fs::create_dir_all(directory).map_err(ModelError::io(directory))?;
        let LoraShape { rank, alpha, modules } = &adapter.shape;
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "target_modules": modules,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "use_dora": false,
            "use_rslora": false,
        });
        write_json(&directory.join("adapter_config.json"), &config)?;
        let path = directory.join("adapter_model.safetensors");
        write_tensors(&path, adapter.layout.parameters(), Dtype::F32, &|parameter, row, out| {
            let values = &adapter.values[parameter.range.clone()];
            out.copy_from_slice(&values[row * parameter.columns..][..parameter.columns]);
        })
    }
}

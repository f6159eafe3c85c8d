//! Hugging Face model directories.

use anyhow::Context;
use rpt::config::TokenizerConfig;
use rpt::model::{DecoderConfig, Dtype, Layout};
use rpt::tokenize::{SpecialTokens, Tokenizer};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Limit of the safetensors format.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Shape and sizes, from headers only: no weight is read.
pub(super) fn inspect(directory: &Path) -> anyhow::Result<Value> {
    let config = DecoderConfig::load(directory).map_err(rpt::Error::from)?;
    let files = weight_files(directory)?;
    let mut dtypes = BTreeMap::new();
    for file in &files {
        count_elements(file, &mut dtypes).with_context(|| format!("cannot read {}", file.display()))?;
    }
    Ok(json!({
        "kind": "model",
        "path": directory,
        "config": shape(&config),
        "parameters": Layout::new(&config).len(),
        "dtype": dtypes,
        "files": files,
        "tokenizer": tokenizer(&directory.join("tokenizer.json"))?,
    }))
}

/// What config.json says about the decoder; token ids are the tokenizer's matter.
fn shape(config: &DecoderConfig) -> Value {
    let mut value = config.to_json(Dtype::F32, &[0], None);
    if let Some(map) = value.as_object_mut() {
        map.retain(|key, _| !matches!(key.as_str(), "bos_token_id" | "eos_token_id" | "torch_dtype"));
    }
    value
}

/// `model.safetensors` or `model-00001-of-00002.safetensors` and so on.
fn weight_files(directory: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Adds the elements of a safetensors file by their type.
fn count_elements(path: &Path, dtypes: &mut BTreeMap<String, u64>) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(length).min(MAX_HEADER_BYTES)).read_to_end(&mut header)?;
    let tensors: Map<String, Value> = serde_json::from_slice(&header)?;
    for (_, tensor) in tensors.iter().filter(|(name, _)| *name != "__metadata__") {
        let shape = tensor["shape"].as_array().into_iter().flatten();
        let elements =
            shape.fold(1_u64, |product, extent| product.saturating_mul(extent.as_u64().unwrap_or(0)));
        let name = tensor["dtype"].as_str().unwrap_or("unknown").to_owned();
        let total = dtypes.entry(name).or_default();
        *total = total.saturating_add(elements);
    }
    Ok(())
}

fn tokenizer(path: &Path) -> rpt::Result<Option<Value>> {
    if !path.exists() {
        return Ok(None);
    }
    let tokenizer = Tokenizer::load(path)?;
    let special = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default()).ok();
    Ok(Some(json!({
        "ids": tokenizer.vocab_size(),
        "fingerprint": tokenizer.fingerprint(),
        "eos": special.as_ref().and_then(|special| tokenizer.name_of(special.eos)),
        "bos": special.and_then(|special| special.bos).and_then(|bos| tokenizer.name_of(bos)),
    })))
}

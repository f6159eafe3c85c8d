//! Hugging Face directories in and out: config.json and safetensors, single or sharded.

use super::{Decoder, DecoderConfig, Layout, ModelError, Parameter};
use candle_core::{DType, Device, safetensors::MmapedSafetensors};
use serde_json::Value;
use std::path::{Path, PathBuf};

impl Decoder {
    /// Loads a model directory.
    ///
    /// # Errors
    /// When files are missing or broken, the architecture is not supported, or tensors do not fit
    /// the configuration (all misfits are listed).
    pub fn load(directory: &Path) -> Result<Self, ModelError> {
        let config = DecoderConfig::load(directory)?;
        let layout = Layout::new(&config);
        let tensors = open(&weight_files(directory)?)?;
        let mut parameters = vec![0.0; layout.len()];
        let mut problems = surplus(&tensors, &layout);
        for parameter in layout.parameters() {
            if let Err(problem) = read(&tensors, parameter, &mut parameters[parameter.range.clone()]) {
                problems.push(problem);
            }
        }
        if problems.is_empty() {
            Ok(Self::new(config, parameters))
        } else {
            Err(ModelError::Weights { path: directory.to_path_buf(), problems })
        }
    }

    /// Writes config.json, `generation_config.json` and model.safetensors (f32).
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, directory: &Path, eos: u32, bos: Option<u32>) -> Result<(), ModelError> {
        let io = |path: &Path| {
            let path = path.to_path_buf();
            move |source| ModelError::Io { path, source }
        };
        std::fs::create_dir_all(directory).map_err(io(directory))?;
        let generation = serde_json::json!({ "bos_token_id": bos, "eos_token_id": eos });
        for (name, value) in
            [("config.json", self.config().to_json(eos, bos)), ("generation_config.json", generation)]
        {
            let path = directory.join(name);
            std::fs::write(&path, format!("{value:#}\n")).map_err(io(&path))?;
        }
        let path = directory.join("model.safetensors");
        let views: Vec<(&str, View)> = self
            .layout()
            .parameters()
            .iter()
            .map(|parameter| {
                let values = &self.parameters()[parameter.range.clone()];
                (parameter.name.as_str(), View { shape: parameter.shape(), values })
            })
            .collect();
        let metadata = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
        safetensors::serialize_to_file(views, Some(metadata), &path).map_err(|error| ModelError::Io {
            path: path.clone(),
            source: std::io::Error::other(error.to_string()),
        })?;
        make_readable(&path).map_err(io(&path))
    }
}

/// safetensors writes files that only their owner may read; a model is as public as its config.json.
#[cfg(unix)]
fn make_readable(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn make_readable(_path: &Path) -> std::io::Result<()> {
    Ok(())
}

/// Digest of a model directory: its config.json and the names and lengths of its weight files.
///
/// # Errors
/// When a file cannot be read.
pub fn directory_digest(directory: &Path) -> Result<String, ModelError> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| ModelError::Io { path, source }
    };
    let config = directory.join("config.json");
    let mut hasher = blake3::Hasher::new();
    hasher.update(&std::fs::read(&config).map_err(io(&config))?);
    for file in weight_files(directory)? {
        let length = std::fs::metadata(&file).map_err(io(&file))?.len();
        hasher.update(file.file_name().unwrap_or_default().as_encoded_bytes()).update(&length.to_le_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// A tensor to write.
struct View<'a> {
    shape: Vec<usize>,
    values: &'a [f32],
}

impl safetensors::View for View<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        safetensors::Dtype::F32
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>().into()
    }
    fn data_len(&self) -> usize {
        self.values.len() * 4
    }
}

/// The weight files of a directory: those that the index names, or the single one.
fn weight_files(directory: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let index = directory.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![directory.join("model.safetensors")]);
    }
    let bad = |message: String| ModelError::Config { path: index.clone(), message };
    let text =
        std::fs::read_to_string(&index).map_err(|source| ModelError::Io { path: index.clone(), source })?;
    let value: Value = serde_json::from_str(&text).map_err(|error| bad(error.to_string()))?;
    let map =
        value.get("weight_map").and_then(Value::as_object).ok_or_else(|| bad("no `weight_map`".into()))?;
    let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
    names.sort_unstable();
    names.dedup();
    let plain = |name: &&str| Path::new(name).components().count() == 1 && !name.contains("..");
    if let Some(name) = names.iter().find(|name| !plain(name)) {
        return Err(bad(format!("\"{name}\" is not a plain file name")));
    }
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
}

fn open(files: &[PathBuf]) -> Result<MmapedSafetensors, ModelError> {
    for path in files {
        std::fs::File::open(path).map_err(|source| ModelError::Io { path: path.clone(), source })?;
    }
    // SAFETY: the mapping is only read; a file that another process truncates meanwhile would end
    // this process with a bus error, never with wrong data that goes unnoticed by the checks above.
    unsafe { MmapedSafetensors::multi(files) }.map_err(|error| ModelError::Weights {
        path: files.first().cloned().unwrap_or_default(),
        problems: vec![error.to_string()],
    })
}

/// Names of tensors that the layout has no place for (rotary tables of old files are harmless).
fn surplus(tensors: &MmapedSafetensors, layout: &Layout) -> Vec<String> {
    let known: std::collections::HashSet<&str> =
        layout.parameters().iter().map(|parameter| parameter.name.as_str()).collect();
    let tied = !known.contains("lm_head.weight");
    let harmless = |name: &str| name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
    let mut names: Vec<String> = tensors
        .tensors()
        .into_iter()
        .map(|(name, _)| name)
        .filter(|name| !known.contains(name.as_str()) && !harmless(name))
        .map(|name| format!("unexpected tensor {name}"))
        .collect();
    names.sort_unstable();
    names
}

fn read(tensors: &MmapedSafetensors, parameter: &Parameter, target: &mut [f32]) -> Result<(), String> {
    let name = &parameter.name;
    let view = tensors.get(name).map_err(|_| format!("missing tensor {name}"))?;
    if view.shape() != parameter.shape() {
        return Err(format!("{name} has shape {:?}, not {:?}", view.shape(), parameter.shape()));
    }
    let values = tensors
        .load(name, &Device::Cpu)
        .and_then(|tensor| tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>())
        .map_err(|error| format!("{name}: {error}"))?;
    target.copy_from_slice(&values);
    Ok(())
}

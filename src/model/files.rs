//! Hugging Face directories in and out: config.json and safetensors, single or sharded.

use super::layout::Vector;
use super::tensors::TensorFiles;
use super::weights::Weights;
use super::{Architecture, Decoder, DecoderConfig, Layout, ModelError, Parameter};
use crate::json;
use crate::kernels::dtype::Dtype;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

/// Bytes of tensors in one weight file, as in transformers.
pub const SHARD_BYTES: u64 = 5_000_000_000;
/// Bytes of a tensor that are read at a time.
const WINDOW_BYTES: usize = 8 << 20;
/// The largest value that rounds to a finite half-precision number.
const LARGEST_F16: f32 = 65_519.99;

impl Decoder {
    /// Loads a model directory in the number format of its files. Where tensors differ (matrices in
    /// bf16, norms in f32) that is `f32`: it holds all values exactly, in more bytes than the files.
    ///
    /// # Errors
    /// As [`Decoder::load_as`].
    pub fn load(directory: &Path) -> Result<Self, ModelError> {
        Self::load_as(directory, None)
    }

    /// Loads a model directory, its weights rounded to `dtype`.
    ///
    /// The files are mapped and read a window at a time: memory holds the weights once.
    ///
    /// # Errors
    /// When files are missing or broken, the architecture is not supported, or tensors do not fit
    /// the configuration (all misfits are listed, and nothing has been allocated for them).
    pub fn load_as(directory: &Path, dtype: Option<Dtype>) -> Result<Self, ModelError> {
        let config = DecoderConfig::load(directory)?;
        let files = TensorFiles::open(&weight_files(directory)?)?;
        let refuse = |problems| ModelError::Weights { path: directory.to_path_buf(), problems };
        let layout = Layout::new(&config);
        layout.check_files(&files).map_err(refuse)?;
        let dtype = dtype.unwrap_or_else(|| common_dtype(&files, &layout));
        let mut weights = Weights::zeros(&config, dtype);
        let unread: Vec<String> = layout
            .parameters()
            .iter()
            .filter_map(|parameter| read(&files, parameter, &mut weights).err())
            .collect();
        if unread.is_empty() { Ok(Self::of_weights(config, layout, weights)) } else { Err(refuse(unread)) }
    }

    /// A Qwen2 as the Llama that computes the same: the bias that a Llama has besides, on the
    /// attention's output, is zero. Other families stay what they are.
    #[must_use]
    pub fn qwen2_into_llama(mut self) -> Self {
        if self.config().architecture == Architecture::Qwen2 {
            self.config.architecture = Architecture::Llama;
            self.layout = Layout::new(&self.config);
            for layer in &mut self.weights.layers {
                layer[Vector::OutputBias] = vec![0.0; self.config.hidden_size];
            }
        }
        self
    }

    /// Writes config.json, `generation_config.json` and the weights in their own format.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, directory: &Path, eos: &[u32], bos: Option<u32>) -> Result<(), ModelError> {
        self.save_as(directory, self.dtype(), SHARD_BYTES, eos, bos)
    }

    /// Writes config.json, `generation_config.json` and the weights rounded to `dtype`: as
    /// model.safetensors, or as shards of at most `shard_bytes` (but for a larger tensor) with an index.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save_as(
        &self,
        directory: &Path,
        dtype: Dtype,
        shard_bytes: u64,
        eos: &[u32],
        bos: Option<u32>,
    ) -> Result<(), ModelError> {
        std::fs::create_dir_all(directory).map_err(ModelError::io(directory))?;
        let config = self.config().to_json(dtype, eos, bos);
        write_json(&directory.join("config.json"), &config)?;
        let generation = json!({ "bos_token_id": bos, "eos_token_id": config["eos_token_id"] });
        write_json(&directory.join("generation_config.json"), &generation)?;
        let row = |parameter: &Parameter, row, out: &mut [f32]| self.weights.row(parameter, row, out);
        let shards = shards(self.layout().parameters(), dtype, shard_bytes);
        if let [all] = &shards[..] {
            return write_tensors(&directory.join("model.safetensors"), all, dtype, &row);
        }
        let mut map = serde_json::Map::new();
        for (number, shard) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len());
            map.extend(shard.iter().map(|parameter| (parameter.name.clone(), name.clone().into())));
            write_tensors(&directory.join(&name), shard, dtype, &row)?;
        }
        let total_size = self.layout().len() * dtype.bytes();
        let index = json!({ "metadata": { "total_size": total_size }, "weight_map": map });
        write_json(&directory.join("model.safetensors.index.json"), &index)
    }
}

impl Layout {
    /// Whether the files hold exactly the layout's tensors; else every misfit.
    pub(super) fn check_files(&self, files: &TensorFiles) -> Result<(), Vec<String>> {
        let mut problems = surplus(files, self);
        problems.extend(self.parameters().iter().filter_map(|parameter| misfit(files, parameter)));
        problems.extend(files.repeated().map(|name| format!("tensor {name} is in two files")));
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

fn misfit(files: &TensorFiles, parameter: &Parameter) -> Option<String> {
    let name = &parameter.name;
    match files.get(name) {
        None => Some(format!("missing tensor {name}")),
        Some(tensor) if tensor.shape != parameter.shape() => {
            Some(format!("{name} has shape {:?}, not {:?}", tensor.shape, parameter.shape()))
        }
        Some(tensor) if tensor.dtype.is_err() => {
            Some(format!("{name} has dtype {}, not F32, BF16 or F16", tensor.dtype.err()?))
        }
        Some(_) => None,
    }
}

/// The format of the tensors; `f32`, which holds them all exactly, where they differ.
fn common_dtype(files: &TensorFiles, layout: &Layout) -> Dtype {
    let mut dtypes =
        layout.parameters().iter().filter_map(|parameter| files.get(&parameter.name)?.dtype.ok());
    let first = dtypes.next().unwrap_or_default();
    if dtypes.all(|dtype| dtype == first) { first } else { Dtype::F32 }
}

/// Names of tensors that the layout has no place for (rotary tables of old files are harmless).
fn surplus(files: &TensorFiles, layout: &Layout) -> Vec<String> {
    let known: HashSet<&str> = layout.parameters().iter().map(|parameter| parameter.name.as_str()).collect();
    let tied = !known.contains("lm_head.weight");
    let harmless = |name: &str| name.ends_with("rotary_emb.inv_freq") || (tied && name == "lm_head.weight");
    let names = files.names().filter(|name| !known.contains(name) && !harmless(name));
    names.map(|name| format!("unexpected tensor {name}")).collect()
}

/// Reads a tensor whose shape and format were checked.
fn read(files: &TensorFiles, parameter: &Parameter, weights: &mut Weights) -> Result<(), String> {
    let narrows = weights.dtype == Dtype::F16;
    read_rows(files, parameter, |first, rows| {
        if narrows && rows.iter().any(|value| value.is_finite() && value.abs() > LARGEST_F16) {
            let name = &parameter.name;
            return Err(format!("{name} holds values that half precision cannot: load it as bf16 or f32"));
        }
        weights.set_rows(parameter, first, rows);
        Ok(())
    })
}

/// Hands a tensor, widened, to `take(first row, rows)`, a window of rows at a time.
pub(super) fn read_rows(
    files: &TensorFiles,
    parameter: &Parameter,
    mut take: impl FnMut(usize, &[f32]) -> Result<(), String>,
) -> Result<(), String> {
    let name = &parameter.name;
    let tensor = files.get(name).ok_or_else(|| format!("missing tensor {name}"))?;
    let dtype = tensor.dtype.map_err(|dtype| format!("{name} has dtype {dtype}"))?;
    let row_bytes = parameter.columns * dtype.bytes();
    let rows_at_a_time = (WINDOW_BYTES / row_bytes.max(1)).max(1);
    let mut values = Vec::new();
    for first in (0..parameter.rows).step_by(rows_at_a_time) {
        let count = rows_at_a_time.min(parameter.rows - first);
        values.resize(count * parameter.columns, 0.0);
        tensor.window(first * row_bytes..(first + count) * row_bytes, |bytes| dtype.read(bytes, &mut values));
        take(first, &values)?;
    }
    Ok(())
}

/// Cuts parameters into files of at most `limit` bytes, but for a larger parameter.
fn shards(parameters: &[Parameter], dtype: Dtype, limit: u64) -> Vec<&[Parameter]> {
    let (mut shards, mut start, mut sum) = (Vec::new(), 0, 0);
    for (at, parameter) in parameters.iter().enumerate() {
        let bytes = (parameter.range.len() * dtype.bytes()) as u64;
        if sum > 0 && sum + bytes > limit {
            shards.push(&parameters[start..at]);
            (start, sum) = (at, 0);
        }
        sum += bytes;
    }
    shards.push(&parameters[start..]);
    shards
}

pub(super) fn write_json(path: &Path, value: &Value) -> Result<(), ModelError> {
    std::fs::write(path, format!("{value:#}\n")).map_err(ModelError::io(path))
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
    let config = directory.join("config.json");
    let mut hasher = blake3::Hasher::new();
    hasher.update(&json::read(&config, json::SETTINGS).map_err(ModelError::io(&config))?);
    for file in weight_files(directory)? {
        let length = std::fs::metadata(&file).map_err(ModelError::io(&file))?.len();
        hasher.update(file.file_name().unwrap_or_default().as_encoded_bytes()).update(&length.to_le_bytes());
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Copies row `row` of a parameter to a slice of its columns.
type RowSource<'a> = &'a dyn Fn(&Parameter, usize, &mut [f32]);

/// Writes some parameters as one safetensors file, rounded to `dtype`.
pub(super) fn write_tensors(
    path: &Path,
    parameters: &[Parameter],
    dtype: Dtype,
    source: RowSource,
) -> Result<(), ModelError> {
    let view = |parameter| View { source, parameter, shape: Parameter::shape(parameter), dtype };
    let views = parameters.iter().map(|parameter| (parameter.name.as_str(), view(parameter)));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(views, Some(metadata), path)
        .map_err(|error| ModelError::io(path)(std::io::Error::other(error.to_string())))?;
    make_readable(path).map_err(ModelError::io(path))
}

/// A tensor to write: its bytes exist only while they are written.
struct View<'a> {
    source: RowSource<'a>,
    parameter: &'a Parameter,
    shape: Vec<usize>,
    dtype: Dtype,
}

impl safetensors::View for View<'_> {
    fn dtype(&self) -> safetensors::Dtype {
        match self.dtype {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::Bf16 => safetensors::Dtype::BF16,
            Dtype::F16 => safetensors::Dtype::F16,
        }
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = Vec::with_capacity(self.data_len());
        let mut values = vec![0.0; self.parameter.columns];
        for row in 0..self.parameter.rows {
            (self.source)(self.parameter, row, &mut values);
            self.dtype.write(&values, &mut bytes);
        }
        bytes.into()
    }
    fn data_len(&self) -> usize {
        self.parameter.range.len() * self.dtype.bytes()
    }
}

/// The weight files of a directory: those that the index names, or the single one.
fn weight_files(directory: &Path) -> Result<Vec<PathBuf>, ModelError> {
    let index = directory.join("model.safetensors.index.json");
    if !index.exists() {
        return Ok(vec![directory.join("model.safetensors")]);
    }
    let bad = |message: String| ModelError::Config { path: index.clone(), message };
    let text = json::read(&index, json::SETTINGS).map_err(ModelError::io(&index))?;
    let value = json::parse(&text, json::SETTINGS).map_err(&bad)?;
    let map = value["weight_map"].as_object().ok_or_else(|| bad("no `weight_map`".into()))?;
    let names: Option<BTreeSet<&str>> = map.values().map(Value::as_str).collect();
    let names = names.ok_or_else(|| bad("`weight_map` names something that is no file".into()))?;
    let plain = |name: &&str| Path::new(name).components().count() == 1 && !name.contains("..");
    if let Some(name) = names.iter().find(|name| !plain(name)) {
        return Err(bad(json::shortened(format!("\"{name}\" is not a plain file name"))));
    }
    if names.is_empty() {
        return Err(bad("`weight_map` names no file".into()));
    }
    Ok(names.into_iter().map(|name| directory.join(name)).collect())
}

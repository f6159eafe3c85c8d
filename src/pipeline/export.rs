//! A model of a run as a Hugging Face directory.

use super::directory::RunDirectory;
use super::error::PipelineError;
use super::run::resolved_text;
use crate::error::Error;
use crate::model::{Dtype, ModelError, SHARD_BYTES};
use crate::report::{ModelCard, licence_of};
use std::path::Path;

/// Which model is exported, and how.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// The stage; default: the last main one.
    pub stage: Option<String>,
    /// The step of its checkpoint; default: the newest.
    pub step: Option<u64>,
    /// Number format of the tensors; default: that of the model.
    pub dtype: Option<Dtype>,
    /// Bytes of tensors in one file.
    pub shard_bytes: u64,
    /// Write the adapter alone, as a PEFT directory.
    pub adapter: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self { stage: None, step: None, dtype: None, shard_bytes: SHARD_BYTES, adapter: false }
    }
}

/// Files of a base model's directory that belong to its tokenizer or its terms and are handed on as
/// they are. Which of them exist differs from model to model.
const HANDED_ON: [&str; 12] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
];

impl RunDirectory {
    /// Writes a model of the run to a directory that transformers, vLLM and the converter of llama.cpp
    /// read: configuration, weights, the tokenizer's files and a model card.
    ///
    /// # Errors
    /// When there is no such checkpoint, or a file cannot be read or written.
    pub fn export(&self, directory: &Path, options: &ExportOptions) -> Result<(), Error> {
        let model = self.model(options.stage.as_deref(), options.step)?;
        let named = self.pipeline().model.path.as_deref().map(|path| path.display().to_string());
        if options.adapter {
            return Ok(model.decoder.save_adapter(directory, &named.unwrap_or_default())?);
        }
        let (tokenizer, special) = self.tokenizer()?;
        let dtype = options.dtype.unwrap_or(model.decoder.dtype());
        let (ends, bos) = (special.ends(), special.bos);
        model.decoder.save_as(directory, dtype, options.shard_bytes, &ends, bos)?;
        tokenizer.save(directory, &special)?;
        let base = self.local_model()?;
        if let Some(base) = &base {
            hand_on(base, directory)?;
        }
        let card = ModelCard {
            name: directory_name(self.path()),
            base: named.map(|name| base_name(&name)),
            licence: base.as_deref().map(licence_of).unwrap_or_default(),
            checkpoint: model.checkpoint,
            parameters: model.decoder.layout().len() as u64,
            dtype: dtype.name(),
            corpus: self.pipeline().corpus.source.clone(),
            tables: self.tables()?,
            recipe: resolved_text(self.pipeline())?,
        };
        let path = directory.join("README.md");
        Ok(std::fs::write(&path, card.to_markdown()).map_err(PipelineError::io(&path))?)
    }
}

/// `owner/name` on the Hub, or the last part of a path.
fn base_name(path: &str) -> String {
    match path.strip_prefix("hf://") {
        Some(reference) => reference.split('@').next().unwrap_or_default().to_owned(),
        None => directory_name(Path::new(path)),
    }
}

fn directory_name(path: &Path) -> String {
    path.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

fn hand_on(base: &Path, directory: &Path) -> Result<(), ModelError> {
    for name in HANDED_ON {
        let (from, to) = (base.join(name), directory.join(name));
        match std::fs::read(&from) {
            Ok(bytes) => std::fs::write(&to, bytes).map_err(|source| ModelError::Io { path: to, source })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(ModelError::Io { path: from, source }),
        }
    }
    Ok(())
}

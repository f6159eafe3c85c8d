//! A model of a run as a Hugging Face directory.

use super::directory::{RunDirectory, RunModel};
use super::error::PipelineError;
use super::run::resolved_text;
use crate::error::Error;
use crate::json;
use crate::model::{Decoder, Dtype, ModelError, SHARD_BYTES};
use crate::report::{ModelCard, licence_of};
use crate::tokenize::Tokenizer;
use std::path::{Path, PathBuf};

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
    /// Write the running average of the parameters instead of the last ones.
    pub average: bool,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            stage: None,
            step: None,
            dtype: None,
            shard_bytes: SHARD_BYTES,
            adapter: false,
            average: false,
        }
    }
}

/// Files of a base model's directory that say under which terms it stands: handed on as they are.
/// Which of them exist differs from model to model, here and below.
const TERMS: [&str; 4] = ["LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE"];

/// Files that belong to a base model's tokenizer and are handed on with it.
const OF_TOKENIZER: [&str; 8] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
];

impl RunDirectory {
    /// Writes a model of the run to a directory that transformers, vLLM and the converter of llama.cpp
    /// read: configuration, weights, the tokenizer's files and a model card. A Qwen2 whose tokenizer is
    /// not that of a base model is written as the Llama that computes the same.
    ///
    /// # Errors
    /// When there is no such checkpoint, or a file cannot be read or written.
    pub fn export(&self, directory: &Path, options: &ExportOptions) -> Result<(), Error> {
        let model = self.read_model(options.stage.as_deref(), options.step, options.average)?;
        if options.adapter && self.pipeline().model.lora.is_none() {
            let message = format!("the models of {} have no adapter", self.path().display());
            let hint = "leave out --adapter: the model itself is exported then".into();
            return Err(PipelineError::Missing { message, hint }.into());
        }
        let base = self.local_model()?;
        let card = self.model_card(&model, options, base.as_deref())?;
        if options.adapter {
            let named = |path: &PathBuf| hub_name(path).unwrap_or_else(|| path.display().to_string());
            let base = self.pipeline().model.path.as_ref().map(named);
            model.decoder.save_adapter(directory, &base.unwrap_or_default())?;
        } else {
            self.save_merged(model.decoder, directory, options, base.as_deref())?;
        }
        let path = directory.join("README.md");
        Ok(std::fs::write(&path, card.to_markdown()).map_err(PipelineError::io(&path))?)
    }

    fn save_merged(
        &self,
        decoder: Decoder,
        directory: &Path,
        options: &ExportOptions,
        base: Option<&Path>,
    ) -> Result<(), Error> {
        let (tokenizer, special) = self.tokenizer()?;
        let base_of_tokenizer = base.filter(|base| is_tokenizer_of(base, &tokenizer));
        // transformers 5 gives every model of type qwen2 the normalizer and pre-tokenizer of Qwen's own
        // tokenizer, whatever tokenizer.json says (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS): another
        // tokenizer's ids come out wrong. Of a Llama it reads tokenizer.json as it is.
        let decoder = if base_of_tokenizer.is_some() { decoder } else { decoder.qwen2_into_llama() };
        let dtype = options.dtype.unwrap_or(decoder.dtype());
        decoder.save_as(directory, dtype, options.shard_bytes, &special.ends(), special.bos)?;
        tokenizer.save(directory, &special)?;
        hand_on(base, directory, &TERMS)?;
        Ok(hand_on(base_of_tokenizer, directory, &OF_TOKENIZER)?)
    }

    fn model_card(
        &self,
        model: &RunModel,
        options: &ExportOptions,
        base: Option<&Path>,
    ) -> Result<ModelCard, Error> {
        let decoder = &model.decoder;
        let dtype = if options.adapter { Dtype::F32 } else { options.dtype.unwrap_or(decoder.dtype()) };
        // Where a local model lies is nobody's business.
        let named = |path: &PathBuf| hub_name(path).unwrap_or_else(|| directory_name(path));
        let layout = if options.adapter { decoder.trainable() } else { decoder.layout() };
        Ok(ModelCard {
            name: directory_name(self.path()),
            base: self.pipeline().model.path.as_ref().map(named),
            licence: base.map(licence_of).unwrap_or_default(),
            checkpoint: model.checkpoint.clone(),
            parameters: layout.len() as u64,
            adapter: options.adapter,
            average: options.average,
            dtype: dtype.name(),
            corpus: self.pipeline().corpus.place(),
            // They were measured with the last parameters.
            tables: if options.average { Vec::new() } else { self.tables()? },
            recipe: resolved_text(self.pipeline())?,
        })
    }
}

/// `owner/name` of a model on the Hub.
fn hub_name(path: &Path) -> Option<String> {
    Some(path.to_str()?.strip_prefix("hf://")?.split('@').next()?.to_owned())
}

fn directory_name(path: &Path) -> String {
    path.file_name().map_or_else(|| "model".into(), |name| name.to_string_lossy().into_owned())
}

/// Whether a tokenizer is the one in a model's directory.
fn is_tokenizer_of(base: &Path, tokenizer: &Tokenizer) -> bool {
    let own = json::read(&base.join("tokenizer.json"), json::VOCABULARY);
    own.is_ok_and(|own| blake3::hash(&own).to_hex().as_str() == tokenizer.fingerprint())
}

/// Copies those of the named files that the base has.
fn hand_on(base: Option<&Path>, directory: &Path, names: &[&str]) -> Result<(), ModelError> {
    let Some(base) = base else { return Ok(()) };
    for name in names {
        let (from, to) = (base.join(name), directory.join(name));
        match std::fs::read(&from) {
            Ok(bytes) => std::fs::write(&to, bytes).map_err(|source| ModelError::Io { path: to, source })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(source) => return Err(ModelError::Io { path: from, source }),
        }
    }
    Ok(())
}

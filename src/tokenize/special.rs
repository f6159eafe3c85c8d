//! Which tokens start a document and end a reply.

use super::{BOS, END, TokenizeError, Tokenizer};
use crate::config::TokenizerConfig;
use crate::json;
use serde_json::Value;
use std::path::Path;

/// The special tokens that prompts and replies need.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Ends a reply; a reply that is written (in traces) ends with it.
    pub eos: u32,
    /// Further tokens that end a sampled reply: some models have several.
    pub other_ends: Vec<u32>,
    /// Starts a document, if the tokenizer has such a token.
    pub bos: Option<u32>,
}

/// Ends of a reply by their usual names, most telling first.
const WELL_KNOWN_ENDS: [&str; 6] = ["<|im_end|>", "<|eot_id|>", END, "</s>", "<|endoftext|>", "<eos>"];

impl SpecialTokens {
    /// Finds the special tokens: those the pipeline names; else what the files beside the
    /// tokenizer say (`tokenizer_config.json`, then `config.json`, then `generation_config.json`);
    /// else a well-known name. Unless the pipeline names the end, all ends that `generation_config.json`
    /// (or, without it, `config.json`) lists count, as in transformers. `bos` is what the tokenizer itself puts before a text.
    ///
    /// # Errors
    /// Fails when a named token does not exist, a file is malformed, or no end token is found.
    pub fn resolve(tokenizer: &Tokenizer, config: &TokenizerConfig) -> Result<Self, TokenizeError> {
        let files = Beside::read(tokenizer.path())?;
        let eos = match &config.eos {
            Some(name) => Some(named(tokenizer, name, "tokenizer.eos")?),
            None => files
                .eos(tokenizer)?
                .or_else(|| WELL_KNOWN_ENDS.iter().find_map(|name| tokenizer.id_of(name))),
        };
        let bos = match &config.bos {
            Some(name) => Some(named(tokenizer, name, "tokenizer.bos")?),
            None => tokenizer.prefix().or_else(|| files.bos(tokenizer)).or_else(|| tokenizer.id_of(BOS)),
        };
        let eos = eos.ok_or_else(|| TokenizeError::NoEndToken { path: tokenizer.path().to_owned() })?;
        let other_ends = if config.eos.is_some() { Vec::new() } else { files.other_ends(tokenizer, eos)? };
        Ok(Self { eos, other_ends, bos })
    }

    /// Every token that ends a sampled reply, the main one first.
    pub fn ends(&self) -> Vec<u32> {
        std::iter::once(self.eos).chain(self.other_ends.iter().copied()).collect()
    }
}

fn named(tokenizer: &Tokenizer, name: &str, place: &str) -> Result<u32, TokenizeError> {
    let unknown = || TokenizeError::UnknownToken { place: place.to_owned(), token: format!("`{name}`") };
    tokenizer.id_of(name).ok_or_else(unknown)
}

/// The files beside a tokenizer.json; null where there is none.
struct Beside {
    tokenizer: Value,
    models: [(&'static str, Value); 2],
}

impl Beside {
    fn read(path: &Path) -> Result<Self, TokenizeError> {
        let model = |name| Ok((name, read_json(&path.with_file_name(name))?));
        Ok(Self {
            tokenizer: read_json(&path.with_file_name("tokenizer_config.json"))?,
            models: [model("config.json")?, model("generation_config.json")?],
        })
    }

    fn eos(&self, tokenizer: &Tokenizer) -> Result<Option<u32>, TokenizeError> {
        if let Some(name) = token_name(&self.tokenizer["eos_token"]) {
            return named(tokenizer, name, "tokenizer_config.json").map(Some);
        }
        for (file, json) in &self.models {
            // Some models end with any of several tokens; the first is the main one.
            let eos = &json["eos_token_id"];
            if let Some(id) = eos.as_u64().or_else(|| eos[0].as_u64()) {
                return known(tokenizer, id, file).map(Some);
            }
        }
        Ok(None)
    }

    /// What the last file that names ends says besides `main`.
    fn other_ends(&self, tokenizer: &Tokenizer, main: u32) -> Result<Vec<u32>, TokenizeError> {
        let named = self.models.iter().rev().find(|(_, json)| !json["eos_token_id"].is_null());
        let Some((file, json)) = named else { return Ok(Vec::new()) };
        let listed = json["eos_token_id"].as_array().cloned();
        let ids = listed.unwrap_or_else(|| vec![json["eos_token_id"].clone()]);
        let id = |id: &Value| match id.as_u64() {
            Some(id) => known(tokenizer, id, file),
            None => Err(TokenizeError::UnknownToken { place: (*file).to_owned(), token: id.to_string() }),
        };
        let ends: Result<Vec<u32>, _> = ids.iter().map(id).collect();
        Ok(ends?.into_iter().filter(|end| *end != main).collect())
    }

    /// Only where a file asks for it: many models name a start token that they never use.
    fn bos(&self, tokenizer: &Tokenizer) -> Option<u32> {
        let name = token_name(&self.tokenizer["bos_token"])?;
        if self.tokenizer["add_bos_token"] == true { tokenizer.id_of(name) } else { None }
    }
}

/// A token is written as its text or as an object with the text in `content`.
pub(super) fn token_name(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

fn known(tokenizer: &Tokenizer, id: u64, place: &str) -> Result<u32, TokenizeError> {
    let found = u32::try_from(id).ok().filter(|&id| tokenizer.name_of(id).is_some());
    found.ok_or_else(|| TokenizeError::UnknownToken { place: place.to_owned(), token: id.to_string() })
}

pub(super) fn read_json(path: &Path) -> Result<Value, TokenizeError> {
    match json::read(path, json::SETTINGS) {
        Ok(bytes) => json::parse(&bytes, json::SETTINGS)
            .map_err(|message| TokenizeError::Malformed { path: path.to_owned(), message }),
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) =>
        {
            Ok(Value::Null)
        }
        Err(error) => Err(TokenizeError::io(path)(error)),
    }
}

//! The tokenizer: two encoders over one vocabulary, and the bytes of every id.

use super::TokenizeError;
use super::bounds::{check, guarded};
use super::bytes::{ByteTable, Spelling};
use super::fast::{FastEncoder, FastPath, NASTY, Refutation};
use super::literal::{is_control, remove_lossy_settings, without_control_tokens};
use super::special::SpecialTokens;
use crate::json::{self, shortened};
use rayon::prelude::*;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use tokenizers::Tokenizer as Encoder;

/// A Hugging Face tokenizer with the bytes behind its ids.
pub struct Tokenizer {
    /// Where it came from, for messages and for the files beside it.
    path: PathBuf,
    /// The tokenizer.json as it was read.
    json: Vec<u8>,
    fingerprint: String,
    /// Recognises added tokens.
    control: Encoder,
    /// Takes control tokens for text.
    literal: Encoder,
    /// Does the same as `literal`; or what stands in the way.
    fast: Result<FastEncoder, String>,
    /// The first text for which it did not, whereupon it is not used any more.
    refuted: OnceLock<Refutation>,
    bytes: ByteTable,
    /// Token that the tokenizer itself puts before a text, if any.
    prefix: Option<u32>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("fingerprint", &self.fingerprint)
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// # Errors
    /// Fails when the file cannot be read, is not a tokenizer, asks for more than any published one
    /// does, gives added tokens other ids than it declares, or spells its tokens in a way whose
    /// bytes are unknown.
    pub fn load(path: &Path) -> Result<Self, TokenizeError> {
        let json = json::read(path, json::VOCABULARY).map_err(TokenizeError::io(path))?;
        Self::from_json(path, json)
    }

    /// Builds the tokenizer that the bytes of a tokenizer.json describe.
    pub(super) fn from_json(path: &Path, json: Vec<u8>) -> Result<Self, TokenizeError> {
        let malformed =
            |message| TokenizeError::Malformed { path: path.to_owned(), message: shortened(message) };
        let unsupported = |what| TokenizeError::Unsupported { path: path.to_owned(), what: shortened(what) };
        let mut value = json::parse(&json, json::VOCABULARY).map_err(malformed)?;
        if !value.is_object() || !value["model"].is_object() {
            return Err(malformed("not a JSON object with a model".into()));
        }
        check_model(&value).map_err(unsupported)?;
        let spelling = Spelling::detect(&value).map_err(unsupported)?;
        check(&value).map_err(malformed)?;
        remove_lossy_settings(&mut value);
        let prefix = own_prefix(&value["post_processor"]);
        // The bytes of ids and the prefix are read here, so the library needs neither part.
        value["post_processor"] = Value::Null;
        value["decoder"] = Value::Null;
        let control = encoder(&value).map_err(malformed)?;
        check_added_ids(path, &value, &control)?;
        let bytes = byte_table(&value, &control, spelling).map_err(malformed)?;
        let value = without_control_tokens(value);
        let mut literal = encoder(&value).map_err(malformed)?;
        literal.set_encode_special_tokens(true);
        let fast = FastEncoder::new(&value);
        let prefix = prefix.map(|id| known(id, &control)).transpose().map_err(malformed)?;
        let fingerprint = blake3::hash(&json).to_hex().to_string();
        let (path, refuted) = (path.to_owned(), OnceLock::new());
        let tokenizer = Self { path, json, fingerprint, control, literal, fast, refuted, bytes, prefix };
        tokenizer.prove_fast_path(NASTY);
        Ok(tokenizer)
    }

    /// Encodes text of a corpus: no token is added, and control tokens that occur are text.
    ///
    /// # Errors
    /// Fails when the tokenizer's own pattern gives up on the text.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>, TokenizeError> {
        match self.encode_fast(text) {
            Some(ids) => Ok(ids),
            None => encode(&self.literal, text),
        }
    }

    /// [`Self::encode_document`] of several texts, on all threads.
    pub fn encode_documents(&self, texts: &[&str]) -> Vec<Result<Vec<u32>, TokenizeError>> {
        texts.par_iter().map(|text| self.encode_document(text)).collect()
    }

    /// Who encodes documents, and why if it is the library.
    pub fn fast_path(&self) -> FastPath {
        match (&self.fast, self.refuted.get()) {
            (Err(reason), _) => FastPath::Unsupported { reason: reason.clone() },
            (_, Some(refutation)) => FastPath::Refuted { message: refutation.message.clone() },
            _ => FastPath::Active,
        }
    }

    /// Compares the crate's own encoder with the library, text for text, and gives it up for good
    /// should one id differ. Its caller is to show the message of [`FastPath::Refuted`].
    ///
    /// A few texts of its own are compared whenever a tokenizer is loaded. Texts that the library
    /// cannot encode prove nothing.
    pub fn prove_fast_path<'a>(&self, samples: impl IntoIterator<Item = &'a str>) -> FastPath {
        for text in samples {
            let Some(fast) = self.encode_fast(text) else { continue };
            let Ok(library) = encode(&self.literal, text) else { continue };
            if let Err(refutation) = Refutation::compare(text, &fast, &library) {
                // Of two threads that find one, the first is heard.
                let _ = self.refuted.set(refutation);
            }
        }
        self.fast_path()
    }

    /// None if the library is to encode a text.
    fn encode_fast(&self, text: &str) -> Option<Vec<u32>> {
        let fast = self.fast.as_ref().ok().filter(|_| self.refuted.get().is_none())?;
        fast.encode(text)
    }

    /// Encodes text of a prompt template: no token is added, and control tokens are recognised.
    ///
    /// # Errors
    /// Fails when the tokenizer's own pattern gives up on the text.
    pub fn encode_control(&self, text: &str) -> Result<Vec<u32>, TokenizeError> {
        encode(&self.control, text)
    }

    /// Bytes of text behind an id; none for ids that the vocabulary does not have.
    ///
    /// They may be part of a UTF-8 character only. For byte-level tokenizers without normaliser
    /// the bytes of an encoded document, put together, are the document.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id)
    }

    /// Bytes of a sequence of ids.
    pub fn decode_bytes(&self, ids: &[u32]) -> Vec<u8> {
        ids.iter().flat_map(|&id| self.token_bytes(id)).copied().collect()
    }

    /// Text of a sequence of ids; U+FFFD stands for bytes that are not UTF-8.
    pub fn decode_lossy(&self, ids: &[u32]) -> String {
        String::from_utf8_lossy(&self.decode_bytes(ids)).into_owned()
    }

    /// Number of ids: the highest one plus 1, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// Id of a token by its name in the vocabulary (byte-level spelling for ordinary tokens).
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.control.token_to_id(token)
    }

    /// Name of an id in the vocabulary.
    pub fn name_of(&self, id: u32) -> Option<String> {
        self.control.id_to_token(id)
    }

    /// Token that the tokenizer's own post-processor puts before a text, if any.
    pub(super) fn prefix(&self) -> Option<u32> {
        self.prefix
    }

    /// The file it was read from, or will be known by.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// BLAKE3 of the tokenizer.json, in hexadecimal.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Refuses a model with fewer embeddings than this tokenizer has ids. More are fine: models
    /// pad their vocabulary.
    ///
    /// # Errors
    /// Names both sizes.
    pub fn check_vocabulary(&self, model_vocab_size: usize) -> Result<(), TokenizeError> {
        if self.vocab_size() <= model_vocab_size {
            return Ok(());
        }
        Err(TokenizeError::VocabularyMismatch { highest: self.vocab_size() - 1, model: model_vocab_size })
    }

    /// Writes `tokenizer.json`, as it was read, and a small `tokenizer_config.json` that names
    /// the special tokens.
    ///
    /// # Errors
    /// Fails when a file cannot be written.
    pub fn save(&self, directory: &Path, special: &SpecialTokens) -> Result<(), TokenizeError> {
        let config = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": special.bos.and_then(|id| self.name_of(id)),
            "eos_token": self.name_of(special.eos),
            // Said, since transformers otherwise adds tokens of its own for them, past the model's vocabulary.
            "pad_token": self.name_of(special.eos),
            "unk_token": null,
            "clean_up_tokenization_spaces": false,
        });
        write_whole(&directory.join("tokenizer_config.json"), format!("{config:#}\n").as_bytes())?;
        // Last, since its presence says that the directory is complete.
        write_whole(&directory.join("tokenizer.json"), &self.json)
    }
}

fn encoder(json: &Value) -> Result<Encoder, String> {
    guarded(|| Encoder::from_bytes(json.to_string()))
}

fn encode(encoder: &Encoder, text: &str) -> Result<Vec<u32>, TokenizeError> {
    let encoding = guarded(|| encoder.encode_fast(text, false));
    let encoding = encoding.map_err(|message| TokenizeError::Encode { bytes: text.len(), message })?;
    Ok(encoding.get_ids().to_vec())
}

/// Only models whose tokens, put together, give the text back can serve.
fn check_model(json: &Value) -> Result<(), String> {
    let model = &json["model"];
    // Old files leave the type out; a vocabulary with merges is BPE.
    let kind = model["type"].as_str().unwrap_or(if model["merges"].is_array() { "BPE" } else { "unknown" });
    let affix = |key: &str| model[key].as_str().is_some_and(|affix| !affix.is_empty());
    if !matches!(kind, "BPE" | "Unigram") {
        Err(format!("its model is {kind}"))
    } else if affix("continuing_subword_prefix") || affix("end_of_word_suffix") {
        Err("its tokens carry a prefix or suffix that is not text".into())
    } else {
        Ok(())
    }
}

/// The library numbers added tokens in order of appearance, whatever ids they declare.
fn check_added_ids(path: &Path, json: &Value, encoder: &Encoder) -> Result<(), TokenizeError> {
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let (Some(token), Some(declared)) = (added["content"].as_str(), added["id"].as_u64()) else {
            continue;
        };
        let actual = encoder.token_to_id(token).map(u64::from);
        if let Some(actual) = actual.filter(|&actual| actual != declared) {
            return Err(TokenizeError::MovedToken {
                path: path.to_owned(),
                token: shortened(token.to_owned()),
                declared,
                actual,
            });
        }
    }
    Ok(())
}

/// A model holds its embedding in memory, so ids far beyond any real vocabulary are a broken file.
const MAX_VOCABULARY: usize = 1 << 24;

fn byte_table(json: &Value, encoder: &Encoder, spelling: Spelling) -> Result<ByteTable, String> {
    let entries = encoder.get_vocab(true);
    let size = entries.values().max().map_or(0, |&highest| highest as usize + 1);
    if size > MAX_VOCABULARY {
        return Err(format!("its highest token id is {}", size - 1));
    }
    let mut tokens = vec![Vec::new(); size];
    for (token, id) in entries {
        tokens[id as usize] = spelling.bytes(&token);
    }
    // Added tokens are matched in the text itself, so their content is their bytes. SentencePiece
    // spells its textual ones as any other piece.
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let content = added["content"].as_str().unwrap_or_default();
        if let Some(id) = encoder.token_to_id(content)
            && (spelling == Spelling::ByteLevel || is_control(added))
        {
            tokens[id as usize] = content.as_bytes().to_vec();
        }
    }
    Ok(ByteTable::new(tokens.iter().map(Vec::as_slice)))
}

/// The token that a post-processor puts before a text, if any.
fn own_prefix(processor: &Value) -> Option<u64> {
    match processor["type"].as_str()? {
        "TemplateProcessing" => {
            let first = processor["single"][0]["SpecialToken"]["id"].as_str()?;
            processor["special_tokens"][first]["ids"][0].as_u64()
        }
        "BertProcessing" | "RobertaProcessing" => processor["cls"][1].as_u64(),
        // Each one adds to what those before it made.
        "Sequence" => processor["processors"].as_array()?.iter().rev().find_map(own_prefix),
        _ => None,
    }
}

/// A prefix must be in the vocabulary.
fn known(id: u64, encoder: &Encoder) -> Result<u32, String> {
    let known = u32::try_from(id).ok().filter(|&id| encoder.id_to_token(id).is_some());
    known.ok_or_else(|| format!("its post-processor adds token {id}, which its vocabulary does not have"))
}

/// Writes under another name and renames, so that no half-written file is ever found.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), TokenizeError> {
    let partial = path.with_extension("json.partial");
    let written = std::fs::File::create(&partial).and_then(|mut file| {
        std::io::Write::write_all(&mut file, bytes)?;
        file.sync_all()
    });
    written.map_err(TokenizeError::io(&partial))?;
    std::fs::rename(&partial, path).map_err(TokenizeError::io(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenize::train_byte_level_bpe;

    #[test]
    fn an_encoder_that_differs_is_given_up_with_a_message() {
        let train = |word: &str| train_byte_level_bpe(std::iter::repeat_n(word.into(), 9), 300).unwrap();
        let (mut tokenizer, other) = (train("abcabc"), train("bcabca"));
        let library = encode(&tokenizer.literal, "abcabc").unwrap();
        assert_eq!(tokenizer.fast_path(), FastPath::Active);
        assert_eq!(tokenizer.encode_document("abcabc").unwrap(), library);
        tokenizer.fast = other.fast;
        assert_ne!(tokenizer.encode_document("abcabc").unwrap(), library);
        assert_eq!(tokenizer.prove_fast_path(["x", ""]), FastPath::Active);
        let FastPath::Refuted { message } = tokenizer.prove_fast_path(["x", "abcabc"]) else { panic!() };
        assert!(message.contains("abcabc") && message.contains("slowly"), "{message}");
        assert_eq!(tokenizer.encode_document("abcabc").unwrap(), library);
    }
}

//! The tokenizer: two encoders over one vocabulary, and the bytes of every id.

use super::TokenizeError;
use super::bytes::{ByteTable, Spelling};
use super::literal::{is_control, remove_lossy_settings, without_control_tokens};
use super::special::SpecialTokens;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
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
    /// Fails when the file cannot be read, is not a tokenizer, gives added tokens other ids than
    /// it declares, or spells its tokens in a way whose bytes are unknown.
    pub fn load(path: &Path) -> Result<Self, TokenizeError> {
        let json = std::fs::read(path).map_err(TokenizeError::io(path))?;
        Self::from_json(path, json)
    }

    /// Builds the tokenizer that the bytes of a tokenizer.json describe.
    pub(super) fn from_json(path: &Path, json: Vec<u8>) -> Result<Self, TokenizeError> {
        let malformed = |message: String| TokenizeError::Malformed { path: path.to_owned(), message };
        let unsupported = |what: String| TokenizeError::Unsupported { path: path.to_owned(), what };
        let mut value: Value = serde_json::from_slice(&json).map_err(|error| malformed(error.to_string()))?;
        if !value.is_object() {
            return Err(malformed("not a JSON object".into()));
        }
        check_model(&value).map_err(unsupported)?;
        let spelling = Spelling::detect(&value).map_err(unsupported)?;
        remove_lossy_settings(&mut value);
        let control = encoder(&value).map_err(malformed)?;
        check_added_ids(path, &value, &control)?;
        let bytes = byte_table(&value, &control, spelling).map_err(malformed)?;
        let mut literal = encoder(&without_control_tokens(value)).map_err(malformed)?;
        literal.set_encode_special_tokens(true);
        let prefix = own_prefix(&control);
        let fingerprint = blake3::hash(&json).to_hex().to_string();
        Ok(Self { path: path.to_owned(), json, fingerprint, control, literal, bytes, prefix })
    }

    /// Encodes text of a corpus: no token is added, and control tokens that occur are text.
    ///
    /// # Errors
    /// Fails when the tokenizer's own pattern gives up on the text.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>, TokenizeError> {
        encode(&self.literal, text)
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
            "clean_up_tokenization_spaces": false,
        });
        write_whole(&directory.join("tokenizer_config.json"), format!("{config:#}\n").as_bytes())?;
        // Last, since its presence says that the directory is complete.
        write_whole(&directory.join("tokenizer.json"), &self.json)
    }
}

fn encoder(json: &Value) -> Result<Encoder, String> {
    Encoder::from_bytes(json.to_string()).map_err(|error| error.to_string())
}

fn encode(encoder: &Encoder, text: &str) -> Result<Vec<u32>, TokenizeError> {
    match encoder.encode_fast(text, false) {
        Ok(encoding) => Ok(encoding.get_ids().to_vec()),
        Err(error) => Err(TokenizeError::Encode { bytes: text.len(), message: error.to_string() }),
    }
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
                token: token.to_owned(),
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

/// The first token of an encoding with special tokens, if encoding without them lacks it.
fn own_prefix(encoder: &Encoder) -> Option<u32> {
    let first = |special| encoder.encode_fast("a", special).ok()?.get_ids().first().copied();
    let prefix = first(true)?;
    (first(false) != Some(prefix)).then_some(prefix)
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

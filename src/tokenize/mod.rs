//! Text to token ids and back, byte for byte.
//!
//! A [`Tokenizer`] wraps a Hugging Face `tokenizer.json`. It knows two ways to encode, because a
//! corpus must not be able to speak to the model in control tokens:
//!
//! - [`Tokenizer::encode_document`]: what occurs in a document is text, even `<|im_end|>`;
//! - [`Tokenizer::encode_control`]: for prompt templates, where such names are control tokens.
//!
//! Documents are encoded by the crate's own encoder where it gives the library's ids, which is what
//! [`Tokenizer::prove_fast_path`] makes sure of; [`FastPath`] says so.
//!
//! And it knows the bytes behind every id ([`Tokenizer::token_bytes`]), taken from the vocabulary
//! itself. Rewards compare bytes, and re-encoding decoded text does not give the same tokens back.
//!
//! A [`ChatTemplate`] is how the model of a directory wants a conversation written.

mod bounds;
mod bytes;
mod chat;
mod chat_functions;
mod chat_meter;
mod fast;
mod literal;
mod special;
mod tokenizer;
mod train;

pub use chat::{ChatTemplate, Date, Message};
pub use fast::FastPath;
pub use special::SpecialTokens;
pub use tokenizer::Tokenizer;
pub use train::{BOS, END, THINK, THINK_END, train_byte_level_bpe};

use std::path::{Path, PathBuf};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum TokenizeError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not valid JSON, or not a tokenizer.
    #[error("{path}: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        message: String,
    },
    /// The tokenizer is valid, but the bytes behind its tokens cannot be known.
    #[error("{path}: cannot tell the bytes of its tokens: {what}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What stands in the way.
        what: String,
    },
    /// An added token declares an id that the vocabulary does not give it.
    #[error("{path}: added token `{token}` declares id {declared}, but its id is {actual}")]
    MovedToken {
        /// The file.
        path: PathBuf,
        /// The token's text.
        token: String,
        /// The id in the file.
        declared: u64,
        /// The id that encoding would give.
        actual: u64,
    },
    /// A special token that the pipeline or the model names is not in the vocabulary.
    #[error("{place}: token {token} is not in the tokenizer's vocabulary")]
    UnknownToken {
        /// Who names the token.
        place: String,
        /// Its text or id.
        token: String,
    },
    /// Nothing says which token ends a reply.
    #[error("{path}: no end-of-sequence token is known")]
    NoEndToken {
        /// The tokenizer.
        path: PathBuf,
    },
    /// The model has fewer embeddings than the tokenizer has ids.
    #[error("the tokenizer has ids up to {highest}, but the model's vocabulary has {model} entries")]
    VocabularyMismatch {
        /// Highest id of the tokenizer.
        highest: usize,
        /// Rows of the model's embedding.
        model: usize,
    },
    /// A text could not be encoded.
    #[error("a text of {bytes} bytes could not be encoded: {message}")]
    Encode {
        /// Size of the text.
        bytes: usize,
        /// What the tokenizer said.
        message: String,
    },
    /// A chat template cannot be read, or refuses what it is given.
    #[error("{path}: the chat template: {message}")]
    Template {
        /// The file that the template stands in.
        path: PathBuf,
        /// What the template or its engine said.
        message: String,
    },
    /// A chat template takes more time or memory than any published one needs.
    #[error("{path}: the chat template exceeds a limit: {limit}")]
    TemplateLimit {
        /// The file that the template stands in.
        path: PathBuf,
        /// The limit.
        limit: String,
    },
    /// A tokenizer of the requested size cannot be trained.
    #[error("cannot train a tokenizer with {vocab_size} ids: {reason}")]
    Train {
        /// The requested size.
        vocab_size: usize,
        /// What stands in the way.
        reason: String,
    },
}

impl TokenizeError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                Some("point `tokenizer.path` at a tokenizer.json, or give `[tokenizer.train]`".into())
            }
            Self::Malformed { .. } => Some(
                "a `tokenizer.json` as the Hugging Face `tokenizers` library writes it is expected".into(),
            ),
            Self::Unsupported { .. } => Some(
                "byte-level BPE (GPT-2, Llama 3, Qwen, DeepSeek) and SentencePiece-style BPE or Unigram \
                 tokenizers are supported"
                    .into(),
            ),
            Self::MovedToken { .. } => {
                Some("save the tokenizer again with a current `tokenizers` library".into())
            }
            Self::UnknownToken { .. } => {
                Some("check `tokenizer.eos` and `tokenizer.bos` against tokenizer.json".into())
            }
            Self::NoEndToken { .. } => {
                Some("set `tokenizer.eos` to the text of the token that ends a reply".into())
            }
            Self::VocabularyMismatch { .. } => {
                Some("model and tokenizer do not belong together: take both from one directory".into())
            }
            Self::Template { .. } | Self::TemplateLimit { .. } => Some(
                "check the chat template beside the tokenizer, or use `tasks.template = \"plain\"`".into(),
            ),
            Self::Train { .. } => Some("raise `tokenizer.train.vocab_size`".into()),
            Self::Io { .. } | Self::Encode { .. } => None,
        }
    }

    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

//! The decoder of the Qwen2 / Qwen3 / Llama family: configuration, weights, a forward pass that
//! rollout and training share, and an explicit backward pass.

mod backward;
mod cache;
mod carried;
mod config;
mod decoder;
#[cfg(feature = "cuda")]
pub mod device;
mod files;
mod forest;
mod init;
mod layout;
mod lora;
mod peft;
mod placement;
mod schedule;
mod sequence;
mod tensors;
mod weights;

pub use crate::kernels::dtype::{Dtype, Products};
pub use crate::kernels::head::{TokenGradient, TokenScore};
pub use backward::Targets;
pub use cache::{Extension, KvCache, NodeId};
pub use carried::{Carried, PrefixGradients};
pub use config::{Architecture, DecoderConfig, Llama3, RopeScaling, Yarn};
pub use decoder::{Decoder, Tape, Workspace};
pub use files::{SHARD_BYTES, directory_digest};
pub use forest::{Forest, Segment};
pub use layout::{Layout, Parameter, Role};
pub use lora::{LoraShape, MODULES};
pub(crate) use placement::on_device;
pub use placement::{DeviceName, DeviceSettings, OnDevice};
pub use schedule::{Part, Schedule};

use std::path::{Path, PathBuf};

/// Why a model could not be loaded, saved or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// config.json is not what it should be.
    #[error("{path}: {message}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// The configuration asks for something that is not implemented and would change results.
    #[error("{path}: {what} is not supported")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The architecture or field, with its value.
        what: String,
    },
    /// The tensors do not fit the configuration; every problem is listed.
    #[error("{path}: weights do not fit config.json: {}", listed(problems))]
    Weights {
        /// The file or directory.
        path: PathBuf,
        /// One line for each problem.
        problems: Vec<String>,
    },
    /// A sequence is longer than the model's positions.
    #[error("a sequence of {length} tokens does not fit a model of {limit} positions")]
    TooLong {
        /// Tokens of the sequence.
        length: usize,
        /// Positions of the model.
        limit: usize,
    },
    /// A sequence is longer than dynamic rotary embedding leaves unchanged.
    #[error(
        "a sequence of {length} tokens is longer than the {limit} positions that rope_type \"dynamic\" leaves \
         unchanged: past them a token's rotation would depend on the tokens after it, and decoding would not \
         equal prefill"
    )]
    DynamicRotary {
        /// Tokens of the sequence.
        length: usize,
        /// Positions of the model.
        limit: usize,
    },
    /// Weights of another format than bf16 cannot have products of bf16.
    #[error("weights of {dtype} cannot be multiplied as bf16")]
    Products {
        /// Their format.
        dtype: &'static str,
    },
    /// The weights' format has no kernels on a device.
    #[error("weights of {dtype} cannot be used on a CUDA device")]
    DeviceDtype {
        /// Their format.
        dtype: &'static str,
    },
    /// Keys and values of the weights' format cannot be cached as fp8.
    #[error("keys and values of a model of {dtype} cannot be cached as fp8")]
    CacheDtype {
        /// The weights' format.
        dtype: &'static str,
    },
    /// A CUDA device was asked for, and this program cannot use one.
    #[error("this rpt was built without CUDA")]
    NoCuda,
    /// A CUDA device failed or could not be had.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] crate::cuda::CudaError),
    /// A batch cannot be laid out on a device.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Forest(#[from] crate::cuda::forest::ForestError),
    /// A prompt holds no token.
    #[error("prompt {ordinal} holds no token to continue")]
    EmptyPrompt {
        /// Ordinal of the prompt's task.
        ordinal: u64,
    },
    /// A token id is outside the vocabulary.
    #[error("token id {id} is outside the model's vocabulary of {vocabulary}")]
    BadToken {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
}

/// Problems that a message lists.
const LISTED_PROBLEMS: usize = 20;

/// Some problems in a line; how many more there are.
fn listed(problems: &[String]) -> String {
    let shown = problems[..problems.len().min(LISTED_PROBLEMS)].join("; ");
    match problems.len().saturating_sub(LISTED_PROBLEMS) {
        0 => shown,
        more => format!("{shown}; and {more} more"),
    }
}

impl ModelError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_path_buf(), source }
    }

    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => Some(
                "a model directory holds config.json, model.safetensors (or shards with \
                 model.safetensors.index.json) and tokenizer.json"
                    .into(),
            ),
            Self::Unsupported { .. } => {
                Some("dense Qwen2, Qwen3 and Llama decoders in full precision are supported, with rotary embedding of \
                     type default, linear, dynamic, yarn or llama3".into())
            }
            Self::TooLong { .. } | Self::DynamicRotary { .. } => Some(
                "lower tasks.max_document_tokens or rollout.max_new_tokens, or use a model with more positions"
                    .into(),
            ),
            Self::Products { .. } => Some("set model.dtype (--dtype) to bf16 as well".into()),
            Self::DeviceDtype { .. } => Some("set model.dtype (--dtype) to bf16 or f32".into()),
            Self::CacheDtype { .. } => {
                Some("set model.dtype (--dtype) to bf16, or leave rollout.kv_cache out".into())
            }
            Self::NoCuda => Some(
                "build it with --features cuda (README: CUDA), or use device = \"cpu\"".into(),
            ),
            #[cfg(feature = "cuda")]
            Self::Cuda(error) => error.hint(),
            #[cfg(feature = "cuda")]
            Self::Forest(error) => Some(error.hint()),
            Self::EmptyPrompt { .. } => {
                Some("give some text, or use a tokenizer with a start token (tokenizer.bos)".into())
            }
            Self::BadToken { .. } => {
                Some("tokenizer and model do not belong together: check tokenizer.path".into())
            }
            _ => None,
        }
    }
}

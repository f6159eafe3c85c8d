//! The library's error: one variant per room, each with advice where there is any.

use crate::checkpoint::CheckpointError;
use crate::config::ConfigError;
use crate::corpus::CorpusError;
#[cfg(feature = "cuda")]
use crate::cuda::CudaError;
use crate::hub::HubError;
use crate::ledger::LedgerError;
use crate::model::ModelError;
use crate::pipeline::PipelineError;
use crate::report::ReportError;
use crate::tasks::TasksError;
use crate::tokenize::TokenizeError;
use crate::train::TrainError;

/// Result of a fallible library call.
pub type Result<T> = std::result::Result<T, Error>;

/// Anything that can go wrong in the library.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A pipeline file was refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A model or dataset of the Hugging Face Hub could not be had.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The corpus could not be read.
    #[error(transparent)]
    Corpus(#[from] CorpusError),
    /// A tokenizer could not be loaded or trained.
    #[error(transparent)]
    Tokenize(#[from] TokenizeError),
    /// Tasks could not be built or read.
    #[error(transparent)]
    Tasks(#[from] TasksError),
    /// A model could not be loaded or run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A GPU could not be had, or did not do what was asked.
    #[cfg(feature = "cuda")]
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// A checkpoint could not be written or read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The ledger does not balance or could not be kept.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// Metrics or a report could not be written.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// An update failed.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// A run stopped between its parts.
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
}

impl Error {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Config(error) => error.hint(),
            Self::Hub(error) => error.hint(),
            Self::Corpus(error) => error.hint(),
            Self::Tokenize(error) => error.hint(),
            Self::Tasks(error) => error.hint(),
            Self::Model(error) => error.hint(),
            #[cfg(feature = "cuda")]
            Self::Cuda(error) => error.hint(),
            Self::Checkpoint(error) => error.hint(),
            Self::Ledger(error) => error.hint(),
            Self::Report(error) => error.hint(),
            Self::Train(error) => error.hint(),
            Self::Pipeline(error) => error.hint(),
        }
    }

    /// Exit code for scripts: 2 for a pipeline file or reference that must change, 75 for an interrupted run
    /// that goes on when it is run again, 1 for everything else.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::Hub(HubError::Reference { .. }) => 2,
            Self::Pipeline(PipelineError::Interrupted { .. }) | Self::Hub(HubError::Interrupted { .. }) => 75,
            _ => 1,
        }
    }
}

//! What a run shows of itself: metrics, rollouts, progress, and a report to read afterwards.
//!
//! This room does not know how figures are made. It shows what it finds, and a figure that is
//! absent leaves out its curve. The names below are all that writers and the report agree on:
//!
//! | key of a metrics line | is |
//! |---|---|
//! | `stage`, `step` | the stage's name, and its step counted from 1 (both always present) |
//! | `reward`, `reward/LABEL` | mean reward, also of positions with a label |
//! | `accuracy`, `accuracy/LABEL` | share of right predictions, also at positions with a label |
//! | `thought_tokens` | mean length of the thoughts in tokens |
//! | `entropy` | mean entropy of the policy in nats per token |
//! | `zero_variance` | share of groups whose rollouts all earned the same reward |
//! | `loss`, `loss/PART` | the loss that is minimised, and its parts |
//! | `gradient_norm` | global norm of the gradient before clipping |
//! | `logprob_gap` | largest difference between the engine's and the trainer's log-probability |
//! | `logprob_gap/mean`, `logprob_gap/large` | its mean over the tokens, and the share of tokens above 0.01 |
//! | `out_of_memory_retries` | updates and rollouts begun again with less memory (absent where there are none) |
//! | `outcome/NAME` | rollouts with that outcome (a count or a share: the chart normalises) |
//! | `seconds/PHASE` | wall-clock seconds of a phase of the step |
//!
//! Other keys are kept in the file and not drawn. Keys that start with `seconds` are the only ones
//! that may hold wall-clock figures: all others must come out the same when a run is repeated.

mod curves;
mod data;
mod files;
mod html;
mod html_rollouts;
mod html_table;
mod log;
mod metrics;
mod model_card;
mod panels;
mod progress;
mod rollout_columns;
mod rollout_log;
mod rollout_reader;
mod svg;
mod table;

pub use curves::{Curves, StageCurves};
pub use data::{DataSummary, Histogram};
pub use html::{ReportInput, render_report, write_report};
pub use log::Log;
pub use metrics::{MetricValue, Metrics, MetricsLog};
pub use model_card::{ModelCard, licence_of};
pub use progress::Progress;
pub use rollout_log::{RolloutLog, RolloutRow};
pub use rollout_reader::{RolloutRows, read_rows, sample_rows};
pub use table::{Table, TableLabel, TableRow, table_text};

use std::error::Error as _;
use std::io::ErrorKind;
use std::path::PathBuf;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line of a metrics file is not one that this program writes.
    #[error("{path}: line {line}: {reason}")]
    MetricsLine {
        /// The metrics file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// A metrics file does not reach the position that a checkpoint recorded, or has no line end there.
    #[error(
        "{path}: the checkpoint was written when this file had {expected} bytes; it has {found} bytes{}",
        if found >= expected { " and no line ends at that position" } else { "" }
    )]
    MetricsPosition {
        /// The metrics file.
        path: PathBuf,
        /// Bytes that the checkpoint recorded.
        expected: u64,
        /// Bytes that the file has.
        found: u64,
    },
    /// A file of the rollout log could not be written or decoded.
    #[error("{path}: {source}")]
    Parquet {
        /// The parquet file.
        path: PathBuf,
        /// What the parquet library said.
        source: parquet::errors::ParquetError,
    },
    /// A column of a rollout file is absent, has another type, or holds nulls where none may be.
    #[error("{path}: column `{column}` is not a {expected}")]
    RolloutColumn {
        /// The parquet file.
        path: PathBuf,
        /// The column.
        column: &'static str,
        /// The type that it must have.
        expected: &'static str,
    },
    /// A segment of the rollout log holds steps on both sides of the checkpoint.
    #[error(
        "{path}: the segment reaches past step {step}, where the run resumes, but does not start after it"
    )]
    SegmentStraddles {
        /// The parquet file.
        path: PathBuf,
        /// Step of the checkpoint.
        step: u64,
    },
    /// The last step of a segment of the rollout log comes before its first.
    #[error("{directory}: a segment from step {first} to step {last} cannot be written")]
    SegmentReversed {
        /// Directory of the rollout log.
        directory: PathBuf,
        /// First step.
        first: u64,
        /// Last step.
        last: u64,
    },
}

impl ReportError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        let advice = match self {
            Self::Io { .. } | Self::Parquet { .. } => return self.system_hint(),
            Self::MetricsLine { .. } => "delete that line if it was edited by hand; its figures are lost",
            Self::MetricsPosition { .. } => {
                "put the file back as the run left it, or resume from an older checkpoint"
            }
            Self::RolloutColumn { .. } => "the rollout directory may hold only files that `rpt` wrote",
            Self::SegmentStraddles { .. } => {
                "segments end at checkpoints; move this file out of the rollout directory to go on without it"
            }
            Self::SegmentReversed { .. } => return None,
        };
        Some(advice.to_owned())
    }

    /// Advice that follows from the kind of the system's error, wherever it is wrapped.
    fn system_hint(&self) -> Option<String> {
        let advice = match self.system_kind()? {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                "disk full: free some space or move the run directory, then run the same command again; it resumes"
            }
            ErrorKind::PermissionDenied => "check who owns the run directory and whether it may be written",
            ErrorKind::NotFound => "check the path; was the run directory moved or removed?",
            _ => return None,
        };
        Some(advice.to_owned())
    }

    fn system_kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Io { source, .. } => Some(source.kind()),
            Self::Parquet { source, .. } => {
                source.source()?.downcast_ref::<std::io::Error>().map(std::io::Error::kind)
            }
            _ => None,
        }
    }
}

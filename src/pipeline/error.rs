//! Why a run stopped.

use std::path::PathBuf;

/// What went wrong between the stages.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the run directory is not what it should be.
    #[error("{path}: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A signal asked for a stop; what is done so far is saved.
    #[error("interrupted {place}; everything up to there is saved")]
    Interrupted {
        /// After what, in words.
        place: String,
    },
    /// The run directory holds another pipeline's run.
    #[error("{directory} holds a run of another pipeline: {differences}")]
    ForeignRun {
        /// The directory.
        directory: PathBuf,
        /// The first keys that differ.
        differences: String,
    },
    /// A corpus or model is not the one that the run began with.
    #[error("{name} has changed since this run began")]
    InputChanged {
        /// The corpus's source or the model's directory.
        name: String,
    },
    /// The directory holds something that is not a run.
    #[error("{directory} is not empty and holds no run")]
    NotARun {
        /// The directory.
        directory: PathBuf,
    },
    /// The model starts the reinforcement stage with too little skill.
    #[error(
        "the reinforcement stage cannot start: its first step earned a mean reward of {reward:.4} \
         (at least {min_reward}) with {mixed:.1} % of groups both right and wrong (at least {min_mixed:.1} %)"
    )]
    TooLittleSkill {
        /// Mean reward of the first step.
        reward: f64,
        /// Smallest mean reward that was asked for.
        min_reward: f32,
        /// Percentage of groups with both right and wrong rollouts.
        mixed: f64,
        /// Smallest percentage that was asked for.
        min_mixed: f64,
    },
    /// Thinking collapsed and `run.stop_on_collapse` is set.
    #[error("thinking collapsed at step {step}: {symptom}")]
    Collapsed {
        /// The step.
        step: u64,
        /// What was seen.
        symptom: String,
    },
    /// Engine and trainer disagree about what was sampled.
    #[error(
        "at step {step} the log-probabilities of engine and trainer differ by {gap:.4} a token, and train.max_logprob_gap \
         is {limit}"
    )]
    LogprobGap {
        /// The step.
        step: u64,
        /// Mean difference without its sign.
        gap: f64,
        /// The limit.
        limit: f32,
    },
    /// The pipeline lacks something that the command needs.
    #[error("{message}")]
    Missing {
        /// What is missing.
        message: String,
        /// What to do.
        hint: String,
    },
}

impl PipelineError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                "the disk is full: free space (older checkpoints may go) and run the same command again".into()
            }
            Self::Io { .. } | Self::Malformed { .. } => return None,
            Self::Interrupted { .. } => "run the same command again to go on".into(),
            Self::InputChanged { .. } => {
                "restore the files, or choose another directory with --out to start with the new files".into()
            }
            Self::ForeignRun { .. } => {
                "choose another directory with --out, or remove this one to start over".into()
            }
            Self::NotARun { .. } => "choose an empty or new directory with --out".into(),
            Self::TooLittleSkill { .. } => {
                "train the cold start longer (cold_start.steps), choose easier positions (tasks.max_entropy), or \
                 lower train.min_initial_reward and train.min_initial_mixed_groups; a changed pipeline needs a \
                 directory of its own (--out)"
                    .into()
            }
            Self::Collapsed { .. } => {
                "lower train.optimizer.learning_rate or tasks.max_entropy: unpredictable positions teach that \
                 thinking is useless"
                    .into()
            }
            Self::LogprobGap { .. } => {
                "set model.batch_invariant = true, which takes the difference away, or train.importance_cap = 2.0, which \
                 corrects for it, with a higher limit; rollout.kv_cache = \"fp8\" adds to it"
                    .into()
            }
            Self::Missing { hint, .. } => hint.clone(),
        })
    }

    /// Makes an [`PipelineError::Io`] for a path.
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

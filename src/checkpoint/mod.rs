//! Room under construction.

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: std::path::PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl CheckpointError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        None
    }
}

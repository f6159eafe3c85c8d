//! A model directory of the process, into which the targets put what is to be read.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A decoder of 144 parameters.
pub const CONFIG: &str = r#"{"model_type": "llama", "vocab_size": 4, "hidden_size": 4, "intermediate_size": 4,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2,
    "max_position_embeddings": 8, "tie_word_embeddings": true}"#;

/// The directory.
pub fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let path = std::env::temp_dir().join(format!("rpt-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a place for the files");
        path
    })
}

/// Puts a file into the directory.
pub fn write(name: &str, bytes: &[u8]) {
    std::fs::write(directory().join(name), bytes).expect("room for the files");
}

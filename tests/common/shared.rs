//! Material that lies beside the repository. What needs it says so loudly where it is absent.
#![allow(dead_code, clippy::unwrap_used, clippy::print_stderr, missing_docs)]

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Row, RowAccessor};
use std::fs::File;
use std::path::PathBuf;

/// A path of the shared material, or `None` (said loudly) where it is absent.
pub(crate) fn path(relative: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared").join(relative);
    if path.exists() {
        return Some(path);
    }
    eprintln!("SKIPPED: {} is not here; this check needs it", path.display());
    None
}

/// The text column of a shared parquet file, row by row; nothing where it is absent.
pub(crate) fn texts(file: &str) -> Vec<String> {
    let Some(path) = path(&format!("corpora/{file}")) else { return Vec::new() };
    let reader = SerializedFileReader::new(File::open(path).unwrap()).unwrap();
    let text = |row: Row| {
        let (place, _) = row.get_column_iter().enumerate().find(|(_, (name, _))| *name == "text").unwrap();
        row.get_string(place).unwrap().clone()
    };
    reader.get_row_iter(None).unwrap().map(|row| text(row.unwrap())).collect()
}

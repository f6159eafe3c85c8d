//! What the files of a corpus say of themselves.

use super::reader::Corpus;
use super::shard::Shard;
use super::source::SourceFile;
use serde::Serialize;
use std::path::PathBuf;

/// One file of a corpus, by its own account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileSummary {
    /// The file, or its address in a store.
    pub file: PathBuf,
    /// Its length.
    pub bytes: Option<u64>,
    /// Rows; lines are not counted before they are read.
    pub rows: Option<u64>,
    /// Names and types of its top-level columns, or the keys of its first object.
    #[serde(skip)]
    pub columns: Vec<(String, String)>,
}

impl Corpus {
    /// What the first `count` files say of themselves; of a file that cannot be read, its name.
    pub fn summaries(&self, count: usize) -> Vec<FileSummary> {
        self.source_files().iter().take(count).map(summary).collect()
    }
}

fn summary(file: &SourceFile) -> FileSummary {
    let shard = Shard::open(file).ok();
    let (bytes, rows, columns) = match &shard {
        Some(Shard::Parquet(parquet)) => {
            let fields = parquet.schema().fields().iter();
            let columns = fields.map(|field| (field.name().clone(), field.data_type().to_string()));
            (Some(parquet.length()), Some(parquet.first_row(parquet.row_groups())), columns.collect())
        }
        Some(Shard::Lines(lines)) => {
            let columns = lines.first_keys().into_iter().map(|key| (key, "JSON".into()));
            (Some(lines.length()), None, columns.collect())
        }
        None => (None, None, Vec::new()),
    };
    FileSummary { file: file.path.clone(), bytes, rows, columns }
}

//! One file of a corpus, read so that no damage in it can do more than return an error.

use super::blob::Blob;
use super::columns::{Columns, Rows};
use super::error::CorpusError;
use super::guard::guarded;
use super::json_lines::{Lines, LinesFile};
use super::row_groups::{ParquetFile, RecordBatches};
use super::source::{Format, SourceFile};
use std::path::Path;

/// An open file: parquet with its footer, or JSON lines, which are one row group.
pub(super) enum Shard {
    Parquet(ParquetFile),
    Lines(LinesFile),
}

impl Shard {
    /// Opens a file and reads its footer, if it has one, or says why that is not possible.
    pub(super) fn open(file: &SourceFile) -> Result<Self, String> {
        let blob = Blob::open(file).map_err(|error| error.to_string())?;
        Ok(match file.format() {
            Format::Parquet => Self::Parquet(ParquetFile::open(blob)?),
            Format::Lines(compression) => Self::Lines(LinesFile::new(blob, compression)),
        })
    }

    pub(super) fn row_groups(&self) -> usize {
        match self {
            Self::Parquet(file) => file.row_groups(),
            Self::Lines(_) => 1,
        }
    }

    /// Row of the file at which a row group starts, by the footer's account.
    pub(super) fn first_row(&self, row_group: usize) -> u64 {
        match self {
            Self::Parquet(file) => file.first_row(row_group),
            Self::Lines(_) => 0,
        }
    }

    /// Uncompressed bytes of the columns in a row group, by the footer's account; of lines, the file's length.
    pub(super) fn bytes(&self, row_group: usize, columns: &Columns) -> u64 {
        match self {
            Self::Parquet(file) => file.bytes(row_group, &file.mask(&columns.paths())),
            Self::Lines(file) => file.length(),
        }
    }

    /// Finds the columns of documents. Lines are told apart only when they are read.
    pub(super) fn columns(&self, path: &Path, text: &str, id: Option<&str>) -> Result<Columns, CorpusError> {
        match self {
            Self::Parquet(file) => Columns::find(file.schema(), path, text, id),
            Self::Lines(_) => Ok(Columns::keys(text, id)),
        }
    }

    /// Checks that the first lines have the columns, of which a parquet file's footer tells beforehand.
    pub(super) fn check(&self, path: &Path, columns: &Columns) -> Result<(), CorpusError> {
        match self {
            Self::Parquet(_) => Ok(()),
            Self::Lines(file) => file.check(path, columns),
        }
    }

    /// Reads a row group from `offset` rows on.
    ///
    /// The rows before are decoded as well, and left out: pages that are skipped instead may count their
    /// rows otherwise, where they are damaged, and a restart must not differ.
    pub(super) fn batches(
        &self,
        row_group: usize,
        columns: &Columns,
        offset: usize,
    ) -> Result<Batches, String> {
        Ok(match self {
            Self::Parquet(file) => {
                let mask = file.mask(&columns.paths());
                Batches::Parquet { read: file.batches(row_group, &mask, 0, None)?, offset }
            }
            Self::Lines(file) => Batches::Lines(file.lines(columns, offset)?),
        })
    }

    /// The next rows of a row group, or nothing after the last.
    ///
    /// A batch that cannot be decoded, or takes too much memory, is decoded again row by row: every row
    /// before the damage is delivered. After an error the batches must not be used again.
    pub(super) fn advance(
        &self,
        row_group: usize,
        columns: &Columns,
        batches: &mut Batches,
    ) -> Result<Option<Rows>, String> {
        let (file, read, offset) = match (self, batches) {
            (Self::Parquet(file), Batches::Parquet { read, offset }) => (file, read, *offset),
            (_, Batches::Lines(lines)) => return guarded(|| lines.advance()),
            (Self::Lines(_), Batches::Parquet { .. }) => return Err("the batches are of another file".into()),
        };
        loop {
            let start = read.position();
            let mut rows = decode(columns, read);
            if rows.is_err() && !read.is_single() {
                *read = file.batches(row_group, &file.mask(&columns.paths()), start, Some(1))?;
                rows = decode(columns, read);
            }
            match rows? {
                Some(rows) if rows.end() <= offset => {}
                rows => return Ok(rows),
            }
        }
    }
}

fn decode(columns: &Columns, batches: &mut RecordBatches) -> Result<Option<Rows>, String> {
    let Some((start, batch)) = batches.advance()? else { return Ok(None) };
    columns.rows(start, &batch).map(Some)
}

/// What is left of one row group.
pub(super) enum Batches {
    /// What is left of the whole row group, of which the first `offset` rows are not wanted.
    Parquet {
        read: RecordBatches,
        offset: usize,
    },
    Lines(Lines),
}

//! One parquet file, read so that no damage in it can do more than return an error.

use arrow::array::RecordBatch;
use arrow::datatypes::Schema;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use parquet::file::metadata::RowGroupMetaData;
use std::any::Any;
use std::fmt::Display;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Rows decoded at a time: the bound on a reader's memory is so many documents.
pub(super) const BATCH_ROWS: usize = 256;

/// An open parquet file with its footer.
pub(super) struct Shard {
    file: File,
    length: u64,
    metadata: ArrowReaderMetadata,
}

impl Shard {
    /// Opens a file and reads its footer, or says why that is not possible.
    ///
    /// The Arrow schema that some writers embed is ignored: parquet's own types make every kind of
    /// string column (large, view, dictionary) look the same.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let file = File::open(path).map_err(|error| error.to_string())?;
        let length = file.metadata().map_err(|error| error.to_string())?.len();
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let metadata = guarded(|| ArrowReaderMetadata::load(&file, options))?;
        Ok(Self { file, length, metadata })
    }

    pub(super) fn schema(&self) -> &Schema {
        self.metadata.schema()
    }

    pub(super) fn row_groups(&self) -> usize {
        self.metadata.metadata().num_row_groups()
    }

    /// Row of the file at which a row group starts, by the footer's account.
    pub(super) fn first_row(&self, row_group: usize) -> u64 {
        let before = self.metadata.metadata().row_groups().iter().take(row_group);
        before.fold(0, |rows, group| rows.saturating_add(u64::try_from(group.num_rows()).unwrap_or(0)))
    }

    /// Uncompressed bytes of top-level columns in a row group, by the footer's account.
    pub(super) fn bytes(&self, row_group: usize, roots: &[usize]) -> u64 {
        let mask = ProjectionMask::roots(self.metadata.parquet_schema(), roots.iter().copied());
        let chunks = self.metadata.metadata().row_group(row_group).columns().iter().enumerate();
        let included = chunks.filter(|(index, _)| mask.leaf_included(*index));
        let sizes = included.map(|(_, chunk)| u64::try_from(chunk.uncompressed_size()).unwrap_or(0));
        sizes.fold(0, u64::saturating_add)
    }

    /// Reads a row group from `offset` rows on, only the given top-level columns.
    pub(super) fn batches(
        &self,
        row_group: usize,
        roots: &[usize],
        offset: usize,
    ) -> Result<Batches, String> {
        let group = self.metadata.metadata().row_group(row_group);
        let rows = usize::try_from(group.num_rows())
            .map_err(|_| format!("the footer claims {} rows", group.num_rows()))?;
        let mask = ProjectionMask::roots(self.metadata.parquet_schema(), roots.iter().copied());
        check_chunks(group, &mask, self.length)?;
        let file = self.file.try_clone().map_err(|error| error.to_string())?;
        let reader = guarded(|| {
            ParquetRecordBatchReaderBuilder::new_with_metadata(file, self.metadata.clone())
                .with_row_groups(vec![row_group])
                .with_projection(mask)
                .with_batch_size(BATCH_ROWS)
                .with_offset(offset)
                .build()
        })?;
        Ok(Batches { reader, read: offset, rows })
    }
}

/// Column chunks must lie inside the file: their lengths decide how much is read into memory.
fn check_chunks(group: &RowGroupMetaData, mask: &ProjectionMask, length: u64) -> Result<(), String> {
    for (index, chunk) in group.columns().iter().enumerate().filter(|(index, _)| mask.leaf_included(*index)) {
        let start = chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset());
        let end = start.checked_add(chunk.compressed_size()).and_then(|end| u64::try_from(end).ok());
        let inside = start >= 0 && chunk.compressed_size() >= 0 && end.is_some_and(|end| end <= length);
        if !inside {
            return Err(format!(
                "column chunk {index} claims {} bytes at {start} of {length}",
                chunk.compressed_size()
            ));
        }
    }
    Ok(())
}

/// The record batches of one row group.
pub(super) struct Batches {
    reader: ParquetRecordBatchReader,
    read: usize,
    rows: usize,
}

impl Batches {
    /// The next batch with the row of the group at which it starts, or nothing after the last.
    ///
    /// After an error the reader must not be used again.
    pub(super) fn advance(&mut self) -> Result<Option<(usize, RecordBatch)>, String> {
        let reader = &mut self.reader;
        let Some(batch) = guarded(|| reader.next().transpose())? else {
            let complete = self.read == self.rows;
            return if complete {
                Ok(None)
            } else {
                Err(format!("{} of {} rows are there", self.read, self.rows))
            };
        };
        let start = self.read;
        self.read += batch.num_rows();
        Ok(Some((start, batch)))
    }
}

/// Runs the decoder; its errors and its panics on damaged input become the reason.
fn guarded<T, E: Display>(work: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(payload) => Err(format!("the decoder gave up: {}", panic_message(payload.as_ref()))),
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no reason given")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_the_decoder_becomes_a_reason() {
        let row = 7;
        let formatted = guarded(|| -> Result<(), String> { panic!("damaged page {row}") });
        assert_eq!(formatted.unwrap_err(), "the decoder gave up: damaged page 7");
        let literal = guarded(|| -> Result<(), String> { panic!("damaged") });
        assert_eq!(literal.unwrap_err(), "the decoder gave up: damaged");
    }
}

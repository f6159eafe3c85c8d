//! Parquet files: row groups as record batches that no damage can make larger than memory.

use super::blob::Blob;
use super::footer;
use super::guard::guarded;
use super::pages::{Budget, CheckedPages, Chunk, ChunkBytes};
use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Field, FieldRef, Schema};
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, RowGroups, RowSelection};
use parquet::arrow::{FieldLevels, ProjectionMask, parquet_to_arrow_field_levels, parquet_to_arrow_schema};
use parquet::column::page::{PageIterator, PageReader};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, RowGroupMetaData};
use parquet::file::serialized_reader::SerializedPageReader;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// Most rows that are decoded at a time.
const BATCH_ROWS: usize = 256;
/// Bytes of the columns that are read to which a batch is fitted, by the footer's account of its row group.
const BATCH_BYTES: u64 = 8 << 20;
/// Rows and values that a column chunk may hold whatever its size, and for each of its bytes: runs of
/// nulls take next to nothing.
const PLAIN_ROWS: u64 = 1 << 24;
const ROWS_PER_BYTE: u64 = 8192;
const PLAIN_VALUES: u64 = 1 << 20;
const VALUES_PER_BYTE: u64 = 64;

/// An open parquet file with its footer. Strings are read as views: repeated ones lie in memory once.
///
/// The Arrow schema that some writers embed is ignored: parquet's own types make every kind of
/// string column (large, view, dictionary) look the same.
pub(super) struct ParquetFile {
    blob: Arc<Blob>,
    metadata: Arc<ParquetMetaData>,
    schema: Schema,
}

impl ParquetFile {
    pub(super) fn open(blob: Blob) -> Result<Self, String> {
        let metadata = Arc::new(footer::read(&blob)?);
        let schema = guarded(|| parquet_to_arrow_schema(metadata.file_metadata().schema_descr(), None))?;
        Ok(Self { blob: Arc::new(blob), metadata, schema })
    }

    pub(super) fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Bytes of the file.
    pub(super) fn length(&self) -> u64 {
        self.blob.length()
    }

    pub(super) fn row_groups(&self) -> usize {
        self.metadata.num_row_groups()
    }

    /// Row of the file at which a row group starts, by the footer's account.
    pub(super) fn first_row(&self, row_group: usize) -> u64 {
        let before = self.metadata.row_groups().iter().take(row_group);
        before.fold(0, |rows, group| rows.saturating_add(u64::try_from(group.num_rows()).unwrap_or(0)))
    }

    /// Uncompressed bytes of a row group's columns, by the footer's account.
    pub(super) fn bytes(&self, row_group: usize, mask: &ProjectionMask) -> u64 {
        let chunks = self.metadata.row_group(row_group).columns().iter().enumerate();
        let included = chunks.filter(|(index, _)| mask.leaf_included(*index));
        let sizes = included.map(|(_, chunk)| u64::try_from(chunk.uncompressed_size()).unwrap_or(0));
        sizes.fold(0, u64::saturating_add)
    }

    /// The columns whose path, from the top-level column down, begins with one of these.
    pub(super) fn mask(&self, paths: &[Vec<String>]) -> ProjectionMask {
        let schema = self.metadata.file_metadata().schema_descr();
        let wanted = |index: &usize| {
            let parts = schema.column(*index).path().parts().to_vec();
            paths.iter().any(|path| parts.starts_with(path))
        };
        ProjectionMask::leaves(schema, (0..schema.num_columns()).filter(wanted))
    }

    /// Reads a row group from `offset` rows on, only the columns of the mask; `rows` at a time, or as many
    /// as suit the size of its rows.
    pub(super) fn batches(
        &self,
        row_group: usize,
        mask: &ProjectionMask,
        offset: usize,
        rows: Option<usize>,
    ) -> Result<RecordBatches, String> {
        let group = self.metadata.row_group(row_group);
        let total = usize::try_from(group.num_rows())
            .map_err(|_| format!("the footer claims {} rows", group.num_rows()))?;
        let chunks = chunks(group, mask, self.blob.length())?;
        let next = self.metadata.row_groups().get(row_group + 1);
        let next =
            next.and_then(|next| self::chunks(next, mask, self.blob.length()).ok()).unwrap_or_default();
        self.blob.expect(&ranges(&chunks), &ranges(&next));
        let opened = OpenGroup {
            metadata: self.metadata.clone(),
            row_group,
            bytes: Arc::new(ChunkBytes::new(self.blob.clone(), chunks)),
            budget: Arc::default(),
        };
        let selection = (offset > 0)
            .then(|| RowSelection::from_consecutive_ranges(std::iter::once(offset.min(total)..total), total));
        let size = rows.unwrap_or_else(|| batch_rows(group, mask));
        let levels = self.levels(mask)?;
        let reader =
            guarded(|| ParquetRecordBatchReader::try_new_with_row_groups(&levels, &opened, size, selection))?;
        Ok(RecordBatches { reader, budget: opened.budget, single: size == 1, read: offset.min(total), total })
    }

    fn levels(&self, mask: &ProjectionMask) -> Result<FieldLevels, String> {
        let schema = self.metadata.file_metadata().schema_descr();
        let viewed: Vec<FieldRef> = self.schema.fields().iter().map(viewed).collect();
        let viewed = guarded(|| parquet_to_arrow_field_levels(schema, mask.clone(), Some(&viewed.into())));
        viewed.or_else(|_| guarded(|| parquet_to_arrow_field_levels(schema, mask.clone(), None)))
    }
}

/// The field with its strings as views.
fn viewed(field: &FieldRef) -> FieldRef {
    let data_type = match field.data_type() {
        DataType::Utf8 => DataType::Utf8View,
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(viewed).collect()),
        DataType::List(element) => DataType::List(viewed(element)),
        other => other.clone(),
    };
    Arc::new(Field::clone(field).with_data_type(data_type))
}

/// The chunks of the columns that are read. They must lie inside the file and cannot hold rows and
/// values out of all proportion to their bytes.
fn chunks(group: &RowGroupMetaData, mask: &ProjectionMask, length: u64) -> Result<Vec<Chunk>, String> {
    let read = group.columns().iter().enumerate().filter(|(index, _)| mask.leaf_included(*index));
    read.map(|(index, column)| {
        let chunk = chunk(column, length).map_err(|reason| format!("column chunk {index} {reason}"))?;
        let most =
            PLAIN_ROWS.saturating_add((chunk.range.end - chunk.range.start).saturating_mul(ROWS_PER_BYTE));
        if !u64::try_from(group.num_rows()).is_ok_and(|rows| rows <= most) {
            return Err(format!("column chunk {index} is too small for {} rows", group.num_rows()));
        }
        Ok(chunk)
    })
    .collect()
}

fn ranges(chunks: &[Chunk]) -> Vec<Range<u64>> {
    chunks.iter().map(|chunk| chunk.range.clone()).collect()
}

fn chunk(column: &ColumnChunkMetaData, length: u64) -> Result<Chunk, String> {
    let size = column.compressed_size();
    let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
    let end = start.checked_add(size).and_then(|end| u64::try_from(end).ok());
    let (Ok(first), Some(end), true) = (u64::try_from(start), end.filter(|end| *end <= length), size >= 0)
    else {
        return Err(format!("claims {size} bytes at {start} of {length}"));
    };
    let values = u64::try_from(column.num_values()).map_err(|_| "claims a negative number of values")?;
    let flat = column.column_descr().max_rep_level() == 0;
    let most = PLAIN_VALUES.saturating_add((end - first).saturating_mul(VALUES_PER_BYTE));
    if !flat && values > most {
        return Err(format!("claims {values} values in {size} bytes"));
    }
    Ok(Chunk { range: first..end, values, announced: AtomicU64::new(0) })
}

/// How many rows are decoded at a time.
fn batch_rows(group: &RowGroupMetaData, mask: &ProjectionMask) -> usize {
    let read = group.columns().iter().enumerate().filter(|(index, _)| mask.leaf_included(*index));
    let bytes = read.fold(0_u64, |sum, (_, column)| {
        let decoded = column.unencoded_byte_array_data_bytes().unwrap_or(0).max(column.uncompressed_size());
        sum.saturating_add(u64::try_from(decoded).unwrap_or(0))
    });
    let rows = u64::try_from(group.num_rows()).unwrap_or(0).max(1);
    let fitting = BATCH_BYTES / bytes.div_ceil(rows).max(1);
    usize::try_from(fitting).unwrap_or(BATCH_ROWS).clamp(1, BATCH_ROWS)
}

/// One row group for the parquet crate.
struct OpenGroup {
    metadata: Arc<ParquetMetaData>,
    row_group: usize,
    bytes: Arc<ChunkBytes>,
    budget: Arc<Budget>,
}

impl RowGroups for OpenGroup {
    fn num_rows(&self) -> usize {
        usize::try_from(self.metadata.row_group(self.row_group).num_rows()).unwrap_or(0)
    }

    fn column_chunks(&self, index: usize) -> parquet::errors::Result<Box<dyn PageIterator>> {
        let column = self.metadata.row_group(self.row_group).column(index);
        let pages = SerializedPageReader::new(self.bytes.clone(), column, self.num_rows(), None)?;
        let column = column.column_descr_ptr();
        let pages = CheckedPages { pages, column, budget: self.budget.clone() };
        Ok(Box::new(OneChunk(Some(Box::new(pages)))))
    }

    fn row_groups(&self) -> Box<dyn Iterator<Item = &RowGroupMetaData> + '_> {
        Box::new(std::iter::once(self.metadata.row_group(self.row_group)))
    }

    fn metadata(&self) -> &ParquetMetaData {
        &self.metadata
    }
}

struct OneChunk(Option<Box<dyn PageReader>>);

impl Iterator for OneChunk {
    type Item = parquet::errors::Result<Box<dyn PageReader>>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.take().map(Ok)
    }
}

impl PageIterator for OneChunk {}

/// The record batches of one row group.
pub(super) struct RecordBatches {
    reader: ParquetRecordBatchReader,
    budget: Arc<Budget>,
    single: bool,
    read: usize,
    total: usize,
}

impl RecordBatches {
    /// Row of the row group that comes next.
    pub(super) fn position(&self) -> usize {
        self.read
    }

    /// Whether batches are of one row.
    pub(super) fn is_single(&self) -> bool {
        self.single
    }

    /// The next batch with the row of the group at which it starts, or nothing after the last.
    ///
    /// After an error the reader must not be used again.
    pub(super) fn advance(&mut self) -> Result<Option<(usize, RecordBatch)>, String> {
        self.budget.renew(self.single);
        let reader = &mut self.reader;
        let Some(batch) = guarded(|| reader.next().transpose())? else {
            let complete = self.read == self.total;
            return if complete {
                Ok(None)
            } else {
                Err(format!("{} of {} rows are there", self.read, self.total))
            };
        };
        let start = self.read;
        self.read += batch.num_rows();
        if self.read > self.total {
            return Err(format!("there are more than its {} rows", self.total));
        }
        Ok(Some((start, batch)))
    }
}

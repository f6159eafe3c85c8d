//! Parquet files of a generated corpus, written whole or not at all.

use super::super::{CorpusError, Document, Mark, Trace};
use arrow::array::{
    ArrayRef, Int64Array, Int64Builder, ListBuilder, RecordBatch, StringArray, StringBuilder, StructBuilder,
};
use arrow::datatypes::{DataType, Field, Fields, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Rows of one row group.
const ROWS_PER_GROUP: usize = 512;

/// How the rows of a table become columns.
type Encode<Row> = fn(&[Row]) -> Vec<ArrayRef>;

/// A parquet file in the making, under a temporary name until [`Table::commit`].
pub(super) struct Table<Row> {
    path: PathBuf,
    temporary: PathBuf,
    schema: Arc<Schema>,
    writer: ArrowWriter<File>,
    waiting: Vec<Row>,
    encode: Encode<Row>,
}

impl<Row> Table<Row> {
    fn create(path: &Path, fields: Vec<Field>, encode: Encode<Row>) -> Result<Self, CorpusError> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}.tmp"));
        let schema = Arc::new(Schema::new(fields));
        let file = File::create(&temporary).map_err(CorpusError::io(&temporary))?;
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_max_row_group_row_count(Some(ROWS_PER_GROUP))
            .build();
        let writer =
            ArrowWriter::try_new(file, schema.clone(), Some(properties)).map_err(write_error(path))?;
        Ok(Self { path: path.to_path_buf(), temporary, schema, writer, waiting: Vec::new(), encode })
    }

    /// Adds a row.
    pub(super) fn push(&mut self, row: Row) -> Result<(), CorpusError> {
        self.waiting.push(row);
        if self.waiting.len() < ROWS_PER_GROUP { Ok(()) } else { self.flush() }
    }

    fn flush(&mut self) -> Result<(), CorpusError> {
        let columns = (self.encode)(&self.waiting);
        self.waiting.clear();
        let batch = RecordBatch::try_new(self.schema.clone(), columns).map_err(write_error(&self.path))?;
        self.writer.write(&batch).map_err(write_error(&self.path))
    }

    /// Writes what waits, brings the file to disk and gives it its name.
    pub(super) fn commit(mut self) -> Result<(), CorpusError> {
        self.flush()?;
        let file = self.writer.into_inner().map_err(write_error(&self.path))?;
        file.sync_all().map_err(CorpusError::io(&self.temporary))?;
        fs::rename(&self.temporary, &self.path).map_err(CorpusError::io(&self.path))?;
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = directory.unwrap_or(Path::new("."));
        File::open(directory).and_then(|handle| handle.sync_all()).map_err(CorpusError::io(directory))
    }
}

fn write_error<E: std::fmt::Display>(path: &Path) -> impl FnOnce(E) -> CorpusError + '_ {
    move |error| CorpusError::Write { path: path.to_path_buf(), message: error.to_string() }
}

/// A table of documents: `id`, `text` and, where wanted, `positions`.
pub(super) fn documents_table(path: &Path, with_positions: bool) -> Result<Table<Document>, CorpusError> {
    let mut fields = vec![Field::new("id", DataType::Utf8, false), Field::new("text", DataType::Utf8, false)];
    if !with_positions {
        return Table::create(path, fields, encode_documents);
    }
    let element = Field::new("item", DataType::Struct(mark_fields()), false);
    fields.push(Field::new("positions", DataType::List(Arc::new(element)), false));
    Table::create(path, fields, |rows| {
        let mut columns = encode_documents(rows);
        columns.push(encode_marks(rows.iter().map(|row| row.marks.as_slice())));
        columns
    })
}

fn encode_documents(rows: &[Document]) -> Vec<ArrayRef> {
    let strings = |part: fn(&Document) -> &String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(part)))
    };
    vec![strings(|row| &row.id), strings(|row| &row.text)]
}

fn mark_fields() -> Fields {
    vec![Field::new("offset", DataType::Int64, false), Field::new("label", DataType::Utf8, false)].into()
}

fn encode_marks<'a>(rows: impl Iterator<Item = &'a [Mark]>) -> ArrayRef {
    let element = Field::new("item", DataType::Struct(mark_fields()), false);
    let parts = StructBuilder::new(
        mark_fields(),
        vec![Box::new(Int64Builder::new()), Box::new(StringBuilder::new())],
    );
    let mut list = ListBuilder::new(parts).with_field(element);
    for marks in rows {
        for mark in marks {
            let parts = list.values();
            if let Some(offsets) = parts.field_builder::<Int64Builder>(0) {
                offsets.append_value(mark.offset as i64);
            }
            if let Some(labels) = parts.field_builder::<StringBuilder>(1) {
                labels.append_value(&mark.label);
            }
            parts.append(true);
        }
        list.append(true);
    }
    Arc::new(list.finish())
}

/// A table of traces: `text`, `offset`, `thought`, `prediction`, `label`.
pub(super) fn traces_table(path: &Path) -> Result<Table<Trace>, CorpusError> {
    let text = |name: &str| Field::new(name, DataType::Utf8, false);
    let offset = Field::new("offset", DataType::Int64, false);
    let label = Field::new("label", DataType::Utf8, true);
    Table::create(path, vec![text("text"), offset, text("thought"), text("prediction"), label], encode_traces)
}

fn encode_traces(rows: &[Trace]) -> Vec<ArrayRef> {
    let strings = |part: fn(&Trace) -> &String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(part)))
    };
    let offsets = Int64Array::from_iter_values(rows.iter().map(|row| row.offset as i64));
    let labels: StringArray = rows.iter().map(|row| row.label.as_deref()).collect();
    vec![
        strings(|row| &row.text),
        Arc::new(offsets),
        strings(|row| &row.thought),
        strings(|row| &row.prediction),
        Arc::new(labels),
    ]
}

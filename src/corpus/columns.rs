//! Finding columns by name and type, and turning record batches into rows.

use super::Mark;
use super::counts::{BAD_MARK, CorpusCounts};
use super::error::CorpusError;
use arrow::array::{Array, ArrayRef, AsArray, Int64Array, ListArray, RecordBatch, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int64Type, Schema};
use std::path::Path;

/// Name of the optional column of marked positions.
const MARKS: &str = "positions";

/// Index of a column that must be there with a type that `accepts` takes.
pub(super) fn find(
    schema: &Schema,
    file: &Path,
    name: &str,
    accepts: fn(&DataType) -> bool,
    expected: &'static str,
) -> Result<usize, CorpusError> {
    let Some((index, field)) = schema.column_with_name(name) else {
        let columns = schema.fields().iter().map(|field| field.name().clone()).collect();
        return Err(CorpusError::NoColumn { file: file.to_path_buf(), column: name.into(), columns });
    };
    if accepts(field.data_type()) {
        return Ok(index);
    }
    let found = field.data_type().to_string();
    Err(CorpusError::WrongType { file: file.to_path_buf(), column: name.into(), found, expected })
}

pub(super) fn is_text(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Utf8)
}

pub(super) fn is_integer(data_type: &DataType) -> bool {
    data_type.is_integer()
}

fn is_name(data_type: &DataType) -> bool {
    is_text(data_type) || is_integer(data_type)
}

/// `List<Struct<offset: integer, label: Utf8>>`, other fields allowed.
fn is_marks(data_type: &DataType) -> bool {
    let DataType::List(element) = data_type else { return false };
    let DataType::Struct(fields) = element.data_type() else { return false };
    let has = |name, accepts: fn(&DataType) -> bool| {
        fields.find(name).is_some_and(|(_, field)| accepts(field.data_type()))
    };
    has("offset", is_integer) && has("label", is_text)
}

/// A column as strings, every one of them checked to be UTF-8.
///
/// The decoder checks only columns annotated as plain strings, not JSON.
pub(super) fn strings(column: &dyn Array) -> Result<StringArray, String> {
    let array = cast(column, &DataType::Utf8).map_err(|error| error.to_string())?;
    let strings = array.as_string_opt::<i32>().ok_or("not a string column")?.clone();
    let bytes = strings.values().as_slice();
    for range in strings.value_offsets().windows(2) {
        let value =
            bytes.get(range[0] as usize..range[1] as usize).ok_or("a string lies outside its page")?;
        std::str::from_utf8(value).map_err(|error| error.to_string())?;
    }
    Ok(strings)
}

/// A column as signed integers; values that do not fit become null.
pub(super) fn integers(column: &dyn Array) -> Result<Int64Array, String> {
    let array = cast(column, &DataType::Int64).map_err(|error| error.to_string())?;
    Ok(array.as_primitive_opt::<Int64Type>().ok_or("not an integer column")?.clone())
}

/// A column of a batch by name.
pub(super) fn column<'a>(batch: &'a RecordBatch, name: &str) -> Result<&'a ArrayRef, String> {
    batch.column_by_name(name).ok_or_else(|| format!("column `{name}` was not decoded"))
}

/// The columns of documents in one file.
pub(super) struct Columns {
    text: String,
    id: Option<String>,
    marks: bool,
    /// Indices of the columns to read.
    pub(super) roots: Vec<usize>,
}

impl Columns {
    /// Finds the columns in a file's schema. A `positions` column of another shape is ordinary data
    /// that happens to have that name, and is left alone.
    pub(super) fn find(
        schema: &Schema,
        file: &Path,
        text: &str,
        id: Option<&str>,
    ) -> Result<Self, CorpusError> {
        let mut roots = vec![find(schema, file, text, is_text, "text (a UTF-8 string)")?];
        if let Some(id) = id {
            roots.push(find(schema, file, id, is_name, "names (strings or integers)")?);
        }
        let marks = schema.column_with_name(MARKS).filter(|(_, field)| is_marks(field.data_type()));
        roots.extend(marks.map(|(index, _)| index));
        Ok(Self { text: text.into(), id: id.map(Into::into), marks: marks.is_some(), roots })
    }

    /// The documents of a batch whose first row is row `start` of the row group.
    pub(super) fn rows(&self, start: usize, batch: &RecordBatch) -> Result<Rows, String> {
        let texts = strings(column(batch, &self.text)?)?;
        let ids = self.id.as_ref().map(|id| strings(column(batch, id)?)).transpose()?;
        let marks = self.marks.then(|| Marks::decode(column(batch, MARKS)?)).transpose()?;
        Ok(Rows { start, texts, ids, marks })
    }
}

/// One decoded batch.
pub(super) struct Rows {
    start: usize,
    texts: StringArray,
    ids: Option<StringArray>,
    marks: Option<Marks>,
}

impl Rows {
    /// Row of the row group after the last of this batch.
    pub(super) fn end(&self) -> usize {
        self.start + self.texts.len()
    }

    /// Text of a row of the row group.
    pub(super) fn text(&self, row: usize) -> Option<&str> {
        value(&self.texts, row.checked_sub(self.start)?)
    }

    /// Name of a row of the row group, if it has one of its own.
    pub(super) fn id(&self, row: usize) -> Option<&str> {
        value(self.ids.as_ref()?, row.checked_sub(self.start)?)
    }

    /// The marks of a row that point into its text; the others are counted.
    pub(super) fn marks(&self, row: usize, text: &str, counts: &mut CorpusCounts) -> Vec<Mark> {
        let (Some(marks), Some(index)) = (&self.marks, row.checked_sub(self.start)) else {
            return Vec::new();
        };
        let mut good = Vec::new();
        for mark in marks.of(index) {
            match mark.filter(|mark| fits(text, mark.offset)) {
                Some(mark) => good.push(mark),
                None => counts.drop_one(BAD_MARK),
            }
        }
        good
    }
}

fn value(array: &StringArray, index: usize) -> Option<&str> {
    (index < array.len() && array.is_valid(index)).then(|| array.value(index))
}

/// Whether a prediction can start so many bytes into the text.
pub(super) fn fits(text: &str, offset: u64) -> bool {
    usize::try_from(offset).is_ok_and(|offset| offset < text.len() && text.is_char_boundary(offset))
}

/// Decoded marks of a batch.
struct Marks {
    list: ListArray,
    offsets: Int64Array,
    labels: StringArray,
}

impl Marks {
    fn decode(column: &ArrayRef) -> Result<Self, String> {
        let list = column.as_list_opt::<i32>().ok_or("positions are not a list")?.clone();
        let fields = list.values().as_struct_opt().ok_or("positions are not a list of structs")?;
        let field = |name| fields.column_by_name(name).ok_or_else(|| format!("positions have no {name}"));
        let (offsets, labels) = (integers(field("offset")?)?, strings(field("label")?)?);
        Ok(Self { list, offsets, labels })
    }

    /// The marks of one row of the batch; nothing in place of one with a null or negative part.
    fn of(&self, index: usize) -> impl Iterator<Item = Option<Mark>> + '_ {
        let range = self.list.value_offsets()[index] as usize..self.list.value_offsets()[index + 1] as usize;
        range.filter(move |_| self.list.is_valid(index)).map(|at| {
            let offset = self.offsets.is_valid(at).then(|| self.offsets.value(at))?;
            let label = value(&self.labels, at)?.to_owned();
            Some(Mark { offset: u64::try_from(offset).ok()?, label })
        })
    }
}

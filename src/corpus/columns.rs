//! Finding columns by name and type, and turning record batches into rows.

use super::Mark;
use super::counts::{BAD_MARK, CorpusCounts, NULL_TEXT};
use super::error::CorpusError;
use arrow::array::{
    Array, ArrayRef, AsArray, BinaryViewArray, Int64Array, ListArray, RecordBatch, StringArray,
};
use arrow::buffer::NullBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Int64Type, Schema};
use std::path::Path;

/// Name of the optional column of marked positions.
const MARKS: &str = "positions";

/// Path of a column that must be there with a type that `accepts` takes: a top-level column, or a field
/// of structs below one, with dots between the names.
pub(super) fn find(
    schema: &Schema,
    file: &Path,
    name: &str,
    accepts: fn(&DataType) -> bool,
    expected: &'static str,
) -> Result<Vec<String>, CorpusError> {
    let Some((path, data_type)) = locate(schema, name) else {
        let columns = schema.fields().iter().map(|field| field.name().clone()).collect();
        return Err(CorpusError::NoColumn { file: file.to_path_buf(), column: name.into(), columns });
    };
    if accepts(data_type) {
        return Ok(path);
    }
    let found = data_type.to_string();
    Err(CorpusError::WrongType { file: file.to_path_buf(), column: name.into(), found, expected })
}

/// A column by its whole name, or by a path into structs.
fn locate<'s>(schema: &'s Schema, name: &str) -> Option<(Vec<String>, &'s DataType)> {
    if let Some((_, field)) = schema.column_with_name(name) {
        return Some((vec![name.into()], field.data_type()));
    }
    let path: Vec<String> = name.split('.').map(Into::into).collect();
    let (_, root) = schema.column_with_name(&path[0])?;
    let found = path[1..].iter().try_fold(root.data_type(), |data_type, part| match data_type {
        DataType::Struct(fields) => fields.find(part).map(|(_, field)| field.data_type()),
        _ => None,
    });
    found.map(|data_type| (path, data_type))
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
    if let Some(views) = column.as_string_view_opt() {
        let views = views.clone().to_binary_view();
        let texts = views.iter().map(|value| value.map(std::str::from_utf8).transpose());
        return texts.collect::<Result<_, _>>().map_err(|error| error.to_string());
    }
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
#[derive(Clone, Debug)]
pub(super) struct Columns {
    /// Names as they were given.
    pub(super) names: (String, Option<String>),
    text: Vec<String>,
    id: Option<Vec<String>>,
    marks: bool,
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
        let find = |name, accepts, expected| find(schema, file, name, accepts, expected);
        Ok(Self {
            text: find(text, is_text, "text (a UTF-8 string)")?,
            id: id.map(|id| find(id, is_name, "names (strings or integers)")).transpose()?,
            marks: schema.column_with_name(MARKS).is_some_and(|(_, field)| is_marks(field.data_type())),
            ..Self::keys(text, id)
        })
    }

    /// The keys of objects.
    pub(super) fn keys(text: &str, id: Option<&str>) -> Self {
        let names = (text.to_owned(), id.map(Into::into));
        Self { names, text: Vec::new(), id: None, marks: false }
    }

    /// What has to be decoded.
    pub(super) fn paths(&self) -> Vec<Vec<String>> {
        let marks = self.marks.then(|| vec![MARKS.to_owned()]);
        std::iter::once(self.text.clone()).chain(self.id.clone()).chain(marks).collect()
    }

    /// The documents of a batch whose first row is row `start` of the row group.
    pub(super) fn rows(&self, start: usize, batch: &RecordBatch) -> Result<Rows, String> {
        let texts = Values::decode(batch, &self.text)?;
        let ids = self.id.as_ref().map(|id| Values::decode(batch, id)).transpose()?;
        let marks = self.marks.then(|| Marks::decode(column(batch, MARKS)?)).transpose()?;
        Ok(Rows { start, length: batch.num_rows(), texts, ids, marks })
    }
}

/// One decoded batch.
pub(super) struct Rows {
    start: usize,
    length: usize,
    texts: Values,
    ids: Option<Values>,
    marks: Option<Marks>,
}

impl Rows {
    /// Lines from line `start` on: their texts, or why they have none, and their names.
    pub(super) fn of_lines(start: usize, lines: Vec<(Result<String, &'static str>, Option<String>)>) -> Self {
        let length = lines.len();
        let (texts, ids): (_, Vec<_>) = lines.into_iter().unzip();
        let ids = ids.into_iter().map(|id| id.ok_or(NULL_TEXT)).collect();
        Self { start, length, texts: Values::Owned(texts), ids: Some(Values::Owned(ids)), marks: None }
    }

    /// Row of the row group after the last of this batch.
    pub(super) fn end(&self) -> usize {
        self.start + self.length
    }

    /// Text of a row of the row group, or the reason why it is dropped.
    pub(super) fn text(&self, row: usize) -> Result<&str, &'static str> {
        row.checked_sub(self.start).map_or(Err(NULL_TEXT), |index| self.texts.get(index))
    }

    /// Name of a row of the row group, if it has one of its own.
    pub(super) fn id(&self, row: usize) -> Option<&str> {
        self.ids.as_ref()?.get(row.checked_sub(self.start)?).ok()
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

/// The strings of a column.
enum Values {
    /// As they lie in their pages, with the nulls of the structs around them; all are UTF-8.
    Views(BinaryViewArray, Option<NullBuffer>),
    Strings(StringArray),
    Owned(Vec<Result<String, &'static str>>),
}

impl Values {
    /// Follows a path into structs.
    fn decode(batch: &RecordBatch, path: &[String]) -> Result<Self, String> {
        let missing = || format!("column `{}` was not decoded", path.join("."));
        let (root, fields) = path.split_first().ok_or_else(missing)?;
        let mut array = column(batch, root)?;
        let mut nulls = array.nulls().cloned();
        for field in fields {
            let parent = array.as_struct_opt().ok_or_else(missing)?;
            array = parent.column_by_name(field).ok_or_else(missing)?;
            nulls = NullBuffer::union(nulls.as_ref(), array.nulls());
        }
        let Some(views) = array.as_string_view_opt() else { return strings(array).map(Self::Strings) };
        let views = views.clone().to_binary_view();
        for index in (0..views.len()).filter(|index| is_there(nulls.as_ref(), *index)) {
            std::str::from_utf8(views.value(index)).map_err(|error| error.to_string())?;
        }
        Ok(Self::Views(views, nulls))
    }

    fn get(&self, index: usize) -> Result<&str, &'static str> {
        let found = match self {
            Self::Views(views, nulls) if index < views.len() && is_there(nulls.as_ref(), index) => {
                std::str::from_utf8(views.value(index)).ok()
            }
            Self::Views(..) => None,
            Self::Strings(strings) => value(strings, index),
            Self::Owned(values) => match values.get(index) {
                Some(value) => return value.as_deref().map_err(|reason| *reason),
                None => None,
            },
        };
        found.ok_or(NULL_TEXT)
    }
}

fn is_there(nulls: Option<&NullBuffer>, index: usize) -> bool {
    nulls.is_none_or(|nulls| nulls.is_valid(index))
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

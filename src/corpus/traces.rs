//! Worked examples for the cold start.

use super::Trace;
use super::columns::{column, find, fits, integers, is_integer, is_text, strings};
use super::error::CorpusError;
use super::row_groups::ParquetFile;
use super::shard::Shard;
use super::source::{SourceFile, resolve};
use arrow::array::{Array, Int64Array, RecordBatch, StringArray};
use std::path::Path;

const TEXT: &str = "text";
const OFFSET: &str = "offset";
const THOUGHT: &str = "thought";
const PREDICTION: &str = "prediction";
const LABEL: &str = "label";

/// Reads all traces of a parquet file, a directory of them, or a glob.
///
/// Columns: `text`, `offset` (bytes of text before the prediction), `thought`, `prediction` and,
/// optionally, `label`. Memory: all traces, which are few. Unlike documents, traces are written by
/// hand or by a program for this purpose, so the first fault is an error.
///
/// # Errors
/// The source cannot be resolved or decoded, a column is missing or of another type, or a trace has
/// a null part, an empty prediction or an offset that is not inside its text.
pub fn read_traces(source: &str) -> Result<Vec<Trace>, CorpusError> {
    let mut traces = Vec::new();
    for file in resolve(source)? {
        read_file(&file, &mut traces)?;
    }
    if traces.is_empty() {
        return Err(CorpusError::Empty { place: source.into(), dropped: "there are no traces".into() });
    }
    Ok(traces)
}

fn read_file(file: &SourceFile, traces: &mut Vec<Trace>) -> Result<(), CorpusError> {
    let path = file.path.as_path();
    let unreadable = |reason| CorpusError::Unreadable { file: path.to_path_buf(), reason };
    let Shard::Parquet(shard) = Shard::open(file).map_err(unreadable)? else {
        return Err(unreadable("traces are read from parquet alone".into()));
    };
    let mask = shard.mask(&columns(&shard, path)?);
    for row_group in 0..shard.row_groups() {
        let first = shard.first_row(row_group);
        let mut batches = shard.batches(row_group, &mask, 0, None).map_err(unreadable)?;
        while let Some((start, batch)) = batches.advance().map_err(unreadable)? {
            let rows = Rows::decode(&batch).map_err(unreadable)?;
            for index in 0..batch.num_rows() {
                let row = first.saturating_add((start + index) as u64);
                let bad = |message| CorpusError::BadTrace { file: path.to_path_buf(), row, message };
                traces.push(rows.trace(index).map_err(bad)?);
            }
        }
    }
    Ok(())
}

fn columns(shard: &ParquetFile, path: &Path) -> Result<Vec<Vec<String>>, CorpusError> {
    let text = |name| find(shard.schema(), path, name, is_text, "text (a UTF-8 string)");
    let offset = find(shard.schema(), path, OFFSET, is_integer, "integers")?;
    let mut paths = vec![text(TEXT)?, offset, text(THOUGHT)?, text(PREDICTION)?];
    if shard.schema().column_with_name(LABEL).is_some() {
        paths.push(text(LABEL)?);
    }
    Ok(paths)
}

struct Rows {
    text: StringArray,
    offset: Int64Array,
    thought: StringArray,
    prediction: StringArray,
    label: Option<StringArray>,
}

impl Rows {
    fn decode(batch: &RecordBatch) -> Result<Self, String> {
        Ok(Self {
            text: strings(column(batch, TEXT)?)?,
            offset: integers(column(batch, OFFSET)?)?,
            thought: strings(column(batch, THOUGHT)?)?,
            prediction: strings(column(batch, PREDICTION)?)?,
            label: batch.column_by_name(LABEL).map(|labels| strings(labels)).transpose()?,
        })
    }

    fn trace(&self, index: usize) -> Result<Trace, String> {
        let text = required(&self.text, index, TEXT)?;
        let prediction = required(&self.prediction, index, PREDICTION)?;
        let offset = self.offset.is_valid(index).then(|| self.offset.value(index)).ok_or("offset is null")?;
        let offset = u64::try_from(offset).map_err(|_| format!("offset {offset} is negative"))?;
        if !fits(&text, offset) {
            return Err(format!(
                "offset {offset} is not the start of a character of its {} bytes of text",
                text.len()
            ));
        }
        if prediction.is_empty() {
            return Err("prediction is empty".into());
        }
        let thought = required(&self.thought, index, THOUGHT)?;
        let label = self.label.as_ref().filter(|labels| labels.is_valid(index));
        let label = label.map(|labels| labels.value(index).to_owned());
        Ok(Trace { text, offset, thought, prediction, label })
    }
}

fn required(column: &StringArray, index: usize, name: &str) -> Result<String, String> {
    column.is_valid(index).then(|| column.value(index).to_owned()).ok_or_else(|| format!("{name} is null"))
}

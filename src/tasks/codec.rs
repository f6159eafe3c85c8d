//! Task documents as Arrow rows.

use super::{Fingerprints, Position, SCHEMA_VERSION, TaskDocument};
use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Float32Builder, ListArray, ListBuilder, RecordBatch, StringArray,
    StringBuilder, UInt32Builder,
};
use arrow::datatypes::{ArrowPrimitiveType, DataType, Field, Float32Type, Schema, UInt32Type};
use arrow::error::ArrowError;
use std::sync::Arc;

/// The columns that hold lists, with the type of their items.
const LISTS: [(&str, DataType); 6] = [
    ("tokens", DataType::UInt32),
    ("position_index", DataType::UInt32),
    ("position_entropy", DataType::Float32),
    ("position_truth_probability", DataType::Float32),
    ("position_proxy_top", DataType::UInt32),
    ("position_label", DataType::Utf8),
];

/// The first of the columns that hold one item for each position.
const POSITION_INDEX: usize = 3;

/// The schema of a shard; its metadata say what the tasks were built with.
pub(super) fn schema(fingerprints: &Fingerprints) -> Schema {
    let list = |(name, item)| Field::new_list(name, Field::new_list_field(item, true), false);
    let scalars =
        [Field::new("id", DataType::Utf8, false), Field::new("ends_document", DataType::Boolean, false)];
    let fields: Vec<Field> = scalars.into_iter().chain(LISTS.map(list)).collect();
    Schema::new(fields).with_metadata([
        ("rpt.schema_version".to_owned(), SCHEMA_VERSION.to_string()),
        ("rpt.tokenizer".to_owned(), fingerprints.tokenizer.clone()),
        ("rpt.template".to_owned(), fingerprints.template.clone()),
    ])
}

/// Documents as one record batch.
pub(super) fn encode(schema: &Arc<Schema>, documents: &[TaskDocument]) -> Result<RecordBatch, ArrowError> {
    let ids: StringArray = documents.iter().map(|document| Some(document.id.as_str())).collect();
    let ends: BooleanArray = documents.iter().map(|document| Some(document.ends_document)).collect();
    let words = |of: fn(&Position) -> u32| word_lists(documents, of);
    let reals = |of: fn(&Position) -> f32| real_lists(documents, of);
    let columns: Vec<ArrayRef> = vec![
        Arc::new(ids),
        Arc::new(ends),
        token_lists(documents),
        words(|position| position.index),
        reals(|position| position.entropy),
        reals(|position| position.truth_probability),
        words(|position| position.proxy_top),
        label_lists(documents),
    ];
    RecordBatch::try_new(Arc::clone(schema), columns)
}

fn token_lists(documents: &[TaskDocument]) -> ArrayRef {
    let tokens = documents.iter().map(|document| document.tokens.len()).sum();
    let mut lists = ListBuilder::new(UInt32Builder::with_capacity(tokens));
    for document in documents {
        lists.values().append_slice(&document.tokens);
        lists.append(true);
    }
    Arc::new(lists.finish())
}

fn word_lists(documents: &[TaskDocument], of: fn(&Position) -> u32) -> ArrayRef {
    let mut lists = ListBuilder::new(UInt32Builder::new());
    for document in documents {
        document.positions.iter().for_each(|position| lists.values().append_value(of(position)));
        lists.append(true);
    }
    Arc::new(lists.finish())
}

fn real_lists(documents: &[TaskDocument], of: fn(&Position) -> f32) -> ArrayRef {
    let mut lists = ListBuilder::new(Float32Builder::new());
    for document in documents {
        document.positions.iter().for_each(|position| lists.values().append_value(of(position)));
        lists.append(true);
    }
    Arc::new(lists.finish())
}

fn label_lists(documents: &[TaskDocument]) -> ArrayRef {
    let mut lists = ListBuilder::new(StringBuilder::new());
    for document in documents {
        document
            .positions
            .iter()
            .for_each(|position| lists.values().append_option(position.label.as_deref()));
        lists.append(true);
    }
    Arc::new(lists.finish())
}

/// The positions of a record batch's rows.
pub(super) fn positions(batch: &RecordBatch) -> u64 {
    let lists = batch.column(POSITION_INDEX).as_list_opt::<i32>();
    lists.map_or(0, |lists| (0..lists.len()).map(|row| lists.value_length(row) as u64).sum())
}

/// One row of a record batch that has the columns of [`schema`].
///
/// # Errors
/// Says what is wrong with a row that no builder would have written.
pub(super) fn decode(batch: &RecordBatch, row: usize) -> Result<TaskDocument, String> {
    let id = strings(batch.column(0).as_ref())?.value(row).to_owned();
    let ends_document = batch.column(1).as_boolean_opt().ok_or("a column is not a truth value")?.value(row);
    let list = |column: usize| list_at(batch.column(column).as_ref(), row);
    let indices = primitives::<UInt32Type>(&list(3)?)?;
    let entropies = primitives::<Float32Type>(&list(4)?)?;
    let probabilities = primitives::<Float32Type>(&list(5)?)?;
    let tops = primitives::<UInt32Type>(&list(6)?)?;
    let labels = list(7)?;
    let labels = strings(labels.as_ref())?;
    let count = indices.len();
    if [entropies.len(), probabilities.len(), tops.len(), labels.len()] != [count; 4] {
        return Err(format!("row `{id}` has position columns of different lengths"));
    }
    let position = |place: usize| Position {
        index: indices[place],
        entropy: entropies[place],
        truth_probability: probabilities[place],
        proxy_top: tops[place],
        label: labels.is_valid(place).then(|| labels.value(place).to_owned()),
    };
    let document = TaskDocument {
        tokens: primitives::<UInt32Type>(&list(2)?)?,
        ends_document,
        positions: (0..count).map(position).collect(),
        id,
    };
    check(&document)?;
    Ok(document)
}

fn check(document: &TaskDocument) -> Result<(), String> {
    let TaskDocument { id, tokens, positions, .. } = document;
    let last = positions.last().ok_or_else(|| format!("row `{id}` has no position"))?;
    if !positions.windows(2).all(|pair| pair[0].index < pair[1].index) {
        Err(format!("row `{id}` has positions out of order"))
    } else if last.index as usize >= tokens.len() {
        Err(format!("row `{id}` has a position outside of its text"))
    } else {
        Ok(())
    }
}

fn list_at(column: &dyn Array, row: usize) -> Result<ArrayRef, String> {
    let lists: &ListArray = column.as_list_opt().ok_or("a column is not a list")?;
    Ok(lists.value(row))
}

fn primitives<T: ArrowPrimitiveType>(values: &ArrayRef) -> Result<Vec<T::Native>, String> {
    let values = values.as_primitive_opt::<T>().ok_or("a list has items of another type")?;
    if values.null_count() > 0 {
        return Err("a list of numbers has nulls".into());
    }
    Ok(values.values().to_vec())
}

fn strings(values: &dyn Array) -> Result<&StringArray, String> {
    values.as_string_opt().ok_or_else(|| "a column is not text".into())
}

//! Rollout rows as Arrow columns, both ways.

use super::{ReportError, RolloutRow};
use arrow::array::{
    Array, ArrayRef, ArrowPrimitiveType, AsArray as _, Float32Array, ListArray, PrimitiveArray, RecordBatch,
    StringArray, UInt32Array, UInt64Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{Field, Float32Type, UInt32Type};
use arrow::error::ArrowError;
use std::path::Path;
use std::sync::Arc;

/// The columns of `rows`; those of no rows give the schema.
pub(super) fn to_batch(rows: &[RolloutRow]) -> Result<RecordBatch, ArrowError> {
    let u64s = |get: fn(&RolloutRow) -> u64| -> ArrayRef {
        Arc::new(UInt64Array::from_iter_values(rows.iter().map(get)))
    };
    let u32s = |get: fn(&RolloutRow) -> u32| -> ArrayRef {
        Arc::new(UInt32Array::from_iter_values(rows.iter().map(get)))
    };
    let f32s = |get: fn(&RolloutRow) -> f32| -> ArrayRef {
        Arc::new(Float32Array::from_iter_values(rows.iter().map(get)))
    };
    let words = |get: fn(&RolloutRow) -> &String| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(get)))
    };
    let optional = |get: fn(&RolloutRow) -> &Option<String>| -> ArrayRef {
        Arc::new(rows.iter().map(get).map(Option::as_deref).collect::<StringArray>())
    };
    let f32_lists = |get: fn(&RolloutRow) -> &Vec<f32>| lists::<Float32Type>(rows, get);
    RecordBatch::try_from_iter_with_nullable([
        ("step", u64s(|row| row.step), false),
        ("ordinal", u64s(|row| row.ordinal), false),
        ("sample", u32s(|row| row.sample), false),
        ("document", words(|row| &row.document), false),
        ("position", u32s(|row| row.position), false),
        ("label", optional(|row| &row.label), true),
        ("entropy", f32s(|row| row.entropy), false),
        ("context", words(|row| &row.context), false),
        ("thought", words(|row| &row.thought), false),
        ("prediction", optional(|row| &row.prediction), true),
        ("truth", words(|row| &row.truth), false),
        ("outcome", words(|row| &row.outcome), false),
        ("reward", f32s(|row| row.reward), false),
        ("advantage", f32s(|row| row.advantage), false),
        ("finish", words(|row| &row.finish), false),
        ("policy_version", u64s(|row| row.policy_version), false),
        ("tokens", lists::<UInt32Type>(rows, |row| &row.tokens)?, false),
        ("logprobs", f32_lists(|row| &row.logprobs)?, false),
        ("policy_logprobs", f32_lists(|row| &row.policy_logprobs)?, false),
        ("sampling_logprobs", f32_lists(|row| &row.sampling_logprobs)?, false),
        ("prompt_tokens", u32s(|row| row.prompt_tokens), false),
    ])
}

fn lists<T: ArrowPrimitiveType>(
    rows: &[RolloutRow],
    get: fn(&RolloutRow) -> &Vec<T::Native>,
) -> Result<ArrayRef, ArrowError> {
    let values = PrimitiveArray::<T>::from_iter_values(rows.iter().flat_map(|row| get(row).iter().copied()));
    let offsets = OffsetBuffer::from_lengths(rows.iter().map(|row| get(row).len()));
    let item = Arc::new(Field::new_list_field(T::DATA_TYPE, false));
    Ok(Arc::new(ListArray::try_new(item, offsets, Arc::new(values), None)?))
}

/// The columns of one batch, checked once so that rows can be taken without further errors.
pub(super) struct RolloutColumns<'a> {
    step: &'a UInt64Array,
    ordinal: &'a UInt64Array,
    sample: &'a UInt32Array,
    document: &'a StringArray,
    position: &'a UInt32Array,
    label: &'a StringArray,
    entropy: &'a Float32Array,
    context: &'a StringArray,
    thought: &'a StringArray,
    prediction: &'a StringArray,
    truth: &'a StringArray,
    outcome: &'a StringArray,
    reward: &'a Float32Array,
    advantage: &'a Float32Array,
    finish: &'a StringArray,
    policy_version: &'a UInt64Array,
    tokens: Lists<'a, UInt32Type>,
    logprobs: Lists<'a, Float32Type>,
    policy_logprobs: Lists<'a, Float32Type>,
    sampling_logprobs: Lists<'a, Float32Type>,
    prompt_tokens: &'a UInt32Array,
}

impl<'a> RolloutColumns<'a> {
    /// Finds the columns by name.
    ///
    /// # Errors
    /// [`ReportError::RolloutColumn`] with the first column that is absent or has another type.
    pub(super) fn of(batch: &'a RecordBatch, path: &'a Path) -> Result<Self, ReportError> {
        let columns = Columns { batch, path };
        Ok(Self {
            step: columns.numbers("step", "column of u64")?,
            ordinal: columns.numbers("ordinal", "column of u64")?,
            sample: columns.numbers("sample", "column of u32")?,
            document: columns.words("document")?,
            position: columns.numbers("position", "column of u32")?,
            label: columns.optional_words("label")?,
            entropy: columns.numbers("entropy", "column of f32")?,
            context: columns.words("context")?,
            thought: columns.words("thought")?,
            prediction: columns.optional_words("prediction")?,
            truth: columns.words("truth")?,
            outcome: columns.words("outcome")?,
            reward: columns.numbers("reward", "column of f32")?,
            advantage: columns.numbers("advantage", "column of f32")?,
            finish: columns.words("finish")?,
            policy_version: columns.numbers("policy_version", "column of u64")?,
            tokens: columns.lists("tokens", "list of u32")?,
            logprobs: columns.lists("logprobs", "list of f32")?,
            policy_logprobs: columns.lists("policy_logprobs", "list of f32")?,
            sampling_logprobs: columns.lists("sampling_logprobs", "list of f32")?,
            prompt_tokens: columns.numbers("prompt_tokens", "column of u32")?,
        })
    }

    /// Row `index` of the batch.
    pub(super) fn row(&self, index: usize) -> RolloutRow {
        let word = |column: &StringArray| column.value(index).to_owned();
        let optional = |column: &StringArray| column.is_valid(index).then(|| word(column));
        RolloutRow {
            step: self.step.value(index),
            ordinal: self.ordinal.value(index),
            sample: self.sample.value(index),
            document: word(self.document),
            position: self.position.value(index),
            label: optional(self.label),
            entropy: self.entropy.value(index),
            context: word(self.context),
            thought: word(self.thought),
            prediction: optional(self.prediction),
            truth: word(self.truth),
            outcome: word(self.outcome),
            reward: self.reward.value(index),
            advantage: self.advantage.value(index),
            finish: word(self.finish),
            policy_version: self.policy_version.value(index),
            tokens: self.tokens.values(index),
            logprobs: self.logprobs.values(index),
            policy_logprobs: self.policy_logprobs.values(index),
            sampling_logprobs: self.sampling_logprobs.values(index),
            prompt_tokens: self.prompt_tokens.value(index),
        }
    }
}

/// A column of lists and the numbers in them.
struct Lists<'a, T: ArrowPrimitiveType> {
    lists: &'a ListArray,
    numbers: &'a PrimitiveArray<T>,
}

impl<T: ArrowPrimitiveType> Lists<'_, T> {
    fn values(&self, index: usize) -> Vec<T::Native> {
        let offsets = self.lists.value_offsets();
        self.numbers.values()[offsets[index] as usize..offsets[index + 1] as usize].to_vec()
    }
}

/// Typed access to the columns of a batch by name.
struct Columns<'a> {
    batch: &'a RecordBatch,
    path: &'a Path,
}

impl<'a> Columns<'a> {
    fn numbers<T: ArrowPrimitiveType>(
        &self,
        name: &'static str,
        expected: &'static str,
    ) -> Result<&'a PrimitiveArray<T>, ReportError> {
        let column = self.column(name, expected)?.as_primitive_opt::<T>();
        column.filter(|column| column.null_count() == 0).ok_or_else(|| self.wrong(name, expected))
    }

    fn words(&self, name: &'static str) -> Result<&'a StringArray, ReportError> {
        let column = self.optional_words(name)?;
        Some(column)
            .filter(|column| column.null_count() == 0)
            .ok_or_else(|| self.wrong(name, "column of strings without nulls"))
    }

    fn optional_words(&self, name: &'static str) -> Result<&'a StringArray, ReportError> {
        let expected = "column of strings";
        self.column(name, expected)?.as_string_opt::<i32>().ok_or_else(|| self.wrong(name, expected))
    }

    fn lists<T: ArrowPrimitiveType>(
        &self,
        name: &'static str,
        expected: &'static str,
    ) -> Result<Lists<'a, T>, ReportError> {
        let lists = self.column(name, expected)?.as_list_opt::<i32>().filter(|lists| lists.null_count() == 0);
        let numbers = lists.and_then(|lists| lists.values().as_primitive_opt::<T>());
        match (lists, numbers) {
            (Some(lists), Some(numbers)) if numbers.null_count() == 0 => Ok(Lists { lists, numbers }),
            _ => Err(self.wrong(name, expected)),
        }
    }

    fn column(&self, name: &'static str, expected: &'static str) -> Result<&'a ArrayRef, ReportError> {
        self.batch.column_by_name(name).ok_or_else(|| self.wrong(name, expected))
    }

    fn wrong(&self, column: &'static str, expected: &'static str) -> ReportError {
        ReportError::RolloutColumn { path: self.path.to_owned(), column, expected }
    }
}

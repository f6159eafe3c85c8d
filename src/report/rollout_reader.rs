//! Reading the rollout log.

use super::files::at;
use super::rollout_columns::RolloutColumns;
use super::rollout_log::{SegmentFile, in_parquet, segments};
use super::{ReportError, RolloutRow};
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::errors::ParquetError;
use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Rows decoded at a time.
const BATCH_ROWS: usize = 64;

/// All rows of a rollout log in the order in which they were written; memory holds 64 rows and one decoded
/// parquet page per column.
///
/// # Errors
/// [`ReportError::Io`] if the directory cannot be listed; an absent one has no rows.
pub fn read_rows(directory: &Path) -> Result<RolloutRows, ReportError> {
    Ok(RolloutRows::of(segments(directory)?))
}

/// Iterator of [`read_rows`]. It ends after the first error.
pub struct RolloutRows {
    files: VecDeque<SegmentFile>,
    open: Option<(PathBuf, ParquetRecordBatchReader)>,
    rows: std::vec::IntoIter<RolloutRow>,
}

impl RolloutRows {
    fn of(files: Vec<SegmentFile>) -> Self {
        Self { files: files.into(), open: None, rows: Vec::new().into_iter() }
    }

    /// The next batch of rows; `None` behind the last segment.
    fn batch(&mut self) -> Result<Option<Vec<RolloutRow>>, ReportError> {
        loop {
            let Some((path, reader)) = &mut self.open else {
                let Some(file) = self.files.pop_front() else { return Ok(None) };
                let reader = open(&file.path)?;
                self.open = Some((file.path, reader));
                continue;
            };
            let Some(batch) = reader.next() else {
                self.open = None;
                continue;
            };
            let batch = batch.map_err(ParquetError::from).map_err(in_parquet(path))?;
            let columns = RolloutColumns::of(&batch, path)?;
            return Ok(Some((0..batch.num_rows()).map(|index| columns.row(index)).collect()));
        }
    }

    fn stop(&mut self) {
        self.files.clear();
        self.open = None;
    }
}

impl Iterator for RolloutRows {
    type Item = Result<RolloutRow, ReportError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.rows.next() {
                return Some(Ok(row));
            }
            match self.batch() {
                Ok(batch) => self.rows = batch?.into_iter(),
                Err(error) => {
                    self.stop();
                    return Some(Err(error));
                }
            }
        }
    }
}

fn open(path: &Path) -> Result<ParquetRecordBatchReader, ReportError> {
    let file = File::open(path).map_err(at(path))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)
        .and_then(|builder| builder.with_batch_size(BATCH_ROWS).build());
    reader.map_err(in_parquet(path))
}

/// Up to `tasks` rollouts from the beginning, the middle and the end of the log, one per task: the
/// examples of a report. At most three segments are read.
///
/// # Errors
/// As [`read_rows`] and its iterator.
pub fn sample_rows(directory: &Path, tasks: usize) -> Result<Vec<RolloutRow>, ReportError> {
    let files = segments(directory)?;
    let (Some(first), Some(last)) = (files.first(), files.last()) else { return Ok(Vec::new()) };
    let middle_step = first.first + (last.last - first.first) / 2;
    let middle = files.iter().find(|file| file.last >= middle_step).unwrap_or(last);
    let mut chosen = first_tasks(first, 0, tasks)?;
    for row in first_tasks(middle, middle_step, tasks)?.into_iter().chain(last_tasks(last, tasks)?) {
        if chosen.iter().all(|known| known.ordinal != row.ordinal) {
            chosen.push(row);
        }
    }
    Ok(chosen)
}

/// The first sample of each of the first tasks from `step` on.
fn first_tasks(file: &SegmentFile, step: u64, tasks: usize) -> Result<Vec<RolloutRow>, ReportError> {
    let leaders = leaders(file).filter(|row| row.as_ref().map_or(true, |row| row.step >= step));
    leaders.take(tasks).collect()
}

/// The first sample of each of the last tasks.
fn last_tasks(file: &SegmentFile, tasks: usize) -> Result<VecDeque<RolloutRow>, ReportError> {
    let mut kept = VecDeque::new();
    for row in leaders(file) {
        kept.push_back(row?);
        if kept.len() > tasks {
            kept.pop_front();
        }
    }
    Ok(kept)
}

/// The first logged sample of each task of a segment.
fn leaders(file: &SegmentFile) -> impl Iterator<Item = Result<RolloutRow, ReportError>> {
    let mut previous = None;
    RolloutRows::of(vec![file.clone()]).filter(move |row| {
        let Ok(row) = row else { return true };
        previous.replace(row.ordinal) != Some(row.ordinal)
    })
}

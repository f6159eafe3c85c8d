//! The rollout log: parquet segments that end at checkpoints.

use super::ReportError;
use super::files::{at, publish, sync_directory, temporary};
use super::rollout_columns::to_batch;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Rows and tokens after which buffered rows are encoded, and encoded bytes after which they go to disk.
const BATCH_ROWS: usize = 256;
const BATCH_TOKENS: usize = 1 << 18;
const ROW_GROUP_BYTES: usize = 32 << 20;

/// One rollout with its score.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RolloutRow {
    /// Training step that used it, from 1.
    pub step: u64,
    /// Ordinal of the task.
    pub ordinal: u64,
    /// Number of the sample within its group.
    pub sample: u32,
    /// The document's name.
    pub document: String,
    /// Index of the token to predict within the document.
    pub position: u32,
    /// The position's label, if it is marked.
    pub label: Option<String>,
    /// Entropy of the proxy at the position, in nats.
    pub entropy: f32,
    /// Text before the position, cut to its last characters.
    pub context: String,
    /// The thought.
    pub thought: String,
    /// The prediction, if the reply holds one.
    pub prediction: Option<String>,
    /// Text behind the position, as much as the verifier looked at.
    pub truth: String,
    /// Name of the outcome.
    pub outcome: String,
    /// Reward.
    pub reward: f32,
    /// Advantage within the group.
    pub advantage: f32,
    /// Why the rollout ended.
    pub finish: String,
    /// Optimiser updates behind the weights that sampled it.
    pub policy_version: u64,
    /// Sampled token ids, the end token included.
    pub tokens: Vec<u32>,
    /// Log-probability of each token under the model at temperature 1, untruncated.
    pub logprobs: Vec<f32>,
    /// Log-probability of each token under the tempered, untruncated model.
    pub policy_logprobs: Vec<f32>,
    /// Log-probability of each token under the distribution it was drawn from.
    pub sampling_logprobs: Vec<f32>,
    /// Tokens before the reply.
    pub prompt_tokens: u32,
}

/// Writer of the rollout log.
///
/// Rows go to a temporary file as they come; [`RolloutLog::commit`] closes it and gives it the name of its
/// steps. Memory holds at most 256 rows or 2^18 tokens and 32 MiB of encoded columns, however long a segment is. A
/// segment is a pure function of its rows.
pub struct RolloutLog {
    directory: PathBuf,
    buffer: Vec<RolloutRow>,
    buffered_tokens: usize,
    segment: Option<Segment>,
}

struct Segment {
    writer: ArrowWriter<File>,
    path: PathBuf,
}

impl RolloutLog {
    /// A log in `directory`, which is created if it is absent. Rows of an earlier process that were not
    /// committed are gone.
    ///
    /// # Errors
    /// [`ReportError::Io`].
    pub fn new(directory: &Path) -> Result<Self, ReportError> {
        std::fs::create_dir_all(directory).map_err(at(directory))?;
        Ok(Self { directory: directory.into(), buffer: Vec::new(), buffered_tokens: 0, segment: None })
    }

    /// Adds a row to the current segment.
    ///
    /// # Errors
    /// [`ReportError::Parquet`] if the disk is full, for one.
    pub fn push(&mut self, row: RolloutRow) -> Result<(), ReportError> {
        self.buffered_tokens += row.tokens.len();
        self.buffer.push(row);
        if self.buffer.len() >= BATCH_ROWS || self.buffered_tokens >= BATCH_TOKENS {
            self.encode()?;
        }
        Ok(())
    }

    /// Closes the current segment as `rollouts-FIRST-LAST.parquet`; `None` if it has no rows.
    ///
    /// # Errors
    /// [`ReportError::SegmentReversed`] if `last_step < first_step`; [`ReportError::Io`] or
    /// [`ReportError::Parquet`] if the file cannot be written.
    pub fn commit(&mut self, first_step: u64, last_step: u64) -> Result<Option<PathBuf>, ReportError> {
        if last_step < first_step {
            let directory = self.directory.clone();
            return Err(ReportError::SegmentReversed { directory, first: first_step, last: last_step });
        }
        self.encode()?;
        let Some(Segment { mut writer, path: unfinished }) = self.segment.take() else { return Ok(None) };
        writer.finish().map_err(in_parquet(&unfinished))?;
        let path = self.directory.join(format!("rollouts-{first_step:06}-{last_step:06}.parquet"));
        publish(writer.inner(), &unfinished, &path)?;
        Ok(Some(path))
    }

    /// Removes the segments behind a checkpoint at `step`, drops rows that are not committed, and returns
    /// how many files it removed.
    ///
    /// # Errors
    /// [`ReportError::SegmentStraddles`] if a segment holds steps before and behind the checkpoint.
    pub fn discard_after(&mut self, step: u64) -> Result<u64, ReportError> {
        self.buffer.clear();
        self.buffered_tokens = 0;
        self.segment = None;
        let later: Vec<_> = segments(&self.directory)?.into_iter().filter(|file| file.last > step).collect();
        if let Some(file) = later.iter().find(|file| file.first <= step) {
            return Err(ReportError::SegmentStraddles { path: file.path.clone(), step });
        }
        for file in &later {
            std::fs::remove_file(&file.path).map_err(at(&file.path))?;
        }
        sync_directory(&self.directory)?;
        Ok(later.len() as u64)
    }

    /// Moves the buffered rows into the current segment, which is begun if there is none.
    fn encode(&mut self) -> Result<(), ReportError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let segment = match &mut self.segment {
            Some(segment) => segment,
            None => self.segment.insert(Segment::begin(&self.directory)?),
        };
        segment.write(&self.buffer).map_err(in_parquet(&segment.path))?;
        self.buffer.clear();
        self.buffered_tokens = 0;
        Ok(())
    }
}

impl Segment {
    fn begin(directory: &Path) -> Result<Self, ReportError> {
        let path = temporary(&directory.join("rollouts"));
        let file = File::create(&path).map_err(at(&path))?;
        let writer = begin_parquet(file).map_err(in_parquet(&path))?;
        Ok(Self { writer, path })
    }

    fn write(&mut self, rows: &[RolloutRow]) -> Result<(), ParquetError> {
        self.writer.write(&to_batch(rows)?)?;
        if self.writer.in_progress_size() >= ROW_GROUP_BYTES {
            self.writer.flush()?;
        }
        Ok(())
    }
}

fn begin_parquet(file: File) -> Result<ArrowWriter<File>, ParquetError> {
    let properties =
        WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    ArrowWriter::try_new(file, to_batch(&[])?.schema(), Some(properties))
}

/// Names the file in an error of the parquet library.
pub(super) fn in_parquet(path: &Path) -> impl Fn(ParquetError) -> ReportError {
    let path = path.to_owned();
    move |source| ReportError::Parquet { path: path.clone(), source }
}

/// A committed segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SegmentFile {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) path: PathBuf,
}

/// The committed segments of a directory in the order of their steps; none if the directory is absent.
pub(super) fn segments(directory: &Path) -> Result<Vec<SegmentFile>, ReportError> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(at(directory))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(at(directory))?.path();
        found.extend(segment_steps(&path).map(|(first, last)| SegmentFile { first, last, path }));
    }
    found.sort_by_key(|file| (file.first, file.last));
    Ok(found)
}

/// First and last step in a segment's name.
fn segment_steps(path: &Path) -> Option<(u64, u64)> {
    let name = path.file_name()?.to_str()?;
    let (first, last) = name.strip_prefix("rollouts-")?.strip_suffix(".parquet")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

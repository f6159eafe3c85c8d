//! Writing of task shards.

use super::manifest::{self, Fingerprints, Manifest, SCHEMA_VERSION, ShardEntry};
use super::{TaskCounts, TaskDocument, TasksError, codec};
use crate::corpus::{CorpusCounts, SourceRange};
use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use arrow::datatypes::Schema;
use arrow::ipc::writer::FileWriter;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// Documents in one record batch: the unit that a random access decodes.
pub(super) const ROWS_PER_BATCH: usize = 64;

/// Writes task documents as shards `tasks-00000.arrow`, `tasks-00001.arrow`, ... and, at the end,
/// the manifest that makes them exist, into a directory of their own.
///
/// Files are synced when they are complete, beside the writing of the next. Fewer than 64 documents wait
/// for others.
pub struct ShardWriter {
    directory: PathBuf,
    fingerprints: Fingerprints,
    schema: Arc<Schema>,
    shard_bytes: u64,
    /// Fewer rows than a record batch has.
    pending: Vec<RecordBatch>,
    open: Option<OpenShard>,
    finished: Vec<ShardEntry>,
    syncing: Vec<JoinHandle<Result<(), TasksError>>>,
}

/// A shard in the making.
struct OpenShard {
    path: PathBuf,
    writer: FileWriter<Hashing<BufWriter<File>>>,
    documents: u64,
    positions: u64,
}

impl ShardWriter {
    /// Starts in an empty directory. A shard is closed when it has `shard_bytes`.
    pub fn new(directory: &Path, fingerprints: Fingerprints, shard_bytes: u64) -> Self {
        Self {
            directory: directory.to_owned(),
            schema: Arc::new(codec::schema(&fingerprints)),
            fingerprints,
            shard_bytes,
            pending: Vec::new(),
            open: None,
            finished: Vec::new(),
            syncing: Vec::new(),
        }
    }

    /// The columns of a row.
    pub(super) fn schema(&self) -> &Arc<Schema> {
        &self.schema
    }

    /// Adds documents, each of which must have a position.
    ///
    /// # Errors
    /// Fails when a shard cannot be written.
    pub fn push(&mut self, documents: &[TaskDocument]) -> Result<(), TasksError> {
        let rows = codec::encode(&self.schema, documents).map_err(TasksError::arrow(&self.directory))?;
        self.push_rows(&rows)
    }

    /// Adds documents that are encoded already.
    pub(super) fn push_rows(&mut self, rows: &RecordBatch) -> Result<(), TasksError> {
        let (mut start, end) = (0, rows.num_rows());
        while start < end {
            let waiting: usize = self.pending.iter().map(RecordBatch::num_rows).sum();
            let count = (ROWS_PER_BATCH - waiting).min(end - start);
            self.pending.push(rows.slice(start, count));
            start += count;
            if waiting + count == ROWS_PER_BATCH {
                self.write_batch()?;
                self.close_full_shard()?;
            }
        }
        Ok(())
    }

    fn close_full_shard(&mut self) -> Result<(), TasksError> {
        let is_full =
            self.open.as_ref().is_some_and(|shard| shard.writer.get_ref().bytes >= self.shard_bytes);
        if is_full { self.close_shard() } else { Ok(()) }
    }

    /// Writes what is left, and the manifest.
    ///
    /// # Errors
    /// Fails when a file cannot be written.
    pub fn finish(
        mut self,
        sources: Vec<SourceRange>,
        corpus: CorpusCounts,
        counts: TaskCounts,
    ) -> Result<Manifest, TasksError> {
        self.write_batch()?;
        self.close_shard()?;
        let Self { directory, fingerprints, finished: shards, syncing, .. } = self;
        for synced in syncing {
            synced.join().unwrap_or_else(|panic| resume_unwind(panic))?;
        }
        let manifest =
            Manifest { schema_version: SCHEMA_VERSION, fingerprints, shards, sources, corpus, counts };
        manifest.write(&directory)?;
        Ok(manifest)
    }

    fn write_batch(&mut self) -> Result<(), TasksError> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let mut shard = match self.open.take() {
            Some(shard) => shard,
            None => self.open_shard()?,
        };
        let written = concat_batches(&self.schema, &self.pending).and_then(|batch| {
            shard.documents += batch.num_rows() as u64;
            shard.positions += codec::positions(&batch);
            shard.writer.write(&batch)
        });
        written.map_err(TasksError::arrow(&shard.path))?;
        self.pending.clear();
        self.open = Some(shard);
        Ok(())
    }

    fn open_shard(&self) -> Result<OpenShard, TasksError> {
        let path = self.directory.join(manifest::shard_name(self.finished.len()));
        let file = File::create(&path).map_err(TasksError::io(&path))?;
        let writer = FileWriter::try_new(Hashing::new(BufWriter::new(file)), &self.schema);
        let writer = writer.map_err(TasksError::arrow(&path))?;
        Ok(OpenShard { path, writer, documents: 0, positions: 0 })
    }

    fn close_shard(&mut self) -> Result<(), TasksError> {
        let Some(mut shard) = self.open.take() else { return Ok(()) };
        shard.writer.write_metadata("rpt.rows", shard.documents.to_string());
        shard.writer.finish().map_err(TasksError::arrow(&shard.path))?;
        let output = shard.writer.into_inner().map_err(TasksError::arrow(&shard.path))?;
        let (checksum, bytes) = (output.hasher.finalize().to_hex().to_string(), output.bytes);
        let file =
            output.inner.into_inner().map_err(|error| TasksError::io(&shard.path)(error.into_error()))?;
        let path = shard.path;
        self.syncing.push(thread::spawn(move || file.sync_all().map_err(TasksError::io(&path))));
        let file = manifest::shard_name(self.finished.len());
        let (documents, positions) = (shard.documents, shard.positions);
        self.finished.push(ShardEntry { file, bytes, checksum, documents, positions });
        Ok(())
    }
}

/// A writer that hashes what passes through it.
struct Hashing<W> {
    inner: W,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<W> Hashing<W> {
    fn new(inner: W) -> Self {
        Self { inner, hasher: blake3::Hasher::new(), bytes: 0 }
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        let written = self.inner.write(buffer)?;
        self.hasher.update(&buffer[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

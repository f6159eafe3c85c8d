//! Reading of task shards: memory-mapped, any row at any time.

use super::manifest::{Fingerprints, Manifest};
use super::writer::ROWS_PER_BATCH;
use super::{TaskDocument, TasksError, codec};
use arrow::buffer::Buffer;
use arrow::datatypes::Schema;
use arrow::error::ArrowError;
use arrow::ipc::reader::{FileDecoder, read_footer_length};
use arrow::ipc::{Block, convert, root_as_footer};
use memmap2::Mmap;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

/// A directory of task shards.
///
/// The files are mapped, not read; on the heap there are some 24 bytes for every 64 documents.
#[derive(Debug)]
pub struct TaskShards {
    directory: PathBuf,
    manifest: Manifest,
    shards: Vec<Shard>,
    /// Row at which each shard starts, and the number of rows.
    starts: Vec<u64>,
}

impl TaskShards {
    /// Opens the shards of a directory. File sizes, schemas and row counts are checked, contents
    /// are not: see [`TaskShards::verify`].
    ///
    /// # Errors
    /// Fails when the directory is unfinished or damaged, or its tasks were built with another
    /// tokenizer or template.
    pub fn open(directory: &Path, expected: &Fingerprints) -> Result<Self, TasksError> {
        let manifest = Manifest::load(directory)?;
        manifest.check_fingerprints(directory, expected)?;
        let schema = Arc::new(codec::schema(expected));
        let (mut shards, mut starts) = (Vec::new(), vec![0]);
        for entry in &manifest.shards {
            let shard = Shard::open(&directory.join(&entry.file), entry.bytes, &schema)?;
            if shard.blocks.len() as u64 != entry.documents.div_ceil(ROWS_PER_BATCH as u64) {
                return Err(TasksError::damaged(&shard.path, "its number of rows is not the manifest's"));
            }
            shards.push(shard);
            starts.push(starts.last().copied().unwrap_or_default() + entry.documents);
        }
        Ok(Self { directory: directory.to_owned(), manifest, shards, starts })
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Number of task documents.
    pub fn documents(&self) -> u64 {
        self.manifest.documents()
    }

    /// Number of positions: the tasks of one epoch.
    pub fn positions(&self) -> u64 {
        self.manifest.positions()
    }

    /// Reads every file and compares it with its checksum.
    ///
    /// # Errors
    /// Names the first damaged file.
    pub fn verify(&self) -> Result<(), TasksError> {
        for (shard, entry) in self.shards.iter().zip(&self.manifest.shards) {
            if blake3::hash(&shard.bytes).to_hex().as_str() != entry.checksum {
                return Err(TasksError::damaged(&shard.path, "its checksum is not the manifest's"));
            }
        }
        Ok(())
    }

    /// One task document, in the order of the shards.
    ///
    /// # Errors
    /// Fails when there is no such row or its data are damaged.
    pub fn document(&self, row: u64) -> Result<TaskDocument, TasksError> {
        let count = self.documents();
        if row >= count {
            let path = self.directory.clone();
            return Err(TasksError::OutOfRange { path, what: "row", index: row, count });
        }
        let shard = self.starts.partition_point(|&start| start <= row) - 1;
        self.shards[shard].document((row - self.starts[shard]) as usize)
    }
}

/// One mapped Arrow file.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    bytes: Buffer,
    decoder: FileDecoder,
    /// Where its record batches lie.
    blocks: Vec<Block>,
}

/// Size of the footer's length and the magic bytes at the end of an Arrow file.
const TRAILER: usize = 10;

impl Shard {
    fn open(path: &Path, expected_bytes: u64, expected: &Arc<Schema>) -> Result<Self, TasksError> {
        let file = File::open(path).map_err(TasksError::io(path))?;
        let found_bytes = file.metadata().map_err(TasksError::io(path))?.len();
        if found_bytes != expected_bytes {
            let what = format!("it has {found_bytes} bytes instead of {expected_bytes}");
            return Err(TasksError::damaged(path, what));
        }
        let bytes = map(&file).map_err(TasksError::io(path))?;
        let (schema, decoder, blocks) = contained(path, || read_footer(&bytes, expected))?;
        if schema != **expected {
            return Err(TasksError::damaged(path, "its schema or fingerprints are not the manifest's"));
        }
        Ok(Self { path: path.to_owned(), bytes, decoder, blocks })
    }

    fn document(&self, row: usize) -> Result<TaskDocument, TasksError> {
        let (batch, row) = (row / ROWS_PER_BATCH, row % ROWS_PER_BATCH);
        let document = contained(&self.path, || {
            let block = &self.blocks[batch];
            let data =
                block_bytes(&self.bytes, block).ok_or_else(|| damaged("a block lies outside of the file"))?;
            let batch =
                self.decoder.read_record_batch(block, &data)?.ok_or_else(|| damaged("a block is empty"))?;
            if row >= batch.num_rows() {
                return Err(damaged("a block has too few rows"));
            }
            codec::decode(&batch, row).map_err(ArrowError::IpcError)
        })?;
        Ok(document)
    }
}

fn damaged(what: &str) -> ArrowError {
    ArrowError::IpcError(what.to_owned())
}

/// Maps a file as an Arrow buffer without copying it.
fn map(file: &File) -> std::io::Result<Buffer> {
    // SAFETY: a shard is never written to once it has its name (the writer renames it complete),
    // so the mapped bytes do not change underneath the references.
    let mapping = Arc::new(unsafe { Mmap::map(file)? });
    let start =
        NonNull::new(mapping.as_ptr().cast_mut()).ok_or_else(|| std::io::Error::other("empty mapping"))?;
    // SAFETY: `start` is valid for the mapping's length, and the buffer owns the mapping. Arrow
    // buffers are read-only, so the bytes are never written through the pointer.
    Ok(unsafe { Buffer::from_custom_allocation(start, mapping.len(), mapping) })
}

/// Decodes foreign bytes. The decoder checks what it reads, but some contradictions in a hostile
/// file make it panic; those are damage to report, not a reason to end the run.
fn contained<T>(path: &Path, decode: impl FnOnce() -> Result<T, ArrowError>) -> Result<T, TasksError> {
    match catch_unwind(AssertUnwindSafe(decode)) {
        Ok(decoded) => decoded.map_err(|error| TasksError::damaged(path, error.to_string())),
        Err(_) => Err(TasksError::damaged(path, "its contents contradict each other")),
    }
}

type Footer = (Schema, FileDecoder, Vec<Block>);

fn read_footer(bytes: &Buffer, expected: &Arc<Schema>) -> Result<Footer, ArrowError> {
    let (body, trailer) = bytes.split_last_chunk::<TRAILER>().ok_or_else(|| damaged("it is too short"))?;
    let length = read_footer_length(*trailer)?;
    let start =
        body.len().checked_sub(length).ok_or_else(|| damaged("its footer is longer than the file"))?;
    let footer = root_as_footer(&body[start..]).map_err(|error| ArrowError::IpcError(error.to_string()))?;
    let schema = convert::try_fb_to_schema(footer.schema().ok_or_else(|| damaged("it has no schema"))?)?;
    let blocks = footer.recordBatches().ok_or_else(|| damaged("it has no record batches"))?;
    let decoder = FileDecoder::new(Arc::clone(expected), footer.version());
    Ok((schema, decoder, blocks.iter().copied().collect()))
}

/// The bytes of a block, if it lies inside of the file.
fn block_bytes(bytes: &Buffer, block: &Block) -> Option<Buffer> {
    let start = usize::try_from(block.offset()).ok()?;
    let metadata = usize::try_from(block.metaDataLength()).ok()?;
    let length = usize::try_from(block.bodyLength()).ok()?.checked_add(metadata)?;
    let end = start.checked_add(length)?;
    (end <= bytes.len()).then(|| bytes.slice_with_length(start, length))
}

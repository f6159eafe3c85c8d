//! The corpus and its stream of documents.

use super::Document;
use super::blob::Blob;
use super::columns::{Columns, Rows};
use super::counts::{CorpusCounts, DUPLICATE, NEAR_DUPLICATE, Quarantined};
use super::duplicates::{Duplicates, Repeat, UnitDuplicates};
use super::error::CorpusError;
use super::held_out::HeldOut;
use super::mixture::{self, Part};
use super::operations::{Draws, admit};
use super::shard::{Batches, Shard};
use super::source::{Format, SourceFile};
use crate::config::CorpusConfig;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// A corpus: parquet and JSON-lines files in a fixed order, with their columns checked. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Corpus {
    config: Arc<CorpusConfig>,
    files: Arc<[SourceFile]>,
    parts: Arc<[Part]>,
    held_out: Option<Arc<HeldOut>>,
    duplicates: Option<Arc<Duplicates>>,
}

impl Corpus {
    /// Resolves the sources, checks the columns of the first file of each with a readable footer, and reads
    /// the held-out text that documents must not repeat. Duplicates are left in: see [`Corpus::without`].
    ///
    /// # Errors
    /// A source does not exist, cannot be reached or holds no file of a corpus; no file is readable;
    /// the text or id column is missing or of another type.
    pub fn open(config: &CorpusConfig) -> Result<Self, CorpusError> {
        let (files, parts) = mixture::open(config)?;
        let held_out = config.decontaminate.as_ref().map(|settings| HeldOut::read(config, settings));
        let corpus = Self {
            config: Arc::new(config.clone()),
            files: files.into(),
            parts: parts.into(),
            held_out: held_out.transpose()?.map(Arc::new),
            duplicates: None,
        };
        (0..corpus.parts.len()).try_for_each(|part| corpus.check_part(part))?;
        Ok(corpus)
    }

    /// The same without the documents that a search found to repeat an earlier one.
    #[must_use]
    pub fn without(self, duplicates: Duplicates) -> Self {
        Self { duplicates: Some(Arc::new(duplicates)), ..self }
    }

    fn check_part(&self, part: usize) -> Result<(), CorpusError> {
        let mut unreadable = None;
        for file in self.files.iter().filter(|file| file.part == part) {
            let checked = match Shard::open(file) {
                Ok(shard) => self.check(&shard, file),
                Err(reason) => {
                    unreadable.get_or_insert(CorpusError::Unreadable { file: file.path.clone(), reason });
                    file.failure().map_or(Ok(false), Err)
                }
            };
            if checked.map_err(|error| file.failure().unwrap_or(error))? {
                return Ok(());
            }
        }
        Err(unreadable.unwrap_or_else(|| CorpusError::NoFiles { place: self.config.place() }))
    }

    /// Whether the columns are there, which is an error otherwise.
    fn check(&self, shard: &Shard, file: &SourceFile) -> Result<bool, CorpusError> {
        shard.check(&file.path, &self.part_of(file).columns(shard, &file.path)?).map(|()| true)
    }

    /// The source that a file is of.
    pub(super) fn part_of(&self, file: &SourceFile) -> &Part {
        &self.parts[file.part]
    }

    /// The share of documents that is read of each source of a mixture, by its name.
    pub fn rates(&self) -> impl Iterator<Item = (&str, f64)> {
        self.parts.iter().filter(|part| !part.name.is_empty()).map(|part| (part.name.as_str(), part.rate))
    }

    /// Which documents are read and how, in words: with [`Corpus::fingerprint`], all that decides what the
    /// stream of documents is.
    pub fn reading(&self) -> String {
        let config = &self.config;
        let plain = format!("{} {} {:?}", config.text_column, config.min_bytes, config.max_documents);
        let changed = CorpusConfig {
            text_column: config.text_column.clone(),
            max_documents: config.max_documents,
            source: String::new(),
            seed: None,
            ..config.as_ref().clone()
        };
        if changed == config.untouched(String::new()) {
            return plain;
        }
        let parts: Vec<_> = self.parts.iter().map(|part| (&part.text_column, part.rate)).collect();
        let bounds = (config.max_bytes, config.normalization, config.seed);
        format!("{plain} {parts:?} {bounds:?} {:?} {:?}", config.deduplicate, config.decontaminate)
    }

    /// The files, in reading order; of those in a store, their addresses.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// Digest of the files' names, lengths and footers (of JSON lines: beginnings and ends): a cursor
    /// belongs to a corpus with the same one, wherever it lies.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn fingerprint(&self) -> Result<String, CorpusError> {
        let mut hasher = blake3::Hasher::new();
        for file in self.files.iter() {
            let (length, margins) = margins(file).map_err(CorpusError::io(&file.path))?;
            hasher.update(file.name.as_bytes()).update(&[0]).update(&length.to_le_bytes()).update(&margins);
        }
        if let Some(held_out) = &self.held_out {
            hasher.update(held_out.digest().as_bytes());
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// A stream of all documents.
    pub fn documents(&self) -> Documents {
        self.documents_from(Cursor::default())
    }

    /// A stream of the documents between two places of which the first is reached.
    pub(super) fn documents_between(&self, start: Place, end: Place) -> Documents {
        let cursor = Cursor { file: start.file, row_group: start.row_group, ..Cursor::default() };
        let is_part = (start, end) != (Place::START, Place::END);
        Documents { end, is_part, ..self.documents_from(cursor) }
    }

    /// The largest number of documents, if there is one.
    pub(super) fn limit(&self) -> Option<u64> {
        self.config.max_documents
    }

    /// The files, in reading order.
    pub(super) fn source_files(&self) -> &[SourceFile] {
        &self.files
    }

    /// A stream of the documents after a cursor: exactly those that the stream that gave the cursor
    /// would have gone on with.
    pub fn documents_from(&self, cursor: Cursor) -> Documents {
        Documents {
            corpus: self.clone(),
            cursor,
            end: Place::END,
            is_part: false,
            shard: None,
            batches: None,
            rows: None,
            first_row: 0,
            draws: Draws::of("", 0, 1.0),
            repeated: None,
            counts: CorpusCounts::default(),
            finished: false,
        }
    }
}

/// Length of a file and the bytes that tell it from others of its name and length.
fn margins(file: &SourceFile) -> io::Result<(u64, Vec<u8>)> {
    let blob = Blob::open(file)?;
    Ok((blob.length(), blob.margins(file.format() != Format::Parquet)?))
}

/// The start of a row group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) file: usize,
    pub(super) row_group: usize,
}

impl Place {
    /// The first row group of the first file.
    pub(super) const START: Self = Self { file: 0, row_group: 0 };
    /// After every file.
    pub(super) const END: Self = Self { file: usize::MAX, row_group: 0 };
}

/// A place between two documents, from which reading can go on. Start with the default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Number of the file, in reading order.
    pub file: usize,
    /// Row group of that file.
    pub row_group: usize,
    /// Row of that row group to read next.
    pub row: usize,
    /// Documents delivered so far: `max_documents` counts across restarts.
    pub documents: u64,
    /// Files and row groups quarantined so far: `max_quarantined` counts across restarts.
    pub quarantined: u64,
}

impl Cursor {
    fn place(&self) -> Place {
        Place { file: self.file, row_group: self.row_group }
    }

    fn next_file(&mut self) {
        *self = Self { file: self.file + 1, row_group: 0, row: 0, ..*self };
    }

    fn next_row_group(&mut self) {
        *self = Self { row_group: self.row_group + 1, row: 0, ..*self };
    }
}

/// The stream of documents. Memory: the footer of one file and one record batch, of 256 rows or about
/// 8 MiB; of a file in a store also 64 MiB that were fetched ahead.
///
/// Ends after the first error. An unreadable file or row group is quarantined and passed over; what
/// it had delivered before the damage was met stays delivered ([`Quarantined::rows_read`]).
pub struct Documents {
    corpus: Corpus,
    cursor: Cursor,
    /// Where reading ends, at the latest.
    end: Place,
    /// A part without a document is no mistake.
    is_part: bool,
    shard: Option<(Shard, Columns)>,
    batches: Option<Batches>,
    rows: Option<Rows>,
    /// Row of the file at which the current row group starts.
    first_row: u64,
    /// The draws of the current file.
    draws: Draws,
    /// The documents of the current unit that repeat an earlier one, where these are left out.
    repeated: Option<UnitDuplicates>,
    counts: CorpusCounts,
    finished: bool,
}

/// Where reading stopped short: in a row group, or in the file as a whole.
enum Damage {
    File(String),
    RowGroup(String),
    /// Something else than the corpus cannot be read.
    Elsewhere(CorpusError),
}

impl Documents {
    /// The place after the last delivered document (the start before the first).
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// What has been read, dropped and quarantined by this stream so far.
    pub fn counts(&self) -> &CorpusCounts {
        &self.counts
    }

    fn advance(&mut self) -> Result<Option<Document>, CorpusError> {
        let limit = self.corpus.config.max_documents.unwrap_or(u64::MAX);
        while self.cursor.documents < limit
            && self.cursor.place() < self.end
            && self.cursor.file < self.corpus.files.len()
        {
            if let Some(document) = self.next_in_batch() {
                return Ok(Some(document));
            }
            if let Err(damage) = self.load() {
                self.quarantine(damage)?;
            }
        }
        Ok(None)
    }

    /// The next document of the current batch.
    fn next_in_batch(&mut self) -> Option<Document> {
        let rows = self.rows.as_ref()?;
        while self.cursor.row < rows.end() {
            let row = self.cursor.row;
            self.cursor.row += 1;
            let place = self.first_row.saturating_add(row as u64);
            let (config, held_out) = (&self.corpus.config, self.corpus.held_out.as_deref());
            let admitted = rows.text(row).and_then(|text| admit(text, place, self.draws, config, held_out));
            let text = match admitted {
                Ok(text) => text,
                Err(reason) => {
                    self.counts.drop_one(reason);
                    continue;
                }
            };
            // A limit on the documents counts what is repeated too: whoever searched for it met it.
            self.cursor.documents += 1;
            let repeated = self.repeated.as_ref().and_then(|found| found.get(self.cursor.file, place));
            if let Some(repeat) = repeated {
                self.counts.drop_one(if repeat == Repeat::Exact { DUPLICATE } else { NEAR_DUPLICATE });
                continue;
            }
            let id = rows.id(row).map_or_else(|| self.default_id(row), str::to_owned);
            let marks = rows.marks(row, &text, &mut self.counts);
            self.counts.documents += 1;
            self.counts.bytes += text.len() as u64;
            return Some(Document { id, text: text.into_owned(), marks });
        }
        None
    }

    /// File and row of the last document.
    pub(super) fn last_row(&self) -> (usize, u64) {
        (self.cursor.file, self.first_row.saturating_add(self.cursor.row as u64).saturating_sub(1))
    }

    /// `file:row`, the row counted from 0 over the whole file.
    fn default_id(&self, row: usize) -> String {
        let name = &self.corpus.files[self.cursor.file].name;
        format!("{name}:{}", self.first_row.saturating_add(row as u64))
    }

    /// Takes one step towards the next batch: opens a file or a row group, reads, or moves on.
    fn load(&mut self) -> Result<(), Damage> {
        self.rows = None;
        let Some((shard, columns)) = &self.shard else { return self.open_file().map_err(Damage::File) };
        if self.cursor.row_group >= shard.row_groups() {
            self.shard = None;
            self.cursor.next_file();
            return Ok(());
        }
        let Some(batches) = &mut self.batches else {
            let opened = shard.batches(self.cursor.row_group, columns, self.cursor.row);
            self.batches = Some(opened.map_err(Damage::RowGroup)?);
            self.first_row = shard.first_row(self.cursor.row_group);
            return self.find_repeated().map_err(Damage::Elsewhere);
        };
        let rows = shard.advance(self.cursor.row_group, columns, batches).map_err(Damage::RowGroup)?;
        if rows.is_some() {
            self.rows = rows;
        } else {
            self.counts.row_groups += 1;
            self.batches = None;
            self.cursor.next_row_group();
        }
        Ok(())
    }

    /// Reads which documents of the unit ahead repeat an earlier one.
    fn find_repeated(&mut self) -> Result<(), CorpusError> {
        let Some(duplicates) = &self.corpus.duplicates else { return Ok(()) };
        let unit = duplicates.unit_of(self.cursor.place());
        if self.repeated.as_ref().is_none_or(|repeated| repeated.unit != unit) {
            self.repeated = Some(duplicates.of_unit(unit)?);
        }
        Ok(())
    }

    fn open_file(&mut self) -> Result<(), String> {
        let file = &self.corpus.files[self.cursor.file];
        let part = self.corpus.part_of(file);
        let shard = Shard::open(file)?;
        let columns = part.columns(&shard, &file.path).map_err(|error| error.to_string())?;
        self.draws = Draws::of(&file.name, self.corpus.config.seed.unwrap_or(0), part.rate);
        self.shard = Some((shard, columns));
        // A file that several units read is counted by the first.
        self.counts.files += u64::from(self.cursor.row_group == 0);
        Ok(())
    }

    /// Records the damage and passes over the damaged place, unless there has been too much of it.
    fn quarantine(&mut self, damage: Damage) -> Result<(), CorpusError> {
        let file = &self.corpus.files[self.cursor.file];
        // What a store does not give today is not damage: another run must not differ for it.
        if let Some(error) = file.failure() {
            return Err(error);
        }
        let file = file.path.clone();
        let (row_group, reason) = match damage {
            Damage::Elsewhere(error) => return Err(error),
            Damage::File(reason) => (None, reason),
            Damage::RowGroup(reason) => (Some(self.cursor.row_group), reason),
        };
        self.counts.quarantine(Quarantined { file, row_group, rows_read: self.cursor.row as u64, reason });
        self.cursor.quarantined += 1;
        self.batches = None;
        if row_group.is_some() {
            self.cursor.next_row_group();
        } else {
            self.cursor.next_file();
        }
        let (total, limit) = (self.cursor.quarantined, self.corpus.config.max_quarantined);
        if total <= limit {
            return Ok(());
        }
        Err(CorpusError::TooManyQuarantined { total, limit, first: self.counts.first_quarantined() })
    }

    /// A stream that ends without a document ever delivered is a mistake, not a small corpus.
    fn check_not_empty(&self) -> Result<(), CorpusError> {
        if self.cursor.documents > 0 || self.corpus.config.max_documents == Some(0) || self.is_part {
            return Ok(());
        }
        let place = self.corpus.config.place();
        Err(CorpusError::Empty { place, dropped: self.counts.losses() })
    }
}

impl Iterator for Documents {
    type Item = Result<Document, CorpusError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.finished {
            return None;
        }
        let item = self.advance().transpose();
        if item.as_ref().is_none_or(Result::is_err) {
            self.finished = true;
        }
        item.or_else(|| self.check_not_empty().err().map(Err))
    }
}

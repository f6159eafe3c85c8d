//! Documents that repeat an earlier one, found with bounded memory by as many workers as there are.
//!
//! A document has keys: one of its text, and one for each band of its `MinHash` signature. It is dropped
//! when any of them is also a key of an earlier document, whether that one is dropped or not. So units of
//! the corpus are read apart, each leaving its keys sorted in a file; ranges of keys are compared apart,
//! each leaving the places to drop; and every one of these files is the same whoever makes it.

mod keys;
mod minhash;

use super::error::CorpusError;
use super::reader::{Corpus, Documents, Place};
use super::units::Unit;
use crate::checkpoint::{atomic_write, temporary_name};
use crate::config::Deduplication;
use crate::ordered::{Batches, ordered_map};
use keys::{Drop, KeyReader, KeyWriter, Partition, Record, numbers, repeated, settle};
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Records that are compared at a time, 32 bytes each.
const RECORDS_PER_PARTITION: u64 = 1 << 22;
/// Bits of a place that hold the row; the file's number has those above, and a [`Drop`] one more below.
const ROW_BITS: u32 = 38;

/// The search for the repeated documents of a corpus.
#[derive(Clone, Debug)]
pub struct DuplicateSearch {
    corpus: Corpus,
    settings: Deduplication,
    units: Vec<Unit>,
    directory: PathBuf,
}

impl DuplicateSearch {
    /// A search in units of about `unit_bytes`. What it finds is kept in a directory below `root` that is
    /// named after the corpus and the settings.
    ///
    /// # Errors
    /// When a file cannot be read or the directory not be made, or the corpus has too many files.
    pub fn open(
        corpus: &Corpus,
        settings: &Deduplication,
        unit_bytes: u64,
        root: &Path,
    ) -> Result<Self, CorpusError> {
        let text = format!("{} {} {unit_bytes} {settings:?}", corpus.fingerprint()?, corpus.reading());
        let directory = root.join(&blake3::hash(text.as_bytes()).to_hex()[..16]);
        fs::create_dir_all(&directory).map_err(CorpusError::io(&directory))?;
        let units = corpus.units(unit_bytes);
        Ok(Self { corpus: corpus.clone(), settings: settings.clone(), units, directory })
    }

    /// Number of units.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    fn keys(&self, unit: usize) -> PathBuf {
        self.directory.join(format!("unit-{unit:05}.keys"))
    }

    /// Whether the keys of a unit are there.
    pub fn has_keys(&self, unit: usize) -> bool {
        self.keys(unit).exists()
    }

    /// Reads a unit and leaves its keys; `keep_on` is asked before every document.
    ///
    /// # Errors
    /// When the unit cannot be read or the file not be written, and those of `keep_on`.
    pub fn find_keys<E: From<CorpusError> + Send>(
        &self,
        unit: usize,
        keep_on: impl Fn() -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let path = self.keys(unit);
        let documents = Placed(self.corpus.documents_of(&self.units[unit])).map(|document| {
            keep_on()?;
            Ok(document?)
        });
        let partial = temporary_name(&path).map_err(CorpusError::io(&path))?;
        let file = File::create(&partial).map_err(CorpusError::io(&partial))?;
        let mut writer = KeyWriter::new(file);
        let batches = Batches::new(documents, |(_, text): &(u64, String)| text.len());
        let keys = |batch: Result<Vec<(u64, String)>, E>| batch.map(|batch| self.records(&batch));
        ordered_map(batches, keys, |records| {
            let mut records = records?.into_iter();
            Ok::<(), E>(records.try_for_each(|record| writer.push(record)).map_err(CorpusError::io(&path))?)
        })?;
        let finished = writer.finish().and_then(|file| file.sync_all());
        match finished.and_then(|()| fs::rename(&partial, &path)) {
            // Another worker was first, and has cleared away what this one was writing.
            Err(_) if path.exists() => Ok(()),
            named => Ok(named.map_err(CorpusError::io(&path))?),
        }
    }

    /// The keys of some documents.
    fn records(&self, documents: &[(u64, String)]) -> Vec<Record> {
        let mut records = Vec::new();
        for (place, text) in documents {
            let place = *place;
            if self.settings.exact {
                let mut key = [0; 16];
                key.copy_from_slice(&blake3::hash(text.as_bytes()).as_bytes()[..16]);
                records.push(Record { key: u128::from_le_bytes(key) & !1, place });
            }
            if self.settings.near {
                minhash::each_band(text, &self.settings, |key| records.push(Record { key: key | 1, place }));
            }
        }
        records
    }

    /// Number of ranges of keys to compare, once the keys of all units are there.
    ///
    /// # Errors
    /// When a file of keys cannot be read.
    pub fn partitions(&self) -> Result<u64, CorpusError> {
        let count = |unit| self.reader(unit).map(|reader| reader.len());
        let records = (0..self.units()).map(count).sum::<Result<u64, _>>()?;
        Ok(records.div_ceil(RECORDS_PER_PARTITION).max(1))
    }

    fn reader(&self, unit: usize) -> Result<KeyReader, CorpusError> {
        let path = self.keys(unit);
        KeyReader::open(&path).map_err(CorpusError::io(&path))
    }

    fn drops(&self, partition: Partition) -> PathBuf {
        self.directory.join(format!("part-{:05}-of-{:05}.drops", partition.number, partition.count))
    }

    /// Compares a range of keys over all units, unless that has been done.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn compare(&self, number: u64, count: u64) -> Result<(), CorpusError> {
        let partition = Partition { number, count };
        let path = self.drops(partition);
        if path.exists() {
            return Ok(());
        }
        let mut records = Vec::new();
        for unit in 0..self.units() {
            let read = self.reader(unit)?.read_partition(partition, &mut records);
            read.map_err(CorpusError::io(&self.keys(unit)))?;
        }
        records.sort_unstable();
        let mut drops: Vec<Drop> = repeated(&records).collect();
        settle(&mut drops);
        let bytes: Vec<u8> = drops.iter().flat_map(|drop| drop.to_le_bytes()).collect();
        atomic_write(&path, &bytes)
            .map_err(|error| CorpusError::io(&path)(io::Error::other(error.to_string())))
    }

    /// What was found, once all ranges are compared. Removes what workers that were stopped have left.
    pub fn finish(self, partitions: u64) -> Duplicates {
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(".unit-") {
                // What cannot be removed harms nobody.
                let _ = fs::remove_file(entry.path());
            }
        }
        Duplicates { search: self, partitions }
    }
}

/// Documents with their places.
struct Placed(Documents);

impl Iterator for Placed {
    type Item = Result<(u64, String), CorpusError>;

    fn next(&mut self) -> Option<Self::Item> {
        let document = self.0.next()?;
        Some(document.and_then(|document| {
            let (file, row) = self.0.last_row();
            Ok((place(file, row).ok_or(CorpusError::TooLarge)?, document.text))
        }))
    }
}

/// A row of a file as one number that grows along the corpus.
fn place(file: usize, row: u64) -> Option<u64> {
    let file = u64::try_from(file).ok().filter(|file| *file < 1 << (63 - ROW_BITS))?;
    (row < 1 << ROW_BITS).then_some((file << ROW_BITS) | row)
}

/// The documents of a corpus that repeat an earlier one.
#[derive(Debug)]
pub struct Duplicates {
    search: DuplicateSearch,
    partitions: u64,
}

impl Duplicates {
    /// The number of the unit that a place of the corpus lies in.
    pub(super) fn unit_of(&self, place: Place) -> usize {
        self.search.units.partition_point(|unit| unit.start <= place).saturating_sub(1)
    }

    /// Those of a unit. Memory: 8 bytes for each.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub(super) fn of_unit(&self, unit: usize) -> Result<UnitDuplicates, CorpusError> {
        let path = self.search.keys(unit);
        let mut drops =
            KeyReader::open(&path).and_then(|mut reader| reader.drops()).map_err(CorpusError::io(&path))?;
        let (start, end) = (self.first_drop(unit), self.first_drop(unit + 1));
        for number in 0..self.partitions {
            let path = self.search.drops(Partition { number, count: self.partitions });
            drops.extend(drops_between(&path, start, end).map_err(CorpusError::io(&path))?);
        }
        settle(&mut drops);
        Ok(UnitDuplicates { unit, drops })
    }

    /// What every drop of a unit, and none of those before, reaches.
    fn first_drop(&self, unit: usize) -> Drop {
        let Some(unit) = self.search.units.get(unit) else { return Drop::MAX };
        place(unit.start.file, unit.first_row).map_or(Drop::MAX, |place| place * 2)
    }
}

/// The drops of a sorted file that lie in `start..end`.
fn drops_between(path: &Path, start: Drop, end: Drop) -> io::Result<Vec<Drop>> {
    let mut file = File::open(path)?;
    let count = file.metadata()?.len() / 8;
    let mut first_from = |bound: Drop| -> io::Result<u64> {
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = low + (high - low) / 2;
            file.seek(SeekFrom::Start(middle * 8))?;
            let drop = numbers(&mut file, 1)?.first().copied().unwrap_or(Drop::MAX);
            if drop < bound { low = middle + 1 } else { high = middle }
        }
        Ok(low)
    };
    let (first, last) = (first_from(start)?, first_from(end)?);
    file.seek(SeekFrom::Start(first * 8))?;
    numbers(&mut file, (last - first) as usize)
}

/// How a document repeats an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Repeat {
    Exact,
    Near,
}

/// The documents of one unit that repeat an earlier one, of that unit or another.
#[derive(Debug)]
pub(super) struct UnitDuplicates {
    pub(super) unit: usize,
    drops: Vec<Drop>,
}

impl UnitDuplicates {
    pub(super) fn get(&self, file: usize, row: u64) -> Option<Repeat> {
        let exact = place(file, row)? * 2;
        let drop = self.drops.get(self.drops.partition_point(|drop| *drop < exact))?;
        match drop.checked_sub(exact)? {
            0 => Some(Repeat::Exact),
            1 => Some(Repeat::Near),
            _ => None,
        }
    }
}

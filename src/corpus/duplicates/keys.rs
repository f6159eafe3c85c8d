//! What one unit of a corpus says of its documents: under which keys others may meet them.
//!
//! A file holds runs of records (a key of 16 bytes, a place of 8) that are sorted each, then the places of
//! documents that repeat an earlier one of the same run, then the lengths of the runs and, in the last
//! 24 bytes, both counts and a mark. All numbers are little-endian.

use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

/// Records that are sorted at a time: what a writer holds in memory, 32 bytes each.
const RECORDS_PER_RUN: usize = 1 << 20;
const RECORD_BYTES: u64 = 24;
const MARK: u64 = u64::from_le_bytes(*b"rptkeys1");

/// A document under one of its keys. The lowest bit of a key, and of a [`Drop`], says what the key is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Record {
    pub(super) key: u128,
    pub(super) place: u64,
}

/// A document that repeats an earlier one: twice its place, and one more where it does so nearly.
pub(super) type Drop = u64;

/// What is dropped when records, sorted, meet under a key: all but the first.
pub(super) fn repeated(records: &[Record]) -> impl Iterator<Item = Drop> + '_ {
    let later = records.windows(2).filter(|pair| pair[0].key == pair[1].key);
    later.map(|pair| pair[1].place * 2 + (pair[1].key & 1) as u64)
}

/// Sorts drops and keeps one for each document, the exact one before the near one.
pub(super) fn settle(drops: &mut Vec<Drop>) {
    drops.sort_unstable();
    drops.dedup_by_key(|drop| *drop / 2);
}

/// Writes the keys of a unit.
pub(super) struct KeyWriter<W: Write> {
    output: BufWriter<W>,
    pending: Vec<Record>,
    runs: Vec<u64>,
    drops: Vec<Drop>,
}

impl<W: Write> KeyWriter<W> {
    pub(super) fn new(output: W) -> Self {
        Self { output: BufWriter::new(output), pending: Vec::new(), runs: Vec::new(), drops: Vec::new() }
    }

    pub(super) fn push(&mut self, record: Record) -> io::Result<()> {
        self.pending.push(record);
        if self.pending.len() < RECORDS_PER_RUN { Ok(()) } else { self.write_run() }
    }

    fn write_run(&mut self) -> io::Result<()> {
        self.pending.sort_unstable();
        self.drops.extend(repeated(&self.pending));
        // Of many copies the first alone goes on, so that no key can fill the memory of those who compare.
        self.pending.dedup_by_key(|record| record.key);
        for Record { key, place } in &self.pending {
            self.output.write_all(&key.to_le_bytes())?;
            self.output.write_all(&place.to_le_bytes())?;
        }
        self.runs.push(self.pending.len() as u64);
        self.pending.clear();
        Ok(())
    }

    /// Writes what is left, and returns what it was written to.
    pub(super) fn finish(mut self) -> io::Result<W> {
        self.write_run()?;
        settle(&mut self.drops);
        let counts = [self.runs.len() as u64, self.drops.len() as u64, MARK];
        for number in self.drops.iter().chain(&self.runs).chain(&counts) {
            self.output.write_all(&number.to_le_bytes())?;
        }
        self.output.into_inner().map_err(io::IntoInnerError::into_error)
    }
}

/// Reads the keys of a unit.
pub(super) struct KeyReader {
    file: File,
    /// First record of each run and the record after the last.
    starts: Vec<u64>,
    drops: u64,
}

impl KeyReader {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let damaged = || io::Error::new(io::ErrorKind::InvalidData, "it is damaged: delete it");
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.checked_sub(24).ok_or_else(damaged)?))?;
        let [runs, drops, mark] = *numbers(&mut file, 3)?.as_slice() else { return Err(damaged()) };
        let table = runs.checked_mul(8).and_then(|bytes| bytes.checked_add(24));
        let table = table.filter(|&bytes| mark == MARK && bytes <= length).ok_or_else(damaged)?;
        file.seek(SeekFrom::Start(length - table))?;
        let mut starts = vec![0_u64];
        for run in numbers(&mut file, runs as usize)? {
            let end = starts.last().and_then(|start| start.checked_add(run));
            starts.push(end.ok_or_else(damaged)?);
        }
        let records = starts.last().and_then(|count| count.checked_mul(RECORD_BYTES));
        let expected = records.and_then(|bytes| bytes.checked_add(drops.checked_mul(8)?)?.checked_add(table));
        if expected == Some(length) { Ok(Self { file, starts, drops }) } else { Err(damaged()) }
    }

    /// Number of records.
    pub(super) fn len(&self) -> u64 {
        self.starts.last().copied().unwrap_or(0)
    }

    /// The documents that repeat one of the same run, sorted.
    pub(super) fn drops(&mut self) -> io::Result<Vec<Drop>> {
        self.file.seek(SeekFrom::Start(self.len() * RECORD_BYTES))?;
        numbers(&mut self.file, self.drops as usize)
    }

    /// Adds the records of all runs whose keys lie in a range.
    pub(super) fn read_partition(
        &mut self,
        partition: Partition,
        records: &mut Vec<Record>,
    ) -> io::Result<()> {
        for run in 0..self.starts.len() - 1 {
            let (start, end) = (self.starts[run], self.starts[run + 1]);
            let first = self.partition_point(start, end, |key| partition.is_after(key))?;
            let last = self.partition_point(first, end, |key| partition.ends_after(key))?;
            self.file.seek(SeekFrom::Start(first * RECORD_BYTES))?;
            let mut bytes = vec![0; ((last - first) * RECORD_BYTES) as usize];
            self.file.read_exact(&mut bytes)?;
            records.extend(bytes.as_chunks().0.iter().map(record));
        }
        Ok(())
    }

    /// The first record of `start..end` whose key is not `within`.
    fn partition_point(
        &mut self,
        mut start: u64,
        mut end: u64,
        within: impl Fn(u128) -> bool,
    ) -> io::Result<u64> {
        while start < end {
            let middle = start + (end - start) / 2;
            self.file.seek(SeekFrom::Start(middle * RECORD_BYTES))?;
            let mut bytes = [0; RECORD_BYTES as usize];
            self.file.read_exact(&mut bytes)?;
            if within(record(&bytes).key) { start = middle + 1 } else { end = middle }
        }
        Ok(start)
    }
}

fn record(bytes: &[u8; RECORD_BYTES as usize]) -> Record {
    let (mut key, mut place) = ([0; 16], [0; 8]);
    key.copy_from_slice(&bytes[..16]);
    place.copy_from_slice(&bytes[16..]);
    Record { key: u128::from_le_bytes(key), place: u64::from_le_bytes(place) }
}

/// So many numbers from where a file stands.
pub(super) fn numbers(file: &mut impl Read, count: usize) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; count * 8];
    file.read_exact(&mut bytes)?;
    Ok(bytes.as_chunks().0.iter().map(|&bytes| u64::from_le_bytes(bytes)).collect())
}

/// One of several equal ranges of keys.
#[derive(Clone, Copy, Debug)]
pub(super) struct Partition {
    pub(super) number: u64,
    pub(super) count: u64,
}

impl Partition {
    fn of(self, key: u128) -> u64 {
        (((key >> 64) * u128::from(self.count)) >> 64) as u64
    }

    /// Whether the range lies after a key.
    fn is_after(self, key: u128) -> bool {
        self.of(key) < self.number
    }

    /// Whether the range ends after a key.
    fn ends_after(self, key: u128) -> bool {
        self.of(key) <= self.number
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;
    use std::collections::BTreeMap;

    /// Keys in order of their documents, some of them many times.
    fn records(count: u64) -> Vec<Record> {
        let stream = Stream::new(3, "keys");
        let key = |n: u64| (u128::from(stream.bits(n)) << 64) | u128::from(stream.bits(n + 1_000_000));
        (0..count).map(|place| Record { key: key(stream.below(place, count / 2)), place }).collect()
    }

    #[test]
    fn what_is_dropped_is_what_a_table_in_memory_drops() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("unit.keys");
        let all = records(2_500_000);
        let mut writer = KeyWriter::new(File::create(&path).unwrap());
        for record in &all {
            writer.push(*record).unwrap();
        }
        writer.finish().unwrap();
        let mut reader = KeyReader::open(&path).unwrap();
        let mut found = reader.drops().unwrap();
        let mut seen = 0;
        for number in 0..7 {
            let mut records = Vec::new();
            reader.read_partition(Partition { number, count: 7 }, &mut records).unwrap();
            seen += records.len();
            records.sort_unstable();
            found.extend(repeated(&records));
        }
        settle(&mut found);
        let mut first: BTreeMap<u128, u64> = BTreeMap::new();
        let expected: Vec<Drop> = all
            .iter()
            .filter(|record| *first.entry(record.key).or_insert(record.place) != record.place)
            .map(|record| record.place * 2 + (record.key & 1) as u64)
            .collect();
        assert_eq!(seen as u64, reader.len());
        assert_eq!(found, expected);
    }

    #[test]
    fn damaged_files_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("unit.keys");
        let mut writer = KeyWriter::new(Vec::new());
        for record in records(1000) {
            writer.push(record).unwrap();
        }
        let whole = writer.finish().unwrap();
        for length in [0, 23, 24, whole.len() - 8, whole.len() - 1] {
            std::fs::write(&path, &whole[..length]).unwrap();
            assert!(KeyReader::open(&path).is_err(), "{length}");
        }
        for at in whole.len() - 24..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x41;
            std::fs::write(&path, &damaged).unwrap();
            assert!(KeyReader::open(&path).is_err(), "{at}");
        }
    }
}

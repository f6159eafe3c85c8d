//! A corpus cut into units of work, from metadata alone.

use super::reader::{Corpus, Documents, Place};
use super::shard::Shard;
use super::source::SourceFile;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// A run of row groups that one worker reads. Every worker that cuts the same corpus gets the same units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Its place among the units, from 0.
    pub number: usize,
    /// Bytes of text and names, uncompressed, by the footers' account.
    pub bytes: u64,
    pub(super) start: Place,
    pub(super) end: Place,
}

/// A part of a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceRange {
    /// The file's name below the source.
    pub file: String,
    /// First row group.
    pub first_row_group: usize,
    /// Row group after the last; none for all that the file has.
    pub end_row_group: Option<usize>,
}

impl Corpus {
    /// Cuts the corpus into units of whole row groups with about so many bytes of text: at least one
    /// row group, and less where the corpus ends. A limit on the documents counts from the corpus's
    /// start, so such a corpus is one unit.
    ///
    /// Files whose footer cannot be read belong to the unit of their neighbours, which quarantines them.
    pub fn units(&self, bytes: u64) -> Vec<Unit> {
        let whole = Unit { number: 0, bytes: 0, start: Place::START, end: Place::END };
        if self.limit().is_some() {
            return vec![whole];
        }
        let sizes: Vec<Vec<u64>> =
            self.source_files().par_iter().map(|file| self.row_group_bytes(file)).collect();
        let groups = sizes.iter().enumerate().flat_map(|(file, sizes)| {
            sizes.iter().enumerate().map(move |(row_group, size)| (Place { file, row_group }, *size))
        });
        let mut units = vec![whole];
        for (place, size) in groups {
            let (number, last) = (units.len(), units.len() - 1);
            if units[last].bytes > 0 && units[last].bytes.saturating_add(size) > bytes {
                units[last].end = place;
                units.push(Unit { number, bytes: 0, start: place, end: Place::END });
            }
            let last = units.len() - 1;
            units[last].bytes = units[last].bytes.saturating_add(size);
        }
        units
    }

    /// Bytes of each row group's columns; one of nothing for a file that cannot be read.
    fn row_group_bytes(&self, file: &SourceFile) -> Vec<u64> {
        let read = || {
            let shard = Shard::open(file).ok()?;
            let columns = self.columns(&shard, &file.path).ok()?;
            Some((0..shard.row_groups()).map(|group| shard.bytes(group, &columns)).collect())
        };
        read().unwrap_or_else(|| vec![0])
    }

    /// A stream of the documents of one unit. That there are none is no error.
    pub fn documents_of(&self, unit: &Unit) -> Documents {
        self.documents_between(unit.start, unit.end)
    }

    /// The files that a unit reads.
    pub fn sources_of(&self, unit: &Unit) -> Vec<SourceRange> {
        let (Place { file: first, row_group: start }, Place { file: last, row_group: end }) =
            (unit.start, unit.end);
        let range = |(number, file): (usize, &SourceFile)| SourceRange {
            file: file.name.clone(),
            first_row_group: if number == first { start } else { 0 },
            end_row_group: (number == last).then_some(end),
        };
        let within = self
            .source_files()
            .iter()
            .enumerate()
            .skip(first)
            .take_while(|(file, _)| (*file, 0) < (last, end));
        within.map(range).collect()
    }
}

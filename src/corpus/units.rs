//! A corpus cut into units of work, from metadata alone.

use super::mixture::Part;
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
    /// Row of its file at which it starts.
    pub(super) first_row: u64,
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
        let whole = Unit { number: 0, bytes: 0, start: Place::START, first_row: 0, end: Place::END };
        if self.limit().is_some() {
            return vec![whole];
        }
        let files: Vec<Vec<RowGroup>> =
            self.source_files().par_iter().map(|file| row_groups(file, self.part_of(file))).collect();
        let groups = files.iter().enumerate().flat_map(|(file, groups)| {
            groups.iter().enumerate().map(move |(row_group, group)| (Place { file, row_group }, group))
        });
        let mut units = vec![whole];
        for (place, &RowGroup { bytes: size, first_row }) in groups {
            let (number, last) = (units.len(), units.len() - 1);
            if units[last].bytes > 0 && units[last].bytes.saturating_add(size) > bytes {
                units[last].end = place;
                units.push(Unit { number, bytes: 0, start: place, first_row, end: Place::END });
            }
            let last = units.len() - 1;
            units[last].bytes = units[last].bytes.saturating_add(size);
        }
        units
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

/// What a footer says of a row group.
#[derive(Clone, Copy, Debug, Default)]
struct RowGroup {
    /// Bytes of text and names.
    bytes: u64,
    /// Row of the file at which it starts.
    first_row: u64,
}

/// The row groups of a file; one of nothing if it cannot be read.
fn row_groups(file: &SourceFile, part: &Part) -> Vec<RowGroup> {
    let read = || {
        let shard = Shard::open(file).ok()?;
        let columns = part.columns(&shard, &file.path).ok()?;
        let group =
            |number| RowGroup { bytes: shard.bytes(number, &columns), first_row: shard.first_row(number) };
        Some((0..shard.row_groups()).map(group).collect())
    };
    read().unwrap_or_else(|| vec![RowGroup::default()])
}

/// Bytes of text and names in a file, by its footer's account.
pub(super) fn text_bytes(file: &SourceFile, part: &Part) -> u64 {
    row_groups(file, part).iter().map(|group| group.bytes).sum()
}

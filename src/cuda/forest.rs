//! A forest as the attention kernels see it: rows in depth-first pre-order, keys cut into tiles, and
//! who needs which tile. Pure planning; nothing here touches a device.
//!
//! In pre-order the descendants of a segment are the rows right behind it, so that one number for
//! each key says who sees it: query row q sees key row k if k <= q < untils\[k\]. A key tile holds
//! consecutive rows of a chain of segments, so that a query sees the first keys of a tile or none. In
//! the mode `batch_invariant` a tile holds keys of one segment, from its start, so that a path meets
//! the same tiles here and in decoding.

use crate::model::Forest;

/// Query rows of one tile, and most keys of one.
pub const TILE: usize = 64;
/// Keys of one partial result in the mode `batch_invariant`, from the start of a segment.
pub const PARTIAL_KEYS: usize = 512;
/// In [`Part`]: these query tiles are all of the key tile, so there is no partial sum.
pub const NO_SLOT: u32 = u32::MAX;
/// Parts that the work on key gradients is cut into at most, beyond one for each key tile and head: a
/// few for each multiprocessor. Fixed, since the order of sums depends on it.
const PARTS: usize = 512;
/// Query tiles below which a part is not worth its partial sum.
const SHORTEST_PART: usize = 16;

/// Why a forest cannot be laid out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForestError {
    /// Row numbers are 32 bits wide.
    #[error("a forest of {rows} rows does not fit one launch, which takes {}", u32::MAX)]
    TooManyRows {
        /// Its rows.
        rows: usize,
    },
    /// The segments that earlier launches have computed are not in front of all others.
    #[error(
        "segment {segment} is one of the {prefix} that were computed before, but others stand in front of it"
    )]
    PrefixNotInFront {
        /// The segment.
        segment: usize,
        /// Segments of the prefix.
        prefix: usize,
    },
}

impl ForestError {
    /// Advice for the user.
    pub fn hint(&self) -> String {
        match self {
            Self::TooManyRows { .. } => "lower the tokens of a micro-batch".into(),
            Self::PrefixNotInFront { .. } => {
                "a prefix is the chain of segments that a forest begins with, or several whole trees".into()
            }
        }
    }
}

/// A segment in packed order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedSegment {
    /// Its number in the forest.
    pub segment: usize,
    /// First packed row.
    pub row: usize,
    /// Number of rows.
    pub length: usize,
    /// Behind the last row of its subtree.
    pub until: usize,
    /// Tokens before it on its path.
    pub position: usize,
    /// The segment that it continues.
    pub parent: Option<usize>,
    /// Its first row in the forest.
    forest_row: usize,
}

/// The segments of a forest in depth-first pre-order, children in order of their numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackedForest {
    segments: Vec<PackedSegment>,
    rows: usize,
}

impl PackedForest {
    /// Orders a forest.
    pub fn new(forest: &Forest) -> Self {
        let segments = forest.segments();
        // Parents have lower numbers than their children.
        let mut sizes: Vec<usize> = segments.iter().map(|segment| segment.length).collect();
        for (number, segment) in segments.iter().enumerate().rev() {
            if let Some(parent) = segment.parent {
                sizes[parent] += sizes[number];
            }
        }
        let mut next = Vec::with_capacity(segments.len());
        let mut rows = 0;
        let mut packed = Vec::with_capacity(segments.len());
        for (number, segment) in segments.iter().enumerate() {
            let free = match segment.parent {
                Some(parent) => &mut next[parent],
                None => &mut rows,
            };
            let row: usize = *free;
            *free += sizes[number];
            next.push(row + segment.length);
            packed.push(PackedSegment {
                segment: number,
                row,
                length: segment.length,
                until: row + sizes[number],
                position: segment.position,
                parent: segment.parent,
                forest_row: segment.row,
            });
        }
        packed.sort_by_key(|segment| (segment.row, segment.segment));
        Self { segments: packed, rows }
    }

    /// The segments in order of their packed rows.
    pub fn segments(&self) -> &[PackedSegment] {
        &self.segments
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// For each packed row, the forest's row that lies there.
    pub fn sources(&self) -> impl Iterator<Item = usize> {
        self.segments.iter().flat_map(|segment| segment.forest_row..segment.forest_row + segment.length)
    }

    /// For each packed row, its position on its path.
    pub fn positions(&self) -> impl Iterator<Item = usize> {
        self.segments.iter().flat_map(|segment| segment.position..segment.position + segment.length)
    }

    /// For each of the forest's rows, the packed row where it lies.
    pub fn places(&self) -> Vec<u32> {
        let mut places = vec![0; self.rows];
        for (row, source) in self.sources().enumerate() {
            places[source] = row as u32;
        }
        places
    }
}

/// Up to 64 keys in consecutive rows, each a descendant of the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyTile {
    /// First packed row.
    pub row: u32,
    /// Number of keys.
    pub keys: u16,
    /// Whether a partial result begins here (1); only in the mode `batch_invariant`.
    pub begins_partial: u16,
    /// Behind the last row that sees the first key.
    pub until: u32,
    /// Behind the last row that sees the last key.
    pub last_until: u32,
}

impl KeyTile {
    /// As the kernels read it.
    pub fn words(self) -> [u32; 4] {
        let both = u32::from(self.keys) | u32::from(self.begins_partial) << 16;
        [self.row, both, self.until, self.last_until]
    }
}

/// What a plan is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Planning {
    /// How many of the forest's segments, the first ones, earlier launches have computed.
    pub prefix: usize,
    /// Key/value heads of the model.
    pub kv_heads: usize,
    /// Whether results are to have the bits of decoding.
    pub batch_invariant: bool,
}

/// Query tiles that read one key tile, or a part of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// The key tile.
    pub tile: u32,
    /// The first query tile.
    pub first_query_tile: u32,
    /// How many, one after the other.
    pub query_tiles: u32,
    /// Where the partial sum goes, or [`NO_SLOT`].
    pub slot: u32,
}

impl Part {
    /// As the kernels read it.
    pub fn words(self) -> [u32; 4] {
        [self.tile, self.first_query_tile, self.query_tiles, self.slot]
    }
}

/// The partial sums of one key tile, in the order in which they are added.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// The key tile.
    pub tile: u32,
    /// The first slot.
    pub first_slot: u32,
    /// How many.
    pub slots: u32,
}

impl Sum {
    /// As the kernels read it.
    pub fn words(self) -> [u32; 4] {
        [self.tile, self.first_slot, self.slots, 0]
    }
}

/// Everything that attention over one forest needs, forward and backward.
///
/// Rows of the prefix count as keys alone: earlier launches have computed them. Query tile t holds the
/// rows 64 t .. 64 t + 64 behind the prefix.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ForestPlan {
    /// Where rows lie.
    pub packed: PackedForest,
    /// Rows that earlier launches have computed.
    pub prefix_rows: usize,
    /// For each packed row, the row behind the last that sees it.
    pub untils: Vec<u32>,
    /// All keys, in order of rows.
    pub key_tiles: Vec<KeyTile>,
    /// Where the key tiles of each query tile begin in `lists`; one more at the end.
    pub list_offsets: Vec<u32>,
    /// Numbers of key tiles, in order of rows.
    pub lists: Vec<u32>,
    /// Query tiles, those with the longest lists first.
    pub order: Vec<u32>,
    /// The work on key gradients, the longest parts first.
    pub parts: Vec<Part>,
    /// The key tiles whose parts have slots.
    pub sums: Vec<Sum>,
    /// Number of slots.
    pub slots: usize,
}

impl ForestPlan {
    /// Plans a forest.
    ///
    /// # Errors
    /// When there are too many rows, or the prefix is not in front of all other rows.
    pub fn new(forest: &Forest, planning: Planning) -> Result<Self, ForestError> {
        let packed = PackedForest::new(forest);
        if u32::try_from(packed.rows).is_err() {
            return Err(ForestError::TooManyRows { rows: packed.rows });
        }
        let prefix_rows = prefix_rows(&packed, planning.prefix)?;
        let untils =
            packed.segments.iter().flat_map(|at| std::iter::repeat_n(at.until as u32, at.length)).collect();
        let mut plan = Self { packed, prefix_rows, untils, ..Self::default() };
        plan.cut_into_key_tiles(planning.batch_invariant);
        plan.list_key_tiles();
        plan.cut_into_parts(planning.kv_heads);
        Ok(plan)
    }

    /// Rows that are computed.
    pub fn rows(&self) -> usize {
        self.packed.rows - self.prefix_rows
    }

    /// Tiles of query rows.
    pub fn query_tiles(&self) -> usize {
        self.rows().div_ceil(TILE)
    }

    /// Elements of a buffer with one number for each head and row, such as log-sums: `[heads, this]`.
    pub fn padded_rows(&self) -> usize {
        self.query_tiles() * TILE
    }

    /// Pairs of query and visible key, for counting operations.
    pub fn pairs(&self) -> usize {
        let queries =
            |(key, until): (usize, &u32)| (*until as usize).saturating_sub(key.max(self.prefix_rows));
        self.untils.iter().enumerate().map(queries).sum()
    }

    /// The query tiles that need a key tile: those of the rows from its first to the end of its subtree.
    fn readers(&self, tile: &KeyTile) -> std::ops::Range<usize> {
        let first = (tile.row as usize).max(self.prefix_rows) - self.prefix_rows;
        let end = (tile.until as usize).saturating_sub(self.prefix_rows);
        if first < end { first / TILE..end.div_ceil(TILE) } else { 0..0 }
    }

    fn cut_into_key_tiles(&mut self, batch_invariant: bool) {
        let continues = |before: &PackedSegment, next: &PackedSegment| {
            !batch_invariant && next.parent == Some(before.segment) && next.row != self.prefix_rows
        };
        for chain in self.packed.segments.chunk_by(continues) {
            let end = chain.last().map_or(0, |last| last.row + last.length);
            for row in (chain[0].row..end).step_by(TILE) {
                let keys = (end - row).min(TILE);
                let begins_partial = batch_invariant && (row - chain[0].row).is_multiple_of(PARTIAL_KEYS);
                self.key_tiles.push(KeyTile {
                    row: row as u32,
                    keys: keys as u16,
                    begins_partial: begins_partial.into(),
                    until: self.untils[row],
                    last_until: self.untils[row + keys - 1],
                });
            }
        }
    }

    fn list_key_tiles(&mut self) {
        let mut lists: Vec<Vec<u32>> = vec![Vec::new(); self.query_tiles()];
        for (number, tile) in self.key_tiles.iter().enumerate() {
            lists[self.readers(tile)].iter_mut().for_each(|list| list.push(number as u32));
        }
        self.order = (0..lists.len() as u32).collect();
        self.order.sort_by_key(|tile| std::cmp::Reverse(lists[*tile as usize].len()));
        self.list_offsets = vec![0];
        for list in lists {
            self.lists.extend(list);
            self.list_offsets.push(self.lists.len() as u32);
        }
    }

    /// A trunk's key tile that thousands of queries read is split, so that the whole device works on it.
    fn cut_into_parts(&mut self, kv_heads: usize) {
        let longest = (self.lists.len() * kv_heads).div_ceil(PARTS).max(SHORTEST_PART);
        for (number, tile) in self.key_tiles.iter().enumerate() {
            let readers = self.readers(tile);
            let count = readers.len().div_ceil(longest);
            let cut = |part: usize| readers.start + readers.len() * part / count;
            for part in 0..count {
                let slot = if count > 1 { (self.slots + part) as u32 } else { NO_SLOT };
                let query_tiles = (cut(part + 1) - cut(part)) as u32;
                let first_query_tile = cut(part) as u32;
                self.parts.push(Part { tile: number as u32, first_query_tile, query_tiles, slot });
            }
            if count > 1 {
                let (tile, first_slot) = (number as u32, self.slots as u32);
                self.sums.push(Sum { tile, first_slot, slots: count as u32 });
                self.slots += count;
            }
        }
        self.parts.sort_by_key(|part| std::cmp::Reverse(part.query_tiles));
    }
}

fn prefix_rows(packed: &PackedForest, prefix: usize) -> Result<usize, ForestError> {
    let in_prefix = packed.segments.iter().filter(|segment| segment.segment < prefix);
    let rows = in_prefix.clone().map(|segment| segment.length).sum();
    match in_prefix.clone().find(|segment| segment.row + segment.length > rows) {
        Some(segment) => Err(ForestError::PrefixNotInFront { segment: segment.segment, prefix }),
        None => Ok(rows),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::random::Stream;

    /// A forest of some trees with empty, short and long segments.
    fn random_forest(number: u64) -> Forest {
        let stream = Stream::new(number, "forest plan");
        let draw = |at: usize, bound: usize| (stream.uniform(at as u64) * bound as f64) as usize;
        let mut forest = Forest::default();
        for segment in 0..=draw(0, 40) {
            let length = [0, 1, 3, 17, 64, 65, 130, 400][draw(3 * segment + 1, 8)];
            let parent =
                (segment > 0 && draw(3 * segment + 2, 10) > 0).then(|| draw(3 * segment + 3, segment));
            forest.add(parent, &vec![0; length]);
        }
        forest
    }

    fn segment_of(forest: &Forest, row: usize) -> usize {
        let holds =
            |segment: &crate::model::Segment| (segment.row..segment.row + segment.length).contains(&row);
        forest.segments().iter().position(holds).unwrap()
    }

    /// Whether a row sees another, by walking up from its segment.
    fn sees(forest: &Forest, query: usize, key: usize) -> bool {
        let (own, other) = (segment_of(forest, query), segment_of(forest, key));
        let mut above = Some(own);
        while let Some(segment) = above {
            if segment == other {
                return segment != own || key <= query;
            }
            above = forest.segments()[segment].parent;
        }
        false
    }

    fn plan(forest: &Forest, prefix: usize, batch_invariant: bool) -> Result<ForestPlan, ForestError> {
        ForestPlan::new(forest, Planning { prefix, kv_heads: 4, batch_invariant })
    }

    #[test]
    fn lists_hold_each_visible_key_once() {
        for number in 0..30 {
            let forest = random_forest(number);
            let plan = plan(&forest, 0, number % 2 == 1).unwrap();
            let sources: Vec<usize> = plan.packed.sources().collect();
            for query in (0..plan.rows()).step_by(7) {
                let mut times = vec![0; plan.rows()];
                let tile = query / TILE;
                let list =
                    &plan.lists[plan.list_offsets[tile] as usize..plan.list_offsets[tile + 1] as usize];
                assert!(list.is_sorted(), "in order of rows");
                for tile in list.iter().map(|number| plan.key_tiles[*number as usize]) {
                    let keys = tile.row as usize..tile.row as usize + usize::from(tile.keys);
                    let seen: Vec<bool> =
                        keys.clone().map(|key| key <= query && query < plan.untils[key] as usize).collect();
                    assert!(seen.is_sorted_by(|a, b| a >= b), "the first keys of a tile");
                    assert_eq!(tile.until, plan.untils[keys.start]);
                    assert_eq!(tile.last_until, plan.untils[keys.end - 1]);
                    keys.zip(seen).for_each(|(key, seen)| times[key] += usize::from(seen));
                }
                for key in 0..plan.rows() {
                    let expected = usize::from(sees(&forest, sources[query], sources[key]));
                    assert_eq!(times[key], expected, "forest {number}, query {query}, key {key}");
                }
            }
        }
    }

    #[test]
    fn tiles_of_the_invariant_mode_hold_keys_of_one_segment_from_its_start() {
        for number in 0..30 {
            let mut forest = random_forest(number);
            forest.add(None, &[0; 1100]);
            let plan = plan(&forest, 0, true).unwrap();
            let sources: Vec<usize> = plan.packed.sources().collect();
            let mut covered = 0;
            for tile in &plan.key_tiles {
                assert_eq!(tile.row as usize, covered);
                covered += usize::from(tile.keys);
                let first = sources[tile.row as usize];
                let segment = &forest.segments()[segment_of(&forest, first)];
                let offset = first - segment.row;
                assert_eq!(offset % TILE, 0);
                assert_eq!(usize::from(tile.keys), (segment.length - offset).min(TILE));
                assert_eq!(tile.begins_partial == 1, offset.is_multiple_of(PARTIAL_KEYS));
            }
            assert_eq!(covered, forest.ids().len());
        }
    }

    #[test]
    fn a_chain_of_short_segments_fills_its_tiles() {
        let mut forest = Forest::default();
        let mut trunk = forest.add(None, &[0; 10]);
        let mut pieces = vec![trunk];
        for _ in 0..19 {
            trunk = forest.add(Some(trunk), &[0; 10]);
            pieces.push(trunk);
        }
        for piece in pieces {
            forest.add(Some(piece), &[0; 5]);
        }
        let keys = |plan: ForestPlan| plan.key_tiles.iter().map(|tile| tile.keys).collect::<Vec<_>>();
        // The last footer follows the trunk's 200 rows at once.
        let filled = keys(plan(&forest, 0, false).unwrap());
        assert_eq!(filled[..4], [64, 64, 64, 13]);
        assert_eq!(filled[4..], [5; 19]);
        assert_eq!(keys(plan(&forest, 0, true).unwrap()).len(), 40);
    }

    #[test]
    fn rows_are_a_permutation_and_keep_their_positions() {
        for number in 0..30 {
            let forest = random_forest(number);
            let packed = PackedForest::new(&forest);
            let places = packed.places();
            let positions: Vec<usize> = packed.positions().collect();
            for segment in forest.segments() {
                for at in 0..segment.length {
                    assert_eq!(positions[places[segment.row + at] as usize], segment.position + at);
                }
            }
            let mut sorted = places.clone();
            sorted.sort_unstable();
            assert!(sorted.iter().enumerate().all(|(row, place)| row == *place as usize));
        }
    }

    #[test]
    fn parts_cover_the_readers_of_every_key_tile_once() {
        let mut forest = Forest::default();
        let trunk = forest.add(None, &[0; 200]);
        for _ in 0..300 {
            forest.add(Some(trunk), &[0; 150]);
        }
        assert!(!plan(&forest, 0, false).unwrap().sums.is_empty(), "the trunk is split");
        for forest in [forest, random_forest(3), random_forest(7)] {
            let plan = plan(&forest, 0, false).unwrap();
            for (number, tile) in plan.key_tiles.iter().enumerate() {
                let parts: Vec<&Part> =
                    plan.parts.iter().filter(|part| part.tile as usize == number).collect();
                let mut readers: Vec<u32> = parts
                    .iter()
                    .flat_map(|part| part.first_query_tile..part.first_query_tile + part.query_tiles)
                    .collect();
                readers.sort_unstable();
                let lists = plan.list_offsets.windows(2).enumerate();
                let expected: Vec<u32> = lists
                    .filter(|(_, list)| {
                        plan.lists[list[0] as usize..list[1] as usize].contains(&(number as u32))
                    })
                    .map(|(query_tile, _)| query_tile as u32)
                    .collect();
                assert_eq!(readers, expected, "key tile {number} at row {}", tile.row);
                let slots = parts.iter().filter(|part| part.slot != NO_SLOT).count();
                let sum = plan.sums.iter().find(|sum| sum.tile as usize == number);
                assert_eq!(slots, sum.map_or(0, |sum| sum.slots as usize));
            }
            let mut slots: Vec<u32> =
                plan.parts.iter().map(|part| part.slot).filter(|slot| *slot != NO_SLOT).collect();
            slots.sort_unstable();
            assert!(slots.iter().copied().eq(0..plan.slots as u32));
            assert!(plan.parts.is_sorted_by_key(|part| std::cmp::Reverse(part.query_tiles)));
        }
    }

    #[test]
    fn a_prefix_counts_as_keys_alone() {
        let mut forest = Forest::default();
        let first = forest.add(None, &[0; 100]);
        let second = forest.add(Some(first), &[0; 30]);
        forest.add(Some(second), &[0; 70]);
        forest.add(Some(first), &[0; 10]);
        let plan = plan(&forest, 2, false).unwrap();
        assert_eq!((plan.prefix_rows, plan.rows(), plan.query_tiles()), (130, 80, 2));
        assert_eq!(plan.key_tiles.iter().map(|tile| tile.keys).collect::<Vec<_>>(), [64, 64, 2, 64, 6, 10]);
        // The second segment's keys serve the 70 rows of its child; the first's 80 rows.
        assert_eq!(plan.pairs(), 100 * 80 + 30 * 70 + 70 * 71 / 2 + 10 * 11 / 2);
        let all = ForestPlan::new(&forest, Planning { prefix: 4, kv_heads: 1, batch_invariant: false });
        assert_eq!(all.map(|plan| plan.rows()), Ok(0), "all rows may be prefix");
        forest.add(Some(second), &[0; 5]);
        let error = ForestPlan::new(&forest, Planning { prefix: 4, kv_heads: 1, batch_invariant: false });
        assert_eq!(error, Err(ForestError::PrefixNotInFront { segment: 3, prefix: 4 }));
    }

    #[test]
    fn a_deep_chain_needs_no_recursion() {
        let mut forest = Forest::default();
        let mut parent = None;
        for _ in 0..100_000 {
            parent = Some(forest.add(parent, &[0]));
        }
        assert_eq!(PackedForest::new(&forest).rows(), 100_000);
    }
}

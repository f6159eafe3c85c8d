//! The work of attention over pages: which queries read which run of keys together, and which partial
//! results make up a query's attention. Pure planning; nothing here touches a device.
//!
//! All samples of a prompt share its keys, all prompts of a document those of its trunk. A work item
//! reads some keys once for up to 64 query rows (queries x heads of a key/value head) and leaves a
//! partial result for each of its queries; these are added in the order of the query's path.

use super::forest::{PARTIAL_KEYS, TILE};
use std::cmp::Reverse;

/// Positions of one page.
pub const PAGE: usize = 16;
/// Fewest and most keys of an item in the fast mode.
const ITEM_KEYS: (usize, usize) = (128, 4096);

/// Why paged attention cannot be planned.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PagedError {
    /// A path names a segment that does not exist.
    #[error("query {query} goes through segment {segment}, of {segments}")]
    NoSuchSegment {
        /// Number of the query.
        query: usize,
        /// The segment.
        segment: usize,
        /// How many there are.
        segments: usize,
    },
    /// Two paths come to a segment from different parents.
    #[error("query {query} comes to segment {segment} from another parent than those before it")]
    TwoParents {
        /// Number of the query.
        query: usize,
        /// The segment.
        segment: usize,
    },
    /// A segment that grows has several readers or is continued.
    #[error("segment {segment} grows, but query {query} is not its only reader or does not end with it")]
    SharedGrowth {
        /// The segment.
        segment: usize,
        /// The query.
        query: usize,
    },
    /// Counts are 32 bits wide.
    #[error("{what} do not fit 32 bits")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
    },
}

impl PagedError {
    /// Advice for the user.
    pub fn hint(&self) -> String {
        match self {
            Self::TooMany { .. } => "decode fewer replies at a time".into(),
            _ => "this is a defect of the caller: paths must come from one tree of segments".into(),
        }
    }
}

/// A segment whose keys and values lie in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedSegment {
    /// Entry of the page table that names its first page; the others follow.
    pub first_page: usize,
    /// Positions it holds, or, when it grows, will hold at most: so many have entries of the page table. Room that
    /// is not used yet costs an empty block for each 512 positions and head: give what some hundred steps need, and
    /// plan again then.
    pub positions: usize,
    /// Whether the number of its positions is on the device, at the row of its only reader.
    pub grows: bool,
}

/// A row of the batch and the segments that it sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagedQuery<'a> {
    /// Row of queries and results.
    pub row: usize,
    /// The segments, root first.
    pub path: &'a [usize],
    /// Positions that it sees of the last one; unused when that one grows.
    pub visible: usize,
}

/// How keys are cut into items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// Each segment into 512 keys from its start, as training does with `batch_invariant`.
    Invariant,
    /// Chains of segments into at most so many keys.
    Fast {
        /// Raised to a multiple of 64.
        keys: usize,
    },
}

impl Cut {
    /// A fast cut with about `blocks` items for each key/value head, where the keys allow it: a few for each
    /// multiprocessor, divided by the key/value heads. `group` is the number of heads of a key/value head.
    pub fn filling(segments: &[CachedSegment], queries: &[PagedQuery], group: usize, blocks: usize) -> Self {
        let mut readers = vec![0; segments.len()];
        for segment in queries.iter().flat_map(|query| query.path) {
            if let Some(count) = readers.get_mut(*segment) {
                *count += 1;
            }
        }
        let rounds = |readers: usize| readers.div_ceil(queries_at_once(group));
        let work: usize =
            segments.iter().zip(readers).map(|(segment, count)| segment.positions * rounds(count)).sum();
        let (least, most) = ITEM_KEYS;
        Self::Fast { keys: (work / blocks.max(1)).clamp(least, most) }
    }

    fn keys(self) -> usize {
        match self {
            Self::Invariant => PARTIAL_KEYS,
            Self::Fast { keys } => keys.max(1).next_multiple_of(TILE),
        }
    }
}

fn queries_at_once(group: usize) -> usize {
    (TILE / group.max(1)).max(1)
}

/// Some queries and the keys that they share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Item {
    /// First of its entries in [`PagedPlan::entries`].
    pub first_entry: u32,
    /// Number of queries.
    pub queries: u32,
    /// First of its tiles in [`PagedPlan::tiles`].
    pub first_tile: u32,
    /// Number of tiles.
    pub tiles: u32,
    /// Partial result of the first query; the others follow.
    pub first_partial: u32,
    /// Keys of the segment in front of the item, if the segment grows.
    pub growing_from: Option<u32>,
}

impl Item {
    /// As the kernels read it.
    pub fn words(self) -> [u32; 8] {
        let Self { first_entry, queries, first_tile, tiles, first_partial, growing_from } = self;
        let (grows, start) = (u32::from(growing_from.is_some()), growing_from.unwrap_or(0));
        [first_entry, queries, first_tile, tiles, first_partial, grows, start, 0]
    }
}

/// Up to 64 keys in consecutive entries of the page table, from the start of the first page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageTile {
    /// Entry of the page table.
    pub page: u32,
    /// Number of keys.
    pub keys: u32,
    /// Keys of the item in front of them.
    pub before: u32,
}

impl PageTile {
    /// As the kernels read it.
    pub fn words(self) -> [u32; 4] {
        [self.page, self.keys, self.before, 0]
    }
}

/// A query of an item.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// Row of the batch.
    pub row: u32,
    /// How many of the item's keys it sees: the first ones.
    pub visible: u32,
}

impl Entry {
    /// As the kernels read it.
    pub fn words(self) -> [u32; 2] {
        [self.row, self.visible]
    }
}

/// Everything that attention over pages needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PagedPlan {
    /// The work.
    pub items: Vec<Item>,
    /// Keys of the items.
    pub tiles: Vec<PageTile>,
    /// Queries of the items.
    pub entries: Vec<Entry>,
    /// Number of partial results.
    pub partials: usize,
    /// Most queries of an item.
    pub most_queries: usize,
    /// Row of each query.
    pub rows: Vec<u32>,
    /// Where the partial results of each query begin in `lists`; one more at the end.
    pub list_offsets: Vec<u32>,
    /// Partial results in the order in which they are added.
    pub lists: Vec<u32>,
}

impl PagedPlan {
    /// Plans the attention of some queries; `group` is the number of heads of a key/value head.
    ///
    /// # Errors
    /// When the paths are not those of one tree, or something does not fit 32 bits.
    pub fn new(
        segments: &[CachedSegment],
        queries: &[PagedQuery],
        group: usize,
        cut: Cut,
    ) -> Result<Self, PagedError> {
        let tree = Tree::new(segments, queries)?;
        let mut planner = Planner {
            segments,
            keys_at_once: cut.keys(),
            queries_at_once: queries_at_once(group),
            lists: vec![Vec::new(); queries.len()],
            plan: Self::default(),
        };
        for run in tree.runs(segments, cut) {
            planner.add_run(&run, &tree, queries);
        }
        planner.finish(queries)
    }
}

/// The segments that queries go through.
struct Tree {
    /// Queries whose path goes through each segment, in their order.
    readers: Vec<Vec<usize>>,
    children: Vec<Vec<usize>>,
    /// Every segment in use, parents before their children.
    order: Vec<usize>,
}

impl Tree {
    fn new(segments: &[CachedSegment], queries: &[PagedQuery]) -> Result<Self, PagedError> {
        let none = vec![Vec::new(); segments.len()];
        let mut tree = Self { readers: none.clone(), children: none, order: Vec::new() };
        let mut parents: Vec<Option<usize>> = vec![None; segments.len()];
        for (number, query) in queries.iter().enumerate() {
            let mut parent: Option<usize> = None;
            for segment in query.path {
                let Some(grows) = segments.get(*segment).map(|segment| segment.grows) else {
                    let (segment, segments) = (*segment, segments.len());
                    return Err(PagedError::NoSuchSegment { query: number, segment, segments });
                };
                let first = tree.readers[*segment].is_empty();
                if grows && (!first || query.path.last() != Some(segment)) {
                    return Err(PagedError::SharedGrowth { segment: *segment, query: number });
                }
                if first {
                    tree.order.push(*segment);
                    parents[*segment] = parent;
                    if let Some(parent) = parent {
                        tree.children[parent].push(*segment);
                    }
                } else if parents[*segment] != parent {
                    return Err(PagedError::TwoParents { query: number, segment: *segment });
                }
                tree.readers[*segment].push(number);
                parent = Some(*segment);
            }
        }
        Ok(tree)
    }

    /// Chains of segments that are cut together, in the order in which paths meet them: single segments, or
    /// from each segment on to the child with most readers.
    fn runs(&self, segments: &[CachedSegment], cut: Cut) -> Vec<Vec<usize>> {
        let mut taken = vec![false; segments.len()];
        let mut runs = Vec::new();
        for start in &self.order {
            let mut next = Some(*start).filter(|start| !taken[*start]);
            let mut run = Vec::new();
            while let Some(segment) = next {
                taken[segment] = true;
                run.push(segment);
                let children = self.children[segment].iter().copied();
                let heaviest = children
                    .filter(|child| !segments[*child].grows && !segments[segment].grows)
                    .min_by_key(|child| Reverse(self.readers[*child].len()));
                next = heaviest.filter(|_| cut != Cut::Invariant);
            }
            if !run.is_empty() {
                runs.push(run);
            }
        }
        runs
    }
}

struct Planner<'a> {
    segments: &'a [CachedSegment],
    keys_at_once: usize,
    queries_at_once: usize,
    /// Partial results of each query.
    lists: Vec<Vec<u32>>,
    plan: PagedPlan,
}

impl Planner<'_> {
    fn add_run(&mut self, run: &[usize], tree: &Tree, queries: &[PagedQuery]) {
        let grows = self.segments[run[0]].grows;
        let mut readers: Vec<(usize, usize)> = tree.readers[run[0]]
            .iter()
            .map(|reader| (*reader, self.visible(run, &queries[*reader])))
            .collect();
        // Those that see most stand together, so that the others' items end early.
        readers.sort_by_key(|(_, visible)| Reverse(*visible));
        let mut start = 0;
        for piece in self.pieces(run) {
            let first_tile = self.plan.tiles.len() as u32;
            let keys: usize = piece.iter().map(|tile| tile.keys as usize).sum();
            let reading = readers.partition_point(|(_, visible)| grows || *visible > start);
            for readers in readers[..reading].chunks(self.queries_at_once) {
                let visible = |visible: usize| if grows { 0 } else { (visible - start).min(keys) as u32 };
                let item = Item {
                    first_entry: self.plan.entries.len() as u32,
                    queries: readers.len() as u32,
                    first_tile,
                    tiles: piece.len() as u32,
                    first_partial: self.plan.partials as u32,
                    growing_from: grows.then_some(start as u32),
                };
                for (at, (reader, seen)) in readers.iter().enumerate() {
                    let row = queries[*reader].row as u32;
                    self.plan.entries.push(Entry { row, visible: visible(*seen) });
                    self.lists[*reader].push((self.plan.partials + at) as u32);
                }
                self.plan.partials += readers.len();
                self.plan.most_queries = self.plan.most_queries.max(readers.len());
                self.plan.items.push(item);
            }
            if reading > 0 {
                self.plan.tiles.extend(piece);
            }
            start += keys;
        }
    }

    /// How many keys of a run a query sees.
    fn visible(&self, run: &[usize], query: &PagedQuery) -> usize {
        let start = query.path.iter().position(|segment| *segment == run[0]).unwrap_or(query.path.len());
        let shared = query.path[start..].iter().zip(run).take_while(|(own, other)| own == other);
        let last = query.path.last();
        shared
            .map(|(segment, _)| {
                let positions = self.segments[*segment].positions;
                if Some(segment) == last { query.visible.min(positions) } else { positions }
            })
            .sum()
    }

    /// The keys of a run, cut into tiles and these into pieces for one item each.
    fn pieces(&self, run: &[usize]) -> Vec<Vec<PageTile>> {
        let mut pieces: Vec<Vec<PageTile>> = Vec::new();
        let mut room = 0;
        for segment in run.iter().map(|segment| self.segments[*segment]) {
            for offset in (0..segment.positions).step_by(TILE) {
                let keys = (segment.positions - offset).min(TILE);
                if keys > room {
                    pieces.push(Vec::new());
                    room = self.keys_at_once;
                }
                if let Some(piece) = pieces.last_mut() {
                    let page = (segment.first_page + offset / PAGE) as u32;
                    piece.push(PageTile {
                        page,
                        keys: keys as u32,
                        before: (self.keys_at_once - room) as u32,
                    });
                }
                room -= keys;
            }
        }
        pieces
    }

    fn finish(mut self, queries: &[PagedQuery]) -> Result<PagedPlan, PagedError> {
        let pages = self.segments.iter().map(|segment| segment.first_page + segment.positions.div_ceil(PAGE));
        let rows = queries.iter().map(|query| query.row);
        let counts = [
            ("entries of the page table", pages.max().unwrap_or(0)),
            ("rows", rows.max().unwrap_or(0)),
            ("partial results", self.plan.partials),
            ("tiles", self.plan.tiles.len()),
        ];
        if let Some((what, _)) = counts.into_iter().find(|(_, count)| u32::try_from(*count).is_err()) {
            return Err(PagedError::TooMany { what });
        }
        self.plan.rows = queries.iter().map(|query| query.row as u32).collect();
        self.plan.list_offsets = vec![0];
        for list in self.lists {
            self.plan.lists.extend(list);
            self.plan.list_offsets.push(self.plan.lists.len() as u32);
        }
        Ok(self.plan)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::random::Stream;

    struct Case {
        segments: Vec<CachedSegment>,
        queries: Vec<(Vec<usize>, usize)>,
    }

    impl Case {
        /// A tree with queries anywhere, some of which end with a segment that grows.
        fn random(number: u64) -> Self {
            let stream = Stream::new(number, "paged plan");
            let draw = |at: usize, bound: usize| stream.below(at as u64, bound as u64) as usize;
            let (mut segments, mut paths) = (Vec::new(), Vec::<Vec<usize>>::new());
            let mut page = 0;
            for segment in 0..2 + draw(0, 30) {
                let positions = [0, 1, 5, 16, 40, 64, 100, 700][draw(4 * segment + 1, 8)];
                let parent =
                    (segment > 0 && draw(4 * segment + 2, 8) > 0).then(|| draw(4 * segment + 3, segment));
                let mut path = parent.map_or(Vec::new(), |parent: usize| paths[parent].clone());
                path.push(segment);
                paths.push(path);
                segments.push(CachedSegment { first_page: page, positions, grows: false });
                page += positions.div_ceil(PAGE);
            }
            let mut queries = Vec::new();
            for query in 0..=draw(1000, 90) {
                let mut path = paths[draw(1001 + 2 * query, paths.len())].clone();
                let positions = segments[path[path.len() - 1]].positions;
                let mut visible = draw(1002 + 2 * query, positions + 1);
                if query % 5 == 0 {
                    path.push(segments.len());
                    segments.push(CachedSegment { first_page: page, positions: 600, grows: true });
                    page += 600usize.div_ceil(PAGE);
                    visible = 0;
                }
                queries.push((path, visible));
            }
            Self { segments, queries }
        }

        fn queries(&self) -> Vec<PagedQuery<'_>> {
            let queries = self.queries.iter().enumerate();
            queries
                .map(|(row, (path, visible))| PagedQuery { row: row * 3, path, visible: *visible })
                .collect()
        }

        /// (page table entry, lane) of every key that a query sees, in the order of its path.
        fn expected(&self, query: usize, length: usize) -> Vec<(usize, usize)> {
            let (path, visible) = &self.queries[query];
            let mut keys = Vec::new();
            for segment in path {
                let own = self.segments[*segment];
                let last = path.last() == Some(segment);
                let seen = match (last, own.grows) {
                    (_, true) => length,
                    (true, _) => *visible,
                    _ => own.positions,
                };
                keys.extend((0..seen).map(|at| (own.first_page + at / PAGE, at % PAGE)));
            }
            keys
        }
    }

    /// The keys of a partial result, as the kernel would read them.
    fn keys_of(plan: &PagedPlan, partial: u32, length: usize) -> (u32, Vec<(usize, usize)>) {
        let item = plan
            .items
            .iter()
            .find(|item| (item.first_partial..item.first_partial + item.queries).contains(&partial))
            .unwrap();
        let entry = plan.entries[(item.first_entry + partial - item.first_partial) as usize];
        let visible = match item.growing_from {
            Some(start) => length.saturating_sub(start as usize),
            None => entry.visible as usize,
        };
        let mut keys = Vec::new();
        for tile in &plan.tiles[item.first_tile as usize..(item.first_tile + item.tiles) as usize] {
            let seen = visible.saturating_sub(tile.before as usize).min(tile.keys as usize);
            keys.extend((0..seen).map(|at| (tile.page as usize + at / PAGE, at % PAGE)));
        }
        (entry.row, keys)
    }

    #[test]
    fn partial_results_hold_each_visible_key_once_in_order_of_the_path() {
        for number in 0..40 {
            let case = Case::random(number);
            let queries = case.queries();
            let cuts =
                [Cut::Invariant, Cut::Fast { keys: 100 }, Cut::filling(&case.segments, &queries, 4, 8)];
            for (cut, group) in cuts.into_iter().zip([1, 7, 80]) {
                let plan = PagedPlan::new(&case.segments, &queries, group, cut).unwrap();
                assert!(plan.most_queries <= (TILE / group).max(1));
                for (number, query) in queries.iter().enumerate() {
                    for length in [0, 1, 65, 600] {
                        let range =
                            plan.list_offsets[number] as usize..plan.list_offsets[number + 1] as usize;
                        let mut keys = Vec::new();
                        for partial in &plan.lists[range] {
                            let (row, part) = keys_of(&plan, *partial, length);
                            assert_eq!(row as usize, query.row);
                            keys.extend(part);
                        }
                        assert_eq!(
                            keys,
                            case.expected(number, length),
                            "{cut:?}, query {number}, length {length}"
                        );
                    }
                }
                let mut partials = plan.lists.clone();
                partials.sort_unstable();
                assert!(
                    partials.iter().copied().eq(0..plan.partials as u32),
                    "each partial result has one query"
                );
            }
        }
    }

    #[test]
    fn invariant_items_are_those_of_training() {
        for number in 0..20 {
            let case = Case::random(number);
            let plan = PagedPlan::new(&case.segments, &case.queries(), 4, Cut::Invariant).unwrap();
            for item in &plan.items {
                let tiles = &plan.tiles[item.first_tile as usize..(item.first_tile + item.tiles) as usize];
                let first = tiles[0].page as usize;
                let holds = |segment: &&CachedSegment| {
                    (segment.first_page..segment.first_page + segment.positions.div_ceil(PAGE))
                        .contains(&first)
                };
                let segment = case.segments.iter().find(holds).unwrap();
                let offset = (first - segment.first_page) * PAGE;
                assert_eq!(offset % PARTIAL_KEYS, 0);
                let keys: u32 = tiles.iter().map(|tile| tile.keys).sum();
                assert_eq!(keys as usize, (segment.positions - offset).min(PARTIAL_KEYS));
            }
        }
    }

    #[test]
    fn a_shared_trunk_is_read_once_for_many_queries() {
        // A trunk of forty pieces with a footer each and four samples of each prompt.
        let segment = |page: usize, positions| CachedSegment { first_page: page, positions, grows: false };
        let mut segments: Vec<_> = (0..40).map(|piece| segment(piece * 2, 32)).collect();
        segments.extend((0..40).map(|footer| segment(80 + footer, 10)));
        let paths: Vec<Vec<usize>> =
            (0..40).map(|prompt| (0..=prompt).chain([40 + prompt]).collect()).collect();
        let queries: Vec<PagedQuery> =
            (0..160).map(|row| PagedQuery { row, path: &paths[row / 4], visible: 10 }).collect();
        let plan = PagedPlan::new(&segments, &queries, 4, Cut::Fast { keys: 4096 }).unwrap();
        // Ten items of sixteen queries for the trunk, one for each footer but the last, which continues it.
        assert_eq!(plan.items.len(), 10 + 39);
        assert_eq!(plan.partials, 160 + 39 * 4);
    }

    #[test]
    fn paths_that_are_no_tree_are_refused() {
        let segments = [CachedSegment { first_page: 0, positions: 5, grows: false }; 3];
        let plan = |paths: &[&[usize]], grows: Option<usize>| {
            let mut segments = segments;
            if let Some(at) = grows {
                segments[at].grows = true;
            }
            let queries: Vec<PagedQuery> =
                paths.iter().enumerate().map(|(row, path)| PagedQuery { row, path, visible: 1 }).collect();
            PagedPlan::new(&segments, &queries, 1, Cut::Invariant).map(|plan| plan.partials)
        };
        assert_eq!(
            plan(&[&[0, 3]], None),
            Err(PagedError::NoSuchSegment { query: 0, segment: 3, segments: 3 })
        );
        assert_eq!(plan(&[&[0, 1, 2], &[0, 2]], None), Err(PagedError::TwoParents { query: 1, segment: 2 }));
        assert_eq!(
            plan(&[&[0, 1], &[0, 1]], Some(1)),
            Err(PagedError::SharedGrowth { segment: 1, query: 1 })
        );
        assert_eq!(plan(&[&[0, 1]], Some(0)), Err(PagedError::SharedGrowth { segment: 0, query: 0 }));
        assert_eq!(plan(&[&[0, 1], &[0, 2]], Some(2)), Ok(4));
        assert_eq!(plan(&[], None), Ok(0));
    }
}

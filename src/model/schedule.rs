//! In which order the segments of a forest are computed that is better not computed at once.

use super::Forest;
use std::collections::BTreeMap;

/// A part has room for at least this share of the tokens, however long the prefix is.
const SMALLEST_SHARE: usize = 8;

/// An order of computation: forward over the prefix; forward and backward over one part after the other, each adding its
/// share of the gradients of the prefix's keys and values; backward over the prefix. So every token is computed once in
/// each direction, and what the backward pass needs is held for the prefix and one part at a time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// Segments that are not in one part with all their descendants, in order of their numbers.
    pub prefix: Vec<usize>,
    /// What continues the prefix; without one, whole trees.
    pub parts: Vec<Part>,
}

/// Subtrees that continue one path of a prefix.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// The path, from its root: places in [`Schedule::prefix`].
    pub path: Vec<usize>,
    /// The subtrees' segments, in order of their numbers.
    pub segments: Vec<usize>,
}

impl Schedule {
    /// Schedules that have all segments of a forest together, to be followed one after the other. Each holds at most
    /// `tokens` tokens at a time, or one path where that is longer; of a prefix that leaves little room, an eighth more. A
    /// part has at most `at_once` tokens, or one segment, unless its schedule would then hold too much. A forest of no more
    /// than either is one part.
    pub fn of(forest: &Forest, tokens: usize, at_once: usize) -> Vec<Self> {
        let subtrees = Subtrees::of(forest);
        let most = tokens.min(at_once);
        let mut groups: BTreeMap<Option<usize>, Vec<usize>> = BTreeMap::new();
        for (segment, root) in subtrees.roots.iter().enumerate() {
            let large = (subtrees.sizes[*root] > most).then_some(*root);
            groups.entry(large).or_default().push(segment);
        }
        groups.values().map(|segments| subtrees.schedule(segments, tokens, at_once)).collect()
    }

    /// The most tokens that it holds at a time.
    pub fn held(&self, forest: &Forest) -> usize {
        let tokens = |segments: &[usize]| -> usize {
            segments.iter().map(|segment| forest.segments()[*segment].length).sum()
        };
        tokens(&self.prefix) + self.parts.iter().map(|part| tokens(&part.segments)).max().unwrap_or(0)
    }
}

/// What is known of each segment's subtree.
struct Subtrees<'a> {
    forest: &'a Forest,
    /// Tokens of the segment and its descendants.
    sizes: Vec<usize>,
    /// Whether it has descendants.
    continued: Vec<bool>,
    /// The root of its tree.
    roots: Vec<usize>,
}

impl<'a> Subtrees<'a> {
    fn of(forest: &'a Forest) -> Self {
        let segments = forest.segments();
        let mut sizes: Vec<usize> = segments.iter().map(|segment| segment.length).collect();
        let mut continued = vec![false; sizes.len()];
        let mut roots: Vec<usize> = Vec::with_capacity(sizes.len());
        // Parents have lower numbers than their children.
        for (number, segment) in segments.iter().enumerate().rev() {
            if let Some(parent) = segment.parent {
                sizes[parent] += sizes[number];
                continued[parent] = true;
            }
        }
        for (number, segment) in segments.iter().enumerate() {
            roots.push(segment.parent.map_or(number, |parent| roots[parent]));
        }
        Self { forest, sizes, continued, roots }
    }

    fn schedule(&self, segments: &[usize], tokens: usize, at_once: usize) -> Schedule {
        let most = tokens.min(at_once);
        let wanted = self.divide(segments, most, most);
        if wanted.held(self.forest) <= tokens {
            return wanted;
        }
        let limit = self.limit(segments, tokens);
        self.divide(segments, limit, limit.min(at_once))
    }

    /// A schedule whose prefix are the segments with more than `limit` tokens below, and whose parts have `most` of them, or
    /// one subtree.
    fn divide(&self, segments: &[usize], limit: usize, most: usize) -> Schedule {
        let (prefix, others): (Vec<usize>, Vec<usize>) =
            segments.iter().partition(|segment| self.is_prefix(**segment, limit));
        let parts = self.parts(&others, most, &prefix);
        Schedule { prefix, parts }
    }

    /// Whether a segment belongs to the prefix of parts of at most `limit` tokens. Then so do its ancestors.
    fn is_prefix(&self, segment: usize, limit: usize) -> bool {
        self.continued[segment] && self.sizes[segment] > limit
    }

    /// The most tokens of a part that fits beside its prefix. Smaller parts have a larger prefix, so the search goes down.
    fn limit(&self, segments: &[usize], tokens: usize) -> usize {
        let mut limit = tokens.max(1);
        loop {
            let prefix = segments.iter().filter(|segment| self.is_prefix(**segment, limit));
            let held: usize = prefix.map(|segment| self.forest.segments()[*segment].length).sum();
            let room = tokens.saturating_sub(held).max(tokens / SMALLEST_SHARE).max(1);
            if room >= limit {
                return limit;
            }
            limit = room;
        }
    }

    /// Packs the subtrees behind a prefix, in order, as long as they continue one path of it.
    fn parts(&self, segments: &[usize], limit: usize, prefix: &[usize]) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let mut part_of = vec![0; self.sizes.len()];
        let (mut room, mut end) = (0, None);
        for &segment in segments {
            let parent = self.forest.segments()[segment].parent;
            let continues = parent.filter(|parent| prefix.binary_search(parent).is_ok());
            if continues == parent {
                let fits = self.sizes[segment] <= room && self.on_one_path(end, continues);
                if !fits || parts.is_empty() {
                    parts.push(Part::default());
                    (room, end) = (limit, None);
                }
                end = end.max(continues);
                room = room.saturating_sub(self.sizes[segment]);
                part_of[segment] = parts.len() - 1;
            } else if let Some(parent) = parent {
                part_of[segment] = part_of[parent];
            }
            let part = &mut parts[part_of[segment]];
            part.segments.push(segment);
            if continues == parent {
                part.path = self.path(end, prefix);
            }
        }
        parts
    }

    /// Whether one of two segments continues the other; no segment stands before all roots.
    fn on_one_path(&self, first: Option<usize>, second: Option<usize>) -> bool {
        let (above, mut next) = (first.min(second), first.max(second));
        while next > above {
            next = next.and_then(|segment| self.forest.segments()[segment].parent);
        }
        next == above
    }

    /// The path to the end of a segment, as places in the prefix.
    fn path(&self, end: Option<usize>, prefix: &[usize]) -> Vec<usize> {
        let above = |segment: &usize| self.forest.segments()[*segment].parent;
        let path = std::iter::successors(end, above);
        let mut places: Vec<usize> = path.filter_map(|segment| prefix.binary_search(&segment).ok()).collect();
        places.reverse();
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;

    /// Trees of a trunk that is a chain, footers, and replies; some segments are empty or long.
    fn random_forest(number: u64) -> Forest {
        let stream = Stream::new(number, "schedule");
        let mut drawn = 0;
        let mut draw = |bound: usize| {
            drawn += 1;
            (stream.uniform(drawn) * bound as f64) as usize
        };
        let mut forest = Forest::default();
        for _ in 0..=draw(3) {
            let mut trunk = Vec::new();
            for _ in 0..=draw(5) {
                trunk.push(forest.add(trunk.last().copied(), &vec![0; draw(30)]));
            }
            for _ in 0..draw(6) {
                let footer = forest.add(Some(trunk[draw(trunk.len())]), &vec![0; draw(4)]);
                let longest = [1, 10, 40][draw(3)];
                for _ in 0..draw(9) {
                    forest.add(Some(footer), &vec![0; draw(longest)]);
                }
            }
        }
        forest
    }

    fn tokens(forest: &Forest, segments: &[usize]) -> usize {
        segments.iter().map(|segment| forest.segments()[*segment].length).sum()
    }

    fn most_held(forest: &Forest, schedules: &[Schedule]) -> usize {
        schedules.iter().map(|schedule| schedule.held(forest)).max().unwrap_or(0)
    }

    #[test]
    fn every_segment_is_computed_once_behind_its_ancestors() {
        for number in 0..200 {
            let forest = random_forest(number);
            for (limit, at_once) in
                [(0, 9), (1, 1), (7, 2), (30, 9), (60, 60), (120, 30), (1000, 60), (1000, 1000)]
            {
                let mut times = vec![0; forest.segments().len()];
                for schedule in Schedule::of(&forest, limit, at_once) {
                    let mut seen = vec![false; times.len()];
                    let mut compute = |segment: usize, seen: &mut Vec<bool>| {
                        let parent = forest.segments()[segment].parent;
                        assert!(parent.is_none_or(|parent| seen[parent]), "{number} {limit} {segment}");
                        seen[segment] = true;
                        times[segment] += 1;
                    };
                    schedule.prefix.iter().for_each(|segment| compute(*segment, &mut seen));
                    for part in &schedule.parts {
                        // A part sees its path and itself alone.
                        let mut seen = vec![false; forest.segments().len()];
                        let mut end = None;
                        for place in &part.path {
                            let segment = schedule.prefix[*place];
                            assert_eq!(forest.segments()[segment].parent, end, "a path from a root");
                            seen[segment] = true;
                            end = Some(segment);
                        }
                        assert!(!part.segments.is_empty());
                        part.segments.iter().for_each(|segment| compute(*segment, &mut seen));
                    }
                }
                assert!(times.iter().all(|times| *times == 1), "{number} {limit}");
            }
        }
    }

    #[test]
    fn what_is_held_is_bounded() {
        let mut scheduled = 0;
        for number in 0..200 {
            let forest = random_forest(number);
            for (limit, at_once) in [(30, 30), (60, 1000), (120, 40), (1000, 50), (1000, 1000)] {
                let least = most_held(&forest, &Schedule::of(&forest, limit, usize::MAX));
                let schedules = Schedule::of(&forest, limit, at_once);
                assert!(most_held(&forest, &schedules) <= limit.max(least), "{number}");
                for schedule in schedules {
                    let prefix = tokens(&forest, &schedule.prefix);
                    let mut largest = 0;
                    for part in &schedule.parts {
                        let own = tokens(&forest, &part.segments);
                        let with_tokens = |segment: &&usize| forest.segments()[**segment].length > 0;
                        let leaf = part.segments.iter().filter(with_tokens).count() == 1;
                        assert!(prefix + own <= limit || own <= limit / SMALLEST_SHARE || leaf, "{number}");
                        assert!(own <= at_once || leaf || limit < 1000, "{number}");
                        largest = largest.max(own);
                    }
                    assert_eq!(schedule.held(&forest), prefix + largest);
                    scheduled += usize::from(!schedule.prefix.is_empty() && schedule.parts.len() > 1);
                }
            }
        }
        assert!(scheduled > 100);
    }

    #[test]
    fn what_fits_is_one_part() {
        for number in 0..50 {
            let forest = random_forest(number);
            let all: Vec<usize> = (0..forest.segments().len()).collect();
            let part = Part { path: Vec::new(), segments: all };
            let whole = Schedule { prefix: Vec::new(), parts: vec![part] };
            let tokens = forest.ids().len();
            assert_eq!(Schedule::of(&forest, tokens, tokens), [whole]);
        }
        assert_eq!(Schedule::of(&Forest::default(), 0, 0), []);
    }

    /// Parts of so many tokens as are wanted would make all but the leaves a prefix.
    #[test]
    fn larger_parts_are_taken_where_their_prefix_is_smaller() {
        let mut forest = Forest::default();
        let root = forest.add(None, &[0; 10]);
        for _ in 0..100 {
            let child = forest.add(Some(root), &[0; 50]);
            (0..10).for_each(|_| _ = forest.add(Some(child), &[0; 100]));
        }
        let [schedule] = &Schedule::of(&forest, 2000, 1024)[..] else { unreachable!() };
        assert_eq!((schedule.parts.len(), schedule.held(&forest)), (100, 1060));
        let [schedule] = &Schedule::of(&forest, 7000, 1024)[..] else { unreachable!() };
        assert_eq!((schedule.parts.len(), schedule.held(&forest)), (100, 6010));
    }

    /// Prompts at several places of a trunk share parts; the replies of a large one do not mix with those of others.
    #[test]
    fn prompts_go_together_as_they_fit() {
        let mut forest = Forest::default();
        let first = forest.add(None, &[0; 50]);
        let second = forest.add(Some(first), &[0; 50]);
        let mut prompts = Vec::new();
        for (parent, length) in [(first, 5), (first, 5), (second, 5), (second, 40)] {
            let footer = forest.add(Some(parent), &[0; 2]);
            let replies: Vec<usize> = (0..4).map(|_| forest.add(Some(footer), &vec![0; length])).collect();
            prompts.push((footer, replies));
        }
        let [schedule] = &Schedule::of(&forest, 190, 190)[..] else { unreachable!() };
        assert_eq!(schedule.prefix, [first, second, prompts[3].0]);
        let parts: Vec<(&[usize], usize)> =
            schedule.parts.iter().map(|part| (&part.path[..], part.segments.len())).collect();
        // 88 tokens are left beside the prefix: three small prompts, then the large one's replies by twos.
        assert_eq!(parts, [(&[0, 1][..], 15), (&[0, 1, 2], 2), (&[0, 1, 2], 2)]);
        // With room for all, parts of so many tokens are the same.
        assert_eq!(Schedule::of(&forest, usize::MAX, 88), std::slice::from_ref(schedule));
    }
}

//! The model's only input shape: packed tokens whose segments have parents.

use super::cache::{Extension, KvCache, NodeId};

/// A run of tokens that continues its parent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The segment that it continues; none for a root.
    pub parent: Option<usize>,
    /// First row of its tokens.
    pub row: usize,
    /// Number of its tokens.
    pub length: usize,
    /// Tokens before it on its path: the position of its first token.
    pub position: usize,
}

/// Packed token ids with the segments they belong to. A token sees its ancestors and its own
/// segment up to itself: a document is a trunk, thoughts are leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Forest {
    ids: Vec<u32>,
    segments: Vec<Segment>,
}

impl Forest {
    /// Adds a segment and returns its number. An empty one may serve as a parent.
    ///
    /// # Panics
    /// When `parent` is not a segment of this forest.
    pub fn add(&mut self, parent: Option<usize>, ids: &[u32]) -> usize {
        let position =
            parent.map_or(0, |parent| self.segments[parent].position + self.segments[parent].length);
        self.segments.push(Segment { parent, row: self.ids.len(), length: ids.len(), position });
        self.ids.extend_from_slice(ids);
        self.segments.len() - 1
    }

    /// The packed token ids.
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The segments in order of their rows.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Tokens on the longest path from a root.
    pub fn longest_path(&self) -> usize {
        self.segments.iter().map(|segment| segment.position + segment.length).max().unwrap_or(0)
    }

    /// The row whose hidden state predicts what follows `at` tokens of a segment: the token
    /// before, which for `at` = 0 is the last of the nearest ancestor with tokens.
    pub fn row_before(&self, segment: usize, at: usize) -> Option<usize> {
        let (segment, at) = self.end_before(segment, at)?;
        Some(self.segments[segment].row + at - 1)
    }

    /// The same place by the segment that holds this row: the segment, and how many of its tokens come before.
    pub fn end_before(&self, mut segment: usize, mut at: usize) -> Option<(usize, usize)> {
        while at == 0 {
            segment = self.segments[segment].parent?;
            at = self.segments[segment].length;
        }
        Some((segment, at))
    }

    /// Tokens of the first `count` segments: the row of what is behind them.
    pub fn rows_of_first(&self, count: usize) -> usize {
        self.segments.get(count).map_or(self.ids.len(), |segment| segment.row)
    }

    /// Enters every segment into an empty cache; extension i belongs to segment i.
    pub fn enter(&self, cache: &mut KvCache) -> Vec<Extension> {
        self.enter_behind(cache, &[], 0)
    }

    /// Enters the segments behind the first ones, which are in the cache as `first`; they get one extension each, with
    /// rows that count from 0. `prefix_rows` is how many rows the pass had that computed the first ones and perhaps others.
    pub fn enter_behind(&self, cache: &mut KvCache, first: &[NodeId], prefix_rows: usize) -> Vec<Extension> {
        let (start, mut nodes) = (self.rows_of_first(first.len()), first.to_vec());
        let mut extensions = Vec::with_capacity(self.segments.len() - first.len());
        for segment in &self.segments[first.len()..] {
            let node = cache.insert(segment.parent.map(|parent| nodes[parent]));
            let row = segment.row - start;
            cache.extend(node, segment.length, prefix_rows + row);
            nodes.push(node);
            extensions.push(Extension { node, rows: row..row + segment.length });
        }
        extensions
    }

    /// Removes everything, keeping the buffers.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.segments.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_run_along_paths() {
        let mut forest = Forest::default();
        let trunk = forest.add(None, &[1, 2, 3]);
        let empty = forest.add(Some(trunk), &[]);
        let leaf = forest.add(Some(empty), &[4, 5]);
        assert_eq!(forest.segments()[leaf].position, 3);
        assert_eq!(forest.row_before(leaf, 0), Some(2));
        assert_eq!(forest.row_before(leaf, 2), Some(4));
        assert_eq!(forest.row_before(trunk, 0), None);
        assert_eq!(forest.end_before(leaf, 0), Some((trunk, 3)));
        assert_eq!(forest.longest_path(), 5);
    }
}

//! Keys and values in pages of sixteen positions, held by the nodes of a prefix tree.

use crate::kernels::attention::{Extent, Geometry, PAGE, Pages, Piece, Tile};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Rows whose keys and values threads write together.
const ROWS_TO_SHARE: usize = 256;

/// A node of the prefix tree: a segment whose keys and values are cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(usize);

/// New positions of a node and their rows in a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// The node; the rows are its newest positions.
    pub node: NodeId,
    /// Rows of the batch.
    pub rows: Range<usize>,
}

#[derive(Clone, Debug, Default)]
struct Node {
    parent: Option<NodeId>,
    tree: usize,
    position: usize,
    length: usize,
    /// Shared with the tiles of a pass, and changed between passes.
    extents: Arc<Vec<Extent>>,
    children: usize,
    /// The extents of all ancestors, root first; shared by siblings.
    prefix: Arc<[Extent]>,
    /// This node's `prefix` and extents, for its children; built when the first child comes.
    path: Option<Arc<[Extent]>>,
}

impl Node {
    /// Page and lane of a position.
    fn locate(&self, at: usize) -> Option<(usize, usize)> {
        let mut left = at;
        for extent in self.extents.iter() {
            if left < extent.length {
                return Some((extent.page + left / PAGE, left % PAGE));
            }
            left -= extent.length;
        }
        None
    }
}

/// Where the keys and values of a row go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    row: usize,
    page: usize,
    lane: usize,
}

/// Paged keys and values of every layer, with the tree of segments that they belong to.
///
/// Memory is `pages x 16 positions x layers x kv_heads x (head_dim + padded head_dim) x 4` bytes;
/// pages of released nodes are used again.
#[derive(Debug)]
pub struct KvCache {
    geometry: Geometry,
    /// One buffer per layer and head.
    keys: Vec<Vec<Vec<f32>>>,
    values: Vec<Vec<Vec<f32>>>,
    nodes: Vec<Node>,
    free_nodes: Vec<usize>,
    free_pages: Vec<usize>,
    pages: usize,
    /// For how many it may keep memory in advance.
    most_pages: usize,
}

impl KvCache {
    /// An empty cache.
    pub fn new(geometry: Geometry, layers: usize) -> Self {
        let buffers = || vec![vec![Vec::new(); geometry.kv_heads]; layers];
        Self {
            geometry,
            keys: buffers(),
            values: buffers(),
            nodes: Vec::new(),
            free_nodes: Vec::new(),
            free_pages: Vec::new(),
            pages: 0,
            most_pages: usize::MAX,
        }
    }

    /// The same, for at most so many pages: it keeps no memory for more.
    #[must_use]
    pub fn with_most_pages(self, most_pages: usize) -> Self {
        Self { most_pages, ..self }
    }

    /// Bytes of one page in all layers.
    pub fn page_bytes(geometry: Geometry, layers: usize) -> usize {
        (geometry.key_page() + geometry.value_page()) * geometry.kv_heads * layers * size_of::<f32>()
    }

    /// Forgets every node and keeps the memory.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.free_nodes.clear();
        self.free_pages.clear();
        self.pages = 0;
    }

    /// Bytes of the pages in use.
    pub fn used_bytes(&self) -> usize {
        self.used_pages() * Self::page_bytes(self.geometry, self.keys.len())
    }

    /// Pages in use.
    pub fn used_pages(&self) -> usize {
        self.pages - self.free_pages.len()
    }

    /// Adds a node without positions. Its parent must not grow from here on.
    pub fn insert(&mut self, parent: Option<NodeId>) -> NodeId {
        let id = self.free_nodes.pop().unwrap_or_else(|| {
            self.nodes.push(Node::default());
            self.nodes.len() - 1
        });
        let mut node = Node { parent, tree: id, ..Node::default() };
        if let Some(NodeId(parent)) = parent {
            let parent = &mut self.nodes[parent];
            parent.children += 1;
            node.tree = parent.tree;
            node.position = parent.position + parent.length;
            node.prefix = parent
                .path
                .get_or_insert_with(|| parent.prefix.iter().chain(parent.extents.iter()).copied().collect())
                .clone();
        }
        self.nodes[id] = node;
        NodeId(id)
    }

    /// Reserves `count` further positions of a node; `row` is the batch row of the first.
    pub fn extend(&mut self, NodeId(node): NodeId, count: usize, row: usize) {
        let mut added = 0;
        while added < count {
            let length = self.nodes[node].length;
            if length.is_multiple_of(PAGE) {
                let page = self.allocate();
                let extents = Arc::make_mut(&mut self.nodes[node].extents);
                match extents.last() {
                    Some(last) if last.page + last.length.div_ceil(PAGE) == page => {}
                    _ => extents.push(Extent { page, length: 0, row: row + added }),
                }
            }
            let step = (count - added).min(PAGE - length % PAGE);
            if let Some(last) = Arc::make_mut(&mut self.nodes[node].extents).last_mut() {
                last.length += step;
            }
            self.nodes[node].length += step;
            added += step;
        }
    }

    fn allocate(&mut self) -> usize {
        if let Some(page) = self.free_pages.pop() {
            return page;
        }
        self.pages += 1;
        let ahead = (self.pages * 3 / 2).min(self.most_pages).max(self.pages);
        let (key_page, value_page) = (self.geometry.key_page(), self.geometry.value_page());
        for (buffers, page) in [(&mut self.keys, key_page), (&mut self.values, value_page)] {
            for buffer in buffers.iter_mut().flatten() {
                if buffer.len() < self.pages * page {
                    buffer.reserve_exact(ahead * page - buffer.len());
                    buffer.resize(ahead * page, 0.0);
                }
            }
        }
        self.pages - 1
    }

    /// Keeps a node although it may lose its children.
    pub fn hold(&mut self, NodeId(node): NodeId) {
        self.nodes[node].children += 1;
    }

    /// Keeps a node no longer: without children it is released, with every ancestor that is left without any.
    pub fn let_go(&mut self, node: NodeId) {
        let children = &mut self.nodes[node.0].children;
        *children -= 1;
        if *children == 0 {
            self.release_path(node);
        }
    }

    /// Gives up a node that has no children; its pages are free again.
    pub fn release(&mut self, NodeId(id): NodeId) {
        debug_assert_eq!(self.nodes[id].children, 0, "a node with children was released");
        let node = std::mem::take(&mut self.nodes[id]);
        for extent in node.extents.iter() {
            let pages = extent.page..extent.page + extent.length.div_ceil(PAGE);
            self.free_pages.extend(pages.rev());
        }
        self.free_nodes.push(id);
        if let Some(NodeId(parent)) = node.parent {
            self.nodes[parent].children -= 1;
        }
    }

    /// Releases a node and then every ancestor that is left without children.
    pub fn release_path(&mut self, node: NodeId) {
        let mut next = Some(node);
        while let Some(id) = next {
            let parent = self.nodes[id.0].parent;
            self.release(id);
            next = parent.filter(|parent| self.nodes[parent.0].children == 0);
        }
    }

    /// Positions on the path from the root to the end of a node.
    pub fn path_length(&self, NodeId(node): NodeId) -> usize {
        self.nodes[node].position + self.nodes[node].length
    }

    /// Position of an extension's first row.
    pub(super) fn first_position(&self, extension: &Extension) -> usize {
        self.path_length(extension.node) - extension.rows.len()
    }

    /// Queries of a batch as tiles, siblings together, sorted by tree; the memory of those before them is used again.
    pub(super) fn tiles(&self, extensions: &[Extension], tiles: &mut Vec<Tile>) {
        let mut spare: Vec<Vec<Piece>> = tiles.drain(..).map(|tile| tile.pieces).collect();
        spare.iter_mut().for_each(Vec::clear);
        let mut order: Vec<&Extension> =
            extensions.iter().filter(|extension| !extension.rows.is_empty()).collect();
        let parent = |extension: &Extension| self.nodes[extension.node.0].parent.map(|parent| parent.0);
        let family = |extension: &Extension| match parent(extension) {
            Some(parent) => (self.nodes[extension.node.0].tree, parent, 0),
            None => (self.nodes[extension.node.0].tree, 0, 1 + extension.node.0),
        };
        order.sort_by_key(|extension| family(extension));
        for siblings in order.chunk_by(|a, b| family(a) == family(b)) {
            let first = &self.nodes[siblings[0].node.0];
            let pieces = siblings.iter().map(|extension| {
                let node = &self.nodes[extension.node.0];
                Piece {
                    row: extension.rows.start,
                    count: extension.rows.len(),
                    offset: node.length - extension.rows.len(),
                    own: node.extents.clone(),
                }
            });
            Tile::cut(first.tree, &first.prefix, pieces, self.geometry, tiles, &mut spare);
        }
    }

    /// Where the keys and values of a batch's rows go.
    pub(super) fn places(&self, extensions: &[Extension], places: &mut Vec<Place>) {
        places.clear();
        let of = |extension: &Extension| {
            let node = &self.nodes[extension.node.0];
            let first = node.length - extension.rows.len();
            extension.rows.clone().zip(first..).filter_map(|(row, at)| {
                let (page, lane) = node.locate(at)?;
                Some(Place { row, page, lane })
            })
        };
        places.extend(extensions.iter().flat_map(of));
    }

    /// Writes the keys and values of rows, which start `offset` elements into rows of `width` elements.
    pub(super) fn write(
        &mut self,
        layer: usize,
        places: &[Place],
        rows: &[f32],
        width: usize,
        offset: usize,
    ) {
        let (dim, padded) = (self.geometry.head_dim, self.geometry.padded());
        let (key_page, value_page) = (self.geometry.key_page(), self.geometry.value_page());
        let kv_heads = self.geometry.kv_heads;
        let buffers = self.keys[layer].par_iter_mut().zip(self.values[layer].par_iter_mut());
        // A step of decoding writes too little to share.
        let heads_per_task = if places.len() < ROWS_TO_SHARE { kv_heads } else { 1 };
        buffers.with_min_len(heads_per_task).enumerate().for_each(|(head, (keys, values))| {
            for Place { row, page, lane } in places {
                let row = &rows[row * width + offset..(row + 1) * width];
                let target = &mut keys[page * key_page..][..key_page];
                for (element, key) in row[head * dim..][..dim].iter().enumerate() {
                    target[element * PAGE + lane] = *key;
                }
                let target = &mut values[page * value_page + lane * padded..][..padded];
                target[..dim].copy_from_slice(&row[(kv_heads + head) * dim..][..dim]);
                target[dim..].fill(0.0);
            }
        });
    }

    pub(super) fn layer(&self, layer: usize) -> Pages<'_> {
        Pages { keys: &self.keys[layer], values: &self.values[layer] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_pages_are_used_again() {
        let mut cache = KvCache::new(Geometry { heads: 2, kv_heads: 1, head_dim: 8 }, 1);
        let root = cache.insert(None);
        cache.extend(root, 40, 0);
        assert_eq!(cache.used_pages(), 3);
        let leaves: Vec<NodeId> = (0..4).map(|_| cache.insert(Some(root))).collect();
        for leaf in &leaves {
            (0..20).for_each(|_| cache.extend(*leaf, 1, 0));
            assert_eq!(cache.path_length(*leaf), 60);
        }
        assert_eq!(cache.used_pages(), 11);
        for leaf in leaves {
            cache.release_path(leaf);
        }
        assert_eq!(cache.used_pages(), 0);
        let again = cache.insert(None);
        cache.extend(again, 176, 0);
        assert_eq!((cache.used_pages(), cache.pages), (11, 11));
    }
}

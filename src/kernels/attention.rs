//! Attention over a forest: every token sees its ancestors and its own segment up to itself.
//!
//! Keys and values lie in pages of sixteen positions. A [`Tile`] is a set of queries that share
//! their ancestors: positions of one segment, or siblings that read one prompt. The scores of a
//! tile against a shared page are one matrix product, so a shared prefix is read once per tile.
//!
//! A query's result is the same to the bit whatever tile it is in: scores are one chain over the
//! head dimension, the softmax sum runs over sixteen lanes by path position, and the weighted sum
//! of values is one chain over the path. The [tokens x tokens] matrix never exists: scratch holds
//! one tile's scores in the forward pass and one block of keys in the backward pass.

use super::elementary::{dot, exp, exp_in_place, max};
use super::matmul::{Left, Operands, tiles};
use super::parallel::{Disjoint, for_each_item};
use super::simd::multiversion;
use super::{LANES, pad};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

/// Positions in one page.
pub const PAGE: usize = LANES;
/// Query rows (tokens x heads of a group) that a tile aims at.
const TILE_ROWS: usize = 48;
/// Keys that the backward pass works on at a time.
const BLOCK_KEYS: usize = 8 * PAGE;
/// Multiply-adds below which a call stays on one thread.
const SERIAL_PRODUCTS: usize = 1 << 20;

/// Heads and their size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; `heads` is a multiple.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
}

impl Geometry {
    /// Elements of one page of keys of one head: `[head_dim, 16]`.
    pub fn key_page(&self) -> usize {
        self.head_dim * PAGE
    }

    /// Elements of one page of values of one head: `[16, padded head_dim]`.
    pub fn value_page(&self) -> usize {
        PAGE * self.padded()
    }

    /// The head dimension rounded up to whole lanes.
    pub fn padded(&self) -> usize {
        pad(self.head_dim)
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Consecutive pages that hold consecutive positions of one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First page.
    pub page: usize,
    /// Positions used; all but a segment's last extent fill their pages.
    pub length: usize,
    /// Row of the first position's gradients in the backward pass (unused in decoding).
    pub row: usize,
}

/// Queries of one segment within a tile.
#[derive(Clone, Debug)]
pub struct Piece {
    /// First query row in the batch.
    pub row: usize,
    /// Number of query rows.
    pub count: usize,
    /// Position of the first query within its segment.
    pub offset: usize,
    /// The segment's pages.
    pub own: Arc<Vec<Extent>>,
}

/// Queries that share all their ancestors.
#[derive(Clone, Debug)]
pub struct Tile {
    /// Number of the tree, for the backward pass.
    pub tree: usize,
    /// Pages of the ancestors, root first.
    pub prefix: Arc<[Extent]>,
    /// The queries.
    pub pieces: Vec<Piece>,
}

impl Tile {
    /// Cuts queries that share a prefix into `tiles` of a good size, whose pieces stand in the memory of `spare` ones.
    pub fn cut(
        tree: usize,
        prefix: &Arc<[Extent]>,
        pieces: impl Iterator<Item = Piece>,
        geometry: Geometry,
        tiles: &mut Vec<Self>,
        spare: &mut Vec<Vec<Piece>>,
    ) {
        let limit = (TILE_ROWS / geometry.group()).max(1);
        let mut room = 0;
        for mut piece in pieces {
            while piece.count > 0 {
                if room == 0 {
                    let pieces = spare.pop().unwrap_or_default();
                    tiles.push(Self { tree, prefix: prefix.clone(), pieces });
                    room = limit;
                }
                let count = piece.count.min(room);
                let part = Piece { count, own: piece.own.clone(), ..piece };
                if let Some(tile) = tiles.last_mut() {
                    tile.pieces.push(part);
                }
                room -= count;
                piece.row += count;
                piece.offset += count;
                piece.count -= count;
            }
        }
    }

    fn queries(&self) -> usize {
        self.pieces.iter().map(|piece| piece.count).sum()
    }

    fn prefix_length(&self) -> usize {
        self.prefix.iter().map(|extent| extent.length).sum()
    }

    fn longest(&self) -> usize {
        let own = self.pieces.iter().map(|piece| piece.offset + piece.count).max().unwrap_or(0);
        self.prefix_length() + own
    }

    /// Pairs of query and visible key, for counting operations.
    pub fn pairs(&self) -> usize {
        let prefix = self.prefix_length();
        let own = |piece: &Piece| piece.count * (piece.offset + 1) + piece.count * (piece.count - 1) / 2;
        self.pieces.iter().map(|piece| piece.count * prefix + own(piece)).sum()
    }
}

/// The keys and values of one layer, one buffer per key/value head.
#[derive(Clone, Copy)]
pub struct Pages<'a> {
    /// Keys of each head: pages of `[head_dim, 16]`.
    pub keys: &'a [Vec<f32>],
    /// Values of each head: pages of `[16, padded head_dim]`.
    pub values: &'a [Vec<f32>],
}

#[derive(Default)]
struct Scratch {
    queries: Vec<f32>,
    scores: Vec<f32>,
    sums: Vec<f32>,
    grads: Vec<f32>,
    products: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    query_grads: Vec<f32>,
    factors: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

fn zeroed(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    buffer.clear();
    buffer.resize(length, 0.0);
    buffer
}

/// A buffer of at least this length, its contents left as they are.
fn reused(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    if buffer.len() < length {
        buffer.resize(length, 0.0);
    }
    &mut buffer[..length]
}

/// Attention of every tile.
///
/// `queries [rows, query_stride]` starts each row with `heads x head_dim` rotated queries;
/// `out [rows, heads x head_dim]`; `log_sums [rows, heads]` takes max + ln(sum) of each query's
/// scaled scores, which the backward pass needs.
pub fn forward(
    geometry: Geometry,
    tiles: &[Tile],
    pages: Pages,
    queries: &[f32],
    query_stride: usize,
    out: &mut [f32],
    log_sums: &mut [f32],
) {
    let work: usize = tiles.iter().map(Tile::pairs).sum();
    let parallel = work * geometry.heads * geometry.head_dim * 2 > SERIAL_PRODUCTS;
    let (out, log_sums) = (Disjoint::new(out), Disjoint::new(log_sums));
    for_each_item(tiles.len() * geometry.kv_heads, parallel, |item| {
        let (tile, kv_head) = (&tiles[item / geometry.kv_heads], item % geometry.kv_heads);
        SCRATCH.with_borrow_mut(|scratch| {
            let job = Job { geometry, tile, kv_head, pages };
            job.forward(scratch, queries, query_stride, &out, &log_sums);
        });
    });
}

/// One tile and one key/value head.
struct Job<'a> {
    geometry: Geometry,
    tile: &'a Tile,
    kv_head: usize,
    pages: Pages<'a>,
}

impl Job<'_> {
    /// (first score row, rows, piece) of every piece.
    fn piece_rows(&self) -> impl Iterator<Item = (Range<usize>, &Piece)> {
        let group = self.geometry.group();
        self.tile.pieces.iter().scan(0, move |row, piece| {
            let first = *row;
            *row += piece.count * group;
            Some((first..*row, piece))
        })
    }

    /// Copies this head group's part of `source [rows, stride]` to `[rows x group, width]`.
    fn gather(&self, source: &[f32], stride: usize, target: &mut [f32], width: usize) {
        let (group, dim) = (self.geometry.group(), self.geometry.head_dim);
        for (rows, piece) in self.piece_rows() {
            for at in 0..rows.len() {
                let head = self.kv_head * group + at % group;
                let from = &source[(piece.row + at / group) * stride + head * dim..][..dim];
                target[(rows.start + at) * width..][..dim].copy_from_slice(from);
            }
        }
    }

    fn forward(
        &self,
        scratch: &mut Scratch,
        queries: &[f32],
        query_stride: usize,
        out: &Disjoint,
        log_sums: &Disjoint,
    ) {
        let dim = self.geometry.head_dim;
        let rows = self.tile.queries() * self.geometry.group();
        let stride = pad(self.tile.longest()) + 2 * LANES;
        let tile_queries = reused(&mut scratch.queries, rows * dim);
        self.gather(queries, query_stride, tile_queries, dim);
        let scores = reused(&mut scratch.scores, rows * stride);
        self.scores(tile_queries, rows, scores, stride);
        let padded = self.geometry.padded();
        let sums = zeroed(&mut scratch.sums, rows * padded);
        self.softmax(scores, stride, log_sums, &mut scratch.factors);
        self.weighted_values(scores, rows, stride, sums);
        self.write(sums, &scratch.factors, out);
    }

    /// Unscaled scores of every row against its whole path, by path position.
    fn scores(&self, queries: &[f32], rows: usize, scores: &mut [f32], stride: usize) {
        let mut at = 0;
        for extent in self.tile.prefix.iter() {
            self.score_extent(queries, rows, extent, extent.length, &mut scores[at..], stride);
            at += extent.length;
        }
        let dim = self.geometry.head_dim;
        for (rows, piece) in self.piece_rows() {
            let mut left = piece.offset + piece.count;
            let mut at = rows.start * stride + at;
            for extent in piece.own.iter() {
                let length = extent.length.min(left);
                let queries = &queries[rows.start * dim..rows.end * dim];
                self.score_extent(queries, rows.len(), extent, length, &mut scores[at..], stride);
                at += length;
                left -= length;
            }
        }
    }

    /// Scores of some rows against an extent's keys. Its values, which are needed after all scores, are asked for meanwhile.
    fn score_extent(
        &self,
        queries: &[f32],
        rows: usize,
        extent: &Extent,
        length: usize,
        scores: &mut [f32],
        stride: usize,
    ) {
        let page = self.geometry.key_page();
        let operands = Operands {
            left: Left::rows(queries, self.geometry.head_dim),
            inner: self.geometry.head_dim,
            right: &self.pages.keys[self.kv_head][extent.page * page..],
            right_stride: LANES,
            panel_stride: page,
            next: &self.pages.values[self.kv_head][extent.page * self.geometry.value_page()..],
        };
        tiles(&operands, rows, length.div_ceil(PAGE), scores, stride, false);
    }

    /// Turns scores into e^(score - max), zero past the query itself, and stores the log-sums.
    /// `factors` takes what each row's weighted sum is to be multiplied by.
    fn softmax(&self, scores: &mut [f32], stride: usize, log_sums: &Disjoint, factors: &mut Vec<f32>) {
        factors.clear();
        let (group, scale) = (self.geometry.group(), self.geometry.scale());
        let prefix = self.tile.prefix_length();
        for (rows, piece) in self.piece_rows() {
            let end = prefix + piece.offset + piece.count;
            for at in 0..rows.len() {
                let visible = prefix + piece.offset + at / group + 1;
                let row = &mut scores[(rows.start + at) * stride..][..end];
                let (seen, hidden) = row.split_at_mut(visible);
                hidden.fill(0.0);
                let largest = max(seen);
                let sum = exp_in_place(seen, largest, scale);
                let place =
                    (piece.row + at / group) * self.geometry.heads + self.kv_head * group + at % group;
                // SAFETY: this (row, head) belongs to this job alone.
                let log_sum = unsafe { log_sums.slice(place, 1) };
                log_sum[0] = largest.mul_add(scale, sum.ln());
                factors.push(1.0 / sum);
            }
        }
    }

    /// One chain per output element over the whole path.
    fn weighted_values(&self, weights: &[f32], rows: usize, stride: usize, sums: &mut [f32]) {
        let mut at = 0;
        for extent in self.tile.prefix.iter() {
            self.weigh_extent(&weights[at..], rows, stride, extent, extent.length, sums);
            at += extent.length;
        }
        let padded = self.geometry.padded();
        for (rows, piece) in self.piece_rows() {
            let mut left = piece.offset + piece.count;
            let mut at = rows.start * stride + at;
            let sums = &mut sums[rows.start * padded..rows.end * padded];
            for extent in piece.own.iter() {
                let length = extent.length.min(left);
                self.weigh_extent(&weights[at..], rows.len(), stride, extent, length, sums);
                at += length;
                left -= length;
            }
        }
    }

    fn weigh_extent(
        &self,
        weights: &[f32],
        rows: usize,
        stride: usize,
        extent: &Extent,
        length: usize,
        sums: &mut [f32],
    ) {
        let padded = self.geometry.padded();
        let operands = Operands {
            left: Left { values: weights, row_stride: stride, inner_stride: 1 },
            inner: length,
            right: &self.pages.values[self.kv_head][extent.page * self.geometry.value_page()..],
            right_stride: padded,
            panel_stride: LANES,
            next: &[],
        };
        tiles(&operands, rows, padded / LANES, sums, padded, true);
    }

    fn write(&self, sums: &[f32], factors: &[f32], out: &Disjoint) {
        let Geometry { heads, head_dim, .. } = self.geometry;
        let (group, padded) = (self.geometry.group(), self.geometry.padded());
        for (rows, piece) in self.piece_rows() {
            for at in 0..rows.len() {
                let head = self.kv_head * group + at % group;
                let place = ((piece.row + at / group) * heads + head) * head_dim;
                // SAFETY: this (row, head) belongs to this job alone.
                let target = unsafe { out.slice(place, head_dim) };
                let source = &sums[(rows.start + at) * padded..][..head_dim];
                for (target, source) in target.iter_mut().zip(source) {
                    *target = source * factors[rows.start + at];
                }
            }
        }
    }
}

/// What the backward pass reads besides the pages.
#[derive(Clone, Copy)]
pub struct Saved<'a> {
    /// Rotated queries, as in the forward pass.
    pub queries: &'a [f32],
    /// Distance between rows of `queries`.
    pub query_stride: usize,
    /// The forward pass's output.
    pub out: &'a [f32],
    /// The forward pass's log-sums.
    pub log_sums: &'a [f32],
    /// Gradient with respect to `out`.
    pub grad_out: &'a [f32],
}

/// Where the backward pass writes.
pub struct Gradients<'a> {
    /// `[rows, heads x head_dim]`, overwritten.
    pub queries: &'a mut [f32],
    /// `[kv_heads, rows of keys, padded head_dim]`, added to.
    pub keys: &'a mut [f32],
    /// `[kv_heads, rows, padded head_dim]`, added to.
    pub values: &'a mut [f32],
}

/// Gradients of queries, keys and values.
///
/// Each (tree, key/value head) is one task that visits its tiles in order, so the sums over
/// queries have a fixed order and need no atomic operation. `tiles` must be sorted by tree.
pub fn backward(geometry: Geometry, tiles: &[Tile], pages: Pages, saved: Saved, gradients: &mut Gradients) {
    let trees: Vec<&[Tile]> = tiles.chunk_by(|a, b| a.tree == b.tree).collect();
    let queries = Disjoint::new(gradients.queries);
    let key_rows = gradients.keys.len() / (geometry.kv_heads * geometry.padded());
    let (keys, values) = (Disjoint::new(gradients.keys), Disjoint::new(gradients.values));
    let work: usize = tiles.iter().map(Tile::pairs).sum();
    let parallel = work * geometry.heads * geometry.head_dim * 5 > SERIAL_PRODUCTS;
    for_each_item(trees.len() * geometry.kv_heads, parallel, |item| {
        let kv_head = item % geometry.kv_heads;
        SCRATCH.with_borrow_mut(|scratch| {
            for tile in trees[item / geometry.kv_heads] {
                let job = Job { geometry, tile, kv_head, pages };
                job.backward(scratch, saved, &queries, key_rows, &keys, &values);
            }
        });
    });
}

impl Job<'_> {
    fn backward(
        &self,
        scratch: &mut Scratch,
        saved: Saved,
        query_grads: &Disjoint,
        key_rows: usize,
        key_grads: &Disjoint,
        value_grads: &Disjoint,
    ) {
        let Geometry { heads, head_dim, .. } = self.geometry;
        let padded = self.geometry.padded();
        let rows = self.tile.queries() * self.geometry.group();
        self.gather(saved.queries, saved.query_stride, zeroed(&mut scratch.queries, rows * padded), padded);
        self.gather(saved.grad_out, heads * head_dim, zeroed(&mut scratch.grads, rows * padded), padded);
        zeroed(&mut scratch.query_grads, rows * padded);
        let statistics = self.row_statistics(saved);
        let mut at = 0;
        for extent in self.tile.prefix.iter() {
            let block = Block { rows: 0..rows, extent: *extent, length: extent.length, position: at };
            self.backward_extent(scratch, &block, &statistics, key_rows, key_grads, value_grads);
            at += extent.length;
        }
        for (rows, piece) in self.piece_rows() {
            let (mut at, mut left) = (at, piece.offset + piece.count);
            for extent in piece.own.iter() {
                let length = extent.length.min(left);
                let block = Block { rows: rows.clone(), extent: *extent, length, position: at };
                self.backward_extent(scratch, &block, &statistics, key_rows, key_grads, value_grads);
                at += length;
                left -= length;
            }
        }
        self.write(&scratch.query_grads, &vec![1.0; rows], query_grads);
    }

    /// For each row: visible path length, log-sum, and the inner product of output and its gradient.
    fn row_statistics(&self, saved: Saved) -> Vec<RowStatistics> {
        let Geometry { heads, head_dim, .. } = self.geometry;
        let group = self.geometry.group();
        let prefix = self.tile.prefix_length();
        let mut all = Vec::new();
        for (rows, piece) in self.piece_rows() {
            for at in 0..rows.len() {
                let place = (piece.row + at / group) * heads + self.kv_head * group + at % group;
                let span = place * head_dim..(place + 1) * head_dim;
                all.push(RowStatistics {
                    visible: prefix + piece.offset + at / group + 1,
                    log_sum: saved.log_sums[place],
                    product: dot(&saved.out[span.clone()], &saved.grad_out[span]),
                });
            }
        }
        all
    }

    fn backward_extent(
        &self,
        scratch: &mut Scratch,
        block: &Block,
        statistics: &[RowStatistics],
        key_rows: usize,
        key_grads: &Disjoint,
        value_grads: &Disjoint,
    ) {
        let padded = self.geometry.padded();
        let mut done = 0;
        while done < block.length {
            let keys = (block.length - done).min(BLOCK_KEYS);
            let part = Block {
                rows: block.rows.clone(),
                extent: Extent {
                    page: block.extent.page + done / PAGE,
                    row: block.extent.row + done,
                    length: keys,
                },
                length: keys,
                position: block.position + done,
            };
            let place = (self.kv_head * key_rows + part.extent.row) * padded;
            // SAFETY: rows of this tree and this head belong to this task alone.
            let (key_grads, value_grads) =
                unsafe { (key_grads.slice(place, keys * padded), value_grads.slice(place, keys * padded)) };
            self.backward_block(scratch, &part, statistics, key_grads, value_grads);
            done += keys;
        }
    }

    /// Gradients between some rows and at most [`BLOCK_KEYS`] consecutive keys.
    fn backward_block(
        &self,
        scratch: &mut Scratch,
        block: &Block,
        statistics: &[RowStatistics],
        key_grads: &mut [f32],
        value_grads: &mut [f32],
    ) {
        let geometry = self.geometry;
        let (padded, scale) = (geometry.padded(), geometry.scale());
        let (rows, keys) = (block.rows.len(), block.length);
        let stride = pad(keys);
        let span = block.rows.start * padded..block.rows.end * padded;
        let queries = &scratch.queries[span.clone()];
        let grads = &scratch.grads[span.clone()];
        // Probabilities and their gradients, [rows, keys] each.
        let weights = reused(&mut scratch.scores, rows * stride);
        let products = reused(&mut scratch.products, rows * stride);
        let key_panels = &self.pages.keys[self.kv_head][block.extent.page * geometry.key_page()..];
        multiply_panels(queries, padded, rows, geometry, key_panels, weights, stride);
        let value_rows = &self.pages.values[self.kv_head][block.extent.page * geometry.value_page()..];
        let values = zeroed(&mut scratch.values, stride / PAGE * geometry.key_page());
        transpose_values(value_rows, geometry, values);
        multiply_panels(grads, padded, rows, geometry, values, products, stride);
        for (row, statistics) in statistics[block.rows.clone()].iter().enumerate() {
            let visible = statistics.visible.saturating_sub(block.position).min(keys);
            let weights = &mut weights[row * stride..][..stride];
            let products = &mut products[row * stride..][..stride];
            score_gradients(weights, products, visible, statistics.log_sum, statistics.product, scale);
        }
        let keys_by_row = zeroed(&mut scratch.keys, stride * padded);
        transpose_keys(key_panels, geometry, keys_by_row);
        accumulate_rows(
            Left::rows(products, stride),
            rows,
            keys,
            keys_by_row,
            padded,
            &mut scratch.query_grads[span],
        );
        accumulate_rows(Left::transposed(products, stride), keys, rows, queries, padded, key_grads);
        accumulate_rows(Left::transposed(weights, stride), keys, rows, grads, padded, value_grads);
    }
}

struct RowStatistics {
    visible: usize,
    log_sum: f32,
    product: f32,
}

/// Some rows of a tile against some consecutive keys that start at a path position.
struct Block {
    rows: Range<usize>,
    extent: Extent,
    length: usize,
    position: usize,
}

/// `out [rows, stride] = left [rows, padded] x panels`, the chain running over the head dimension.
fn multiply_panels(
    left: &[f32],
    padded: usize,
    rows: usize,
    geometry: Geometry,
    panels: &[f32],
    out: &mut [f32],
    stride: usize,
) {
    let operands = Operands {
        left: Left::rows(left, padded),
        inner: geometry.head_dim,
        right: panels,
        right_stride: LANES,
        panel_stride: geometry.key_page(),
        next: &[],
    };
    tiles(&operands, rows, stride / PAGE, out, stride, false);
}

/// `out [rows, padded] += left [rows, inner] x right [inner, padded]`.
fn accumulate_rows(left: Left, rows: usize, inner: usize, right: &[f32], padded: usize, out: &mut [f32]) {
    let operands = Operands { left, inner, right, right_stride: padded, panel_stride: LANES, next: &[] };
    tiles(&operands, rows, padded / LANES, out, padded, true);
}

/// Pages `[16, padded]` of values to panels `[head_dim, 16]`.
fn transpose_values(rows: &[f32], geometry: Geometry, panels: &mut [f32]) {
    let padded = geometry.padded();
    for (page, panel) in panels.chunks_exact_mut(geometry.key_page()).enumerate() {
        let page = &rows[page * geometry.value_page()..][..geometry.value_page()];
        for (key, row) in page.chunks_exact(padded).enumerate() {
            for (element, value) in row[..geometry.head_dim].iter().enumerate() {
                panel[element * LANES + key] = *value;
            }
        }
    }
}

/// Panels `[head_dim, 16]` of keys to rows `[16, padded]`.
fn transpose_keys(panels: &[f32], geometry: Geometry, rows: &mut [f32]) {
    let padded = geometry.padded();
    for (page, rows) in rows.chunks_exact_mut(geometry.value_page()).enumerate() {
        let panel = &panels[page * geometry.key_page()..][..geometry.key_page()];
        for (element, lanes) in panel.chunks_exact(LANES).enumerate() {
            for (key, value) in lanes.iter().enumerate() {
                rows[key * padded + element] = *value;
            }
        }
    }
}

multiversion! {
    /// In place: scores to probabilities p = `e^(scale * s - log_sum)`, and products dp to the
    /// gradients of the unscaled scores p * (dp - product) * scale; zero past `visible`.
    fn score_gradients(
        scores: &mut [f32],
        products: &mut [f32],
        visible: usize,
        log_sum: f32,
        product: f32,
        scale: f32,
    ) {
        for (score, grad) in scores[..visible].iter_mut().zip(&mut products[..visible]) {
            let p = exp(score.mul_add(scale, -log_sum));
            *score = p;
            *grad = p * (*grad - product) * scale;
        }
        scores[visible..].fill(0.0);
        products[visible..].fill(0.0);
    }
}

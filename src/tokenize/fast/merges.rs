//! Byte-pair encoding of one piece: of the pairs that have a merge, the earliest merge of the list
//! is made first, and of equal ones the leftmost.
//!
//! Short pieces are scanned for the best pair again and again; long ones keep their pairs in a
//! heap over a linked list, n log n in all.

use super::cache::{ShortKey, fold};
use super::vocabulary::Vocabulary;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// The longest piece that is scanned.
const SCANNED: usize = 64;
/// Rank of a pair that does not merge.
const NEVER: u32 = u32::MAX;
/// No neighbour.
const NONE: u32 = u32::MAX;
/// Working memory beyond this many symbols is given back.
const KEPT_SYMBOLS: usize = 1 << 16;

/// The merge of a pair: when, and what it makes.
#[derive(Clone, Copy)]
struct Merge {
    rank: u32,
    id: u32,
}

const NO_MERGE: Merge = Merge { rank: NEVER, id: 0 };

/// Merges by their two ids, in an open-addressed table at most half full.
struct Pairs {
    slots: Vec<(u64, Merge)>,
    mask: usize,
}

impl Pairs {
    fn new(merges: &[[u32; 3]]) -> Self {
        let size = (2 * merges.len()).next_power_of_two().max(2);
        let mut pairs = Self { slots: vec![(0, NO_MERGE); size], mask: size - 1 };
        for (rank, &[left, right, id]) in (0..NEVER).zip(merges) {
            let slot = pairs.slot(left, right);
            // A pair that is listed twice has its last rank.
            pairs.slots[slot] = (Self::key(left, right), Merge { rank, id });
        }
        pairs
    }

    fn key(left: u32, right: u32) -> u64 {
        u64::from(left) << 32 | u64::from(right)
    }

    /// Where a pair is, or would be.
    #[inline]
    fn slot(&self, left: u32, right: u32) -> usize {
        let key = Self::key(left, right);
        let mut slot = fold([key, 0]) as usize & self.mask;
        while self.slots[slot].0 != key && self.slots[slot].1.rank != NEVER {
            slot = (slot + 1) & self.mask;
        }
        slot
    }

    #[inline]
    fn get(&self, left: u32, right: u32) -> Merge {
        self.slots[self.slot(left, right)].1
    }
}

/// Tokens that are a piece of their own, by their bytes.
struct Words {
    slots: Vec<(ShortKey, u32)>,
    mask: usize,
    long: HashMap<Box<[u8]>, u32>,
    longest: usize,
}

impl Words {
    fn new(tokens: &[&(Vec<u8>, u32)]) -> Self {
        let size = (2 * tokens.len()).next_power_of_two().max(2);
        let slots = vec![(ShortKey::default(), 0); size];
        let mut words = Self { slots, mask: size - 1, long: HashMap::new(), longest: 0 };
        for (bytes, id) in tokens {
            if let Some(key) = ShortKey::of(bytes, 0, bytes.len()) {
                let slot = words.slot(key);
                words.slots[slot] = (key, *id);
            } else {
                words.longest = words.longest.max(bytes.len());
                words.long.insert(bytes.as_slice().into(), *id);
            }
        }
        words
    }

    fn slot(&self, key: ShortKey) -> usize {
        let mut slot = key.hash() as usize & self.mask;
        while self.slots[slot].0 != key && self.slots[slot].0 != ShortKey::default() {
            slot = (slot + 1) & self.mask;
        }
        slot
    }

    fn get(&self, piece: &[u8]) -> Option<u32> {
        match ShortKey::of(piece, 0, piece.len()) {
            Some(key) => {
                let (found, id) = self.slots[self.slot(key)];
                (found == key).then_some(id)
            }
            None if piece.len() > self.longest => None,
            None => self.long.get(piece).copied(),
        }
    }
}

/// The tables of a model.
pub(super) struct Merges {
    bytes: [u32; 256],
    /// Merges of the tokens of two bytes: most lookups there are.
    first: Vec<Merge>,
    pairs: Pairs,
    words: Words,
}

impl Merges {
    /// Lays out a model; tokens that its merges give back whole are found by one lookup.
    pub(super) fn new(vocabulary: &Vocabulary) -> Self {
        let pairs = Pairs::new(&vocabulary.merges);
        let bytes = vocabulary.bytes;
        let first = bytes.iter().flat_map(|&left| bytes.iter().map(move |&right| (left, right)));
        let first = first.map(|(left, right)| pairs.get(left, right)).collect();
        let mut merges = Self { bytes, first, pairs, words: Words::new(&[]) };
        let (mut memory, mut ids) = (Memory::default(), Vec::new());
        let whole = |(bytes, id): &&(Vec<u8>, u32)| {
            ids.clear();
            merges.merge(bytes, &mut memory, &mut ids);
            vocabulary.ignore_merges || ids == [*id]
        };
        let words: Vec<_> = vocabulary.tokens.iter().filter(whole).collect();
        merges.words = Words::new(&words);
        merges
    }

    /// Appends the ids of a piece, which has fewer than 2³² bytes.
    pub(super) fn encode(&self, piece: &[u8], memory: &mut Memory, ids: &mut Vec<u32>) {
        match self.words.get(piece) {
            Some(id) => ids.push(id),
            None => self.merge(piece, memory, ids),
        }
    }

    fn merge(&self, piece: &[u8], memory: &mut Memory, ids: &mut Vec<u32>) {
        if piece.len() <= SCANNED {
            self.scan(piece, ids);
        } else {
            self.follow(piece, memory, ids);
            memory.shrink();
        }
    }

    fn first(&self, left: u8, right: u8) -> Merge {
        self.first[usize::from(left) << 8 | usize::from(right)]
    }

    /// Quadratic, in place and in registers.
    fn scan(&self, piece: &[u8], ids: &mut Vec<u32>) {
        let mut symbols = [0; SCANNED];
        // What the pair of a symbol and its successor merges to.
        let (mut ranks, mut made) = ([NEVER; SCANNED], [0; SCANNED]);
        for (symbol, &byte) in symbols.iter_mut().zip(piece) {
            *symbol = self.bytes[usize::from(byte)];
        }
        for (place, pair) in piece.windows(2).enumerate() {
            let merge = self.first(pair[0], pair[1]);
            (ranks[place], made[place]) = (merge.rank, merge.id);
        }
        let mut length = piece.len();
        while let Some(place) = leftmost_least(&ranks[..length]) {
            symbols[place] = made[place];
            symbols.copy_within(place + 2..length, place + 1);
            ranks.copy_within(place + 1..length, place);
            made.copy_within(place + 1..length, place);
            length -= 1;
            if place + 1 < length {
                let merge = self.pairs.get(symbols[place], symbols[place + 1]);
                (ranks[place], made[place]) = (merge.rank, merge.id);
            }
            if place > 0 {
                let merge = self.pairs.get(symbols[place - 1], symbols[place]);
                (ranks[place - 1], made[place - 1]) = (merge.rank, merge.id);
            }
        }
        ids.extend_from_slice(&symbols[..length]);
    }

    /// With a heap of `rank << 32 | place`, whose entries are stale once the rank at their place is
    /// another one.
    fn follow(&self, piece: &[u8], memory: &mut Memory, ids: &mut Vec<u32>) {
        memory.link(piece, self);
        while let Some(Reverse(entry)) = memory.heap.pop() {
            let (rank, place) = ((entry >> 32) as u32, entry as u32);
            if memory.nodes[place as usize].merge.rank == rank {
                memory.unite(place, self);
            }
        }
        let mut place = 0;
        while let Some(node) = memory.nodes.get(place as usize) {
            ids.push(node.symbol);
            place = node.next;
        }
    }
}

/// The first of the least ranks, if it is one of a merge.
#[inline]
fn leftmost_least(ranks: &[u32]) -> Option<usize> {
    let least = ranks.iter().fold(NEVER, |least, &rank| least.min(rank));
    if least == NEVER { None } else { ranks.iter().position(|&rank| rank == least) }
}

/// A symbol of a long piece.
#[derive(Clone, Copy)]
struct Node {
    symbol: u32,
    previous: u32,
    next: u32,
    /// What it merges to with its successor.
    merge: Merge,
}

/// Working memory of long pieces.
#[derive(Default)]
pub(super) struct Memory {
    nodes: Vec<Node>,
    heap: BinaryHeap<Reverse<u64>>,
}

impl Memory {
    fn link(&mut self, piece: &[u8], merges: &Merges) {
        self.nodes.clear();
        let mut entries = std::mem::take(&mut self.heap).into_vec();
        entries.clear();
        for (place, &byte) in (0..NONE).zip(piece) {
            let next = piece.get(place as usize + 1);
            let merge = next.map_or(NO_MERGE, |&next| merges.first(byte, next));
            self.nodes.push(Node {
                symbol: merges.bytes[usize::from(byte)],
                previous: place.wrapping_sub(1),
                next: if next.is_some() { place + 1 } else { NONE },
                merge,
            });
            if merge.rank != NEVER {
                entries.push(Reverse(u64::from(merge.rank) << 32 | u64::from(place)));
            }
        }
        self.heap = BinaryHeap::from(entries);
    }

    /// Merges a symbol and its successor.
    fn unite(&mut self, place: u32, merges: &Merges) {
        let node = self.nodes[place as usize];
        let eaten = self.nodes[node.next as usize];
        self.nodes[node.next as usize].merge = NO_MERGE;
        self.nodes[place as usize].symbol = node.merge.id;
        self.nodes[place as usize].next = eaten.next;
        if let Some(next) = self.nodes.get_mut(eaten.next as usize) {
            next.previous = place;
        }
        self.pair(place, merges);
        if node.previous != NONE {
            self.pair(node.previous, merges);
        }
    }

    /// Looks up what a symbol and its successor merge to.
    fn pair(&mut self, place: u32, merges: &Merges) {
        let node = self.nodes[place as usize];
        let next = self.nodes.get(node.next as usize);
        let merge = next.map_or(NO_MERGE, |next| merges.pairs.get(node.symbol, next.symbol));
        self.nodes[place as usize].merge = merge;
        if merge.rank != NEVER {
            self.heap.push(Reverse(u64::from(merge.rank) << 32 | u64::from(place)));
        }
    }

    fn shrink(&mut self) {
        if self.nodes.capacity() > KEPT_SYMBOLS {
            *self = Self::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Merges over the letters a to d, in any order that a table may list them.
    fn model(seed: u64, merges: usize) -> Vocabulary {
        let mut tokens: Vec<(Vec<u8>, u32)> = (0..=255).map(|byte| (vec![byte], u32::from(byte))).collect();
        let mut state = seed;
        let mut draw = |size: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % size
        };
        let mut listed = Vec::new();
        let mut letters: Vec<usize> = (97..101).collect();
        while listed.len() < merges {
            let (left, right) = (letters[draw(letters.len())], letters[draw(letters.len())]);
            let made = [tokens[left].0.as_slice(), &tokens[right].0].concat();
            let known = tokens.iter().position(|(bytes, _)| *bytes == made);
            let id = known.unwrap_or_else(|| {
                tokens.push((made, tokens.len() as u32));
                letters.push(tokens.len() - 1);
                tokens.len() - 1
            });
            listed.insert(draw(listed.len() + 1), [left as u32, right as u32, id as u32]);
        }
        let bytes = std::array::from_fn(|byte| byte as u32);
        Vocabulary { tokens, bytes, merges: listed, ignore_merges: false }
    }

    /// The definition: look for the earliest merge, make its leftmost occurrence.
    fn by_definition(model: &Vocabulary, piece: &[u8]) -> Vec<u32> {
        let mut ids: Vec<u32> = piece.iter().map(|&byte| u32::from(byte)).collect();
        let rank = |pair: &[u32]| model.merges.iter().rposition(|merge| merge[..2] == *pair);
        while let Some((rank, place)) =
            ids.windows(2).enumerate().filter_map(|(place, pair)| Some((rank(pair)?, place))).min()
        {
            ids.splice(place..place + 2, [model.merges[rank][2]]);
        }
        ids
    }

    #[test]
    fn scanning_and_following_merge_as_the_definition_says() {
        for seed in 0..60 {
            let model = model(seed, 30);
            let merges = Merges::new(&model);
            let mut state = seed + 1;
            for length in (1..80).chain([200, 300]) {
                let piece: Vec<u8> = (0..length)
                    .map(|_| {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(7);
                        b"aaabbcd"[(state >> 40) as usize % 7]
                    })
                    .collect();
                let expected = by_definition(&model, &piece);
                let (mut memory, mut ids) = (Memory::default(), Vec::new());
                merges.follow(&piece, &mut memory, &mut ids);
                assert_eq!(ids, expected, "seed {seed}, length {length}");
                ids.clear();
                merges.encode(&piece, &mut memory, &mut ids);
                assert_eq!(ids, expected, "seed {seed}, length {length}");
            }
        }
    }
}

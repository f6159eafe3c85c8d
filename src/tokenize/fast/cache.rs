//! Pieces seen before and their ids, in a fixed amount of memory.
//!
//! Each piece has one place, by its hash, where the last stays that came there; of short pieces the
//! last two, in one cache line. What is remembered changes how long encoding takes, never its result.

/// The longest piece that is its own key.
const SHORT: usize = 15;
/// Ids that a short piece may have.
const SHORT_IDS: usize = 3;
/// Binary logarithm of the number of pairs of short pieces: a megabyte.
const SHORT_BITS: u32 = 14;
/// The longest piece that is remembered.
const LONG: usize = 46;
/// Ids that a long piece may have.
const LONG_IDS: usize = 12;
/// Binary logarithm of the number of long pieces.
const LONG_BITS: u32 = 11;

/// Mixes 128 bits into 64.
#[inline]
pub(super) fn fold(words: [u64; 2]) -> u64 {
    // The fractions of pi, which have no pattern.
    let product = u128::from(words[0] ^ 0x243F_6A88_85A3_08D3) * u128::from(words[1] ^ 0x1319_8A2E_0370_7345);
    (product >> 64) as u64 ^ product as u64
}

/// A piece of 1 to [`SHORT`] bytes, its length in the highest byte; zero is no piece.
#[derive(Clone, Copy, Default, Eq, PartialEq)]
pub(super) struct ShortKey([u64; 2]);

impl ShortKey {
    /// The key of `text[start..end]`, if it is short.
    #[inline]
    pub(super) fn of(text: &[u8], start: usize, end: usize) -> Option<Self> {
        let length = end - start;
        if length > SHORT {
            return None;
        }
        let sixteen = match text.get(start..).and_then(<[u8]>::first_chunk::<16>) {
            Some(sixteen) => u128::from_le_bytes(*sixteen),
            None => u128::from_le_bytes(padded(&text[start..end])),
        };
        let key = sixteen & ((1 << (8 * length)) - 1) | (length as u128) << 120;
        Some(Self([key as u64, (key >> 64) as u64]))
    }

    #[inline]
    pub(super) fn hash(self) -> u64 {
        fold(self.0)
    }
}

/// The bytes of a short piece at the end of a text.
fn padded(piece: &[u8]) -> [u8; 16] {
    let mut sixteen = [0; 16];
    sixteen[..piece.len()].copy_from_slice(piece);
    sixteen
}

#[derive(Clone, Copy, Default)]
struct ShortEntry {
    key: ShortKey,
    ids: [u32; SHORT_IDS],
    count: u32,
}

#[derive(Clone, Copy)]
struct LongEntry {
    length: u8,
    count: u8,
    bytes: [u8; LONG],
    ids: [u32; LONG_IDS],
}

/// What one thread remembers.
pub(super) struct Cache {
    short: Vec<[ShortEntry; 2]>,
    long: Vec<LongEntry>,
}

impl Cache {
    pub(super) fn new() -> Self {
        let none = LongEntry { length: 0, count: 0, bytes: [0; LONG], ids: [0; LONG_IDS] };
        Self { short: vec![<[ShortEntry; 2]>::default(); 1 << SHORT_BITS], long: vec![none; 1 << LONG_BITS] }
    }

    /// Ids of a short piece.
    #[inline]
    pub(super) fn short(&self, key: ShortKey) -> Option<&[u32]> {
        let [recent, older] = &self.short[(key.hash() >> (64 - SHORT_BITS)) as usize];
        let entry = if recent.key == key { recent } else { older };
        if entry.key == key { entry.ids.get(..entry.count as usize) } else { None }
    }

    /// Remembers a short piece, unless its ids are too many.
    pub(super) fn keep_short(&mut self, key: ShortKey, ids: &[u32]) {
        let mut entry = ShortEntry { key, ids: [0; SHORT_IDS], count: ids.len() as u32 };
        if let Some(kept) = entry.ids.get_mut(..ids.len()) {
            kept.copy_from_slice(ids);
            let pair = &mut self.short[(key.hash() >> (64 - SHORT_BITS)) as usize];
            *pair = [entry, pair[0]];
        }
    }

    /// Ids of a long piece.
    pub(super) fn long(&self, piece: &[u8]) -> Option<&[u32]> {
        let entry = &self.long[long_slot(piece)?];
        let kept = entry.bytes.get(..usize::from(entry.length))?;
        if kept == piece { entry.ids.get(..usize::from(entry.count)) } else { None }
    }

    /// Remembers a long piece, unless it or its ids are too long.
    pub(super) fn keep_long(&mut self, piece: &[u8], ids: &[u32]) {
        let Some(slot) = long_slot(piece).filter(|_| ids.len() <= LONG_IDS) else { return };
        let entry = &mut self.long[slot];
        (entry.length, entry.count) = (piece.len() as u8, ids.len() as u8);
        entry.bytes[..piece.len()].copy_from_slice(piece);
        entry.ids[..ids.len()].copy_from_slice(ids);
    }
}

/// Place of a piece that is neither short nor too long.
fn long_slot(piece: &[u8]) -> Option<usize> {
    if piece.len() > LONG {
        return None;
    }
    let last = piece.last_chunk::<16>()?;
    let mixed = |hash: u64, sixteen: &[u8; 16]| {
        let sixteen = u128::from_le_bytes(*sixteen);
        fold([hash ^ sixteen as u64, (sixteen >> 64) as u64])
    };
    let (whole, _) = piece.as_chunks::<16>();
    let hash = mixed(whole.iter().fold(piece.len() as u64, mixed), last);
    Some((hash >> (64 - LONG_BITS)) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_differ_when_pieces_do() {
        let text = b"aaaa\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        let keys: Vec<_> = (1..=SHORT).map(|end| ShortKey::of(text, 0, end).unwrap()).collect();
        for (index, key) in keys.iter().enumerate() {
            assert!(keys[..index].iter().all(|other| other != key) && *key != ShortKey::default());
            // The same piece at the end of another text.
            assert!(ShortKey::of(&text[..=index], 0, index + 1) == Some(*key));
        }
        assert!(ShortKey::of(text, 0, SHORT + 1).is_none());
    }

    #[test]
    fn what_is_kept_is_found_until_another_takes_its_place() {
        let mut cache = Cache::new();
        let pieces: Vec<Vec<u8>> =
            (0..100_000_u32).map(|number| number.to_le_bytes().repeat(1 + number as usize % 14)).collect();
        for piece in &pieces {
            let ids = [piece[0].into(), piece.len() as u32, 7];
            if let Some(key) = ShortKey::of(piece, 0, piece.len()) {
                cache.keep_short(key, &ids);
                assert_eq!(cache.short(key), Some(ids.as_slice()));
            } else {
                cache.keep_long(piece, &ids);
                assert_eq!(cache.long(piece), (piece.len() <= LONG).then_some(ids.as_slice()));
            }
        }
        for piece in &pieces {
            let found = match ShortKey::of(piece, 0, piece.len()) {
                Some(key) => cache.short(key),
                None => cache.long(piece),
            };
            assert!(found.is_none_or(|ids| ids == [piece[0].into(), piece.len() as u32, 7]));
        }
    }

    #[test]
    fn what_is_too_long_is_not_kept() {
        let mut cache = Cache::new();
        let key = ShortKey::of(b"abcd", 0, 4).unwrap();
        cache.keep_short(key, &[1, 2, 3, 4]);
        cache.keep_long(&[7; 20], &[0; LONG_IDS + 1]);
        assert!(cache.short(key).is_none() && cache.long(&[7; 20]).is_none());
    }
}

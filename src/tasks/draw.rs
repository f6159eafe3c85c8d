//! Counter-based random numbers: every number is a pure function of its key.

use crate::random::{GOLDEN, mix};

/// 64 pseudo-random bits for a key of several words.
pub(super) fn bits(key: &[u64]) -> u64 {
    key.iter().fold(0, |state, &word| mix(state ^ mix(word.wrapping_add(GOLDEN))))
}

/// All words of a key but the last: what many draws have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draws(u64);

impl Draws {
    pub(super) fn new(key: &[u64]) -> Self {
        Self(bits(key))
    }

    /// [`bits`] of the key with its last word.
    pub(super) fn bits(self, word: u64) -> u64 {
        mix(self.0 ^ mix(word.wrapping_add(GOLDEN)))
    }

    /// A uniform number in [0, 1).
    pub(super) fn uniform(self, word: u64) -> f64 {
        (self.bits(word) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// A name as a word of a key.
pub(super) fn word_of(name: &str) -> u64 {
    let hash = blake3::hash(name.as_bytes());
    let mut word = [0; 8];
    word.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(word)
}

/// A pseudo-random permutation of `0..size` in constant memory.
///
/// A Feistel network permutes the next power of four (Luby and Rackoff, 1988); numbers that fall
/// outside of the range are permuted again until they fall inside (cycle walking, Black and
/// Rogaway, 2002), at most four times on average.
#[derive(Clone, Copy, Debug)]
pub(super) struct Permutation {
    size: u64,
    half_bits: u32,
    key: u64,
}

const ROUNDS: u64 = 6;

impl Permutation {
    pub(super) fn new(size: u64, key: &[u64]) -> Self {
        let width = u64::BITS - size.saturating_sub(1).leading_zeros();
        Self { size, half_bits: width.div_ceil(2).max(1), key: bits(key) }
    }

    /// Where `index`, which must be below the size, goes.
    pub(super) fn at(&self, index: u64) -> u64 {
        debug_assert!(index < self.size);
        let mut image = self.network(index);
        while image >= self.size {
            image = self.network(image);
        }
        image
    }

    fn network(&self, value: u64) -> u64 {
        let mask = (1_u64 << self.half_bits) - 1;
        let (mut left, mut right) = (value >> self.half_bits, value & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ (bits(&[self.key, round, right]) & mask));
        }
        left << self.half_bits | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permutes_every_size() {
        for size in (1..=300).chain([1023, 1024, 1025, 4096, 10_007]) {
            for key in 0..3 {
                let permutation = Permutation::new(size, &[key]);
                let mut image: Vec<u64> = (0..size).map(|index| permutation.at(index)).collect();
                image.sort_unstable();
                assert!(image.into_iter().eq(0..size), "size {size}");
            }
        }
        assert!(Permutation::new(u64::MAX, &[1]).at(u64::MAX - 1) < u64::MAX);
    }

    #[test]
    fn keys_give_different_and_spread_out_orders() {
        let order = |key| (0..1000).map(move |index| Permutation::new(1000, &[key]).at(index));
        assert!(order(1).ne(order(2)));
        assert!(order(1).eq(order(1)));
        // The mean distance between neighbours of a random permutation is a third of its size.
        let images: Vec<u64> = order(1).collect();
        let distance: u64 = images.windows(2).map(|pair| pair[0].abs_diff(pair[1])).sum();
        assert!((300_000..367_000).contains(&distance), "{distance}");
    }

    #[test]
    fn uniform_numbers_are_uniform() {
        let mut bins = [0_u32; 10];
        for counter in 0..10_000 {
            bins[(Draws::new(&[7]).uniform(counter) * 10.0) as usize] += 1;
            assert_eq!(Draws::new(&[7, 8]).bits(counter), bits(&[7, 8, counter]));
        }
        assert!(bins.iter().all(|&count| (900..1100).contains(&count)), "{bins:?}");
    }
}

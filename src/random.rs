//! Counter-based random numbers: a value is a pure function of its key, never of a state that
//! some order of calls would advance.

/// A stream of random numbers named by a key; value `n` of it is a function of (key, n) alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream {
    key: u64,
}

impl Stream {
    /// The stream of a seed and a purpose.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let name = purpose.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        Self { key: mix(mix(seed) ^ name) }
    }

    /// The stream of one item within this one.
    #[must_use]
    pub fn child(self, item: u64) -> Self {
        Self { key: mix(self.key ^ mix(item.wrapping_add(GOLDEN))) }
    }

    /// What names the stream, for numbers that are drawn elsewhere.
    #[cfg(feature = "cuda")]
    pub(crate) fn key(self) -> u64 {
        self.key
    }

    /// Sixty-four random bits.
    pub fn bits(self, n: u64) -> u64 {
        mix(self.key.wrapping_add(n.wrapping_mul(GOLDEN)))
    }

    /// Uniform in [0, 1).
    pub fn uniform(self, n: u64) -> f64 {
        (self.bits(n) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Uniform in `0..bound` (`bound` > 0), with a bias below 2^-40 for bounds below 2^24.
    pub fn below(self, n: u64, bound: u64) -> u64 {
        ((u128::from(self.bits(n)) * u128::from(bound)) >> 64) as u64
    }

    /// Standard normal (Box and Muller).
    pub fn normal(self, n: u64) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform(2 * n)).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform(2 * n + 1)).cos()
    }

    /// A uniformly drawn order of `0..length` (Fisher and Yates).
    pub fn order(self, length: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..length).collect();
        for at in (1..length).rev() {
            order.swap(at, self.below(at as u64, at as u64 + 1) as usize);
        }
        order
    }
}

/// Increment of `SplitMix64`: the odd integer nearest to 2^64 over the golden ratio.
pub(crate) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The finaliser of `SplitMix64` (Steele, Lea and Flood, OOPSLA 2014).
pub(crate) fn finalise(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// One step of `SplitMix64` from a state.
pub(crate) fn mix(value: u64) -> u64 {
    finalise(value.wrapping_add(GOLDEN))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_depend_on_their_key_alone_and_look_uniform() {
        let stream = Stream::new(7, "test").child(3);
        assert_eq!(stream.bits(5), Stream::new(7, "test").child(3).bits(5));
        assert_ne!(stream.bits(5), Stream::new(7, "other").child(3).bits(5));
        let mean = (0..10_000).map(|n| stream.uniform(n)).sum::<f64>() / 1e4;
        assert!((mean - 0.5).abs() < 0.02, "{mean}");
        let (sum, squares) = (0..10_000).fold((0.0, 0.0), |(s, q), n| {
            let x = stream.normal(n);
            (s + x, q + x * x)
        });
        assert!((sum / 1e4).abs() < 0.05 && (squares / 1e4 - 1.0).abs() < 0.05);
    }

    #[test]
    fn an_order_is_a_permutation() {
        let mut order = Stream::new(1, "order").order(100);
        assert_ne!(order, (0..100).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..100).collect::<Vec<_>>());
    }
}

//! Keys under which documents with nearly the same words meet.

use crate::config::Deduplication;
use crate::corpus::words::each_run;
use crate::random::{finalise, mix};

/// Calls `take` with the key of every band of a text's signature; never, if it has no word.
///
/// A signature is the least hash in each of bands x rows bins that the runs of words are dealt into
/// (one-permutation hashing, Li, Owen and Zhang, NIPS 2012). A bin that stayed empty takes the least of
/// another that is drawn by its number (optimal densification, Shrivastava, ICML 2017), so two texts agree
/// in each bin with the probability of their Jaccard similarity, and each run is hashed once.
pub(super) fn each_band(text: &str, settings: &Deduplication, mut take: impl FnMut(u128)) {
    let Some(signature) = signature(text, settings) else { return };
    for (number, band) in signature.chunks(settings.rows).enumerate() {
        take(key(number as u64, band));
    }
}

const EMPTY: u64 = u64::MAX;

fn signature(text: &str, settings: &Deduplication) -> Option<Vec<u64>> {
    let mut least = vec![EMPTY; settings.bands * settings.rows];
    let bins = least.len() as u128;
    let mut add = |run: u64| {
        let bin = ((u128::from(run) * bins) >> 64) as usize;
        least[bin] = least[bin].min(finalise(run) >> 1);
    };
    let words = each_run(text, settings.shingle_words, &mut add);
    if words < settings.shingle_words {
        // A text that is shorter than a run is one run.
        each_run(text, words.max(1), &mut add);
    }
    (words > 0).then(|| densify(&least))
}

/// Fills empty bins. At least one is not empty.
fn densify(least: &[u64]) -> Vec<u64> {
    let bins = least.len() as u128;
    let other = |bin: u64, attempt: u64| {
        let drawn = mix(bin ^ mix(attempt));
        least[((u128::from(drawn) * bins) >> 64) as usize]
    };
    let fill = |(bin, &value): (usize, &u64)| {
        let mut drawn = (1..).map(|attempt| other(bin as u64, attempt));
        if value == EMPTY { drawn.find(|value| *value != EMPTY).unwrap_or(EMPTY) } else { value }
    };
    least.iter().enumerate().map(fill).collect()
}

/// 128 bits of a band's number and minima.
fn key(number: u64, band: &[u64]) -> u128 {
    let half = |seed: u64| band.iter().fold(mix(number ^ seed), |hash, &value| mix(hash ^ value));
    (u128::from(half(0x5bd1_e995)) << 64) | u128::from(half(0x1b87_3593))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Stream;
    use std::collections::BTreeSet;

    fn text(words: impl Iterator<Item = u64>) -> String {
        words.map(|word| format!("w{word}")).collect::<Vec<_>>().join(" ")
    }

    fn bands(text: &str, settings: &Deduplication) -> BTreeSet<u128> {
        let mut bands = BTreeSet::new();
        each_band(text, settings, |key| bands.extend([key]));
        bands
    }

    /// Single words make the similarity of two texts a matter of counting.
    const SETTINGS: Deduplication =
        Deduplication { exact: false, near: true, shingle_words: 1, bands: 14, rows: 8 };

    #[test]
    fn bins_agree_with_the_probability_of_the_jaccard_similarity() {
        for (shared, own) in [(90, 5), (40, 30), (600, 100), (10, 10), (1000, 1000)] {
            let jaccard = f64::from(shared) / f64::from(shared + 2 * own);
            let mut agreeing = 0.0;
            let trials = 300;
            for trial in 0..trials {
                let stream = Stream::new(trial, "minhash");
                let words = |from: i32, count: i32| (from..from + count).map(|n| stream.bits(n as u64));
                let a = text(words(0, shared).chain(words(10_000, own)));
                let b = text(words(0, shared).chain(words(20_000, own)));
                let (a, b) = (signature(&a, &SETTINGS).unwrap(), signature(&b, &SETTINGS).unwrap());
                agreeing += a.iter().zip(&b).filter(|(a, b)| a == b).count() as f64 / a.len() as f64;
            }
            let found = agreeing / f64::from(trials as u32);
            assert!((found - jaccard).abs() < 0.02, "{found} for {jaccard}");
        }
    }

    #[test]
    fn bands_find_similar_texts_and_leave_others() {
        let found = |shared: u64, own: u64| {
            let near = |trial: u64| {
                let stream = Stream::new(trial, "bands");
                let words = |from: u64, count: u64| (from..from + count).map(|n| stream.bits(n));
                let a = text(words(0, shared).chain(words(10_000, own)));
                let b = text(words(0, shared).chain(words(20_000, own)));
                !bands(&a, &SETTINGS).is_disjoint(&bands(&b, &SETTINGS))
            };
            (0..200).filter(|&trial| near(trial)).count()
        };
        // Similarities of 0.9, 0.72 and 0.33: expected in 100, 65 and 0 of a hundred.
        assert!(found(180, 10) >= 198, "{}", found(180, 10));
        assert!((100..160).contains(&found(144, 28)), "{}", found(144, 28));
        assert!(found(100, 100) <= 3, "{}", found(100, 100));
    }

    #[test]
    fn short_texts_have_keys_and_empty_ones_have_none() {
        let settings = Deduplication { near: true, ..Deduplication::default() };
        assert_eq!(bands("two words", &settings), bands("Two, words!", &settings));
        assert_ne!(bands("two words", &settings), bands("three words", &settings));
        assert!(bands("...", &settings).is_empty());
    }
}

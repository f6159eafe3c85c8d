//! Confidence intervals by resampling documents (positions of one document are not independent).

use crate::random::Stream;
use std::collections::BTreeMap;

/// Accuracy and its 95 % percentile interval (Efron 1979) from `(document, right)` pairs.
///
/// Documents are drawn with replacement `resamples` times, from a stream of the seed.
pub fn interval(answers: &[(u64, bool)], resamples: usize, seed: u64) -> (f64, [f64; 2]) {
    let mut documents: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for (document, right) in answers {
        let counts = documents.entry(*document).or_default();
        counts.0 += u64::from(*right);
        counts.1 += 1;
    }
    let documents: Vec<(u64, u64)> = documents.into_values().collect();
    let share = |right: u64, all: u64| if all == 0 { 0.0 } else { right as f64 / all as f64 };
    let mean = share(documents.iter().map(|d| d.0).sum(), documents.iter().map(|d| d.1).sum());
    if documents.is_empty() || resamples == 0 {
        return (mean, [mean, mean]);
    }
    let stream = Stream::new(seed, "bootstrap");
    let mut means: Vec<f64> = (0..resamples)
        .map(|resample| {
            let draw = stream.child(resample as u64);
            let (right, all) = (0..documents.len()).fold((0, 0), |(right, all), n| {
                let (r, a) = documents[draw.below(n as u64, documents.len() as u64) as usize];
                (right + r, all + a)
            });
            share(right, all)
        })
        .collect();
    means.sort_by(f64::total_cmp);
    let at = |quantile: f64| means[((means.len() - 1) as f64 * quantile).round() as usize];
    (mean, [at(0.025), at(0.975)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_matches_the_binomial_one_for_independent_positions() {
        let answers: Vec<(u64, bool)> = (0..400).map(|at| (at, at % 4 == 0)).collect();
        let (mean, [low, high]) = interval(&answers, 2000, 1);
        assert_eq!(mean, 0.25);
        let expected = 1.96 * (0.25_f64 * 0.75 / 400.0).sqrt();
        assert!((mean - low - expected).abs() < 0.008 && (high - mean - expected).abs() < 0.008);
    }

    #[test]
    fn positions_of_one_document_count_together() {
        let clustered: Vec<(u64, bool)> = (0..400).map(|at| (at / 40, at / 40 % 2 == 0)).collect();
        let (_, [low, high]) = interval(&clustered, 2000, 1);
        assert!(high - low > 0.4, "{low} {high}");
        assert_eq!(interval(&[], 100, 1), (0.0, [0.0, 0.0]));
    }
}

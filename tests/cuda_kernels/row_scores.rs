//! `row_scores.cu` against `tasks::score_row`.

use crate::cuda_emulator;
use crate::support::values;
use rpt::cuda::{Indices, Slice, row_scores};
use rpt::tasks::score_row;

fn check(logits: &[f32], vocabulary: usize, top_k: usize) {
    let device = cuda_emulator::device();
    let rows = logits.len() / vocabulary;
    let truths: Vec<u32> = (0..rows).map(|row| (row * 37 % vocabulary) as u32).collect();
    let (on_device, indices) =
        (device.upload("logits", logits).unwrap(), Indices::upload(&device, "truths", &truths).unwrap());
    let found =
        row_scores::score(&device, Slice::from(&on_device), vocabulary, indices.view(), top_k).unwrap();
    let (entropies, tops) = (found.entropies.download().unwrap(), found.tops.download().unwrap());
    let probabilities = found.target_probabilities.download().unwrap();
    for (row, logits) in logits.chunks_exact(vocabulary).enumerate() {
        let expected = score_row(logits, truths[row], top_k);
        assert_eq!(tops[row], expected.proxy_top, "row {row} of {vocabulary}, {top_k}");
        let pairs = [(entropies[row], expected.entropy), (probabilities[row], expected.truth_probability)];
        for (found, expected) in pairs {
            let near = (found - expected).abs() < 1e-5 || found.is_nan() && expected.is_nan();
            assert!(near, "row {row} of {vocabulary}, {top_k}: {found} is not {expected}");
        }
    }
}

#[test]
fn scores_are_those_of_the_cpu() {
    for (vocabulary, top_k) in [(1, 1), (3, 16), (255, 64), (1000, 16), (4099, 1), (4099, 64)] {
        let logits: Vec<f32> =
            values(vocabulary as u64, 3 * vocabulary).iter().map(|value| value * 5.0).collect();
        check(&logits, vocabulary, top_k);
    }
}

#[test]
fn equal_infinite_and_missing_logits_are_told_apart() {
    let infinite = f32::NEG_INFINITY;
    check(&[2.0; 600], 300, 16);
    check(&[1.0, 7.0, 7.0, -0.0, 0.0, 0.0], 3, 2);
    check(&[5.0, infinite, infinite, infinite, infinite, infinite, 1.0, infinite], 4, 2);
    check(&[1.0, f32::NAN, 2.0, 4.0, 2.0, f32::INFINITY], 3, 2);
}

#[test]
fn what_does_not_fit_is_refused() {
    let device = cuda_emulator::device();
    let logits = device.upload("logits", &[0.0_f32; 20]).unwrap();
    let score = |truths: &[u32], vocabulary: usize, top_k: usize| {
        let truths = Indices::upload(&device, "truths", truths).unwrap();
        row_scores::score(&device, Slice::from(&logits), vocabulary, truths.view(), top_k).map(|_| ())
    };
    assert!(score(&[9, 0], 10, 2).is_ok());
    assert!(score(&[10, 0], 10, 2).is_err());
    assert!(score(&[0, 0, 0], 10, 2).is_err());
    assert!(score(&[0], 10, 0).is_err());
    assert!(score(&[0], 10, 65).is_err());
}

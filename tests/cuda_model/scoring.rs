//! Positions of texts, scored by a model on the device.

use crate::support::{VOCABULARY, decoder, settings};
use rpt::eval::ModelProxy;
use rpt::model::Dtype;
use rpt::random::Stream;
use rpt::tasks::Proxy;

fn pieces() -> Vec<Vec<u32>> {
    let stream = Stream::new(3, "pieces");
    let piece = |(number, length): (u64, u64)| {
        (0..length).map(|at| stream.below(1000 * number + at, VOCABULARY as u64) as u32).collect()
    };
    (0..).zip([17, 1, 0, 66, 5]).map(piece).collect()
}

#[test]
fn scores_of_positions_are_those_of_the_cpu() {
    for (dtype, tolerance) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 3e-2)] {
        let here = decoder(1, dtype);
        let there = decoder(1, dtype).on(Some(&settings()));
        let expected = ModelProxy(&here).score(&pieces(), 16).unwrap();
        let found = ModelProxy(&there).score(&pieces(), 16).unwrap();
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [17, 1, 0, 66, 5]);
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            assert!((found.entropy - expected.entropy).abs() < tolerance, "{found:?} {expected:?}");
            let apart = (found.truth_probability - expected.truth_probability).abs();
            assert!(apart < tolerance, "{found:?} {expected:?}");
            if dtype == Dtype::F32 {
                assert_eq!(found.proxy_top, expected.proxy_top);
            }
        }
        let error = ModelProxy(&there).score(&[vec![VOCABULARY as u32]], 16).unwrap_err();
        assert!(error.to_string().contains("outside the model's vocabulary"), "{error}");
    }
}

#[test]
fn a_sequence_is_scored_as_on_the_cpu() {
    let ids = pieces().remove(3);
    let here = decoder(0, Dtype::F32);
    let there = decoder(0, Dtype::F32).on(Some(&settings()));
    let (expected, found) = (here.score_sequence(&ids).unwrap(), there.score_sequence(&ids).unwrap());
    assert_eq!(found.len(), ids.len());
    for (found, expected) in found.iter().zip(&expected) {
        assert!((found.logprob - expected.logprob).abs() < 1e-4, "{found:?} {expected:?}");
        assert!((found.entropy - expected.entropy).abs() < 1e-4, "{found:?} {expected:?}");
    }
    assert!(there.score_sequence(&[]).unwrap().is_empty());
}

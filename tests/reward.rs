//! The reward against an independent reading of equation 3, on arbitrary bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use rpt::config::{AnswerFormat, RewardConfig};
use rpt::reward::{Outcome, Truth, Verifier};

const DELIMITER: &[u8] = b"</think>";

fn verifier(answer: AnswerFormat) -> Verifier {
    Verifier::new(&RewardConfig { answer, ..RewardConfig::default() })
}

/// A continuation as its tokens' bytes.
#[derive(Clone, Debug)]
struct Continuation {
    tokens: Vec<Vec<u8>>,
    ends_document: bool,
}

impl Continuation {
    fn bytes(&self) -> Vec<u8> {
        self.tokens.concat()
    }

    fn boundaries(&self) -> Vec<u32> {
        (1..=self.tokens.len()).map(|count| self.tokens[..count].concat().len() as u32).collect()
    }

    fn score(&self, answer: AnswerFormat, reply: &[u8], finished: bool) -> rpt::reward::Score {
        let (bytes, boundaries) = (self.bytes(), self.boundaries());
        let truth = Truth { bytes: &bytes, boundaries: &boundaries, ends_document: self.ends_document };
        verifier(answer).score(reply, finished, &truth)
    }
}

/// The prediction of a reply, by trying every split of the reply instead of scanning it.
fn naive_prediction(answer: AnswerFormat, reply: &[u8]) -> Option<Vec<u8>> {
    let after = (0..=reply.len()).find_map(|at| reply[at..].strip_prefix(DELIMITER))?;
    if answer == AnswerFormat::Rest {
        return Some(after.to_vec());
    }
    let opened = (0..after.len()).rev().find_map(|at| after[at..].strip_prefix(b"\\boxed{"))?;
    let count = |bytes: &[u8], brace: u8| bytes.split(|&byte| byte == brace).count() - 1;
    let end = (0..opened.len())
        .find(|&end| opened[end] == b'}' && count(&opened[..end], b'{') == count(&opened[..end], b'}'))?;
    Some(opened[..end].to_vec())
}

/// Equation 3, term by term, with the outcomes that it leaves out.
fn naive_outcome(answer: AnswerFormat, reply: &[u8], finished: bool, truth: &Continuation) -> Outcome {
    let prediction = match naive_prediction(answer, reply) {
        Some(_) if answer == AnswerFormat::Rest && !finished => return Outcome::Unfinished,
        Some(prediction) if prediction.is_empty() => return Outcome::NoAnswer,
        Some(prediction) => prediction,
        None if finished => return Outcome::NoAnswer,
        None => return Outcome::Unfinished,
    };
    let all = truth.bytes();
    let agreeing = prediction.iter().zip(&all).take_while(|(left, right)| left == right).count();
    let at_boundary = (1..=truth.tokens.len()).any(|count| truth.tokens[..count].concat() == prediction);
    match (agreeing == prediction.len(), agreeing == all.len()) {
        _ if all.is_empty() => Outcome::Unscorable,
        (true, _) if at_boundary => Outcome::Correct,
        (true, _) => Outcome::HalfToken,
        (false, true) if !truth.ends_document => Outcome::Unscorable,
        _ => Outcome::Wrong,
    }
}

/// Bytes that look like parts of replies, halves of characters and broken markers included.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    let fixed: [&[u8]; 12] = [
        DELIMITER,
        b"\\boxed{",
        b"{",
        b"}",
        b" a",
        b"a",
        b"b",
        b"\\",
        b"\xc3",
        b"\xa9",
        b"</thi",
        b"\\boxed",
    ];
    prop_oneof![
        6 => prop::sample::select(fixed.to_vec()).prop_map(<[u8]>::to_vec),
        1 => prop::collection::vec(any::<u8>(), 0..4),
    ]
}

fn continuation() -> impl Strategy<Value = Continuation> {
    let token = prop_oneof![
        prop::sample::select(vec![&b" a"[..], b"a", b"b", b"\xc3", b"\xa9", b"{", b"}", b"", b"ab"])
            .prop_map(<[u8]>::to_vec),
        prop::collection::vec(any::<u8>(), 0..4),
    ];
    (prop::collection::vec(token, 0..5), any::<bool>())
        .prop_map(|(tokens, ends_document)| Continuation { tokens, ends_document })
}

/// A reply: random pieces, or a thought and an answer that holds a beginning of the truth.
fn case() -> impl Strategy<Value = (Continuation, Vec<u8>)> {
    (
        continuation(),
        prop::collection::vec(piece(), 0..8),
        prop::collection::vec(piece(), 0..2),
        0..4_usize,
        any::<prop::sample::Index>(),
    )
        .prop_map(|(truth, thought, tail, shape, cut)| {
            let bytes = truth.bytes();
            let beginning = &bytes[..cut.index(bytes.len() + 1)];
            let (thought, tail) = (thought.concat(), tail.concat());
            let reply = match shape {
                0 => thought,
                1 => [&thought, DELIMITER, beginning, &tail].concat(),
                2 => [&thought, DELIMITER, b"\\boxed{", beginning, &tail, b"}"].concat(),
                _ => [&thought, DELIMITER, b"\\boxed{", beginning, b"}", &tail].concat(),
            };
            (truth, reply)
        })
}

fn format() -> impl Strategy<Value = AnswerFormat> {
    prop::sample::select(vec![AnswerFormat::Boxed, AnswerFormat::Rest])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, rng_seed: RngSeed::Fixed(0), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_equation_3((truth, reply) in case(), answer in format(), finished: bool) {
        let score = truth.score(answer, &reply, finished);
        prop_assert_eq!(score.outcome, naive_outcome(answer, &reply, finished, &truth));
        prop_assert_eq!(score.reward, if score.outcome == Outcome::Correct { 1.0 } else { 0.0 });
    }

    #[test]
    fn ranges_lie_in_the_reply((truth, reply) in case(), answer in format(), finished: bool) {
        let score = truth.score(answer, &reply, finished);
        prop_assert_eq!(score.thought.start, 0);
        prop_assert!(!reply[score.thought.clone()].windows(DELIMITER.len()).any(|window| window == DELIMITER));
        let unanswered = matches!(score.outcome, Outcome::NoAnswer | Outcome::Unfinished);
        prop_assert_eq!(score.prediction.is_none(), unanswered);
        if let Some(prediction) = score.prediction {
            prop_assert!(score.thought.end + DELIMITER.len() <= prediction.start);
            prop_assert_eq!(Some(reply[prediction].to_vec()), naive_prediction(answer, &reply));
        }
    }

    #[test]
    fn every_beginning_of_the_truth_is_correct_exactly_at_boundaries(truth in continuation()) {
        let (bytes, boundaries) = (truth.bytes(), truth.boundaries());
        for length in 1..=bytes.len() {
            let reply = [b"thought", DELIMITER, &bytes[..length]].concat();
            let expected = if boundaries.contains(&(length as u32)) { Outcome::Correct } else { Outcome::HalfToken };
            prop_assert_eq!(truth.score(AnswerFormat::Rest, &reply, true).outcome, expected);
        }
    }

    #[test]
    fn more_truth_settles_what_was_unscorable_and_changes_nothing_else(
        (known, reply) in case(), further in continuation(), answer in format(), finished: bool,
    ) {
        let known = Continuation { ends_document: false, ..known };
        let tokens = [known.tokens.clone(), further.tokens].concat();
        let more = Continuation { tokens, ends_document: further.ends_document };
        let before = known.score(answer, &reply, finished);
        if before.outcome != Outcome::Unscorable {
            prop_assert_eq!(before, more.score(answer, &reply, finished));
        }
    }
}

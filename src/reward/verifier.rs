//! The prefix-matching reward.

use super::answer::{find, last_box};
use super::{Outcome, Score, Truth};
use crate::config::{AnswerFormat, RewardConfig, RewardKind};
use std::ops::Range;

/// Scores replies against the text's own bytes.
///
/// Prefix matching (equation 3 of the RPT paper, arXiv 2506.08007): with the prediction's bytes
/// `y` of length `l`, the true continuation `x`, and the set `L` of byte lengths of its first 1,
/// 2, 3, ... tokens,
///
/// ```text
/// r = 1  if y = x[0..l] and l in L,  otherwise 0
/// ```
///
/// Bytes are compared exactly: a leading space counts, several tokens at once may be predicted,
/// and half a token earns nothing.
#[derive(Clone, Debug)]
pub struct Verifier {
    kind: RewardKind,
    answer: AnswerFormat,
    think_end: Vec<u8>,
}

/// What the search for a prediction came to.
enum Answer {
    Complete(Range<usize>),
    Missing,
    Cut,
}

impl Verifier {
    /// A verifier for a `[reward]` section. With an empty `think_end` replies have no thought.
    pub fn new(config: &RewardConfig) -> Self {
        Self { kind: config.kind, answer: config.answer, think_end: config.think_end.as_bytes().to_vec() }
    }

    /// Scores one reply.
    ///
    /// `reply` holds the reply's bytes without the end token; `finished` says that the reply ended
    /// by itself (end token or stop string) and not at the length limit. A complete box counts
    /// even in a reply that was cut, whereas an answer that runs to the end of the reply
    /// ([`AnswerFormat::Rest`]) is complete only when the reply is.
    pub fn score(&self, reply: &[u8], finished: bool, truth: &Truth) -> Score {
        let delimiter = find(reply, &self.think_end);
        let thought = 0..delimiter.unwrap_or(reply.len());
        let answer = match delimiter {
            Some(start) => self.locate(reply, start + self.think_end.len(), finished),
            None if finished => Answer::Missing,
            None => Answer::Cut,
        };
        let (outcome, prediction) = match answer {
            Answer::Missing => (Outcome::NoAnswer, None),
            Answer::Cut => (Outcome::Unfinished, None),
            Answer::Complete(range) => (self.compare(&reply[range.clone()], truth), Some(range)),
        };
        let reward = if outcome == Outcome::Correct { 1.0 } else { 0.0 };
        Score { outcome, reward, thought, prediction }
    }

    /// Finds the prediction in the answer, which starts `start` bytes into the reply.
    fn locate(&self, reply: &[u8], start: usize, finished: bool) -> Answer {
        let found = match self.answer {
            AnswerFormat::Boxed => {
                last_box(&reply[start..]).map(|range| start + range.start..start + range.end)
            }
            AnswerFormat::Rest => finished.then_some(start..reply.len()),
        };
        match found {
            Some(range) if range.is_empty() => Answer::Missing,
            Some(range) => Answer::Complete(range),
            None if finished => Answer::Missing,
            None => Answer::Cut,
        }
    }

    fn compare(&self, prediction: &[u8], truth: &Truth) -> Outcome {
        match self.kind {
            RewardKind::PrefixMatch => prefix_match(prediction, truth),
        }
    }
}

/// Equation 3 for a prediction that is not empty.
fn prefix_match(prediction: &[u8], truth: &Truth) -> Outcome {
    if truth.bytes.is_empty() {
        return Outcome::Unscorable;
    }
    if truth.bytes.starts_with(prediction) {
        return if ends_at_boundary(prediction.len(), truth) { Outcome::Correct } else { Outcome::HalfToken };
    }
    if prediction.starts_with(truth.bytes) && !truth.ends_document {
        return Outcome::Unscorable;
    }
    Outcome::Wrong
}

fn ends_at_boundary(length: usize, truth: &Truth) -> bool {
    u32::try_from(length).is_ok_and(|length| truth.boundaries.binary_search(&length).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// " the" + " cat" + "s": boundaries 4, 8, 9.
    const TRUTH: Truth = Truth { bytes: b" the cats", boundaries: &[4, 8, 9], ends_document: false };

    fn outcome(answer: AnswerFormat, reply: &str, finished: bool, truth: &Truth) -> Outcome {
        let config = RewardConfig { answer, ..RewardConfig::default() };
        Verifier::new(&config).score(reply.as_bytes(), finished, truth).outcome
    }

    #[test]
    fn boxed_predictions() {
        let cases = [
            (r"x</think>\boxed{ the}", Outcome::Correct),
            (r"x</think>\boxed{ the cat}", Outcome::Correct),
            (r"x</think>\boxed{ the cats}", Outcome::Correct),
            (r"x</think>\boxed{ the c}", Outcome::HalfToken),
            (r"x</think>\boxed{the}", Outcome::Wrong),
            (r"x</think>\boxed{ the }", Outcome::HalfToken),
            (r"x</think>\boxed{ the cats!}", Outcome::Unscorable),
            (r"x</think>\boxed{ the dogs bark loud}", Outcome::Wrong),
            (r"x</think>\boxed{}", Outcome::NoAnswer),
            (r"x</think> the", Outcome::NoAnswer),
            (r"\boxed{ the}", Outcome::NoAnswer),
            (r"\boxed{ the}</think>", Outcome::NoAnswer),
            (r"a</think>b</think>\boxed{ the}", Outcome::Correct),
        ];
        for (reply, expected) in cases {
            assert_eq!(outcome(AnswerFormat::Boxed, reply, true, &TRUTH), expected, "{reply}");
        }
    }

    #[test]
    fn a_cut_reply_counts_only_with_a_complete_box() {
        let cases = [
            (r"x</think>\boxed{ the} bec", Outcome::Correct),
            (r"x</think>\boxed{ th", Outcome::Unfinished),
            (r"x</think>\boxed{}", Outcome::NoAnswer),
            (r"x</think>", Outcome::Unfinished),
            (r"x", Outcome::Unfinished),
            (r"", Outcome::Unfinished),
        ];
        for (reply, expected) in cases {
            assert_eq!(outcome(AnswerFormat::Boxed, reply, false, &TRUTH), expected, "{reply}");
        }
        assert_eq!(outcome(AnswerFormat::Rest, "x</think> the", false, &TRUTH), Outcome::Unfinished);
        assert_eq!(outcome(AnswerFormat::Rest, "x</think> the", true, &TRUTH), Outcome::Correct);
        assert_eq!(outcome(AnswerFormat::Rest, "x</think>", true, &TRUTH), Outcome::NoAnswer);
    }

    #[test]
    fn the_end_of_the_truth_is_not_the_end_of_the_document() {
        let whole = Truth { ends_document: true, ..TRUTH };
        let nothing = Truth { bytes: b"", boundaries: &[], ends_document: true };
        let reply = "</think> the cats sleep";
        assert_eq!(outcome(AnswerFormat::Rest, reply, true, &TRUTH), Outcome::Unscorable);
        assert_eq!(outcome(AnswerFormat::Rest, reply, true, &whole), Outcome::Wrong);
        assert_eq!(outcome(AnswerFormat::Rest, reply, true, &nothing), Outcome::Unscorable);
    }

    #[test]
    fn ranges_cut_the_reply_into_thought_and_prediction() {
        let reply = br"hmm {</think> so \boxed{ the}.";
        let score = Verifier::new(&RewardConfig::default()).score(reply, true, &TRUTH);
        assert_eq!(&reply[score.thought], b"hmm {");
        assert_eq!(&reply[score.prediction.unwrap()], b" the");
        let unthinking = RewardConfig { think_end: String::new(), ..RewardConfig::default() };
        let score = Verifier::new(&unthinking).score(br"\boxed{ the}", true, &TRUTH);
        assert_eq!((score.outcome, score.thought), (Outcome::Correct, 0..0));
    }
}

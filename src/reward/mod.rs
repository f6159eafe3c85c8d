//! From a reply to an outcome and a reward: bytes in, pure functions, no models.
//!
//! A reply is a thought, a delimiter and an answer. The [`Verifier`] finds the prediction in the
//! answer and compares it with the bytes that truly follow. Whatever cannot earn a reward is
//! counted under an [`Outcome`] of its own, so that a low mean reward always says why.

mod answer;
mod verifier;

pub use verifier::Verifier;

use serde::{Deserialize, Serialize};
use std::ops::Range;

/// What became of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The prediction is a prefix of the truth that ends where a true token ends.
    Correct,
    /// The prediction differs from the truth.
    Wrong,
    /// The prediction is a prefix of the truth but ends inside a token.
    HalfToken,
    /// The reply came to its end without a prediction, or with an empty one.
    NoAnswer,
    /// The length limit cut the reply before its prediction was complete.
    Unfinished,
    /// The prediction agrees with all the truth that is known and goes on beyond it.
    Unscorable,
}

impl Outcome {
    /// Every outcome, in the order of reports.
    pub const ALL: [Self; 6] =
        [Self::Correct, Self::Wrong, Self::HalfToken, Self::NoAnswer, Self::Unfinished, Self::Unscorable];

    /// The name in metrics and logs: the same word that serialisation uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Correct => "correct",
            Self::Wrong => "wrong",
            Self::HalfToken => "half_token",
            Self::NoAnswer => "no_answer",
            Self::Unfinished => "unfinished",
            Self::Unscorable => "unscorable",
        }
    }
}

/// What truly follows a task's position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Truth<'a> {
    /// Bytes of the continuation, as far as they are known.
    pub bytes: &'a [u8],
    /// Length in bytes of the first 1, 2, 3, ... true tokens: cumulative, hence ascending.
    pub boundaries: &'a [u32],
    /// The document ends with the last of `bytes`: nothing longer can be true.
    pub ends_document: bool,
}

/// A scored reply. Ranges are byte ranges of the reply.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// What became of the reply.
    pub outcome: Outcome,
    /// The reward: 1 for [`Outcome::Correct`] and 0 for every other outcome.
    pub reward: f32,
    /// The thought, without its delimiter; the whole reply where there is no delimiter.
    pub thought: Range<usize>,
    /// The prediction; present unless the outcome is `NoAnswer` or `Unfinished`, and never empty.
    pub prediction: Option<Range<usize>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_serialised_words() {
        for outcome in Outcome::ALL {
            let word = serde_json::to_string(&outcome).unwrap();
            assert_eq!(word, format!("\"{}\"", outcome.name()));
            assert_eq!(serde_json::from_str::<Outcome>(&word).unwrap(), outcome);
        }
    }
}

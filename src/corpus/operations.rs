//! What stands between a row of a file and a document: bounds, draws, a normal form, held-out text.

use super::counts::{HELD_OUT, NOT_DRAWN, TOO_LONG, TOO_SHORT};
use super::held_out::HeldOut;
use crate::config::{CorpusConfig, Normalization};
use crate::random::Stream;
use std::borrow::Cow;
use unicode_normalization::{UnicodeNormalization, is_nfc, is_nfkc};

/// The draws of one file's rows.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draws {
    stream: Stream,
    rate: f64,
}

impl Draws {
    /// The draws depend on the file's name below its source, and not on where the corpus lies.
    pub(super) fn of(file: &str, seed: u64, rate: f64) -> Self {
        Self { stream: Stream::new(seed, "documents of a file").child(Stream::new(0, file).bits(0)), rate }
    }

    fn takes(self, row: u64) -> bool {
        self.rate >= 1.0 || self.stream.uniform(row) < self.rate
    }
}

/// The text of a document as its readers get it, or why there is none. What is cheap comes first.
pub(super) fn admit<'t>(
    text: &'t str,
    row: u64,
    draws: Draws,
    config: &CorpusConfig,
    held_out: Option<&HeldOut>,
) -> Result<Cow<'t, str>, &'static str> {
    if text.len() < config.min_bytes {
        return Err(TOO_SHORT);
    }
    if config.max_bytes.is_some_and(|most| text.len() > most) {
        return Err(TOO_LONG);
    }
    if !draws.takes(row) {
        return Err(NOT_DRAWN);
    }
    let text = normalized(text, config.normalization);
    if held_out.is_some_and(|held_out| held_out.is_repeated_by(&text)) { Err(HELD_OUT) } else { Ok(text) }
}

fn normalized(text: &str, form: Option<Normalization>) -> Cow<'_, str> {
    match form {
        Some(Normalization::Nfc) if !is_nfc(text) => text.nfc().collect::<String>().into(),
        Some(Normalization::Nfkc) if !is_nfkc(text) => text.nfkc().collect::<String>().into(),
        _ => text.into(),
    }
}

//! Held-out text that a corpus must not repeat.

use super::error::CorpusError;
use super::reader::Corpus;
use super::words::each_run;
use crate::config::{CorpusConfig, Decontamination};
use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};

/// The runs of words of held-out text. Memory: about 18 bytes for every word of it.
#[derive(Debug)]
pub(super) struct HeldOut {
    words: usize,
    runs: HashSet<u64, BuildHasherDefault<Identity>>,
    digest: String,
}

impl HeldOut {
    /// Reads what must not be repeated, with the columns of `config` where the settings name no other.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn read(config: &CorpusConfig, settings: &Decontamination) -> Result<Self, CorpusError> {
        let source = config.untouched(settings.source.clone().unwrap_or_default());
        let text_column = settings.text_column.clone().unwrap_or_else(|| config.text_column.clone());
        let held_out = Corpus::open(&CorpusConfig { text_column, id_column: None, ..source })?;
        let mut runs = HashSet::default();
        for document in held_out.documents() {
            each_run(&document?.text, settings.words, |run| {
                runs.insert(run);
            });
        }
        Ok(Self { words: settings.words, runs, digest: held_out.fingerprint()? })
    }

    /// Names the text.
    pub(super) fn digest(&self) -> &str {
        &self.digest
    }

    /// Whether a text has a run of words in common with the held-out text.
    pub(super) fn is_repeated_by(&self, text: &str) -> bool {
        let mut is_repeated = false;
        each_run(text, self.words, |run| is_repeated |= self.runs.contains(&run));
        is_repeated
    }
}

/// Takes a hash as it is.
#[derive(Default)]
struct Identity(u64);

impl Hasher for Identity {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        self.0 = bytes.iter().fold(self.0, |hash, &byte| hash.rotate_left(8) ^ u64::from(byte));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

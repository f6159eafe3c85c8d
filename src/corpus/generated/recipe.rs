//! The recipe of a generated corpus: its words and numbers, typed and checked.

use super::super::CorpusError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// More chains than this would make drawing lengths that fit by rejection slow.
const MAX_CHAINS: usize = 6;

/// A whole `corpus.toml`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Where it was read from, for messages.
    #[serde(skip)]
    path: PathBuf,
    /// The training stories.
    pub stories: Stories,
    /// The held-out stories.
    pub held_out: HeldOut,
    /// The worked examples.
    pub traces: TraceRecipe,
    /// The vocabulary.
    pub words: Words,
}

/// `[stories]`: shape of the training corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stories {
    /// Number of training documents.
    pub documents: u64,
    /// Share of them, at the start, that are small and grow.
    pub growing_share: f64,
    /// Fewest pairs on a map of a small story.
    pub min_pairs: usize,
    /// Most pairs on the map of the first small story; grows to `max_pairs`.
    pub start_pairs: usize,
    /// Most pairs on any map.
    pub max_pairs: usize,
    /// Chains on a full-sized map.
    pub chains: usize,
    /// Most pairs in one chain.
    pub longest_chain: usize,
    /// Told rides in a small or rides story.
    pub told_rides: usize,
    /// Most legs of a told ride.
    pub longest_told_ride: usize,
    /// Probability that some pairs of a small or rides story are read again.
    pub again_share: f64,
    /// Pairs that are read again.
    pub again_pairs: usize,
}

/// `[held_out]`: shape of the held-out split.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeldOut {
    /// Number of held-out documents, balanced over chain lengths.
    pub documents: u64,
    /// Longest chain asked about; may be longer than any in the training corpus.
    pub longest_chain: usize,
    /// One chain in so many belongs to the held-out side.
    pub one_in: u64,
}

/// `[traces]`: worked examples for the cold start.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceRecipe {
    /// Number of examples with a thought.
    pub count: usize,
    /// Lengths of the chains that they walk.
    pub chain_lengths: Vec<usize>,
    /// Probability that a hop is a random word of its kind.
    pub error_rate: f64,
    /// Number of further examples with an empty thought, at positions that ask nothing.
    pub empty_thoughts: usize,
    /// Lengths of the chains of the examples without wrong hops; default: `chain_lengths`.
    #[serde(default)]
    pub clean_chain_lengths: Option<Vec<usize>>,
}

impl TraceRecipe {
    /// Lengths of the chains of the examples without wrong hops.
    pub fn clean_lengths(&self) -> &[usize] {
        self.clean_chain_lengths.as_ref().unwrap_or(&self.chain_lengths)
    }
}

/// `[words]`: the vocabulary. Towns, sights and people are single words.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Words {
    /// Where lines start and end.
    pub towns: Vec<String>,
    /// Where chains end.
    pub sights: Vec<String>,
    /// Who travels.
    pub people: Vec<String>,
    /// How a story opens.
    pub openings: Vec<String>,
    /// How pairs that are read again are introduced.
    pub again: Vec<String>,
}

impl Recipe {
    /// Reads and checks a recipe.
    ///
    /// # Errors
    /// The file cannot be read, is not valid TOML, has an unknown key, or its numbers cannot work.
    pub fn load(path: &Path) -> Result<Self, CorpusError> {
        let text = fs::read_to_string(path).map_err(CorpusError::io(path))?;
        let refuse = |message| CorpusError::Recipe { path: path.to_path_buf(), message };
        let mut recipe: Self = toml::from_str(&text).map_err(|error| refuse(error.to_string()))?;
        recipe.path = path.to_path_buf();
        recipe.check().map_err(refuse)?;
        Ok(recipe)
    }

    /// The error that refuses this recipe.
    pub(super) fn refuse(&self, message: String) -> CorpusError {
        CorpusError::Recipe { path: self.path.clone(), message }
    }

    /// Refuses words and numbers from which no story could be told.
    fn check(&self) -> Result<(), String> {
        self.words.check()?;
        self.check_stories()?;
        self.check_held_out()?;
        self.check_traces()
    }

    fn check_stories(&self) -> Result<(), String> {
        let Stories { chains, longest_chain, max_pairs, start_pairs, min_pairs, .. } = self.stories;
        let (towns, sights) = (self.words.towns.len(), self.words.sights.len());
        within("stories.documents", self.stories.documents, 1, u64::from(u32::MAX))?;
        within("stories.chains", chains, 2, MAX_CHAINS.min(sights))?;
        within("stories.longest_chain", longest_chain, 1, max_pairs)?;
        within("stories.max_pairs", max_pairs, chains.max(start_pairs), towns)?;
        within("stories.start_pairs", start_pairs, min_pairs, max_pairs)?;
        within("stories.min_pairs", min_pairs, 3, max_pairs)?;
        within("stories.longest_told_ride", self.stories.longest_told_ride, 1, max_pairs)?;
        within("stories.growing_share", self.stories.growing_share, 0.0, 1.0)?;
        within("stories.again_share", self.stories.again_share, 0.0, 1.0)
    }

    fn check_held_out(&self) -> Result<(), String> {
        let HeldOut { longest_chain, one_in, documents } = self.held_out;
        let longest = (self.stories.max_pairs + 1).saturating_sub(self.stories.chains);
        within("held_out.longest_chain", longest_chain, 1, longest)?;
        within("held_out.one_in", one_in, 2, 256)?;
        within("held_out.documents", documents, 1, u64::from(u32::MAX))
    }

    fn check_traces(&self) -> Result<(), String> {
        within("traces.error_rate", self.traces.error_rate, 0.0, 1.0)?;
        for (name, lengths) in [
            ("traces.chain_lengths", &self.traces.chain_lengths[..]),
            ("traces.clean_chain_lengths", self.traces.clean_lengths()),
        ] {
            if lengths.is_empty() {
                return Err(format!("{name} is empty"));
            }
            for length in lengths {
                within(name, *length, 1, self.stories.longest_chain)?;
            }
        }
        Ok(())
    }
}

impl Words {
    fn check(&self) -> Result<(), String> {
        let lists = [&self.towns, &self.sights, &self.people, &self.openings, &self.again];
        if lists.iter().any(|list| list.is_empty()) {
            return Err("every list of words needs at least one entry".into());
        }
        let mut seen = BTreeSet::new();
        for word in self.towns.iter().chain(&self.sights).chain(&self.people) {
            if word.is_empty() || !word.chars().all(char::is_alphabetic) {
                return Err(format!("`{word}` is not a single word of letters"));
            }
            if !seen.insert(word) {
                return Err(format!("`{word}` is listed twice"));
            }
        }
        Ok(())
    }
}

/// Also refuses NaN, which lies within nothing.
fn within<T: PartialOrd + Copy + std::fmt::Display>(
    name: &str,
    value: T,
    low: T,
    high: T,
) -> Result<(), String> {
    if value >= low && value <= high {
        return Ok(());
    }
    Err(format!("{name} = {value} must be between {low} and {high}"))
}

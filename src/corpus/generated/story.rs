//! One story: a map in shuffled pairs, told rides, and a question whose answer is some lookups away.

use super::super::CorpusError;
use super::random::{Purpose, Random};
use super::recipe::{Recipe, Stories, Words};

/// Maps to draw before giving up on one whose question falls on the wanted side of the split.
const ATTEMPTS: usize = 2000;

/// What a story tells after its map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A small map, told rides and a report.
    Small,
    /// A full map and told rides.
    Rides,
    /// A full map and a report, nothing told.
    Report,
}

impl Kind {
    /// Lower-case name, the first part of a document's id.
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "small",
            Self::Rides => "rides",
            Self::Report => "report",
        }
    }
}

/// What a report asks: where the walk that starts at its town ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Bytes of text before the answer, which starts with its space.
    pub offset: usize,
    /// The towns of the walk and, last, the sight.
    pub chain: Vec<String>,
}

impl Question {
    /// Number of lookups.
    pub fn length(&self) -> usize {
        self.chain.len() - 1
    }

    /// The answer word.
    pub fn answer(&self) -> &str {
        &self.chain[self.length()]
    }
}

/// A generated document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Story {
    /// What it tells.
    pub kind: Kind,
    /// Its text.
    pub text: String,
    /// Its report, if it has one.
    pub question: Option<Question>,
}

/// Tells the stories of a recipe, each a pure function of (recipe, seed, index).
#[derive(Clone, Copy, Debug)]
pub struct Storyteller<'a> {
    recipe: &'a Recipe,
    seed: u64,
}

/// Chains of a map; the first is the one that a report asks about.
type Chains<'a> = Vec<Vec<&'a str>>;

/// Size of a story's map.
struct Shape {
    kind: Kind,
    chains: usize,
    pairs: usize,
}

impl<'a> Storyteller<'a> {
    /// A teller for a checked recipe ([`Recipe::load`]).
    pub fn new(recipe: &'a Recipe, seed: u64) -> Self {
        Self { recipe, seed }
    }

    pub(super) fn recipe(&self) -> &'a Recipe {
        self.recipe
    }

    pub(super) fn random(&self, purpose: Purpose, index: u64) -> Random {
        Random::new(self.seed, purpose, index)
    }

    /// Story `index` of the training corpus, in reading order.
    ///
    /// # Errors
    /// The words are too few to keep training and held-out questions apart.
    pub fn training(&self, index: u64) -> Result<Story, CorpusError> {
        let random = &mut self.random(Purpose::Training, index);
        let shape = self.shape(index, random);
        let lengths = self.lengths(random, &shape, None);
        let any_side = shape.kind == Kind::Rides;
        let chains = self.chains(random, &lengths, |held_out| any_side || !held_out)?;
        Ok(self.tell(random, shape.kind, &chains))
    }

    /// Held-out story `index`: a report about a chain of length 1 + `index` mod `held_out.longest_chain`.
    ///
    /// # Errors
    /// The words are too few to keep training and held-out questions apart.
    pub fn held_out(&self, index: u64) -> Result<Story, CorpusError> {
        let random = &mut self.random(Purpose::HeldOut, index);
        let Stories { chains, max_pairs: pairs, .. } = self.recipe.stories;
        let asked = 1 + (index % self.recipe.held_out.longest_chain as u64) as usize;
        let lengths = self.lengths(random, &Shape { kind: Kind::Report, chains, pairs }, Some(asked));
        let chains = self.chains(random, &lengths, |held_out| held_out)?;
        Ok(self.tell(random, Kind::Report, &chains))
    }

    /// Small stories grow over the first share of the corpus; full-sized ones follow.
    fn shape(&self, index: u64, random: &mut Random) -> Shape {
        let Stories { documents, growing_share, min_pairs, start_pairs, max_pairs, chains, .. } =
            self.recipe.stories;
        let grown = index as f64 / (documents as f64 * growing_share);
        // Not a number when nothing grows, and then the story is full-sized too.
        if grown.is_nan() || grown >= 1.0 {
            let kind = if random.chance(0.5) { Kind::Rides } else { Kind::Report };
            return Shape { kind, chains, pairs: max_pairs };
        }
        let most = start_pairs + ((max_pairs - start_pairs) as f64 * grown) as usize;
        let pairs = random.between(min_pairs, most);
        Shape { kind: Kind::Small, chains: random.between(2, chains.min(pairs / 2).max(2)), pairs }
    }

    /// Chain lengths, uniform over those with at most `shape.pairs` pairs in all; `asked` fixes the first.
    fn lengths(&self, random: &mut Random, shape: &Shape, asked: Option<usize>) -> Vec<usize> {
        let first = asked.unwrap_or(1);
        // A longer chain would leave less than one pair for each of the others.
        let longest =
            self.recipe.stories.longest_chain.min((shape.pairs + 1).saturating_sub(shape.chains)).max(1);
        let longest_other = longest.min((shape.pairs + 2).saturating_sub(first + shape.chains)).max(1);
        loop {
            let head = asked.unwrap_or_else(|| random.between(1, longest));
            let others = (1..shape.chains).map(|_| random.between(1, longest_other));
            let lengths: Vec<usize> = std::iter::once(head).chain(others).collect();
            if lengths.iter().sum::<usize>() <= shape.pairs {
                return lengths;
            }
        }
    }

    /// Chains of the given lengths over random words, the first of them on a wanted side of the split.
    fn chains(
        &self,
        random: &mut Random,
        lengths: &[usize],
        wanted: impl Fn(bool) -> bool,
    ) -> Result<Chains<'a>, CorpusError> {
        let Words { towns, sights, .. } = &self.recipe.words;
        for _ in 0..ATTEMPTS {
            let mut stops = random.sample(&borrowed(towns), lengths.iter().sum()).into_iter();
            let ends = random.sample(&borrowed(sights), lengths.len());
            let chain =
                |(length, end): (&usize, &'a str)| stops.by_ref().take(*length).chain([end]).collect();
            let chains: Chains = lengths.iter().zip(ends).map(chain).collect();
            if wanted(self.is_held_out(&chains[0])) {
                return Ok(chains);
            }
        }
        Err(self.recipe.refuse("too few words to keep training and held-out questions apart".into()))
    }

    /// Whether questions about a chain belong to the held-out side: a digest of its words decides.
    fn is_held_out(&self, chain: &[&str]) -> bool {
        let digest = blake3::hash(chain.join(" ").as_bytes());
        let head = digest.as_bytes().iter().take(8).fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte));
        head.is_multiple_of(self.recipe.held_out.one_in)
    }

    fn tell(&self, random: &mut Random, kind: Kind, chains: &Chains) -> Story {
        let pairs = chains.iter().flat_map(|chain| chain.windows(2));
        let mut pairs: Vec<String> = pairs.map(|pair| pair.join(" ")).collect();
        random.shuffle(&mut pairs);
        let mut sentences =
            vec![format!("{} {}.", random.pick(&self.recipe.words.openings), pairs.join(", "))];
        if kind != Kind::Report {
            sentences.extend(self.read_again(random, &pairs));
            sentences.extend((0..self.recipe.stories.told_rides).map(|_| self.ride(random, chains)));
        }
        let text = sentences.join(" ");
        if kind == Kind::Rides {
            Story { kind, text, question: None }
        } else {
            self.ask(random, kind, &text, &chains[0])
        }
    }

    /// Sometimes, some neighbouring pairs of the map once more.
    fn read_again(&self, random: &mut Random, pairs: &[String]) -> Option<String> {
        let Stories { again_share, again_pairs, .. } = self.recipe.stories;
        random.chance(again_share).then(|| {
            let first = random.below((pairs.len() + 1).saturating_sub(again_pairs));
            let read = pairs[first..pairs.len().min(first + again_pairs)].join(", ");
            format!("{} {read}.", random.pick(&self.recipe.words.again))
        })
    }

    /// A ride to the end of a chain.
    fn ride(&self, random: &mut Random, chains: &Chains) -> String {
        let chain = random.pick(chains);
        let last = chain.len() - 1;
        let start = random.between(last.saturating_sub(self.recipe.stories.longest_told_ride), last - 1);
        format!("{} rides {}.", random.pick(&self.recipe.words.people), chain[start..].join(" "))
    }

    /// Ends a story with a report about a chain.
    fn ask(&self, random: &mut Random, kind: Kind, text: &str, chain: &[&str]) -> Story {
        let (start, end) = (chain[0], chain[chain.len() - 1]);
        let before =
            format!("{text} {} gets on at {start} and sees the", random.pick(&self.recipe.words.people));
        let question =
            Question { offset: before.len(), chain: chain.iter().map(ToString::to_string).collect() };
        Story { kind, text: format!("{before} {end}."), question: Some(question) }
    }
}

fn borrowed(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

//! Worked examples: walks along a report's chain, some with wrong hops, and empty thoughts elsewhere.

use super::super::{CorpusError, Trace};
use super::random::{Purpose, Random};
use super::recipe::Words;
use super::story::{Question, Story, Storyteller};

/// Makes worked examples from the stories of the training corpus.
pub(super) struct Worked<'a> {
    teller: &'a Storyteller<'a>,
    /// Index and chain length of every report story.
    reports: &'a [(u64, usize)],
}

impl<'a> Worked<'a> {
    pub(super) fn new(teller: &'a Storyteller<'a>, reports: &'a [(u64, usize)]) -> Self {
        Self { teller, reports }
    }

    /// Examples about chains of the given lengths and examples with empty thoughts, mixed.
    pub(super) fn examples(&self, lengths: &[usize], error_rate: f64) -> Result<Vec<Trace>, CorpusError> {
        let traces = &self.teller.recipe().traces;
        let random = &mut self.teller.random(Purpose::TraceChoice, 0);
        let fitting: Vec<u64> = self
            .reports
            .iter()
            .filter(|(_, length)| lengths.contains(length))
            .map(|(index, _)| *index)
            .collect();
        if fitting.len() < traces.count {
            return Err(self.too_few(fitting.len(), lengths));
        }
        let mut examples = Vec::with_capacity(traces.count + traces.empty_thoughts);
        for index in random.sample(&fitting, traces.count) {
            examples.extend(self.walked(index, error_rate)?);
        }
        for number in 0..traces.empty_thoughts as u64 {
            examples.push(self.empty(number)?);
        }
        random.shuffle(&mut examples);
        Ok(examples)
    }

    fn too_few(&self, found: usize, lengths: &[usize]) -> CorpusError {
        let message = format!(
            "traces.count = {} but only {found} report stories ask about chains of length {lengths:?}",
            self.teller.recipe().traces.count
        );
        self.teller.recipe().refuse(message)
    }

    /// The example that walks the chain of a report story.
    fn walked(&self, index: u64, error_rate: f64) -> Result<Option<Trace>, CorpusError> {
        let story = self.teller.training(index)?;
        let random = &mut self.teller.random(Purpose::Hops, index);
        let walk = |question: Question| {
            let hops = walk(random, &question.chain, &self.teller.recipe().words, error_rate);
            Trace {
                text: story.text,
                offset: question.offset as u64,
                thought: format!(" at {}", hops.join(" ")),
                prediction: format!(" {}", hops[hops.len() - 1]),
                label: Some(question.length().to_string()),
            }
        };
        Ok(story.question.map(walk))
    }

    /// An example without a thought, at a random piece of a random story.
    fn empty(&self, number: u64) -> Result<Trace, CorpusError> {
        let random = &mut self.teller.random(Purpose::EmptyThought, number);
        let index = random.below(self.teller.recipe().stories.documents as usize);
        let story = self.teller.training(index as u64)?;
        let (offset, prediction) = random.pick(&open_pieces(&story)).clone();
        Ok(Trace { text: story.text, offset: offset as u64, thought: String::new(), prediction, label: None })
    }
}

/// The words of a walk; each hop is, with probability `error_rate`, a random word of its kind.
fn walk<'w>(random: &mut Random, chain: &'w [String], words: &'w Words, error_rate: f64) -> Vec<&'w str> {
    let last = chain.len() - 1;
    let mut hop = |(index, word): (usize, &'w String)| -> &'w str {
        let kind = if index == last { &words.sights } else { &words.towns };
        if index > 0 && random.chance(error_rate) { random.pick::<String>(kind) } else { word }
    };
    chain.iter().enumerate().map(&mut hop).collect()
}

/// Offset and text of every piece of a story but its first and its answer.
fn open_pieces(story: &Story) -> Vec<(usize, String)> {
    let answer = story.question.as_ref().map(|question| question.offset);
    let mut starts = piece_starts(&story.text);
    starts.push(story.text.len());
    let pieces = starts.windows(2).skip(1).filter(|pair| Some(pair[0]) != answer);
    pieces.map(|pair| (pair[0], story.text[pair[0]..pair[1]].to_owned())).collect()
}

/// Where words (with the space before them) and runs of punctuation start.
fn piece_starts(text: &str) -> Vec<usize> {
    let mut in_word = false;
    let mut starts = Vec::new();
    for (offset, character) in text.char_indices() {
        let was_in_word = std::mem::replace(&mut in_word, character == ' ' || character.is_alphanumeric());
        if offset == 0 || character == ' ' || was_in_word != in_word {
            starts.push(offset);
        }
    }
    starts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_cut_before_spaces_and_around_punctuation() {
        let text = "Here is: Oslo zoo, Rome. Ann";
        let starts = piece_starts(text);
        let ends = starts.iter().skip(1).copied().chain([text.len()]);
        let pieces: Vec<_> = starts.iter().zip(ends).map(|(start, end)| &text[*start..end]).collect();
        assert_eq!(pieces, ["Here", " is", ":", " Oslo", " zoo", ",", " Rome", ".", " Ann"]);
    }
}

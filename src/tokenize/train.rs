//! Training of a byte-level BPE.
//!
//! The trainer of the `tokenizers` library breaks ties by the order of hash maps when two pairs
//! make the same token, so two runs may differ. This one is deterministic by construction:
//! counts are sums, and of equally frequent pairs the one with the lower ids is merged first.

use super::bytes::char_of_byte;
use super::{TokenizeError, Tokenizer};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::path::Path;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

/// Starts a document.
pub const BOS: &str = "<|bos|>";
/// Opens a chain of thought.
pub const THINK: &str = "<think>";
/// Closes a chain of thought.
pub const THINK_END: &str = "</think>";
/// Ends a reply.
pub const END: &str = "<|end|>";

const SPECIAL_TOKENS: [&str; 4] = [BOS, THINK, THINK_END, END];
const ALPHABET: usize = 256;
/// Documents whose words are counted at a time.
const DOCUMENTS_PER_BATCH: usize = 256;

type Pair = (u32, u32);

/// Trains a byte-level BPE with GPT-2's word pattern on `documents`.
///
/// Ids: [`BOS`], [`THINK`], [`THINK_END`], [`END`], the 256 bytes, then one id per merge, up to
/// `vocab_size`; fewer if the documents hold no further pair. Memory grows with the number of
/// different words, not of documents. The result depends on the documents alone.
///
/// # Errors
/// Fails when `vocab_size` leaves no room for the bytes and special tokens.
pub fn train_byte_level_bpe(
    documents: impl Iterator<Item = String>,
    vocab_size: usize,
) -> Result<Tokenizer, TokenizeError> {
    let smallest = SPECIAL_TOKENS.len() + ALPHABET;
    if vocab_size < smallest {
        let reason = format!("256 bytes and {} special tokens need {smallest}", SPECIAL_TOKENS.len());
        return Err(TokenizeError::Train { vocab_size, reason });
    }
    let words = count_words(documents, vocab_size)?;
    let mut trainer = Trainer::new(&words);
    trainer.run(vocab_size);
    let json = tokenizer_json(&trainer.tokens, &trainer.merges);
    Tokenizer::from_json(Path::new("tokenizer.json"), format!("{json:#}").into_bytes())
}

/// Words in byte-level spelling with their number of occurrences.
fn count_words(
    mut documents: impl Iterator<Item = String>,
    vocab_size: usize,
) -> Result<BTreeMap<String, u64>, TokenizeError> {
    let mut words = BTreeMap::new();
    loop {
        let batch: Vec<String> = documents.by_ref().take(DOCUMENTS_PER_BATCH).collect();
        if batch.is_empty() {
            return Ok(words);
        }
        let split: Result<Vec<_>, _> = batch.into_par_iter().map(split_words).collect();
        let split = split.map_err(|reason| TokenizeError::Train { vocab_size, reason })?;
        for word in split.into_iter().flatten() {
            *words.entry(word).or_default() += 1;
        }
    }
}

fn split_words(document: String) -> Result<Vec<String>, String> {
    let mut text = PreTokenizedString::from(document);
    ByteLevel::new(false, true, true).pre_tokenize(&mut text).map_err(|error| error.to_string())?;
    let splits = text.get_splits(OffsetReferential::Original, OffsetType::Byte);
    Ok(splits.into_iter().map(|(word, _, _)| word.to_owned()).collect())
}

/// Byte-pair encoding (Sennrich et al., arXiv 1508.07909) with incremental pair counts.
struct Trainer {
    /// Distinct words as ids, with their number of occurrences.
    words: Vec<(Vec<u32>, u64)>,
    tokens: Vec<String>,
    ids: HashMap<String, u32>,
    merges: Vec<Pair>,
    counts: HashMap<Pair, u64>,
    /// Words that hold, or once held, a pair.
    places: HashMap<Pair, BTreeSet<usize>>,
    /// Pairs by count, then lower ids; entries whose count is out of date are skipped.
    queue: BinaryHeap<(u64, Reverse<Pair>)>,
}

impl Trainer {
    fn new(words: &BTreeMap<String, u64>) -> Self {
        let alphabet: BTreeSet<char> = (0..=u8::MAX).map(char_of_byte).collect();
        let specials = SPECIAL_TOKENS.iter().map(ToString::to_string);
        let tokens: Vec<String> = specials.chain(alphabet.into_iter().map(String::from)).collect();
        let ids: HashMap<String, u32> = tokens.iter().cloned().zip(0..).collect();
        let spell =
            |word: &String| word.chars().filter_map(|c| ids.get(c.to_string().as_str()).copied()).collect();
        let words = words.iter().map(|(word, &count)| (spell(word), count)).collect();
        let (counts, places) = (HashMap::new(), HashMap::new());
        let mut trainer =
            Self { words, tokens, ids, merges: vec![], counts, places, queue: BinaryHeap::new() };
        let mut changed = BTreeSet::new();
        for index in 0..trainer.words.len() {
            trainer.add_pairs(index, &mut changed);
        }
        trainer.enqueue(&changed);
        trainer
    }

    fn run(&mut self, vocab_size: usize) {
        while self.tokens.len() < vocab_size {
            let Some((count, Reverse(pair))) = self.queue.pop() else { break };
            if self.counts.get(&pair) == Some(&count) {
                self.merge(pair);
            }
        }
    }

    fn merge(&mut self, pair: Pair) {
        let id = self.token_for(pair);
        self.merges.push(pair);
        let mut changed = BTreeSet::new();
        for index in self.places.remove(&pair).unwrap_or_default() {
            if !pairs(&self.words[index].0).any(|held| held == pair) {
                continue;
            }
            self.remove_pairs(index, &mut changed);
            replace_pair(&mut self.words[index].0, pair, id);
            self.add_pairs(index, &mut changed);
        }
        self.counts.remove(&pair);
        changed.remove(&pair);
        self.enqueue(&changed);
    }

    /// The id of a merged pair: two different pairs may make the same token.
    fn token_for(&mut self, (left, right): Pair) -> u32 {
        let token = format!("{}{}", self.tokens[left as usize], self.tokens[right as usize]);
        *self.ids.entry(token.clone()).or_insert_with(|| {
            self.tokens.push(token);
            self.tokens.len() as u32 - 1
        })
    }

    fn add_pairs(&mut self, index: usize, changed: &mut BTreeSet<Pair>) {
        let (word, occurrences) = &self.words[index];
        for pair in pairs(word) {
            *self.counts.entry(pair).or_default() += occurrences;
            self.places.entry(pair).or_default().insert(index);
            changed.insert(pair);
        }
    }

    fn remove_pairs(&mut self, index: usize, changed: &mut BTreeSet<Pair>) {
        let (word, occurrences) = &self.words[index];
        for pair in pairs(word) {
            if let Some(count) = self.counts.get_mut(&pair) {
                *count = count.saturating_sub(*occurrences);
            }
            changed.insert(pair);
        }
    }

    fn enqueue(&mut self, changed: &BTreeSet<Pair>) {
        for pair in changed {
            if let Some(&count) = self.counts.get(pair).filter(|&&count| count > 0) {
                self.queue.push((count, Reverse(*pair)));
            }
        }
    }
}

fn pairs(word: &[u32]) -> impl Iterator<Item = Pair> + '_ {
    word.windows(2).map(|pair| (pair[0], pair[1]))
}

/// Replaces every occurrence of `pair`, from the left, by `id`.
fn replace_pair(word: &mut Vec<u32>, pair: Pair, id: u32) {
    let mut kept = 0;
    let mut next = 0;
    while next < word.len() {
        let matches = word[next] == pair.0 && word.get(next + 1) == Some(&pair.1);
        word[kept] = if matches { id } else { word[next] };
        kept += 1;
        next += if matches { 2 } else { 1 };
    }
    word.truncate(kept);
}

/// A Hugging Face tokenizer.json; its post-processor puts [`BOS`] before a text.
fn tokenizer_json(tokens: &[String], merges: &[Pair]) -> Value {
    let vocab: Map<String, Value> = tokens.iter().cloned().zip((0..tokens.len()).map(Value::from)).collect();
    let name = |id: u32| tokens[id as usize].as_str();
    let merges: Vec<Value> = merges.iter().map(|&(left, right)| json!([name(left), name(right)])).collect();
    let added: Vec<Value> =
        SPECIAL_TOKENS.iter().enumerate().map(|(id, token)| added_token(id, token)).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let bos = json!({"SpecialToken": {"id": BOS, "type_id": 0}});
    let text = |id: &str, type_id: u8| json!({"Sequence": {"id": id, "type_id": type_id}});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text("A", 0)],
            "pair": [bos, text("A", 0), text("B", 1)],
            "special_tokens": {BOS: {"id": BOS, "ids": [0], "tokens": [BOS]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": merges,
        },
    })
}

/// Think tags are not special: a decoder that skips special tokens shall show the thought.
fn added_token(id: usize, content: &str) -> Value {
    let special = content == BOS || content == END;
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": false, "special": special})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_replaced_from_the_left() {
        let mut word = vec![1, 1, 1, 2, 1, 1];
        replace_pair(&mut word, (1, 1), 9);
        assert_eq!(word, [9, 1, 2, 9]);
    }

    #[test]
    fn the_most_frequent_pair_is_merged_first_and_ties_go_to_lower_ids() {
        let words = BTreeMap::from([("ab".to_owned(), 3), ("cd".to_owned(), 3), ("ef".to_owned(), 5)]);
        let mut trainer = Trainer::new(&words);
        trainer.run(SPECIAL_TOKENS.len() + ALPHABET + 3);
        assert_eq!(trainer.tokens[SPECIAL_TOKENS.len() + ALPHABET..], ["ef", "ab", "cd"]);
    }

    #[test]
    fn two_ways_to_one_token_share_its_id() {
        // `abc` as a+bc and as ab+c, depending on the word around it.
        let words = BTreeMap::from([("abc".to_owned(), 5), ("ab".to_owned(), 9), ("xbc".to_owned(), 20)]);
        let mut trainer = Trainer::new(&words);
        trainer.run(10_000);
        let distinct: BTreeSet<&String> = trainer.tokens.iter().collect();
        assert_eq!(distinct.len(), trainer.tokens.len());
        assert!(trainer.words.iter().all(|(word, _)| word.len() == 1));
    }
}

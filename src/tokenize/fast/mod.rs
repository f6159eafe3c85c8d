//! Encoding of text by byte-level BPE, with exactly the ids of the `tokenizers` library.
//!
//! For the patterns of GPT-2, Llama 3 and Qwen 2: [`pattern`] cuts the text into pieces by hand,
//! [`cache`] gives the ids of pieces seen before, [`merges`] those of others. Whatever it is not
//! known to encode alike, it leaves to the library: other tokenizers as a whole
//! ([`FastEncoder::new`] says why), and texts with added tokens or half a megabyte of white space.

mod cache;
mod classes;
mod merges;
mod pattern;
mod proof;
mod vocabulary;

pub use proof::FastPath;
pub(super) use proof::{NASTY, Refutation};

use aho_corasick::AhoCorasick;
use cache::{Cache, ShortKey};
use classes::Classes;
use merges::{Memory, Merges};
use pattern::{Gpt2, Gpt4, Known, Pattern};
use serde_json::Value;
use std::borrow::Cow;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, ThreadId};
use unicode_normalization_alignments::{IsNormalized, UnicodeNormalization, is_nfc_quick};
use vocabulary::Vocabulary;

/// Bytes of all textual added tokens that are searched for.
const MAX_ADDED: usize = 1 << 16;
/// A text that is longer has a buffer of its own for its ids.
const BUFFERED_TEXT: usize = 1 << 20;

/// Encodes text for which the library would not recognise an added token.
pub(super) struct FastEncoder {
    pattern: Known,
    classes: &'static Classes,
    normalizes: bool,
    /// Finds the added tokens that are matched inside of text.
    added: Option<AhoCorasick>,
    merges: Merges,
    /// Of the threads that do not encode at the moment; a thread takes back its own, which is in its core's cache.
    scratch: Mutex<Vec<(ThreadId, Scratch)>>,
}

/// What one thread encodes with.
struct Scratch {
    cache: Cache,
    memory: Memory,
    ids: Vec<u32>,
}

impl Scratch {
    fn new() -> Self {
        Self { cache: Cache::new(), memory: Memory::default(), ids: Vec::new() }
    }
}

impl FastEncoder {
    /// Recognises a tokenizer.json that the library has accepted.
    ///
    /// # Errors
    /// Says what about it is not known to encode alike.
    pub(super) fn new(json: &Value) -> Result<Self, String> {
        let pattern = Known::detect(&json["pre_tokenizer"]);
        let pattern = pattern.ok_or("its pre-tokenizer is not that of GPT-2, Llama 3 or Qwen 2")?;
        let normalizes = match &json["normalizer"] {
            Value::Null => false,
            normalizer if normalizer["type"] == "NFC" => true,
            _ => return Err("its normalizer is not NFC".into()),
        };
        let added = textual_tokens(&json["added_tokens"], normalizes)?;
        let classes = Classes::get().ok_or("the classes of its pattern are unknown")?;
        let merges = Merges::new(&Vocabulary::read(&json["model"])?);
        Ok(Self { pattern, classes, normalizes, added, merges, scratch: Mutex::default() })
    }

    /// Ids of a text; none if the library is to decide.
    pub(super) fn encode(&self, text: &str) -> Option<Vec<u32>> {
        let normal = self.normal(text);
        let adds = |text: &str| self.added.as_ref().is_some_and(|added| added.is_match(text));
        // Some added tokens are looked for in the text as it is, others once it is normalized.
        if normal.len() > u32::MAX as usize || adds(text) || normal != text && adds(&normal) {
            return None;
        }
        let mut scratch = self.take_scratch();
        let ids = self.encode_with(&mut scratch, normal.as_bytes());
        let owned = (thread::current().id(), scratch);
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner).push(owned);
        ids
    }

    /// This thread's scratch, another's that is free, or a new one.
    fn take_scratch(&self) -> Scratch {
        let this = thread::current().id();
        let mut free = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let own = free.iter().position(|(owner, _)| *owner == this);
        let held = own.map(|place| free.swap_remove(place)).or_else(|| free.pop());
        held.map_or_else(Scratch::new, |(_, scratch)| scratch)
    }

    /// The text as the normalizer leaves it, by the library's own (old) tables.
    fn normal<'a>(&self, text: &'a str) -> Cow<'a, str> {
        // Below U+0300, whose first byte is 0xCC, all characters are as they should be.
        let is_plain = !self.normalizes || text.bytes().all(|byte| byte < 0xCC);
        if is_plain || is_nfc_quick(text.chars()) == IsNormalized::Yes {
            Cow::Borrowed(text)
        } else {
            Cow::Owned(text.chars().nfc().map(|(character, _)| character).collect())
        }
    }

    fn encode_with(&self, scratch: &mut Scratch, text: &[u8]) -> Option<Vec<u32>> {
        if text.len() > BUFFERED_TEXT {
            let mut ids = Vec::with_capacity(text.len() / 4);
            self.encode_into(scratch, text, &mut ids)?;
            ids.shrink_to_fit();
            return Some(ids);
        }
        let mut ids = std::mem::take(&mut scratch.ids);
        ids.clear();
        let whole = self.encode_into(scratch, text, &mut ids);
        let copy = whole.map(|()| ids.as_slice().into());
        scratch.ids = ids;
        copy
    }

    fn encode_into(&self, scratch: &mut Scratch, text: &[u8], ids: &mut Vec<u32>) -> Option<()> {
        match self.pattern {
            Known::Gpt2 => self.encode_pieces::<Gpt2>(scratch, text, ids),
            Known::Llama3 => self.encode_pieces::<Gpt4<3>>(scratch, text, ids),
            Known::Qwen2 => self.encode_pieces::<Gpt4<1>>(scratch, text, ids),
        }
    }

    fn encode_pieces<P: Pattern>(
        &self,
        scratch: &mut Scratch,
        text: &[u8],
        ids: &mut Vec<u32>,
    ) -> Option<()> {
        let mut start = 0;
        while start < text.len() {
            let end = P::end_of_piece(text, start, self.classes)?;
            match ShortKey::of(text, start, end) {
                Some(key) => match scratch.cache.short(key) {
                    Some([id]) => ids.push(*id),
                    Some(known) => ids.extend_from_slice(known),
                    None => self.encode_short(key, &text[start..end], scratch, ids),
                },
                None => self.encode_long(&text[start..end], scratch, ids),
            }
            start = end;
        }
        Some(())
    }

    #[cold]
    fn encode_short(&self, key: ShortKey, piece: &[u8], scratch: &mut Scratch, ids: &mut Vec<u32>) {
        let before = ids.len();
        self.merges.encode(piece, &mut scratch.memory, ids);
        scratch.cache.keep_short(key, &ids[before..]);
    }

    #[inline(never)]
    fn encode_long(&self, piece: &[u8], scratch: &mut Scratch, ids: &mut Vec<u32>) {
        if let Some(known) = scratch.cache.long(piece) {
            return ids.extend_from_slice(known);
        }
        let before = ids.len();
        self.merges.encode(piece, &mut scratch.memory, ids);
        scratch.cache.keep_long(piece, &ids[before..]);
    }
}

/// Finds the added tokens that the library matches inside of text: those that are not special.
fn textual_tokens(added: &Value, normalizes: bool) -> Result<Option<AhoCorasick>, String> {
    let textual = added.as_array().into_iter().flatten().filter(|token| token["special"] != true);
    let contents = textual.filter_map(|token| token["content"].as_str()).filter(|text| !text.is_empty());
    let mut sought: Vec<Cow<str>> = contents.map(Cow::Borrowed).collect();
    if normalizes {
        let normal = |text: &Cow<str>| text.chars().nfc().map(|(character, _)| character).collect::<String>();
        let normalized: Vec<_> = sought.iter().map(|text| Cow::Owned(normal(text))).collect();
        sought.extend(normalized);
    }
    if sought.iter().map(|text| text.len()).sum::<usize>() > MAX_ADDED {
        return Err(format!("its textual added tokens have more than {MAX_ADDED} bytes"));
    }
    if sought.is_empty() {
        return Ok(None);
    }
    let automaton = AhoCorasick::new(sought.iter().map(|text| text.as_bytes()));
    automaton.map(Some).map_err(|error| error.to_string())
}

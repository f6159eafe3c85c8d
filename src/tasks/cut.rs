//! From a document to pieces of tokens.

use super::TaskCounts;
use crate::corpus::{Document, Mark};
use crate::tokenize::Tokenizer;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// Tokens after the end of a piece that are kept, so that the truth of its last positions is known.
pub const LOOK_AHEAD_TOKENS: usize = 16;

/// A piece of a document, ready to be scored.
pub(super) struct Piece {
    pub(super) id: String,
    /// With the look-ahead.
    pub(super) tokens: Vec<u32>,
    /// Number of tokens without it.
    pub(super) own: usize,
    /// The tokens run to the end of the document.
    pub(super) ends_document: bool,
    /// Labels by token index.
    pub(super) marks: BTreeMap<u32, String>,
}

/// Tokenizes documents and cuts them into pieces of at most `length` tokens.
pub(super) struct Cutter<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) length: usize,
}

impl Cutter<'_> {
    /// The pieces of a document; none of one that cannot be encoded.
    pub(super) fn cut(&self, document: &Document, counts: &mut TaskCounts) -> Vec<Piece> {
        counts.documents += 1;
        let Ok(tokens) = self.tokenizer.encode_document(&document.text) else {
            counts.dropped.documents_not_encoded += 1;
            return Vec::new();
        };
        counts.tokens += tokens.len() as u64;
        counts.dropped.empty_documents += u64::from(tokens.is_empty());
        let marks = self.place_marks(document, &tokens, counts);
        let pieces = self.pieces(&document.id, &tokens, marks);
        counts.pieces += pieces.len() as u64;
        for piece in &pieces {
            counts.lengths.add(piece.own);
        }
        pieces
    }

    /// A document that needs no cut keeps its name.
    fn pieces(&self, id: &str, tokens: &[u32], mut marks: BTreeMap<u32, String>) -> Vec<Piece> {
        let length = self.length.max(1);
        let mut pieces = Vec::new();
        for (number, own) in tokens.chunks(length).enumerate() {
            let start = number * length;
            let end = tokens.len().min(start + own.len() + LOOK_AHEAD_TOKENS);
            let later = marks.split_off(&((start + own.len()) as u32));
            pieces.push(Piece {
                id: if tokens.len() > length { format!("{id}#{}", number + 1) } else { id.to_owned() },
                tokens: tokens[start..end].to_vec(),
                own: own.len(),
                ends_document: end == tokens.len(),
                marks: marks.into_iter().map(|(index, label)| (index - start as u32, label)).collect(),
            });
            marks = later;
        }
        pieces
    }

    /// Labels by the index of the token that starts at each mark.
    fn place_marks(
        &self,
        document: &Document,
        tokens: &[u32],
        counts: &mut TaskCounts,
    ) -> BTreeMap<u32, String> {
        let mut marks = BTreeMap::new();
        let Some(added) = self.added_bytes(&document.text, tokens) else {
            counts.respelled_documents += 1;
            counts.dropped.marks_off_boundary += document.marks.len() as u64;
            return marks;
        };
        if document.marks.is_empty() {
            return marks;
        }
        let starts = self.token_starts(tokens, added);
        for Mark { offset, label } in &document.marks {
            let index = starts.partition_point(|start| start < offset);
            match marks.entry(index as u32) {
                _ if starts.get(index) != Some(offset) => counts.dropped.marks_off_boundary += 1,
                Entry::Occupied(_) => counts.dropped.marks_repeated += 1,
                Entry::Vacant(free) => {
                    free.insert(label.clone());
                }
            }
        }
        marks
    }

    /// Bytes that the tokens spell before the text, if they spell the text: some tokenizers put one
    /// space before it.
    fn added_bytes(&self, text: &str, tokens: &[u32]) -> Option<usize> {
        let bytes_of = |token: &u32| self.tokenizer.token_bytes(*token);
        let spelled: usize = tokens.iter().map(|token| bytes_of(token).len()).sum();
        let added = spelled.checked_sub(text.len()).filter(|&added| added <= 1)?;
        let first = tokens.first().map_or(&b""[..], bytes_of);
        let (space, mut rest) = (first.get(..added)?, text.as_bytes());
        let is_spelled = tokens.iter().enumerate().all(|(at, token)| {
            let bytes = &bytes_of(token)[if at == 0 { added } else { 0 }..];
            rest.strip_prefix(bytes).map(|after| rest = after).is_some()
        });
        (is_spelled && space.iter().all(|&byte| byte == b' ')).then_some(added)
    }

    /// Byte offset in the text at which each token starts; the first starts at 0 whatever it adds.
    fn token_starts(&self, tokens: &[u32], added: usize) -> Vec<u64> {
        let ends = tokens.iter().scan(0, |end, &token| {
            *end += self.tokenizer.token_bytes(token).len() as u64;
            Some(*end)
        });
        let starts = std::iter::once(0).chain(ends).take(tokens.len());
        starts.map(|start| start.saturating_sub(added as u64)).collect()
    }
}

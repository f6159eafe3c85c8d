//! From documents to task shards.

use super::select::{Rule, Scored};
use super::{
    Fingerprints, Manifest, PositionScore, Proxy, ShardWriter, TaskCounts, TaskDocument, TasksError,
};
use crate::config::TasksConfig;
use crate::corpus::{Document, Mark};
use crate::tokenize::Tokenizer;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;

/// Tokens after the end of a piece that are kept, so that the truth of its last positions is known.
pub const LOOK_AHEAD_TOKENS: usize = 16;

/// Text that is tokenized at a time, in bytes; a longer document is tokenized alone.
const BYTES_PER_BATCH: usize = 1 << 20;
/// Tokens that the proxy is given at a time; a longer piece is given alone.
const TOKENS_PER_PROXY_CALL: usize = 1 << 15;

/// Builds tasks: tokenizes documents, cuts them into pieces, has a proxy score every position and
/// writes the pieces with the chosen positions.
///
/// The result is a pure function of the documents, the settings, the seed and the proxy's scores.
/// Memory: a megabyte of text (or the longest document) and the scores of one proxy call.
pub struct TaskBuilder<'a> {
    /// Selection and sizes.
    pub settings: &'a TasksConfig,
    /// Key of all draws.
    pub seed: u64,
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Scores positions.
    pub proxy: &'a dyn Proxy,
    /// What the proxy reads before a piece: the document's start token, where there is one.
    pub proxy_header: Vec<u32>,
    /// Keep marked positions whatever their entropy: for evaluation corpora.
    pub keep_marked: bool,
}

/// A piece of a document, ready to be scored.
struct Piece {
    id: String,
    /// With the look-ahead.
    tokens: Vec<u32>,
    /// Number of tokens without it.
    own: usize,
    /// The tokens run to the end of the document.
    ends_document: bool,
    /// Labels by token index.
    marks: BTreeMap<u32, String>,
}

impl TaskBuilder<'_> {
    /// Builds the tasks of `documents` into a directory.
    ///
    /// # Errors
    /// Fails when a document cannot be read or encoded, the proxy fails, a shard cannot be written
    /// or no position is left.
    pub fn build(
        &self,
        documents: impl IntoIterator<Item = Result<Document, crate::Error>>,
        directory: &Path,
        fingerprints: Fingerprints,
    ) -> Result<Manifest, crate::Error> {
        let mut writer = ShardWriter::create(directory, fingerprints, self.settings.documents_per_shard)?;
        let mut counts = TaskCounts::new(self.settings.top_k);
        let limit = self
            .settings
            .max_documents
            .map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        let mut documents = documents.into_iter().take(limit);
        let mut waiting = Vec::new();
        loop {
            let batch = next_batch(&mut documents)?;
            if batch.is_empty() {
                break;
            }
            for piece in self.cut_batch(&batch, &mut counts)? {
                if let Some(ready) = self.enqueue(piece, &mut waiting, &mut counts) {
                    self.score_and_write(ready, &mut writer, &mut counts)?;
                }
            }
        }
        self.score_and_write(waiting, &mut writer, &mut counts)?;
        if counts.positions == 0 {
            let dropped = counts.dropped.to_string();
            return Err(TasksError::NoPositions { counts: Box::new(counts), dropped }.into());
        }
        Ok(writer.finish(counts)?)
    }

    /// Tokenizes documents in parallel and cuts them, in order.
    fn cut_batch(&self, batch: &[Document], counts: &mut TaskCounts) -> Result<Vec<Piece>, crate::Error> {
        let encoded: Result<Vec<_>, _> =
            batch.par_iter().map(|document| self.tokenizer.encode_document(&document.text)).collect();
        let mut pieces = Vec::new();
        for (document, tokens) in batch.iter().zip(encoded?) {
            counts.documents += 1;
            counts.tokens += tokens.len() as u64;
            counts.dropped.empty_documents += u64::from(tokens.is_empty());
            let marks = self.place_marks(document, &tokens, counts);
            pieces.extend(self.cut(&document.id, &tokens, marks));
        }
        counts.pieces += pieces.len() as u64;
        Ok(pieces)
    }

    /// Cuts a document into pieces; a document that needs no cut keeps its name.
    fn cut(&self, id: &str, tokens: &[u32], mut marks: BTreeMap<u32, String>) -> Vec<Piece> {
        let length = self.settings.max_document_tokens.max(1);
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
        let Some(starts) = self.token_starts(&document.text, tokens) else {
            counts.respelled_documents += 1;
            counts.dropped.marks_off_boundary += document.marks.len() as u64;
            return marks;
        };
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

    /// Byte offset in the text at which each token starts, if the tokens spell the text. Some
    /// tokenizers put one space before it; their first token starts at 0 all the same.
    fn token_starts(&self, text: &str, tokens: &[u32]) -> Option<Vec<u64>> {
        let spelled = self.tokenizer.decode_bytes(tokens);
        let added = spelled.len().checked_sub(text.len()).filter(|&added| added <= 1)?;
        if spelled[added..] != *text.as_bytes() || !spelled[..added].iter().all(|&byte| byte == b' ') {
            return None;
        }
        let ends = self.byte_lengths(tokens).into_iter().scan(0, |end, length| {
            *end += u64::from(length);
            Some(*end)
        });
        let starts = std::iter::once(0).chain(ends).take(tokens.len());
        Some(starts.map(|start| start.saturating_sub(added as u64)).collect())
    }

    fn byte_lengths(&self, tokens: &[u32]) -> Vec<u32> {
        tokens.iter().map(|&token| self.tokenizer.token_bytes(token).len() as u32).collect()
    }

    /// Lets a piece wait for the proxy; returns those that waited when they fill a call.
    fn enqueue(&self, piece: Piece, waiting: &mut Vec<Piece>, counts: &mut TaskCounts) -> Option<Vec<Piece>> {
        let needed =
            if self.keep_marked && !piece.marks.is_empty() { 1 } else { self.settings.min_context.max(1) };
        if piece.own <= needed {
            counts.dropped.pieces_too_short += 1;
            counts.dropped.tokens_before_min_context += piece.own as u64;
            counts.dropped.marks_not_selected += piece.marks.len() as u64;
            return None;
        }
        let tokens: usize = waiting.iter().map(|waiting| waiting.own).sum();
        let is_full = !waiting.is_empty() && tokens + piece.own > TOKENS_PER_PROXY_CALL;
        let ready = is_full.then(|| std::mem::take(waiting));
        waiting.push(piece);
        ready
    }

    fn score_and_write(
        &self,
        pieces: Vec<Piece>,
        writer: &mut ShardWriter,
        counts: &mut TaskCounts,
    ) -> Result<(), crate::Error> {
        if pieces.is_empty() {
            return Ok(());
        }
        let inputs: Vec<Vec<u32>> =
            pieces.iter().map(|piece| [&self.proxy_header, &piece.tokens[..piece.own]].concat()).collect();
        let scores = self.proxy.score(&inputs, self.settings.top_k)?;
        check_length("pieces", scores.len(), pieces.len())?;
        for ((piece, input), scores) in pieces.into_iter().zip(&inputs).zip(&scores) {
            check_length("scores", scores.len(), input.len())?;
            if let Some(document) = self.select(piece, &scores[self.proxy_header.len()..], counts) {
                writer.push(document)?;
            }
        }
        Ok(())
    }

    /// Chooses the positions of a scored piece.
    fn select(
        &self,
        piece: Piece,
        scores: &[PositionScore],
        counts: &mut TaskCounts,
    ) -> Option<TaskDocument> {
        let rule = Rule { settings: self.settings, seed: self.seed, keep_marked: self.keep_marked };
        let positions = rule.choose(&Scored { id: &piece.id, scores, marks: &piece.marks }, counts);
        let marked = positions.iter().filter(|position| position.label.is_some()).count();
        counts.positions += positions.len() as u64;
        counts.marked_positions += marked as u64;
        counts.dropped.marks_not_selected += (piece.marks.len() - marked) as u64;
        if positions.is_empty() {
            counts.dropped.pieces_without_position += 1;
            return None;
        }
        let byte_lengths = self.byte_lengths(&piece.tokens);
        let Piece { id, tokens, ends_document, .. } = piece;
        Some(TaskDocument { id, tokens, byte_lengths, ends_document, positions })
    }
}

/// The next documents, about [`BYTES_PER_BATCH`] of text.
fn next_batch(
    documents: &mut impl Iterator<Item = Result<Document, crate::Error>>,
) -> Result<Vec<Document>, crate::Error> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while bytes < BYTES_PER_BATCH
        && let Some(document) = documents.next()
    {
        let document = document?;
        bytes += document.text.len().max(1);
        batch.push(document);
    }
    Ok(batch)
}

fn check_length(what: &'static str, found: usize, expected: usize) -> Result<(), TasksError> {
    if found == expected { Ok(()) } else { Err(TasksError::ProxyShape { what, found, expected }) }
}

//! From documents to task shards.

use super::cut::{Cutter, Piece};
use super::select::{Rule, Scored};
use super::{PositionScore, Proxy, ShardWriter, TaskCounts, TaskDocument, TasksError};
use crate::config::TasksConfig;
use crate::corpus::Document;
use crate::error::Error;
use crate::tokenize::Tokenizer;
use rayon::prelude::*;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, ScopedJoinHandle};

/// Text that is tokenized at a time, in bytes; a longer document is tokenized alone.
const BYTES_PER_BATCH: usize = 1 << 20;
/// Tokens that the proxy is given at a time; a longer piece is given alone.
const TOKENS_PER_PROXY_CALL: usize = 1 << 15;
/// Documents, or pieces, that a thread takes at a time.
const DOCUMENTS_AT_A_TIME: usize = 8;
/// Batches that wait between two stages.
const WAITING: usize = 1;

/// Builds tasks: tokenizes documents, cuts them into pieces, has a proxy score every position and
/// writes the pieces with the chosen positions.
///
/// The result is a pure function of the documents, the settings, the seed and the proxy's scores.
/// Reading and writing run beside the rest. Memory: some megabytes of text (or as many times the
/// longest document) and the scores of one proxy call.
pub struct TaskBuilder<'a> {
    /// Selection and sizes.
    pub settings: &'a TasksConfig,
    /// Key of all draws.
    pub seed: u64,
    /// The model's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Scores positions; without one every score is 0, which only selections that ask for none can use.
    pub proxy: Option<&'a dyn Proxy>,
    /// What the proxy reads before a piece: the document's start token, where there is one.
    pub proxy_header: Vec<u32>,
    /// Keep marked positions whatever their entropy: for evaluation corpora.
    pub keep_marked: bool,
}

/// Documents on their way to the writer.
type Outgoing = SyncSender<Vec<TaskDocument>>;

impl TaskBuilder<'_> {
    /// Builds the tasks of `documents`.
    ///
    /// # Errors
    /// Fails when a document cannot be read or encoded, the proxy fails or a shard cannot be written.
    pub fn build(
        &self,
        documents: impl IntoIterator<Item = Result<Document, Error>, IntoIter: Send>,
        writer: &mut ShardWriter,
    ) -> Result<TaskCounts, Error> {
        let limit = self.settings.max_documents.unwrap_or(u64::MAX);
        let documents = documents.into_iter().take(usize::try_from(limit).unwrap_or(usize::MAX));
        thread::scope(|scope| {
            let (batches, incoming) = sync_channel(WAITING);
            let (outgoing, finished) = sync_channel(WAITING);
            scope.spawn(move || read(documents, &batches));
            let writing = scope.spawn(move || write(&finished, writer));
            let counts = self.build_batches(&incoming, &outgoing);
            // The other two end with their channels.
            drop((incoming, outgoing));
            joined(writing)?;
            counts
        })
    }

    fn build_batches(
        &self,
        incoming: &Receiver<Result<Vec<Document>, Error>>,
        outgoing: &Outgoing,
    ) -> Result<TaskCounts, Error> {
        let mut counts = TaskCounts::new(self.settings.top_k);
        let mut waiting = Vec::new();
        for batch in incoming {
            for piece in self.cut(&batch?, &mut counts)? {
                if let Some(ready) = self.enqueue(piece, &mut waiting, &mut counts) {
                    self.finish(ready, outgoing, &mut counts)?;
                }
            }
        }
        self.finish(waiting, outgoing, &mut counts)?;
        Ok(counts)
    }

    /// Tokenizes documents in parallel and cuts them, in order.
    fn cut(&self, batch: &[Document], counts: &mut TaskCounts) -> Result<Vec<Piece>, Error> {
        let cutter = Cutter { tokenizer: self.tokenizer, length: self.settings.max_document_tokens };
        let cut = |documents: &[Document]| {
            let (mut counts, mut pieces) = (TaskCounts::new(self.settings.top_k), Vec::new());
            for document in documents {
                pieces.extend(cutter.cut(document, &mut counts)?);
            }
            Ok((pieces, counts))
        };
        let cut: Vec<_> = batch.par_chunks(DOCUMENTS_AT_A_TIME).map(cut).collect::<Result<_, Error>>()?;
        let pieces = cut.into_iter().flat_map(|(pieces, part)| {
            *counts += &part;
            pieces
        });
        Ok(pieces.collect())
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

    /// Scores pieces, chooses their positions and hands them to the writer.
    fn finish(&self, pieces: Vec<Piece>, outgoing: &Outgoing, counts: &mut TaskCounts) -> Result<(), Error> {
        if pieces.is_empty() {
            return Ok(());
        }
        let (scores, longest) = (self.score(&pieces)?, pieces.iter().map(|piece| piece.own).max());
        let blank = vec![PositionScore::default(); if scores.is_some() { 0 } else { longest.unwrap_or(0) }];
        let select = |chunk: (usize, Vec<Piece>)| {
            let (mut counts, first) = (TaskCounts::new(self.settings.top_k), chunk.0 * DOCUMENTS_AT_A_TIME);
            let choose = |(at, piece): (usize, Piece)| {
                let scores = match &scores {
                    Some(scores) => &scores[first + at],
                    None => &blank[..piece.own],
                };
                self.select(piece, scores, &mut counts)
            };
            let chosen: Vec<_> = chunk.1.into_iter().enumerate().filter_map(choose).collect();
            (chosen, counts)
        };
        let selected: Vec<_> = chunks(pieces).into_par_iter().enumerate().map(select).collect();
        let documents = selected.into_iter().flat_map(|(documents, part)| {
            *counts += &part;
            documents
        });
        // Why the writer stopped is said when it is joined.
        let stopped = |_| TasksError::io(Path::new("task shards"))(std::io::Error::other("writing stopped"));
        Ok(outgoing.send(documents.collect()).map_err(stopped)?)
    }

    /// The scores of each piece's own tokens; nothing without a proxy.
    fn score(&self, pieces: &[Piece]) -> Result<Option<Vec<Vec<PositionScore>>>, Error> {
        let Some(proxy) = self.proxy else { return Ok(None) };
        let inputs: Vec<Vec<u32>> =
            pieces.iter().map(|piece| [&self.proxy_header, &piece.tokens[..piece.own]].concat()).collect();
        let mut scores = proxy.score(&inputs, self.settings.top_k)?;
        check_length("pieces", scores.len(), pieces.len())?;
        for (scores, input) in scores.iter_mut().zip(&inputs) {
            check_length("scores", scores.len(), input.len())?;
            scores.drain(..self.proxy_header.len());
        }
        Ok(Some(scores))
    }

    /// Chooses the positions of a scored piece.
    fn select(
        &self,
        piece: Piece,
        scores: &[PositionScore],
        counts: &mut TaskCounts,
    ) -> Option<TaskDocument> {
        let rule = Rule {
            settings: self.settings,
            seed: self.seed,
            is_scored: self.proxy.is_some(),
            keep_marked: self.keep_marked,
        };
        let positions = rule.choose(&Scored { id: &piece.id, scores, marks: &piece.marks }, counts);
        let marked = positions.iter().filter(|position| piece.marks.contains_key(&position.index)).count();
        counts.positions += positions.len() as u64;
        counts.marked_positions += marked as u64;
        counts.dropped.marks_not_selected += (piece.marks.len() - marked) as u64;
        if positions.is_empty() {
            counts.dropped.pieces_without_position += 1;
            return None;
        }
        let Piece { id, tokens, ends_document, .. } = piece;
        let byte_lengths =
            tokens.iter().map(|&token| self.tokenizer.token_bytes(token).len() as u32).collect();
        Some(TaskDocument { id, tokens, byte_lengths, ends_document, positions })
    }
}

/// Pieces in chunks of [`DOCUMENTS_AT_A_TIME`].
fn chunks(pieces: Vec<Piece>) -> Vec<Vec<Piece>> {
    let mut pieces = pieces.into_iter();
    let chunk = || {
        Some(pieces.by_ref().take(DOCUMENTS_AT_A_TIME).collect()).filter(|chunk: &Vec<_>| !chunk.is_empty())
    };
    std::iter::from_fn(chunk).collect()
}

/// Reads documents, about [`BYTES_PER_BATCH`] of text at a time, until they end or nobody wants more.
fn read(
    mut documents: impl Iterator<Item = Result<Document, Error>>,
    batches: &SyncSender<Result<Vec<Document>, Error>>,
) {
    loop {
        let batch = next_batch(&mut documents);
        let is_last = batch.as_ref().map_or(true, Vec::is_empty);
        if batches.send(batch).is_err() || is_last {
            return;
        }
    }
}

fn next_batch(documents: &mut impl Iterator<Item = Result<Document, Error>>) -> Result<Vec<Document>, Error> {
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

fn write(finished: &Receiver<Vec<TaskDocument>>, writer: &mut ShardWriter) -> Result<(), TasksError> {
    finished.iter().flatten().try_for_each(|document| writer.push(document))
}

/// The result of a thread; its panic becomes this one's.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn check_length(what: &'static str, found: usize, expected: usize) -> Result<(), TasksError> {
    if found == expected { Ok(()) } else { Err(TasksError::ProxyShape { what, found, expected }) }
}

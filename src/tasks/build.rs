//! From documents to task shards.

use super::cut::{Cutter, Piece};
use super::select::{Rule, Scored};
use super::{PositionScore, Proxy, ShardWriter, TaskCounts, TaskDocument, TasksError, codec};
use crate::config::TasksConfig;
use crate::corpus::Document;
use crate::error::Error;
use crate::ordered::{Batches, joined, ordered_map};
use crate::tokenize::Tokenizer;
use arrow::array::RecordBatch;
use arrow::datatypes::Schema;
use rayon::prelude::*;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

/// Tokens that the proxy is given at a time; a longer piece is given alone.
const TOKENS_PER_PROXY_CALL: usize = 1 << 15;
/// Batches that wait for the writer.
const WAITING: usize = 2;

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

/// Rows on their way to the writer.
struct Outgoing {
    schema: Arc<Schema>,
    rows: SyncSender<RecordBatch>,
}

impl TaskBuilder<'_> {
    /// Builds the tasks of `documents`.
    ///
    /// # Errors
    /// Fails when a document cannot be read, the proxy fails or a shard cannot be written.
    pub fn build(
        &self,
        documents: impl IntoIterator<Item = Result<Document, Error>, IntoIter: Send>,
        writer: &mut ShardWriter,
    ) -> Result<TaskCounts, Error> {
        let limit = self.settings.max_documents.unwrap_or(u64::MAX);
        let documents = documents.into_iter().take(usize::try_from(limit).unwrap_or(usize::MAX));
        let batches = Batches::new(documents, |document: &Document| document.text.len());
        thread::scope(|scope| {
            let (rows, finished) = sync_channel(WAITING);
            let outgoing = Outgoing { schema: Arc::clone(writer.schema()), rows };
            let writing = scope.spawn(move || write(&finished, writer));
            let counts = match self.proxy {
                None => self.build_unscored(batches, &outgoing),
                Some(proxy) => self.build_scored(batches, proxy, &outgoing),
            };
            // The writer ends with its channel.
            drop(outgoing);
            joined(writing)?;
            counts
        })
    }

    /// Without scores a batch needs no other.
    fn build_unscored(
        &self,
        batches: impl Iterator<Item = Result<Vec<Document>, Error>> + Send,
        outgoing: &Outgoing,
    ) -> Result<TaskCounts, Error> {
        let mut counts = TaskCounts::new(self.settings.top_k);
        let choose = |batch: Result<Vec<Document>, Error>| {
            let (pieces, mut counts) = self.cut(&batch?);
            let longest = pieces.iter().map(|piece| piece.own).max().unwrap_or(0);
            let blank = vec![PositionScore::default(); longest];
            let chosen = pieces.into_iter().filter_map(|piece| {
                let scores = &blank[..piece.own];
                self.select(piece, scores, &mut counts)
            });
            Ok((outgoing.encode(&chosen.collect::<Vec<_>>())?, counts))
        };
        ordered_map(batches, choose, |chosen: Result<_, Error>| {
            let (rows, part) = chosen?;
            counts += &part;
            outgoing.send(rows)
        })?;
        Ok(counts)
    }

    /// Pieces wait until they fill a call of the proxy.
    fn build_scored(
        &self,
        batches: impl Iterator<Item = Result<Vec<Document>, Error>> + Send,
        proxy: &dyn Proxy,
        outgoing: &Outgoing,
    ) -> Result<TaskCounts, Error> {
        let mut counts = TaskCounts::new(self.settings.top_k);
        let mut queue = Queue::default();
        ordered_map(
            batches,
            |batch| Ok(self.cut(&batch?)),
            |cut: Result<_, Error>| {
                let (pieces, part) = cut?;
                counts += &part;
                for piece in pieces {
                    if let Some(ready) = queue.push(piece) {
                        outgoing.send_all(&self.finish(ready, proxy, &mut counts)?)?;
                    }
                }
                Ok::<(), Error>(())
            },
        )?;
        outgoing.send_all(&self.finish(queue.pieces, proxy, &mut counts)?)?;
        Ok(counts)
    }

    /// The pieces of documents that are long enough for a position.
    fn cut(&self, batch: &[Document]) -> (Vec<Piece>, TaskCounts) {
        let cutter = Cutter { tokenizer: self.tokenizer, length: self.settings.max_document_tokens };
        let mut counts = TaskCounts::new(self.settings.top_k);
        let mut pieces = Vec::new();
        for document in batch {
            let cut = cutter.cut(document, &mut counts);
            pieces.extend(cut.into_iter().filter(|piece| self.is_long_enough(piece, &mut counts)));
        }
        (pieces, counts)
    }

    fn is_long_enough(&self, piece: &Piece, counts: &mut TaskCounts) -> bool {
        let needed =
            if self.keep_marked && !piece.marks.is_empty() { 1 } else { self.settings.min_context.max(1) };
        if piece.own <= needed {
            counts.dropped.pieces_too_short += 1;
            counts.dropped.tokens_before_min_context += piece.own as u64;
            counts.dropped.marks_not_selected += piece.marks.len() as u64;
        }
        piece.own > needed
    }

    /// Scores pieces and chooses their positions.
    fn finish(
        &self,
        pieces: Vec<Piece>,
        proxy: &dyn Proxy,
        counts: &mut TaskCounts,
    ) -> Result<Vec<TaskDocument>, Error> {
        let scores = self.score(&pieces, proxy)?;
        let select = |(piece, scores): (Piece, Vec<PositionScore>)| {
            let mut counts = TaskCounts::new(self.settings.top_k);
            (self.select(piece, &scores, &mut counts), counts)
        };
        let selected: Vec<_> = pieces.into_par_iter().zip(scores).map(select).collect();
        let documents = selected.into_iter().filter_map(|(document, part)| {
            *counts += &part;
            document
        });
        Ok(documents.collect())
    }

    /// The scores of each piece's own tokens.
    fn score(&self, pieces: &[Piece], proxy: &dyn Proxy) -> Result<Vec<Vec<PositionScore>>, Error> {
        let inputs: Vec<Vec<u32>> =
            pieces.iter().map(|piece| [&self.proxy_header, &piece.tokens[..piece.own]].concat()).collect();
        let mut scores = proxy.score(&inputs, self.settings.top_k)?;
        check_length("pieces", scores.len(), pieces.len())?;
        for (scores, input) in scores.iter_mut().zip(&inputs) {
            check_length("scores", scores.len(), input.len())?;
            scores.drain(..self.proxy_header.len());
        }
        Ok(scores)
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
        Some(TaskDocument { id, tokens, ends_document, positions })
    }
}

/// Pieces that wait for the proxy.
#[derive(Default)]
struct Queue {
    pieces: Vec<Piece>,
    tokens: usize,
}

impl Queue {
    /// Adds a piece; returns those before it when it would overfill their call.
    fn push(&mut self, piece: Piece) -> Option<Vec<Piece>> {
        let is_full = !self.pieces.is_empty() && self.tokens + piece.own > TOKENS_PER_PROXY_CALL;
        let ready = is_full.then(|| std::mem::take(self).pieces);
        self.tokens += piece.own;
        self.pieces.push(piece);
        ready
    }
}

impl Outgoing {
    fn encode(&self, documents: &[TaskDocument]) -> Result<RecordBatch, Error> {
        let place = Path::new("task shards");
        Ok(codec::encode(&self.schema, documents).map_err(TasksError::arrow(place))?)
    }

    fn send_all(&self, documents: &[TaskDocument]) -> Result<(), Error> {
        self.send(self.encode(documents)?)
    }

    fn send(&self, rows: RecordBatch) -> Result<(), Error> {
        // Why the writer stopped is said when it is joined.
        let stopped = |_| TasksError::io(Path::new("task shards"))(std::io::Error::other("writing stopped"));
        Ok(self.rows.send(rows).map_err(stopped)?)
    }
}

fn write(finished: &Receiver<RecordBatch>, writer: &mut ShardWriter) -> Result<(), TasksError> {
    finished.iter().try_for_each(|rows| writer.push_rows(&rows))
}

fn check_length(what: &'static str, found: usize, expected: usize) -> Result<(), TasksError> {
    if found == expected { Ok(()) } else { Err(TasksError::ProxyShape { what, found, expected }) }
}

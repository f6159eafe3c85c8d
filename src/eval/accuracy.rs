//! Accuracy of greedy predictions at held-out positions.

use super::bootstrap::interval;
use super::proxy::most_probable;
use super::{Accuracy, Breakdown, Evaluation};
use crate::config::{EvalConfig, TasksConfig};
use crate::error::Error;
use crate::model::Decoder;
use crate::random::Stream;
use crate::reward::{Outcome, Truth, Verifier};
use crate::rollout::{Engine, Finish, Prompt};
use crate::tasks::{Position, PromptTemplate, Task, TaskDocument, TaskShards};
use crate::tokenize::Tokenizer;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Held-out documents with the positions to evaluate.
pub struct EvalSet {
    /// The documents; only evaluated positions are kept.
    pub documents: Vec<Arc<TaskDocument>>,
    /// Positions of the entropy band that were drawn: (number of the document, token index).
    drawn: BTreeSet<(u64, u32)>,
    bounds: (f32, f32),
    bands: Vec<f32>,
    resamples: usize,
    seed: u64,
}

/// One evaluated position.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Number of the document.
    pub document: u64,
    /// Label of a marked position.
    pub label: Option<String>,
    /// Proxy entropy in nats.
    pub entropy: f32,
    /// Whether the position was drawn from the entropy band.
    pub drawn: bool,
    /// Whether the prediction was right.
    pub right: bool,
}

impl EvalSet {
    /// Chooses positions: all marked ones, and a seeded draw of those inside the entropy band.
    ///
    /// # Errors
    /// When the shards cannot be read.
    pub fn new(
        shards: &TaskShards,
        tasks: &TasksConfig,
        config: &EvalConfig,
        seed: u64,
    ) -> Result<Self, Error> {
        let bounds = (tasks.min_entropy, tasks.max_entropy);
        let mut documents =
            (0..shards.documents()).map(|row| shards.document(row)).collect::<Result<Vec<_>, _>>()?;
        let in_band: Vec<(u64, u32)> = documents
            .iter()
            .zip(0..)
            .flat_map(|(document, at)| document.positions.iter().map(move |position| (at, position)))
            .filter(|(_, position)| inside(position.entropy, bounds))
            .map(|(at, position)| (at, position.index))
            .collect();
        let order = Stream::new(seed, "evaluation positions").order(in_band.len());
        let drawn: BTreeSet<(u64, u32)> =
            order.into_iter().take(config.max_positions).map(|at| in_band[at]).collect();
        for (document, at) in documents.iter_mut().zip(0..) {
            document
                .positions
                .retain(|position| position.label.is_some() || drawn.contains(&(at, position.index)));
        }
        Ok(Self {
            documents: documents.into_iter().map(Arc::new).collect(),
            drawn,
            bounds,
            bands: config.bands.clone(),
            resamples: config.resamples,
            seed,
        })
    }

    /// A small part of the set, to watch a training run with: its first marked positions, or its
    /// first ones where none is marked.
    #[must_use]
    pub fn probe(&self, positions: usize) -> Self {
        let marked =
            self.documents.iter().any(|document| document.positions.iter().any(|at| at.label.is_some()));
        let mut left = positions;
        let mut documents = Vec::new();
        let mut drawn = BTreeSet::new();
        for (document, number) in self.documents.iter().zip(0..) {
            let mut document = TaskDocument::clone(document);
            document.positions.retain(|position| !marked || position.label.is_some());
            document.positions.truncate(left);
            left -= document.positions.len();
            let at = documents.len() as u64;
            let indices = document.positions.iter().map(|position| position.index);
            drawn.extend(
                indices.filter(|index| self.drawn.contains(&(number, *index))).map(|index| (at, index)),
            );
            if !document.positions.is_empty() {
                documents.push(Arc::new(document));
            }
        }
        Self { documents, drawn, bands: self.bands.clone(), ..*self }
    }

    /// The positions as tasks; ordinals count from 0.
    pub fn tasks(&self) -> Vec<Task> {
        let all = self.documents.iter().flat_map(|document| {
            (0..document.positions.len()).map(move |position| (document.clone(), position))
        });
        all.enumerate()
            .map(|(ordinal, (document, position))| Task {
                ordinal: ordinal as u64,
                epoch: 0,
                document,
                position,
            })
            .collect()
    }

    fn evaluation(&self, answers: &[Answer]) -> Evaluation {
        let marked: Vec<&Answer> = answers.iter().filter(|answer| answer.label.is_some()).collect();
        let band: Vec<&Answer> = answers.iter().filter(|answer| answer.drawn).collect();
        let label = |answer: &Answer| answer.label.clone().unwrap_or_default();
        Evaluation {
            marked: self.breakdown(&marked, label),
            band: self.breakdown(&band, |answer| self.band_name(answer.entropy)),
            outcomes: BTreeMap::new(),
            reply_tokens: 0.0,
            flops: 0,
        }
    }

    fn breakdown(&self, answers: &[&Answer], name: impl Fn(&Answer) -> String) -> Option<Breakdown> {
        if answers.is_empty() {
            return None;
        }
        let mut groups: BTreeMap<String, Vec<(u64, bool)>> = BTreeMap::new();
        for answer in answers {
            groups.entry(name(answer)).or_default().push((answer.document, answer.right));
        }
        let all: Vec<(u64, bool)> = answers.iter().map(|answer| (answer.document, answer.right)).collect();
        let by_band = groups.into_iter().map(|(name, answers)| (name, self.accuracy(&answers))).collect();
        Some(Breakdown { all: self.accuracy(&all), by_band })
    }

    fn accuracy(&self, answers: &[(u64, bool)]) -> Accuracy {
        let (accuracy, ci) = interval(answers, self.resamples, self.seed);
        Accuracy { accuracy, ci, n: answers.len() as u64 }
    }

    /// Name of the entropy band, for example `1.00-1.50`.
    fn band_name(&self, entropy: f32) -> String {
        let (low, high) = self.bounds;
        let lower = self.bands.iter().copied().filter(|bound| *bound <= entropy).fold(low, f32::max);
        let upper = self.bands.iter().copied().filter(|bound| *bound > entropy).fold(high, f32::min);
        format!("{lower:.2}-{upper:.2}")
    }
}

fn inside(entropy: f32, (low, high): (f32, f32)) -> bool {
    entropy > low && entropy < high
}

/// Plain next-token prediction: the most probable token after the document's own tokens.
///
/// # Errors
/// When the decoder cannot be run.
pub fn plain(decoder: &Decoder, set: &EvalSet, header: &[u32]) -> Result<Evaluation, Error> {
    let read = |document: &Arc<TaskDocument>| {
        let last = document.positions.iter().map(|position| position.index as usize).max().unwrap_or(0);
        header.iter().chain(&document.tokens[..last]).copied().collect()
    };
    let sequences: Vec<Vec<u32>> = set.documents.iter().map(read).collect();
    let (best, flops) = most_probable(decoder, &sequences)?;
    let documents = (0..).zip(&set.documents).zip(&best);
    let answers: Vec<Answer> = documents
        .flat_map(|((number, document), best)| plain_answers(set, number, document, best, header.len()))
        .collect();
    Ok(Evaluation { flops, ..set.evaluation(&answers) })
}

/// Answers at a document's positions; `best[i]` is the most probable token behind token i of header and document.
fn plain_answers(
    set: &EvalSet,
    number: u64,
    document: &TaskDocument,
    best: &[u32],
    header: usize,
) -> Vec<Answer> {
    let answer = |position: &Position| {
        let row = (header + position.index as usize).checked_sub(1)?;
        let truth = *document.tokens.get(position.index as usize)?;
        Some(Answer {
            document: number,
            label: position.label.clone(),
            entropy: position.entropy,
            drawn: set.drawn.contains(&(number, position.index)),
            right: best.get(row) == Some(&truth),
        })
    };
    document.positions.iter().filter_map(answer).collect()
}

/// Reasoned next-token prediction: one greedy reply per position, scored by the verifier.
///
/// # Errors
/// When the decoder cannot be run.
pub fn reasoned(
    engine: &Engine,
    set: &EvalSet,
    template: &PromptTemplate,
    tokenizer: &Tokenizer,
    verifier: &Verifier,
) -> Result<Evaluation, Error> {
    let tasks = set.tasks();
    let prompts = prompts(&tasks, template);
    let generation = engine.generate(&prompts, 1)?;
    let numbers: BTreeMap<*const TaskDocument, u64> = set
        .documents
        .iter()
        .enumerate()
        .map(|(number, document)| (Arc::as_ptr(document), number as u64))
        .collect();
    let mut outcomes: BTreeMap<String, u64> = BTreeMap::new();
    let mut answers = Vec::with_capacity(tasks.len());
    for (task, group) in tasks.iter().zip(&generation.groups) {
        let Some(rollout) = group.first() else { continue };
        let truth = crate::tasks::Truth::of(task, tokenizer);
        let truth =
            Truth { bytes: &truth.bytes, boundaries: &truth.boundaries, ends_document: truth.ends_document };
        let reply = reply_bytes(&rollout.tokens, rollout.finish, tokenizer);
        let score = verifier.score(&reply, rollout.finish != Finish::Length, &truth);
        *outcomes.entry(score.outcome.name().to_string()).or_default() += 1;
        let number = numbers.get(&Arc::as_ptr(&task.document)).copied().unwrap_or(0);
        answers.push(Answer {
            document: number,
            label: task.position().label.clone(),
            entropy: task.position().entropy,
            drawn: set.drawn.contains(&(number, task.position().index)),
            right: score.outcome == Outcome::Correct,
        });
    }
    let reply_tokens = generation.sampled_tokens as f64 / tasks.len().max(1) as f64;
    Ok(Evaluation { outcomes, reply_tokens, flops: generation.flops, ..set.evaluation(&answers) })
}

/// Prompts of some tasks; consecutive tasks of one document share their trunk.
pub fn prompts(tasks: &[Task], template: &PromptTemplate) -> Vec<Prompt> {
    let footer: Arc<[u32]> = template.footer.as_slice().into();
    let mut prompts: Vec<Prompt> = Vec::with_capacity(tasks.len());
    let mut last: Option<(Arc<TaskDocument>, Arc<[u32]>)> = None;
    for task in tasks {
        let trunk = match &last {
            Some((document, trunk)) if Arc::ptr_eq(document, &task.document) => trunk.clone(),
            _ => template.header.iter().chain(&task.document.tokens).copied().collect(),
        };
        last = Some((task.document.clone(), trunk.clone()));
        prompts.push(Prompt {
            ordinal: task.ordinal,
            trunk,
            length: template.header.len() + task.position().index as usize,
            header: template.header.len(),
            footer: footer.clone(),
            cuts: [].into(),
        });
    }
    Prompt::note_cuts(&mut prompts);
    prompts
}

/// Bytes of a reply without its end token.
pub fn reply_bytes(tokens: &[u32], finish: Finish, tokenizer: &Tokenizer) -> Vec<u8> {
    let read = if finish == Finish::Eos { tokens.len().saturating_sub(1) } else { tokens.len() };
    tokenizer.decode_bytes(&tokens[..read])
}

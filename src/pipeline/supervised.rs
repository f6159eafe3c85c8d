//! The supervised stages: next-token pre-training and the cold start, and their continuations.

use super::duplicates::open_corpus;
use super::materials::load_traces;
use super::prepare::Share;
use super::run::Run;
use super::stage::{Finished, Opened, Stage, StageState};
use crate::config::{ColdStartConfig, OptimizerConfig, PretrainConfig, TrainConfig};
use crate::corpus::{Corpus, Cursor, Documents, Trace};
use crate::error::Error;
use crate::model::Decoder;
use crate::pipeline::error::PipelineError;
use crate::random::Stream;
use crate::report::{Metrics, Progress};
use crate::tasks::TaskShards;
use crate::train::loss::PolicyLoss;
use crate::train::{Example, supervised_batches};
use std::collections::VecDeque;
use std::time::Instant;

/// Where the examples of a supervised stage come from.
pub(super) trait Examples {
    /// The kinds of examples of a step (from 0); each kind's loss is a mean over its tokens.
    ///
    /// # Errors
    /// When they cannot be read.
    fn step(&mut self, step: u64) -> Result<Vec<Vec<Example>>, Error>;

    /// Where reading stands after the last step, for the checkpoint.
    fn cursor(&self) -> Cursor;
}

/// Name, length and optimiser of a supervised stage.
pub(super) struct SupervisedStage<'a> {
    /// Name of the stage.
    pub name: &'static str,
    /// Steps.
    pub steps: u64,
    /// Optimiser.
    pub optimizer: &'a OptimizerConfig,
}

/// Runs a supervised stage to its end, from its newest checkpoint.
///
/// # Errors
/// When it cannot be opened, a step fails, or a signal asks for a stop.
pub(super) fn run_supervised<E: Examples>(
    run: &Run,
    settings: &SupervisedStage,
    start: impl FnOnce() -> Result<(Decoder, u64, Cursor), Error>,
    examples: impl FnOnce(Cursor) -> Result<E, Error>,
) -> Result<Finished<Cursor>, Error> {
    let mut stage = match Stage::open(run, settings.name, settings.steps, 1, settings.optimizer, start)? {
        Opened::Finished(finished) => return Ok(*finished),
        Opened::Open(stage) => stage,
    };
    let mut examples = examples(stage.state.source)?;
    let mut progress = Progress::new(&run.log, settings.name, stage.state.step, settings.steps);
    while !stage.is_finished() {
        let loss = supervised_step(&mut stage, &mut examples)?;
        progress.step(stage.state.step, &[("loss", loss)]);
        if stage.is_due() {
            stage.commit()?;
        }
    }
    progress.finish();
    stage.finish()
}

fn supervised_step(stage: &mut Stage<Cursor>, examples: &mut impl Examples) -> Result<f64, Error> {
    let start = Instant::now();
    let kinds = examples.step(stage.state.step)?;
    let batches = supervised_batches(&kinds, stage.run.pipeline.run.tokens_per_micro_batch);
    let loss = PolicyLoss::new(&TrainConfig::default());
    let stats = stage.trainer.update(&batches, &loss, 1.0, None)?;
    stage.state.step += 1;
    stage.state.flops += stats.totals.flops;
    stage.state.tokens += batches.iter().map(|batch| batch.forest.ids().len() as u64).sum::<u64>();
    stage.state.source = examples.cursor();
    let mut metrics = Metrics::new(stage.name, stage.state.step)
        .with("loss", stats.totals.likelihood_loss)
        .with("gradient_norm", stats.gradient_norm)
        .with("learning_rate", stats.learning_rate)
        .with("tokens", stats.totals.likelihood_tokens)
        .with("seconds/update", start.elapsed().as_secs_f64());
    if stats.retries > 0 {
        metrics.set("out_of_memory_retries", stats.retries);
    }
    stage.metrics.write(&metrics)?;
    Ok(stats.totals.likelihood_loss)
}

/// Documents of the corpus in its own order, again from the start when it ends.
pub(super) struct CorpusExamples<'run> {
    run: &'run Run,
    config: &'run PretrainConfig,
    corpus: Corpus,
    documents: Documents,
    cursor: Cursor,
    /// Longest piece of a document, without its start token.
    piece_tokens: usize,
    waiting: VecDeque<Example>,
}

impl<'run> CorpusExamples<'run> {
    /// Reads on from a cursor.
    ///
    /// # Errors
    /// When the corpus cannot be opened.
    pub(super) fn open(
        run: &'run Run,
        config: &'run PretrainConfig,
        positions: usize,
        cursor: Cursor,
    ) -> Result<Self, Error> {
        let corpus = open_corpus(run, &run.sources.corpus, Share::WHOLE)?;
        let documents = corpus.documents_from(cursor);
        let piece_tokens = config.max_document_tokens.unwrap_or(positions.saturating_sub(1)).max(2);
        Ok(Self { run, config, corpus, documents, cursor, piece_tokens, waiting: VecDeque::new() })
    }

    /// The pieces of the next document, each behind the start token.
    fn next_document(&mut self) -> Result<Vec<Example>, Error> {
        let document = if let Some(document) = self.documents.next() {
            document?
        } else {
            self.documents = self.corpus.documents();
            self.documents.next().transpose()?.ok_or_else(|| PipelineError::Missing {
                message: format!("the corpus {} holds no document", self.run.sources.corpus.place()),
                hint: "check corpus.source and corpus.text_column".into(),
            })?
        };
        let vocabulary = &self.run.vocabulary;
        let ids = vocabulary.tokenizer.encode_document(&document.text)?;
        let bos = vocabulary.special.bos;
        Ok(ids
            .chunks(self.piece_tokens)
            .map(|piece| Example {
                ids: bos.into_iter().chain(piece.iter().copied()).collect(),
                first_target: 1,
                weight: 1.0,
            })
            .filter(|example| example.targets() > 0)
            .collect())
    }
}

impl Examples for CorpusExamples<'_> {
    fn step(&mut self, _step: u64) -> Result<Vec<Vec<Example>>, Error> {
        // A step ends with a whole document, so that the cursor says all there is to say.
        let mut examples = Vec::new();
        for _ in 0..self.config.documents_per_step {
            let pieces = self.next_document()?;
            self.waiting.extend(pieces);
        }
        examples.extend(self.waiting.drain(..));
        self.cursor = self.documents.cursor();
        Ok(vec![examples])
    }

    fn cursor(&self) -> Cursor {
        self.cursor
    }
}

/// Traces, with next-token prediction on task documents beside them.
pub(super) struct TraceExamples<'run> {
    config: &'run ColdStartConfig,
    traces: Vec<Example>,
    shards: TaskShards,
    header: Vec<u32>,
    longest_document: usize,
    stream: Stream,
}

impl<'run> TraceExamples<'run> {
    /// Encodes the traces of a parquet source.
    ///
    /// # Errors
    /// When they cannot be read, or none starts at a token boundary.
    pub(super) fn open(
        run: &'run Run,
        config: &'run ColdStartConfig,
        source: &str,
        positions: usize,
    ) -> Result<Self, Error> {
        let (traces, _) = load_traces(source)?;
        let mut examples: Vec<Example> = traces
            .iter()
            .map(|trace| encode_trace(run, trace))
            .filter_map(Result::transpose)
            .collect::<Result<_, _>>()?;
        let encoded = examples.len();
        if encoded < traces.len() {
            let lost = traces.len() - encoded;
            run.log.warn(format!("{lost} of {} traces do not start at a token boundary", traces.len()));
        }
        // The last token is only predicted, never read.
        examples.retain(|example| example.ids.len() <= positions + 1);
        if examples.len() < encoded {
            let lost = encoded - examples.len();
            run.log.warn(format!("{lost} of {encoded} traces do not fit the model's {positions} positions"));
        }
        if examples.is_empty() {
            return Err(PipelineError::Missing {
                message: format!(
                    "{source} holds no trace that starts at a token boundary and fits the model's {positions} positions"
                ),
                hint: "`offset` counts the bytes of `text` before the prediction".into(),
            }
            .into());
        }
        let shards = TaskShards::open(&run.paths.tasks("train"), &run.vocabulary.fingerprints())?;
        let header = run.vocabulary.special.bos.into_iter().collect();
        let stream = Stream::new(run.pipeline.seed, "cold start");
        let longest_document = run.pipeline.tasks.max_document_tokens;
        Ok(Self { config, traces: examples, shards, header, longest_document, stream })
    }
}

impl Examples for TraceExamples<'_> {
    fn step(&mut self, step: u64) -> Result<Vec<Vec<Example>>, Error> {
        let draw = self.stream.child(step);
        let traces = (0..self.config.traces_per_step as u64)
            .map(|n| self.traces[draw.below(n, self.traces.len() as u64) as usize].clone())
            .collect();
        let mut documents = Vec::new();
        if self.config.ntp_weight > 0.0 {
            let draw = draw.child(1);
            for n in 0..self.config.ntp_documents_per_step as u64 {
                let mut tokens = self.shards.document(draw.below(n, self.shards.documents()))?.tokens;
                // Without the look-ahead, which the model's positions need not have room for.
                tokens.truncate(self.longest_document);
                let ids = self.header.iter().copied().chain(tokens).collect();
                documents.push(Example { ids, first_target: 1, weight: self.config.ntp_weight });
            }
        }
        Ok(vec![traces, documents])
    }

    fn cursor(&self) -> Cursor {
        Cursor::default()
    }
}

/// Prompt, thought and prediction of a trace as one sequence; `None` off a token boundary.
fn encode_trace(run: &Run, trace: &Trace) -> Result<Option<Example>, Error> {
    let vocabulary = &run.vocabulary;
    let (tokenizer, reward) = (&vocabulary.tokenizer, &run.pipeline.reward);
    let tokens = tokenizer.encode_document(&trace.text)?;
    let mut bytes = 0;
    let context = tokens.iter().position(|token| {
        let here = bytes == trace.offset as usize;
        bytes += tokenizer.token_bytes(*token).len();
        here
    });
    let Some(context) = context else { return Ok(None) };
    let mut ids = vocabulary.template.prompt(&tokens[..context]);
    let first_target = ids.len();
    ids.extend(tokenizer.encode_document(&trace.thought)?);
    ids.extend(tokenizer.encode_control(&reward.think_end)?);
    match reward.answer {
        crate::config::AnswerFormat::Rest => ids.extend(tokenizer.encode_document(&trace.prediction)?),
        crate::config::AnswerFormat::Boxed => {
            ids.extend(tokenizer.encode_document(&format!("\\boxed{{{}}}", trace.prediction))?);
        }
    }
    ids.push(vocabulary.special.eos);
    Ok(Some(Example { ids, first_target, weight: 1.0 }))
}

/// Steps that cost about `flops`, given what `done` steps of the same kind cost.
pub(super) fn steps_for<S>(flops: u64, done: &StageState<S>) -> u64 {
    let per_step = done.flops as f64 / done.step.max(1) as f64;
    if per_step == 0.0 { 1 } else { ((flops as f64 / per_step).round() as u64).max(1) }
}

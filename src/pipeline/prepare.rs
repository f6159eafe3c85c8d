//! The data stage: units of a corpus to task shards, by one worker or by many.

use super::directory::finished_base;
use super::duplicates::open_corpus;
use super::error::PipelineError;
use super::run::Run;
use super::scorers::Scorers;
use crate::config::{CorpusConfig, Loaded, Selection, TasksConfig};
use crate::corpus::{Corpus, Unit, generated_recipe};
use crate::error::Error;
use crate::model::Decoder;
use crate::ordered::joined;
use crate::tasks::{Manifest, TaskBuilder, TaskShards, TaskUnits, TasksError};
use crate::tokenize::FastPath;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::{self, ScopedJoinHandle};

/// Units that the encoder is proven on, documents of each, and bytes of each of these.
const PROOF_UNITS: usize = 8;
const PROOF_DOCUMENTS: usize = 32;
const PROOF_BYTES: usize = 1 << 14;

/// One worker's part of the units: those whose number leaves the remainder `index`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Which worker, from 0.
    pub index: usize,
    /// How many there are.
    pub count: usize,
}

impl Share {
    /// All units.
    pub const WHOLE: Self = Self { index: 0, count: 1 };
}

/// What a worker left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShareOutcome {
    /// Its units are built; others still miss.
    Partial(PathBuf),
    /// All units of all workers are there, and the tasks are complete.
    Complete(PathBuf),
}

/// Builds one worker's part of the training tasks. Workers need a shared directory and nothing else: they
/// may start at any time, in any order, twice at once, and again after they were killed.
///
/// # Errors
/// When something is wrong that a user must mend, or a signal asked for a stop.
pub fn prepare_share(
    loaded: &Loaded,
    directory: PathBuf,
    share: Share,
    interrupt: &Arc<AtomicBool>,
) -> Result<ShareOutcome, Error> {
    check_shareable(loaded)?;
    let run = Run::open_shared(loaded, directory.clone(), interrupt)?;
    let base = if scores_with_base(&run) { Some(finished_base(&run)?) } else { None };
    Ok(match build_units(&run, &Split::train(&run), base.as_ref(), share)? {
        Some(_) => ShareOutcome::Complete(directory),
        None => ShareOutcome::Partial(directory),
    })
}

/// What workers would each make for themselves must be there before they start.
fn check_shareable(loaded: &Loaded) -> Result<(), Error> {
    let refuse = |message: &str, hint: &str| {
        Err(PipelineError::Missing { message: message.into(), hint: hint.into() }.into())
    };
    if generated_recipe(&loaded.pipeline.corpus.source).is_some() {
        return refuse(
            "a generated corpus is prepared by one worker",
            "prepare it once without --shard and outside of a job array",
        );
    }
    if loaded.pipeline.tokenizer.train.is_some() {
        return refuse(
            "a tokenizer that is trained on the corpus is made by one worker",
            "train it with a run of its own, and name its tokenizer.json as tokenizer.path",
        );
    }
    Ok(())
}

/// Whether the model that the run starts from scores the training tasks.
pub(super) fn scores_with_base(run: &Run) -> bool {
    run.pipeline.tasks.score && run.pipeline.tasks.proxy.is_none()
}

/// A corpus with the settings that its tasks are cut by.
pub(super) struct Split {
    name: &'static str,
    pub(super) source: CorpusConfig,
    pub(super) settings: TasksConfig,
    is_held_out: bool,
}

impl Split {
    fn train(run: &Run) -> Self {
        let (source, settings) = (run.sources.tasks.clone(), run.pipeline.tasks.clone());
        Self { name: "train", source, settings, is_held_out: false }
    }

    /// Every position of the held-out text is kept and scored; nothing without held-out text.
    fn eval(run: &Run) -> Option<Self> {
        let max_documents = run.pipeline.eval.as_ref().and_then(|eval| eval.max_documents);
        let tasks = run.pipeline.tasks.clone();
        // Bands of an evaluation are its own, and every position in them counts.
        let selection = match tasks.selection {
            Selection::Tiers | Selection::LossGap => Selection::Entropy,
            other => other,
        };
        let settings = TasksConfig {
            positions_per_document: usize::MAX,
            max_documents,
            score: true,
            selection,
            top_share: 1.0,
            scores: None,
            ..tasks
        };
        Some(Self { name: "eval", source: run.sources.held_out.clone()?, settings, is_held_out: true })
    }
}

impl Split {
    /// Whether positions are chosen by comparing two models.
    pub(super) fn compares(&self) -> bool {
        self.settings.selection == Selection::LossGap
    }
}

/// Whether the tasks of a split are built. They must be intact then, since the run goes on with them.
///
/// # Errors
/// When they are damaged, or built with another tokenizer or template.
pub(super) fn has_tasks(run: &Run, split: &str) -> Result<bool, Error> {
    let directory = run.paths.tasks(split);
    if let Err(TasksError::Unfinished { .. }) = Manifest::load(&directory) {
        return Ok(false);
    }
    TaskShards::open(&directory, &run.vocabulary.fingerprints())?.verify()?;
    Ok(true)
}

/// Cuts and scores the tasks of a split, unless its shards are there.
///
/// # Errors
/// When the corpus cannot be read, the proxy cannot be run or a file cannot be written.
pub(super) fn build_tasks(run: &Run, split: &str, base: Option<&Decoder>) -> Result<(), Error> {
    if has_tasks(run, split)? {
        return Ok(());
    }
    let split = if split == "eval" { Split::eval(run) } else { Some(Split::train(run)) };
    let Some(split) = split else { return Ok(()) };
    build_units(run, &split, base, Share::WHOLE).map(drop)
}

/// Builds the units of a share that are missing, and puts all together once none is.
fn build_units(
    run: &Run,
    split: &Split,
    base: Option<&Decoder>,
    share: Share,
) -> Result<Option<Manifest>, Error> {
    let corpus = open_corpus(run, &split.source, share)?;
    for (name, rate) in corpus.rates() {
        run.log.say(format!("reads {:.1} % of the documents of {name}", 100.0 * rate));
    }
    // A limit on documents counts from the start of the corpus.
    let unit_bytes =
        if split.settings.max_documents.is_some() { u64::MAX } else { split.settings.unit_bytes };
    let units = corpus.units(unit_bytes);
    let directory = run.paths.tasks(split.name);
    let fingerprints = run.vocabulary.fingerprints();
    let tasks = TaskUnits::open(&directory, fingerprints, split.settings.shard_bytes, units.len())?;
    let missing = |unit: &&Unit| unit.number % share.count == share.index && !tasks.is_committed(unit.number);
    let mut missing = units.iter().filter(missing).peekable();
    if missing.peek().is_some() {
        prove_encoder(run, &corpus, &units);
        let scorers = Scorers::load(run, split, base, &corpus)?;
        let builder = UnitBuilder { run, split, corpus: &corpus, scorers: &scorers, tasks: &tasks };
        builder.build_all(missing)?;
    }
    let manifest = tasks.gather()?;
    if let Some(manifest) = &manifest {
        manifest.corpus.check_quarantined(split.source.max_quarantined)?;
        tasks.complete(manifest)?;
    }
    run.log.say(format!("tasks/{}: {}", split.name, state(manifest.as_ref(), &units, &tasks)));
    Ok(manifest)
}

/// Compares the fast encoder with the library on documents from all over the corpus, and says who encodes.
fn prove_encoder(run: &Run, corpus: &Corpus, units: &[Unit]) {
    let chosen = units.iter().step_by(units.len().div_ceil(PROOF_UNITS).max(1));
    // Units that cannot be read are quarantined when they are built.
    let documents = chosen.flat_map(|unit| corpus.documents_of(unit).flatten().take(PROOF_DOCUMENTS));
    let texts: Vec<String> = documents.map(|document| beginning(document.text)).collect();
    match run.vocabulary.tokenizer.prove_fast_path(texts.iter().map(String::as_str)) {
        FastPath::Active => {}
        FastPath::Refuted { message } => run.log.warn(message),
        FastPath::Unsupported { reason } => {
            run.log.say(format!("the tokenizers library encodes the corpus, slowly: {reason}"));
        }
    }
}

/// The first bytes of a text, whole characters.
fn beginning(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(PROOF_BYTES));
    text
}

/// What a proxy reads before a piece.
pub(super) fn header(run: &Run) -> Vec<u32> {
    run.vocabulary.special.bos.into_iter().collect()
}

/// What the units of a split are built with.
struct UnitBuilder<'a> {
    run: &'a Run,
    split: &'a Split,
    corpus: &'a Corpus,
    scorers: &'a Scorers<'a>,
    tasks: &'a TaskUnits,
}

impl UnitBuilder<'_> {
    /// Builds units one after another; one is synced and committed while the next is being built.
    fn build_all<'u>(&self, units: impl Iterator<Item = &'u Unit>) -> Result<(), Error> {
        thread::scope(|scope| {
            let mut committing: Option<ScopedJoinHandle<'_, Result<(), Error>>> = None;
            for unit in units {
                let built = self.build(unit);
                committing.take().map_or(Ok(()), joined)?;
                match built {
                    Ok(commit) => {
                        committing = Some(scope.spawn(move || self.unless_there(unit, commit())));
                    }
                    Err(error) => self.unless_there(unit, Err(error))?,
                }
            }
            committing.map_or(Ok(()), joined)
        })
    }

    /// Another worker that is first with a unit clears away what this one is writing.
    fn unless_there(&self, unit: &Unit, done: Result<(), Error>) -> Result<(), Error> {
        match done {
            Err(Error::Tasks(_)) if self.tasks.is_committed(unit.number) => Ok(()),
            done => done,
        }
    }

    /// Writes the shards of a unit; what is left is to commit it.
    fn build(&self, unit: &Unit) -> Result<impl FnOnce() -> Result<(), Error> + Send, Error> {
        let Self { run, split, corpus, scorers, tasks } = *self;
        let mut open = tasks.start(unit.number)?;
        let mut documents = corpus.documents_of(unit);
        let counts = scorers.with_proxy(unit.number, |proxy| {
            let builder = TaskBuilder {
                settings: &split.settings,
                seed: run.pipeline.seed,
                tokenizer: &run.vocabulary.tokenizer,
                proxy,
                proxy_header: header(run),
                keep_marked: split.is_held_out,
            };
            let documents = documents.by_ref().map(|document| {
                run.check_interrupt(|| format!("before tasks/{} were complete", split.name))?;
                document.map_err(Error::from)
            });
            builder.build(documents, &mut open.writer)
        })?;
        let read = documents.counts().clone();
        for place in &read.quarantined {
            run.log.warn(format!("quarantined {place}"));
        }
        let sources = corpus.sources_of(unit);
        Ok(move || Ok(tasks.commit(open, sources, read, counts)?))
    }
}

/// What there is, in words.
fn state(manifest: Option<&Manifest>, units: &[Unit], tasks: &TaskUnits) -> String {
    let Some(manifest) = manifest else {
        let there = units.iter().filter(|unit| tasks.is_committed(unit.number)).count();
        return format!("{there} of {} units are there", units.len());
    };
    format!(
        "{} positions in {} documents of {} units ({} quarantined places)",
        manifest.positions(),
        manifest.documents(),
        units.len(),
        manifest.corpus.quarantined_total
    )
}

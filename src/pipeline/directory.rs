//! A run directory seen from outside: models, verification, evaluation, report.

use super::error::PipelineError;
use super::evaluate::Evaluator;
use super::materials::{Vocabulary, initial_decoder};
use super::prepare::{build_tasks, has_tasks};
use super::remote::{Scope, commits_of, localize};
use super::run::{Paths, Run, resolved_text};
use super::stage::{STAGES, has_checkpoints, read_average, read_decoder};
use super::summary::{report_again, tables_of};
use crate::checkpoint::{CheckpointStore, StoreReport};
use crate::config::{Loaded, Pipeline, parse};
use crate::error::Error;
use crate::ledger::{LedgerReport, LedgerSnapshot};
use crate::model::Decoder;
use crate::report::{Log, Table};
use crate::tasks::{Manifest, PromptTemplate, TaskShards, TasksError};
use crate::tokenize::{SpecialTokens, Tokenizer};
use serde::Serialize;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// A run directory.
pub struct RunDirectory {
    paths: Paths,
    pipeline: Pipeline,
}

/// What `rpt verify` found.
#[derive(Debug, Serialize)]
pub struct VerifyReport {
    /// The run directory.
    pub run: PathBuf,
    /// Checkpoints of each stage.
    pub checkpoints: Vec<StoreReport>,
    /// The ledger, once the reinforcement stage has begun.
    pub ledger: Option<LedgerReport>,
    /// Task shards with wrong checksums.
    pub damaged_tasks: Vec<String>,
    /// Nothing is wrong.
    pub intact: bool,
}

impl VerifyReport {
    /// Whether nothing is wrong.
    pub fn intact(&self) -> bool {
        self.intact
    }
}

/// A model out of a run.
pub struct RunModel {
    /// The model.
    pub decoder: Decoder,
    /// Stage and step of its checkpoint; none for the model that the run starts from.
    pub checkpoint: Option<(String, u64)>,
}

impl RunDirectory {
    /// Opens a directory that holds a run.
    ///
    /// # Errors
    /// When it holds none.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let paths = Paths(path.to_path_buf());
        let text = std::fs::read_to_string(paths.pipeline()).map_err(|_| PipelineError::Missing {
            message: format!("{} is not a run directory: it has no pipeline.toml", path.display()),
            hint: "give the directory that `rpt run` printed, for example runs/quickstart".into(),
        })?;
        let pipeline = parse(&text, &paths.pipeline().display().to_string(), &[])?;
        Ok(Self { paths, pipeline })
    }

    /// The resolved pipeline.
    pub fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.paths.0
    }

    /// The evaluation tables of the run, as far as it has come.
    ///
    /// # Errors
    /// When an evaluation file is damaged.
    pub fn tables(&self) -> Result<Vec<Table>, Error> {
        tables_of(&self.paths)
    }

    /// The run's tokenizer and special tokens.
    ///
    /// # Errors
    /// When they cannot be loaded.
    pub fn tokenizer(&self) -> Result<(Tokenizer, SpecialTokens), Error> {
        let vocabulary = self.vocabulary()?;
        Ok((vocabulary.tokenizer, vocabulary.special))
    }

    /// The prompt template of the run.
    ///
    /// # Errors
    /// As [`RunDirectory::tokenizer`].
    pub fn template(&self) -> Result<PromptTemplate, Error> {
        Ok(self.vocabulary()?.template)
    }

    fn vocabulary(&self) -> Result<Vocabulary, Error> {
        let directory = self.paths.tokenizer();
        if self.pipeline.tokenizer.train.is_some() && !directory.join("tokenizer.json").exists() {
            return Err(PipelineError::Missing {
                message: format!("{} holds no tokenizer yet", self.paths.0.display()),
                hint: "run the pipeline first".into(),
            }
            .into());
        }
        let local = self.local(Scope::Tokenizer)?;
        Vocabulary::open(&local, &local.corpus, &directory, &Log::without_file())
    }

    /// The pipeline with local paths for what is needed from the Hub, at the run's commits.
    fn local(&self, scope: Scope) -> Result<Pipeline, Error> {
        let commits = commits_of(&self.paths)?;
        Ok(localize(&self.pipeline, scope, commits, &Log::without_file(), None)?.pipeline)
    }

    /// Where the model that the run started from lies on this machine.
    pub(super) fn local_model(&self) -> Result<Option<PathBuf>, Error> {
        Ok(self.local(Scope::Model)?.model.path)
    }

    /// The model of a stage's newest intact checkpoint; default: of the last main stage that has one.
    ///
    /// # Errors
    /// When there is no such checkpoint or it is damaged.
    pub fn decoder(&self, stage: Option<&str>) -> Result<Decoder, Error> {
        Ok(self.model(stage, None)?.decoder)
    }

    /// The model of a checkpoint: of a stage (default: the last main one that has any) and of a step
    /// (default: the newest that is intact).
    ///
    /// # Errors
    /// As [`RunDirectory::decoder`].
    pub fn model(&self, stage: Option<&str>, step: Option<u64>) -> Result<RunModel, Error> {
        self.read_model(stage, step, false)
    }

    /// The same, or the running average of its parameters.
    pub(super) fn read_model(
        &self,
        stage: Option<&str>,
        step: Option<u64>,
        average: bool,
    ) -> Result<RunModel, Error> {
        let missing = |message, hint: String| Error::from(PipelineError::Missing { message, hint });
        if let Some(stage) = stage.filter(|stage| !STAGES.contains(stage)) {
            let hint = format!("stages are {}", STAGES.join(", "));
            return Err(missing(format!("there is no stage `{stage}`"), hint));
        }
        let main = ["train", "cold_start", "pretrain"];
        let last = || main.into_iter().find(|stage| has_checkpoints(&self.paths, stage));
        let Some(stage) = stage.or_else(last).filter(|stage| has_checkpoints(&self.paths, stage)) else {
            if stage.is_none() && step.is_none() && !average && self.pipeline.model.path.is_some() {
                let decoder = initial_decoder(&self.local(Scope::Model)?, &self.vocabulary()?)?;
                return Ok(RunModel { decoder, checkpoint: None });
            }
            let message = format!("{} holds no checkpoint of that stage", self.paths.0.display());
            return Err(missing(message, "run the pipeline first".into()));
        };
        let (root, identity) = (self.paths.checkpoints(stage), self.identity()?);
        let checkpoint = match step {
            Some(step) => CheckpointStore::peek_step(&root, &identity, step)?,
            None => CheckpointStore::peek(&root, &identity)?.checkpoint,
        };
        let Some(checkpoint) = checkpoint else {
            let steps: Vec<String> = CheckpointStore::steps(&root)?.iter().map(u64::to_string).collect();
            let hint = format!("its checkpoints are of steps {}", steps.join(", "));
            return Err(missing(format!("stage {stage} has no such checkpoint"), hint));
        };
        let (mut decoder, mut parameters) = read_decoder(&checkpoint, &self.local(Scope::Model)?)?;
        if average {
            if !read_average(&checkpoint, decoder.trainable(), &mut parameters)? {
                let hint =
                    "a stage whose optimizer has ema_decay keeps one; --stage names another stage".into();
                return Err(missing(format!("stage {stage} has kept no average of its parameters"), hint));
            }
            decoder.set_parameters(&parameters);
        }
        Ok(RunModel { decoder, checkpoint: Some((stage.to_owned(), checkpoint.step())) })
    }

    fn identity(&self) -> Result<String, Error> {
        Ok(blake3::hash(resolved_text(&self.pipeline)?.as_bytes()).to_hex().to_string())
    }

    /// Plain and reasoned accuracy of a model (default: the run's last) on the run's held-out tasks.
    ///
    /// # Errors
    /// When there is no held-out text, or the model cannot be run.
    pub fn evaluate(&self, model: Option<&Path>, stage: Option<&str>) -> Result<Value, Error> {
        let decoder = match model {
            Some(path) => Decoder::load(path)?,
            None => self.decoder(stage)?,
        };
        let loaded = Loaded { pipeline: self.pipeline.clone(), name: String::new() };
        let run = Run::open(&loaded, self.paths.0.clone(), &Arc::new(AtomicBool::new(false)))?;
        run.vocabulary.tokenizer.check_vocabulary(decoder.config().vocab_size)?;
        if run.sources.held_out.is_some() && !has_tasks(&run, "eval")? {
            build_tasks(&run, "eval", Some(&finished_base(&run)?))?;
        }
        match Evaluator::open(&run)?.both(&decoder.on(run.device.as_ref()))? {
            Some((plain, reasoned)) => Ok(serde_json::json!({ "plain": plain, "reasoned": reasoned })),
            None => Err(PipelineError::Missing {
                message: "the pipeline has no held-out text".into(),
                hint: "set [eval] source".into(),
            }
            .into()),
        }
    }

    /// Writes the report again; returns its path.
    ///
    /// # Errors
    /// When figures cannot be read or the report cannot be written.
    pub fn write_report(&self) -> Result<PathBuf, Error> {
        report_again(&self.paths, &self.pipeline)
    }

    /// Checks manifests, checksums, the ledger's chain and its balance; changes nothing.
    ///
    /// # Errors
    /// When something cannot be read at all.
    pub fn verify(&self) -> Result<VerifyReport, Error> {
        let mut checkpoints = Vec::new();
        for stage in STAGES {
            let root = self.paths.checkpoints(stage);
            if root.is_dir() {
                checkpoints.push(crate::checkpoint::verify(&root)?);
            }
        }
        let ledger = self.verify_ledger()?;
        let damaged_tasks = self.verify_tasks();
        let intact = checkpoints.iter().all(StoreReport::intact)
            && ledger.as_ref().is_none_or(LedgerReport::intact)
            && damaged_tasks.is_empty();
        Ok(VerifyReport { run: self.paths.0.clone(), checkpoints, ledger, damaged_tasks, intact })
    }

    fn verify_ledger(&self) -> Result<Option<LedgerReport>, Error> {
        if !self.paths.ledger().exists() {
            return Ok(None);
        }
        // Damaged checkpoints are reported as such; they leave nothing to compare the ledger with.
        let snapshot: Option<LedgerSnapshot> = newest_state(&self.paths, "train", &self.identity()?)
            .ok()
            .flatten()
            .and_then(|state| serde_json::from_value(state["source"]["ledger"].clone()).ok());
        Ok(Some(crate::ledger::verify_file(&self.paths.ledger(), snapshot.as_ref())?))
    }

    fn verify_tasks(&self) -> Vec<String> {
        let mut damaged = Vec::new();
        for split in ["train", "eval"] {
            let directory = self.paths.tasks(split);
            let checked = Manifest::load(&directory)
                .and_then(|manifest| TaskShards::open(&directory, &manifest.fingerprints)?.verify());
            match checked {
                // Not built yet.
                Ok(()) | Err(TasksError::Unfinished { .. }) => {}
                Err(error) => damaged.push(error.to_string()),
            }
        }
        damaged
    }
}

/// The model before the cold start, whose entropies choose positions.
///
/// # Errors
/// When pre-training has not finished, or the model cannot be loaded.
pub(super) fn finished_base(run: &Run) -> Result<Decoder, Error> {
    if run.pipeline.pretrain.is_none() {
        return Ok(initial_decoder(&run.local, &run.vocabulary)?.on(run.device.as_ref()));
    }
    let finished = newest_state(&run.paths, "pretrain", &run.identity)?
        .is_some_and(|state| state["step"].is_u64() && state["step"] == state["steps"]);
    if finished {
        return RunDirectory::open(&run.paths.0)?.decoder(Some("pretrain"));
    }
    Err(PipelineError::Missing {
        message: "pre-training has not finished, and the model that it ends with chooses positions".into(),
        hint: "run the pipeline further first".into(),
    }
    .into())
}

/// The state of a stage's newest intact checkpoint.
fn newest_state(paths: &Paths, stage: &str, identity: &str) -> Result<Option<Value>, Error> {
    if !has_checkpoints(paths, stage) {
        return Ok(None);
    }
    let found = CheckpointStore::peek(&paths.checkpoints(stage), identity)?;
    Ok(found.checkpoint.map(|checkpoint| checkpoint.json("state")).transpose()?)
}

/// Step, steps, tokens, operations and seconds of every stage that has begun.
pub(super) fn stage_figures(paths: &Paths, pipeline: &Pipeline) -> Result<Vec<(String, Value)>, Error> {
    let identity = blake3::hash(resolved_text(pipeline)?.as_bytes()).to_hex().to_string();
    let mut figures = Vec::new();
    for stage in STAGES {
        if let Some(state) = newest_state(paths, stage, &identity)? {
            figures.push((stage.to_string(), state));
        }
    }
    Ok(figures)
}

//! What every stage reads: resolved corpora, tokenizer and template.

use super::error::PipelineError;
use crate::checkpoint::atomic_write;
use crate::config::{CorpusConfig, Decontamination, Pipeline};
use crate::corpus::generated::{generate, generated_recipe};
use crate::corpus::{Corpus, Trace, read_traces};
use crate::error::Error;
use crate::model::{Decoder, DecoderConfig, LoraShape};
use crate::report::Log;
use crate::tasks::{Fingerprints, PromptTemplate};
use crate::tokenize::{SpecialTokens, Tokenizer, train_byte_level_bpe};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Corpora of a run, a generated one already written.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Training text.
    pub corpus: CorpusConfig,
    /// Text that tasks are cut from.
    pub tasks: CorpusConfig,
    /// Held-out text.
    pub held_out: Option<CorpusConfig>,
    /// Traces for the cold start.
    pub traces: Option<String>,
    /// The same without errors, for the control.
    pub clean_traces: Option<String>,
}

impl Sources {
    /// Resolves the pipeline's corpora; a generated corpus is written to `directory` first.
    ///
    /// # Errors
    /// When a generated corpus cannot be written.
    pub fn resolve(pipeline: &Pipeline, directory: &Path, log: &Log) -> Result<Self, Error> {
        let corpus = CorpusConfig {
            seed: Some(pipeline.corpus.seed.unwrap_or(pipeline.seed)),
            ..pipeline.corpus.clone()
        };
        let held_out = pipeline.eval.as_ref().and_then(|eval| eval.source.clone());
        let cold_start = pipeline.cold_start.as_ref().and_then(|cold_start| cold_start.source.clone());
        let other =
            |source| CorpusConfig { source, mixture: BTreeMap::new(), max_documents: None, ..corpus.clone() };
        let mut sources = Self {
            tasks: pipeline.tasks.source.clone().map_or_else(|| corpus.clone(), other),
            held_out: held_out.map(|source| corpus.untouched(source)),
            traces: cold_start.clone(),
            clean_traces: cold_start,
            corpus,
        };
        if let Some(recipe) = generated_recipe(&pipeline.corpus.source) {
            sources.generate(&recipe, pipeline, directory, log)?;
        }
        let Self { corpus, tasks, held_out, .. } = &mut sources;
        protect(&mut corpus.decontaminate, held_out.as_ref())?;
        protect(&mut tasks.decontaminate, held_out.as_ref())?;
        Ok(sources)
    }

    /// Writes a generated corpus, and names its parts where the pipeline names no others.
    fn generate(
        &mut self,
        recipe: &Path,
        pipeline: &Pipeline,
        directory: &Path,
        log: &Log,
    ) -> Result<(), Error> {
        let generated = generate(recipe, pipeline.seed, directory)?;
        log.say(format!(
            "generated {} documents, {} held-out documents and {} traces in {}",
            generated.counts.train,
            generated.counts.heldout,
            generated.counts.traces,
            directory.display()
        ));
        let with = |path: PathBuf| CorpusConfig {
            source: path.display().to_string(),
            text_column: "text".into(),
            id_column: Some("id".into()),
            ..self.corpus.clone()
        };
        let held_out = with(PathBuf::new()).untouched(generated.heldout.display().to_string());
        if pipeline.tasks.source.is_none() {
            self.tasks = with(generated.tasks);
        }
        self.corpus = with(generated.train);
        self.held_out = self.held_out.take().or_else(|| pipeline.eval.is_some().then_some(held_out));
        self.traces.get_or_insert(generated.traces.display().to_string());
        self.clean_traces.get_or_insert(generated.clean_traces.display().to_string());
        Ok(())
    }
}

/// What is not named otherwise is kept clear of the held-out text.
fn protect(settings: &mut Option<Decontamination>, held_out: Option<&CorpusConfig>) -> Result<(), Error> {
    let Some(settings) = settings.as_mut().filter(|settings| settings.source.is_none()) else {
        return Ok(());
    };
    let Some(held_out) = held_out else {
        return Err(PipelineError::Missing {
            message: "there is no held-out text to keep the corpus clear of".into(),
            hint: "set corpus.decontaminate.source or eval.source".into(),
        }
        .into());
    };
    settings.source = Some(held_out.source.clone());
    settings.text_column.get_or_insert(held_out.text_column.clone());
    Ok(())
}

/// Tokenizer, special tokens and prompt template.
pub struct Vocabulary {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// End and start tokens.
    pub special: SpecialTokens,
    /// Prompt template.
    pub template: PromptTemplate,
}

impl Vocabulary {
    /// Loads the tokenizer of a pipeline, or the one that the run trained in `directory`; trains
    /// it first where needed.
    ///
    /// # Errors
    /// When it cannot be loaded or trained.
    pub fn open(
        pipeline: &Pipeline,
        corpus: &CorpusConfig,
        directory: &Path,
        log: &Log,
    ) -> Result<Self, Error> {
        let trained = directory.join("tokenizer.json");
        let path = match (&pipeline.tokenizer.train, &pipeline.tokenizer.path, &pipeline.model.path) {
            (Some(settings), _, _) => {
                if !trained.exists() {
                    let documents = last_documents(corpus, settings.documents)?;
                    log.say(format!("training a tokenizer of {} ids", settings.vocab_size));
                    let tokenizer = train_byte_level_bpe(documents.into_iter(), settings.vocab_size)?;
                    let special = SpecialTokens::resolve(&tokenizer, &pipeline.tokenizer)?;
                    std::fs::create_dir_all(directory).map_err(PipelineError::io(directory))?;
                    tokenizer.save(directory, &special)?;
                }
                trained
            }
            (None, Some(path), _) => path.clone(),
            (None, None, Some(model)) => model.join("tokenizer.json"),
            (None, None, None) => trained,
        };
        let tokenizer = Tokenizer::load(&path)?;
        let special = SpecialTokens::resolve(&tokenizer, &pipeline.tokenizer)?;
        let template = PromptTemplate::resolve(pipeline.tasks.template, &tokenizer, &special)?;
        Ok(Self { tokenizer, special, template })
    }

    /// Fingerprints that task shards must carry.
    pub fn fingerprints(&self) -> Fingerprints {
        Fingerprints::of(&self.tokenizer, &self.template)
    }
}

/// The texts of the last documents of a corpus: one pass, the last `count` kept.
fn last_documents(corpus: &CorpusConfig, count: usize) -> Result<Vec<String>, Error> {
    let mut last = std::collections::VecDeque::with_capacity(count.min(1 << 16));
    for document in Corpus::open(corpus)?.documents() {
        if last.len() == count.max(1) {
            last.pop_front();
        }
        last.push_back(document?.text);
    }
    Ok(last.into())
}

/// The decoder that a run starts from: loaded, or from scratch.
///
/// # Errors
/// When it cannot be loaded, or tokenizer and model do not fit.
pub(super) fn initial_decoder(pipeline: &Pipeline, vocabulary: &Vocabulary) -> Result<Decoder, Error> {
    let decoder = match (&pipeline.model.path, &pipeline.model.scratch) {
        (Some(path), _) => load_base(pipeline, path)?,
        (None, Some(scratch)) => {
            let dtype = pipeline.model.dtype.unwrap_or_default();
            let vocabulary = vocabulary.tokenizer.vocab_size();
            Decoder::from_scratch(scratch, dtype, vocabulary, pipeline.seed)
                .with_products(pipeline.model.products)?
        }
        (None, None) => {
            return Err(PipelineError::Missing {
                message: "the pipeline names no model".into(),
                hint: "set model.path or [model.scratch]".into(),
            }
            .into());
        }
    };
    vocabulary.tokenizer.check_vocabulary(decoder.config().vocab_size)?;
    let template = &vocabulary.template;
    check_lengths(pipeline, decoder.config(), template.header.len() + template.footer.len())?;
    Ok(decoder)
}

/// The model that a pipeline names, with a new adapter where it trains one.
///
/// # Errors
/// When model or adapter cannot be loaded.
pub(super) fn load_base(pipeline: &Pipeline, path: &Path) -> Result<Decoder, Error> {
    let decoder = Decoder::load_as(path, pipeline.model.dtype)?.with_products(pipeline.model.products)?;
    let Some(lora) = &pipeline.model.lora else { return Ok(decoder) };
    if let Some(adapter) = &lora.path {
        return Ok(decoder.with_adapter_of(adapter)?);
    }
    let shape = LoraShape { rank: lora.rank, alpha: lora.alpha, modules: lora.target_modules.clone() };
    Ok(decoder.with_adapter(shape, pipeline.seed)?)
}

/// Positions of the model, without loading it.
///
/// # Errors
/// When its config.json cannot be read.
pub(super) fn max_positions(pipeline: &Pipeline) -> Result<usize, Error> {
    let scratch = pipeline.model.scratch.as_ref().map_or(0, |scratch| scratch.max_position_embeddings);
    let Some(path) = &pipeline.model.path else { return Ok(scratch) };
    Ok(DecoderConfig::load(path)?.max_positions)
}

/// Prompts with their replies, and pieces of pre-training documents, must fit the model's positions.
/// `template_tokens` are those of header and footer.
///
/// # Errors
/// When they do not.
pub(super) fn check_lengths(
    pipeline: &Pipeline,
    config: &DecoderConfig,
    template_tokens: usize,
) -> Result<(), Error> {
    let limit = config.max_positions;
    let refuse =
        |message: String, hint: &str| Err(PipelineError::Missing { message, hint: hint.into() }.into());
    let piece = pipeline.pretrain.as_ref().and_then(|pretrain| pretrain.max_document_tokens).unwrap_or(0);
    if piece + 1 > limit {
        return refuse(
            format!(
                "pretrain.max_document_tokens ({piece}) and a start token do not fit the model's {limit} positions"
            ),
            "lower pretrain.max_document_tokens, or use a model with more positions",
        );
    }
    let replies = pipeline.train.is_some() || (pipeline.eval.is_some() && pipeline.cold_start.is_some());
    let reply = if replies { pipeline.rollout.max_new_tokens } else { 0 };
    let document = pipeline.tasks.max_document_tokens;
    if document + reply + template_tokens > limit {
        return refuse(
            format!(
                "tasks.max_document_tokens ({document}) + rollout.max_new_tokens ({reply}) + {template_tokens} tokens of \
                 the prompt template do not fit the model's {limit} positions"
            ),
            "lower one of the first two, or use a model with more positions",
        );
    }
    Ok(())
}

/// Traces with the labels that they cover.
///
/// # Errors
/// When they cannot be read.
pub(super) fn load_traces(source: &str) -> Result<(Vec<Trace>, BTreeSet<String>), Error> {
    let traces = read_traces(source)?;
    let covered = traces.iter().filter_map(|trace| trace.label.clone()).collect();
    Ok((traces, covered))
}

/// Writes a JSON value atomically.
///
/// # Errors
/// When the file cannot be written.
pub(super) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value)
        .map_err(|error| PipelineError::Malformed { path: path.to_path_buf(), message: error.to_string() })?;
    Ok(atomic_write(path, format!("{text}\n").as_bytes())?)
}

/// Reads a JSON value; `None` when the file does not exist.
///
/// # Errors
/// When it cannot be read or parsed.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(PipelineError::io(path)(error).into()),
    };
    let malformed = |error: serde_json::Error| PipelineError::Malformed {
        path: path.to_path_buf(),
        message: error.to_string(),
    };
    Ok(Some(serde_json::from_str(&text).map_err(malformed)?))
}

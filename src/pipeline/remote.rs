//! What a pipeline names on the Hugging Face Hub, as it lies on this machine.
//!
//! A run resolves a name to a commit once, when it begins, and notes it in inputs.json: what the Hub
//! calls by that name later does not change the run, and the cache alone is enough to go on.

use super::materials::read_json;
use super::run::Paths;
use crate::config::Pipeline;
use crate::error::Error;
use crate::hub::{Hub, HubReference, HubSettings, RepositoryKind, Selection, is_remote};
use crate::report::Log;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

/// Commits by reference.
pub(super) type Commits = BTreeMap<String, String>;

/// Which inputs are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// All of them: for a run.
    Everything,
    /// The model that a run starts from, and its tokenizer.
    Model,
    /// The tokenizer.
    Tokenizer,
    /// The model's shape: for a plan.
    Shape,
}

/// A pipeline without references: those in scope are replaced by local paths.
pub(super) struct Local {
    pub(super) pipeline: Pipeline,
    /// What the references were resolved to.
    pub(super) commits: Commits,
}

/// The commits that a run began with.
///
/// # Errors
/// When inputs.json cannot be read.
pub(super) fn commits_of(paths: &Paths) -> Result<Commits, Error> {
    let mut inputs: Commits = read_json(&paths.inputs())?.unwrap_or_default();
    inputs.retain(|name, _| is_remote(name));
    Ok(inputs)
}

/// Downloads what a pipeline names on the Hub, at the commits that are known already, and says which
/// commit each is.
///
/// # Errors
/// When something is neither in the cache nor can be downloaded.
pub(super) fn localize(
    pipeline: &Pipeline,
    scope: Scope,
    commits: Commits,
    log: &Log,
    interrupt: Option<&AtomicBool>,
) -> Result<Local, Error> {
    let mut localizer = Localizer { commits, log, interrupt };
    let mut local = pipeline.clone();
    let model = match scope {
        Scope::Everything | Scope::Model => Selection::Model,
        Scope::Tokenizer => Selection::Tokenizer,
        Scope::Shape => Selection::Configuration,
    };
    if scope != Scope::Tokenizer || local.tokenizer.path.is_none() {
        localizer.directory(&mut local.model.path, model)?;
    }
    localizer.tokenizer(&mut local.tokenizer.path)?;
    if scope == Scope::Everything {
        localizer.directory(&mut local.tasks.proxy, Selection::Model)?;
        localizer.directory(&mut local.tasks.larger_proxy, Selection::Model)?;
        localizer.source(Some(&mut local.corpus.source))?;
        for part in local.corpus.mixture.values_mut() {
            localizer.source(Some(&mut part.source))?;
        }
        let protected = local.corpus.decontaminate.as_mut();
        localizer.source(protected.and_then(|settings| settings.source.as_mut()))?;
        localizer.source(local.tasks.source.as_mut())?;
        localizer.source(local.cold_start.as_mut().and_then(|stage| stage.source.as_mut()))?;
        localizer.source(local.eval.as_mut().and_then(|eval| eval.source.as_mut()))?;
    }
    Ok(Local { pipeline: local, commits: localizer.commits })
}

struct Localizer<'a> {
    commits: Commits,
    log: &'a Log,
    interrupt: Option<&'a AtomicBool>,
}

impl Localizer<'_> {
    fn directory(&mut self, path: &mut Option<PathBuf>, selection: Selection) -> Result<(), Error> {
        if let Some(text) = path.as_deref().and_then(Path::to_str).filter(|text| is_remote(text)) {
            let reference = HubReference::parse(text)?.expect_kind(RepositoryKind::Model)?;
            *path = Some(self.fetch(&reference, selection)?);
        }
        Ok(())
    }

    /// The tokenizer.json of a model.
    fn tokenizer(&mut self, path: &mut Option<PathBuf>) -> Result<(), Error> {
        let remote = path.as_deref().and_then(Path::to_str).is_some_and(is_remote);
        self.directory(path, Selection::Tokenizer)?;
        if let Some(directory) = path.as_mut().filter(|_| remote) {
            directory.push("tokenizer.json");
        }
        Ok(())
    }

    fn source(&mut self, source: Option<&mut String>) -> Result<(), Error> {
        let Some(source) = source.filter(|source| is_remote(source)) else { return Ok(()) };
        let reference = HubReference::parse(source)?.expect_kind(RepositoryKind::Dataset)?;
        let directory = self.fetch(&reference, Selection::Dataset)?;
        *source = reference.below(&directory).display().to_string();
        Ok(())
    }

    fn fetch(&mut self, reference: &HubReference, selection: Selection) -> Result<PathBuf, Error> {
        let say = |line: &str| self.log.say(line);
        let hub = Hub { settings: HubSettings::from_env()?, say: &say, interrupt: self.interrupt };
        let snapshot = match self.commits.get(&reference.key()) {
            Some(commit) => hub.fetch(&reference.at(commit), selection)?,
            None => hub.fetch(reference, selection)?,
        };
        self.commits.insert(reference.key(), snapshot.commit);
        Ok(snapshot.directory)
    }
}

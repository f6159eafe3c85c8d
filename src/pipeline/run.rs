//! A run: its directory, its identity, its lock, and what all stages share.

use super::error::PipelineError;
use super::materials::{Sources, Vocabulary, read_json, write_json};
use super::remote::{Commits, Local, Scope, commits_of, localize};
use super::stage::has_successors;
use crate::checkpoint::{CheckpointError, RunLock, atomic_write};
use crate::config::{CorpusConfig, Loaded, Pipeline};
use crate::corpus::Corpus;
use crate::error::Error;
use crate::model::DeviceSettings;
use crate::report::{Log, MetricsLog};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Name of the resolved pipeline inside a run directory.
pub(super) const PIPELINE_FILE: &str = "pipeline.toml";

/// Places inside a run directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths(pub PathBuf);

impl Paths {
    /// The resolved pipeline.
    pub fn pipeline(&self) -> PathBuf {
        self.0.join(PIPELINE_FILE)
    }
    /// A generated corpus.
    pub fn corpus(&self) -> PathBuf {
        self.0.join("corpus")
    }
    /// A trained tokenizer.
    pub fn tokenizer(&self) -> PathBuf {
        self.0.join("tokenizer")
    }
    /// Task shards: `train` or `eval`.
    pub fn tasks(&self, split: &str) -> PathBuf {
        self.0.join("tasks").join(split)
    }
    /// Which documents repeat an earlier one.
    pub fn duplicates(&self) -> PathBuf {
        self.0.join("duplicates")
    }
    /// Checkpoints of a stage.
    pub fn checkpoints(&self, stage: &str) -> PathBuf {
        self.0.join("checkpoints").join(stage)
    }
    /// The result of one evaluation.
    pub fn evaluation(&self, name: &str) -> PathBuf {
        self.0.join("eval").join(format!("{name}.json"))
    }
    /// The rollout log.
    pub fn rollouts(&self) -> PathBuf {
        self.0.join("rollouts")
    }
    /// The metrics log.
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }
    /// The ledger.
    pub fn ledger(&self) -> PathBuf {
        self.0.join("ledger.jsonl")
    }
    /// The summary, written last.
    pub fn summary(&self) -> PathBuf {
        self.0.join("summary.json")
    }
    /// Digests of what is read, and commits of what is read from the Hub.
    pub fn inputs(&self) -> PathBuf {
        self.0.join("inputs.json")
    }
    /// Logs of each attempt.
    pub fn logs(&self) -> PathBuf {
        self.0.join("logs")
    }
}

/// What all stages of a run share.
pub struct Run {
    /// The resolved pipeline.
    pub pipeline: Pipeline,
    /// The same with local paths where it names things on the Hub: where inputs are opened from.
    pub local: Pipeline,
    /// The run directory.
    pub paths: Paths,
    /// Says things on stderr and in the attempt's log file.
    pub log: Log,
    /// Corpora.
    pub sources: Sources,
    /// Tokenizer and template.
    pub vocabulary: Vocabulary,
    /// Digest of the pipeline; every checkpoint carries it.
    pub identity: String,
    /// The device that models compute on, if not the CPU.
    pub device: Option<DeviceSettings>,
    interrupt: Arc<AtomicBool>,
    _lock: RunLock,
}

impl Run {
    /// Claims a run directory (new, or of the same pipeline) and opens what all stages read.
    ///
    /// # Errors
    /// When the directory belongs to another pipeline, another process or something else, or
    /// corpus or tokenizer cannot be opened.
    pub fn open(loaded: &Loaded, directory: PathBuf, interrupt: &Arc<AtomicBool>) -> Result<Self, Error> {
        Self::open_with(loaded, directory, interrupt, RunLock::acquire)
    }

    /// The same beside other processes that do so: for workers that build units of tasks.
    ///
    /// # Errors
    /// As [`Run::open`].
    pub fn open_shared(
        loaded: &Loaded,
        directory: PathBuf,
        interrupt: &Arc<AtomicBool>,
    ) -> Result<Self, Error> {
        Self::open_with(loaded, directory, interrupt, RunLock::share)
    }

    fn open_with(
        loaded: &Loaded,
        directory: PathBuf,
        interrupt: &Arc<AtomicBool>,
        lock: fn(&Path) -> Result<RunLock, CheckpointError>,
    ) -> Result<Self, Error> {
        let pipeline = loaded.pipeline.clone();
        let device = DeviceSettings::open(pipeline.model.device, pipeline.model.batch_invariant)?;
        let paths = Paths(directory);
        let text = resolved_text(&pipeline)?;
        claim(&paths, &text)?;
        let lock = lock(&paths.0)?;
        if !paths.pipeline().exists() {
            atomic_write(&paths.pipeline(), text.as_bytes())?;
        }
        let log = Log::open(&paths.logs())?;
        log.say(format!("run directory {}", paths.0.display()));
        let Local { pipeline: local, commits } =
            localize(&pipeline, Scope::Everything, commits_of(&paths)?, &log, Some(interrupt))?;
        let sources = Sources::resolve(&local, &paths.corpus(), &log)?;
        check_inputs(&paths, &digests(&local, &sources)?, &commits)?;
        let vocabulary = Vocabulary::open(&local, &sources.corpus, &paths.tokenizer(), &log)?;
        let identity = blake3::hash(text.as_bytes()).to_hex().to_string();
        Ok(Self {
            pipeline,
            local,
            paths,
            log,
            sources,
            vocabulary,
            identity,
            device,
            interrupt: interrupt.clone(),
            _lock: lock,
        })
    }

    /// Whether a signal asked for a stop.
    pub fn interrupted(&self) -> bool {
        self.interrupt.load(Ordering::Relaxed)
    }

    /// Stops the run if a signal asked for it; `place` says after what.
    ///
    /// # Errors
    /// [`PipelineError::Interrupted`].
    pub fn check_interrupt(&self, place: impl FnOnce() -> String) -> Result<(), Error> {
        if self.interrupted() { Err(PipelineError::Interrupted { place: place() }.into()) } else { Ok(()) }
    }

    /// The metrics log, cut to what a stage's checkpoint knows of.
    ///
    /// A stage that runs again for the sake of a damaged checkpoint while later ones have begun
    /// writes to a log of its own: the run's log holds its lines and those of its successors.
    ///
    /// # Errors
    /// When it cannot be opened, or is shorter than the checkpoint says.
    pub fn metrics_at(&self, stage: &str, bytes: u64) -> Result<MetricsLog, Error> {
        if has_successors(&self.paths, stage) {
            self.log.warn(format!("stage {stage} is made again; later stages stay as they are"));
            return Ok(MetricsLog::open(&self.paths.logs().join(format!("{stage}-again.jsonl")), 0)?);
        }
        let metrics = MetricsLog::open(&self.paths.metrics(), bytes)?;
        if metrics.dropped_lines() > 0 {
            self.log.say(format!(
                "{} lines of metrics after the last checkpoint are written again",
                metrics.dropped_lines()
            ));
        }
        Ok(metrics)
    }
}

/// The resolved pipeline as TOML.
///
/// # Errors
/// When it cannot be written as TOML.
pub(super) fn resolved_text(pipeline: &Pipeline) -> Result<String, Error> {
    let malformed = |error: toml::ser::Error| PipelineError::Malformed {
        path: PIPELINE_FILE.into(),
        message: error.to_string(),
    };
    Ok(toml::to_string(pipeline).map_err(malformed)?)
}

/// Digests of everything that a run reads, by role: all are opened here, before anything is spent.
/// Each comes with its place, which may change when a run directory is moved.
fn digests(
    pipeline: &Pipeline,
    sources: &Sources,
) -> Result<BTreeMap<&'static str, (String, String)>, Error> {
    let of_traces = |source: &String| {
        let text_column = "text".into();
        CorpusConfig { text_column, id_column: None, ..pipeline.corpus.untouched(source.clone()) }
    };
    let cold_start = pipeline.cold_start.is_some();
    let traces = sources.traces.as_ref().filter(|_| cold_start).map(of_traces);
    let clean_traces = sources.clean_traces.as_ref().filter(|_| cold_start).map(of_traces);
    let texts = [
        ("corpus", Some(sources.corpus.clone())),
        ("tasks", Some(sources.tasks.clone())),
        ("held_out", sources.held_out.clone()),
        ("traces", traces),
        ("clean_traces", clean_traces),
    ];
    let mut digests = BTreeMap::new();
    for (role, text) in texts.into_iter().filter_map(|(role, text)| Some((role, text?))) {
        let digest = Corpus::open(&text)?.fingerprint()?;
        digests.insert(role, (digest, text.place()));
    }
    let models = [
        ("model", &pipeline.model.path),
        ("proxy", &pipeline.tasks.proxy),
        ("larger_proxy", &pipeline.tasks.larger_proxy),
    ];
    for (role, model) in models {
        if let Some(model) = model {
            digests.insert(role, (crate::model::directory_digest(model)?, model.display().to_string()));
        }
    }
    if let Some(adapter) = pipeline.model.lora.as_ref().and_then(|lora| lora.path.as_ref()) {
        digests.insert("adapter", (adapter_digest(adapter)?, adapter.display().to_string()));
    }
    Ok(digests)
}

/// Digest of a PEFT directory.
fn adapter_digest(directory: &Path) -> Result<String, Error> {
    let mut hasher = blake3::Hasher::new();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let path = directory.join(name);
        hasher.update(&std::fs::read(&path).map_err(PipelineError::io(&path))?);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// What a run reads must be what it began with: cursors, counts and weights belong to it.
fn check_inputs(
    paths: &Paths,
    now: &BTreeMap<&'static str, (String, String)>,
    commits: &Commits,
) -> Result<(), Error> {
    let Some(then) = read_json::<BTreeMap<String, String>>(&paths.inputs())? else {
        let digests = now.iter().map(|(role, (digest, _))| (*role, digest));
        let commits = commits.iter().map(|(reference, commit)| (reference.as_str(), commit));
        return write_json(&paths.inputs(), &digests.chain(commits).collect::<BTreeMap<_, _>>());
    };
    match now.iter().find(|(role, (digest, _))| then.get(**role) != Some(digest)) {
        Some((_, (_, place))) => Err(PipelineError::InputChanged { name: place.clone() }.into()),
        None => Ok(()),
    }
}

/// Creates the directory, or checks that it holds a run of the same pipeline.
fn claim(paths: &Paths, text: &str) -> Result<(), Error> {
    let directory = &paths.0;
    std::fs::create_dir_all(directory).map_err(PipelineError::io(directory))?;
    let read = || std::fs::read_to_string(paths.pipeline()).ok();
    let mut found = read();
    if found.is_none() && holds_files(directory) {
        // Another worker may have begun the run meanwhile; its pipeline is the first file that it writes.
        found = read();
        if found.is_none() {
            return Err(PipelineError::NotARun { directory: directory.clone() }.into());
        }
    }
    match found {
        Some(found) if found != text => {
            let differences = differences(&found, text);
            Err(PipelineError::ForeignRun { directory: directory.clone(), differences }.into())
        }
        _ => Ok(()),
    }
}

/// Whether there is anything but hidden files (locks, temporary names of a crashed start).
fn holds_files(directory: &Path) -> bool {
    std::fs::read_dir(directory).is_ok_and(|entries| {
        entries.filter_map(Result::ok).any(|entry| !entry.file_name().to_string_lossy().starts_with('.'))
    })
}

/// The first lines that two resolved pipelines do not share.
fn differences(found: &str, wanted: &str) -> String {
    let parse = |text: &str| toml::from_str::<toml::Table>(text).unwrap_or_default();
    let mut lines = Vec::new();
    compare("", &parse(found), &parse(wanted), &mut lines);
    let more = if lines.len() > 3 { format!(" and {} more", lines.len() - 3) } else { String::new() };
    lines.truncate(3);
    if lines.is_empty() { "its pipeline.toml was changed".into() } else { lines.join(", ") + &more }
}

fn compare(prefix: &str, found: &toml::Table, wanted: &toml::Table, lines: &mut Vec<String>) {
    let keys: std::collections::BTreeSet<&String> = found.keys().chain(wanted.keys()).collect();
    for key in keys {
        let name = format!("{prefix}{key}");
        match (found.get(key), wanted.get(key)) {
            (Some(toml::Value::Table(a)), Some(toml::Value::Table(b))) => {
                compare(&format!("{name}."), a, b, lines);
            }
            (a, b) if a == b => {}
            (a, b) => {
                let show = |value: Option<&toml::Value>| value.map_or("absent".into(), ToString::to_string);
                lines.push(format!("{name} is {} there and {} here", show(a), show(b)));
            }
        }
    }
}

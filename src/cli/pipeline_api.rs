//! What the commands use of the pipeline room.
#![allow(dead_code, reason = "stands in for `rpt::pipeline` until it is there")]

use rpt::config::{ConfigError, Loaded, Pipeline};
use rpt::model::Decoder;
use rpt::tokenize::{SpecialTokens, Tokenizer};
use rpt::{Error, Result};
use serde::Serialize;
use serde_json::Value;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Exit code of a library error.
pub(crate) fn exit_code(error: &Error) -> u8 {
    if matches!(error, Error::Config(_)) { 2 } else { 1 }
}

/// How far a run goes.
#[derive(Clone, Copy)]
pub(crate) enum Until {
    Tasks,
    Train,
    End,
}

/// Where and how far a pipeline runs.
pub(crate) struct RunOptions {
    pub(crate) out: Option<PathBuf>,
    pub(crate) until: Until,
}

/// What became of a run.
pub(crate) enum RunOutcome {
    Finished(PathBuf),
    AlreadyFinished(PathBuf),
}

#[derive(Serialize)]
pub(crate) enum Plan {}

impl fmt::Display for Plan {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {}
    }
}

#[derive(Serialize)]
pub(crate) enum VerifyReport {}

impl VerifyReport {
    pub(crate) fn intact(&self) -> bool {
        match *self {}
    }
}

pub(crate) enum RunDirectory {}

impl RunDirectory {
    pub(crate) fn open(_: &Path) -> Result<Self> {
        Err(absent())
    }
    pub(crate) fn pipeline(&self) -> &Pipeline {
        match *self {}
    }
    pub(crate) fn path(&self) -> &Path {
        match *self {}
    }
    pub(crate) fn tokenizer(&self) -> Result<(Tokenizer, SpecialTokens)> {
        match *self {}
    }
    pub(crate) fn decoder(&self, _: Option<&str>) -> Result<Decoder> {
        match *self {}
    }
    pub(crate) fn evaluate(&self, _: Option<&Path>, _: Option<&str>) -> Result<Value> {
        match *self {}
    }
    pub(crate) fn write_report(&self) -> Result<PathBuf> {
        match *self {}
    }
    pub(crate) fn verify(&self) -> Result<VerifyReport> {
        match *self {}
    }
}

pub(crate) fn run(_: &Loaded, _: &RunOptions, _: &Arc<AtomicBool>) -> Result<RunOutcome> {
    Err(absent())
}

pub(crate) fn plan(_: &Loaded) -> Result<Plan> {
    Err(absent())
}

fn absent() -> Error {
    ConfigError::Invalid {
        key: "rpt",
        message: "this build lacks the pipeline".into(),
        hint: "use a complete build".into(),
    }
    .into()
}

//! How a failure is said: what failed, why, and a hint on a line of its own.

use super::output;
use std::error::Error;
use std::fmt::Write;
use std::io::ErrorKind;

/// Exit code of a failure.
const FAILURE: u8 = 1;
/// Exit code of a command that was used wrongly.
pub(super) const USAGE: u8 = 2;

/// A command was asked for something that it cannot do.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(super) struct Usage {
    message: String,
    hint: String,
}

impl Usage {
    pub(super) fn new(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { message: message.into(), hint: hint.into() }
    }
}

/// A check found damage; its report is printed already.
#[derive(Debug, thiserror::Error)]
#[error("{0} is damaged")]
pub(super) struct Damaged(pub(super) String);

/// Writes an error to standard error; returns its exit code.
pub(super) fn say(error: &anyhow::Error) -> u8 {
    output::note(&render(error));
    error.chain().find_map(exit_code).unwrap_or(FAILURE)
}

fn render(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}");
    for cause in error.chain().skip(1).map(ToString::to_string) {
        // Messages of the library name their cause already.
        if !text.contains(&cause) {
            // Writing to a string cannot fail.
            let _ = write!(text, "\n  because: {cause}");
        }
    }
    if let Some(hint) = error.chain().find_map(hint) {
        let _ = write!(text, "\nhint: {hint}");
    }
    text
}

fn exit_code(cause: &(dyn Error + 'static)) -> Option<u8> {
    if cause.is::<Usage>() {
        return Some(USAGE);
    }
    cause.downcast_ref().map(rpt::Error::exit_code)
}

fn hint(cause: &(dyn Error + 'static)) -> Option<String> {
    if let Some(usage) = cause.downcast_ref::<Usage>() {
        return Some(usage.hint.clone());
    }
    if cause.is::<Damaged>() {
        return Some("`rpt run` goes on from the newest checkpoint that is intact".into());
    }
    match cause.downcast_ref::<rpt::Error>() {
        Some(error) => error.hint().or_else(|| matches!(error, rpt::Error::Config(_)).then(schema_hint)),
        None => cause.downcast_ref::<std::io::Error>().and_then(|error| system_hint(error.kind())),
    }
}

fn schema_hint() -> String {
    "`rpt schema` prints every key with its type and meaning".into()
}

fn system_hint(kind: ErrorKind) -> Option<String> {
    let advice = match kind {
        ErrorKind::NotFound => "check the path",
        ErrorKind::PermissionDenied => "check the permissions of the path",
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "the disk or quota is full: free some space and run the same command again"
        }
        ErrorKind::InvalidData => "text must be UTF-8",
        _ => return None,
    };
    Some(advice.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;
    use rpt::config::ConfigError;

    #[test]
    fn causes_are_named_once_and_the_hint_comes_last() {
        let cause = std::io::Error::from(ErrorKind::StorageFull);
        let error = Err::<(), _>(cause).context("cannot write x").unwrap_err();
        let text = render(&error);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "error: cannot write x");
        assert!(lines[1].starts_with("  because: "), "{text}");
        assert!(lines[2].starts_with("hint: ") && lines.len() == 3, "{text}");

        let source = std::io::Error::from(ErrorKind::NotFound);
        let error = rpt::Error::from(ConfigError::Read { path: "p.toml".into(), source });
        assert!(!render(&error.into()).contains("because"));
    }

    #[test]
    fn refused_pipelines_and_wrong_usage_exit_with_2_and_always_have_a_hint() {
        let parse = ConfigError::Parse { place: "p.toml:1".into(), message: "no".into(), hint: None };
        for error in [anyhow::Error::from(rpt::Error::from(parse)), Usage::new("no", "yes").into()] {
            assert_eq!(error.chain().find_map(exit_code), Some(USAGE));
            assert!(render(&error).contains("\nhint: "));
        }
    }
}

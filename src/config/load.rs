//! Reading a pipeline file: TOML text, `--set` overrides, suggestions for misspelt keys.

use super::Pipeline;
use std::path::{Path, PathBuf};

/// Why a pipeline file was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read pipeline file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is not TOML, or a key or value does not fit the schema.
    #[error("{place}: {message}")]
    Parse {
        /// File, and line where known.
        place: String,
        /// What is wrong.
        message: String,
        /// A suggestion.
        hint: Option<String>,
    },
    /// A `--set` argument is not `key=value`.
    #[error("--set {argument}: {message}")]
    Override {
        /// The argument.
        argument: String,
        /// What is wrong.
        message: String,
    },
    /// The values do not work together.
    #[error("{key}: {message}")]
    Invalid {
        /// Dotted name of the key.
        key: &'static str,
        /// What is wrong.
        message: String,
        /// What to do about it.
        hint: String,
    },
}

impl ConfigError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Read { .. } => {
                Some("give the path of a pipeline file, for example pipelines/quickstart.toml".into())
            }
            Self::Parse { hint, .. } => hint.clone(),
            Self::Override { .. } => {
                Some("write --set section.key=value, for example --set train.steps=10".into())
            }
            Self::Invalid { hint, .. } => Some(hint.clone()),
        }
    }
}

/// A pipeline together with the text that defines it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The typed pipeline, validated.
    pub pipeline: Pipeline,
    /// Name of the run: the file's stem.
    pub name: String,
}

/// Reads, overrides and validates a pipeline file.
///
/// # Errors
/// When the file cannot be read, is not TOML, has unknown keys or wrong types, or when its values
/// contradict each other.
pub fn load(path: &Path, overrides: &[String]) -> Result<Loaded, ConfigError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
    let pipeline = parse(&text, &path.display().to_string(), overrides)?;
    let name = path.file_stem().map_or_else(|| "run".into(), |stem| stem.to_string_lossy().into_owned());
    Ok(Loaded { pipeline, name })
}

/// Parses and validates pipeline text; `place` names it in messages.
///
/// # Errors
/// As [`load`], less reading.
pub fn parse(text: &str, place: &str, overrides: &[String]) -> Result<Pipeline, ConfigError> {
    let pipeline = if overrides.is_empty() {
        toml::from_str(text).map_err(|error| parse_error(&error, text, place))?
    } else {
        let mut table: toml::Table =
            toml::from_str(text).map_err(|error| parse_error(&error, text, place))?;
        for argument in overrides {
            apply_override(&mut table, argument)?;
        }
        let merged = toml::to_string(&table).map_err(|error| ConfigError::Parse {
            place: place.into(),
            message: error.to_string(),
            hint: None,
        })?;
        let place = format!("{place} with --set {}", overrides.join(" --set "));
        toml::from_str(&merged).map_err(|error| parse_error(&error, &merged, &place))?
    };
    let pipeline: Pipeline = pipeline;
    pipeline.validate()?;
    Ok(pipeline)
}

fn parse_error(error: &toml::de::Error, text: &str, place: &str) -> ConfigError {
    let line = error.span().map(|span| 1 + text[..span.start.min(text.len())].matches('\n').count());
    let place = line.map_or_else(|| place.to_string(), |line| format!("{place}:{line}"));
    let message = error.message().replace('\n', " ");
    let hint = suggestion(&message);
    ConfigError::Parse { place, message, hint }
}

/// From serde's message about an unknown field or variant: the nearest of the expected names.
fn suggestion(message: &str) -> Option<String> {
    let quoted: Vec<&str> = message.split('`').skip(1).step_by(2).collect();
    if !message.starts_with("unknown ") {
        return message.starts_with("missing field").then(|| "add the key to the section".to_string());
    }
    let (wrong, known) = quoted.split_first()?;
    let nearest = known
        .iter()
        .map(|name| (strsim::jaro_winkler(wrong, name), name))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(similarity, _)| *similarity > 0.7);
    Some(match nearest {
        Some((_, name)) => format!("did you mean `{name}`?"),
        None => format!("known names: {}", known.join(", ")),
    })
}

fn apply_override(table: &mut toml::Table, argument: &str) -> Result<(), ConfigError> {
    let fail = |message: &str| ConfigError::Override { argument: argument.into(), message: message.into() };
    let (key, value) = argument.split_once('=').ok_or_else(|| fail("no `=`"))?;
    let parts: Vec<&str> = key.trim().split('.').collect();
    if parts.iter().any(|part| part.is_empty()) {
        return Err(fail("empty key"));
    }
    let (last, sections) = parts.split_last().ok_or_else(|| fail("empty key"))?;
    let mut at = table;
    for section in sections {
        let entry = at.entry((*section).to_string()).or_insert_with(|| toml::Table::new().into());
        at = entry.as_table_mut().ok_or_else(|| fail("the key before the dot is not a section"))?;
    }
    at.insert((*last).to_string(), override_value(value.trim()));
    Ok(())
}

/// The text as a TOML value, or as a string where it is not one.
fn override_value(text: &str) -> toml::Value {
    toml::from_str::<toml::Table>(&format!("value = {text}"))
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| toml::Value::String(text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = "[corpus]\nsource = \"x\"\n[model]\npath = \"m\"\n[train]\nsteps = 3\n";

    #[test]
    fn unknown_keys_name_the_nearest_known_one() {
        let error = parse(&MINIMAL.replace("steps", "stpes"), "p.toml", &[]).unwrap_err();
        assert!(error.to_string().starts_with("p.toml:6: unknown field `stpes`"), "{error}");
        assert_eq!(error.hint().unwrap(), "did you mean `steps`?");
    }

    #[test]
    fn wrong_types_name_the_line() {
        let error = parse(&MINIMAL.replace('3', "\"three\""), "p.toml", &[]).unwrap_err();
        assert!(error.to_string().contains("p.toml:6: invalid type"), "{error}");
    }

    #[test]
    fn overrides_replace_and_add_values() {
        let sets = ["train.steps=7", "rollout.temperature=0.5", "corpus.source=some/dir"].map(String::from);
        let pipeline = parse(MINIMAL, "p.toml", &sets).unwrap();
        assert_eq!(pipeline.train.unwrap().steps, 7);
        assert_eq!(pipeline.rollout.temperature, 0.5);
        assert_eq!(pipeline.corpus.source, "some/dir");
        assert!(parse(MINIMAL, "p.toml", &["train.steps".into()]).is_err());
        assert!(parse(MINIMAL, "p.toml", &["seed=1".into(), "seed.x=1".into()]).is_err());
    }

    #[test]
    fn a_resolved_pipeline_survives_a_round_trip() {
        let pipeline = parse(MINIMAL, "p.toml", &[]).unwrap();
        let text = toml::to_string(&pipeline).unwrap();
        assert_eq!(parse(&text, "again", &[]).unwrap(), pipeline);
    }
}

//! Names of checkpoints and of the files in them.

use super::CheckpointError;

/// Why a directory with a hidden name exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// Being written.
    Temporary,
    /// Moved aside while its successor takes its place.
    Old,
    /// Given up by retention.
    Gone,
}

impl Role {
    fn word(self) -> &'static str {
        match self {
            Self::Temporary => "tmp",
            Self::Old => "old",
            Self::Gone => "gone",
        }
    }

    fn parse(word: &str) -> Option<Self> {
        [Self::Temporary, Self::Old, Self::Gone].into_iter().find(|role| role.word() == word)
    }
}

/// Name of a step's checkpoint.
pub(super) fn step_name(step: u64) -> String {
    format!("step-{step:06}")
}

/// The step that a directory's name says, if it is a checkpoint's.
pub(super) fn parse_step(name: &str) -> Option<u64> {
    let step = name.strip_prefix("step-")?.parse().ok()?;
    (step_name(step) == name).then_some(step)
}

/// Name of a step's directory while it is not a checkpoint, or not any more.
pub(super) fn hidden_name(step: u64, role: Role) -> String {
    format!(".{}.{}-{}", step_name(step), role.word(), std::process::id())
}

/// Step and role that a directory's name says, whichever process gave it.
pub(super) fn parse_hidden(name: &str) -> Option<(u64, Role)> {
    let (step, rest) = name.strip_prefix('.')?.split_once('.')?;
    let (role, process) = rest.split_once('-')?;
    process.parse::<u32>().ok()?;
    Some((parse_step(step)?, Role::parse(role)?))
}

/// Refuses section names that are not plain words.
pub(super) fn check_section(name: &str) -> Result<(), CheckpointError> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    let reason = if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        "a name is 1 to 64 lower-case letters, digits and underscores"
    } else if name == "manifest" {
        "this name is taken"
    } else {
        return Ok(());
    };
    Err(CheckpointError::Section { name: name.to_owned(), reason })
}

/// File of shard `number` (from 1) of a section of tensors.
pub(super) fn shard_name(section: &str, number: usize, shards: usize) -> String {
    format!("{section}-{number:05}-of-{shards:05}.safetensors")
}

/// File of a JSON section.
pub(super) fn json_name(section: &str) -> String {
    format!("{section}.json")
}

/// How many shards the section has, if the file is one of them.
pub(super) fn parse_shards(section: &str, file: &str) -> Option<usize> {
    let rest = file.strip_prefix(section)?.strip_prefix('-')?.strip_suffix(".safetensors")?;
    let (number, shards) = rest.split_once("-of-")?;
    let (number, shards) = (number.parse().ok()?, shards.parse().ok()?);
    (shard_name(section, number, shards) == file).then_some(shards)
}

/// Whether a manifest may list this file: a name, and never a path.
pub(super) fn is_plain_file(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
    !name.is_empty() && name.len() <= 255 && !name.starts_with('.') && name.chars().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back() {
        for step in [0, 7, 999_999, 1_000_000, u64::MAX] {
            assert_eq!(parse_step(&step_name(step)), Some(step));
            for role in [Role::Temporary, Role::Old, Role::Gone] {
                assert_eq!(parse_hidden(&hidden_name(step, role)), Some((step, role)));
            }
        }
        assert_eq!(parse_shards("model", &shard_name("model", 2, 3)), Some(3));
    }

    #[test]
    fn foreign_names_are_not_ours() {
        for name in ["step-1", "step-+00001", "step-0000001", "step-", "steps-000001", "step-000001.bak"] {
            assert_eq!(parse_step(name), None, "{name}");
        }
        for name in [".step-000001", ".step-000001.tmp", ".step-000001.tmp-", ".step-000001.tmp-a", ".git"] {
            assert_eq!(parse_hidden(name), None, "{name}");
        }
        for name in ["model.safetensors", "model-1-of-1.safetensors", "model_b-00001-of-00001.safetensors"] {
            assert_eq!(parse_shards("model", name), None, "{name}");
        }
    }

    #[test]
    fn only_plain_names_are_files_and_sections() {
        for name in ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\0b", "a\\b"] {
            assert!(!is_plain_file(name), "{name}");
            assert!(check_section(name).is_err(), "{name}");
        }
        assert!(check_section("manifest").is_err());
        assert!(check_section("optimizer_state2").is_ok());
    }
}

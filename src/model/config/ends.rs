//! Which tokens a model's own files say end a reply.

use super::read::{self, Reader};
use crate::model::ModelError;
use std::path::Path;

/// The ids that end a reply, main one first: those of `directory/generation_config.json` where that
/// file exists, else those of config.json, as transformers has it; empty where neither names one.
///
/// # Errors
/// When config.json is missing, or a file cannot be read or names something that is no token id.
pub fn end_token_ids(directory: &Path) -> Result<Vec<u32>, ModelError> {
    let generation = directory.join("generation_config.json");
    let path = if generation.exists() { generation } else { directory.join("config.json") };
    Reader::new(&path, &read::file(&path)?).token_ids("eos_token_id")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_id_or_several_and_the_generation_file_first() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
        let ends = || end_token_ids(directory.path());
        assert!(ends().is_err());
        for (text, expected) in [
            ("{}", vec![]),
            (r#"{"eos_token_id": null}"#, vec![]),
            (r#"{"eos_token_id": 7}"#, vec![7]),
            (r#"{"eos_token_id": [9, 7]}"#, vec![9, 7]),
        ] {
            write("config.json", text);
            assert_eq!(ends().unwrap(), expected);
        }
        write("generation_config.json", r#"{"eos_token_id": [3]}"#);
        assert_eq!(ends().unwrap(), [3]);
        write("generation_config.json", r#"{"eos_token_id": [3, -1]}"#);
        assert!(ends().unwrap_err().to_string().contains("eos_token_id"));
    }
}

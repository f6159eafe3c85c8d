//! The README.md of an exported model.

use super::{Table, table_text};
use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// What a model card says.
#[derive(Clone, Debug, Default)]
pub struct ModelCard {
    /// Name of the model.
    pub name: String,
    /// The model that training started from, if any.
    pub base: Option<String>,
    /// Lines of the base model's card that say under which terms it stands: see [`licence_of`].
    pub licence: Vec<String>,
    /// Stage and step of the checkpoint; none for an untrained model.
    pub checkpoint: Option<(String, u64)>,
    /// Number of parameters, of the adapter alone where it is one.
    pub parameters: u64,
    /// Whether this is a low-rank adapter to be put on the base model.
    pub adapter: bool,
    /// Whether its parameters are the running average of those that training went through.
    pub average: bool,
    /// Number format of the weights.
    pub dtype: &'static str,
    /// Where the training text came from.
    pub corpus: String,
    /// Evaluations.
    pub tables: Vec<Table>,
    /// The resolved pipeline file.
    pub recipe: String,
}

impl ModelCard {
    /// The card, with the metadata block that the Hugging Face Hub reads.
    pub fn to_markdown(&self) -> String {
        let library = if self.adapter { "peft" } else { "transformers" };
        let mut text = format!("---\nlibrary_name: {library}\npipeline_tag: text-generation\n");
        text.push_str("tags:\n- reinforcement-pre-training\n");
        if let Some(base) = &self.base {
            // Writing to a string cannot fail, here and below.
            let _ = writeln!(text, "base_model: {}", quoted(base));
        }
        self.licence.iter().for_each(|line| text.extend([line, "\n"]));
        let _ = writeln!(text, "---\n\n# {}\n\n{}\n", self.name, self.origin());
        let _ = writeln!(text, "Corpus: `{}`.\n", self.corpus.replace('`', "'"));
        if !self.tables.is_empty() {
            text.push_str(
                "## Evaluation\n\nMeasured at the end of the run. Controls are other models, trained for the same counted operations.\n\n",
            );
            self.tables.iter().for_each(|table| text.extend([&table_text(table), "\n"]));
        }
        let fence = "`".repeat(3 + longest_fence(&self.recipe));
        let _ = writeln!(text, "## Recipe\n\n{fence}toml\n{}\n{fence}", self.recipe.trim_end());
        text
    }

    fn origin(&self) -> String {
        let millions = self.parameters as f64 / 1e6;
        let start = self.base.as_ref().map_or("random weights".into(), |base| format!("`{base}`"));
        let stage = match &self.checkpoint {
            Some((stage, step)) if self.average => {
                format!("Running average of the parameters of stage `{stage}` up to step {step}. ")
            }
            Some((stage, step)) => format!("Checkpoint of stage `{stage}`, step {step}. "),
            None => String::new(),
        };
        format!(
            "A {} of {millions:.3} million parameters ({}), made from {start} with rpt {} by \
             [reinforcement pre-training](https://arxiv.org/abs/2506.08007): before it predicts the next tokens of a \
             text it may think. {stage}",
            if self.adapter { "low-rank adapter" } else { "language model" },
            self.dtype,
            env!("CARGO_PKG_VERSION")
        )
        .trim_end()
        .to_owned()
    }
}

/// A string as YAML.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The longest run of backticks beyond two: a fence must be longer.
fn longest_fence(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0).saturating_sub(2)
}

/// Bytes of a card that are searched for its metadata.
const CARD_BYTES: u64 = 1 << 16;

/// The `license`, `license_name` and `license_link` lines of the card in a model directory.
pub fn licence_of(directory: &Path) -> Vec<String> {
    let mut card = Vec::new();
    let Ok(file) = File::open(directory.join("README.md")) else { return Vec::new() };
    if file.take(CARD_BYTES).read_to_end(&mut card).is_err() {
        return Vec::new();
    }
    let card = String::from_utf8_lossy(&card).replace('\r', "");
    let Some(metadata) = card.strip_prefix("---\n") else { return Vec::new() };
    let lines = metadata.lines().take_while(|line| *line != "---");
    let says = |line: &&str| {
        let key = line.split_once(':').map(|(key, _)| key);
        matches!(key, Some("license" | "license_name" | "license_link"))
    };
    lines.filter(says).map(String::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_licence_of_the_base_is_handed_on() {
        let directory = tempfile::tempdir().unwrap();
        assert!(licence_of(directory.path()).is_empty());
        let text = "---\nlicense: other\nlicense_name: x\nlanguage: en\n---\nlicense: no\n";
        std::fs::write(directory.path().join("README.md"), text).unwrap();
        let licence = licence_of(directory.path());
        assert_eq!(licence, ["license: other", "license_name: x"]);
        let card = ModelCard { licence, recipe: "a = '```'".into(), ..ModelCard::default() }.to_markdown();
        assert!(card.starts_with("---\n") && card.contains("\nlicense: other\nlicense_name: x\n---\n"));
        assert!(card.contains("\n````toml\n"));
    }
}

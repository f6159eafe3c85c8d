//! The recipe of a generated corpus.

use rpt::corpus::generated::{Recipe, Storyteller};
use serde_json::{Value, json};
use std::path::Path;

/// The recipe's numbers and stories spread over the corpus, told with seed 0.
pub(super) fn inspect(directory: &Path, samples: usize) -> rpt::Result<Value> {
    let recipe = Recipe::load(&directory.join("corpus.toml"))?;
    let teller = Storyteller::new(&recipe, 0);
    let count = (samples as u64).min(recipe.stories.documents);
    let stories = (1..=count).map(|number| {
        let index = number * recipe.stories.documents / count - 1;
        let story = teller.training(index)?;
        Ok(json!({ "index": index, "kind": story.kind.name(), "text": story.text }))
    });
    Ok(json!({
        "kind": "generated_corpus",
        "path": directory,
        "stories": recipe.stories,
        "held_out": recipe.held_out,
        "traces": recipe.traces,
        "words": recipe.words,
        "sample": stories.collect::<rpt::Result<Vec<Value>>>()?,
    }))
}

//! The generated quickstart corpus: stories whose answers are several lookups away.
//!
//! A recipe (`corpus.toml`) holds the words and the numbers. Every story is a pure function of
//! (recipe, seed, its index), so any story can be made again without the others. [`generate`]
//! writes real parquet files, which are then read like any other corpus.
//!
//! The held-out split is kept apart by construction. The *instance* of a question is the chain that
//! answers it; a digest of that chain decides to which side it belongs, so no training story ever
//! asks about a chain that a held-out story asks about, whatever the seeds.

mod files;
mod random;
mod recipe;
mod story;
mod thought;

pub use recipe::{HeldOut, Recipe, Stories, TraceRecipe, Words};
pub use story::{Kind, Question, Story, Storyteller};

use super::{CorpusError, Document, Mark, Trace};
use files::{Table, documents_table, traces_table};
use serde::Serialize;
use std::fs;
use std::path::{Path, PathBuf};
use thought::Worked;

/// Name of the recipe file inside its directory.
const RECIPE_FILE: &str = "corpus.toml";

/// The directory of a generated corpus, if `source` is one: a directory that holds `corpus.toml`.
pub fn generated_recipe(source: &str) -> Option<PathBuf> {
    let directory = PathBuf::from(source);
    directory.join(RECIPE_FILE).is_file().then_some(directory)
}

/// The files of a generated corpus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Generated {
    /// Training stories in reading order (columns `id`, `text`).
    pub train: PathBuf,
    /// The report stories among them, from which tasks are cut (columns `id`, `text`).
    pub tasks: PathBuf,
    /// Held-out report stories (columns `id`, `text`, `positions`).
    pub heldout: PathBuf,
    /// Worked examples with wrong hops (columns `text`, `offset`, `thought`, `prediction`, `label`).
    pub traces: PathBuf,
    /// The same examples without wrong hops, unless the recipe gives them other chain lengths.
    pub clean_traces: PathBuf,
    /// How much is in them.
    pub counts: GeneratedCounts,
}

/// Sizes of a generated corpus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GeneratedCounts {
    /// Training stories.
    pub train: u64,
    /// Bytes of their text.
    pub train_bytes: u64,
    /// Report stories among them.
    pub tasks: u64,
    /// Held-out stories.
    pub heldout: u64,
    /// Worked examples, those with empty thoughts included.
    pub traces: u64,
    /// Worked examples without wrong hops, those with empty thoughts included.
    pub clean_traces: u64,
}

/// Writes the corpus that `recipe_dir` describes into `out_dir`: byte-identical for the same recipe and seed.
///
/// Files appear under their names only when they are complete and on disk.
///
/// # Errors
/// The recipe is missing, invalid or asks for more traces than there are stories; a file cannot be written.
pub fn generate(recipe_dir: &Path, seed: u64, out_dir: &Path) -> Result<Generated, CorpusError> {
    let recipe = Recipe::load(&recipe_dir.join(RECIPE_FILE))?;
    let teller = Storyteller::new(&recipe, seed);
    fs::create_dir_all(out_dir).map_err(CorpusError::io(out_dir))?;
    let file = |name: &str| out_dir.join(name);
    let mut generated = Generated {
        train: file("train.parquet"),
        tasks: file("tasks.parquet"),
        heldout: file("heldout.parquet"),
        traces: file("traces.parquet"),
        clean_traces: file("clean-traces.parquet"),
        counts: GeneratedCounts::default(),
    };
    let reports = write_training(&teller, &mut generated)?;
    generated.counts.heldout = write_held_out(&teller, &generated.heldout)?;
    let worked = Worked::new(&teller, &reports);
    let TraceRecipe { chain_lengths, error_rate, .. } = &recipe.traces;
    generated.counts.traces = write_traces(&worked.examples(chain_lengths, *error_rate)?, &generated.traces)?;
    let clean = worked.examples(recipe.traces.clean_lengths(), 0.0)?;
    generated.counts.clean_traces = write_traces(&clean, &generated.clean_traces)?;
    Ok(generated)
}

/// Indices and chain lengths of the report stories of the training corpus.
type Reports = Vec<(u64, usize)>;

fn write_training(teller: &Storyteller, generated: &mut Generated) -> Result<Reports, CorpusError> {
    let mut train = documents_table(&generated.train, false)?;
    let mut tasks = documents_table(&generated.tasks, false)?;
    let mut reports = Vec::new();
    for index in 0..teller.recipe().stories.documents {
        let story = teller.training(index)?;
        let document =
            Document { id: format!("{}-{index}", story.kind.name()), text: story.text, marks: Vec::new() };
        generated.counts.train += 1;
        generated.counts.train_bytes += document.text.len() as u64;
        if let (Kind::Report, Some(question)) = (story.kind, story.question) {
            reports.push((index, question.length()));
            tasks.push(document.clone())?;
        }
        train.push(document)?;
    }
    generated.counts.tasks = reports.len() as u64;
    train.commit()?;
    tasks.commit()?;
    Ok(reports)
}

fn write_held_out(teller: &Storyteller, path: &Path) -> Result<u64, CorpusError> {
    let mut table = documents_table(path, true)?;
    let documents = teller.recipe().held_out.documents;
    for index in 0..documents {
        let story = teller.held_out(index)?;
        let mark = |question: Question| Mark {
            offset: question.offset as u64,
            label: question.length().to_string(),
        };
        let marks = story.question.map(mark).into_iter().collect();
        table.push(Document { id: format!("held-out-{index}"), text: story.text, marks })?;
    }
    table.commit()?;
    Ok(documents)
}

fn write_traces(traces: &[Trace], path: &Path) -> Result<u64, CorpusError> {
    let mut table: Table<Trace> = traces_table(path)?;
    for trace in traces {
        table.push(trace.clone())?;
    }
    table.commit()?;
    Ok(traces.len() as u64)
}

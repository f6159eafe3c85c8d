//! Rollout logs.

use rpt::report::{RolloutRow, read_rows, sample_rows};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Outcomes, ends and mean reward of everything logged, and rollouts from the beginning, the middle
/// and the end.
pub(super) fn inspect(directory: &Path, samples: usize) -> anyhow::Result<Value> {
    let mut totals = Totals::default();
    for row in read_rows(directory).map_err(rpt::Error::from)? {
        totals.add(&row.map_err(rpt::Error::from)?);
    }
    let mut rows = sample_rows(directory, samples.div_ceil(3)).map_err(rpt::Error::from)?;
    rows.truncate(samples);
    Ok(json!({
        "kind": "rollouts",
        "path": directory,
        "rollouts": totals.rollouts,
        "tasks": totals.tasks.len(),
        "first_step": totals.steps.first(),
        "last_step": totals.steps.last(),
        "tokens": totals.tokens,
        "mean_reward": totals.reward / totals.rollouts.max(1) as f64,
        "outcomes": totals.outcomes,
        "ends": totals.ends,
        "sample": rows.iter().map(sample).collect::<Vec<_>>(),
    }))
}

#[derive(Default)]
struct Totals {
    rollouts: u64,
    tokens: u64,
    reward: f64,
    tasks: BTreeSet<u64>,
    steps: BTreeSet<u64>,
    outcomes: BTreeMap<String, u64>,
    ends: BTreeMap<String, u64>,
}

impl Totals {
    fn add(&mut self, row: &RolloutRow) {
        self.rollouts += 1;
        self.tokens += row.tokens.len() as u64;
        self.reward += f64::from(row.reward);
        self.tasks.insert(row.ordinal);
        self.steps.insert(row.step);
        *self.outcomes.entry(row.outcome.clone()).or_default() += 1;
        *self.ends.entry(row.finish.clone()).or_default() += 1;
    }
}

fn sample(row: &RolloutRow) -> Value {
    json!({
        "step": row.step,
        "ordinal": row.ordinal,
        "document": row.document,
        "context": row.context,
        "thought": row.thought,
        "prediction": row.prediction,
        "truth": row.truth,
        "outcome": row.outcome,
        "advantage": row.advantage,
    })
}

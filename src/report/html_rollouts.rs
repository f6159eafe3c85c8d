//! Sample rollouts as HTML.

use super::RolloutRow;
use super::html::escape;
use super::table::{ABSENT, grouped};

/// Characters of a thought that are shown without opening it.
const OPEN_CHARACTERS: usize = 1200;

/// The rollouts, in three phases by step; empty if there are none.
pub(super) fn draw_rollouts(rows: &[RolloutRow]) -> String {
    let (Some(first), Some(last)) =
        (rows.iter().map(|row| row.step).min(), rows.iter().map(|row| row.step).max())
    else {
        return String::new();
    };
    let phases = ["Early", "Middle", "Late"].iter().enumerate().map(|(phase, name)| {
        let chosen: Vec<_> = rows.iter().filter(|row| phase_of(row.step, first, last) == phase).collect();
        draw_phase(name, &chosen)
    });
    phases.collect::<Vec<_>>().concat()
}

/// 0, 1 or 2: in which third of the steps a step lies. A single step is early.
fn phase_of(step: u64, first: u64, last: u64) -> usize {
    let length = u128::from(last - first) + 1;
    if length < 3 { usize::from(step != first) * 2 } else { (u128::from(step - first) * 3 / length) as usize }
}

fn draw_phase(name: &str, rows: &[&RolloutRow]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let cards: Vec<_> = rows.iter().map(|row| draw_rollout(row)).collect();
    format!("<h3>{name}</h3>\n<div class=\"rollouts\">\n{}\n</div>\n", cards.join("\n"))
}

fn draw_rollout(row: &RolloutRow) -> String {
    format!(
        "<article class=\"rollout\">\n<p class=\"where\"><span class=\"badge {class}\">{outcome}</span>{facts}</p>\n\
         <div class=\"text context\"><h4>Context</h4><p>{context}<mark></mark></p></div>\n{thought}\n\
         <dl class=\"answer\"><div><dt>Prediction</dt><dd>{prediction}</dd></div>\
         <div><dt>Truth</dt><dd>{truth}</dd></div><div><dt>Reward</dt><dd class=\"number\">{reward}</dd></div>\
         <div><dt>Advantage</dt><dd class=\"number\">{advantage:+.3}</dd></div></dl>\n</article>",
        class = badge(row),
        outcome = escape(&row.outcome),
        facts = facts(row),
        context = escape(&row.context),
        thought = draw_thought(row),
        prediction = row.prediction.as_deref().map_or_else(|| ABSENT.to_owned(), visible),
        truth = visible(&row.truth),
        reward = row.reward,
        advantage = row.advantage,
    )
}

/// Green where it was rewarded, red where a prediction was not, amber where there was none.
fn badge(row: &RolloutRow) -> &'static str {
    match (row.reward > 0.0, &row.prediction) {
        (true, _) => "good",
        (false, Some(_)) => "bad",
        (false, None) => "none",
    }
}

fn facts(row: &RolloutRow) -> String {
    let label = row.label.as_ref().map(|label| format!("label {label}"));
    let facts = [
        Some(format!("step {}", grouped(row.step))),
        Some(format!("{}, token {}", row.document, grouped(row.position.into()))),
        label,
        Some(format!("entropy {:.2} nats", row.entropy)),
        Some(format!("task {}, sample {}", grouped(row.ordinal), row.sample)),
        Some(format!("ended by {}", row.finish)),
    ];
    facts.iter().flatten().map(|fact| format!("<span>{}</span>", escape(fact))).collect::<Vec<_>>().join(" ")
}

/// The thought, folded if it is long.
fn draw_thought(row: &RolloutRow) -> String {
    let open = if row.thought.chars().count() <= OPEN_CHARACTERS { " open=\"\"" } else { "" };
    let thought =
        if row.thought.trim().is_empty() { "<i>empty</i>".to_owned() } else { escape(row.thought.trim()) };
    format!(
        "<details class=\"text thought\"{open}><summary>Thought <small>{} tokens sampled</small></summary>\
         <p>{thought}</p></details>",
        grouped(row.tokens.len() as u64)
    )
}

/// Short text in which spaces and line ends can be seen.
fn visible(text: &str) -> String {
    let marked: String = text
        .chars()
        .flat_map(|c| match c {
            ' ' => vec!['␣'],
            '\n' => vec!['↵', '\n'],
            c => vec![c],
        })
        .collect();
    format!("<code>{}</code>", escape(&marked))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_fall_into_thirds() {
        let phases: Vec<_> = (1..=9).map(|step| phase_of(step, 1, 9)).collect();
        assert_eq!(phases, [0, 0, 0, 1, 1, 1, 2, 2, 2]);
        assert_eq!([phase_of(5, 5, 5), phase_of(5, 5, 6), phase_of(6, 5, 6)], [0, 0, 2]);
        assert_eq!(phase_of(u64::MAX, 0, u64::MAX), 2);
    }

    #[test]
    fn spaces_of_a_prediction_can_be_seen() {
        assert_eq!(visible(" a\n<b>"), "<code>␣a↵\n&lt;b&gt;</code>");
    }

    #[test]
    fn colours_follow_reward_and_prediction() {
        let row = |reward, prediction: Option<&str>| RolloutRow {
            reward,
            prediction: prediction.map(str::to_owned),
            ..RolloutRow::default()
        };
        let classes = [row(1.0, Some("a")), row(0.0, Some("a")), row(0.0, None)].map(|row| badge(&row));
        assert_eq!(classes, ["good", "bad", "none"]);
    }
}

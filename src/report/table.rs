//! Accuracy tables, and how they look as text.

use serde::{Deserialize, Serialize};

/// A table of accuracies: one row per model, one column per label.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Table {
    /// What the table shows.
    pub title: String,
    /// A sentence on how it was measured; may be empty.
    pub caption: String,
    /// What the labels are, such as `hops`; may be empty.
    pub label_heading: String,
    /// Columns of accuracies per label.
    pub labels: Vec<TableLabel>,
    /// Rows from top to bottom.
    pub rows: Vec<TableRow>,
    /// Remarks below the table.
    pub footnotes: Vec<String>,
}

/// A column of accuracies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableLabel {
    /// The label.
    pub name: String,
    /// Whether the traces of the cold start show such positions. The column is then marked.
    pub covered_by_traces: bool,
}

/// One row.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TableRow {
    /// The model and how it predicts.
    pub name: String,
    /// Share of right predictions, 0 to 1.
    pub accuracy: Option<f64>,
    /// 95 % confidence interval of the accuracy.
    pub interval: Option<[f64; 2]>,
    /// Number of predictions.
    pub n: Option<u64>,
    /// Accuracy of each label, in the order of the columns; missing ones are left empty.
    pub values: Vec<Option<f64>>,
    /// Floating-point operations spent on training so far.
    pub flops: Option<f64>,
    /// Whether this row is the result that the table is about.
    pub emphasis: bool,
}

/// Mark of a column that the traces cover.
pub(super) const COVERED_MARK: &str = "†";
/// What the mark means.
pub(super) const COVERED_NOTE: &str = "† covered by the traces of the cold start";
/// What an absent figure looks like.
pub(super) const ABSENT: &str = "–";

impl Table {
    /// Whether a column is marked, so that the mark needs its note.
    pub(super) fn has_covered_labels(&self) -> bool {
        self.labels.iter().any(|label| label.covered_by_traces)
    }
}

impl TableLabel {
    /// The name with its mark.
    pub(super) fn heading(&self) -> String {
        if self.covered_by_traces { format!("{} {COVERED_MARK}", self.name) } else { self.name.clone() }
    }
}

impl TableRow {
    /// The accuracy of a label.
    pub(super) fn value(&self, label: usize) -> Option<f64> {
        self.values.get(label).copied().flatten()
    }
}

/// A share as percent with one decimal: `99.7`.
pub(super) fn percent(share: Option<f64>) -> String {
    let share = share.filter(|share| share.is_finite());
    share.map_or_else(|| ABSENT.into(), |share| format!("{:.1}", 100.0 * share))
}

/// An interval of shares as percent: `99.1 – 99.9`.
pub(super) fn percent_interval(interval: Option<[f64; 2]>) -> String {
    interval.map_or_else(
        || ABSENT.into(),
        |[low, high]| format!("{} – {}", percent(Some(low)), percent(Some(high))),
    )
}

/// A count with groups of three digits: `12,000`.
pub(super) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

/// The table as aligned Markdown, for terminals and documents.
pub fn table_text(table: &Table) -> String {
    let columns = text_columns(table);
    let widths: Vec<_> =
        columns.iter().map(|column| column.iter().map(|text| width(text)).max().unwrap_or(0)).collect();
    let mut lines = vec![format!("**{}**", one_line(&table.title)), String::new()];
    lines.extend(Some(one_line(&table.caption)).filter(|text| !text.is_empty()).map(|text| text + "\n"));
    for row in 0..=table.rows.len() {
        lines.push(text_row(&columns, &widths, row));
        if row == 0 {
            lines.push(rule(&widths));
        }
    }
    let notes = table.has_covered_labels().then(|| COVERED_NOTE.to_owned()).into_iter();
    let notes = notes.chain(table.footnotes.iter().map(|note| one_line(note)));
    lines.extend(notes.map(|note| format!("\n{note}")));
    lines.join("\n") + "\n"
}

/// Cells by column, the heading first. Columns without any figure are left out.
fn text_columns(table: &Table) -> Vec<Vec<String>> {
    let column = |heading: &str, cell: &dyn Fn(&TableRow) -> String| -> Vec<String> {
        std::iter::once(one_line(heading)).chain(table.rows.iter().map(cell)).collect()
    };
    let has = |present: fn(&TableRow) -> bool| table.rows.iter().any(present);
    let mut columns =
        vec![column("model", &|row| one_line(&row.name)), column("accuracy %", &|row| percent(row.accuracy))];
    if has(|row| row.interval.is_some()) {
        columns.push(column("95 % interval", &|row| percent_interval(row.interval)));
    }
    if has(|row| row.n.is_some()) {
        columns.push(column("n", &|row| row.n.map_or_else(|| ABSENT.into(), grouped)));
    }
    for (index, label) in table.labels.iter().enumerate() {
        let name = format!("{} {}", table.label_heading, label.heading());
        columns.push(column(name.trim(), &|row| percent(row.value(index))));
    }
    if has(|row| row.flops.is_some()) {
        columns.push(column("training FLOPs", &|row| {
            row.flops.map_or_else(|| ABSENT.into(), |flops| format!("{flops:.1e}"))
        }));
    }
    columns
}

/// One row of cells: the first column to the left, numbers to the right.
fn text_row(columns: &[Vec<String>], widths: &[usize], row: usize) -> String {
    let cell = |(index, (column, width_of_column)): (usize, (&Vec<String>, &usize))| {
        let padding = " ".repeat(width_of_column.saturating_sub(width(&column[row])));
        if index == 0 { column[row].clone() + &padding } else { padding + &column[row] }
    };
    let cells: Vec<_> = columns.iter().zip(widths).enumerate().map(cell).collect();
    format!("| {} |", cells.join(" | "))
}

fn rule(widths: &[usize]) -> String {
    let cell = |(index, width): (usize, &usize)| {
        if index == 0 { "-".repeat(width + 2) } else { "-".repeat(width + 1) + ":" }
    };
    format!("|{}|", widths.iter().enumerate().map(cell).collect::<Vec<_>>().join("|"))
}

/// Text that keeps its place in a Markdown table.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ").replace('|', "\\|")
}

fn width(text: &str) -> usize {
    text.chars().count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let label = |name: &str, covered_by_traces| TableLabel { name: name.into(), covered_by_traces };
        Table {
            title: "Held-out accuracy".into(),
            label_heading: "hops".into(),
            labels: vec![label("1", true), label("6", false)],
            rows: vec![
                TableRow { name: "NTP".into(), accuracy: Some(0.195), n: Some(600), ..TableRow::default() },
                TableRow {
                    name: "after | RPT".into(),
                    accuracy: Some(0.997),
                    interval: Some([0.99, 1.0]),
                    n: Some(12_000),
                    values: vec![Some(1.0), Some(f64::NAN)],
                    ..TableRow::default()
                },
            ],
            footnotes: vec!["Greedy decoding.".into()],
            ..Table::default()
        }
    }

    #[test]
    fn text_is_aligned_markdown() {
        let expected = "\
**Held-out accuracy**

| model        | accuracy % | 95 % interval |      n | hops 1 † | hops 6 |
|--------------|-----------:|--------------:|-------:|---------:|-------:|
| NTP          |       19.5 |             – |    600 |        – |      – |
| after \\| RPT |       99.7 |  99.0 – 100.0 | 12,000 |    100.0 |      – |

† covered by the traces of the cold start

Greedy decoding.
";
        assert_eq!(table_text(&table()), expected);
    }

    #[test]
    fn a_table_survives_json_and_emptiness() {
        let mut table = table();
        table.rows[1].values[1] = None;
        let json = serde_json::to_string(&table).unwrap();
        assert_eq!(serde_json::from_str::<Table>(&json).unwrap(), table);
        assert!(table_text(&Table::default()).contains("| model | accuracy % |"));
    }

    #[test]
    fn counts_are_grouped() {
        let texts = [0, 999, 1000, 1_234_567].map(grouped);
        assert_eq!(texts, ["0", "999", "1,000", "1,234,567"]);
    }
}

//! Accuracy tables as HTML.

use super::html::escape;
use super::table::{ABSENT, COVERED_NOTE, grouped, percent};
use super::{Table, TableRow};

/// The table with its title, caption and notes.
pub(super) fn draw_table(table: &Table) -> String {
    let columns = Columns::of(table);
    let rows: Vec<_> = table.rows.iter().map(|row| draw_row(table, &columns, row)).collect();
    format!(
        "<h3>{}</h3>\n{}<div class=\"wide\"><table>\n<thead>\n{}\n</thead>\n<tbody>\n{}\n</tbody>\n</table></div>\n{}",
        escape(&table.title),
        paragraph("caption", &table.caption),
        draw_head(table, &columns),
        rows.join("\n"),
        draw_notes(table)
    )
}

/// Which of the optional columns have any figure.
struct Columns {
    interval: bool,
    n: bool,
    flops: bool,
}

impl Columns {
    fn of(table: &Table) -> Self {
        let has = |present: fn(&TableRow) -> bool| table.rows.iter().any(present);
        Self {
            interval: has(|row| row.interval.is_some()),
            n: has(|row| row.n.is_some()),
            flops: has(|row| row.flops.is_some()),
        }
    }
}

fn draw_head(table: &Table, columns: &Columns) -> String {
    let optional = |shown, text: &str| if shown { text.to_owned() } else { String::new() };
    let name = |label: &super::TableLabel| {
        let class = if label.covered_by_traces { "covered" } else { "" };
        format!("<th class=\"number {class}\">{}</th>", escape(&label.heading()))
    };
    let names: Vec<_> = table.labels.iter().map(name).collect();
    let [heading, names] = if table.labels.is_empty() {
        [String::new(), String::new()]
    } else {
        let heading =
            Some(table.label_heading.as_str()).filter(|text| !text.is_empty()).unwrap_or("by label");
        let heading = format!(
            "<th class=\"group\" colspan=\"{}\">{} (accuracy, %)</th>",
            table.labels.len(),
            escape(heading)
        );
        [heading, format!("\n<tr>{}</tr>", names.concat())]
    };
    let span = if table.labels.is_empty() { 1 } else { 2 };
    let tall = |class: &str, text: &str| format!("<th class=\"{class}\" rowspan=\"{span}\">{text}</th>");
    [
        "<tr>".to_owned(),
        tall("", "model"),
        tall("number", "accuracy, %"),
        optional(columns.interval, &tall("", "95 % interval")),
        optional(columns.n, &tall("number", "n")),
        heading,
        optional(columns.flops, &tall("number", "training FLOPs")),
        "</tr>".to_owned(),
        names,
    ]
    .concat()
}

fn draw_row(table: &Table, columns: &Columns, row: &TableRow) -> String {
    let optional = |shown, cell: String| if shown { cell } else { String::new() };
    let number = |text: &str| format!("<td class=\"number\">{text}</td>");
    let values: Vec<_> = (0..table.labels.len()).map(|label| draw_value(row.value(label))).collect();
    [
        if row.emphasis { "<tr class=\"emphasis\">" } else { "<tr>" }.to_owned(),
        format!("<th scope=\"row\">{}</th>", escape(&row.name)),
        format!("<td class=\"number main\">{}</td>", percent(row.accuracy)),
        optional(columns.interval, format!("<td class=\"interval\">{}</td>", draw_interval(row))),
        optional(columns.n, number(&row.n.map_or_else(|| ABSENT.into(), grouped))),
        values.concat(),
        optional(columns.flops, number(&row.flops.map_or_else(|| ABSENT.into(), power_of_ten))),
        "</tr>".to_owned(),
    ]
    .concat()
}

/// An accuracy on a ground that is the darker the higher it is.
fn draw_value(value: Option<f64>) -> String {
    let shade = value.filter(|value| value.is_finite()).unwrap_or(0.0).clamp(0.0, 1.0);
    format!("<td class=\"number shaded\" style=\"--v:{shade:.3}\">{}</td>", percent(value))
}

/// The interval as numbers and on a scale from 0 to 1.
fn draw_interval(row: &TableRow) -> String {
    let Some([low, high]) = row.interval.filter(|ends| ends.iter().all(|end| end.is_finite())) else {
        return ABSENT.to_owned();
    };
    let place = |share: f64| 4.0 + 92.0 * share.clamp(0.0, 1.0);
    let dot = row
        .accuracy
        .filter(|share| share.is_finite())
        .map(|share| format!("<circle class=\"dot\" cx=\"{:.1}\" cy=\"6\" r=\"2\"/>", place(share)));
    format!(
        "<svg viewBox=\"0 0 100 12\" aria-hidden=\"true\"><line class=\"grid\" x1=\"4\" y1=\"6\" x2=\"96\" y2=\"6\"/>\
         <line class=\"whisker\" x1=\"{:.1}\" y1=\"6\" x2=\"{:.1}\" y2=\"6\"/>{}</svg>\
         <span>{} – {}</span>",
        place(low),
        place(high),
        dot.unwrap_or_default(),
        percent(Some(low)),
        percent(Some(high))
    )
}

/// `3.1 × 10¹³`.
fn power_of_ten(value: f64) -> String {
    let text = format!("{value:.1e}");
    match text.split_once('e') {
        Some((digits, exponent)) => format!("{digits} × 10<sup>{exponent}</sup>"),
        None => text,
    }
}

fn draw_notes(table: &Table) -> String {
    let covered = table.has_covered_labels().then_some(COVERED_NOTE);
    let notes = covered.into_iter().chain(table.footnotes.iter().map(String::as_str));
    notes.map(|note| paragraph("note", note)).collect::<Vec<_>>().concat()
}

fn paragraph(class: &str, text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("<p class=\"{class}\">{}</p>\n", escape(text)) }
}

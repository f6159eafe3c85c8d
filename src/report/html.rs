//! The report page: one file without scripts or external resources.

use super::data::draw_data;
use super::files::write_atomically;
use super::html_rollouts::draw_rollouts;
use super::html_table::draw_table;
use super::panels::{Figure, figures};
use super::table::grouped;
use super::{Curves, DataSummary, ReportError, RolloutRow, StageCurves, Table};
use std::path::{Path, PathBuf};

const STYLE: &str = include_str!("style.css");

/// Everything that a report shows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReportInput {
    /// Name of the run.
    pub title: String,
    /// Facts on the run as (name, value).
    pub summary: Vec<(String, String)>,
    /// Tables of the evaluation.
    pub tables: Vec<Table>,
    /// What the corpora became.
    pub data: Vec<DataSummary>,
    /// Curves of the stages, from the metrics log.
    pub curves: Curves,
    /// The pipeline file.
    pub pipeline: String,
    /// Sample rollouts in the order of their steps, from [`sample_rows`](super::sample_rows) for instance.
    pub rollouts: Vec<RolloutRow>,
}

/// Writes `report.html` into the run directory; an older one is replaced only when the new one is complete.
///
/// # Errors
/// [`ReportError::Io`].
pub fn write_report(run_directory: &Path, input: &ReportInput) -> Result<PathBuf, ReportError> {
    let path = run_directory.join("report.html");
    write_atomically(&path, render_report(input).as_bytes())?;
    Ok(path)
}

/// The page: the same bytes for the same input, and well-formed XML after its first line.
pub fn render_report(input: &ReportInput) -> String {
    let sections: Vec<_> = sections(input).into_iter().filter(|section| !section.body.is_empty()).collect();
    let links = sections.iter().map(|one| format!("<a href=\"#{}\">{}</a>", one.anchor, escape(&one.title)));
    let bodies: Vec<_> = sections.iter().map(Section::draw).collect();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
         <meta name=\"color-scheme\" content=\"light dark\"/>\n<title>{title} · rpt report</title>\n\
         <style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n<p class=\"kicker\">Reinforcement pre-training</p>\n\
         <h1>{title}</h1>\n{summary}\n<nav>{links}</nav>\n</header>\n<main>\n{bodies}\n</main>\n\
         <footer>rpt {version}</footer>\n</body>\n</html>\n",
        title = escape(&input.title),
        summary = draw_summary(&input.summary),
        links = links.collect::<Vec<_>>().join(" "),
        bodies = bodies.join("\n"),
        version = env!("CARGO_PKG_VERSION"),
    )
}

/// A part of the page with a heading; without a body it is left out.
struct Section {
    anchor: String,
    title: String,
    body: String,
}

impl Section {
    fn draw(&self) -> String {
        let Self { anchor, title, body } = self;
        format!("<section id=\"{anchor}\">\n<h2>{}</h2>\n{body}\n</section>", escape(title))
    }
}

fn sections(input: &ReportInput) -> Vec<Section> {
    let section = |anchor: &str, title: &str, body: String| Section {
        anchor: anchor.to_owned(),
        title: title.to_owned(),
        body,
    };
    let tables = input.tables.iter().map(draw_table).collect::<Vec<_>>().join("\n");
    let mut all = vec![section("results", "Results", tables)];
    // Stages that earn rewards are what a run is made for.
    let mut stages: Vec<_> = input.curves.stages.iter().enumerate().collect();
    stages.sort_by_key(|(_, stage)| stage.points("reward").is_empty());
    all.extend(stages.into_iter().map(|(index, stage)| {
        section(&format!("stage-{}", index + 1), &format!("Stage: {}", stage.name), draw_stage(stage))
    }));
    all.push(section("data", "Data", draw_data(&input.data)));
    all.push(section("rollouts", "Sample rollouts", draw_rollouts(&input.rollouts)));
    all.push(section("pipeline", "Pipeline", draw_pipeline(&input.pipeline)));
    all
}

fn draw_summary(summary: &[(String, String)]) -> String {
    let line = |(name, value): &(String, String)| {
        format!("<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value))
    };
    match summary {
        [] => String::new(),
        lines => format!(
            "<dl class=\"summary\">\n{}\n</dl>",
            lines.iter().map(line).collect::<Vec<_>>().join("\n")
        ),
    }
}

fn draw_stage(stage: &StageCurves) -> String {
    let figures: Vec<_> = figures(stage).iter().map(draw_figure).collect();
    if figures.is_empty() {
        return String::new();
    }
    format!("<div class=\"figures\">\n{}\n</div>\n{}", figures.join("\n"), describe_points(stage))
}

fn draw_figure(figure: &Figure) -> String {
    format!(
        "<figure>\n<figcaption><b>{}</b><span>{}</span></figcaption>\n{}\n</figure>",
        escape(&figure.chart.title),
        escape(&figure.summary),
        figure.chart.to_svg()
    )
}

/// What a point of the curves is, and what they leave out.
fn describe_points(stage: &StageCurves) -> String {
    let width = match stage.steps_per_point() {
        1 => "Each point is one step".to_owned(),
        width => format!("Each point is the mean of {} steps", grouped(width)),
    };
    let missing = match stage.not_finite {
        0 => String::new(),
        count => format!(" <strong>{} values were not finite and are left out.</strong>", grouped(count)),
    };
    format!(
        "<p class=\"note\">{} lines of metrics. {width}; bold lines and areas are a running mean over a twentieth \
         of the curve, and the numbers above a chart its ends.{missing}</p>",
        grouped(stage.lines)
    )
}

fn draw_pipeline(pipeline: &str) -> String {
    if pipeline.is_empty() {
        String::new()
    } else {
        format!("<pre class=\"pipeline\">{}</pre>", escape(pipeline))
    }
}

/// Text for HTML and XML, in elements and in quoted attributes. Characters that XML cannot hold are replaced.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len() + text.len() / 8);
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            '\n' | '\t' => escaped.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

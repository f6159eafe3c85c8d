//! What a corpus became: counts, what was left out, and how things are spread.

use super::html::escape;
use super::table::grouped;

/// Bars of a histogram are drawn within so many units.
const HEIGHT: f64 = 120.0;
const WIDTH: f64 = 480.0;
/// Room below the bars for the names of the first and the last.
const NAMES: f64 = 18.0;

/// The data of one split.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DataSummary {
    /// Name of the split.
    pub name: String,
    /// What there is: (name, count).
    pub counts: Vec<(String, u64)>,
    /// What was left out: (reason, count), the most frequent first.
    pub dropped: Vec<(String, u64)>,
    /// Places that could not be read.
    pub quarantined: Vec<String>,
    /// How lengths, entropies and the like are spread.
    pub histograms: Vec<Histogram>,
}

/// Counts by bin.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// What is counted.
    pub title: String,
    /// (name, count), ascending.
    pub bins: Vec<(String, u64)>,
}

/// The data of all splits as HTML; nothing without any.
pub(super) fn draw_data(splits: &[DataSummary]) -> String {
    splits.iter().map(draw_split).collect::<Vec<_>>().join("\n")
}

fn draw_split(split: &DataSummary) -> String {
    let histograms: Vec<_> = split.histograms.iter().map(draw_histogram).collect();
    let figures = match &histograms[..] {
        [] => String::new(),
        drawn => format!("<div class=\"figures\">\n{}\n</div>\n", drawn.join("\n")),
    };
    let dropped = draw_counts("Left out", &split.dropped);
    let places: Vec<_> =
        split.quarantined.iter().map(|place| format!("<li>{}</li>", escape(place))).collect();
    let quarantined = match &places[..] {
        [] => String::new(),
        places => format!("<h4>Quarantined</h4>\n<ul>{}</ul>\n", places.join("")),
    };
    format!(
        "<h3>{}</h3>\n{}{dropped}{quarantined}{figures}",
        escape(&split.name),
        draw_counts("There is", &split.counts)
    )
}

fn draw_counts(title: &str, counts: &[(String, u64)]) -> String {
    let line = |(name, count): &(String, u64)| {
        format!("<div><dt>{}</dt><dd>{}</dd></div>", escape(name), grouped(*count))
    };
    match counts {
        [] => String::new(),
        counts => format!(
            "<h4>{title}</h4>\n<dl class=\"summary\">\n{}\n</dl>\n",
            counts.iter().map(line).collect::<Vec<_>>().join("\n")
        ),
    }
}

fn draw_histogram(histogram: &Histogram) -> String {
    let most = histogram.bins.iter().map(|(_, count)| *count).max().unwrap_or(0).max(1);
    let total: u64 = histogram.bins.iter().fold(0, |sum, (_, count)| sum.saturating_add(*count));
    let step = WIDTH / histogram.bins.len().max(1) as f64;
    let bar = |(at, (name, count)): (usize, &(String, u64))| {
        let height = HEIGHT * *count as f64 / most as f64;
        format!(
            "<rect class=\"bar\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\"><title>{}: {}</title></rect>",
            at as f64 * step,
            HEIGHT - height,
            (step - 1.0).max(0.5),
            escape(name),
            grouped(*count)
        )
    };
    let name = |place: Option<&(String, u64)>, x: f64, anchor: &str| {
        let name = place.map_or_else(String::new, |(name, _)| escape(name));
        format!("<text x=\"{x}\" y=\"{:.0}\" text-anchor=\"{anchor}\">{name}</text>", HEIGHT + NAMES - 4.0)
    };
    format!(
        "<figure>\n<figcaption><b>{}</b><span>{} in all</span></figcaption>\n\
         <svg viewBox=\"0 0 {WIDTH} {:.0}\" role=\"img\" class=\"histogram\">\n{}\n{}{}</svg>\n</figure>",
        escape(&histogram.title),
        grouped(total),
        HEIGHT + NAMES,
        histogram.bins.iter().enumerate().map(bar).collect::<Vec<_>>().join("\n"),
        name(histogram.bins.first(), 0.0, "start"),
        name(histogram.bins.last(), WIDTH, "end"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_bar_fills_the_chart_and_hostile_names_are_text() {
        let histogram = Histogram {
            title: "<lengths>".into(),
            bins: vec![("1".into(), 5), ("2 & 3".into(), 10), ("4".into(), 0)],
        };
        let split = DataSummary {
            name: "train".into(),
            counts: vec![("documents".into(), 12_345)],
            dropped: vec![("too_short".into(), 3)],
            quarantined: vec!["a<b>.parquet: truncated".into()],
            histograms: vec![histogram],
        };
        let page = draw_data(&[split]);
        for part in [
            "&lt;lengths&gt;",
            "2 &amp; 3: 10",
            "height=\"120.0\"",
            "height=\"60.0\"",
            "12,345",
            "a&lt;b&gt;",
        ] {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert_eq!(draw_data(&[]), "");
    }
}

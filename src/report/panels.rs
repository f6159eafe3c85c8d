//! Which curves are drawn, and how.

use super::StageCurves;
use super::svg::{Chart, Drawing, Series, smoothed};

/// A chart that is drawn if its figures are present: those of `key`, and one series per `key/NAME`.
struct Panel {
    key: &'static str,
    title: &'static str,
    scale: Scale,
}

/// What the y axis shows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scale {
    /// A share: 0 to 1.
    Share,
    /// A size: from 0.
    Size,
    /// Whatever range the values have.
    Free,
    /// Amounts that add up.
    Sum,
    /// Parts of a whole.
    Parts,
}

const PANELS: &[Panel] = &[
    Panel { key: "reward", title: "Reward", scale: Scale::Share },
    Panel { key: "accuracy", title: "Accuracy", scale: Scale::Share },
    Panel { key: "loss", title: "Loss", scale: Scale::Free },
    Panel { key: "outcome", title: "Outcomes (share of rollouts)", scale: Scale::Parts },
    Panel { key: "thought_tokens", title: "Thought length (tokens)", scale: Scale::Size },
    Panel { key: "entropy", title: "Policy entropy (nats per token)", scale: Scale::Size },
    Panel { key: "zero_variance", title: "Groups without variance (share)", scale: Scale::Share },
    Panel { key: "gradient_norm", title: "Gradient norm before clipping", scale: Scale::Size },
    Panel { key: "logprob_gap", title: "Log-probability gap, engine to trainer", scale: Scale::Size },
    Panel { key: "seconds", title: "Seconds per step", scale: Scale::Sum },
];

/// A chart and a line on where it starts and ends.
pub(super) struct Figure {
    pub(super) chart: Chart,
    pub(super) summary: String,
}

/// The figures of a stage.
pub(super) fn figures(stage: &StageCurves) -> Vec<Figure> {
    PANELS.iter().filter_map(|panel| panel.figure(stage)).collect()
}

impl Panel {
    fn figure(&self, stage: &StageCurves) -> Option<Figure> {
        let mut series = self.series(stage);
        if self.scale == Scale::Parts {
            normalise(&mut series);
        }
        let summary = self.summary(&series)?;
        let chart = Chart {
            title: self.title.to_owned(),
            x_label: "step".to_owned(),
            x_range: Some(stage.step_range()),
            drawing: if self.is_stacked() { Drawing::Stack } else { Drawing::Lines },
            series,
            y_range: self.y_range(),
        };
        Some(Figure { chart, summary })
    }

    fn is_stacked(&self) -> bool {
        matches!(self.scale, Scale::Sum | Scale::Parts)
    }

    fn y_range(&self) -> Option<(f64, f64)> {
        match self.scale {
            Scale::Share | Scale::Parts => Some((0.0, 1.0)),
            Scale::Size | Scale::Sum => Some((0.0, 0.0)),
            Scale::Free => None,
        }
    }

    /// The named parts and, in a chart of lines or where there are no parts, the whole.
    fn series(&self, stage: &StageCurves) -> Vec<Series> {
        let name = |key: &str| key.strip_prefix(self.key)?.strip_prefix('/').map(str::to_owned);
        let parts: Vec<_> = stage.keys().filter_map(|key| Some((key, name(key)?))).collect();
        let whole = stage.keys().find(|key| *key == self.key).map(|key| (key, "all".to_owned()));
        let whole = whole.filter(|_| parts.is_empty() || !self.is_stacked());
        let chosen = whole.into_iter().chain(parts);
        let series = chosen.map(|(key, name)| Series { name, points: self.points(stage, key) });
        series.filter(|series| !series.points.is_empty()).collect()
    }

    fn points(&self, stage: &StageCurves, key: &str) -> Vec<(f64, f64)> {
        if self.is_stacked() { stage.points_or_zero(key) } else { stage.points(key) }
    }

    /// `0.041 → 0.482` of the first series, or of the sum of a stack.
    fn summary(&self, series: &[Series]) -> Option<String> {
        let first = series.first()?;
        let smooth = smoothed(&first.points);
        let (start, end) = (smooth.first()?.1, smooth.last()?.1);
        Some(match self.scale {
            Scale::Parts => format!("{}: {} → {}", first.name, format_value(start), format_value(end)),
            Scale::Sum => {
                let total: f64 = series.iter().flat_map(|one| &one.points).map(|(_, y)| y).sum();
                format!("mean {}", format_value(total / first.points.len() as f64))
            }
            _ => format!("{} → {}", format_value(start), format_value(end)),
        })
    }
}

/// Divides every column of a stack by its sum; an empty column stays empty.
fn normalise(series: &mut [Series]) {
    let columns = series.iter().map(|one| one.points.len()).max().unwrap_or(0);
    for column in 0..columns {
        let sum: f64 = series.iter().filter_map(|one| one.points.get(column)).map(|(_, y)| y).sum();
        if sum > 0.0 {
            series.iter_mut().filter_map(|one| one.points.get_mut(column)).for_each(|(_, y)| *y /= sum);
        }
    }
}

/// Three significant digits or so.
pub(super) fn format_value(value: f64) -> String {
    match value.abs() {
        size if size >= 1e6 => format!("{value:.2e}"),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.001 || size == 0.0 => format!("{value:.3}"),
        _ => format!("{value:.2e}"),
    }
}

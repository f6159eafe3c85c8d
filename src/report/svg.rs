//! Charts as inline SVG: lines and stacked areas with axes, grid and legend.
//!
//! Colours are classes that the page's style sheet resolves, so one chart serves light and dark pages.

use super::html::escape;

/// Colours in the style sheet.
const COLORS: usize = 10;
const WIDTH: f64 = 560.0;
const PLOT_HEIGHT: f64 = 200.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 40.0;
const LEGEND_ROW: f64 = 18.0;
/// Points from which on a line is smoothed; the measured one stays visible behind it.
const SMOOTHED_FROM: usize = 40;

/// How the series of a chart are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Drawing {
    /// Each on its own.
    Lines,
    /// On top of each other; all series have the same x values.
    Stack,
}

/// A named curve.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) points: Vec<(f64, f64)>,
}

/// One chart.
#[derive(Clone, Debug)]
pub(super) struct Chart {
    pub(super) title: String,
    pub(super) x_label: String,
    /// The x axis holds at least this range.
    pub(super) x_range: Option<(f64, f64)>,
    pub(super) drawing: Drawing,
    pub(super) series: Vec<Series>,
    /// The y axis holds at least this range.
    pub(super) y_range: Option<(f64, f64)>,
}

impl Chart {
    /// The chart as an `<svg>` element.
    pub(super) fn to_svg(&self) -> String {
        let legend = Legend::of(&self.series);
        let plot = Plot::of(self, TOP + legend.height());
        let height = plot.bottom + BOTTOM;
        [
            format!(
                "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">",
                escape(&self.title)
            ),
            legend.draw(),
            plot.draw_grid(),
            self.draw_series(&plot),
            plot.draw_axes(&self.x_label),
            "</svg>".to_owned(),
        ]
        .join("\n")
    }

    fn draw_series(&self, plot: &Plot) -> String {
        let curves = match self.drawing {
            Drawing::Lines => {
                self.series.iter().enumerate().map(|(index, series)| draw_line(plot, index, series)).collect()
            }
            Drawing::Stack => draw_stack(plot, &self.series),
        };
        let curves: Vec<String> = curves;
        curves.join("\n")
    }
}

/// Means of a sliding window of a twentieth of the curve. Towards the ends it narrows to the last three points, so
/// that a curve starts and ends where the measured one does.
pub(super) fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = if points.len() < SMOOTHED_FROM { 0 } else { points.len() / 40 };
    let mean = |center: usize| {
        let reach = reach.min(center.max(2)).min((points.len() - 1 - center).max(2));
        let window = &points[center.saturating_sub(reach)..points.len().min(center + reach + 1)];
        window.iter().map(|(_, y)| y).sum::<f64>() / window.len() as f64
    };
    points.iter().enumerate().map(|(index, (x, _))| (*x, mean(index))).collect()
}

fn draw_line(plot: &Plot, index: usize, series: &Series) -> String {
    let class = color_class(index);
    let path = |kind: &str, points: &[(f64, f64)]| {
        format!("<path class=\"{kind} {class}\" d=\"{}\"/>", plot.path(points.iter().copied()))
    };
    match series.points.as_slice() {
        [point] => plot.draw_dot(*point, &class),
        points if points.len() < SMOOTHED_FROM => path("line", points),
        points => path("raw", points) + &path("line", &smoothed(points)),
    }
}

fn draw_stack(plot: &Plot, series: &[Series]) -> Vec<String> {
    let mut floor: Vec<(f64, f64)> =
        series.first().map_or(&[][..], |first| &first.points).iter().map(|(x, _)| (*x, 0.0)).collect();
    let mut areas = Vec::new();
    for (index, one) in series.iter().enumerate() {
        let values = smoothed(&one.points);
        let top: Vec<_> = floor.iter().zip(&values).map(|((x, base), (_, y))| (*x, base + y)).collect();
        let outline = top.iter().chain(floor.iter().rev()).copied();
        areas.push(format!("<path class=\"area {}\" d=\"{}Z\"/>", color_class(index), plot.path(outline)));
        floor = top;
    }
    areas
}

fn color_class(index: usize) -> String {
    format!("c{}", index % COLORS)
}

/// The plotting area and its two scales.
struct Plot {
    top: f64,
    bottom: f64,
    x: Axis,
    y: Axis,
}

impl Plot {
    fn of(chart: &Chart, top: f64) -> Self {
        let ends = |range: Option<(f64, f64)>| range.into_iter().flat_map(|(low, high)| [low, high]);
        let xs = chart.series.iter().flat_map(|series| series.points.iter().map(|(x, _)| *x));
        let (x_low, x_high) = range(xs.chain(ends(chart.x_range))).unwrap_or((0.0, 1.0));
        let ys = chart.heights().into_iter();
        let (y_low, y_high) = range(ys.chain(ends(chart.y_range))).unwrap_or((0.0, 1.0));
        let y = Axis::rounded(y_low, y_high, 5);
        Self { top, bottom: top + PLOT_HEIGHT, x: Axis::exact(x_low, x_high, 7), y }
    }

    fn place(&self, (x, y): (f64, f64)) -> (f64, f64) {
        let across = LEFT + self.x.share(x) * (WIDTH - LEFT - RIGHT);
        (across, self.bottom - self.y.share(y) * (self.bottom - self.top))
    }

    fn path(&self, points: impl Iterator<Item = (f64, f64)>) -> String {
        let command = |(index, point)| {
            let (x, y) = self.place(point);
            format!("{}{x:.1} {y:.1}", if index == 0 { 'M' } else { 'L' })
        };
        points.enumerate().map(command).collect::<Vec<_>>().concat()
    }

    fn draw_dot(&self, point: (f64, f64), class: &str) -> String {
        let (x, y) = self.place(point);
        format!("<circle class=\"dot {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\"/>")
    }

    fn draw_grid(&self) -> String {
        let line = |tick: &f64| {
            let (_, y) = self.place((self.x.low, *tick));
            let right = WIDTH - RIGHT;
            let label = self.y.label(*tick);
            format!(
                "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>\
                 <text class=\"tick end\" x=\"{}\" y=\"{:.1}\">{label}</text>",
                LEFT - 8.0,
                y + 3.5
            )
        };
        self.y.ticks.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    fn draw_axes(&self, x_label: &str) -> String {
        let (right, bottom) = (WIDTH - RIGHT, self.bottom);
        let tick = |value: &f64| {
            let (x, _) = self.place((*value, self.y.low));
            format!(
                "<line class=\"axis\" x1=\"{x:.1}\" y1=\"{bottom}\" x2=\"{x:.1}\" y2=\"{}\"/>\
                 <text class=\"tick middle\" x=\"{x:.1}\" y=\"{}\">{}</text>",
                bottom + 4.0,
                bottom + 16.0,
                self.x.label(*value)
            )
        };
        let ticks = self.x.ticks.iter().map(tick).collect::<Vec<_>>().join("\n");
        let middle = f64::midpoint(LEFT, right);
        format!(
            "<line class=\"axis\" x1=\"{LEFT}\" y1=\"{bottom}\" x2=\"{right}\" y2=\"{bottom}\"/>\n{ticks}\n\
             <text class=\"label middle\" x=\"{middle}\" y=\"{}\">{}</text>",
            bottom + 33.0,
            escape(x_label)
        )
    }
}

impl Chart {
    /// The values that the y axis must hold.
    fn heights(&self) -> Vec<f64> {
        match self.drawing {
            Drawing::Lines => self.series.iter().flat_map(|one| one.points.iter().map(|(_, y)| *y)).collect(),
            Drawing::Stack => {
                let columns = self.series.iter().map(|one| one.points.len()).max().unwrap_or(0);
                let smooth: Vec<_> = self.series.iter().map(|one| smoothed(&one.points)).collect();
                let sum = |column| smooth.iter().filter_map(|one| one.get(column)).map(|(_, y)| y).sum();
                std::iter::once(0.0).chain((0..columns).map(sum)).collect()
            }
        }
    }
}

/// A linear scale with round ticks.
struct Axis {
    low: f64,
    high: f64,
    step: f64,
    ticks: Vec<f64>,
}

impl Axis {
    /// From `low` to `high`, with ticks where they are round.
    fn exact(low: f64, high: f64, most_ticks: usize) -> Self {
        let (low, high) = widened(low, high);
        let step = round_step((high - low) / most_ticks as f64);
        let first = (low / step).ceil();
        let count = ((high / step).floor() - first).clamp(0.0, 2.0 * most_ticks as f64) as usize;
        let ticks = (0..=count).map(|index| (first + index as f64) * step).collect();
        Self { low, high, step, ticks }
    }

    /// From a tick at or below `low` to one at or above `high`.
    fn rounded(low: f64, high: f64, most_ticks: usize) -> Self {
        let (low, high) = widened(low, high);
        let step = round_step((high - low) / most_ticks as f64);
        // Sums of shares may miss a tick by a rounding error; that must not add another one.
        let (first, last) = ((low / step + 1e-9).floor(), (high / step - 1e-9).ceil());
        Self::exact(first * step, last * step, most_ticks + 2)
    }

    /// Where a value lies between the ends of the axis, 0 to 1; outliers stay close to the plot.
    fn share(&self, value: f64) -> f64 {
        let share = (value - self.low) / (self.high - self.low);
        if share.is_nan() { 0.0 } else { share.clamp(-0.1, 1.1) }
    }

    fn label(&self, value: f64) -> String {
        let largest = self.low.abs().max(self.high.abs());
        if !(1e-3..1e6).contains(&largest) {
            return format!("{:e}", rounded_to(value, self.step));
        }
        let decimals = (-self.step.log10().floor()).clamp(0.0, 9.0) as usize;
        // Adding 0 turns -0 into 0.
        format!("{:.decimals$}", rounded_to(value, self.step) + 0.0)
    }
}

/// The value without the noise of binary fractions far below one step of the axis.
fn rounded_to(value: f64, step: f64) -> f64 {
    let scale = 10_f64.powi(2 - step.log10().floor() as i32);
    let rounded = (value * scale).round() / scale;
    if rounded.is_finite() { rounded } else { value }
}

/// 1, 2 or 5 times a power of ten, at least `raw`.
fn round_step(raw: f64) -> f64 {
    let power = 10_f64.powf(raw.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|factor| factor * power >= raw * (1.0 - 1e-9));
    factor.unwrap_or(10.0) * power
}

/// Smallest and largest finite value.
fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let finite = values.filter(|value| value.is_finite());
    finite.fold(None, |range, value| match range {
        None => Some((value, value)),
        Some((low, high)) => Some((f64::min(low, value), f64::max(high, value))),
    })
}

/// The range, or one around it if it is too narrow or too wide to divide.
fn widened(low: f64, high: f64) -> (f64, f64) {
    const LARGEST: f64 = 1e300;
    const SMALLEST: f64 = 1e-300;
    let (low, high) = (low.clamp(-LARGEST, LARGEST), high.clamp(-LARGEST, LARGEST));
    let margin = f64::max(low.abs().max(high.abs()) * 1e-9, SMALLEST);
    if high - low > margin {
        return (low, high);
    }
    let half = if low == 0.0 { 1.0 } else { low.abs() * 0.5 };
    (low - half, low + half)
}

/// Names and colours above the plot, in as many rows as they need.
struct Legend {
    items: Vec<(f64, f64, String)>,
    rows: usize,
}

impl Legend {
    fn of(series: &[Series]) -> Self {
        let mut legend = Self { items: Vec::new(), rows: 0 };
        if series.len() < 2 {
            return legend;
        }
        let (mut x, mut row) = (LEFT, 0);
        for one in series {
            let width = 28.0 + 6.1 * one.name.chars().count() as f64;
            if x + width > WIDTH && x > LEFT {
                (x, row) = (LEFT, row + 1);
            }
            legend.items.push((x, 14.0 + LEGEND_ROW * f64::from(row), one.name.clone()));
            x += width;
        }
        legend.rows = row as usize + 1;
        legend
    }

    fn height(&self) -> f64 {
        LEGEND_ROW * self.rows as f64
    }

    fn draw(&self) -> String {
        let item = |(index, (x, y, name)): (usize, &(f64, f64, String))| {
            format!(
                "<rect class=\"key {}\" x=\"{x:.1}\" y=\"{:.1}\" width=\"10\" height=\"10\" rx=\"2\"/>\
                 <text class=\"label\" x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
                color_class(index),
                y - 9.0,
                x + 15.0,
                escape(name)
            )
        };
        self.items.iter().enumerate().map(item).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ticks_are_round_and_cover_the_range() {
        let axis = Axis::rounded(0.0, 0.97, 5);
        let labels: Vec<_> = axis.ticks.iter().map(|tick| axis.label(*tick)).collect();
        assert_eq!(labels, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        let axis = Axis::exact(1.0, 928.0, 7);
        let labels: Vec<_> = axis.ticks.iter().map(|tick| axis.label(*tick)).collect();
        assert_eq!(labels, ["200", "400", "600", "800"]);
        let axis = Axis::rounded(0.0, 3.2e-5, 5);
        assert_eq!(axis.label(axis.ticks[1]), "1e-5");
    }

    #[test]
    fn smoothing_keeps_straight_lines_and_short_curves() {
        let line: Vec<_> = (0..200).map(|x| (f64::from(x), 2.0 * f64::from(x) + 1.0)).collect();
        let smooth = smoothed(&line);
        for ((x, y), (smooth_x, smooth_y)) in line.iter().zip(&smooth).skip(2).take(196) {
            assert!(x == smooth_x && (y - smooth_y).abs() < 1e-9);
        }
        assert_eq!(smooth[199].1, (197..200).map(|x| line[x].1).sum::<f64>() / 3.0);
        assert_eq!(smoothed(&line[..39]), line[..39]);
        assert!(smoothed(&[]).is_empty());
    }

    #[test]
    fn names_are_escaped() {
        let series = |name: &str| Series { name: name.into(), points: vec![(0.0, 1.0), (1.0, 2.0)] };
        let chart = Chart {
            title: "<\"&".into(),
            x_label: "<x>".into(),
            x_range: None,
            drawing: Drawing::Lines,
            series: vec![series("<script>"), series("b")],
            y_range: None,
        };
        let svg = chart.to_svg();
        assert!(!svg.contains("<script>") && !svg.contains("<x>") && svg.contains("&lt;script&gt;"));
    }

    proptest! {
        #[test]
        fn any_numbers_give_finite_drawings(
            values in prop::collection::vec(prop::num::f64::NORMAL | prop::num::f64::ZERO | prop::num::f64::SUBNORMAL, 0..60),
            stack in any::<bool>(),
        ) {
            let points: Vec<_> = values.iter().enumerate().map(|(x, y)| (x as f64, *y)).collect();
            let series = vec![Series { name: "a".into(), points: points.clone() }, Series { name: "b".into(), points }];
            let drawing = if stack { Drawing::Stack } else { Drawing::Lines };
            let chart = Chart { title: String::new(), x_label: String::new(), x_range: None, drawing, series, y_range: None };
            let plot = Plot::of(&chart, TOP);
            prop_assert!(plot.y.ticks.len() <= 16 && plot.y.step > 0.0);
            prop_assert!(plot.y.high > plot.y.low);
            let svg = chart.to_svg();
            prop_assert!(!svg.contains("NaN") && !svg.contains("inf"), "{}", svg);
        }

        #[test]
        fn steps_are_one_two_or_five(raw in 1e-200_f64..1e200) {
            let step = round_step(raw);
            prop_assert!(step >= raw * 0.999 && step <= raw * 10.001);
        }
    }
}

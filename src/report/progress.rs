//! Progress of a stage: a bar on a terminal, now and then a line elsewhere.

use super::Log;
use indicatif::{ProgressBar, ProgressStyle};
use std::time::{Duration, Instant};

/// Shortest time between two plain lines.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

const BAR_TEMPLATE: &str = "{prefix} {bar:24} {pos}/{len}  {msg}";

/// Progress of one stage with its rate, the time left, and the newest figures.
///
/// On a terminal a bar is drawn; elsewhere a line is written at most every 10 seconds. The log file
/// gets the lines either way, and always the last one.
pub struct Progress<'log> {
    log: &'log Log,
    bar: Option<ProgressBar>,
    title: String,
    first: u64,
    done: u64,
    total: u64,
    figures: String,
    started: Instant,
    last_line: Instant,
}

impl<'log> Progress<'log> {
    /// Progress of `title` from step `first` (where a resumed stage goes on) to `total`.
    pub fn new(log: &'log Log, title: &str, first: u64, total: u64) -> Self {
        let now = Instant::now();
        Self {
            log,
            bar: log.is_terminal().then(|| new_bar(log, title, first, total)),
            title: title.to_owned(),
            first,
            done: first,
            total,
            figures: String::new(),
            started: now,
            last_line: now,
        }
    }

    /// Reports that `done` steps are finished, with figures such as `[("reward", 0.31)]`.
    pub fn step(&mut self, done: u64, figures: &[(&str, f64)]) {
        let now = Instant::now();
        self.done = done;
        self.figures = join(figures);
        if let Some(bar) = &self.bar {
            bar.set_position(done);
            bar.set_message(self.pace(now));
        }
        if now.duration_since(self.last_line) >= LINE_INTERVAL {
            self.last_line = now;
            self.write_line(now, false);
        }
    }

    /// Writes the last line and removes the bar.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.write_line(Instant::now(), true);
    }

    fn write_line(&self, now: Instant, last: bool) {
        let line = format!("{} {}/{}  {}", self.title, self.done, self.total, self.pace(now));
        // A bar on the screen replaces all lines but the last.
        if self.bar.is_some() && !last { self.log.keep(&line) } else { self.log.say(&line) }
    }

    fn pace(&self, now: Instant) -> String {
        let steps = self.done.saturating_sub(self.first);
        let left = self.total.saturating_sub(self.done);
        let pace = describe_pace(steps, left, now.duration_since(self.started));
        [pace, self.figures.clone()]
            .iter()
            .filter(|part| !part.is_empty())
            .cloned()
            .collect::<Vec<_>>()
            .join("  ")
    }
}

fn new_bar(log: &Log, title: &str, first: u64, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(BAR_TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = log.bars().add(ProgressBar::new(total));
    bar.set_style(style.progress_chars("━╸─"));
    bar.set_prefix(title.to_owned());
    bar.set_position(first);
    bar
}

/// `2.5 steps/s, 3m 20s left`, or the time taken when nothing is left.
fn describe_pace(steps: u64, left: u64, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    if left == 0 {
        return format!("took {}", describe_seconds(seconds));
    }
    if steps == 0 || seconds <= 0.0 {
        return String::new();
    }
    let rate = steps as f64 / seconds;
    let rate_text =
        if rate >= 0.1 { format!("{rate:.1} steps/s") } else { format!("{:.0} s/step", 1.0 / rate) };
    format!("{rate_text}, {} left", describe_seconds(left as f64 / rate))
}

/// `8.2s`, `3m 20s`, `2h 05m`, `3d 04h`.
fn describe_seconds(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..10 => format!("{seconds:.1}s"),
        10..60 => format!("{whole}s"),
        60..3600 => format!("{}m {:02}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h {:02}m", whole / 3600, whole / 60 % 60),
        _ => format!("{}d {:02}h", whole / 86_400, whole / 3600 % 24),
    }
}

fn join(figures: &[(&str, f64)]) -> String {
    let one = |(name, value): &(&str, f64)| format!("{name} {}", describe_figure(*value));
    figures.iter().map(one).collect::<Vec<_>>().join("  ")
}

/// About four significant digits.
fn describe_figure(value: f64) -> String {
    match value.abs() {
        size if size >= 1000.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.001 || size == 0.0 => format!("{value:.3}"),
        _ => format!("{value:.1e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn without_a_terminal_a_short_stage_is_one_line() {
        let screen = Screen::default();
        let log = Log::to_writer(Box::new(screen.clone()));
        let mut progress = Progress::new(&log, "train", 10, 100);
        (11..=100).for_each(|step| progress.step(step, &[("reward", 0.5), ("zero-variance", 0.25)]));
        progress.finish();
        let text = String::from_utf8(screen.0.lock().unwrap().clone()).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(text.starts_with("train 100/100  took "), "{text}");
        assert!(text.ends_with("reward 0.500  zero-variance 0.250\n"), "{text}");
    }

    #[test]
    fn rate_and_time_left_count_only_the_steps_of_this_process() {
        assert_eq!(describe_pace(20, 500, Duration::from_secs(8)), "2.5 steps/s, 3m 20s left");
        assert_eq!(describe_pace(2, 10, Duration::from_secs(100)), "50 s/step, 8m 20s left");
        assert_eq!(describe_pace(0, 10, Duration::from_secs(1)), "");
        assert_eq!(describe_pace(5, 0, Duration::from_millis(8200)), "took 8.2s");
    }

    #[test]
    fn durations_and_figures_read_well() {
        let durations = [(7.25, "7.2s"), (59.4, "59s"), (7500.0, "2h 05m"), (273_600.0, "3d 04h")];
        for (seconds, text) in durations {
            assert_eq!(describe_seconds(seconds), text);
        }
        let figures =
            [(0.0, "0.000"), (0.1234, "0.123"), (12.34, "12.3"), (12345.6, "12346"), (1e-6, "1.0e-6")];
        for (value, text) in figures {
            assert_eq!(describe_figure(value), text);
        }
        assert_eq!(describe_figure(f64::NAN), "NaN");
    }
}

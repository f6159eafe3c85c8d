//! The one way to the terminal: lines on stderr and in the attempt's log file.

use super::ReportError;
use super::files::at;
use indicatif::{MultiProgress, ProgressDrawTarget};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// Lines for people, on stderr and, with the time, in a file; safe to share between threads.
///
/// Colour is used on a terminal unless `NO_COLOR` is set or `TERM` is `dumb`.
pub struct Log {
    sinks: Mutex<Sinks>,
    bars: MultiProgress,
    terminal: bool,
    color: bool,
    path: Option<PathBuf>,
}

struct Sinks {
    screen: Box<dyn Write + Send>,
    file: Option<File>,
    warnings: u64,
    lost_lines: u64,
}

impl Log {
    /// A log on stderr and in the next free `attempt-N.log` (N from 1) of `directory`, which is created if it is
    /// absent. The link `latest` leads to that file.
    ///
    /// # Errors
    /// [`ReportError::Io`] if the file cannot be created.
    pub fn open(directory: &Path) -> Result<Self, ReportError> {
        let (file, path) = next_attempt(directory)?;
        Ok(Self::new(Box::new(std::io::stderr()), std::io::stderr().is_terminal(), Some((file, path))))
    }

    /// A log on stderr alone.
    pub fn without_file() -> Self {
        Self::new(Box::new(std::io::stderr()), std::io::stderr().is_terminal(), None)
    }

    /// A log on `screen`, which is no terminal: for commands that hand their lines on, and for tests.
    pub fn to_writer(screen: Box<dyn Write + Send>) -> Self {
        Self::new(screen, false, None)
    }

    fn new(screen: Box<dyn Write + Send>, terminal: bool, file: Option<(File, PathBuf)>) -> Self {
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let (file, path) = file.unzip();
        Self {
            sinks: Mutex::new(Sinks { screen, file, warnings: 0, lost_lines: 0 }),
            bars: MultiProgress::with_draw_target(target),
            terminal,
            color: terminal && color_wanted(|name| std::env::var(name).ok()),
            path,
        }
    }

    /// Writes one line.
    pub fn say(&self, line: impl AsRef<str>) {
        let line = printable(line.as_ref());
        self.show(&line);
        self.keep(&line);
    }

    /// Writes one line that starts with `warning:`, and counts it.
    pub fn warn(&self, line: impl AsRef<str>) {
        let line = printable(line.as_ref());
        let word = if self.color { "\x1b[1;33mwarning:\x1b[0m" } else { "warning:" };
        self.show(&format!("{word} {line}"));
        self.keep(&format!("warning: {line}"));
        self.sinks().warnings += 1;
    }

    /// Warnings so far.
    pub fn warnings(&self) -> u64 {
        self.sinks().warnings
    }

    /// Lines that could not be written to the file.
    pub fn lost_lines(&self) -> u64 {
        self.sinks().lost_lines
    }

    /// The log file, if there is one.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// The bars on the terminal; hidden elsewhere.
    pub(super) fn bars(&self) -> &MultiProgress {
        &self.bars
    }

    /// Whether stderr is a terminal.
    pub(super) fn is_terminal(&self) -> bool {
        self.terminal
    }

    /// Writes one line to the screen only, above the bars.
    fn show(&self, line: &str) {
        // Nobody is left to tell when stderr itself is gone.
        let print = || drop(writeln!(self.sinks().screen, "{line}"));
        if self.terminal { self.bars.suspend(print) } else { print() }
    }

    /// Writes one line to the file only. The first failure is shown; later ones are counted.
    pub(super) fn keep(&self, line: &str) {
        let mut sinks = self.sinks();
        let Some(file) = &mut sinks.file else { return };
        let entry = format!("{} {line}\n", timestamp(SystemTime::now()));
        let Err(error) = file.write_all(entry.as_bytes()) else { return };
        sinks.lost_lines += 1;
        let first = sinks.lost_lines == 1;
        drop(sinks);
        if first {
            let path = self.path.as_deref().unwrap_or(Path::new("log"));
            self.show(&format!("warning: {}: {error}; the log file is incomplete", path.display()));
        }
    }

    fn sinks(&self) -> MutexGuard<'_, Sinks> {
        self.sinks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn color_wanted(variable: impl Fn(&str) -> Option<String>) -> bool {
    let refused = variable("NO_COLOR").is_some_and(|value| !value.is_empty());
    !refused && variable("TERM").as_deref() != Some("dumb")
}

/// The line without control characters, which could rewrite what a terminal shows.
fn printable(line: &str) -> String {
    let plain = |c: char| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c };
    line.chars().map(plain).collect()
}

fn next_attempt(directory: &Path) -> Result<(File, PathBuf), ReportError> {
    std::fs::create_dir_all(directory).map_err(at(directory))?;
    let mut number = 1_u64;
    loop {
        let name = format!("attempt-{number}.log");
        let path = directory.join(&name);
        match OpenOptions::new().append(true).create_new(true).open(&path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
            file => {
                let file = file.map_err(at(&path))?;
                point_latest_to(&name, directory)?;
                return Ok((file, path));
            }
        }
    }
}

/// Replaces the link `latest` in one move, so that readers always find one.
fn point_latest_to(name: &str, directory: &Path) -> Result<(), ReportError> {
    let latest = directory.join("latest");
    // Several workers may begin at a time; no two have the same attempt.
    let unfinished = directory.join(format!(".latest-{name}"));
    std::os::unix::fs::symlink(name, &unfinished).map_err(at(&unfinished))?;
    std::fs::rename(&unfinished, &latest).map_err(at(&latest))
}

/// `2025-11-21T08:03:11Z`: the proleptic Gregorian calendar in UTC. Days become a date by counting from
/// 1 March of year 0, so that leap days end the year.
fn timestamp(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{:02}Z", second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn text_without_times(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
    }

    #[test]
    fn attempts_are_numbered_and_latest_leads_to_the_newest() {
        let directory = tempfile::tempdir().unwrap();
        let logs = directory.path().join("logs");
        for attempt in 1..=3 {
            let (_, path) = next_attempt(&logs).unwrap();
            assert_eq!(path, logs.join(format!("attempt-{attempt}.log")));
            assert_eq!(
                std::fs::read_link(logs.join("latest")).unwrap(),
                Path::new(path.file_name().unwrap())
            );
        }
    }

    #[test]
    fn lines_of_many_threads_stay_whole() {
        let directory = tempfile::tempdir().unwrap();
        let file = next_attempt(directory.path()).unwrap();
        let path = file.1.clone();
        let log = Log::new(Box::new(std::io::sink()), false, Some(file));
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let log = &log;
                scope.spawn(move || (0..50).for_each(|line| log.say(format!("thread {thread} line {line}"))));
            }
        });
        log.warn("careful\x1b[2J");
        let mut lines = text_without_times(&path);
        assert_eq!(lines.pop().unwrap(), "warning: careful\u{fffd}[2J");
        lines.sort();
        let mut expected: Vec<_> =
            (0..4).flat_map(|t| (0..50).map(move |l| format!("thread {t} line {l}"))).collect();
        expected.sort();
        assert_eq!(lines, expected);
        assert_eq!((log.warnings(), log.lost_lines()), (1, 0));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_loses_log_lines_but_never_the_run() {
        let full = OpenOptions::new().append(true).open("/dev/full").unwrap();
        let log = Log::new(Box::new(std::io::sink()), false, Some((full, "/dev/full".into())));
        log.say("one");
        log.say("two");
        assert_eq!(log.lost_lines(), 2);
    }

    #[test]
    fn colour_is_off_where_it_is_not_wanted() {
        let with = |name: &'static str, value: &'static str| {
            color_wanted(move |asked| (asked == name).then(|| value.to_owned()))
        };
        assert!(!with("NO_COLOR", "1") && !with("TERM", "dumb"));
        assert!(with("NO_COLOR", "") && with("TERM", "xterm"));
    }

    #[test]
    fn times_match_the_calendar() {
        let at = |seconds| timestamp(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_763_712_191), "2025-11-21T08:03:11Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
    }
}

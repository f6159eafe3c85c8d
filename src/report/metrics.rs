//! The metrics log: one flat JSON object per line, cut back to a checkpoint on resume.

use super::ReportError;
use super::files::{at, sync_directory};
use serde::ser::{Serialize, SerializeMap as _, Serializer};
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

/// One figure or word of a metrics line.
#[derive(Clone, Debug, PartialEq)]
pub enum MetricValue {
    /// A single-precision number, written with the fewest digits that give it back.
    Single(f32),
    /// A double-precision number, written with the fewest digits that give it back.
    Double(f64),
    /// A count.
    Count(u64),
    /// A word.
    Text(String),
}

impl MetricValue {
    /// Whether the value is NaN or infinite, which JSON cannot hold: it is written as `null`.
    pub fn is_not_finite(&self) -> bool {
        match self {
            Self::Single(value) => !value.is_finite(),
            Self::Double(value) => !value.is_finite(),
            Self::Count(_) | Self::Text(_) => false,
        }
    }
}

impl Serialize for MetricValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            _ if self.is_not_finite() => serializer.serialize_none(),
            Self::Single(value) => serializer.serialize_f32(*value),
            Self::Double(value) => serializer.serialize_f64(*value),
            Self::Count(value) => serializer.serialize_u64(*value),
            Self::Text(value) => serializer.serialize_str(value),
        }
    }
}

impl From<f32> for MetricValue {
    fn from(value: f32) -> Self {
        Self::Single(value)
    }
}
impl From<f64> for MetricValue {
    fn from(value: f64) -> Self {
        Self::Double(value)
    }
}
impl From<u64> for MetricValue {
    fn from(value: u64) -> Self {
        Self::Count(value)
    }
}
impl From<u32> for MetricValue {
    fn from(value: u32) -> Self {
        Self::Count(value.into())
    }
}
impl From<usize> for MetricValue {
    fn from(value: usize) -> Self {
        Self::Count(value as u64)
    }
}
impl From<&str> for MetricValue {
    fn from(value: &str) -> Self {
        Self::Text(value.to_owned())
    }
}
impl From<String> for MetricValue {
    fn from(value: String) -> Self {
        Self::Text(value)
    }
}

/// The figures of one step, in the order in which they were added.
#[derive(Clone, Debug, PartialEq)]
pub struct Metrics {
    entries: Vec<(String, MetricValue)>,
}

impl Metrics {
    /// A line of `stage` at `step`.
    pub fn new(stage: &str, step: u64) -> Self {
        Self { entries: vec![("stage".into(), stage.into()), ("step".into(), step.into())] }
    }

    /// Adds a figure; one of the same name is replaced in its place.
    #[must_use]
    pub fn with(mut self, key: impl Into<String>, value: impl Into<MetricValue>) -> Self {
        self.set(key, value);
        self
    }

    /// Adds a figure; one of the same name is replaced in its place.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<MetricValue>) {
        let (key, value) = (key.into(), value.into());
        match self.entries.iter_mut().find(|(name, _)| *name == key) {
            Some((_, old)) => *old = value,
            None => self.entries.push((key, value)),
        }
    }

    /// The value of that name.
    pub fn get(&self, key: &str) -> Option<&MetricValue> {
        self.entries.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// Names and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &MetricValue)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }
}

impl Serialize for Metrics {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.entries.len()))?;
        for (key, value) in &self.entries {
            map.serialize_entry(key, value)?;
        }
        map.end()
    }
}

/// An append-only `metrics.jsonl`.
///
/// Each line is in the file when [`MetricsLog::write`] returns, so that a run can be followed; it is
/// durable after [`MetricsLog::sync`]. A checkpoint records [`MetricsLog::bytes`], and a resumed run opens the
/// log at that position: the lines behind it are written again.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    bytes: u64,
    dropped_lines: u64,
    not_finite: u64,
}

impl MetricsLog {
    /// Opens or creates the log and drops everything behind the first `resume_bytes` bytes.
    ///
    /// # Errors
    /// [`ReportError::MetricsPosition`] if the file is shorter, or if no line ends at that position.
    pub fn open(path: &Path, resume_bytes: u64) -> Result<Self, ReportError> {
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).open(path).map_err(at(path))?;
        sync_directory(path.parent().unwrap_or(Path::new(".")))?;
        let found = file.metadata().map_err(at(path))?.len();
        let misplaced = || ReportError::MetricsPosition { path: path.into(), expected: resume_bytes, found };
        if found < resume_bytes || !ends_line(&mut file, resume_bytes).map_err(at(path))? {
            return Err(misplaced());
        }
        let mut dropped_lines = 0;
        if found > resume_bytes {
            dropped_lines = lines_behind(&mut file, resume_bytes).map_err(at(path))?;
            file.set_len(resume_bytes).map_err(at(path))?;
        }
        Ok(Self { path: path.into(), file, bytes: resume_bytes, dropped_lines, not_finite: 0 })
    }

    /// Lines behind the checkpoint that were dropped when the log was opened.
    pub fn dropped_lines(&self) -> u64 {
        self.dropped_lines
    }

    /// Values written as `null` since the log was opened because they were NaN or infinite.
    pub fn not_finite(&self) -> u64 {
        self.not_finite
    }

    /// Bytes of all lines so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Appends one line. After an error the file ends with the last complete line, as far as the system allows.
    ///
    /// # Errors
    /// [`ReportError::Io`], with a hint of its own for a full disk.
    pub fn write(&mut self, metrics: &Metrics) -> Result<(), ReportError> {
        let mut line = serde_json::to_vec(metrics).map_err(std::io::Error::from).map_err(at(&self.path))?;
        line.push(b'\n');
        if let Err(error) = self.file.write_all(&line) {
            // The first error is the one to report; a part of a line that stays is dropped on resume.
            let _ = self.file.set_len(self.bytes);
            return Err(at(&self.path)(error));
        }
        self.bytes += line.len() as u64;
        self.not_finite += metrics.iter().filter(|(_, value)| value.is_not_finite()).count() as u64;
        Ok(())
    }

    /// Makes all lines durable and returns [`MetricsLog::bytes`]: call it before a checkpoint records the position.
    ///
    /// # Errors
    /// [`ReportError::Io`].
    pub fn sync(&mut self) -> Result<u64, ReportError> {
        self.file.sync_data().map_err(at(&self.path))?;
        Ok(self.bytes)
    }
}

/// Whether a line (or nothing) ends at `position`.
fn ends_line(file: &mut File, position: u64) -> std::io::Result<bool> {
    let Some(last) = position.checked_sub(1) else { return Ok(true) };
    let mut byte = [0];
    file.seek(SeekFrom::Start(last))?;
    file.read_exact(&mut byte)?;
    Ok(byte == *b"\n")
}

/// Lines from `position` to the end, an unfinished one included.
fn lines_behind(file: &mut File, position: u64) -> std::io::Result<u64> {
    let mut block = vec![0; 1 << 16];
    let (mut lines, mut last) = (0, b'\n');
    file.seek(SeekFrom::Start(position))?;
    loop {
        let read = file.read(&mut block)?;
        let Some(&end) = block[..read].last() else { break };
        last = end;
        lines += block[..read].split(|byte| *byte == b'\n').count() as u64 - 1;
    }
    Ok(lines + u64::from(last != b'\n'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(step: u64) -> Metrics {
        Metrics::new("train", step).with("reward", 0.25_f32).with("seconds/rollout", 1.5)
    }

    #[test]
    fn a_line_is_flat_ordered_json_with_short_numbers() {
        let metrics = Metrics::new("train", 12)
            .with("reward", 0.1_f32)
            .with("loss", 0.1_f64)
            .with("tokens", 7_u64)
            .with("device", "cpu")
            .with("reward", 0.3_f32);
        assert_eq!(
            serde_json::to_string(&metrics).unwrap(),
            r#"{"stage":"train","step":12,"reward":0.3,"loss":0.1,"tokens":7,"device":"cpu"}"#
        );
    }

    #[test]
    fn values_that_json_cannot_hold_are_null_and_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        log.write(&Metrics::new("train", 1).with("a", f32::NAN).with("b", f64::INFINITY).with("c", 1.0))
            .unwrap();
        assert_eq!(log.not_finite(), 2);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "{\"stage\":\"train\",\"step\":1,\"a\":null,\"b\":null,\"c\":1.0}\n");
    }

    #[test]
    fn a_resumed_log_has_the_bytes_of_an_uninterrupted_one() {
        let directory = tempfile::tempdir().unwrap();
        let (once, twice) = (directory.path().join("once.jsonl"), directory.path().join("twice.jsonl"));
        let mut log = MetricsLog::open(&once, 0).unwrap();
        (1..=5).for_each(|step| log.write(&line(step)).unwrap());
        let mut first = MetricsLog::open(&twice, 0).unwrap();
        (1..=3).for_each(|step| first.write(&line(step)).unwrap());
        let checkpoint = first.sync().unwrap();
        first.write(&line(4)).unwrap();
        first.file.write_all(b"{\"stage\":\"tr").unwrap();
        let mut second = MetricsLog::open(&twice, checkpoint).unwrap();
        assert_eq!(second.dropped_lines(), 2, "one whole line and one unfinished line");
        (4..=5).for_each(|step| second.write(&line(step)).unwrap());
        assert_eq!(second.bytes(), log.bytes());
        assert_eq!(std::fs::read(&once).unwrap(), std::fs::read(&twice).unwrap());
    }

    #[test]
    fn positions_that_the_file_cannot_have_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        MetricsLog::open(&path, 0).unwrap().write(&line(1)).unwrap();
        let before = std::fs::read(&path).unwrap();
        for position in [before.len() as u64 + 1, before.len() as u64 - 1] {
            let error = MetricsLog::open(&path, position).unwrap_err();
            assert!(matches!(error, ReportError::MetricsPosition { .. }), "{error}");
            assert!(error.hint().is_some());
        }
        assert_eq!(std::fs::read(&path).unwrap(), before, "a refused file is left alone");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_a_typed_error_with_advice() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let mut log = MetricsLog::open(&path, 0).unwrap();
        let error = log.write(&line(1)).unwrap_err();
        assert!(matches!(&error, ReportError::Io { path: at, .. } if *at == path), "{error}");
        assert!(error.hint().unwrap().starts_with("disk full"));
        assert_eq!(log.bytes(), 0);
    }
}

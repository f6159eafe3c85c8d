//! Curves out of a metrics file, in bounded memory.

use super::ReportError;
use super::files::at;
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::Path;

/// Most points that one curve holds.
const MAX_POINTS: usize = 400;

/// Down-sampled curves of all stages of a run, in the order in which the stages ran.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curves {
    /// One entry per stage.
    pub stages: Vec<StageCurves>,
    /// 1 if the file ends within a line, which is then left out: the run was still writing, or was killed.
    pub unfinished_lines: u64,
}

/// The curves of one stage.
///
/// Steps are gathered in at most 400 buckets of equal width; a bucket holds the mean. All curves
/// of a stage share their buckets. The width starts at one step and doubles when the buckets run out, so
/// memory does not grow with the length of the run.
#[derive(Clone, Debug, PartialEq)]
pub struct StageCurves {
    /// The stage's name.
    pub name: String,
    /// Lines read.
    pub lines: u64,
    /// Values that were `null`: NaN or infinite when they were measured.
    pub not_finite: u64,
    first_step: u64,
    last_step: u64,
    width: u64,
    steps: Vec<Mean>,
    keys: Vec<(String, Vec<Mean>)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    fn value(self) -> f64 {
        self.sum / self.count as f64
    }
}

impl Curves {
    /// Reads a metrics file; an absent one has no curves.
    ///
    /// # Errors
    /// [`ReportError::MetricsLine`] with the number of a line that is no object with `stage` and `step`.
    pub fn read(path: &Path) -> Result<Self, ReportError> {
        let mut curves = Self::default();
        let file = match File::open(path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(curves),
            file => file.map_err(at(path))?,
        };
        let (mut reader, mut line) = (BufReader::new(file), Vec::new());
        for number in 1.. {
            line.clear();
            if reader.read_until(b'\n', &mut line).map_err(at(path))? == 0 {
                break;
            }
            if line.last() != Some(&b'\n') {
                curves.unfinished_lines += 1;
                break;
            }
            let wrong = |reason| ReportError::MetricsLine { path: path.into(), line: number, reason };
            curves.add_line(&line).map_err(wrong)?;
        }
        Ok(curves)
    }

    fn add_line(&mut self, line: &[u8]) -> Result<(), String> {
        let object: Map<String, Value> =
            serde_json::from_slice(line).map_err(|error| format!("not a flat JSON object: {error}"))?;
        let stage = object.get("stage").and_then(Value::as_str).ok_or("no `stage`")?;
        let step = object.get("step").and_then(Value::as_u64).ok_or("no `step`")?;
        let index = self.stages.iter().position(|known| known.name == stage).unwrap_or_else(|| {
            self.stages.push(StageCurves::new(stage, step));
            self.stages.len() - 1
        });
        self.stages[index].add(step, &object);
        Ok(())
    }
}

impl StageCurves {
    fn new(name: &str, first_step: u64) -> Self {
        Self {
            name: name.to_owned(),
            lines: 0,
            not_finite: 0,
            first_step,
            last_step: first_step,
            width: 1,
            steps: Vec::new(),
            keys: Vec::new(),
        }
    }

    fn add(&mut self, step: u64, object: &Map<String, Value>) {
        let bucket = self.bucket(step);
        self.lines += 1;
        self.last_step = self.last_step.max(step);
        cell(&mut self.steps, bucket).add(step as f64);
        for (key, value) in object.iter().filter(|(key, _)| *key != "step") {
            match value.as_f64() {
                Some(number) => cell(self.curve(key), bucket).add(number),
                None => self.not_finite += u64::from(value.is_null()),
            }
        }
    }

    /// The bucket of a step, after widening the buckets as often as needed.
    fn bucket(&mut self, step: u64) -> usize {
        let offset = step.saturating_sub(self.first_step);
        while offset / self.width >= MAX_POINTS as u64 {
            self.width *= 2;
            halve(&mut self.steps);
            self.keys.iter_mut().for_each(|(_, curve)| halve(curve));
        }
        (offset / self.width) as usize
    }

    fn curve(&mut self, key: &str) -> &mut Vec<Mean> {
        let index = self.keys.iter().position(|(known, _)| known == key).unwrap_or_else(|| {
            self.keys.push((key.to_owned(), Vec::new()));
            self.keys.len() - 1
        });
        &mut self.keys[index].1
    }

    /// Names of all curves, in the order of their first appearance.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|(key, _)| key.as_str())
    }

    /// First and last step.
    pub fn step_range(&self) -> (f64, f64) {
        (self.first_step as f64, self.last_step as f64)
    }

    /// Steps in one bucket.
    pub fn steps_per_point(&self) -> u64 {
        self.width
    }

    /// (mean step, mean value) of each bucket that holds a value of `key`.
    pub fn points(&self, key: &str) -> Vec<(f64, f64)> {
        let curve = self.means(key);
        let both = self.steps.iter().zip(curve).filter(|(_, mean)| mean.count > 0);
        both.map(|(step, mean)| (step.value(), mean.value())).filter(|(_, value)| value.is_finite()).collect()
    }

    /// (mean step, sum of `key` / lines) of every bucket: a line without the key counts as 0, so the
    /// curves of several keys can be stacked.
    pub fn points_or_zero(&self, key: &str) -> Vec<(f64, f64)> {
        let curve = self.means(key).iter().map(|mean| mean.sum).chain(std::iter::repeat(0.0));
        let filled = self.steps.iter().zip(curve).filter(|(step, _)| step.count > 0);
        filled.map(|(step, sum)| (step.value(), sum / step.count as f64)).collect()
    }

    fn means(&self, key: &str) -> &[Mean] {
        self.keys.iter().find(|(known, _)| known == key).map_or(&[], |(_, curve)| curve)
    }
}

fn cell(curve: &mut Vec<Mean>, bucket: usize) -> &mut Mean {
    if curve.len() <= bucket {
        curve.resize(bucket + 1, Mean::default());
    }
    &mut curve[bucket]
}

/// Merges each pair of neighbouring buckets.
fn halve(curve: &mut Vec<Mean>) {
    let merge = |pair: &[Mean]| Mean {
        sum: pair.iter().map(|mean| mean.sum).sum(),
        count: pair.iter().map(|mean| mean.count).sum(),
    };
    *curve = curve.chunks(2).map(merge).collect();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Metrics, MetricsLog};

    fn curves_of(lines: impl Iterator<Item = Metrics>) -> Curves {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path, 0).unwrap();
        lines.for_each(|line| log.write(&line).unwrap());
        Curves::read(&path).unwrap()
    }

    #[test]
    fn short_runs_keep_every_point() {
        let curves = curves_of((1..=300).map(|step| Metrics::new("train", step).with("reward", step as f64)));
        let points = curves.stages[0].points("reward");
        assert_eq!(points.len(), 300);
        assert!(points.iter().all(|(step, value)| step == value));
    }

    #[test]
    fn long_runs_are_averaged_into_a_bounded_number_of_points() {
        let steps = 10_007;
        let curves = curves_of((1..=steps).map(|step| Metrics::new("train", step).with("x", step as f64)));
        let stage = &curves.stages[0];
        let points = stage.points("x");
        assert!(points.len() <= MAX_POINTS && points.len() > MAX_POINTS / 2, "{}", points.len());
        assert!(points.iter().all(|(step, value)| (step - value).abs() < 1e-9));
        let weighted: f64 = stage.keys[0].1.iter().map(|mean| mean.sum).sum();
        assert_eq!(weighted, (steps * (steps + 1) / 2) as f64, "no value is lost");
    }

    #[test]
    fn absent_figures_are_gaps_in_lines_and_zeros_in_stacks() {
        let line = |step: u64| {
            let line = Metrics::new("train", step);
            if step == 2 { line.with("outcome/rare", 3_u64) } else { line.with("loss", f64::NAN) }
        };
        let stage = &curves_of((1..=3).map(line)).stages[0];
        assert_eq!(stage.points("outcome/rare"), [(2.0, 3.0)]);
        assert_eq!(stage.points_or_zero("outcome/rare"), [(1.0, 0.0), (2.0, 3.0), (3.0, 0.0)]);
        assert_eq!((stage.points("loss"), stage.not_finite), (vec![], 2));
    }

    #[test]
    fn damaged_lines_are_named_and_an_unfinished_one_is_counted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let good = "{\"stage\":\"train\",\"step\":1}\n";
        std::fs::write(&path, format!("{good}{{\"stage\":\"tra")).unwrap();
        let curves = Curves::read(&path).unwrap();
        assert_eq!((curves.stages[0].lines, curves.unfinished_lines), (1, 1));
        std::fs::write(&path, format!("{good}{{\"stage\":\"train\"}}\n{good}")).unwrap();
        assert!(Curves::read(&path).unwrap_err().to_string().contains("line 2: no `step`"));
        assert_eq!(Curves::read(&directory.path().join("absent")).unwrap(), Curves::default());
    }

    #[test]
    fn extreme_steps_are_no_trouble() {
        let curves =
            curves_of([7, u64::MAX, 3].into_iter().map(|step| Metrics::new("train", step).with("x", 1.0)));
        assert!(curves.stages[0].points("x").len() >= 2);
    }
}

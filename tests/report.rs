//! What a user of metrics, rollout log and report relies on.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use rpt::report::{
    Curves, DataSummary, Histogram, Metrics, MetricsLog, ReportError, ReportInput, RolloutLog, RolloutRow,
    Table, TableLabel, TableRow, read_rows, render_report, sample_rows, write_report,
};
use std::path::Path;

const HOSTILE: &str =
    "</pre></style><script>alert('x')</script>\" onload=\"y & \u{0}\u{1b}[2J\u{202e} ]]> <!-- ü 日本";

fn row(step: u64, ordinal: u64) -> RolloutRow {
    let size = (ordinal % 7) as usize;
    let right = ordinal.is_multiple_of(3);
    RolloutRow {
        step,
        ordinal,
        sample: (ordinal % 8) as u32,
        document: format!("stories.parquet:{ordinal}"),
        position: 40 + size as u32,
        label: right.then(|| "answer".to_owned()),
        entropy: 1.5,
        context: format!("Gus gets on at Tampa {ordinal} and sees the"),
        thought: " Tampa Quito beach".into(),
        prediction: (size > 0).then(|| " beach".to_owned()),
        truth: " beach.".into(),
        outcome: if right { "correct" } else { "wrong" }.into(),
        reward: f32::from(u8::from(right)),
        advantage: 0.25,
        finish: "eos".into(),
        policy_version: step - 1,
        tokens: (0..size as u32).collect(),
        logprobs: vec![-0.5; size],
        policy_logprobs: vec![-0.25; size],
        sampling_logprobs: vec![f32::NEG_INFINITY; size],
        prompt_tokens: 99,
    }
}

/// Two rows at each step.
fn write_rows(log: &mut RolloutLog, steps: std::ops::RangeInclusive<u64>) {
    steps.for_each(|step| (0..2).for_each(|task| log.push(row(step, 2 * step + task)).unwrap()));
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn rollouts_come_back_as_they_were_written() {
    let directory = tempfile::tempdir().unwrap();
    let mut log = RolloutLog::new(directory.path()).unwrap();
    write_rows(&mut log, 1..=300);
    assert_eq!(names(directory.path()), ["rollouts.tmp"], "nothing is visible before it is committed");
    let path = log.commit(1, 300).unwrap().unwrap();
    assert_eq!(path.file_name().unwrap(), "rollouts-000001-000300.parquet");
    write_rows(&mut log, 301..=310);
    log.commit(301, 310).unwrap();
    assert_eq!(log.commit(311, 320).unwrap(), None, "a segment without rows is no file");
    let rows: Vec<_> = read_rows(directory.path()).unwrap().map(Result::unwrap).collect();
    let expected: Vec<_> =
        (1..=310).flat_map(|step| (0..2).map(move |task| row(step, 2 * step + task))).collect();
    assert!(rows == expected);
}

#[test]
fn a_resumed_rollout_log_has_the_bytes_of_an_uninterrupted_one() {
    let (once, twice) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut log = RolloutLog::new(once.path()).unwrap();
    for first in [1, 11, 21] {
        write_rows(&mut log, first..=first + 9);
        log.commit(first, first + 9).unwrap();
    }
    let mut killed = RolloutLog::new(twice.path()).unwrap();
    write_rows(&mut killed, 1..=10);
    killed.commit(1, 10).unwrap();
    killed.push(row(99, 99)).unwrap();
    killed.commit(11, 20).unwrap();
    write_rows(&mut killed, 21..=400);
    drop(killed);
    let mut resumed = RolloutLog::new(twice.path()).unwrap();
    assert_eq!(resumed.discard_after(10).unwrap(), 1);
    for first in [11, 21] {
        write_rows(&mut resumed, first..=first + 9);
        resumed.commit(first, first + 9).unwrap();
    }
    assert_eq!(names(once.path()), names(twice.path()));
    for name in names(once.path()) {
        let [a, b] = [&once, &twice].map(|directory| std::fs::read(directory.path().join(&name)).unwrap());
        assert!(a == b, "{name} differs");
    }
}

#[test]
fn a_segment_on_both_sides_of_a_checkpoint_is_refused_and_kept() {
    let directory = tempfile::tempdir().unwrap();
    let mut log = RolloutLog::new(directory.path()).unwrap();
    write_rows(&mut log, 1..=10);
    log.commit(1, 10).unwrap();
    let error = log.discard_after(5).unwrap_err();
    assert!(matches!(error, ReportError::SegmentStraddles { step: 5, .. }), "{error}");
    assert!(error.hint().is_some());
    assert_eq!(names(directory.path()).len(), 1);
    assert!(matches!(log.commit(5, 4).unwrap_err(), ReportError::SegmentReversed { .. }));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_stops_the_rollout_log_with_advice() {
    let directory = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink("/dev/full", directory.path().join("rollouts.tmp")).unwrap();
    let mut log = RolloutLog::new(directory.path()).unwrap();
    write_rows(&mut log, 1..=10);
    let error = log.commit(1, 10).unwrap_err();
    assert!(error.hint().is_some_and(|hint| hint.starts_with("disk full")), "{error:?}");
    assert_eq!(names(directory.path()), ["rollouts.tmp"]);
}

#[test]
fn damaged_and_foreign_rollout_files_are_errors_with_their_name() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("rollouts-000001-000002.parquet");
    std::fs::write(&path, b"PAR1 this is not parquet").unwrap();
    let results: Vec<_> = read_rows(directory.path()).unwrap().collect();
    assert_eq!(results.len(), 1, "reading ends after an error");
    assert!(results[0].as_ref().unwrap_err().to_string().contains("rollouts-000001-000002.parquet"));
    assert!(sample_rows(directory.path(), 2).is_err());
    assert_eq!(read_rows(&directory.path().join("absent")).unwrap().count(), 0);
}

#[test]
fn samples_come_from_beginning_middle_and_end() {
    let directory = tempfile::tempdir().unwrap();
    let mut log = RolloutLog::new(directory.path()).unwrap();
    for first in [1, 51] {
        write_rows(&mut log, first..=first + 49);
        log.commit(first, first + 49).unwrap();
    }
    let steps =
        |tasks| sample_rows(directory.path(), tasks).unwrap().iter().map(|row| row.step).collect::<Vec<_>>();
    assert_eq!(steps(2), [1, 1, 50, 50, 100, 100]);
    assert_eq!(steps(1000).len(), 200, "no rollout twice");
}

fn hostile_input(directory: &Path) -> ReportInput {
    let path = directory.join("metrics.jsonl");
    let mut log = MetricsLog::open(&path, 0).unwrap();
    for step in 1..=1000_u64 {
        let reward = if step <= 500 { 0.125 } else { 0.875 };
        let line = Metrics::new(HOSTILE, step)
            .with("reward", reward)
            .with(format!("reward/{HOSTILE}"), 0.5)
            .with("loss", f64::NAN)
            .with("entropy", 1.0)
            .with("outcome/correct", step)
            .with(format!("outcome/{HOSTILE}"), 1000 - step)
            .with("seconds/rollout", 0.7)
            .with("seconds/update", 0.3);
        log.write(&line).unwrap();
    }
    let text = HOSTILE.to_owned();
    let hostile_row = RolloutRow {
        document: text.clone(),
        label: Some(text.clone()),
        context: text.clone(),
        thought: text.clone(),
        prediction: Some(text.clone()),
        truth: text.clone(),
        outcome: text.clone(),
        finish: text.clone(),
        ..row(7, 7)
    };
    ReportInput {
        data: vec![DataSummary {
            name: text.clone(),
            counts: vec![(text.clone(), 7)],
            dropped: vec![(text.clone(), 7)],
            quarantined: vec![text.clone()],
            histograms: vec![Histogram { title: text.clone(), bins: vec![(text.clone(), 7)] }],
        }],
        title: text.clone(),
        summary: vec![(text.clone(), text.clone())],
        tables: vec![Table {
            title: text.clone(),
            caption: text.clone(),
            label_heading: text.clone(),
            labels: vec![TableLabel { name: text.clone(), covered_by_traces: true }],
            rows: vec![TableRow {
                name: text.clone(),
                accuracy: Some(0.9973),
                interval: Some([0.98, 1.0]),
                n: Some(1234),
                values: vec![Some(0.625)],
                flops: Some(3.1e13),
                emphasis: true,
            }],
            footnotes: vec![text.clone()],
        }],
        curves: Curves::read(&path).unwrap(),
        pipeline: text,
        rollouts: vec![hostile_row, row(900, 900)],
    }
}

/// Checks that tags are balanced and attributes quoted, and returns the names of the elements seen.
fn well_formed(xml: &str) -> Vec<String> {
    let (mut open, mut seen, mut rest) = (Vec::new(), Vec::new(), xml);
    while let Some(start) = rest.find('<') {
        assert!(
            !rest[..start].contains('>'),
            "bare > before {:?}",
            &rest[start..].chars().take(60).collect::<String>()
        );
        let end = start + rest[start..].find('>').expect("an open tag");
        let tag = &rest[start + 1..end];
        assert!(tag.matches('"').count().is_multiple_of(2) && !tag.contains('<'), "attributes of <{tag}>");
        let name: String =
            tag.trim_start_matches('/').chars().take_while(char::is_ascii_alphanumeric).collect();
        if tag.starts_with('/') {
            assert_eq!(open.pop().as_deref(), Some(name.as_str()), "closing tag");
        } else {
            seen.push(name.clone());
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
        rest = &rest[end + 1..];
    }
    assert!(open.is_empty(), "left open: {open:?}");
    seen
}

/// The page after its first line and without its style sheet, which may hold `>`.
fn body(page: &str) -> String {
    let (head, rest) = page.split_once("<style>").unwrap();
    let (_, tail) = rest.split_once("</style>").unwrap();
    format!("{head}{tail}").replacen("<!DOCTYPE html>", "", 1)
}

#[test]
fn hostile_text_stays_text() {
    let directory = tempfile::tempdir().unwrap();
    let page = render_report(&hostile_input(directory.path()));
    let elements = well_formed(&body(&page));
    assert!(!elements.iter().any(|name| name == "script"));
    assert!(!page.contains("onload=\"") && !page.contains('\u{0}') && !page.contains('\u{1b}'));
    assert!(page.contains("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"));
}

#[test]
fn the_page_holds_the_figures_and_needs_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let page = render_report(&hostile_input(directory.path()));
    for expected in [
        "99.7",
        "98.0 – 100.0",
        "1,234",
        "62.5",
        "3.1 × 10<sup>13</sup>",
        "covered by the traces",
        "0.125 → 0.875",
    ] {
        assert!(page.contains(expected), "{expected}");
    }
    assert!(page.contains("1,000 lines of metrics") && page.contains("1,000 values were not finite"));
    let charts = well_formed(&body(&page)).iter().filter(|name| *name == "figure").count();
    assert_eq!(charts, 5, "reward, entropy, outcomes, seconds and data; a loss without values has no chart");
    for resource in ["src=", "http:", "https:", "url(", "@import", "<link", "<script"] {
        assert!(!page.contains(resource), "{resource}");
    }
    assert!(page.len() < 400_000, "{} bytes", page.len());
}

#[test]
fn the_report_is_deterministic_and_replaces_the_old_one() {
    let directory = tempfile::tempdir().unwrap();
    let input = hostile_input(directory.path());
    let path = write_report(directory.path(), &ReportInput::default()).unwrap();
    well_formed(&body(&std::fs::read_to_string(&path).unwrap()));
    assert_eq!(write_report(directory.path(), &input).unwrap(), path);
    let first = std::fs::read(&path).unwrap();
    assert_eq!(names(directory.path()), ["metrics.jsonl", "report.html"]);
    assert_eq!(render_report(&hostile_input(directory.path())).into_bytes(), first);
    let error = write_report(&directory.path().join("absent"), &input).unwrap_err();
    assert!(error.hint().is_some(), "{error}");
}

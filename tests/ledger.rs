//! The exactly-once record: what balances, what is refused, and what a damaged file shows.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use proptest::prelude::*;
use rpt::ledger::{
    CutTail, DropReason, Ledger, LedgerError, LedgerLog, LedgerMark, LedgerSnapshot, StepRecord, verify_file,
};
use std::fs;
use std::path::Path;

const OUTCOMES: [&str; 3] = ["match", "mismatch", "no_answer"];
const REASONS: [DropReason; 5] = [
    DropReason::ZeroVariance,
    DropReason::NotFinite,
    DropReason::Interrupted,
    DropReason::TooLong,
    DropReason::Surplus,
];

/// What becomes of one task: how many samples, how far each gets, and whether it is dropped.
#[derive(Clone, Debug)]
struct Fate {
    samples: u32,
    dropped_after: Option<(u8, usize)>,
    outcome: usize,
}

fn fate() -> impl Strategy<Value = Fate> {
    (1_u32..5, proptest::option::of((0_u8..3, 0_usize..5)), 0_usize..3)
        .prop_map(|(samples, dropped_after, outcome)| Fate { samples, dropped_after, outcome })
}

fn steps() -> impl Strategy<Value = Vec<Vec<Fate>>> {
    proptest::collection::vec(proptest::collection::vec(fate(), 0..5), 1..8)
}

/// Runs one step: all tasks are issued first, and finish last to first.
fn run_step(ledger: &mut Ledger, step: u64, fates: &[Fate]) -> StepRecord {
    let first = ledger.next_ordinal();
    for (ordinal, fate) in (first..).zip(fates) {
        ledger.issue(ordinal, fate.samples).unwrap();
    }
    for (ordinal, fate) in (first..).zip(fates).collect::<Vec<_>>().into_iter().rev() {
        let depth = fate.dropped_after.map_or(2, |(depth, _)| depth);
        for sample in 0..fate.samples {
            if depth >= 1 {
                ledger.generated(ordinal, sample).unwrap();
            }
            if depth >= 2 {
                ledger.scored(ordinal, sample, OUTCOMES[fate.outcome]).unwrap();
            }
        }
        match fate.dropped_after {
            Some((_, reason)) => ledger.dropped(ordinal, REASONS[reason]).unwrap(),
            None => ledger.trained(ordinal).unwrap(),
        }
    }
    ledger.close_step(step).unwrap()
}

/// Writes a run's file; a snapshot and a mark after every step.
fn write_run(path: &Path, steps: &[Vec<Fate>]) -> Vec<(LedgerSnapshot, LedgerMark)> {
    let mut ledger = Ledger::new();
    let (mut log, _) = LedgerLog::open(path, LedgerMark::default()).unwrap();
    let mut points = vec![(ledger.snapshot(), log.mark())];
    for (step, fates) in (1..).zip(steps) {
        let record = run_step(&mut ledger, step, fates);
        log.append(&record).unwrap();
        points.push((ledger.snapshot(), log.sync().unwrap()));
    }
    points
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn legal_runs_balance_and_agree_with_a_recount(steps in steps()) {
        let mut ledger = Ledger::new();
        let records: Vec<_> = (1..).zip(&steps).map(|(step, fates)| run_step(&mut ledger, step, fates)).collect();
        let balance = ledger.balance();
        prop_assert!(balance.balanced);
        prop_assert_eq!(balance.open, 0);
        let all = || steps.iter().flatten();
        let sum = |keep: &dyn Fn(&&Fate) -> bool| all().filter(keep).map(|fate| u64::from(fate.samples)).sum::<u64>();
        prop_assert_eq!(balance.issued, sum(&|_| true));
        prop_assert_eq!(balance.trained, sum(&|fate| fate.dropped_after.is_none()));
        prop_assert_eq!(balance.generated, sum(&|fate| fate.dropped_after.is_none_or(|(depth, _)| depth >= 1)));
        prop_assert_eq!(balance.scored, sum(&|fate| fate.dropped_after.is_none_or(|(depth, _)| depth >= 2)));
        for (index, reason) in REASONS.iter().enumerate() {
            let expected = sum(&|fate| fate.dropped_after.is_some_and(|(_, which)| which == index));
            prop_assert_eq!(balance.dropped.get(reason).copied().unwrap_or(0), expected);
        }
        prop_assert_eq!(ledger.frontier(), all().count() as u64);
        prop_assert_eq!(records.iter().map(|record| record.issued).sum::<u64>(), balance.issued);
        prop_assert_eq!(ledger.snapshot().balance(), balance);
    }

    /// Any sequence of calls, most of them illegal: what is refused changes nothing, and what is
    /// accepted is what a naive model accepts.
    #[test]
    fn illegal_operations_are_refused_and_change_nothing(
        calls in proptest::collection::vec((0_u8..6, 0_u64..4, 0_u32..3), 0..80),
    ) {
        let mut ledger = Ledger::new();
        // State of each sample: 1 issued, 2 generated, 3 scored; closed tasks are empty.
        let mut model: Vec<Vec<u8>> = Vec::new();
        let mut step = 0;
        for (call, ordinal, sample) in calls {
            let before = ledger.balance();
            let task = model.get(ordinal as usize).cloned().unwrap_or_default();
            let state = task.get(sample as usize).copied();
            let (accepted, legal) = match call {
                0 => (ledger.issue(ordinal, sample).is_ok(), ordinal == model.len() as u64 && sample > 0),
                1 => (ledger.generated(ordinal, sample).is_ok(), state == Some(1)),
                2 => (ledger.scored(ordinal, sample, "match").is_ok(), state == Some(2)),
                3 => (ledger.trained(ordinal).is_ok(), !task.is_empty() && task.iter().all(|one| *one == 3)),
                4 => (ledger.dropped(ordinal, DropReason::Interrupted).is_ok(), !task.is_empty()),
                _ => (ledger.close_step(step + 1).is_ok(), model.iter().all(Vec::is_empty)),
            };
            prop_assert_eq!(accepted, legal, "call {} on {}/{}", call, ordinal, sample);
            if !accepted {
                prop_assert_eq!(ledger.balance(), before);
                continue;
            }
            match call {
                0 => model.push(vec![1; sample as usize]),
                1 | 2 => model[ordinal as usize][sample as usize] += 1,
                3 | 4 => model[ordinal as usize].clear(),
                _ => step += 1,
            }
            let open: usize = model.iter().map(Vec::len).sum();
            prop_assert_eq!(ledger.balance().open, open as u64);
            prop_assert_eq!(ledger.balance().balanced, open == 0);
            let frontier = model.iter().position(|task| !task.is_empty()).unwrap_or(model.len());
            prop_assert_eq!(ledger.frontier(), frontier as u64);
        }
    }

    #[test]
    fn a_run_killed_anywhere_writes_the_same_file(
        steps in steps(), kill in any::<prop::sample::Index>(), point in any::<prop::sample::Index>(),
        torn in 0_usize..400,
    ) {
        let directory = tempfile::tempdir().unwrap();
        let (whole, killed) = (directory.path().join("whole.jsonl"), directory.path().join("killed.jsonl"));
        write_run(&whole, &steps);
        let before = &steps[..=kill.index(steps.len())];
        let points = write_run(&killed, before);
        let done = point.index(points.len());
        let (snapshot, mark) = points[done].clone();

        // The line that was being written when the run was killed.
        let reference = fs::read(&whole).unwrap();
        let length = fs::metadata(&killed).unwrap().len() as usize;
        let end = reference.len().min(length + torn);
        fs::write(&killed, &reference[..end]).unwrap();
        let tail = &reference[mark.bytes as usize..end];

        let (mut log, cut) = LedgerLog::open(&killed, mark).unwrap();
        prop_assert_eq!(cut, CutTail { lines: tail.split_inclusive(|byte| *byte == b'\n').count() as u64, bytes: tail.len() as u64 });
        let json = serde_json::to_string(&snapshot).unwrap();
        let mut ledger = Ledger::restore(serde_json::from_str(&json).unwrap()).unwrap();
        for (step, fates) in (1..).zip(&steps).skip(done) {
            log.append(&run_step(&mut ledger, step, fates)).unwrap();
        }
        prop_assert_eq!(fs::read(&killed).unwrap(), reference);
    }

    #[test]
    fn every_bit_flip_is_detected(steps in steps(), place in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger.jsonl");
        let (snapshot, mark) = write_run(&path, &steps).pop().unwrap();
        let good = verify_file(&path, Some(&snapshot)).unwrap();
        prop_assert!(good.intact(), "{:?}", good.fault);
        prop_assert_eq!(good.balance, snapshot.balance());
        let mut bytes = fs::read(&path).unwrap();
        let place = place.index(bytes.len());
        bytes[place] ^= 1 << bit;
        fs::write(&path, &bytes).unwrap();
        let line = 1 + bytes[..place].split(|byte| *byte == b'\n').skip(1).count();
        let fault = verify_file(&path, None).unwrap().fault.unwrap();
        prop_assert!(fault.starts_with(&format!("line {line}:")), "flip in line {line}: {fault}");
        let error = LedgerLog::open(&path, mark).unwrap_err();
        prop_assert!(matches!(error, LedgerError::Line { .. }), "{error}");
        prop_assert_eq!(fs::read(&path).unwrap(), bytes);
    }

    #[test]
    fn every_truncation_is_detected(steps in steps(), length in any::<prop::sample::Index>()) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger.jsonl");
        let (snapshot, mark) = write_run(&path, &steps).pop().unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..length.index(bytes.len())]).unwrap();
        prop_assert!(!verify_file(&path, Some(&snapshot)).unwrap().intact());
        let error = LedgerLog::open(&path, mark).unwrap_err();
        prop_assert!(matches!(error, LedgerError::Mark { .. }), "{}", error);
    }

    #[test]
    fn random_files_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger.jsonl");
        fs::write(&path, &bytes).unwrap();
        prop_assert_eq!(verify_file(&path, None).unwrap().fault.is_some(), !bytes.is_empty());
    }
}

fn one_scored_task() -> Vec<Fate> {
    vec![Fate { samples: 2, dropped_after: None, outcome: 0 }]
}

/// The chain, computed from the text alone: BLAKE3 of the line with the digest before in its place.
#[test]
fn the_chain_can_be_checked_without_this_program() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger.jsonl");
    write_run(&path, &[one_scored_task(), vec![], one_scored_task()]);
    let text = fs::read_to_string(&path).unwrap();
    let mut previous = "0".repeat(64);
    for line in text.lines() {
        let (body, rest) = line.split_once(r#""digest":""#).unwrap();
        let digest = rest.strip_suffix("\"}").unwrap();
        let chained = blake3::hash(format!(r#"{body}"digest":"{previous}"}}"#).as_bytes());
        assert_eq!(digest, chained.to_hex().as_str());
        digest.clone_into(&mut previous);
    }
    assert_eq!(text.lines().count(), 3);
    assert!(text.starts_with(
        r#"{"step":1,"first_ordinal":0,"ordinals":1,"issued":2,"generated":2,"scored":2,"trained":2,"dropped":{},"outcomes":{"match":2},"#
    ));
}

#[test]
fn removed_doubled_and_swapped_lines_are_detected() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger.jsonl");
    write_run(&path, &[one_scored_task(), one_scored_task(), one_scored_task()]);
    let text = fs::read_to_string(&path).unwrap();
    let lines: Vec<_> = text.split_inclusive('\n').collect();
    for order in [&[1, 2][..], &[0, 2], &[0, 0, 1, 2], &[1, 0, 2], &[0, 1, 1, 2]] {
        fs::write(&path, order.iter().map(|index| lines[*index]).collect::<String>()).unwrap();
        assert!(!verify_file(&path, None).unwrap().intact(), "{order:?}");
    }
}

#[test]
fn a_step_with_an_open_attempt_stays_open() {
    let mut ledger = Ledger::new();
    ledger.issue(0, 2).unwrap();
    ledger.generated(0, 0).unwrap();
    let message = ledger.close_step(1).unwrap_err().to_string();
    assert_eq!(message, "step 1 cannot be closed: sample 1 of task 0 is issued");
    let message = ledger.trained(0).unwrap_err().to_string();
    assert_eq!(message, "sample 0 of task 0 is generated and cannot become trained");
    assert!(!ledger.balance().balanced);
    ledger.dropped(0, DropReason::Interrupted).unwrap();
    assert!(matches!(ledger.trained(0), Err(LedgerError::Closed { ordinal: 0 })));
    assert!(matches!(ledger.trained(1), Err(LedgerError::NotIssued { ordinal: 1 })));
    let record = ledger.close_step(1).unwrap();
    assert_eq!(record.dropped[&DropReason::Interrupted], 2);
    assert!(matches!(ledger.close_step(1), Err(LedgerError::StepOrder { step: 1, last: 1 })));
}

/// A checkpoint never names a position beyond what was trained: work in flight is issued again.
#[test]
fn a_snapshot_stands_at_the_trained_frontier() {
    let mut ledger = Ledger::new();
    run_step(&mut ledger, 1, &one_scored_task());
    ledger.issue(1, 2).unwrap();
    ledger.issue(2, 2).unwrap();
    ledger.dropped(1, DropReason::TooLong).unwrap();
    let resumed = Ledger::restore(ledger.snapshot()).unwrap();
    assert_eq!((resumed.next_ordinal(), resumed.frontier(), resumed.open_tasks()), (1, 1, 0));
    assert!(resumed.balance().balanced);
    assert_eq!(resumed.balance().issued, 2);
}

#[test]
fn snapshots_that_no_ledger_made_are_refused() {
    let mut ledger = Ledger::new();
    run_step(&mut ledger, 1, &one_scored_task());
    let good = serde_json::to_value(ledger.snapshot()).unwrap();
    let with = |path: &str, value: serde_json::Value| {
        let mut bad = good.clone();
        *bad.pointer_mut(path).unwrap() = value;
        serde_json::from_value::<LedgerSnapshot>(bad)
            .map_err(|error| error.to_string())
            .and_then(|snapshot| Ledger::restore(snapshot).map(|_| ()).map_err(|error| error.to_string()))
    };
    assert_eq!(with("/frontier", 1.into()), Ok(()));
    assert!(with("/frontier", 3.into()).is_err());
    assert!(with("/frontier", 0.into()).is_err());
    assert!(with("/last_step", serde_json::Value::Null).is_err());
    assert!(with("/totals/trained", 1.into()).is_err());
    assert!(with("/totals/issued", u64::MAX.into()).is_err());
    assert!(with("/totals/outcomes/match", 3.into()).is_err());
    assert!(with("/digest", "00".into()).is_err());
}

#[test]
fn a_record_of_another_run_is_not_appended() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ledger.jsonl");
    let (mut log, cut) = LedgerLog::open(&path, LedgerMark::default()).unwrap();
    assert_eq!(cut, CutTail::default());
    let mut ledger = Ledger::new();
    let first = run_step(&mut ledger, 1, &one_scored_task());
    let second = run_step(&mut ledger, 2, &one_scored_task());
    assert!(matches!(log.append(&second), Err(LedgerError::Chain { step: 2, .. })));
    log.append(&first).unwrap();
    assert!(matches!(log.append(&first), Err(LedgerError::Chain { step: 1, .. })));
    log.append(&second).unwrap();
    assert!(verify_file(&path, Some(&ledger.snapshot())).unwrap().intact());
}

#[test]
fn drop_reasons_have_one_name_everywhere() {
    for reason in REASONS {
        assert_eq!(serde_json::to_value(reason).unwrap(), reason.to_string());
    }
}

//! The frame of tests that damage files: which cases run, what one may take, and what is said at the end.
//!
//! `RPT_FUZZ_CASES` says how many cases of each kind run; `RPT_FUZZ_FIRST` is the number of the first, to
//! repeat one that failed.
#![allow(dead_code, clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use super::meter::{Taken, measure, watch};
use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Where panics began that somebody caught, and how often.
pub(crate) type Panics = BTreeMap<String, usize>;

static ALONE: Mutex<()> = Mutex::new(());
static PANICS: Mutex<Panics> = Mutex::new(BTreeMap::new());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Held by whoever measures: counting is for the whole process.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    locked(&ALONE)
}

/// A directory in memory where the system has such a place: a million cases write a million files.
pub(crate) fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// Runs the cases of a kind, one kind at a time, and prints what they took.
///
/// `run` gets their numbers and a place to note what each takes (see [`run_case`]); it returns what is to be
/// printed of all, or the failure that ends the test.
pub(crate) fn run_cases(
    kind: &'static str,
    cases: u64,
    run: impl FnOnce(Range<u64>, &mut Taken) -> Result<String, String>,
) -> Panics {
    let alone = alone();
    let first = from_environment("RPT_FUZZ_FIRST", 0);
    let numbers = first..first + from_environment("RPT_FUZZ_CASES", cases);
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map_or_else(String::new, ToString::to_string);
        *locked(&PANICS).entry(place).or_default() += 1;
    }));
    watch(kind);
    let (start, mut most) = (Instant::now(), Taken::default());
    let result = run(numbers.clone(), &mut most);
    drop(std::panic::take_hook());
    let panics = std::mem::take(&mut *locked(&PANICS));
    drop(alone);
    match result {
        Ok(said) => println!(
            "{kind}: {} cases, {said}, {:.0} s, peak {} bytes, largest block {} bytes, panics caught {panics:?}",
            numbers.end - numbers.start,
            start.elapsed().as_secs_f64(),
            most.peak,
            most.largest,
        ),
        Err(failure) => panic!("{kind} {failure}\n{panics:?}"),
    }
    panics
}

/// What one case returns; or that it panics, or takes more than `limit` bytes at one time.
pub(crate) fn run_case<T>(
    number: u64,
    limit: usize,
    most: &mut Taken,
    case: impl FnOnce() -> T,
) -> Result<T, String> {
    let (result, taken) = measure(number, || catch_unwind(AssertUnwindSafe(case)));
    most.peak = most.peak.max(taken.peak);
    most.largest = most.largest.max(taken.largest);
    match result {
        Ok(_) if taken.peak > limit => Err(format!("{number} takes {taken:?}")),
        Ok(result) => Ok(result),
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
            Err(format!("{number} panics: {}", text.unwrap_or_default()))
        }
    }
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

//! What a piece of code allocates, and whether it ends.
#![allow(dead_code, clippy::print_stderr, missing_docs)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

/// The system's allocator, counting.
pub(crate) struct Meter;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);
/// Number of the case that runs, plus 1.
static RUNNING: AtomicU64 = AtomicU64::new(0);

/// No input may come near: asking the system for it would end the process without a word.
const ABSURD: usize = 1 << 32;
/// Seconds after which a case is known to hang.
const PATIENCE: u64 = 60;

fn taken(size: usize) {
    if size >= ABSURD {
        let case = RUNNING.load(Relaxed).saturating_sub(1);
        eprintln!("case {case} allocates {size} bytes at once");
        std::process::abort();
    }
    LARGEST.fetch_max(size, Relaxed);
    PEAK.fetch_max(LIVE.fetch_add(size, Relaxed) + size, Relaxed);
}

fn given_back(size: usize) {
    LIVE.fetch_sub(size, Relaxed);
}

// SAFETY: every call goes to `System` with the arguments unchanged; counting neither allocates nor
// unwinds, and `taken` may end the process but never returns without having counted.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc_zeroed`.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `GlobalAlloc::dealloc`.
        unsafe { System.dealloc(pointer, layout) };
        given_back(layout.size());
    }

    /// While a block is moved, both places count.
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        taken(size);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::realloc`.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        given_back(layout.size());
        moved
    }
}

/// What some work took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Taken {
    /// Most bytes at one time, more than were there before.
    pub(crate) peak: usize,
    /// The largest single block.
    pub(crate) largest: usize,
}

/// Runs a case and says what it took; one call at a time.
pub(crate) fn measure<T>(case: u64, work: impl FnOnce() -> T) -> (T, Taken) {
    RUNNING.store(case + 1, Relaxed);
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    LARGEST.store(0, Relaxed);
    let result = work();
    RUNNING.store(0, Relaxed);
    (result, Taken { peak: PEAK.load(Relaxed) - before, largest: LARGEST.load(Relaxed) })
}

/// Ends the process with the number of the case when one hangs. The time is so long that no case
/// that ends comes near it, so that results do not depend on the machine.
pub(crate) fn watch(kind: &'static str) {
    std::thread::spawn(move || {
        let (mut seen, mut seconds) = (0, 0);
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let running = RUNNING.load(Relaxed);
            seconds = if running == seen && running != 0 { seconds + 1 } else { 0 };
            seen = running;
            if seconds > PATIENCE {
                eprintln!("a case of this test hangs: {kind} {}", running - 1);
                std::process::abort();
            }
        }
    });
}

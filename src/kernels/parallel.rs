//! Work over disjoint parts of one buffer, in parallel where it pays.

use rayon::prelude::*;
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Elements below which an element-wise operation stays on one thread.
const SERIAL_ELEMENTS: usize = 1 << 17;

/// Calls `work(row, values)` for every row of `columns` values; the last may be shorter.
pub fn for_each_row(values: &mut [f32], columns: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    if columns == 0 {
        return;
    }
    if values.len() < SERIAL_ELEMENTS {
        values.chunks_mut(columns).enumerate().for_each(|(row, values)| work(row, values));
    } else {
        let rows = (SERIAL_ELEMENTS / 8 / columns).max(1);
        values.par_chunks_mut(columns * rows).enumerate().for_each(|(block, values)| {
            for (row, values) in values.chunks_mut(columns).enumerate() {
                work(block * rows + row, values);
            }
        });
    }
}

/// Elements that are copied or filled together.
const BLOCK: usize = 1 << 12;

/// Copies a buffer to another of its length.
pub fn copy(source: &[f32], target: &mut [f32]) {
    assert_eq!(source.len(), target.len(), "lengths of a copy");
    for_each_row(target, BLOCK, |at, target| {
        target.copy_from_slice(&source[at * BLOCK..][..target.len()]);
    });
}

/// Sets every element to zero.
pub fn clear(values: &mut [f32]) {
    for_each_row(values, BLOCK, |_, values| values.fill(0.0));
}

/// Calls `work(item)` for `0..items`, in parallel when `parallel` says so.
pub fn for_each_item(items: usize, parallel: bool, work: impl Fn(usize) + Sync + Send) {
    if parallel && items > 1 {
        (0..items).into_par_iter().for_each(work);
    } else {
        (0..items).for_each(work);
    }
}

/// Threads that are kept awake at most: the operations that are too short for waking a thread are too small for many.
const MOST_AWAKE: usize = 8;
/// Looks for work, one after the other in vain, after which a thread may sleep: some hundred microseconds.
const IDLE_LOOKS: usize = 256;
/// Looks after which it may sleep in any case, since it may have begun within other work, which waits.
const MOST_LOOKS: usize = 1 << 14;

/// Threads that are awake, or will be.
static AWAKE: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread is being kept awake.
    static LOOKING: Cell<bool> = const { Cell::new(false) };
}

/// Keeps some of the pool's other threads awake while operations follow each other closely: where one takes some microseconds,
/// it would be over before a sleeping thread has woken. They sleep when there was no work for a while, until the next call.
pub fn keep_threads_awake() {
    let caller = rayon::current_thread_index();
    let wanted = MOST_AWAKE.min(rayon::current_num_threads() - 1);
    for _ in AWAKE.load(Ordering::Relaxed)..wanted {
        AWAKE.fetch_add(1, Ordering::Relaxed);
        rayon::spawn(move || {
            // Whoever takes this up while it waits for others must go back to what it waits for.
            if rayon::current_thread_index() != caller && !LOOKING.replace(true) {
                look_for_work();
                LOOKING.set(false);
            }
            AWAKE.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Does what there is to do until there is nothing for a while.
fn look_for_work() {
    let mut idle = 0;
    for _ in 0..MOST_LOOKS {
        if rayon::yield_now() == Some(rayon::Yield::Executed) {
            idle = 0;
        } else if idle < IDLE_LOOKS {
            idle += 1;
            std::thread::yield_now();
        } else {
            return;
        }
    }
}

/// A buffer that several threads write at disjoint places.
#[derive(Clone, Copy)]
pub(crate) struct Disjoint {
    pointer: *mut f32,
    length: usize,
}

// SAFETY: access goes through `slice`, whose callers promise disjoint ranges.
unsafe impl Send for Disjoint {}
// SAFETY: as above.
unsafe impl Sync for Disjoint {}

impl Disjoint {
    /// Borrows a buffer for disjoint writing.
    pub(crate) fn new(values: &mut [f32]) -> Self {
        Self { pointer: values.as_mut_ptr(), length: values.len() }
    }

    /// Where the elements `start..start + length` lie.
    pub(crate) fn pointer(&self, start: usize, length: usize) -> *mut f32 {
        assert!(start <= self.length && length <= self.length - start, "range outside the buffer");
        self.pointer.wrapping_add(start)
    }

    /// The elements `start..start + length`.
    ///
    /// # Safety
    /// No other live slice of the buffer overlaps the range, and the buffer outlives the slice.
    #[expect(clippy::mut_from_ref, reason = "callers promise disjoint ranges")]
    pub(crate) unsafe fn slice(&self, start: usize, length: usize) -> &mut [f32] {
        let at = self.pointer(start, length);
        // SAFETY: in bounds by `pointer`, disjoint by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(at, length) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disjoint_parts_are_all_written() {
        let mut values = vec![0.0; 1000];
        let shared = Disjoint::new(&mut values);
        // SAFETY: each item writes its own ten elements.
        for_each_item(100, true, |item| unsafe { shared.slice(item * 10, 10) }.fill(item as f32));
        assert!(values.iter().enumerate().all(|(at, value)| *value == (at / 10) as f32));
    }

    #[test]
    fn threads_kept_awake_do_what_they_are_given_and_wait_for_nobody() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        pool.install(|| {
            for pass in 0..200 {
                keep_threads_awake();
                // Items that share work themselves wait within it, where other calls of the above may find them.
                let sums = (0..8_u64)
                    .into_par_iter()
                    .map(|item| (0..64_u64).into_par_iter().map(|value| value * item + pass).sum::<u64>());
                assert_eq!(sums.sum::<u64>(), 63 * 32 * 28 + 8 * 64 * pass);
            }
        });
    }

    #[test]
    fn rows_are_numbered_alike_on_one_thread_and_many() {
        for rows in [3, 5000] {
            let mut values = vec![0.0; rows * 100];
            for_each_row(&mut values, 100, |row, values| values.fill(row as f32));
            assert!(values.iter().enumerate().all(|(at, value)| *value == (at / 100) as f32));
        }
    }
}

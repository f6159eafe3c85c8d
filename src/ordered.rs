//! Batches of a stream, and a map over them on all cores with its results in the stream's order.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, ScopedJoinHandle};

/// Batches under way for every thread that works: one long batch must not let the others wait.
const BATCHES_PER_THREAD: usize = 3;

/// A batch, or its result, with its place in the stream.
type Numbered<T> = (usize, T);

/// Reads batches on one thread, works on them on as many threads as rayon has, and hands the results on
/// in the batches' order on the caller's thread.
///
/// At most three batches for every thread, or their results, are in memory.
///
/// # Errors
/// The first one of `take`, after which nothing more is read.
///
/// # Panics
/// When `work` does.
pub(crate) fn ordered_map<B: Send, R: Send, E>(
    batches: impl Iterator<Item = B> + Send,
    work: impl Fn(B) -> R + Sync,
    take: impl FnMut(R) -> Result<(), E>,
) -> Result<(), E> {
    let threads = rayon::current_num_threads().max(1);
    // Reading a batch takes a permit, which comes back when its result is taken; no other channel can fill.
    let (permits, taken) = sync_channel(threads * BATCHES_PER_THREAD);
    let (waiting, incoming) = channel();
    let (results, finished) = channel();
    let (incoming, work) = (Mutex::new(incoming), &work);
    thread::scope(|scope| {
        scope.spawn(move || read(batches, &permits, &waiting));
        for _ in 0..threads {
            let (incoming, results) = (&incoming, results.clone());
            scope.spawn(move || work_off(incoming, work, &results));
        }
        drop(results);
        // Both receivers end with this call, and with them the threads.
        hand_on(finished, taken, take)
    })
}

/// Text in a batch, in bytes; a longer item is a batch of its own.
const BYTES_PER_BATCH: usize = 1 << 17;

/// The items of a stream in batches of about 128 KiB; the last one may be an error.
pub(crate) struct Batches<I, S> {
    items: I,
    size: S,
}

impl<T, E, I: Iterator<Item = Result<T, E>>, S: Fn(&T) -> usize> Batches<I, S> {
    /// `size` gives the bytes of an item.
    pub(crate) fn new(items: I, size: S) -> Self {
        Self { items, size }
    }
}

impl<T, E, I: Iterator<Item = Result<T, E>>, S: Fn(&T) -> usize> Iterator for Batches<I, S> {
    type Item = Result<Vec<T>, E>;

    fn next(&mut self) -> Option<Self::Item> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while bytes < BYTES_PER_BATCH
            && let Some(item) = self.items.next()
        {
            match item {
                Ok(item) => {
                    bytes += (self.size)(&item).max(1);
                    batch.push(item);
                }
                Err(error) => return Some(Err(error)),
            }
        }
        (!batch.is_empty()).then_some(Ok(batch))
    }
}

/// The result of a thread; its panic becomes this one's.
pub(crate) fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

fn read<B>(batches: impl Iterator<Item = B>, permits: &SyncSender<()>, waiting: &Sender<Numbered<B>>) {
    let mut batches = batches.enumerate();
    while permits.send(()).is_ok()
        && let Some(batch) = batches.next()
        && waiting.send(batch).is_ok()
    {}
}

fn work_off<B, R>(
    incoming: &Mutex<Receiver<Numbered<B>>>,
    work: impl Fn(B) -> R,
    results: &Sender<Numbered<thread::Result<R>>>,
) {
    let next = || incoming.lock().unwrap_or_else(PoisonError::into_inner).recv();
    while let Ok((number, batch)) = next() {
        // A panic is handed on like a result, since the others would wait for it.
        let result = catch_unwind(AssertUnwindSafe(|| work(batch)));
        if results.send((number, result)).is_err() {
            return;
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the receivers must end here")]
fn hand_on<R, E>(
    finished: Receiver<Numbered<thread::Result<R>>>,
    taken: Receiver<()>,
    mut take: impl FnMut(R) -> Result<(), E>,
) -> Result<(), E> {
    let (mut early, mut next) = (BTreeMap::new(), 0);
    for (number, result) in &finished {
        early.insert(number, result);
        while let Some(result) = early.remove(&next) {
            take(result.unwrap_or_else(|panic| resume_unwind(panic)))?;
            next += 1;
            // There is one: this batch was read with it.
            let _ = taken.recv();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn results_come_in_order_however_long_each_takes() {
        let busy = |n: u64| {
            (0..(n * 7919) % 5000).for_each(|k| drop(std::hint::black_box(k.to_string())));
            n
        };
        let mut seen = Vec::new();
        let done: Result<(), ()> = ordered_map(0..500, busy, |n| {
            seen.push(n);
            Ok(())
        });
        assert_eq!((done, seen), (Ok(()), (0..500).collect()));
    }

    #[test]
    fn an_error_ends_reading() {
        let read = AtomicUsize::new(0);
        let batches = (0..1_000_000).inspect(|_| {
            read.fetch_add(1, Ordering::Relaxed);
        });
        let done = ordered_map(batches, |n| n, |n| if n < 10 { Ok(()) } else { Err(n) });
        assert_eq!(done, Err(10));
        assert!(read.into_inner() < 1000);
    }

    #[test]
    #[should_panic(expected = "batch 7")]
    fn a_panic_of_the_work_is_the_callers() {
        let work = |n: u64| if n == 7 { panic!("batch {n}") } else { n };
        let _: Result<(), ()> = ordered_map(0..1_000_000, work, |_| Ok(()));
    }
}

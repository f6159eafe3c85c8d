//! Reading a remote file in blocks, and the next blocks while the last ones are decoded.

use bytes::{Bytes, BytesMut};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Bytes of a request.
const BLOCK: u64 = 4 << 20;
/// Bytes that are held or under way.
const HELD: u64 = 64 << 20;
/// Requests under way at a time.
const WORKERS: usize = 4;

type Fetch = dyn Fn(Range<u64>) -> Result<Bytes, String> + Send + Sync;

/// Blocks of a file. Reading goes through the ranges that were announced by [`Ahead::expect`], each from
/// its start on, any of them at any time; what has been passed is forgotten.
pub(super) struct Ahead(Arc<Shared>);

struct Shared {
    length: u64,
    fetch: Box<Fetch>,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    /// The ranges that are read now and next.
    ranges: Vec<Range<u64>>,
    /// Blocks to fetch, in the order in which they are likely to be read.
    planned: VecDeque<Range<u64>>,
    /// Blocks by their start.
    blocks: BTreeMap<u64, Block>,
    workers: usize,
}

struct Block {
    range: Range<u64>,
    /// Nothing while it is under way.
    content: Option<Result<Bytes, String>>,
}

impl Ahead {
    pub(super) fn new(length: u64, fetch: Box<Fetch>) -> Self {
        Self(Arc::new(Shared { length, fetch, state: Mutex::default(), arrived: Condvar::new() }))
    }

    /// Announces the ranges that are read now, all at the same pace, and those after them, and begins to
    /// fetch them.
    pub(super) fn expect(&self, now: &[Range<u64>], next: &[Range<u64>]) {
        let mut state = self.0.state();
        state.ranges = [now, next].concat();
        let State { ranges, blocks, .. } = &mut *state;
        blocks.retain(|start, block| {
            block.content.is_none() || ranges.iter().any(|range| range.contains(start))
        });
        let held = |block: &Range<u64>| state.blocks.values().any(|other| other.range.contains(&block.start));
        let planned = plan(now).into_iter().chain(plan(next)).filter(|block| !held(block)).collect();
        state.planned = planned;
        self.0.start(state);
    }

    /// The bytes of a range, which lies in the file.
    pub(super) fn read(&self, range: Range<u64>) -> Result<Bytes, String> {
        let first = self.piece(range.start, range.end)?;
        let wanted = range.end - range.start;
        if first.len() as u64 == wanted {
            return Ok(first);
        }
        // Memory is taken as the bytes arrive.
        let mut bytes = BytesMut::from(first);
        while (bytes.len() as u64) < wanted {
            let piece = self.piece(range.start + bytes.len() as u64, range.end)?;
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.freeze())
    }

    /// The bytes from `at` to `end`, or to the end of their block.
    fn piece(&self, at: u64, end: u64) -> Result<Bytes, String> {
        if at >= end {
            return Ok(Bytes::new());
        }
        let mut state = self.0.state();
        state.forget_before(at);
        while let Some((start, block)) = state.blocks.range(..=at).next_back()
            && block.range.contains(&at)
        {
            match &block.content {
                Some(Ok(content)) => {
                    let first = (at - block.range.start) as usize;
                    let last = (end.min(block.range.end) - block.range.start) as usize;
                    let piece = content.slice(first..last);
                    self.0.start(state);
                    return Ok(piece);
                }
                Some(Err(_)) => {
                    // It is asked for again when it is read again.
                    let start = *start;
                    let failed = state.blocks.remove(&start).and_then(|block| block.content);
                    return failed.unwrap_or_else(|| Err("nothing arrived".into()));
                }
                None => state = self.0.arrived.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
        self.fetch_now(state, at, end)
    }

    /// Fetches a block that nobody fetches: of the announced range that it is in, or just what is read.
    fn fetch_now(&self, mut state: MutexGuard<State>, at: u64, end: u64) -> Result<Bytes, String> {
        let announced = state.ranges.iter().find(|range| range.contains(&at)).cloned();
        let limit = announced.as_ref().map_or(end, |range| range.end).min(self.0.length);
        let next = state.blocks.range(at..).next().map_or(limit, |(start, _)| *start);
        let block = at..limit.min(next).min(at + BLOCK);
        if announced.is_some() {
            state.planned.retain(|planned| planned.end <= block.start || planned.start >= block.end);
        }
        drop(state);
        let content = (self.0.fetch)(block.clone())?;
        let piece = content.slice(..(end.min(block.end) - at) as usize);
        let mut state = self.0.state();
        if announced.is_some() {
            state.blocks.insert(block.start, Block { range: block, content: Some(Ok(content)) });
        }
        self.0.start(state);
        Ok(piece)
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        self.0.state().planned.clear();
    }
}

impl State {
    /// Drops the blocks of the range around `at` that end before it.
    fn forget_before(&mut self, at: u64) {
        let Some(range) = self.ranges.iter().find(|range| range.contains(&at)).cloned() else { return };
        self.blocks
            .retain(|start, block| block.content.is_none() || !range.contains(start) || block.range.end > at);
        self.planned.retain(|block| !range.contains(&block.start) || block.end > at);
    }

    fn held(&self) -> u64 {
        self.blocks.values().map(|block| block.range.end - block.range.start).sum()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to fetch as many blocks as fit. Where no thread can be had, they are fetched when they are read.
    fn start(self: &Arc<Self>, mut state: MutexGuard<State>) {
        while state.workers < WORKERS {
            let held = state.held();
            let fits = |block: &mut Range<u64>| held + (block.end - block.start) <= HELD;
            let Some(range) = state.planned.pop_front_if(fits) else { return };
            let shared = self.clone();
            let block = Block { range: range.clone(), content: None };
            let work = move || shared.work(range);
            if thread::Builder::new().name("fetch".into()).spawn(work).is_err() {
                return;
            }
            state.blocks.insert(block.range.start, block);
            state.workers += 1;
        }
    }

    fn work(self: &Arc<Self>, range: Range<u64>) {
        let fetched = catch_unwind(AssertUnwindSafe(|| (self.fetch)(range.clone())));
        let content = fetched.unwrap_or_else(|_| Err("a request failed without a reason".into()));
        let mut state = self.state();
        state.workers -= 1;
        if let Some(block) = state.blocks.get_mut(&range.start) {
            block.content = Some(content);
        }
        self.arrived.notify_all();
        self.start(state);
    }
}

/// The blocks of ranges that are read at the same pace: in the order of how far into its range each lies.
fn plan(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut blocks: Vec<(u128, Range<u64>)> = Vec::new();
    for range in ranges {
        let length = u128::from((range.end - range.start).max(1));
        let starts = (range.start..range.end).step_by(BLOCK as usize);
        blocks.extend(starts.map(|start| {
            let share = u128::from(start - range.start) * u128::from(u32::MAX) / length;
            (share, start..range.end.min(start + BLOCK))
        }));
    }
    blocks.sort_by_key(|(share, _)| *share);
    blocks.into_iter().map(|(_, block)| block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

    const LENGTH: u64 = 40 * BLOCK + 17;

    /// The bytes of a file that nobody stores.
    fn content(range: &Range<u64>) -> Bytes {
        range.clone().map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
    }

    #[test]
    fn bytes_are_those_of_the_file_and_few_are_held() {
        let fetched = Arc::new(AtomicU64::new(0));
        let counted = fetched.clone();
        let ahead = Ahead::new(
            LENGTH,
            Box::new(move |range| {
                counted.fetch_add(range.end - range.start, SeqCst);
                Ok(content(&range))
            }),
        );
        let tail = LENGTH - 100..LENGTH;
        assert_eq!(ahead.read(tail.clone()).unwrap(), content(&tail), "nothing was announced");
        let (now, next) = ([10..8 * BLOCK, 9 * BLOCK + 1..11 * BLOCK], 12 * BLOCK..LENGTH);
        ahead.expect(&now, std::slice::from_ref(&next));
        let mut at = [now[0].start, now[1].start];
        while at[0] < now[0].end {
            for (range, at) in now.iter().zip(&mut at) {
                let step = *at..range.end.min(*at + 700_001);
                assert_eq!(ahead.read(step.clone()).unwrap(), content(&step));
                *at = step.end;
                assert!(ahead.0.state().held() <= HELD + 2 * BLOCK);
            }
        }
        ahead.expect(std::slice::from_ref(&next), &[]);
        let long = next.start..next.start + 3 * BLOCK;
        assert_eq!(ahead.read(long.clone()).unwrap(), content(&long));
        assert!(fetched.load(SeqCst) < LENGTH + 4 * BLOCK, "blocks are fetched once");
    }

    #[test]
    fn what_failed_is_asked_for_again() {
        let calls = AtomicU64::new(0);
        let ahead =
            Ahead::new(
                100,
                Box::new(move |range| {
                    if calls.fetch_add(1, SeqCst) == 0 { Err("no".into()) } else { Ok(content(&range)) }
                }),
            );
        ahead.expect(std::slice::from_ref(&(0..100)), &[]);
        let mut results = [ahead.read(5..9), ahead.read(5..9)];
        results.sort();
        assert_eq!(results, [Ok(content(&(5..9))), Err("no".into())]);
    }
}

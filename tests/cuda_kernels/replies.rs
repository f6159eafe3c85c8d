//! The bookkeeping of decoding in sampling.cu against a plain model of it.

use crate::cuda_emulator::device;
use crate::support::{assert_refused, store, upload, values};
use rpt::cuda::sampling::{
    Bounds, Drawn, END_TOKEN, LIVE, NextRows, Replies, Rows, Settings, TOO_LONG, advance, sample,
};
use rpt::cuda::{Buffer, Device, Indices, Result};

const REPLIES: usize = 5;
const CAPACITY: usize = 20;
const PAGES: usize = 2;
const END: u32 = 3;

/// One reply as the host would keep it.
#[derive(Clone, Default)]
struct Reply {
    length: usize,
    finish: u32,
}

impl Reply {
    fn push(&mut self, token: u32) {
        self.length += 1;
        self.finish = match token {
            END => END_TOKEN,
            _ if self.length >= CAPACITY => TOO_LONG,
            _ => LIVE,
        };
    }
}

/// A batch on the device.
struct Batch {
    device: Device,
    rows: Indices,
    drawn: Drawn,
    replies: Replies,
    next: NextRows,
    end_tokens: Buffer<u32>,
    starts: Buffer<u32>,
    page_table: Buffer<u32>,
    capacity: usize,
}

impl Batch {
    fn new(rows: &[u32], starts: &[u32], table: &[u32]) -> Self {
        let device = device();
        Self {
            rows: Indices::upload(&device, "rows", rows).unwrap(),
            drawn: Drawn::new(&device, rows.len()).unwrap(),
            replies: Replies::new(&device, REPLIES).unwrap(),
            next: NextRows::new(&device, rows.len()).unwrap(),
            end_tokens: upload(&device, &[77, END]),
            starts: upload(&device, starts),
            page_table: upload(&device, table),
            capacity: CAPACITY,
            device,
        }
    }

    fn advance(&mut self) -> Result<()> {
        let Self { device, rows, drawn, replies, next, end_tokens, starts, page_table, capacity } = self;
        let (end_tokens, starts) = ((&*end_tokens).into(), (&*starts).into());
        let (page_table, capacity) = ((&*page_table).into(), *capacity);
        let bounds = Bounds { end_tokens, starts, page_table, pages_per_reply: PAGES, capacity };
        // SAFETY: live replies are shorter than the capacity at first, and so they stay.
        unsafe { advance(device, rows.view(), drawn, bounds, replies, next) }
    }

    fn check(&self, replies: &[Reply]) {
        let lengths = self.replies.lengths.download().unwrap();
        let finishes = self.replies.finishes.download().unwrap();
        for (at, reply) in replies.iter().enumerate() {
            assert_eq!((lengths[at], finishes[at]), (reply.length as u32, reply.finish));
        }
    }

    fn next(&self) -> Vec<Next> {
        let (ids, positions) = (self.next.ids.download().unwrap(), self.next.positions.download().unwrap());
        let (slots, lengths) = (self.next.slots.download().unwrap(), self.next.lengths.download().unwrap());
        (0..ids.len())
            .map(|row| Next {
                id: ids[row],
                position: positions[row],
                slot: slots[row],
                length: lengths[row],
            })
            .collect()
    }
}

/// What the next forward pass reads for a row.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Next {
    id: u32,
    position: u32,
    slot: i32,
    length: u32,
}

const ROWS: [u32; 4] = [4, 0, 2, 1];
const STARTS: [u32; REPLIES] = [100, 50, 0, 7, 31];

fn page_table() -> Vec<u32> {
    (0..REPLIES * PAGES).map(|page| (page * 3 + 1) as u32).collect()
}

#[test]
fn replies_grow_end_and_say_what_comes_next() {
    let table = page_table();
    let mut batch = Batch::new(&ROWS, &STARTS, &table);
    let mut replies = vec![Reply::default(); REPLIES];
    let mut next = batch.next();
    for step in 0..CAPACITY + 2 {
        let token = |row| if row == 2 && step == 4 { END } else { (step * 7 + row) as u32 + 10 };
        let tokens: Vec<u32> = (0..ROWS.len()).map(token).collect();
        batch.drawn.tokens.upload(&tokens).unwrap();
        batch.advance().unwrap();
        for (row, reply) in ROWS.iter().map(|reply| *reply as usize).enumerate() {
            if replies[reply].finish != LIVE {
                continue;
            }
            let at = replies[reply].length;
            replies[reply].push(tokens[row]);
            let slot = (table[reply * PAGES + at / 16] * 16) as i32 + at as i32 % 16;
            let (id, position) = (tokens[row], STARTS[reply] + at as u32);
            next[row] = match replies[reply].finish {
                LIVE => Next { id, position, slot, length: at as u32 + 1 },
                _ => Next { id, position, slot: -1, length: at as u32 },
            };
        }
        assert_eq!(batch.next(), next);
        batch.check(&replies);
    }
    let finishes: Vec<u32> = replies.iter().map(|reply| reply.finish).collect();
    assert_eq!(finishes, [TOO_LONG, TOO_LONG, END_TOKEN, LIVE, TOO_LONG]);
}

/// The tokens and their log-probabilities that one step draws.
type Draws = (Vec<u32>, Vec<f32>);

/// Draws from fixed logits until all replies have ended, as a graph that is replayed or launch by launch: what was drawn in
/// each step, and how the replies ended.
fn grown(recorded: bool) -> (Vec<Draws>, Vec<u32>) {
    let vocabulary = 100;
    let mut batch = Batch::new(&ROWS, &STARTS, &page_table());
    batch.replies.keys.upload(&[11, 22, 33, 44, 55]).unwrap();
    let device = batch.device.clone();
    let logits = store::<f32>(&device, &values(3, ROWS.len() * vocabulary));
    let settings = Settings { greedy: false, inverse_temperature: 1.0, top_k: 50, top_p: 0.95, min_p: 0.0 };
    let step = |batch: &mut Batch| {
        let rows = Rows { logits: (&logits).into(), vocabulary, sources: None, replies: batch.rows.view() };
        sample(&device, &settings, rows, &batch.replies, &mut batch.drawn)?;
        batch.advance()
    };
    let graph = recorded.then(|| device.record(|| step(&mut batch)).unwrap());
    let steps = (0..CAPACITY).map(|_| {
        match &graph {
            Some(graph) => graph.launch().unwrap(),
            None => step(&mut batch).unwrap(),
        }
        (batch.drawn.tokens.download().unwrap(), batch.drawn.sampling_logprobs.download().unwrap())
    });
    let steps = steps.collect();
    (steps, batch.replies.finishes.download().unwrap())
}

#[test]
fn a_recorded_step_grows_the_same_replies() {
    let replayed = grown(true);
    assert_eq!(replayed, grown(false));
    let (_, finishes) = replayed;
    assert!(ROWS.iter().all(|reply| finishes[*reply as usize] != LIVE) && finishes[3] == LIVE);
}

#[test]
fn what_does_not_fit_is_refused() {
    let batch = || Batch::new(&ROWS, &STARTS, &page_table());
    let refused = |change: &dyn Fn(&mut Batch), what: &str| {
        let mut batch = batch();
        change(&mut batch);
        assert_refused(batch.advance(), what);
    };
    batch().advance().unwrap();
    Batch::new(&[], &[], &[]).advance().unwrap();
    let device = device();
    let rows = |rows: &[u32]| Indices::upload(&device, "rows", rows).unwrap();
    refused(&|batch| batch.rows = rows(&[0, 5]), "replies: index 5, where there are 5");
    refused(&|batch| batch.rows = rows(&[0; 5]), "drawn tokens: 4 elements where 5 are");
    let short = |length| NextRows::new(&device, length).unwrap();
    refused(&|batch| batch.next = short(3), "rows of the next step: 3 elements where 4 are");
    refused(&|batch| batch.starts = upload(&device, &[1; 4]), "starts of replies: index 4");
    refused(&|batch| batch.page_table = upload(&device, &[1; 9]), "pages of replies: index 4");
    refused(&|batch| batch.capacity = 34, "pages of a reply: 2 elements where 3 are");
    Batch { capacity: 33, ..batch() }.advance().unwrap();
}

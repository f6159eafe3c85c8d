//! The bookkeeping of decoding in sampling.cu against a plain model of it.

use crate::support::{Arg, Gpu, Memory, values};

const REPLIES: usize = 5;
const CAPACITY: usize = 20;
const PAGES: usize = 2;
const END: u32 = 3;

/// One reply as the host would keep it.
#[derive(Clone, Default)]
struct Reply {
    tokens: Vec<u32>,
    logprobs: [Vec<f32>; 3],
    finish: i32,
}

impl Reply {
    fn push(&mut self, token: u32, logprobs: [f32; 3]) {
        self.tokens.push(token);
        self.logprobs.iter_mut().zip(logprobs).for_each(|(all, one)| all.push(one));
        self.finish = match token {
            END => 1,
            _ if self.tokens.len() >= CAPACITY => 2,
            _ => 0,
        };
    }
}

/// The device's records.
struct Records {
    tokens: Memory,
    logprobs: [Memory; 3],
    lengths: Memory,
    finishes: Memory,
    next_ids: Memory,
    next_positions: Memory,
    next_slots: Memory,
    next_lengths: Memory,
}

impl Records {
    fn new(gpu: &Gpu, rows: usize) -> Self {
        let floats = || gpu.floats(&[0.0; REPLIES * CAPACITY]);
        Self {
            tokens: gpu.words(&[0; REPLIES * CAPACITY]),
            logprobs: [floats(), floats(), floats()],
            lengths: gpu.ints(&[0; REPLIES]),
            finishes: gpu.ints(&[0; REPLIES]),
            next_ids: gpu.words(&vec![99; rows]),
            next_positions: gpu.ints(&vec![-5; rows]),
            next_slots: gpu.ints(&vec![-5; rows]),
            next_lengths: gpu.words(&vec![0; rows]),
        }
    }

    fn advance(
        &self,
        gpu: &Gpu,
        replies: &[i32],
        tokens: &[u32],
        logprobs: &[Vec<f32>; 3],
        starts: &[i32],
        table: &[i32],
    ) {
        let (replies_on_device, tokens) = (gpu.ints(replies), gpu.words(tokens));
        let logprobs = logprobs.each_ref().map(|logprobs| gpu.floats(logprobs));
        let (ends, starts, table) = (gpu.words(&[77, END]), gpu.ints(starts), gpu.ints(table));
        let mut arguments = vec![Arg::To(&replies_on_device), Arg::To(&tokens)];
        arguments.extend(logprobs.iter().map(Arg::To));
        arguments.extend([
            Arg::To(&ends),
            Arg::Int(2),
            Arg::Int(CAPACITY),
            Arg::To(&starts),
            Arg::To(&table),
        ]);
        arguments.extend([Arg::Int(PAGES), Arg::To(&self.tokens)]);
        arguments.extend(self.logprobs.iter().map(Arg::To));
        arguments.extend([&self.lengths, &self.finishes, &self.next_ids, &self.next_positions].map(Arg::To));
        arguments.extend([&self.next_slots, &self.next_lengths].map(Arg::To));
        arguments.push(Arg::Int(replies.len()));
        gpu.launch("advance_replies", (replies.len().div_ceil(128), 1), 128, &arguments);
    }

    fn check(&self, replies: &[Reply]) {
        let (tokens, lengths, finishes) = (self.tokens.words(), self.lengths.ints(), self.finishes.ints());
        let logprobs = self.logprobs.each_ref().map(Memory::floats);
        for (at, reply) in replies.iter().enumerate() {
            let (first, length) = (at * CAPACITY, reply.tokens.len());
            assert_eq!((lengths[at], finishes[at]), (length as i32, reply.finish));
            assert_eq!(tokens[first..first + length], reply.tokens);
            for (device, host) in logprobs.iter().zip(&reply.logprobs) {
                assert_eq!(device[first..first + length], host[..]);
            }
        }
    }
}

/// What the next forward pass reads for a row.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Next {
    id: u32,
    position: i32,
    slot: i32,
    length: u32,
}

impl Records {
    fn next(&self) -> Vec<Next> {
        let (ids, positions) = (self.next_ids.words(), self.next_positions.ints());
        let (slots, lengths) = (self.next_slots.ints(), self.next_lengths.words());
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

#[test]
fn replies_grow_end_and_say_what_comes_next() {
    let gpu = Gpu::new();
    let (rows, starts) = ([4, 0, 2, 1], [100, 50, 0, 7, 31]);
    let table: Vec<i32> = (0..REPLIES * PAGES).map(|page| (page * 3 + 1) as i32).collect();
    let records = Records::new(&gpu, rows.len());
    let mut replies = vec![Reply::default(); REPLIES];
    let mut next = records.next();
    for step in 0..CAPACITY + 2 {
        let token = |row| if row == 2 && step == 4 { END } else { (step * 7 + row) as u32 + 10 };
        let tokens: Vec<u32> = (0..rows.len()).map(token).collect();
        let logprobs = [1, 2, 3].map(|part| values(step as u64 * 10 + part, rows.len()));
        records.advance(&gpu, &rows, &tokens, &logprobs, &starts, &table);
        for (row, reply) in rows.iter().map(|reply| *reply as usize).enumerate() {
            if replies[reply].finish != 0 {
                continue;
            }
            let at = replies[reply].tokens.len();
            replies[reply].push(tokens[row], [0, 1, 2].map(|part: usize| logprobs[part][row]));
            let slot = table[reply * PAGES + at / 16] * 16 + at as i32 % 16;
            let (id, position) = (tokens[row], starts[reply] + at as i32);
            next[row] = match replies[reply].finish {
                0 => Next { id, position, slot, length: at as u32 + 1 },
                _ => Next { id, position, slot: -1, length: at as u32 },
            };
        }
        assert_eq!(records.next(), next);
        records.check(&replies);
    }
    assert_eq!(replies.iter().map(|reply| reply.finish).collect::<Vec<_>>(), [2, 2, 1, 0, 2]);
}

//! The engine on a CUDA device: shared prefixes are computed once, then all live replies grow together.
//!
//! Keys and values lie in pages. Replies grow in rounds: for a round each has pages for so many tokens more, and the step
//! that adds one to each is recorded once as a CUDA graph. The device goes from step to step by itself; the host reads the
//! tokens some steps later and looks for ends. What was drawn behind an end is cut off, so that the lag changes nothing.
//! Between rounds ended replies leave, and prompts enter for which there is memory.
//!
//! Every reply may become as long as the limit allows, but few do: they get pages as they grow. Whoever cannot get any
//! pauses. There are always enough free for the reply that holds most of them to become as long as it may; when it ends
//! there are enough for any other, so all replies end.

mod decode;
mod landing;
mod pages;
mod prefill;
mod waiting;

use super::engine::{Engine, Generation, Growing};
use super::{Prompt, Rollout, Sampling};
use crate::cuda::attention::Cached;
use crate::cuda::paged::PAGE;
use crate::cuda::sampling::Settings;
use crate::cuda::{Graph, Result};
use crate::model::ModelError;
use crate::model::device::{DeviceDecoder, Format};
use decode::{Decoding, Seat};
use pages::{Cache, CachedTokens, Pages, page_bytes};
use std::rc::Rc;
use std::time::Instant;
use waiting::{Counted, Portion, Waiting};

/// A number format whose keys and values are kept as they are.
pub trait Kept: Format + Cached<Widened = Self> {}
impl<T: Format + Cached<Widened = T>> Kept for T {}

/// Bounds of the engine on a device. Where rows have the same bits in every batch, none of them changes a result.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Replies that grow side by side.
    pub replies: usize,
    /// Tokens for which a reply gets pages at a time.
    pub room: usize,
    /// Steps that the device may be ahead of the host.
    pub lag: usize,
    /// Tokens of prompts that are computed together, unless those of one trunk are more.
    pub prompt_tokens: usize,
    /// The share of the device's free memory that keys and values may take.
    pub memory: f64,
    /// Most pages of sixteen positions.
    pub pages: usize,
}

impl Default for Limits {
    fn default() -> Self {
        // Page numbers times sixteen are below 2^31.
        Self { replies: 512, room: 128, lag: 4, prompt_tokens: 16 << 10, memory: 0.75, pages: 1 << 26 }
    }
}

/// Samples replies on a device, as [`Engine::generate`] does. Prompts must fit the model's positions.
///
/// # Errors
/// When a token is outside the vocabulary, the device has no room for a single reply, or has failed.
pub fn generate<T: Kept>(
    engine: &Engine,
    decoder: &DeviceDecoder<T>,
    prompts: &[Prompt],
    samples: usize,
    limits: Limits,
) -> std::result::Result<Generation, ModelError> {
    let waiting = Waiting::new(prompts);
    let reply = reply_pages(engine.stop.max_new_tokens);
    let replies = (prompts.len() * samples).min(limits.replies.saturating_add(samples));
    // The longest reply must fit beside its prompt.
    let (fewest, most) = (waiting.longest() + reply, waiting.pages() + reply * replies.max(1));
    let page_bytes = page_bytes::<T>(decoder.config()).max(1);
    let share = decoder.device().memory()?.free as f64 * limits.memory / page_bytes as f64;
    let mut pages = most.min(share as usize).min(limits.pages).max(fewest);
    loop {
        let run = Run::new(engine, decoder, prompts, samples, limits, pages).and_then(Run::finish);
        match run {
            // Nothing has left this function yet, so that starting again with less is no harm.
            Err(ModelError::Cuda(error)) if error.is_out_of_memory() && pages > fewest => {
                pages = (pages / 2).max(fewest);
            }
            other => return other,
        }
    }
}

/// Pages of a reply of so many tokens: the last one is never read.
fn reply_pages(tokens: usize) -> usize {
    tokens.saturating_sub(1).div_ceil(PAGE)
}

fn settings(sampling: &Sampling) -> Settings {
    Settings {
        greedy: sampling.temperature <= 0.0,
        inverse_temperature: sampling.inverse_temperature(),
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
    }
}

/// A growing reply, and what it holds of the cache.
struct Live {
    /// Number of its prompt.
    prompt: usize,
    continues: Rc<CachedTokens>,
    pages: Pages,
    growing: Growing,
    over: bool,
}

impl Live {
    fn length(&self) -> usize {
        self.growing.rollout.tokens.len()
    }

    fn held(&self) -> usize {
        self.pages.numbers().len()
    }
}

/// The replies to some prompts under way.
struct Run<'a, T> {
    engine: &'a Engine<'a>,
    decoder: &'a DeviceDecoder<T>,
    prompts: &'a [Prompt],
    samples: usize,
    limits: Limits,
    /// Most tokens of a reply, at least 1.
    capacity: usize,
    settings: Settings,
    decoding: Decoding,
    cache: Cache<T>,
    waiting: Waiting<'a>,
    live: Vec<Live>,
    done: Vec<Vec<Option<Rollout>>>,
    seconds: (f64, f64),
}

impl<'a, T: Kept> Run<'a, T> {
    fn new(
        engine: &'a Engine,
        decoder: &'a DeviceDecoder<T>,
        prompts: &'a [Prompt],
        samples: usize,
        limits: Limits,
        pages: usize,
    ) -> std::result::Result<Self, ModelError> {
        let capacity = engine.stop.max_new_tokens.max(1);
        let settings = settings(&engine.sampling);
        let rows = limits.replies.min(prompts.len() * samples).max(1);
        let limits = Limits { replies: rows, room: limits.room.max(1), ..limits };
        let bounds = (rows, capacity, limits.lag);
        Ok(Self {
            cache: Cache::new(decoder, pages)?,
            decoding: Decoding::new(decoder.device(), settings, &engine.stop.eos, bounds)?,
            waiting: Waiting::new(prompts),
            done: vec![vec![None; samples]; prompts.len()],
            live: Vec::new(),
            seconds: (0.0, 0.0),
            engine,
            decoder,
            prompts,
            samples,
            limits,
            capacity,
            settings,
        })
    }

    fn finish(mut self) -> std::result::Result<Generation, ModelError> {
        while !(self.waiting.is_empty() && self.live.is_empty()) {
            let start = Instant::now();
            let portions = self.admit();
            if portions.is_empty() {
                self.round()?;
                self.seconds.1 += start.elapsed().as_secs_f64();
            } else {
                self.enter(&portions)?;
                self.seconds.0 += start.elapsed().as_secs_f64();
            }
        }
        Ok(self.generation())
    }

    /// What was sampled, and what it cost, counted as on the CPU.
    fn generation(self) -> Generation {
        let groups: Vec<Vec<Rollout>> =
            self.done.into_iter().map(|group| group.into_iter().flatten().collect()).collect();
        let (mut counted, unique) = Counted::of_prompts(self.prompts, self.samples);
        let mut sampled = 0;
        for (prompt, group) in self.prompts.iter().zip(&groups) {
            for rollout in group {
                counted.add_reply(prompt, rollout.tokens.len());
                sampled += rollout.tokens.len() as u64;
            }
        }
        let repeated = self.prompts.iter().map(|prompt| (prompt.len() * self.samples) as u64).sum();
        Generation {
            groups,
            unique_prompt_tokens: unique,
            repeated_prompt_tokens: repeated,
            sampled_tokens: sampled,
            flops: counted.flops(self.decoder.config()),
            seconds: self.seconds,
        }
    }

    /// Takes prompts for which there is room now. Those of one trunk enter together, and their replies share the room in
    /// turns; only where the trunk and its prompts would fill the cache do they enter in portions.
    fn admit(&mut self) -> Vec<Portion<'a>> {
        let mut portions = Vec::new();
        let (mut tokens, mut replies, mut pages) = (0, self.live.len(), 0);
        let claims: usize = self.live.iter().map(|live| self.typical().saturating_sub(live.held())).sum();
        while let Some(next) = self.waiting.next() {
            let alone = self.live.is_empty() && portions.is_empty();
            let seats = self.limits.replies.saturating_sub(replies);
            let fresh = replies - self.live.len() + seats.min(next.prompts.len() * self.samples);
            let demand = (claims + fresh * self.typical()).min(self.cache.pool.total() / 2);
            let fits = seats > 0
                && tokens + next.tokens() <= self.limits.prompt_tokens
                && pages + next.pages() + demand.max(self.full()) <= self.cache.pool.free();
            let count = match (fits, alone) {
                (true, _) => next.prompts.len(),
                (false, true) => self.prompts_that_fit(next),
                (false, false) => break,
            };
            let Some(portion) = self.waiting.take(count) else { break };
            (tokens, pages) = (tokens + portion.tokens(), pages + portion.pages());
            replies += portion.prompts.len() * self.samples;
            portions.push(portion);
        }
        portions
    }

    /// How many prompts of a trunk leave half of an empty cache to replies, and room for the longest; at least one.
    fn prompts_that_fit(&self, portion: &Portion) -> usize {
        let total = self.cache.pool.total();
        let most = (total / 2).min(total - self.full());
        let fit = |count: &usize| portion.shortened(*count).pages() <= most;
        (1..=portion.prompts.len()).take_while(fit).last().unwrap_or(1)
    }

    /// Pages of a reply that becomes as long as it may.
    fn full(&self) -> usize {
        reply_pages(self.capacity)
    }

    /// Pages that a reply is expected to need when it enters.
    fn typical(&self) -> usize {
        self.full().div_ceil(4).max(self.limits.room.div_ceil(PAGE)).min(self.full())
    }

    /// Computes prompts and begins their replies.
    fn enter(&mut self, portions: &[Portion<'a>]) -> std::result::Result<(), ModelError> {
        let prompts = portions.iter().flat_map(|portion| (portion.first..).zip(portion.prompts));
        let samples = 0..self.samples;
        let mut growing: Vec<Growing> = prompts
            .clone()
            .flat_map(|(_, prompt)| samples.clone().map(|sample| Growing::new(self.engine, prompt, sample)))
            .collect();
        let keys: Vec<u64> = growing.iter().map(|growing| growing.stream.key()).collect();
        let prefilled = prefill::prefill(self.decoder, &mut self.cache, portions, &self.settings, &keys)?;
        let mut growing = growing.drain(..).zip(prefilled.first_tokens);
        for ((prompt, _), continues) in prompts.zip(prefilled.ends) {
            for (growing, drawn) in growing.by_ref().take(self.samples) {
                let (continues, pages) = (Rc::clone(&continues), self.cache.pool.take(0)?);
                let mut live = Live { prompt, continues, pages, growing, over: false };
                live.growing.push(drawn);
                live.over = live.growing.ends(&self.engine.stop);
                self.live.push(live);
            }
        }
        self.collect();
        Ok(())
    }

    /// Gives pages for the next round to as many replies as may be, the oldest first; these are its rows.
    fn grant(&mut self) -> Result<Vec<usize>> {
        let (full, mut rows) = (self.full(), Vec::new());
        let mut longest = self.live.iter().map(Live::held).max().unwrap_or(0);
        for (number, live) in self.live.iter_mut().enumerate() {
            if rows.len() == self.limits.replies {
                break;
            }
            let tokens = (live.length() + self.limits.room).min(self.capacity);
            let wanted = reply_pages(tokens).max(live.held());
            let reserve = full - longest.max(wanted);
            if self.cache.pool.free() >= reserve + wanted - live.held() {
                live.pages.grow_to(wanted)?;
                longest = longest.max(wanted);
                rows.push(number);
            }
        }
        Ok(rows)
    }

    /// Lets replies grow until they have used up their room, or too many of them have ended.
    fn round(&mut self) -> Result<()> {
        let rows = self.grant()?;
        let left = |row: &usize| self.capacity - self.live[*row].length();
        let steps = rows.iter().map(left).max().unwrap_or(0).min(self.limits.room);
        let others_wait = rows.len() < self.live.len() || !self.waiting.is_empty();
        let graph = self.record(&rows)?;
        // A new round costs as much as some steps.
        let too_many = rows.len().div_ceil(if others_wait { 8 } else { 2 });
        let (mut launched, mut read, mut over) = (0, 0, 0);
        while launched < steps && over < too_many {
            if launched - read == self.decoding.lag() {
                over += self.read(&rows, read)?;
                read += 1;
            } else {
                self.decoding.launch(&graph, launched)?;
                launched += 1;
            }
        }
        for step in read..launched {
            self.read(&rows, step)?;
        }
        self.collect();
        Ok(())
    }

    fn record(&mut self, rows: &[usize]) -> Result<Graph> {
        let seat = |row: &usize| {
            let live = &self.live[*row];
            let length = live.length();
            Seat {
                key: live.growing.stream.key(),
                last: live.growing.rollout.tokens.last().copied().unwrap_or(0),
                length,
                start: self.prompts[live.prompt].len(),
                prompt: &live.continues,
                pages: &live.pages,
                positions: (length + self.limits.room).min(self.capacity) - 1,
            }
        };
        let seats: Vec<Seat> = rows.iter().map(seat).collect();
        self.decoding.record(self.decoder, &mut self.cache, &seats)
    }

    /// Adds the tokens of a step; returns how many replies they ended.
    fn read(&mut self, rows: &[usize], step: usize) -> Result<usize> {
        let mut ended = 0;
        for (row, drawn) in rows.iter().zip(self.decoding.landed(step)?) {
            let live = &mut self.live[*row];
            if !live.over {
                live.growing.push(drawn);
                live.over = live.growing.ends(&self.engine.stop);
                ended += usize::from(live.over);
            }
        }
        Ok(ended)
    }

    /// Moves ended replies out and frees their pages.
    fn collect(&mut self) {
        for live in self.live.extract_if(.., |live| live.over) {
            let sample = live.growing.rollout.sample as usize;
            self.done[live.prompt][sample] = Some(live.growing.rollout);
        }
    }
}

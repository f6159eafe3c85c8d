//! From prompts to replies: who enters, who gets pages, who leaves.

use super::decode::{Decoding, Seat};
use super::format::PageFormat;
use super::pages::{Cache, CachedTokens, Pages};
use super::prefill::{Prefilled, prefill};
use super::waiting::{Counted, Portion, Waiting};
use super::{Limits, reply_pages};
use crate::cuda::paged::PAGE;
use crate::cuda::sampling::Settings;
use crate::cuda::{self, Beside, Event, Graph};
use crate::model::ModelError;
use crate::model::device::{DeviceDecoder, Format};
use crate::rollout::engine::{Engine, Generation, Growing};
use crate::rollout::{Prompt, Rollout, Sampling};
use std::rc::Rc;
use std::time::Instant;

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

/// Prompts that are computed beside a round.
struct Arriving<'a> {
    /// Dropped first: the others are released when they are computed.
    beside: Beside,
    portions: Vec<Portion<'a>>,
    prefilled: Prefilled,
}

/// The replies to some prompts under way, with keys and values in the format `S`.
pub(super) struct Run<'a, T, S> {
    engine: &'a Engine<'a>,
    decoder: &'a DeviceDecoder<T>,
    prompts: &'a [Prompt],
    samples: usize,
    limits: Limits,
    /// Most tokens of a reply, at least 1.
    capacity: usize,
    settings: Settings,
    decoding: Decoding,
    cache: Cache<S>,
    waiting: Waiting<'a>,
    live: Vec<Live>,
    done: Vec<Vec<Option<Rollout>>>,
    seconds: (f64, f64),
}

impl<'a, T: Format, S: PageFormat<T>> Run<'a, T, S> {
    /// With a cache of so many pages, which are enough for any prompt with one reply.
    ///
    /// # Errors
    /// When the device has no room.
    pub(super) fn new(
        engine: &'a Engine,
        decoder: &'a DeviceDecoder<T>,
        prompts: &'a [Prompt],
        samples: usize,
        limits: Limits,
        pages: usize,
    ) -> Result<Self, ModelError> {
        let capacity = engine.stop.max_new_tokens.max(1);
        let settings = settings(&engine.sampling);
        let rows = limits.replies.min(prompts.len() * samples).max(1);
        let limits = Limits { replies: rows, room: limits.room.max(1), ..limits };
        Ok(Self {
            cache: Cache::new(decoder, pages)?,
            decoding: Decoding::new(decoder.device(), settings, &engine.stop.eos, capacity, &limits)?,
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

    /// Samples everything.
    ///
    /// # Errors
    /// When a token is outside the vocabulary, the device has no room, or has failed.
    pub(super) fn finish(mut self) -> Result<Generation, ModelError> {
        while !(self.waiting.is_empty() && self.live.is_empty()) {
            let start = Instant::now();
            let has_free_places = self.live.len() < self.limits.replies;
            let portions = if has_free_places { self.admit(self.limits.replies) } else { Vec::new() };
            if portions.is_empty() {
                self.round()?;
                self.seconds.1 += start.elapsed().as_secs_f64();
            } else {
                let prefilled = prefill(self.decoder, &mut self.cache, &portions)?;
                self.begin(&portions, &prefilled)?;
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
            cache_bytes: self.cache.pool.bytes() as u64,
            retries: 0,
            seconds: self.seconds,
        }
    }

    /// Takes prompts for which there is room now, until there are so many replies. Those of one trunk enter together, and their replies share the room in
    /// turns; only where the trunk and its prompts would fill the cache do they enter in portions.
    fn admit(&mut self, most: usize) -> Vec<Portion<'a>> {
        let mut portions = Vec::new();
        let (mut tokens, mut replies, mut pages) = (0, self.live.len(), 0);
        let claims: usize = self.live.iter().map(|live| self.typical().saturating_sub(live.held())).sum();
        while let Some(next) = self.waiting.next() {
            let alone = self.live.is_empty() && portions.is_empty();
            let seats = most.saturating_sub(replies);
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

    /// Begins the replies to prompts that are computed.
    fn begin(&mut self, portions: &[Portion<'a>], prefilled: &Prefilled) -> Result<(), ModelError> {
        let prompts = portions.iter().flat_map(|portion| (portion.first..).zip(portion.prompts));
        let samples = 0..self.samples;
        let mut growing: Vec<Growing> = prompts
            .clone()
            .flat_map(|(_, prompt)| samples.clone().map(|sample| Growing::new(self.engine, prompt, sample)))
            .collect();
        let keys: Vec<u64> = growing.iter().map(|growing| growing.stream.key()).collect();
        let first_tokens = prefilled.first_tokens(self.decoder, &self.settings, &keys)?;
        let mut growing = growing.drain(..).zip(first_tokens);
        for ((prompt, _), continues) in prompts.zip(&prefilled.ends) {
            for (growing, drawn) in growing.by_ref().take(self.samples) {
                let (continues, pages) = (Rc::clone(continues), self.cache.pool.take(0)?);
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
    fn grant(&mut self) -> cuda::Result<Vec<usize>> {
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

    /// Lets replies grow until they have used up their room, or too many of them have ended. Beside that, prompts are
    /// computed for which there is room, and begin their replies in the end.
    fn round(&mut self) -> Result<(), ModelError> {
        let rows = self.grant()?;
        let left = |row: &usize| self.capacity - self.live[*row].length();
        let steps = rows.iter().map(left).max().unwrap_or(0).min(self.limits.room);
        let others_wait = rows.len() < self.live.len() || !self.waiting.is_empty();
        // A new round costs as much as some steps.
        let too_many = rows.len().div_ceil(if others_wait { 8 } else { 2 });
        let graph = self.record(&rows)?;
        let start = self.decoder.device().event()?;
        start.record()?;
        let (mut launched, mut read, mut over) = (0, 0, 0);
        let mut arriving = None;
        while launched < steps && over < too_many {
            if launched - read == self.decoding.lag() {
                over += self.read(&rows, read)?;
                read += 1;
            } else {
                self.decoding.launch(&graph, launched)?;
                launched += 1;
            }
            // The device has steps to do while it is asked for the prompts.
            if launched == self.decoding.lag().min(steps) && read == 0 {
                arriving = self.arrive(&start)?;
            }
        }
        for step in read..launched {
            self.read(&rows, step)?;
        }
        self.collect();
        drop(graph);
        if let Some(Arriving { beside, portions, prefilled }) = arriving {
            drop(beside);
            self.begin(&portions, &prefilled)?;
        }
        Ok(())
    }

    /// Computes prompts for which there is room beside the steps of a round that began at a mark.
    fn arrive(&mut self, start: &Event) -> Result<Option<Arriving<'a>>, ModelError> {
        let portions = self.admit(self.limits.replies + self.limits.spare());
        if portions.is_empty() {
            return Ok(None);
        }
        let (decoder, cache) = (self.decoder, &mut self.cache);
        let prompts = || prefill(decoder, cache, &portions);
        // SAFETY: a round's steps use the pages of its replies, prompts those that were free when it began; what is released
        // before the prompts are waited for is given to nobody. What else the prompts use is their own or is never changed.
        let (beside, prefilled) = unsafe { decoder.device().beside(start, prompts)? };
        Ok(Some(Arriving { beside, portions, prefilled }))
    }

    fn record(&mut self, rows: &[usize]) -> cuda::Result<Graph> {
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
    fn read(&mut self, rows: &[usize], step: usize) -> cuda::Result<usize> {
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

fn settings(sampling: &Sampling) -> Settings {
    Settings {
        greedy: sampling.temperature <= 0.0,
        inverse_temperature: sampling.inverse_temperature(),
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
    }
}

//! The engine on the CPU: prompts enter as there is room, and all live replies grow together.
//!
//! Lanes take the prompts of one trunk after another from a queue, and each has a part of the memory for keys and values. A
//! pass of a lane adds a token to every live reply and computes, beside them, some tokens of prompts that enter: long prompts
//! take several passes, and whoever ends makes room for the next at once. Neither what a pass holds nor which lane
//! computes it changes a bit.
//!
//! Every reply may become as long as the limit allows, but few do: replies get pages as they grow, and whoever cannot get
//! one pauses. There are always enough free for the reply that holds most of them to become as long as it may; when it ends
//! there are enough for any other, so all replies end.

use super::engine::{Engine, Generation, Growing, REPLIES_AT_ONCE, add_trunk, parts};
use super::sampler::draw;
use super::{Prompt, Rollout};
use crate::kernels::attention::PAGE;
use crate::kernels::parallel;
use crate::model::{Extension, Forest, KvCache, ModelError, NodeId, Workspace};
use rayon::prelude::*;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Parameters up to which each thread grows replies of its own, however few.
const SMALL_MODEL: usize = 16 << 20;
/// Replies that are worth a reading of a larger model's weights; threads share the work on fewer.
const REPLIES_WORTH_THE_WEIGHTS: usize = 32;
/// Logits that a lane holds at a time.
const LOGITS_AT_ONCE: usize = 1 << 23;
/// Tokens of prompts that a pass computes.
const PROMPT_TOKENS_AT_ONCE: usize = 512;
/// Bytes of keys and values, where no setting bounds them.
const CACHE_BYTES: u64 = 2 << 30;

/// Samples `samples` replies to every prompt, as [`Engine::generate`].
///
/// # Errors
/// When a prompt holds a token outside the vocabulary.
pub(super) fn generate(
    engine: &Engine,
    prompts: &[Prompt],
    samples: usize,
) -> Result<Generation, ModelError> {
    let queue = Queue::new(prompts, samples);
    let (lanes, limits) = queue.lanes(engine);
    let work: Vec<Result<Sampled, ModelError>> =
        (0..lanes).into_par_iter().map(|_| Lane::new(engine, &queue, limits).run()).collect();
    let mut all = Generation {
        groups: prompts.iter().map(|_| Vec::with_capacity(samples)).collect(),
        repeated_prompt_tokens: prompts.iter().map(|prompt| (prompt.len() * samples) as u64).sum(),
        ..Generation::default()
    };
    for sampled in work {
        let Sampled { rollouts, prompt_tokens, flops, cache_bytes, seconds } = sampled?;
        all.cache_bytes += cache_bytes;
        all.unique_prompt_tokens += prompt_tokens;
        all.flops += flops;
        all.seconds = (all.seconds.0 + seconds.0, all.seconds.1 + seconds.1);
        for (prompt, rollout) in rollouts {
            all.sampled_tokens += rollout.tokens.len() as u64;
            all.groups[prompt].push(rollout);
        }
    }
    // Replies of a prompt come in the order in which they end.
    all.groups.iter_mut().for_each(|group| group.sort_unstable_by_key(|rollout| rollout.sample));
    Ok(all)
}

/// Prompts that compute their trunk together, once.
///
/// A trunk is divided at a fixed number of prompts, whatever a lane has room for: counted tokens and operations, from which
/// the lengths of later stages are derived, depend on neither threads nor memory.
struct Part {
    /// The trunk's segments, then a footer for each prompt.
    forest: Forest,
    /// How many segments the trunk has.
    trunks: usize,
    /// Number of the first prompt among all.
    first: usize,
}

impl Part {
    fn new(prompts: &[Prompt], first: usize) -> Self {
        let mut forest = Forest::default();
        if let Some(prompt) = prompts.first() {
            let ends = add_trunk(&mut forest, prompt, prompts.iter().map(|prompt| prompt.length));
            for prompt in prompts {
                forest.add(ends.get(&prompt.length).copied(), &prompt.footer);
            }
        }
        Self { trunks: forest.segments().len() - prompts.len(), forest, first }
    }

    fn prompts(&self) -> usize {
        self.forest.segments().len() - self.trunks
    }

    fn trunk_pages(&self) -> usize {
        self.pages().take(self.trunks).sum()
    }

    /// Pages without which none of its prompts can enter.
    fn least_pages(&self) -> usize {
        self.trunk_pages() + self.pages().skip(self.trunks).max().unwrap_or(0)
    }

    fn pages(&self) -> impl Iterator<Item = usize> {
        self.forest.segments().iter().map(|segment| segment.length.div_ceil(PAGE))
    }
}

/// What lanes have still to do.
struct Queue<'p> {
    prompts: &'p [Prompt],
    waiting: Mutex<VecDeque<Part>>,
    samples: usize,
    /// Replies of the part that has most.
    most_replies: usize,
    /// Pages that the part needs which needs most, beside replies.
    most_pages: usize,
}

impl<'p> Queue<'p> {
    fn new(prompts: &'p [Prompt], samples: usize) -> Self {
        let mut first = 0;
        let parts = parts(prompts, samples).map(|prompts| {
            first += prompts.len();
            Part::new(prompts, first - prompts.len())
        });
        let waiting: VecDeque<Part> = parts.collect();
        let most_replies = waiting.iter().map(|part| part.prompts() * samples).max().unwrap_or(0);
        let most_pages = waiting.iter().map(Part::least_pages).max().unwrap_or(0);
        Self { prompts, waiting: Mutex::new(waiting), samples, most_replies, most_pages }
    }

    /// How many lanes share the work, and what each may hold: of a small model there is one for each thread, as far as the
    /// memory has room for the longest prompt and reply in each of them.
    fn lanes(&self, engine: &Engine) -> (usize, Limits) {
        let (config, replies) = (engine.decoder.config(), self.prompts.len() * self.samples);
        let worthwhile = match engine.decoder.layout().len() {
            ..=SMALL_MODEL => replies,
            _ => replies / REPLIES_WORTH_THE_WEIGHTS,
        };
        let full = engine.stop.max_new_tokens.saturating_sub(1).div_ceil(PAGE);
        let page = KvCache::page_bytes(config.geometry(), config.layers).max(1) as u64;
        let pages = usize::try_from(engine.cache_bytes.unwrap_or(CACHE_BYTES) / page).unwrap_or(usize::MAX);
        let least = self.most_pages + full;
        let lanes = worthwhile.min(rayon::current_num_threads()).min(pages / least.max(1)).max(1);
        let replies = replies.div_ceil(lanes).max(self.most_replies);
        let replies = replies.clamp(1, REPLIES_AT_ONCE.max(self.samples));
        (lanes, Limits { replies, pages: (pages / lanes).max(least), full, alone: lanes == 1 })
    }

    /// Takes the next part if `fits`.
    fn take(&self, fits: impl FnOnce(&Part) -> bool) -> Option<Part> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        fits(waiting.front()?).then(|| waiting.pop_front()).flatten()
    }
}

/// What a lane may hold.
#[derive(Clone, Copy)]
struct Limits {
    /// Replies that grow side by side: at least the samples of one prompt.
    replies: usize,
    /// Pages of keys and values: enough for any part's trunk with one prompt and one reply.
    pages: usize,
    /// Pages of a reply that becomes as long as it may.
    full: usize,
    /// Whether there is no other lane, so that all threads share its operations.
    alone: bool,
}

/// Prompts of a trunk on their way into the cache.
struct Entering {
    part: Part,
    /// Node of each segment, once it is begun.
    nodes: Vec<Option<NodeId>>,
    /// Row of the forest with which each prompt ends.
    ends: Vec<usize>,
    /// Segments before this one are computed, and rows before that one.
    segment: usize,
    row: usize,
    /// Pages that what has begun will still need.
    reserved: usize,
}

impl Entering {
    fn new(part: Part) -> Self {
        let segments = part.forest.segments();
        // A prompt is not empty, so there is a row before its end.
        let footers = part.trunks..segments.len();
        let ends = footers.filter_map(|at| part.forest.row_before(at, segments[at].length)).collect();
        let (nodes, reserved) = (vec![None; segments.len()], part.trunk_pages());
        Self { part, nodes, ends, segment: 0, row: 0, reserved }
    }

    /// The segment to be computed next, and how many of its tokens are left.
    fn next(&mut self) -> Option<(usize, usize)> {
        while let Some(segment) = self.part.forest.segments().get(self.segment) {
            let end = segment.row + segment.length;
            if self.row < end {
                return Some((self.segment, end - self.row));
            }
            self.segment += 1;
        }
        None
    }

    /// The node of a segment whose ancestors are computed. Trunks are held until all prompts have entered.
    fn node(&mut self, segment: usize, cache: &mut KvCache) -> NodeId {
        if let Some(node) = self.nodes[segment] {
            return node;
        }
        let parent = self.part.forest.segments()[segment].parent.and_then(|parent| self.nodes[parent]);
        let node = cache.insert(parent);
        if segment < self.part.trunks {
            cache.hold(node);
        }
        self.nodes[segment] = Some(node);
        node
    }

    /// Adds the next `count` tokens of a segment to a pass, and the prompts that end with them.
    fn advance(&mut self, segment: usize, count: usize, cache: &mut KvCache, pass: &mut Pass) {
        let node = self.node(segment, cache);
        let (from, first, used) = (self.row, pass.ids.len(), cache.used_pages());
        self.row += count;
        pass.add(node, &self.part.forest.ids()[from..self.row], cache);
        self.reserved = self.reserved.saturating_sub(cache.used_pages() - used);
        for at in 0..self.ends.len() {
            if (from..self.row).contains(&self.ends[at]) {
                let node = self.node(self.part.trunks + at, cache);
                let row = first + self.ends[at] - from;
                pass.complete.push(Complete { prompt: self.part.first + at, node, row });
            }
        }
    }

    /// Lets the trunk go, which replies may still hold.
    fn leave(self, cache: &mut KvCache) {
        for node in self.nodes[..self.part.trunks].iter().rev().flatten() {
            cache.let_go(*node);
        }
    }
}

/// A prompt that a pass completes, and the row of its last token.
struct Complete {
    prompt: usize,
    node: NodeId,
    row: usize,
}

/// A prompt in the cache, with the normalised hidden state behind its last token.
struct Ready {
    prompt: usize,
    node: NodeId,
    state: Vec<f32>,
}

/// A growing reply in the cache.
struct Live {
    prompt: usize,
    node: NodeId,
    growing: Growing,
    /// Its row of hidden states in this pass; none when it pauses.
    row: Option<usize>,
}

impl Live {
    /// Its tokens in the cache: the last waits for the next pass.
    fn cached(&self) -> usize {
        self.growing.rollout.tokens.len().saturating_sub(1)
    }

    fn pages(&self) -> usize {
        self.cached().div_ceil(PAGE)
    }
}

/// One pass through the model: first a row for each reply, then those of prompts.
#[derive(Default)]
struct Pass {
    ids: Vec<u32>,
    extensions: Vec<Extension>,
    complete: Vec<Complete>,
    /// Rows behind which tokens are drawn.
    last_rows: Vec<usize>,
}

impl Pass {
    /// Begins the next one in the same memory.
    fn clear(&mut self) {
        self.ids.clear();
        self.extensions.clear();
        self.complete.clear();
        self.last_rows.clear();
    }

    fn add(&mut self, node: NodeId, ids: &[u32], cache: &mut KvCache) {
        let rows = self.ids.len()..self.ids.len() + ids.len();
        cache.extend(node, ids.len(), rows.start);
        self.extensions.push(Extension { node, rows });
        self.ids.extend_from_slice(ids);
    }
}

/// What a lane has done.
#[derive(Default)]
struct Sampled {
    /// With the number of their prompt.
    rollouts: Vec<(usize, Rollout)>,
    prompt_tokens: u64,
    flops: u64,
    cache_bytes: u64,
    /// Of prompts and of replies.
    seconds: (f64, f64),
}

/// Replies that grow side by side, and prompts on their way.
struct Lane<'a, 'p> {
    engine: &'a Engine<'a>,
    queue: &'a Queue<'p>,
    limits: Limits,
    cache: KvCache,
    workspace: Workspace,
    entering: Option<Entering>,
    ready: VecDeque<Ready>,
    live: Vec<Live>,
    logits: Vec<f32>,
    sampled: Sampled,
}

impl<'a, 'p> Lane<'a, 'p> {
    fn new(engine: &'a Engine<'a>, queue: &'a Queue<'p>, limits: Limits) -> Self {
        Self {
            engine,
            queue,
            limits,
            cache: engine.decoder.new_cache().with_most_pages(limits.pages),
            workspace: Workspace::default(),
            entering: None,
            ready: VecDeque::new(),
            live: Vec::new(),
            logits: Vec::new(),
            sampled: Sampled::default(),
        }
    }

    /// Works until the queue is empty and every reply has ended.
    fn run(mut self) -> Result<Sampled, ModelError> {
        let mut pass = Pass::default();
        loop {
            let start = Instant::now();
            pass.clear();
            self.add_replies(&mut pass);
            let replies = pass.ids.len();
            self.add_prompts(&mut pass);
            if pass.ids.is_empty() && self.ready.is_empty() {
                break;
            }
            if self.limits.alone {
                parallel::keep_threads_awake();
            }
            let prompts = pass.ids.len() - replies;
            self.sampled.cache_bytes = self.sampled.cache_bytes.max(self.cache.used_bytes() as u64);
            self.compute(&mut pass, replies)?;
            let share = prompts as f64 / (prompts + replies).max(1) as f64;
            let elapsed = start.elapsed().as_secs_f64();
            self.sampled.prompt_tokens += prompts as u64;
            self.sampled.seconds.0 += share * elapsed;
            self.sampled.seconds.1 += (1.0 - share) * elapsed;
        }
        // There is always room for one of them; if that were ever wrong, replies must not be lost in silence.
        assert!(self.live.is_empty() && self.entering.is_none(), "replies wait for room for ever");
        Ok(Sampled { flops: self.workspace.flops, ..self.sampled })
    }

    fn free_pages(&self) -> usize {
        let reserved = self.entering.as_ref().map_or(0, |entering| entering.reserved);
        self.limits.pages.saturating_sub(self.cache.used_pages() + reserved)
    }

    /// Adds the newest token of every reply that has room for it, the oldest first.
    fn add_replies(&mut self, pass: &mut Pass) {
        let full = self.limits.full;
        let mut longest = self.live.iter().map(Live::pages).max().unwrap_or(0);
        let mut free = self.free_pages();
        for live in &mut self.live {
            let needed = (live.cached() + 1).div_ceil(PAGE);
            let (new, most) = (needed - live.pages(), longest.max(needed));
            let Some(&last) = live.growing.rollout.tokens.last() else { continue };
            live.row = (free >= new + full.saturating_sub(most)).then_some(pass.ids.len());
            if live.row.is_some() {
                (free, longest) = (free - new, most);
                pass.add(live.node, &[last], &mut self.cache);
            }
        }
    }

    /// Adds tokens of prompts for whose replies there is room.
    fn add_prompts(&mut self, pass: &mut Pass) {
        let mut left = PROMPT_TOKENS_AT_ONCE;
        while left > 0 {
            let ready = self.ready.len() + pass.complete.len();
            let Some(mut entering) = self.entering.take().or_else(|| self.next_part(ready)) else { return };
            let Some((segment, tokens)) = entering.next() else {
                entering.leave(&mut self.cache);
                continue;
            };
            let (pages, begins) = (tokens.div_ceil(PAGE), entering.nodes[segment].is_none());
            if begins && segment >= entering.part.trunks {
                // What was reserved for the segments before it is in use by now.
                if !self.has_room(ready, 1, pages) {
                    self.entering = Some(entering);
                    return;
                }
                entering.reserved = pages;
            }
            let count = tokens.min(left);
            left -= count;
            entering.advance(segment, count, &mut self.cache, pass);
            self.entering = Some(entering);
        }
    }

    /// The next part, if all its replies fit beside those that grow and those of `ready` prompts.
    fn next_part(&self, ready: usize) -> Option<Entering> {
        let fits = |part: &Part| self.has_room(ready, part.prompts(), part.least_pages());
        self.queue.take(fits).map(Entering::new)
    }

    /// Whether there is room for the replies to some prompts, and the pages that the first of these needs, beside the replies
    /// that grow and those of `ready` prompts. Where there are none of either, the limits see to it.
    fn has_room(&self, ready: usize, prompts: usize, pages: usize) -> bool {
        let samples = self.queue.samples;
        let replies = self.live.len() + ready * samples;
        // Few replies become as long as they may; those that are too many for that pause, which costs time alone.
        let typical = self.limits.full.div_ceil(4);
        let claims: usize = self.live.iter().map(|live| typical.saturating_sub(live.pages())).sum();
        let demand = claims + (ready + 1) * samples * typical;
        replies == 0
            || replies + prompts * samples <= self.limits.replies
                && self.free_pages() >= pages + demand.max(self.limits.full)
    }

    /// Runs a pass with so many replies, draws their next tokens and the first ones of replies that begin.
    fn compute(&mut self, pass: &mut Pass, replies: usize) -> Result<(), ModelError> {
        let Pass { ids, extensions, complete, last_rows } = pass;
        let decoder = self.engine.decoder;
        if !ids.is_empty() {
            decoder.forward(ids, extensions, &mut self.cache, &mut self.workspace, None)?;
        }
        last_rows.extend((0..replies).chain(complete.iter().map(|prompt| prompt.row)));
        let mut states = decoder.hidden(&self.workspace, last_rows);
        let width = decoder.config().hidden_size;
        let of_prompts = states.split_off(replies * width);
        for (Complete { prompt, node, .. }, state) in complete.drain(..).zip(of_prompts.chunks_exact(width)) {
            self.ready.push_back(Ready { prompt, node, state: state.to_vec() });
        }
        // Prompts that are ready have their pages already.
        while self.has_room(0, 1, 0)
            && let Some(ready) = self.ready.pop_front()
        {
            self.begin(&ready, states.len() / width);
            states.extend_from_slice(&ready.state);
        }
        self.grow(&states);
        self.collect();
        Ok(())
    }

    /// Begins the replies to a prompt, whose first tokens come from one row of hidden states.
    fn begin(&mut self, ready: &Ready, row: usize) {
        if self.queue.samples == 0 {
            return self.cache.release_path(ready.node);
        }
        for sample in 0..self.queue.samples {
            let growing = Growing::new(self.engine, &self.queue.prompts[ready.prompt], sample);
            let node = self.cache.insert(Some(ready.node));
            self.live.push(Live { prompt: ready.prompt, node, growing, row: Some(row) });
        }
    }

    /// Adds one token to every reply that has a row of hidden states.
    fn grow(&mut self, states: &[f32]) {
        let config = self.engine.decoder.config();
        let (width, vocabulary) = (config.hidden_size, config.vocab_size);
        let rows_at_once = (LOGITS_AT_ONCE / vocabulary).max(1);
        let (sampling, logits) = (&self.engine.sampling, &mut self.logits);
        for (block, states) in states.chunks(rows_at_once * width).enumerate() {
            self.engine.decoder.logits(states, logits, &mut self.workspace);
            let first = block * rows_at_once;
            self.live.par_iter_mut().for_each(|live| {
                let at = live.row.and_then(|row| row.checked_sub(first));
                if let Some(logits) = at.and_then(|row| logits.get(row * vocabulary..(row + 1) * vocabulary))
                {
                    let growing = &mut live.growing;
                    let uniform = growing.stream.uniform(growing.rollout.tokens.len() as u64);
                    growing.push(draw(logits, sampling, uniform));
                }
            });
        }
    }

    /// Moves ended replies out and frees their pages.
    fn collect(&mut self) {
        let stop = &self.engine.stop;
        let ended = self.live.extract_if(.., |live| live.row.is_some() && live.growing.ends(stop));
        for live in ended {
            self.cache.release_path(live.node);
            self.sampled.rollouts.push((live.prompt, live.growing.rollout));
        }
    }
}

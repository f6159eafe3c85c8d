//! Prompts that wait for memory, and the work that they will be.

use crate::cuda::paged::PAGE;
use crate::model::DecoderConfig;
use crate::rollout::Prompt;
use crate::rollout::engine::{families, parts};
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;

/// Prompts of one trunk, to be computed together.
#[derive(Clone, Debug)]
pub(super) struct Portion<'p> {
    /// The prompts.
    pub(super) prompts: &'p [Prompt],
    /// Number of the first among all.
    pub(super) first: usize,
    /// Where any prompt of the trunk ends, not only these: how a trunk is cut decides the bits of attention, and must not
    /// depend on which prompts there was room for.
    cuts: Rc<[usize]>,
}

impl Portion<'_> {
    /// Tokens of the trunk that they need.
    fn reach(&self) -> usize {
        self.prompts.iter().map(|prompt| prompt.length).max().unwrap_or(0)
    }

    /// Where the segments of the trunk end.
    pub(super) fn cuts(&self) -> impl Iterator<Item = usize> {
        let reach = self.reach();
        self.cuts.iter().copied().take_while(move |cut| *cut <= reach)
    }

    /// Their tokens, those of the trunk once.
    pub(super) fn tokens(&self) -> usize {
        let footers: usize = self.prompts.iter().map(|prompt| prompt.footer.len()).sum();
        self.reach() + footers
    }

    /// Pages of their tokens.
    pub(super) fn pages(&self) -> usize {
        let mut start = 0;
        let trunk = self.cuts().map(|cut| (cut - std::mem::replace(&mut start, cut)).div_ceil(PAGE));
        let footers = self.prompts.iter().map(|prompt| prompt.footer.len().div_ceil(PAGE));
        trunk.chain(footers).sum()
    }

    /// The first of them.
    pub(super) fn shortened(&self, count: usize) -> Self {
        Self { prompts: &self.prompts[..count], ..self.clone() }
    }
}

/// All prompts that wait, in their order.
#[derive(Debug)]
pub(super) struct Waiting<'p> {
    families: VecDeque<Portion<'p>>,
}

impl<'p> Waiting<'p> {
    /// All prompts.
    pub(super) fn new(prompts: &'p [Prompt]) -> Self {
        let mut first = 0;
        let families = families(prompts).map(|family| {
            let cuts: BTreeSet<usize> =
                family.iter().map(|prompt| prompt.length).filter(|length| *length > 0).collect();
            let portion = Portion { prompts: family, first, cuts: cuts.into_iter().collect() };
            first += family.len();
            portion
        });
        Self { families: families.collect() }
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.families.is_empty()
    }

    /// The prompts of the next trunk.
    pub(super) fn next(&self) -> Option<&Portion<'p>> {
        self.families.front()
    }

    /// Takes the first prompts of the next trunk.
    pub(super) fn take(&mut self, count: usize) -> Option<Portion<'p>> {
        let mut next = self.families.pop_front()?;
        let count = count.min(next.prompts.len());
        let taken = next.shortened(count);
        (next.prompts, next.first) = (&next.prompts[count..], next.first + count);
        if !next.prompts.is_empty() {
            self.families.push_front(next);
        }
        Some(taken)
    }

    /// Pages of the prompt that needs most.
    pub(super) fn longest(&self) -> usize {
        let alone = |family: &Portion, at: usize| {
            Portion { prompts: &family.prompts[at..=at], ..family.clone() }.pages()
        };
        let of_family = |family: &Portion| (0..family.prompts.len()).map(|at| alone(family, at)).max();
        self.families.iter().filter_map(of_family).max().unwrap_or(0)
    }

    /// Pages of all prompts.
    pub(super) fn pages(&self) -> usize {
        self.families.iter().map(Portion::pages).sum()
    }
}

/// Work as the engine on the CPU counts it: what it computes once counts once, however often memory was too short for that.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Counted {
    /// Tokens that go through the layers.
    rows: usize,
    /// Pairs of a token and one that it sees.
    pairs: usize,
    /// Tokens behind which there are logits.
    logits: usize,
}

impl Counted {
    /// The work of prompts, and their tokens.
    pub(super) fn of_prompts(prompts: &[Prompt], samples: usize) -> (Self, u64) {
        let mut counted = Self { logits: prompts.len(), ..Self::default() };
        for part in parts(prompts, samples) {
            counted.add_segment(0, part.iter().map(|prompt| prompt.length).max().unwrap_or(0));
            for prompt in part {
                counted.add_segment(prompt.length, prompt.footer.len());
            }
        }
        (counted, counted.rows as u64)
    }

    /// Adds that of a reply to a prompt: its first token comes from the prompt, its last is not read.
    pub(super) fn add_reply(&mut self, prompt: &Prompt, tokens: usize) {
        let read = tokens.saturating_sub(1);
        self.add_segment(prompt.len(), read);
        self.logits += read;
    }

    fn add_segment(&mut self, position: usize, length: usize) {
        self.rows += length;
        self.pairs += length * position + length * (length + 1) / 2;
    }

    /// Floating-point operations.
    pub(super) fn flops(&self, config: &DecoderConfig) -> u64 {
        config.layer_flops(self.rows, self.pairs) + config.head_flops(self.logits)
    }
}

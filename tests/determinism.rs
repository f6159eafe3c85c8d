//! Results depend on the pipeline and its seed, not on threads, instruction sets or batches.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/command.rs"]
mod command;
mod common;
#[path = "common/run.rs"]
mod run;

use command::texts;
use rpt::config::{CacheFormat, LossMean, OptimizerConfig, TrainConfig};
use rpt::kernels::head::TokenScore;
use rpt::kernels::simd::{Isa, isa};
use rpt::model::{Decoder, Forest, KvCache, Workspace};
use rpt::random::Stream;
use rpt::rollout::{Engine, Finish, Generation, Prompt, Rollout, Sampling, StopRule, argmax};
use rpt::tokenize::{Tokenizer, train_byte_level_bpe};
use rpt::train::loss::PolicyLoss;
use rpt::train::{ScoredGroup, Trainer, policy_batches};
use run::{TINY, Workplace, assert_same_result, succeeded};
use std::collections::BTreeSet;
use std::sync::Arc;

/// More than one block of the head, and not a multiple of one.
const VOCABULARY: usize = 700;
const WARM: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

#[test]
fn threads_and_instruction_sets_change_no_bit_of_a_run() {
    let place = Workplace::new("determinism");
    let run = |name: &str, variable: &str, value: &str, settings: &[&str]| {
        let mut command = place.command("run", name, settings);
        succeeded(&command.env(variable, value).output().unwrap());
        place.path(name)
    };
    let one = run("threads-1", "RAYON_NUM_THREADS", "1", &[]);
    for threads in ["2", "3"] {
        let many = run(&format!("threads-{threads}"), "RAYON_NUM_THREADS", threads, &[]);
        assert_same_result(&many, &one);
    }
    if isa() == Isa::Avx512 {
        assert_same_result(&run("avx2", "RPT_ISA", "avx2", &[]), &one);
    } else {
        println!("SKIPPED: this machine has no AVX-512 to compare AVX2 with");
    }
    let tiny = run("tiny", "RPT_ISA", "", &TINY);
    assert_same_result(&run("portable", "RPT_ISA", "portable", &TINY), &tiny);
}

fn tokenizer() -> Tokenizer {
    train_byte_level_bpe(texts(50).into_iter(), 300).unwrap()
}

/// Prompts of several trunks, one of which has more than enter together.
fn prompts(seed: u64) -> Vec<Prompt> {
    let stream = Stream::new(seed, "prompts");
    let mut n = 0;
    let mut draw = |bound: u64| {
        n += 1;
        stream.below(n, bound)
    };
    let mut prompts = Vec::new();
    for count in [1, 3, 90, 2, 6, 1] {
        let trunk: Arc<[u32]> = (0..8 + draw(60)).map(|_| draw(VOCABULARY as u64) as u32).collect();
        for _ in 0..count {
            let length = 1 + draw(trunk.len() as u64) as usize;
            let footer = (0..draw(4)).map(|_| draw(VOCABULARY as u64) as u32).collect();
            let ordinal = 1000 + 7 * prompts.len() as u64;
            prompts.push(Prompt {
                ordinal,
                trunk: trunk.clone(),
                length,
                header: 0,
                footer,
                cuts: Arc::new([]),
            });
        }
    }
    prompts
}

fn engine<'a>(decoder: &'a Decoder, tokenizer: &'a Tokenizer, sampling: Sampling) -> Engine<'a> {
    let stop = StopRule { eos: vec![3, 650], strings: &[], tokenizer, max_new_tokens: 12 };
    Engine {
        decoder,
        sampling,
        stop,
        seed: 5,
        policy_version: 0,
        kv_cache: CacheFormat::Model,
        cache_bytes: None,
    }
}

fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

#[test]
fn a_rollout_depends_on_seed_ordinal_and_sample_alone() {
    let tokenizer = tokenizer();
    let prompts = prompts(1);
    for kind in 0..3 {
        let decoder = common::model(kind, VOCABULARY);
        let engine = engine(&decoder, &tokenizer, Sampling { temperature: 1.2, top_k: 200, ..WARM });
        let together = engine.generate(&prompts, 4).unwrap().groups;
        assert!(together.iter().flatten().any(|rollout| rollout.finish == Finish::Eos));
        for (prompt, group) in prompts.iter().zip(&together).step_by(5) {
            let alone = engine.generate(std::slice::from_ref(prompt), 4).unwrap().groups;
            assert_eq!(alone[0], *group);
            // Fewer samples are the first of more.
            assert_eq!(engine.generate(std::slice::from_ref(prompt), 2).unwrap().groups[0], group[..2]);
        }
        let order = Stream::new(2, "order").order(prompts.len());
        let shuffled: Vec<Prompt> = order.iter().map(|at| prompts[*at].clone()).collect();
        for (at, group) in order.iter().zip(engine.generate(&shuffled, 4).unwrap().groups) {
            assert_eq!(group, together[*at]);
        }
        let other = Engine { seed: 6, ..engine }.generate(&prompts, 4).unwrap().groups;
        assert_ne!(other, together);
    }
}

#[test]
fn counted_work_does_not_depend_on_threads() {
    let (tokenizer, prompts, decoder) = (tokenizer(), prompts(2), common::model(0, VOCABULARY));
    let engine = engine(&decoder, &tokenizer, WARM);
    let work = |all: &Generation| {
        (all.flops, all.unique_prompt_tokens, all.repeated_prompt_tokens, all.sampled_tokens)
    };
    let one = on_threads(1, || engine.generate(&prompts, 4).unwrap());
    for threads in [2, 3, 5, 16, 200] {
        let many = on_threads(threads, || engine.generate(&prompts, 4).unwrap());
        assert_eq!(work(&many), work(&one), "{threads} threads");
        assert_eq!(many.groups, one.groups);
    }
    assert!(one.unique_prompt_tokens < one.repeated_prompt_tokens / 4);
}

#[test]
fn neither_memory_nor_company_change_a_bit() {
    let (tokenizer, decoder) = (tokenizer(), common::model(1, VOCABULARY));
    // So many that prompts are computed in several passes, beside replies that grow.
    let prompts: Vec<Prompt> = (10..13).flat_map(prompts).collect();
    let usual = engine(&decoder, &tokenizer, WARM);
    let stop = StopRule { max_new_tokens: 60, ..usual.stop.clone() };
    let within =
        |cache_bytes| Engine { stop: stop.clone(), cache_bytes, ..engine(&decoder, &tokenizer, WARM) };
    let free = on_threads(1, || within(None).generate(&prompts, 4).unwrap());
    let longest = free.groups.iter().flatten().map(|rollout| rollout.tokens.len()).max();
    assert_eq!(longest, Some(60));
    // There must be room for one trunk, cut where its prompts end, with one footer and the longest reply: here each
    // cut begins a page of sixteen positions.
    let config = decoder.config();
    let page = KvCache::page_bytes(config.geometry(), config.layers) as u64;
    let lengths =
        |family: &[Prompt]| family.iter().map(|prompt| prompt.length).collect::<BTreeSet<_>>().len();
    let families = prompts.chunk_by(|a, b| Arc::ptr_eq(&a.trunk, &b.trunk));
    let floor = page * families.map(|family| lengths(family) as u64 + 5 + 1 + 4).max().unwrap();
    for share in [2, 5, 20, 100_000] {
        let budget = free.cache_bytes / share;
        for threads in [1, 3] {
            let tight = on_threads(threads, || within(Some(budget)).generate(&prompts, 4).unwrap());
            assert_eq!(tight.groups, free.groups, "1/{share} on {threads} threads");
            assert_eq!((tight.flops, tight.unique_prompt_tokens), (free.flops, free.unique_prompt_tokens));
            assert!(tight.cache_bytes <= budget.max(floor), "{} of {budget}", tight.cache_bytes);
        }
    }
    assert!(floor * 5 < free.cache_bytes, "{floor} of {}", free.cache_bytes);
}

#[test]
fn prompts_without_a_trunk_and_long_footers_wait_for_room_too() {
    let (tokenizer, decoder) = (tokenizer(), common::model(0, VOCABULARY));
    let (trunk, other): (Arc<[u32]>, Arc<[u32]>) = ((7..90).collect(), (100..140).collect());
    let prompt = |ordinal: u64| Prompt {
        ordinal,
        trunk: if ordinal < 9 { trunk.clone() } else { other.clone() },
        length: if ordinal.is_multiple_of(3) { 0 } else { 4 * ordinal as usize % 40 },
        header: 0,
        footer: (200..220 + 5 * ordinal as u32).collect(),
        cuts: Arc::new([]),
    };
    let prompts: Vec<Prompt> = (0..16).map(prompt).collect();
    for (samples, max_new_tokens) in [(1, 40), (3, 1), (300, 20), (0, 5)] {
        let usual = engine(&decoder, &tokenizer, WARM);
        let stop = StopRule { max_new_tokens, ..usual.stop.clone() };
        let within =
            |cache_bytes| Engine { stop: stop.clone(), cache_bytes, ..engine(&decoder, &tokenizer, WARM) };
        let free = within(None).generate(&prompts, samples).unwrap().groups;
        assert!(free.len() == prompts.len() && free.iter().all(|group| group.len() == samples));
        assert_eq!(within(Some(1)).generate(&prompts, samples).unwrap().groups, free);
        for (prompt, group) in prompts.iter().zip(&free).step_by(5) {
            let alone = within(None).generate(std::slice::from_ref(prompt), samples).unwrap().groups;
            assert_eq!(alone[0], *group);
        }
    }
}

/// All tokens of a prompt.
fn prompt_ids(prompt: &Prompt) -> Vec<u32> {
    prompt.trunk[..prompt.length].iter().chain(prompt.footer.iter()).copied().collect()
}

/// Normalised hidden states of every token, from one prefill without anything shared.
fn states(decoder: &Decoder, ids: &[u32]) -> Vec<f32> {
    let mut forest = Forest::default();
    forest.add(None, ids);
    let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(ids, &extensions, &mut cache, &mut workspace, None).unwrap();
    decoder.hidden(&workspace, &(0..ids.len()).collect::<Vec<_>>())
}

/// Scores of a rollout's tokens, from one prefill of prompt and reply.
fn scores(decoder: &Decoder, prompt: &Prompt, tokens: &[u32], inverse_temperature: f32) -> Vec<TokenScore> {
    let mut ids = prompt_ids(prompt);
    let first = ids.len() - 1;
    ids.extend_from_slice(tokens);
    let states = states(decoder, &ids[..ids.len() - 1]);
    let width = decoder.config().hidden_size;
    decoder.score(&states[first * width..], tokens, inverse_temperature, &mut Workspace::default())
}

fn bits(values: impl Iterator<Item = f32>) -> Vec<u32> {
    values.map(f32::to_bits).collect()
}

#[test]
fn recorded_log_probabilities_are_those_of_the_trainer() {
    let tokenizer = tokenizer();
    let prompts: Vec<Prompt> = prompts(3).into_iter().step_by(4).collect();
    let truncated = Sampling { temperature: 0.7, top_k: 50, top_p: 0.9, min_p: 0.01 };
    let samplings = [WARM, truncated, Sampling { temperature: 1.7, ..WARM }];
    for (kind, sampling) in samplings.into_iter().enumerate() {
        let decoder = common::model(kind, VOCABULARY);
        let groups = engine(&decoder, &tokenizer, sampling).generate(&prompts, 3).unwrap().groups;
        let inverse_temperature = sampling.inverse_temperature();
        for (prompt, rollout) in prompts.iter().zip(&groups).map(|(prompt, group)| (prompt, &group[1])) {
            let scores = scores(&decoder, prompt, &rollout.tokens, inverse_temperature);
            let logprobs = bits(scores.iter().map(|score| score.logprob));
            assert_eq!(bits(rollout.logprobs.iter().copied()), logprobs);
            let policy_logprobs = bits(scores.iter().map(|score| score.policy_logprob));
            assert_eq!(bits(rollout.policy_logprobs.iter().copied()), policy_logprobs);
        }
        let stats = update(decoder, &prompts, &groups, inverse_temperature);
        let tokens: usize = groups.iter().flatten().map(|rollout| rollout.tokens.len()).sum();
        assert_eq!(stats.policy_tokens, tokens as u64);
        assert_eq!((stats.mismatched, stats.largest_mismatch, stats.clipped), (0, 0.0, 0));
    }
}

/// One update from rollouts with made-up advantages, in micro-batches of several sizes.
fn update(
    decoder: Decoder,
    prompts: &[Prompt],
    groups: &[Vec<Rollout>],
    inverse_temperature: f32,
) -> rpt::train::Totals {
    let scored: Vec<ScoredGroup> = prompts
        .iter()
        .zip(groups)
        .map(|(prompt, rollouts)| ScoredGroup { prompt, rollouts, advantages: vec![1.0, -0.5, -0.5] })
        .collect();
    let batches = policy_batches(&scored, LossMean::Token, 12, 0.1, 300);
    assert!(batches.len() > 2);
    let mut trainer = Trainer::new(decoder, &OptimizerConfig::default(), 1).unwrap();
    let loss = PolicyLoss::new(&TrainConfig::default());
    trainer.update(&batches, &loss, inverse_temperature, None).unwrap().totals
}

#[test]
fn greedy_replies_are_the_argmax_of_a_prefill_at_every_step() {
    let tokenizer = tokenizer();
    for kind in 0..3 {
        let decoder = common::model(kind, VOCABULARY);
        let prompts: Vec<Prompt> = prompts(4).into_iter().step_by(9).collect();
        let groups = engine(&decoder, &tokenizer, Sampling::GREEDY).generate(&prompts, 2).unwrap().groups;
        for (prompt, group) in prompts.iter().zip(&groups) {
            assert_eq!(group[0].tokens, group[1].tokens);
            let mut ids = prompt_ids(prompt);
            for token in &group[0].tokens {
                let states = states(&decoder, &ids);
                let last = &states[states.len() - decoder.config().hidden_size..];
                let mut logits = Vec::new();
                decoder.logits(last, &mut logits, &mut Workspace::default());
                assert_eq!(argmax(&logits), *token as usize);
                ids.push(*token);
            }
        }
    }
}

/// The reply of one engine with a stop rule to every prompt.
fn replies(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    eos: &[u32],
    strings: &[String],
    n: usize,
) -> Vec<Rollout> {
    let stop = StopRule { eos: eos.to_vec(), strings, tokenizer, max_new_tokens: n };
    // Ids below 300 are the tokenizer's, so that replies are text.
    let engine = Engine {
        decoder,
        sampling: WARM,
        stop,
        seed: 9,
        policy_version: 0,
        kv_cache: CacheFormat::Model,
        cache_bytes: None,
    };
    engine.generate(&prompts_of_text(), 1).unwrap().groups.into_iter().flatten().collect()
}

fn prompts_of_text() -> Vec<Prompt> {
    let trunk: Arc<[u32]> = (5..40).collect();
    let prompt = |ordinal: u64| Prompt {
        ordinal,
        trunk: trunk.clone(),
        length: 1 + ordinal as usize,
        header: 0,
        footer: Arc::new([]),
        cuts: Arc::new([]),
    };
    (0..30).map(prompt).collect()
}

/// Where a reply must end: at the first end token, else the first stop string, else the limit.
fn expected(
    free: &Rollout,
    tokenizer: &Tokenizer,
    eos: &[u32],
    strings: &[String],
    n: usize,
) -> (usize, Finish) {
    for length in 1..=n {
        let tokens = &free.tokens[..length];
        if eos.contains(&tokens[length - 1]) {
            return (length, Finish::Eos);
        }
        let text = tokenizer.decode_bytes(tokens);
        if strings.iter().any(|stop| text.ends_with(stop.as_bytes())) {
            return (length, Finish::Stop);
        }
    }
    (n, Finish::Length)
}

#[test]
fn replies_end_at_end_tokens_stop_strings_and_the_limit() {
    let tokenizer = tokenizer();
    let decoder = common::model(0, tokenizer.vocab_size());
    let free = replies(&decoder, &tokenizer, &[], &[], 40);
    assert!(free.iter().all(|reply| reply.tokens.len() == 40 && reply.finish == Finish::Length));
    // An end token, a stop string across two tokens of a reply, and one inside a single token.
    let eos = free[0].tokens[9];
    let text = |tokens: &[u32]| String::from_utf8(tokenizer.decode_bytes(tokens)).ok();
    let across =
        free.iter().find_map(|reply| text(&reply.tokens[5..7]).filter(|text| text.len() > 1)).unwrap();
    let strings = [across, "e".to_string()];
    let mut seen = Vec::new();
    for (eos, strings, n) in [
        (&[eos][..], &[][..], 40),
        (&[], &strings[..1], 40),
        (&[eos], &strings, 40),
        (&[eos], &strings, 7),
        (&[], &[], 1),
    ] {
        for (reply, free) in replies(&decoder, &tokenizer, eos, strings, n).iter().zip(&free) {
            let (length, finish) = expected(free, &tokenizer, eos, strings, n);
            assert_eq!((reply.tokens.len(), reply.finish), (length, finish));
            assert_eq!(reply.tokens, free.tokens[..length]);
            assert_eq!(reply.logprobs, free.logprobs[..length]);
            seen.push(finish);
        }
    }
    assert!([Finish::Eos, Finish::Stop, Finish::Length].iter().all(|finish| seen.contains(finish)));
}

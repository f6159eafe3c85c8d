//! Sampling on the device: against the engine on the CPU, and against itself under other limits.

use crate::cuda_emulator::{emulated_device, fail_launch, in_child, late_work};
use crate::support::{VOCABULARY, decoder, settings};
use rpt::config::{CacheFormat, LossMean};
use rpt::model::device::{DeviceDecoder, Format, OnDevice};
use rpt::model::{Decoder, Dtype, ModelError, Targets, TokenScore};
use rpt::random::Stream;
use rpt::rollout::device::{Limits, generate};
use rpt::rollout::{Engine, Finish, Generation, Prompt, Rollout, Sampling, StopRule};
use rpt::tokenize::{Tokenizer, train_byte_level_bpe};
use rpt::train::{Component, MicroBatch, ScoredGroup, policy_batches};
use std::sync::Arc;

pub(crate) const WARM: Sampling = Sampling { temperature: 1.0, ..Sampling::GREEDY };
pub(crate) const SAMPLES: usize = 3;
pub(crate) const MAX_NEW_TOKENS: usize = 21;

pub(crate) fn tokenizer() -> Tokenizer {
    train_byte_level_bpe(["a few words for a few pairs".to_owned()].into_iter(), 260).unwrap()
}

/// Prompts of several trunks, some of which have the same length, with and without a footer.
pub(crate) fn prompts(seed: u64) -> Vec<Prompt> {
    let stream = Stream::new(seed, "device prompts");
    let mut n = 0;
    let mut draw = |bound: usize| {
        n += 1;
        stream.below(n, bound as u64) as usize
    };
    let mut prompts = Vec::new();
    for count in [2, 1, 4] {
        let trunk: Arc<[u32]> = (0..20 + draw(40)).map(|_| draw(VOCABULARY) as u32).collect();
        for at in 0..count {
            let length = if at == 2 { 16 } else { 1 + draw(trunk.len()) };
            let footer = (0..draw(3) * at).map(|_| draw(VOCABULARY) as u32).collect();
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
    Prompt::note_cuts(&mut prompts);
    prompts
}

pub(crate) fn engine<'a>(decoder: &'a Decoder, tokenizer: &'a Tokenizer, sampling: Sampling) -> Engine<'a> {
    let stop = StopRule { eos: vec![3, 77], strings: &[], tokenizer, max_new_tokens: MAX_NEW_TOKENS };
    Engine {
        decoder,
        sampling,
        stop,
        seed: 5,
        policy_version: 2,
        kv_cache: CacheFormat::Model,
        cache_bytes: None,
    }
}

/// What an engine samples on the device within some limits.
pub(crate) fn sampled(
    engine: &Engine,
    there: &OnDevice,
    prompts: &[Prompt],
    limits: Limits,
) -> Result<Generation, ModelError> {
    match there {
        OnDevice::F32(there) => generate(engine, there, prompts, SAMPLES, limits),
        OnDevice::Bf16(there) => generate(engine, there, prompts, SAMPLES, limits),
    }
}

pub(crate) fn there(decoder: &Decoder) -> OnDevice {
    OnDevice::new(&settings(), decoder).unwrap()
}

fn work(all: &Generation) -> (u64, u64, u64, u64) {
    (all.flops, all.unique_prompt_tokens, all.repeated_prompt_tokens, all.sampled_tokens)
}

fn assert_close(actual: &[f32], expected: &[f32]) {
    assert_eq!(actual.len(), expected.len());
    for (actual, expected) in actual.iter().zip(expected) {
        assert!((actual - expected).abs() < 1e-4, "{actual} {expected}");
    }
}

/// Everything but log-probabilities exactly, these nearly.
fn assert_same(actual: &Generation, expected: &Generation) {
    assert_eq!(work(actual), work(expected));
    assert_eq!(actual.groups.len(), expected.groups.len());
    for (actual, expected) in actual.groups.iter().flatten().zip(expected.groups.iter().flatten()) {
        let rest = |rollout: &Rollout| {
            let none = Vec::new;
            let (logprobs, policy_logprobs, sampling_logprobs) = (none(), none(), none());
            Rollout { logprobs, policy_logprobs, sampling_logprobs, ..rollout.clone() }
        };
        assert_eq!(rest(actual), rest(expected));
        assert_close(&actual.logprobs, &expected.logprobs);
        assert_close(&actual.policy_logprobs, &expected.policy_logprobs);
        assert_close(&actual.sampling_logprobs, &expected.sampling_logprobs);
    }
}

#[test]
fn replies_are_those_of_the_cpu() {
    let (tokenizer, settings) = (tokenizer(), settings());
    let truncated = Sampling { temperature: 0.7, top_k: 50, top_p: 0.9, min_p: 0.01 };
    for (family, sampling) in [(0, WARM), (1, truncated), (2, Sampling::GREEDY)] {
        let (decoder, prompts) = (decoder(family, Dtype::F32), prompts(family as u64));
        let expected = engine(&decoder, &tokenizer, sampling).generate(&prompts, SAMPLES).unwrap();
        let there = decoder.on(Some(&settings));
        let actual = engine(&there, &tokenizer, sampling).generate(&prompts, SAMPLES).unwrap();
        assert_same(&actual, &expected);
        assert!(actual.seconds.0 > 0.0 && actual.seconds.1 > 0.0);
        assert!(actual.groups.iter().all(|group| group.len() == SAMPLES));
    }
}

/// Whether some limits give what the usual ones give.
fn assert_limits_change_nothing(family: usize, dtype: Dtype, others: [Limits; 2]) {
    let (tokenizer, decoder) = (tokenizer(), decoder(family, dtype));
    assert_same_within(&engine(&decoder, &tokenizer, WARM), others);
}

/// As [`assert_limits_change_nothing`], of an engine.
pub(crate) fn assert_same_within(engine: &Engine, others: [Limits; 2]) {
    let (prompts, there) = (prompts(7), there(engine.decoder));
    let all = sampled(engine, &there, &prompts, Limits::default()).unwrap();
    for limits in others {
        let some = sampled(engine, &there, &prompts, limits).unwrap();
        assert_eq!(some.groups, all.groups, "{limits:?}");
        assert_eq!(work(&some), work(&all), "{limits:?}");
    }
}

#[test]
fn neither_rows_nor_lag_nor_memory_change_a_bit() {
    let usual = Limits::default();
    // No pages are as many as the longest prompt and reply need.
    let little_memory = Limits { pages: 0, replies: 5, room: 1, lag: 1, padded: false, ..usual };
    let one_by_one = Limits { replies: 1, room: 7, lag: 9, prompt_tokens: 1, ..usual };
    assert_limits_change_nothing(1, Dtype::F32, [little_memory, one_by_one]);
}

#[test]
fn prompts_are_computed_beside_steps_where_no_place_is_free() {
    if emulated_device().is_none() {
        return;
    }
    let (tokenizer, decoder) = (tokenizer(), decoder(1, Dtype::F32));
    let (engine, prompts, there) = (engine(&decoder, &tokenizer, WARM), prompts(7), there(&decoder));
    for (replies, is_beside) in [(512, false), (4, true)] {
        let before = late_work();
        sampled(&engine, &there, &prompts, Limits { replies, room: 4, ..Limits::default() }).unwrap();
        assert_eq!(late_work() > before, is_beside, "{replies}");
    }
}

#[test]
fn pauses_and_rounds_change_no_bit() {
    let usual = Limits::default();
    let pauses = Limits { pages: 14, room: 3, ..usual };
    let in_turns = Limits { pages: 25, replies: 4, room: 16, lag: 2, ..usual };
    assert_limits_change_nothing(0, Dtype::Bf16, [pauses, in_turns]);
}

#[test]
fn rows_of_nobody_change_no_bit() {
    let usual = Limits::default();
    assert!(usual.padded);
    // Of 21 replies, and of the fewer that are left when some have ended.
    let unpadded = Limits { padded: false, ..usual };
    let five = Limits { replies: 5, room: 4, ..usual };
    assert_limits_change_nothing(2, Dtype::F32, [unpadded, five]);
}

#[test]
fn recorded_log_probabilities_have_the_bits_of_scores() {
    let tokenizer = tokenizer();
    let sampling = Sampling { temperature: 0.8, top_p: 0.95, ..WARM };
    for (family, dtype) in [(0, Dtype::F32), (1, Dtype::Bf16)] {
        let (decoder, prompts) = (decoder(family, dtype), prompts(11));
        let (engine, there) = (engine(&decoder, &tokenizer, sampling), there(&decoder));
        let limits = Limits { pages: 20, room: 6, ..Limits::default() };
        let groups = sampled(&engine, &there, &prompts, limits).unwrap().groups;
        let mut scored = scored(&prompts, &groups);
        check_bits(&there, &scored, sampling);
        // As groups without variance are dropped: one that ends within its trunk, and one at its end.
        scored.remove(5);
        scored.remove(0);
        check_bits(&there, &scored, sampling);
    }
}

/// Replies with an advantage.
pub(crate) fn scored<'a>(prompts: &'a [Prompt], groups: &'a [Vec<Rollout>]) -> Vec<ScoredGroup<'a>> {
    let groups = prompts.iter().zip(groups);
    groups
        .map(|(prompt, rollouts)| ScoredGroup { prompt, rollouts, advantages: vec![1.0; SAMPLES] })
        .collect()
}

/// The trainer finds the log-probabilities that the engine recorded.
fn check_bits(there: &OnDevice, scored: &[ScoredGroup], sampling: Sampling) {
    for batch in policy_batches(scored, LossMean::Token, MAX_NEW_TOKENS, 0.0, 100) {
        let scores = match there {
            OnDevice::F32(there) => scores(there, &batch, sampling.inverse_temperature()),
            OnDevice::Bf16(there) => scores(there, &batch, sampling.inverse_temperature()),
        };
        assert_eq!(scores.len(), batch.targets.len());
        for (target, score) in batch.targets.iter().zip(scores) {
            let Component::Policy { old_logprob, engine_logprob, .. } = target.component else { panic!() };
            assert_eq!(score.logprob.to_bits(), engine_logprob.to_bits());
            assert_eq!(score.policy_logprob.to_bits(), old_logprob.to_bits());
        }
    }
}

/// Scores of a micro-batch's targets, as the trainer computes them.
fn scores<T: Format>(
    decoder: &DeviceDecoder<T>,
    batch: &MicroBatch,
    inverse_temperature: f32,
) -> Vec<TokenScore> {
    let there = decoder.batch(&batch.forest).unwrap();
    let x = decoder.forward(&there, None).unwrap();
    let rows = batch.targets.iter().map(|target| batch.forest.row_before(target.segment, target.at).unwrap());
    let rows: Vec<usize> = rows.collect();
    let tokens: Vec<u32> = batch.targets.iter().map(|target| target.token).collect();
    decoder.score(&there, &x, &Targets { rows: &rows, tokens: &tokens, inverse_temperature }).unwrap()
}

#[test]
fn replies_end_where_the_cpu_ends_them_whatever_the_lag() {
    let (tokenizer, decoder, prompts) = (tokenizer(), decoder(2, Dtype::F32), prompts(3));
    let there = there(&decoder);
    let free = engine(&decoder, &tokenizer, WARM).generate(&prompts, SAMPLES).unwrap().groups;
    let text = |tokens: &[u32]| String::from_utf8(tokenizer.decode_bytes(tokens)).ok();
    let pairs = free.iter().flatten().filter_map(|reply| text(reply.tokens.get(4..6)?));
    let strings: Vec<String> = pairs.take(2).chain(free[2][0].tokens.get(..1).and_then(text)).collect();
    assert_eq!(strings.len(), 3);
    let mut seen = Vec::new();
    for (max_new_tokens, lag, room) in
        [(MAX_NEW_TOKENS, 1, 128), (17, 4, 128), (30, 50, 3), (1, 3, 2), (0, 1, 1)]
    {
        let usual = engine(&decoder, &tokenizer, WARM);
        let stop = StopRule { strings: &strings, max_new_tokens, ..usual.stop.clone() };
        let engine = Engine { stop, ..usual };
        let expected = engine.generate(&prompts, SAMPLES).unwrap();
        let limits = Limits { lag, room, ..Limits::default() };
        assert_same(&sampled(&engine, &there, &prompts, limits).unwrap(), &expected);
        seen.extend(expected.groups.iter().flatten().map(|rollout| rollout.finish));
    }
    assert!([Finish::Eos, Finish::Stop, Finish::Length].iter().all(|finish| seen.contains(finish)));
}

#[test]
fn nothing_asked_is_nothing_sampled() {
    let (tokenizer, decoder, prompts, settings) =
        (tokenizer(), decoder(0, Dtype::F32), prompts(1), settings());
    let expected = engine(&decoder, &tokenizer, WARM).generate(&prompts, 0).unwrap();
    let there = decoder.on(Some(&settings));
    let engine = engine(&there, &tokenizer, WARM);
    assert_same(&engine.generate(&prompts, 0).unwrap(), &expected);
    assert!(engine.generate(&[], SAMPLES).unwrap().groups.is_empty());
}

#[test]
fn prompts_that_do_not_fit_are_refused_as_on_the_cpu() {
    let (tokenizer, decoder, settings) = (tokenizer(), decoder(0, Dtype::F32), settings());
    let there = decoder.on(Some(&settings));
    let prompt = |tokens: Vec<u32>| Prompt {
        ordinal: 4,
        length: tokens.len(),
        trunk: tokens.into(),
        header: 0,
        footer: Arc::new([]),
        cuts: Arc::new([]),
    };
    let refused = |tokens| engine(&there, &tokenizer, WARM).generate(&[prompt(tokens)], 1).unwrap_err();
    assert!(matches!(refused(vec![]), ModelError::EmptyPrompt { ordinal: 4 }));
    assert!(matches!(refused(vec![1; 500]), ModelError::TooLong { length: 521, limit: 512 }));
    assert!(matches!(refused(vec![1, VOCABULARY as u32]), ModelError::BadToken { id: 131, vocabulary: 131 }));
}

#[test]
fn a_launch_that_fails_is_an_error() {
    if emulated_device().is_none() {
        return;
    }
    let (tokenizer, decoder, prompts) = (tokenizer(), decoder(1, Dtype::F32), prompts(2));
    let engine = engine(&decoder, &tokenizer, WARM);
    // In prefill, while a step is recorded, and in steps.
    for nth in [1, 25, 45, 70, 200] {
        let there = there(&decoder);
        fail_launch(nth);
        let error = sampled(&engine, &there, &prompts, Limits::default()).unwrap_err();
        assert!(matches!(error, ModelError::Cuda(_)), "{nth}: {error}");
    }
    let prompts = &prompts[..1];
    let expected = engine.generate(prompts, SAMPLES).unwrap();
    assert_same(&sampled(&engine, &there(&decoder), prompts, Limits::default()).unwrap(), &expected);
}

/// Replies that may become so long that their pages fill the device: how often it began again with fewer.
fn long_replies(memory: f64) -> Result<u64, String> {
    let (tokenizer, decoder, prompts) = (tokenizer(), decoder(0, Dtype::F32), prompts(4));
    let usual = engine(&decoder, &tokenizer, WARM);
    let stop = StopRule { eos: (0..9).collect(), max_new_tokens: 400, ..usual.stop.clone() };
    let engine = Engine { stop, ..usual };
    let expected = engine.generate(&prompts, SAMPLES).unwrap();
    let limits = Limits { memory, ..Limits::default() };
    let actual = sampled(&engine, &there(&decoder), &prompts, limits);
    let actual = actual.map_err(|error| error.to_string())?;
    assert_same(&actual, &expected);
    Ok(actual.retries)
}

#[test]
#[ignore = "run by others in a process of its own"]
fn pages_take_all_memory() {
    assert!(long_replies(1.0).unwrap() > 0);
}

#[test]
#[ignore = "run by others in a process of its own"]
fn there_is_no_memory_for_one_reply() {
    let error = long_replies(1.0).unwrap_err();
    assert!(error.contains("memory"), "{error}");
}

#[test]
fn with_too_little_memory_fewer_pages_are_tried_and_then_it_is_an_error() {
    // The model takes about 300 KiB, the longest reply with its prompt about as much.
    for (test, memory) in
        [("pages_take_all_memory", "1600000"), ("there_is_no_memory_for_one_reply", "480000")]
    {
        let output = in_child(&format!("engine::{test}"), &[("RPT_EMULATED_MEMORY", memory)]);
        let text =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }
}

//! Speed of encoding on one thread, against the `tokenizers` library: `cargo bench --bench tokenize`.
//!
//! Prints one line per tokenizer and text with the median of five runs, in megabytes per
//! second that the thread works. Texts and tokenizers of `../shared` that are absent are left out.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

#[path = "../tests/common/shared.rs"]
mod shared;

use rpt::tokenize::{Tokenizer, train_byte_level_bpe};
use std::hint::black_box;
use std::time::Instant;

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Seconds that this thread has worked; where the system does not tell, seconds.
fn worked(since: Instant) -> f64 {
    let statistics = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = statistics.split(' ').next().and_then(|first| first.parse::<f64>().ok());
    nanoseconds.map_or_else(|| since.elapsed().as_secs_f64(), |nanoseconds| 1e-9 * nanoseconds)
}

/// Megabytes per second, the median of five runs. Each goes on for half a second, since the clock of a
/// thread's work may tick 4 ms at a time.
fn speed(texts: &[String], encode: impl Fn(&str) -> usize) -> f64 {
    let bytes: usize = texts.iter().map(String::len).sum();
    let clock = Instant::now();
    let mut speeds = [(); 5].map(|()| {
        let (start, mut passes) = (worked(clock), 0);
        while worked(clock) - start < 0.5 {
            black_box(texts.iter().map(|text| encode(text)).sum::<usize>());
            passes += 1;
        }
        1e-6 * (passes * bytes) as f64 / (worked(clock) - start)
    });
    speeds.sort_by(f64::total_cmp);
    speeds[2]
}

/// Sentences of made-up words, as frequent as words are (Zipf), with digits and lines.
fn synthetic() -> Vec<String> {
    let mut state = 1_u64;
    let mut draw = move |size: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % size
    };
    let mut word = || {
        (0..=draw(4))
            .map(|_| ["ka", "ri", "ton", "es", "mul", "o", "shi", "ve"][draw(8) as usize])
            .collect::<String>()
    };
    let words: Vec<String> = (0..20_000).map(|_| word()).collect();
    let mut next = || {
        let rank = 20_000.0_f64.powf(draw(1 << 20) as f64 / f64::from(1 << 20)) as usize;
        match draw(12) {
            0 => format!("{}, ", words[rank]),
            1 => format!("{}.\n", words[rank]),
            2 => format!("{} = {}; ", words[rank], draw(10_000)),
            _ => format!("{} ", words[rank]),
        }
    };
    (0..200).map(|_| (0..2000).map(|_| next()).collect()).collect()
}

/// The same vocabulary with the pattern and the normal form of others.
fn with_pattern(json: &[u8], regex: &str, normalizer: serde_json::Value) -> serde_json::Value {
    let mut json: serde_json::Value = serde_json::from_slice(json).unwrap();
    json["normalizer"] = normalizer;
    json["pre_tokenizer"] = serde_json::json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
    ]});
    json
}

/// Our encoder and the library's, for one tokenizer.json.
fn compare(name: &str, json: &serde_json::Value, corpora: &[(&str, Vec<String>)]) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    let start = Instant::now();
    let mine = Tokenizer::load(&path).unwrap();
    let loaded = start.elapsed().as_secs_f64();
    let theirs = tokenizers::Tokenizer::from_file(&path).unwrap();
    println!("{name}: {:?}, loaded in {loaded:.3} s", mine.fast_path());
    for (corpus, texts) in corpora.iter().filter(|(_, texts)| !texts.is_empty()) {
        let megabytes = 1e-6 * texts.iter().map(String::len).sum::<usize>() as f64;
        let fast = speed(texts, |text| mine.encode_document(text).unwrap().len());
        let slow = speed(texts, |text| theirs.encode_fast(text, false).unwrap().get_ids().len());
        println!(
            "  {corpus:<12} {megabytes:>6.1} MB  {fast:>7.1} MB/s  tokenizers {slow:>5.1} MB/s  x{:.0}",
            fast / slow
        );
    }
}

fn main() {
    let corpora = [
        ("OmniMATH", shared::texts("omnimath-train.parquet")),
        ("GSM8K", shared::texts("gsm8k-train.parquet")),
        ("Shakespeare", shared::texts("tinyshakespeare.parquet")),
        ("synthetic", synthetic()),
    ];
    if let Some(gpt2) = shared::path("tokenizers/gpt2/tokenizer.json") {
        let gpt2 = std::fs::read(gpt2).unwrap();
        compare("GPT-2", &serde_json::from_slice(&gpt2).unwrap(), &corpora);
        let nfc = serde_json::json!({"type": "NFC"});
        compare(
            "GPT-2 merges, Llama 3 pattern",
            &with_pattern(&gpt2, LLAMA_3, serde_json::Value::Null),
            &corpora,
        );
        compare(
            "GPT-2 merges, Qwen 2 pattern",
            &with_pattern(&gpt2, &LLAMA_3.replace("{1,3}", ""), nfc),
            &corpora,
        );
    }
    let trained = train_byte_level_bpe(corpora[3].1.iter().cloned(), 4096).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let special =
        rpt::tokenize::SpecialTokens::resolve(&trained, &rpt::config::TokenizerConfig::default()).unwrap();
    trained.save(directory.path(), &special).unwrap();
    let json = std::fs::read(directory.path().join("tokenizer.json")).unwrap();
    compare("trained on synthetic, 4096 ids", &serde_json::from_slice(&json).unwrap(), &corpora);
}

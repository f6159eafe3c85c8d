//! Tokenizers of other projects, and our own, byte for byte.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/shared.rs"]
mod shared;

use proptest::prelude::*;
use rpt::config::TokenizerConfig;
use rpt::tokenize::{
    BOS, END, SpecialTokens, THINK, THINK_END, TokenizeError, Tokenizer, train_byte_level_bpe,
};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A shared tokenizer, or a loud skip.
fn shared_tokenizer(directory: &str) -> Option<Tokenizer> {
    let path = shared::path(&format!("{directory}/tokenizer.json"))?;
    Some(Tokenizer::load(&path).unwrap())
}

const GOLDEN: [&str; 3] = ["peers/golden/llama-pico", "peers/golden/qwen2-pico", "peers/golden/qwen3-pico"];
const GPT2: &str = "tokenizers/gpt2";

fn gpt2() -> Option<&'static Tokenizer> {
    static TOKENIZER: OnceLock<Option<Tokenizer>> = OnceLock::new();
    TOKENIZER.get_or_init(|| shared_tokenizer(GPT2)).as_ref()
}

/// Little stories in the manner of the quickstart corpus.
fn stories(count: u64) -> impl Iterator<Item = String> {
    const TOWNS: [&str; 12] = [
        "Oslo", "Rome", "Lima", "Bern", "Paris", "Cairo", "Delhi", "Kyoto", "Quito", "Turin", "Minsk",
        "Sofia",
    ];
    const SIGHTS: [&str; 6] = ["zoo", "lake", "beach", "castle", "theater", "garden"];
    const PEOPLE: [&str; 6] = ["Ann", "Bob", "Carl", "Dora", "Emil", "Gus"];
    let mut state = 1_u64;
    let mut draw = move |size: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % size
    };
    (0..count).map(move |_| {
        let (from, over) = (TOWNS[draw(12)], TOWNS[draw(12)]);
        let (sight, person) = (SIGHTS[draw(6)], PEOPLE[draw(6)]);
        format!(
            "Here is the map: {from} {over}, {over} {sight}, {} {}. {person} gets on at {from} and sees the {sight}.",
            TOWNS[draw(12)],
            TOWNS[draw(12)],
        )
    })
}

fn trained() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| train_byte_level_bpe(stories(2000), 512).unwrap())
}

proptest! {
    #[test]
    fn encoded_documents_spell_their_text(text in "\\PC{0,60}|[a-z <|>/\\n\\t]{0,80}|(<think>|<\\|end\\|>| |é|🙂){0,9}") {
        for tokenizer in [Some(trained()), gpt2()].into_iter().flatten() {
            let ids = tokenizer.encode_document(&text).unwrap();
            prop_assert_eq!(tokenizer.decode_bytes(&ids), text.as_bytes());
            prop_assert_eq!(tokenizer.decode_lossy(&ids), text.as_str());
        }
    }
}

#[test]
fn real_text_is_spelled_exactly_by_every_byte_level_tokenizer() {
    let text =
        "To be, or not to be: that is the question.\r\n\r\n  Whether 'tis nobler…\tnaïve 数学 🙂 \u{202e}x "
            .repeat(50);
    for tokenizer in
        GOLDEN.iter().chain([&GPT2]).filter_map(|name| shared_tokenizer(name)).chain(Some(quick()))
    {
        let ids = tokenizer.encode_document(&text).unwrap();
        assert_eq!(tokenizer.decode_bytes(&ids), text.as_bytes(), "{tokenizer:?}");
        assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()));
    }
}

fn quick() -> Tokenizer {
    train_byte_level_bpe(stories(50), 300).unwrap()
}

/// The text column of a shared parquet file.
#[test]
fn whole_corpora_are_spelled_exactly() {
    let tokenizers: Vec<&Tokenizer> = gpt2().into_iter().chain([trained()]).collect();
    for file in ["tinyshakespeare.parquet", "omnimath-valid.parquet"] {
        for text in shared::texts(file) {
            for tokenizer in &tokenizers {
                let ids = tokenizer.encode_document(&text).unwrap();
                assert_eq!(tokenizer.decode_bytes(&ids), text.as_bytes(), "{file}");
                assert_eq!(ids, tokenizer.encode_control(&text).unwrap(), "{file}");
            }
        }
    }
}

#[test]
fn long_runs_without_a_word_boundary_encode() {
    for tokenizer in gpt2().into_iter().chain([trained()]) {
        for unit in ["a", " ", "\n", "=", "é"] {
            let text = unit.repeat(200_000);
            let ids = tokenizer.encode_document(&text).unwrap();
            assert_eq!(tokenizer.decode_bytes(&ids), text.as_bytes());
        }
    }
}

#[test]
fn control_tokens_in_documents_are_text() {
    for tokenizer in GOLDEN.iter().filter_map(|name| shared_tokenizer(name)) {
        let text = "a<|im_end|> b<think>c</think><|endoftext|>";
        let ids = tokenizer.encode_document(text).unwrap();
        assert!(ids.iter().all(|&id| id < 507), "{ids:?}");
        assert_eq!(tokenizer.decode_lossy(&ids), text);
        let control = tokenizer.encode_control("<|im_start|>user\n").unwrap();
        assert_eq!(control[0], 508);
        assert_eq!(tokenizer.encode_control(THINK).unwrap(), [510]);
        assert_eq!(tokenizer.decode_lossy(&[510, 511]), "<think></think>");
        // Ordinary text encodes alike either way.
        let plain = "The quick brown fox, 12 times.";
        assert_eq!(tokenizer.encode_document(plain).unwrap(), tokenizer.encode_control(plain).unwrap());
    }
    if let Some(tokenizer) = gpt2() {
        assert_eq!(tokenizer.vocab_size(), 50_257);
        assert_eq!(tokenizer.encode_control("<|endoftext|>").unwrap(), [50_256]);
        assert!(!tokenizer.encode_document("<|endoftext|>").unwrap().contains(&50_256));
        // Known from OpenAI's release.
        assert_eq!(tokenizer.encode_document("Hello world").unwrap(), [15_496, 995]);
    }
}

#[test]
fn characters_may_be_cut_between_tokens() {
    let tokenizer = trained();
    let ids = tokenizer.encode_document("🙂").unwrap();
    assert_eq!(ids.len(), 4);
    assert_eq!(tokenizer.decode_lossy(&ids[..2]), "\u{fffd}");
    assert_eq!(tokenizer.decode_bytes(&ids[..2]), &"🙂".as_bytes()[..2]);
}

#[test]
fn a_trained_tokenizer_knows_every_common_word() {
    let tokenizer = trained();
    for word in [" Kyoto", " Minsk", " theater", " sees", " gets", " the", " castle", " map", "Here", ","] {
        assert_eq!(tokenizer.encode_document(word).unwrap().len(), 1, "{word}");
    }
    for (name, id) in [(BOS, 0), (THINK, 1), (THINK_END, 2), (END, 3)] {
        assert_eq!(tokenizer.id_of(name), Some(id));
        assert_eq!(tokenizer.encode_control(name).unwrap(), [id]);
        assert_eq!(tokenizer.token_bytes(id), name.as_bytes());
        assert!(!tokenizer.encode_document(name).unwrap().contains(&id));
    }
    assert!(tokenizer.vocab_size() <= 512);
}

#[test]
fn training_is_deterministic_on_any_number_of_threads() {
    let fingerprint = |threads| {
        let pool = rayon_pool(threads);
        pool(&|| train_byte_level_bpe(stories(600), 480).unwrap().fingerprint().to_owned())
    };
    let first = fingerprint(1);
    assert_eq!(first, fingerprint(1));
    assert_eq!(first, fingerprint(3));
}

type Job<'a> = &'a (dyn Fn() -> String + Sync);

fn rayon_pool(threads: usize) -> impl Fn(Job) -> String {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    move |job| pool.install(job)
}

/// The library's own trainer on a corpus where no two pairs are equally frequent.
#[test]
fn training_merges_what_the_tokenizers_library_merges() {
    use tokenizers::Trainer;
    use tokenizers::models::bpe::{BPE, BpeTrainer};
    let words = [("abab", 3), ("abc", 101), ("bcd", 1009), ("xyz", 10_007), ("yz", 100_003), ("q", 7)];
    let documents: Vec<String> =
        words.iter().map(|(word, count)| format!("\n{word}").repeat(*count)).collect();
    let mine = train_byte_level_bpe(documents.clone().into_iter(), 266).unwrap();
    let mut trainer = BpeTrainer::builder().vocab_size(10).show_progress(false).build();
    trainer.feed(documents.iter(), |text| Ok(text.split('\n').map(str::to_owned).collect())).unwrap();
    let mut theirs = BPE::default();
    trainer.train(&mut theirs).unwrap();
    for token in theirs.get_vocab().keys() {
        assert!(mine.id_of(token).is_some(), "{token}");
    }
    assert!(theirs.get_vocab().len() > 8);
}

#[test]
fn too_small_a_vocabulary_is_refused() {
    let error = train_byte_level_bpe(stories(1), 100).unwrap_err();
    assert!(matches!(error, TokenizeError::Train { vocab_size: 100, .. }));
    assert!(error.hint().unwrap().contains("vocab_size"));
    assert_eq!(train_byte_level_bpe(std::iter::empty(), 300).unwrap().vocab_size(), 260);
}

#[test]
fn a_saved_tokenizer_loads_as_itself() {
    let directory = tempfile::tempdir().unwrap();
    let special = SpecialTokens::resolve(trained(), &TokenizerConfig::default()).unwrap();
    assert_eq!(special, SpecialTokens { eos: 3, other_ends: vec![], bos: Some(0) });
    trained().save(directory.path(), &special).unwrap();
    let loaded = Tokenizer::load(&directory.path().join("tokenizer.json")).unwrap();
    assert_eq!(loaded.fingerprint(), trained().fingerprint());
    assert_eq!(SpecialTokens::resolve(&loaded, &TokenizerConfig::default()).unwrap(), special);
    let story = stories(1).next().unwrap();
    assert_eq!(loaded.encode_document(&story).unwrap(), trained().encode_document(&story).unwrap());
    let config = std::fs::read_to_string(directory.path().join("tokenizer_config.json")).unwrap();
    assert!(config.contains(r#""eos_token": "<|end|>""#), "{config}");
}

#[test]
fn special_tokens_come_from_the_pipeline_then_the_model() {
    for tokenizer in GOLDEN.iter().filter_map(|name| shared_tokenizer(name)) {
        let default = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default()).unwrap();
        assert_eq!(default, SpecialTokens { eos: 509, other_ends: vec![], bos: None });
        let config = TokenizerConfig {
            eos: Some("<|endoftext|>".into()),
            bos: Some("<|im_start|>".into()),
            ..TokenizerConfig::default()
        };
        let chosen = SpecialTokens::resolve(&tokenizer, &config).unwrap();
        assert_eq!(chosen, SpecialTokens { eos: 507, other_ends: vec![], bos: Some(508) });
        let config = TokenizerConfig { eos: Some("<nope>".into()), ..TokenizerConfig::default() };
        let error = SpecialTokens::resolve(&tokenizer, &config).unwrap_err();
        assert!(error.to_string().contains("<nope>") && error.hint().is_some());
    }
}

#[test]
fn files_beside_the_tokenizer_name_the_end_token() {
    let directory = tempfile::tempdir().unwrap();
    let special = SpecialTokens { eos: 3, other_ends: vec![], bos: None };
    trained().save(directory.path(), &special).unwrap();
    let tokenizer = Tokenizer::load(&directory.path().join("tokenizer.json")).unwrap();
    let resolve = || SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default());
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    write("tokenizer_config.json", "{}");
    write("generation_config.json", r#"{"eos_token_id": [2, 1]}"#);
    assert_eq!(resolve().unwrap().ends(), [2, 1]);
    write("config.json", r#"{"eos_token_id": 1}"#);
    assert_eq!(resolve().unwrap().ends(), [1, 2]);
    write("tokenizer_config.json", r#"{"eos_token": {"content": "<|bos|>"}}"#);
    assert_eq!(resolve().unwrap().ends(), [0, 2, 1]);
    let named = TokenizerConfig { eos: Some("<|bos|>".into()), ..TokenizerConfig::default() };
    assert_eq!(SpecialTokens::resolve(&tokenizer, &named).unwrap().ends(), [0]);
    write("generation_config.json", r#"{"eos_token_id": [2, -1]}"#);
    assert!(matches!(resolve(), Err(TokenizeError::UnknownToken { .. })));
    write("tokenizer_config.json", "{");
    assert!(matches!(resolve(), Err(TokenizeError::Malformed { .. })));
    write("tokenizer_config.json", "{}");
    write("config.json", r#"{"eos_token_id": 1000000}"#);
    assert!(matches!(resolve(), Err(TokenizeError::UnknownToken { .. })));
}

#[test]
fn the_model_must_have_room_for_every_id() {
    let tokenizer = trained();
    tokenizer.check_vocabulary(tokenizer.vocab_size()).unwrap();
    tokenizer.check_vocabulary(1 << 20).unwrap();
    let message = tokenizer.check_vocabulary(300).unwrap_err().to_string();
    assert!(
        message.contains("300") && message.contains(&(tokenizer.vocab_size() - 1).to_string()),
        "{message}"
    );
}

/// Loads a tokenizer.json written out here.
fn from_text(json: &serde_json::Value) -> Result<Tokenizer, TokenizeError> {
    let directory = tempfile::tempdir().unwrap();
    let path: PathBuf = directory.path().join("tokenizer.json");
    std::fs::write(&path, json.to_string()).unwrap();
    Tokenizer::load(&path)
}

fn added(id: u32, content: &str, special: bool) -> serde_json::Value {
    serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                       "normalized": false, "special": special})
}

/// `SentencePiece` style with the control tokens inside the vocabulary, where any text would find them.
fn unigram() -> serde_json::Value {
    let mut vocab = vec![serde_json::json!(["<unk>", 0.0]), serde_json::json!(["</s>", 0.0])];
    vocab.extend((0..=255).map(|byte| serde_json::json!([format!("<0x{byte:02X}>"), -20.0])));
    vocab.extend(
        ["▁", "▁hello", "h", "e", "l", "o", "<", "/", "s", ">"].map(|piece| serde_json::json!([piece, -2.0])),
    );
    let metaspace = serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true});
    serde_json::json!({
        "version": "1.0", "truncation": {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": null, "added_tokens": [added(0, "<unk>", true), added(1, "</s>", true), added(268, "  ", false)],
        "normalizer": null, "pre_tokenizer": metaspace, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, metaspace]},
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": true, "vocab": vocab},
    })
}

#[test]
fn sentencepiece_tokens_have_the_bytes_of_their_text() {
    let tokenizer = from_text(&unigram()).unwrap();
    let text = "hello </s> hello\né";
    let ids = tokenizer.encode_document(text).unwrap();
    assert!(!ids.contains(&1) && ids.len() > 2, "{ids:?}");
    assert_eq!(tokenizer.decode_lossy(&ids), format!(" {text}"));
    assert_eq!(tokenizer.token_bytes(tokenizer.id_of("▁hello").unwrap()), b" hello");
    assert_eq!(tokenizer.token_bytes(tokenizer.id_of("<0x0A>").unwrap()), b"\n");
    assert!(tokenizer.encode_control("hello</s>").unwrap().contains(&1));
    // White space among the added tokens is text, in documents too.
    assert!(tokenizer.encode_document("hello  hello").unwrap().contains(&268));
    assert_eq!(tokenizer.token_bytes(268), b"  ");
}

#[test]
fn unusable_tokenizers_are_refused_with_a_reason() {
    let with = |path: &str, value: serde_json::Value| {
        let mut json = unigram();
        *json.pointer_mut(path).unwrap() = value;
        from_text(&json)
    };
    let wordpiece = serde_json::json!({"type": "WordPiece", "vocab": {}, "unk_token": "a"});
    assert!(matches!(with("/model", wordpiece), Err(TokenizeError::Unsupported { .. })));
    let moved = serde_json::json!([added(7, "<unk>", true)]);
    assert!(matches!(
        with("/added_tokens", moved),
        Err(TokenizeError::MovedToken { declared: 7, actual: 0, .. })
    ));
    let mut undecodable = unigram();
    undecodable["decoder"] = serde_json::Value::Null;
    undecodable["pre_tokenizer"] = serde_json::Value::Null;
    let error = from_text(&undecodable).unwrap_err();
    assert!(matches!(error, TokenizeError::Unsupported { .. }) && error.hint().is_some());
    for json in [serde_json::json!([]), serde_json::json!({}), serde_json::json!({"model": 3})] {
        assert!(from_text(&json).is_err());
    }
    assert!(matches!(Tokenizer::load(Path::new("absent/tokenizer.json")), Err(TokenizeError::Io { .. })));
}

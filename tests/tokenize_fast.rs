//! The crate's own encoder against the `tokenizers` library, id for id.
//!
//! `RPT_FUZZ_CASES=1000000 cargo test --test tokenize_fast -- --nocapture any_text` compares more texts.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/shared.rs"]
mod shared;

use proptest::prelude::*;
use rpt::config::TokenizerConfig;
use rpt::tokenize::{FastPath, SpecialTokens, Tokenizer, train_byte_level_bpe};
use serde_json::{Value, json};
use std::sync::OnceLock;

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Many scripts and styles; merges learned here join spaces, marks and halves of characters.
const MIXED: [&str; 14] = [
    "The quick brown fox jumps over the lazy dog; it's what foxes do, and they've done it 1234 times.",
    "WE'RE SHOUTING! I'LL NEVER STOP, DON'T YOU KNOW? IT'S 100% TRUE.",
    "Zwölf große Boxkämpfer jagen Viktor quer über den Sylter Deich. Die Straße führt nach Süden.",
    "Voix ambiguë d'un cœur qui préfère les jattes de kiwis à l'été, naïf et déçu.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Привет, мир!",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ελληνικά γράμματα.",
    "いろはにほへと ちりぬるを。数学は楽しい。東京都と京都。",
    "我能吞下玻璃而不伤身体。中文，没有空格！一二三四五。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "دیدن کودکان شاد است. العربية ٱلسَّلَامُ עברית שָׁלוֹם",
    "हिन्दी नमस्ते दुनिया। ภาษาไทยไม่มีช่องว่าง ကမြန်မာ",
    "if x == 1:\n    return [y for y in z]\n\n\tfn main() {\n\t\tprintln!(\"{}\", 0x1F);\n\t}\r\n}\r\n\r\n",
    "🙂🙃 👩\u{200d}👩\u{200d}👧 🇩🇪 e\u{301}a\u{300}o\u{302}u\u{308} x\u{a0}y\u{3000}z\u{2003}\u{2003}w ½²³ ٣٤٥ Ⅷ",
    "$$\\int_0^1 x^2 \\, dx = \\frac{1}{3}$$ and 3.14159, 2718281828 --- ===== ///// \n\n\n   \n  end",
];

/// One tokenizer in two implementations.
struct Pair {
    name: &'static str,
    mine: Tokenizer,
    theirs: tokenizers::Tokenizer,
}

impl Pair {
    fn new(name: &'static str, mut json: Value) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        let mine = Tokenizer::load(&path).unwrap();
        // What documents are to be: every added token that is no word is text.
        for added in json["added_tokens"].as_array_mut().unwrap() {
            let content = added["content"].as_str().unwrap();
            if !content.chars().all(|c| c.is_alphanumeric() || c.is_whitespace()) {
                added["special"] = true.into();
            }
        }
        json["post_processor"] = Value::Null;
        let mut theirs = tokenizers::Tokenizer::from_bytes(json.to_string()).unwrap();
        theirs.set_encode_special_tokens(true);
        Self { name, mine, theirs }
    }

    fn library(&self, text: &str) -> Vec<u32> {
        self.theirs.encode_fast(text, false).unwrap().get_ids().to_vec()
    }

    fn check(&self, text: &str) {
        let (mine, theirs) = (self.mine.encode_document(text).unwrap(), self.library(text));
        if mine != theirs {
            let place = mine.iter().zip(&theirs).take_while(|(mine, theirs)| mine == theirs).count();
            let excerpt: String = text.chars().take(400).collect();
            panic!("{}: id {place} of {excerpt:?} differs", self.name);
        }
    }
}

fn with_pattern(json: &Value, regex: &str) -> Value {
    let mut json = json.clone();
    json["pre_tokenizer"] = json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
    ]});
    json
}

/// A tokenizer of mixed languages, as a file.
fn trained() -> &'static Value {
    static JSON: OnceLock<Value> = OnceLock::new();
    JSON.get_or_init(|| {
        let documents = (1..=MIXED.len()).flat_map(|length| MIXED[..length].iter().map(ToString::to_string));
        let tokenizer = train_byte_level_bpe(documents, 2000).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let special = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default()).unwrap();
        tokenizer.save(directory.path(), &special).unwrap();
        serde_json::from_slice(&std::fs::read(directory.path().join("tokenizer.json")).unwrap()).unwrap()
    })
}

/// Tokens remain of which some merges are gone, so that they are not what merging makes.
fn without_some_merges(mut json: Value) -> Value {
    let mut number = 0;
    json["model"]["merges"].as_array_mut().unwrap().retain(|_| {
        number += 1;
        number % 5 != 0
    });
    json
}

fn gpt2_json() -> Option<Value> {
    let bytes = std::fs::read(shared::path("tokenizers/gpt2/tokenizer.json")?).unwrap();
    Some(serde_json::from_slice(&bytes).unwrap())
}

/// GPT-2, and every known pattern over other vocabularies.
fn pairs() -> &'static [Pair] {
    static PAIRS: OnceLock<Vec<Pair>> = OnceLock::new();
    PAIRS.get_or_init(|| {
        let mut qwen = with_pattern(trained(), QWEN_2);
        qwen["normalizer"] = json!({"type": "NFC"});
        let mut llama = without_some_merges(with_pattern(trained(), LLAMA_3));
        llama["model"]["ignore_merges"] = true.into();
        let mut pairs = vec![
            Pair::new("trained", without_some_merges(trained().clone())),
            Pair::new("like Llama 3", llama),
            Pair::new("like Qwen 2", qwen),
        ];
        if let Some(gpt2) = gpt2_json() {
            pairs.push(Pair::new("GPT-2 with the pattern of Llama 3", with_pattern(&gpt2, LLAMA_3)));
            pairs.push(Pair::new("GPT-2", gpt2));
        }
        assert!(pairs.iter().all(|pair| pair.mine.fast_path().is_active()));
        pairs
    })
}

fn check(text: &str) {
    for pair in pairs() {
        pair.check(text);
    }
}

fn cases() -> u32 {
    std::env::var("RPT_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(3000)
}

/// Texts of a regular expression, which is compiled once.
fn like(pattern: &str) -> impl Strategy<Value = String> + use<> {
    proptest::string::string_regex(pattern).unwrap()
}

fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<char>().prop_map(String::from),
        (0..=0x10_FFFF_u32).prop_map(|code| char::from_u32(code).unwrap_or('\u{fffd}').to_string()),
        (0..0x3400_u32).prop_map(|code| char::from_u32(code).unwrap().to_string()),
        like(
            "[ \\t\\n\\r\\x0b\\x0c\u{85}\u{a0}\u{1680}\u{2000}-\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}]{1,4}"
        ),
        like("[ \n\r]{1,5}"),
        like(" {1,9}"),
        like("[a-zA-Z]{1,20}"),
        like(" [a-z]{1,9}"),
        like("[0-9]{1,12}"),
        like("[٠-٩½²Ⅷ一𝟘0-9]{1,5}"),
        like("[!-/:-@\\[-`{-~]{1,6}"),
        like("['’][sStTdDmMſ]|'(re|RE|rE|ve|VE|Ve|ll|LL|lL|l|r|v)"),
        like("[\u{300}-\u{34f}\u{5b0}-\u{5c2}\u{64b}-\u{65f}\u{93c}\u{94d}\u{3099}\u{1d165}]{1,4}"),
        like("[aeiouAOUсдк\u{1100}\u{1161}\u{11a8}가\u{ac00}\u{0915}]"),
        like("[\u{0}-\u{1f}\u{7f}-\u{9f}\u{200b}-\u{200f}\u{feff}]"),
        like("[一-龥]{1,8}|[а-яА-Я]{1,12}|[α-ω]{1,8}|[ぁ-ん]{1,6}|[가-힣]{1,5}|[ا-ي]{1,7}"),
        Just("<|endoftext|>".to_owned()),
        like("<\\|(bos|end|im_start|im_end)\\|>|</?think>|</?s>|\\[INST\\]"),
        prop::collection::vec(any::<u8>(), 1..12)
            .prop_map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        (0..MIXED.len(), 0..60_usize, 1..30_usize).prop_map(|(text, from, count)| MIXED[text]
            .chars()
            .skip(from)
            .take(count)
            .collect()),
        (like("[ \n\ta-cé0'!数]"), 1..90_usize).prop_map(|(unit, count)| unit.repeat(count)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases()) })]
    #[test]
    fn any_text_has_the_ids_of_the_library(fragments in prop::collection::vec(fragment(), 0..12)) {
        check(&fragments.concat());
    }
}

/// The text column of a shared parquet file.
/// The larger corpora by one tokenizer (GPT-2), since the library takes its time.
#[test]
fn whole_corpora_have_the_ids_of_the_library() {
    let last = pairs().len() - 1;
    for (file, from) in [
        ("omnimath-train.parquet", last),
        ("gsm8k-train.parquet", last),
        ("omnimath-valid.parquet", 0),
        ("tinyshakespeare.parquet", 0),
    ] {
        let texts = shared::texts(file);
        let borrowed: Vec<&str> = texts.iter().map(String::as_str).collect();
        for pair in &pairs()[from..] {
            let encoded = pair.mine.encode_documents(&borrowed);
            assert_eq!(encoded.len(), texts.len());
            for (text, ids) in texts.iter().zip(encoded) {
                assert!(ids.unwrap() == pair.library(text), "{}: {file}: {text:?}", pair.name);
            }
        }
    }
}

#[test]
fn every_character_between_any_neighbours_has_the_ids_of_the_library() {
    // What lies between is unassigned, or private and alike.
    let assigned =
        |c: &char| matches!(u32::from(*c), 0..0x3_3000 | 0xE_0000..0xE_0200) || u32::from(*c) % 997 < 2;
    let characters: Vec<char> = ('\0'..=char::MAX).filter(assigned).collect();
    for text in characters.chunks(4096) {
        let text: Vec<String> = text.iter().map(|c| format!("a{c} {c}{c}1{c}\n{c}")).collect();
        for pair in &pairs()[..3] {
            pair.check(&text.concat());
        }
    }
}

#[test]
fn mixed_scripts_and_invalid_bytes_have_the_ids_of_the_library() {
    check(&MIXED.join("\n").repeat(3));
    let mut state = 7_u64;
    let noise: Vec<u8> = (0..100_000)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        })
        .collect();
    check(&String::from_utf8_lossy(&noise));
}

#[test]
fn a_megabyte_without_a_boundary_has_the_ids_of_the_library() {
    let alphabet = "etaoinshrdlucmfwypvbgkjqxzETAOINéжあ数";
    let mut state = 3_u64;
    let letters: String = (0..1 << 20)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            alphabet.chars().nth((state >> 40) as usize % alphabet.chars().count()).unwrap()
        })
        .collect();
    check(&letters);
    for unit in ["a", "ab", "=", " ", "\n", "\u{3000}", "0", "!?", "é"] {
        check(&format!("x{}y", unit.repeat((1 << 20) / unit.len() / 4)));
    }
}

/// The library's look-ahead gives up on so much white space, and takes the rest for one piece.
#[test]
fn white_space_that_is_too_much_for_the_library_has_its_ids_all_the_same() {
    for (pair, unit) in pairs().iter().zip([" ", "\t", "\u{a0}", "\u{2003}"]) {
        for count in [400_000, 999_990, 1_000_010] {
            pair.check(&format!("Well, {} a b c", unit.repeat(count)));
        }
    }
}

#[test]
fn textual_added_tokens_are_found_by_the_library() {
    let mut json = with_pattern(trained(), QWEN_2);
    json["normalizer"] = json!({"type": "NFC"});
    let size = json["model"]["vocab"].as_object().unwrap().len();
    let flags = [("    ", false, "lstrip"), ("covid19", false, "single_word"), ("été", true, "rstrip")];
    for (number, (content, normalized, flag)) in flags.into_iter().enumerate() {
        let mut added = json!({"id": size + number, "content": content, "single_word": false, "lstrip": false,
                               "rstrip": false, "normalized": normalized, "special": false});
        added[flag] = true.into();
        json["added_tokens"].as_array_mut().unwrap().push(added);
    }
    let pair = Pair::new("with added words", json);
    assert_eq!(pair.mine.fast_path(), FastPath::Active);
    for text in [
        "no such token",
        "a     b",
        "covid19 and covid191",
        "un été  ici",
        "un e\u{301}te\u{301}  ici",
        "<think>    </think>",
        "e\u{301}t",
    ] {
        pair.check(text);
    }
}

#[test]
fn what_is_not_known_is_left_to_the_library_with_a_reason() {
    let reason = |path: &str, value: Value| {
        let mut json = trained().clone();
        *json.pointer_mut(path).unwrap() = value;
        let pair = Pair::new("changed", json);
        pair.check("Hello, World! 1234 e\u{301} \n\n x");
        match pair.mine.fast_path() {
            FastPath::Unsupported { reason } => reason,
            other => panic!("{path}: {other:?}"),
        }
    };
    let deepseek = json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]});
    assert!(reason("/pre_tokenizer", deepseek).contains("pre-tokenizer"));
    assert!(reason("/pre_tokenizer/add_prefix_space", true.into()).contains("pre-tokenizer"));
    assert!(reason("/normalizer", json!({"type": "NFKC"})).contains("NFC"));
    let mut vocab = trained()["model"]["vocab"].clone();
    vocab.as_object_mut().unwrap().insert("Ā Ā".into(), 77.into());
    assert!(reason("/model/vocab", vocab).contains("share"));
}

/// Options that matter for unknown characters alone, and the old spelling of merges.
#[test]
fn options_without_effect_are_no_obstacle() {
    let mut json = trained().clone();
    for merge in json["model"]["merges"].as_array_mut().unwrap() {
        *merge = format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap()).into();
    }
    json["model"]["merges"].as_array_mut().unwrap().insert(0, "#version: 0.2".into());
    for (option, value) in
        [("unk_token", json!("<|end|>")), ("fuse_unk", true.into()), ("byte_fallback", true.into())]
    {
        json["model"][option] = value;
    }
    let pair = Pair::new("with options", json);
    assert!(pair.mine.fast_path().is_active());
    for text in MIXED {
        pair.check(text);
    }
}

#[test]
fn the_proof_passes_on_any_sample() {
    for pair in pairs() {
        assert_eq!(pair.mine.prove_fast_path(MIXED), FastPath::Active);
    }
}

//! What a tokenizer.json may ask of the `tokenizers` library.
//!
//! The library trusts the files that it reads: some make it panic, others make it take memory or time out of
//! all proportion to their size. What does so is refused here by name before the library sees it;
//! published tokenizers stay far below every bound. A panic that no check foresees is an error like
//! any other ([`guarded`]).

use crate::json::shortened;
use serde_json::Value;

/// Normalizers and pre-tokenizers together.
const MAX_COMPONENTS: usize = 64;
/// Sequences in sequences.
const MAX_DEPTH: usize = 4;
/// Bytes of all patterns together.
const MAX_PATTERNS: usize = 1 << 12;
/// Product of all counted repetitions: `(a{9}){9}` is compiled as 81 copies.
const MAX_REPETITIONS: usize = 1000;
/// How many times longer the normalizers may make a text.
const MAX_GROWTH: usize = 256;
/// Bytes that are put before a text.
const MAX_PREPENDED: usize = 256;
/// Bytes of all added tokens together, once they are normalized.
const MAX_ADDED: usize = 1 << 22;
/// Ids without a token.
const MAX_GAPS: u64 = 1 << 17;
/// Bytes of a piece of a Unigram vocabulary: its trie is dropped by recursion as deep as that.
const MAX_PIECE: usize = 1024;
/// Bytes of all pieces, each of which may take some hundred bytes in the trie.
const MAX_PIECES: usize = 1 << 23;

/// The components that the library knows, by the names in its files.
const COMPONENTS: [&str; 27] = [
    "Bert",
    "BertNormalizer",
    "BertPreTokenizer",
    "ByteLevel",
    "CharDelimiterSplit",
    "Delimiter",
    "Digits",
    "FixedLength",
    "Lowercase",
    "Metaspace",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Precompiled",
    "Prepend",
    "Punctuation",
    "Replace",
    "Sequence",
    "Split",
    "Strip",
    "StripAccents",
    "StripNormalizer",
    "UnicodeScripts",
    "Whitespace",
    "WhitespaceSplit",
];

/// Runs the library; what panics is an error with the panic's message.
pub(super) fn guarded<T>(
    work: impl FnOnce() -> Result<T, Box<dyn std::error::Error + Send + Sync>>,
) -> Result<T, String> {
    // An encoder holds caches only, whose locks the library itself opens without regard to poison.
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| shortened(error.to_string())),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
            Err(shortened(format!("the tokenizers library failed: {text}")))
        }
    }
}

/// Refuses what would make the library panic, or take far more than the file's size.
///
/// # Errors
/// Names what is beyond its bound.
pub(super) fn check(json: &Value) -> Result<(), String> {
    let mut pipeline = Pipeline { components: 0, patterns: 0, repetitions: 1, growth: 1 };
    pipeline.component(&json["normalizer"], 0)?;
    pipeline.component(&json["pre_tokenizer"], 0)?;
    let added = || json["added_tokens"].as_array().into_iter().flatten();
    let bytes: usize = added().filter_map(|added| added["content"].as_str()).map(str::len).sum();
    if bytes.saturating_mul(pipeline.growth) > MAX_ADDED {
        return Err(format!("its added tokens have more than {MAX_ADDED} bytes once they are normalized"));
    }
    match &json["model"]["vocab"] {
        Value::Object(ids) => check_ids(ids, added().count())?,
        Value::Array(pieces) => check_pieces(pieces)?,
        _ => {}
    }
    check_merges(&json["model"])
}

/// What the normalizers and pre-tokenizers amount to.
struct Pipeline {
    components: usize,
    patterns: usize,
    repetitions: usize,
    growth: usize,
}

impl Pipeline {
    fn component(&mut self, part: &Value, depth: usize) -> Result<(), String> {
        if part.is_null() {
            return Ok(());
        }
        let Some(kind) = part["type"].as_str().filter(|kind| COMPONENTS.contains(kind)) else {
            return Err(shortened(format!("{} is no known normalizer or pre-tokenizer", part["type"])));
        };
        self.components += 1;
        if self.components > MAX_COMPONENTS || depth > MAX_DEPTH {
            return Err(format!(
                "it has more than {MAX_COMPONENTS} normalizers and pre-tokenizers, or nests them more than \
                 {MAX_DEPTH} deep"
            ));
        }
        for inner in
            ["normalizers", "pretokenizers"].iter().filter_map(|list| part[*list].as_array()).flatten()
        {
            self.component(inner, depth + 1)?;
        }
        self.pattern(&part["pattern"])?;
        self.grow(growth(kind, part)?)?;
        match part["length"].as_u64() {
            Some(0) if kind == "FixedLength" => Err("it splits text into pieces of no characters".into()),
            _ => Ok(()),
        }
    }

    fn pattern(&mut self, pattern: &Value) -> Result<(), String> {
        let texts = [pattern, &pattern["String"], &pattern["Regex"]];
        self.patterns += texts.iter().filter_map(|text| text.as_str()).map(str::len).sum::<usize>();
        let repetitions = pattern["Regex"].as_str().map_or(1, repetitions);
        self.repetitions = self.repetitions.saturating_mul(repetitions);
        if self.patterns > MAX_PATTERNS || self.repetitions > MAX_REPETITIONS {
            return Err(format!(
                "its patterns have more than {MAX_PATTERNS} bytes, or repeat something more than \
                 {MAX_REPETITIONS} times"
            ));
        }
        Ok(())
    }

    fn grow(&mut self, factor: usize) -> Result<(), String> {
        self.growth = self.growth.saturating_mul(factor.max(1));
        if self.growth > MAX_GROWTH {
            return Err(format!("its normalizers may make a text more than {MAX_GROWTH} times as long"));
        }
        Ok(())
    }
}

/// How many times longer a component may make a text.
fn growth(kind: &str, part: &Value) -> Result<usize, String> {
    let length = |text: &Value| text.as_str().map_or(0, str::len);
    match kind {
        "ByteLevel" => Ok(2),
        "Prepend" if length(&part["prepend"]) > MAX_PREPENDED => {
            Err(format!("it puts more than {MAX_PREPENDED} bytes before a text"))
        }
        // A regular expression may match between any two characters.
        "Replace" => Ok(match length(&part["pattern"]["String"]) {
            0 => length(&part["content"]).saturating_add(1),
            pattern => length(&part["content"]).div_ceil(pattern),
        }),
        "Precompiled" => longest_replacement(part["precompiled_charsmap"].as_str().unwrap_or_default()),
        _ => Ok(1),
    }
}

/// Product of the numbers in counted repetitions (`{3}`, `{1,3}`, `{2,}`).
fn repetitions(regex: &str) -> usize {
    let opened = regex.split('{').skip(1).filter_map(|rest| rest.split_once('}'));
    let largest = opened.filter_map(|(counts, _)| {
        let counts: Option<Vec<usize>> = counts
            .split(',')
            .filter(|count| !count.is_empty())
            .map(|count| count.trim().parse().ok())
            .collect();
        counts?.into_iter().max()
    });
    largest.fold(1, |product, count| product.saturating_mul(count.max(1)))
}

/// Bytes of the longest replacement in a `SentencePiece` character map: base64 of the length of a
/// trie in bytes (u32, little-endian), the trie, and replacements that end with a zero byte.
fn longest_replacement(base64: &str) -> Result<usize, String> {
    let damaged = || "its precompiled_charsmap is damaged".to_owned();
    let bytes = decode_base64(base64).ok_or_else(damaged)?;
    let (length, rest) = bytes.split_first_chunk::<4>().ok_or_else(damaged)?;
    // The library would make room for as many entries as the file says.
    let length = u32::from_le_bytes(*length) as usize / 4 * 4;
    let replacements = rest.get(length..).filter(|_| length > 0).ok_or_else(damaged)?;
    std::str::from_utf8(replacements).map_err(|_| damaged())?;
    Ok(replacements.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0))
}

/// Bytes that a text of the standard alphabet, padded to fours, spells.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits = text.trim_end_matches('=');
    if !text.len().is_multiple_of(4) || text.len() - digits.len() > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in digits.as_bytes().chunks(4) {
        let bits = group.iter().try_fold(0_u32, |bits, byte| Some(bits << 6 | u32::from(digit(*byte)?)))?;
        let bits = bits << (6 * (4 - group.len()));
        bytes.extend_from_slice(&bits.to_be_bytes()[1..group.len()]);
    }
    Some(bytes)
}

/// Our table of bytes has a place for every id up to the highest.
fn check_ids(ids: &serde_json::Map<String, Value>, added: usize) -> Result<(), String> {
    let highest = ids.values().filter_map(Value::as_u64).max().unwrap_or(0);
    let count = ids.len() + added;
    if highest > count as u64 + MAX_GAPS {
        return Err(format!("its highest token id is {highest}, but it has {count} tokens only"));
    }
    Ok(())
}

fn check_pieces(pieces: &[Value]) -> Result<(), String> {
    let lengths = || pieces.iter().filter_map(|piece| piece[0].as_str()).map(str::len);
    if lengths().any(|length| length > MAX_PIECE) || lengths().sum::<usize>() > MAX_PIECES {
        return Err(format!(
            "a piece of its vocabulary has more than {MAX_PIECE} bytes, or all together more than {MAX_PIECES}"
        ));
    }
    Ok(())
}

/// The library joins the two halves of a merge in a buffer as long as the longest token.
fn check_merges(model: &Value) -> Result<(), String> {
    let longest = model["vocab"].as_object().into_iter().flatten().map(|(token, _)| token.len()).max();
    let joined = |merge: &Value| match merge {
        Value::String(pair) => pair.len().saturating_sub(1),
        pair => [&pair[0], &pair[1]].iter().filter_map(|half| half.as_str()).map(str::len).sum(),
    };
    let mut merges = model["merges"].as_array().into_iter().flatten();
    match merges.find(|merge| joined(merge) > longest.unwrap_or(0)) {
        Some(merge) => Err(shortened(format!("merge {merge} makes a token that it does not have"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn with(part: &str, component: &Value) -> Result<(), String> {
        check(&json!({ part: component, "model": { "vocab": {} } }))
    }

    fn refused(part: &str, component: &Value, name: &str) {
        let error = with(part, component).unwrap_err();
        assert!(error.contains(name), "{error}");
    }

    fn regex(pattern: &str) -> Value {
        json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
    }

    #[test]
    fn published_pipelines_are_within_bounds() {
        let gpt_4o = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let byte_level = json!({ "type": "ByteLevel", "use_regex": false });
        let sequence =
            json!({ "type": "Sequence", "pretokenizers": [regex(gpt_4o), regex(gpt_4o), byte_level] });
        assert_eq!(with("pre_tokenizer", &sequence), Ok(()));
        let llama = json!({ "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
            { "type": "Replace", "pattern": { "Regex": " {2,}" }, "content": " " },
            { "type": "NFKC" },
        ]});
        assert_eq!(with("normalizer", &llama), Ok(()));
    }

    #[test]
    fn texts_that_would_grow_without_end_are_refused() {
        let double = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aa" });
        let sequence = |count| json!({ "type": "Sequence", "normalizers": vec![double.clone(); count] });
        assert_eq!(with("normalizer", &sequence(8)), Ok(()));
        refused("normalizer", &sequence(9), "256 times");
        let between = json!({ "type": "Replace", "pattern": { "Regex": "" }, "content": "x".repeat(256) });
        refused("normalizer", &between, "256 times");
        let levels = json!({ "type": "Sequence", "pretokenizers": vec![json!({ "type": "ByteLevel" }); 9] });
        refused("pre_tokenizer", &levels, "256 times");
        refused("normalizer", &json!({ "type": "Prepend", "prepend": "x".repeat(257) }), "256 bytes");
    }

    #[test]
    fn patterns_that_compile_to_far_more_than_themselves_are_refused() {
        assert_eq!((repetitions(r"\p{N}{1,3}|a{2,}"), repetitions(r"(?:\w{40}){40}")), (6, 1600));
        assert_eq!(repetitions(&"a{99999999999}".repeat(9)), usize::MAX);
        refused("pre_tokenizer", &regex(r"(?:\w{40}){40}"), "1000 times");
        refused("pre_tokenizer", &regex(&"a".repeat(5000)), "4096 bytes");
    }

    #[test]
    fn deep_many_and_unknown_components_are_refused() {
        let nest = |depth: usize| {
            (0..depth).fold(
                json!({ "type": "NFC" }),
                |inner, _| json!({ "type": "Sequence", "normalizers": [inner] }),
            )
        };
        assert_eq!(with("normalizer", &nest(4)), Ok(()));
        refused("normalizer", &nest(5), "4 deep");
        let many = json!({ "type": "Sequence", "normalizers": vec![json!({ "type": "NFC" }); 64] });
        refused("normalizer", &many, "64 normalizers");
        refused("normalizer", &json!([[{ "type": "NFC" }]]), "null");
        refused("normalizer", &json!({ "type": "x".repeat(1 << 20) }), "xxx");
        refused("pre_tokenizer", &json!({ "type": "FixedLength", "length": 0 }), "no characters");
    }

    #[test]
    fn character_maps_that_lie_about_their_length_are_refused() {
        let map = |base64: &str| {
            with("normalizer", &json!({ "type": "Precompiled", "precompiled_charsmap": base64 }))
        };
        // A trie of four zero bytes, and the replacements "ab" and "c".
        assert_eq!(decode_base64("BAAAAAAAAABhYgBj").unwrap(), b"\x04\0\0\0\0\0\0\0ab\0c");
        assert_eq!(longest_replacement("BAAAAAAAAABhYgBj"), Ok(2));
        assert_eq!(
            (decode_base64("YQ==").unwrap(), decode_base64("YWI=").unwrap()),
            (b"a".into(), b"ab".into())
        );
        assert_eq!(map("BAAAAAAAAABhYgBj"), Ok(()));
        for damaged in ["", "YQ==", "YQ=", "////AAAA", "/////wAA", "AAAAAAAA", "BAAAAAAAAAD/", "B A="] {
            assert!(map(damaged).unwrap_err().contains("charsmap"), "{damaged}");
        }
    }

    #[test]
    fn vocabularies_that_cost_more_than_they_hold_are_refused() {
        let vocabulary =
            |vocab: Value, merges: Value| check(&json!({ "model": { "vocab": vocab, "merges": merges } }));
        assert_eq!(vocabulary(json!({ "a": 0, "b": 131_074 }), json!([])), Ok(()));
        let error = vocabulary(json!({ "a": 0, "b": 16_777_215 }), json!([])).unwrap_err();
        assert!(error.contains("16777215"), "{error}");
        let error = vocabulary(json!({ "a": 0, "b": 1 }), json!([["a", "b"]])).unwrap_err();
        assert!(error.contains("merge"), "{error}");
        assert!(vocabulary(json!({ "a": 0, "b": 1 }), json!(["a b"])).is_err());
        assert_eq!(vocabulary(json!({ "a": 0, "b": 1, "ab": 2 }), json!(["a b", ["a", "b"]])), Ok(()));
        assert_eq!(vocabulary(json!([["x".repeat(1024), 0.0]]), Value::Null), Ok(()));
        assert!(vocabulary(json!([["x".repeat(1025), 0.0]]), Value::Null).is_err());
        let added = |bytes: usize| json!({ "added_tokens": [{ "content": "x".repeat(bytes) }] });
        assert_eq!((check(&added(1 << 22)).is_ok(), check(&added((1 << 22) + 1)).is_ok()), (true, false));
    }

    #[test]
    fn a_panic_of_the_library_is_an_error_with_its_message() {
        let error = guarded::<()>(|| panic!("index {} out of range", 7)).unwrap_err();
        assert_eq!(error, "the tokenizers library failed: index 7 out of range");
        assert_eq!(guarded(|| Ok(1)), Ok(1));
    }
}

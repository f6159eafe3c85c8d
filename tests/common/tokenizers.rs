//! Small tokenizers of every kind, and parts that make them misbehave.
#![allow(dead_code, missing_docs)]

use super::mutate::Draw;
use serde_json::{Value, json};

fn added(id: usize, content: &str, special: bool) -> Value {
    json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": true,
            "normalized": !special, "special": special })
}

fn file(added: &Value, [normalizer, pre_tokenizer, decoder, model]: [&Value; 4]) -> Value {
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "decoder": decoder, "model": model,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } },
        },
    })
}

/// A character map: a trie of 256 zeros, in which every look-up ends at once, and two replacements.
fn characters() -> Value {
    let base64 = format!("AAQA{}AABhYgBj", "AAAA".repeat(341));
    json!({ "type": "Precompiled", "precompiled_charsmap": base64 })
}

/// A byte-level BPE with a pattern, a BPE in the manner of `SentencePiece`, and a Unigram.
pub(crate) fn starts() -> Vec<Value> {
    let byte_level =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let split = json!({ "type": "Split", "behavior": "Isolated", "invert": false,
                        "pattern": { "Regex": r"\s+(?!\S)|\p{N}{1,3}|[a-z]+|." } });
    let replace =
        |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let metaspace =
        json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true });
    let own = json!([
        added(0, "<unk>", true),
        added(1, "<s>", true),
        added(2, "</s>", true),
        added(8, "<think>", false)
    ]);
    let vocab = json!({ "<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "ab": 5, "▁": 6, "<0x0A>": 7 });
    let bpe = |byte_fallback: bool| {
        json!({ "type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": byte_fallback,
                "ignore_merges": false, "vocab": vocab, "merges": [["a", "b"]] })
    };
    let unigram = json!({ "type": "Unigram", "unk_id": 0, "byte_fallback": true, "vocab": [
        ["<unk>", 0.0], ["<s>", 0.0], ["</s>", 0.0], ["a", -1.0], ["b", -2.0], ["ab", -1.5], ["▁a", -3.0], ["▁", -4.0],
    ]});
    let sequence = json!({ "type": "Sequence", "pretokenizers": [split, byte_level] });
    let normalizers = json!({ "type": "Sequence", "normalizers": [{ "type": "Prepend", "prepend": "▁" }, replace(" ", "▁")] });
    let decoder = json!({ "type": "Sequence", "decoders": [replace("▁", " "), { "type": "ByteFallback" }] });
    vec![
        file(&own, [&json!({ "type": "NFC" }), &sequence, &byte_level, &bpe(false)]),
        file(&own, [&normalizers, &Value::Null, &decoder, &bpe(true)]),
        file(&own, [&characters(), &metaspace, &metaspace, &unigram]),
    ]
}

fn split(pattern: &str) -> Value {
    json!({ "type": "Split", "behavior": "MergedWithNext", "invert": true, "pattern": { "Regex": pattern } })
}

fn plain<const N: usize>(kinds: [&str; N]) -> Vec<Value> {
    kinds.iter().map(|kind| json!({ "type": kind })).collect()
}

fn normalizers() -> Vec<Value> {
    let replace = |from: Value, to: &str| json!({ "type": "Replace", "pattern": from, "content": to });
    let mut parts = plain(["NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents"]);
    parts.extend([
        replace(json!({ "String": "a" }), "aa"),
        replace(json!({ "String": "" }), "xx"),
        replace(json!({ "Regex": "" }), "ab"),
        replace(json!({ "Regex": "(?=a)" }), "a"),
        replace(json!({ "Regex": "[^a]" }), ""),
        replace(json!({ "String": " " }), "▁"),
        characters(),
        json!({ "type": "Precompiled", "precompiled_charsmap": "BAAAAAH///9hYgBj" }),
        json!({ "type": "Precompiled", "precompiled_charsmap": "////AAAA" }),
        json!({ "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true }),
        json!({ "type": "Strip", "strip_left": true, "strip_right": true }),
        json!({ "type": "Prepend", "prepend": "ab" }),
        json!({ "type": "ByteLevel" }),
    ]);
    parts
}

fn pre_tokenizers() -> Vec<Value> {
    let mut parts = plain(["UnicodeScripts", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"]);
    parts.extend(
        [
            r"(?:a|aa)+$",
            r"(a*)*(?=b)",
            r"(a+a+)+(?!a)",
            r"(?:\w{30}){30}",
            r"\p{L}{1,999}",
            r"(?<=a)b",
            r"(a)\1+",
            "",
            "(",
            r"(?:(?:(?:a{9}){9}){9}){9}",
            r"\G",
            r"(?=)",
            r"a|",
            r"(?i)ß",
            r"[\p{L}--[a-z]]",
            r"(?>a+)b",
            r"\b|\B",
            r"(a)?(?(1)b|c)",
            r"\K",
            r"^|$",
            r"(?:)*",
            r"(?=(a*))*",
            r"\X",
        ]
        .map(split),
    );
    parts.extend([
        json!({ "type": "FixedLength", "length": 1 }),
        json!({ "type": "FixedLength", "length": 0 }),
        json!({ "type": "CharDelimiterSplit", "delimiter": "a" }),
        json!({ "type": "Metaspace", "replacement": "a", "prepend_scheme": "always", "split": false }),
        json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": true }),
        json!({ "type": "Punctuation", "behavior": "Contiguous" }),
        json!({ "type": "Digits", "individual_digits": true }),
        json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }),
    ]);
    parts
}

/// Components, patterns and pieces, many of which the library fails on where nothing looks first.
pub(crate) fn donors() -> Vec<Value> {
    let mut donors = [normalizers(), pre_tokenizers()].concat();
    donors.extend([
        json!({ "type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": true, "add_prefix_space": true }),
        json!({ "type": "WordPiece", "vocab": { "a": 0 }, "unk_token": "a" }),
        added(9, " ", false),
        added(3, "a", true),
        added(10, "  ", true),
        json!([["a", "b"], ["ab", "ab"], ["<unk>", "<s>"]]),
        json!(["a b", "a  b", "", " "]),
        json!(["", 0.0]),
        json!(["aaaaaaaaaaaaaaaa", 1e308]),
    ]);
    donors
}

/// Exchanges the normalizers or the pre-tokenizers for some others in a row.
pub(crate) fn change_pipeline(draw: &mut Draw, tokenizer: &mut Value) {
    let (part, list, from) = if draw.one_in(2) {
        ("normalizer", "normalizers", normalizers())
    } else {
        ("pre_tokenizer", "pretokenizers", pre_tokenizers())
    };
    let parts: Vec<Value> = (0..draw.few()).map(|_| draw.pick(&from).clone()).collect();
    tokenizer[part] = json!({ "type": "Sequence", list: parts });
}

/// What chat templates are made of.
pub(crate) const TEMPLATE_PIECES: [&str; 60] = [
    "{% for m in messages %}",
    "{% endfor %}",
    "{% if m %}",
    "{% else %}",
    "{% endif %}",
    "{%- set x = ",
    " %}",
    " -%}",
    "{{ ",
    "{{- ",
    " }}",
    "{% macro f(x) %}",
    "{% endmacro %}",
    "f(",
    "loop.index0",
    "m['content']",
    "m.role",
    "messages",
    "messages[::-1]",
    "'a'",
    " ~ ",
    " + ",
    " * ",
    " ** ",
    " // ",
    "999999999",
    "-9223372036854775808",
    "1e308",
    "[",
    "]",
    "(",
    ")",
    ", ",
    "| tojson(indent=4)",
    "| join",
    "| replace('a', x)",
    ".split('a')",
    "[-1:5:-1]",
    ".strip()",
    " is defined",
    " in ",
    "range(9)",
    "{% generation %}",
    "{% endgeneration %}",
    "{% raw %}",
    "{#",
    "#}",
    "\u{e9}",
    "{%",
    "%}",
    "| map(attribute='role')",
    "| list",
    "| sort",
    "| items",
    "{% break %}",
    "{% call(z) f(1) %}",
    "{% endcall %}",
    "{% filter upper %}",
    "strftime_now('%d %Q')",
    "\0",
];

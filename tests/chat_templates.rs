//! Chat templates: the bytes are Python's, and hostile templates end with an error.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use proptest::prelude::*;
use rpt::config::TemplateName;
use rpt::tasks::{ChatFormat, PromptTemplate};
use rpt::tokenize::{ChatTemplate, Message, SpecialTokens, TokenizeError, Tokenizer};
use serde_json::{Value, json};
use std::path::Path;

const OWN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/templates");

fn template(source: &str, tokens: &Value) -> ChatTemplate {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("chat_template.jinja"), source).unwrap();
    std::fs::write(directory.path().join("tokenizer_config.json"), tokens.to_string()).unwrap();
    ChatTemplate::load(directory.path()).unwrap().unwrap()
}

fn render(source: &str) -> Result<String, TokenizeError> {
    template(source, &json!({})).render(&[Message::user("Hello")], true)
}

fn messages(conversation: &Value) -> Vec<Message> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let message = |turn: &Value| Message { role: text(&turn["role"]), content: text(&turn["content"]) };
    conversation.as_array().unwrap().iter().map(message).collect()
}

/// What differs from Python in a directory that `render.py` was run on, and how many were compared.
fn differences(directory: &Path) -> (usize, Vec<String>) {
    let expected = std::fs::read_to_string(directory.join("expected.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    let conversations: Vec<_> = expected["conversations"].as_array().unwrap().iter().map(messages).collect();
    let (mut compared, mut differences) = (0, Vec::new());
    for (name, renderings) in expected["templates"].as_object().unwrap() {
        let source = std::fs::read_to_string(directory.join(format!("{name}.jinja"))).unwrap();
        let template = template(&source, &expected["tokens"]);
        for (index, messages) in conversations.iter().enumerate() {
            for prompt in [false, true] {
                let ours = template.render(messages, prompt);
                let python = renderings[index][usize::from(prompt)].as_str();
                compared += 1;
                if ours.as_ref().ok().map(String::as_str) != python {
                    differences.push(format!("{name} {index} {prompt}\n  {ours:?}\n  {python:?}"));
                }
            }
        }
    }
    (compared, differences)
}

#[test]
fn renderings_are_python_s_byte_for_byte() {
    let (compared, differences) = differences(Path::new(OWN));
    assert!(compared >= 7 * 26, "{compared}");
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

#[test]
fn published_templates_are_rendered_like_python() {
    let Some(directory) = std::env::var_os("RPT_CHAT_TEMPLATES") else {
        println!("SKIPPED: RPT_CHAT_TEMPLATES names no directory of published templates");
        return;
    };
    let (compared, differences) = differences(Path::new(&directory));
    assert!(differences.is_empty(), "{} of {compared} differ\n{}", differences.len(), differences.join("\n"));
}

#[test]
fn special_tokens_come_from_the_configuration() {
    let tokens = json!({
        "bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "pad_token": null,
        "add_bos_token": true,
    });
    let template = template("{{ bos_token }}{{ pad_token }}{{ eos_token }}", &tokens);
    assert_eq!(template.render(&[], false).unwrap(), "<s></s>");
}

#[test]
fn the_template_file_comes_before_the_configuration() {
    let directory = tempfile::tempdir().unwrap();
    let load = || ChatTemplate::load(directory.path());
    let text = || load().unwrap().unwrap().render(&[], false).unwrap();
    assert_eq!(load().unwrap(), None);
    let config = directory.path().join("tokenizer_config.json");
    std::fs::write(&config, r#"{"chat_template": [{"name": "default", "template": "list"}]}"#).unwrap();
    assert_eq!(text(), "list");
    std::fs::write(&config, r#"{"chat_template": "text"}"#).unwrap();
    assert_eq!(text(), "text");
    std::fs::write(directory.path().join("chat_template.jinja"), "file").unwrap();
    assert_eq!(text(), "file");
    std::fs::write(directory.path().join("chat_template.jinja"), vec![b' '; 1 << 19]).unwrap();
    assert!(matches!(load(), Err(TokenizeError::TemplateLimit { .. })));
    std::fs::write(directory.path().join("chat_template.jinja"), [0xff]).unwrap();
    assert!(matches!(load(), Err(TokenizeError::Io { .. })));
}

#[test]
fn a_format_is_what_stands_around_the_user_s_words() {
    let own = |name| {
        let source = std::fs::read_to_string(Path::new(OWN).join(name)).unwrap();
        ChatFormat::from_template(&template(&source, &json!({"bos_token": "<s>"})))
    };
    let turns = own("turns.jinja").unwrap();
    assert!(turns.user_start.ends_with("<|start|>user\n") && turns.from_model && !turns.opens_thought);
    assert_eq!(turns.user_end_and_assistant_start, "<|stop|>\n<|start|>assistant\n");
    let opened = own("opened.jinja").unwrap();
    assert!(opened.opens_thought);
    assert_eq!(opened.user_start, "<s><User>");
    assert_eq!(opened.user_end_and_assistant_start, "<Assistant><think>\n");
}

#[test]
fn a_format_around_words_is_the_rendering_of_the_words() {
    let words = "Complete the text.\n\n### Context\n```\nOnce upon a time\n```";
    for name in ["turns", "thoughts", "opened", "headers", "modes", "strict"] {
        let source = std::fs::read_to_string(Path::new(OWN).join(format!("{name}.jinja"))).unwrap();
        let template = template(&source, &json!({"bos_token": "<s>"}));
        let format = ChatFormat::from_template(&template).unwrap();
        let rendered = template.render(&[Message::user(words)], true).unwrap();
        let around = format.user_start + words + &format.user_end_and_assistant_start;
        assert_eq!(around, rendered, "{name}");
    }
}

#[test]
fn the_template_beside_a_tokenizer_is_used() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/peers/golden/qwen3-pico/tokenizer.json");
    if !Path::new(path).exists() {
        println!("SKIPPED: {path} is absent");
        return;
    }
    let tokenizer = Tokenizer::load(Path::new(path)).unwrap();
    let (beside, known) = (ChatFormat::beside(&tokenizer).unwrap(), ChatFormat::of(&tokenizer));
    assert!(beside.from_model && !known.from_model);
    assert_eq!(ChatFormat { from_model: false, ..beside }, known);
}

#[test]
fn instructions_stand_in_the_model_s_own_turn() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/peers/golden/qwen3-pico/tokenizer.json");
    if !Path::new(path).exists() {
        println!("SKIPPED: {path} is absent");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let copy = directory.path().join("tokenizer.json");
    std::fs::copy(path, &copy).unwrap();
    let source = "{{ '<|im_start|>own ' }}{{ messages[0].content }}{{ '<|im_end|><think>\\n' }}";
    std::fs::write(directory.path().join("chat_template.jinja"), source).unwrap();
    let tokenizer = Tokenizer::load(&copy).unwrap();
    let id = |name: &str| tokenizer.encode_control(name).unwrap()[0];
    let special = SpecialTokens { eos: id("<|im_end|>"), other_ends: vec![], bos: Some(id("a")) };
    let v6 = PromptTemplate::resolve(TemplateName::V6, &tokenizer, &special).unwrap();
    assert_eq!(v6.header[0], id("<|im_start|>"), "the template says whether a start token comes first");
    assert!(tokenizer.decode_lossy(&v6.header).starts_with("<|im_start|>own Complete the text"));
    assert!(tokenizer.decode_lossy(&v6.footer).ends_with("next token.<|im_end|><think>\n"));
    std::fs::write(directory.path().join("chat_template.jinja"), "{{ broken").unwrap();
    assert!(PromptTemplate::resolve(TemplateName::V6, &tokenizer, &special).is_err());
    assert!(PromptTemplate::resolve(TemplateName::Plain, &tokenizer, &special).is_ok());
}

#[test]
fn templates_that_lose_or_repeat_the_user_s_words_are_refused() {
    for (source, times) in [("nothing", 0), ("{{ messages[0].content * 2 }}", 2)] {
        let error = ChatFormat::from_template(&template(source, &json!({}))).unwrap_err();
        assert!(error.to_string().contains(&format!("{times} times")), "{error}");
    }
}

/// Templates that want time without end, or memory.
fn hostile() -> Vec<String> {
    let forever = "{% for a in range(99999) %}{% for b in range(99999) %}";
    let ends = "{% endfor %}{% endfor %}";
    let grow = |step: &str| {
        format!("{{% set ns = namespace(s='ab', l=[1]) %}}{{% for i in range(99) %}}{step}{{% endfor %}}")
    };
    let mut all = vec![
        format!("{forever}{ends}"),
        format!("{forever}x{ends}"),
        format!("{forever}{{{{ messages }}}}{ends}"),
        "{% for i in range(10**9) %}{% endfor %}".into(),
        "{{ range(10**18) | list }}".into(),
        "{{ 'a' * 10**9 }}".into(),
        "{{ 10**9 * 'a' }}".into(),
        "{{ 'a' * 10**8 }}".into(),
        "{{ ([1] * 10**8) | list }}".into(),
        "{{ ([1] * 10**8) | join }}".into(),
        "{{ 'a' * (0 - 1) * 99999999999999999999 }}".into(),
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}".into(),
        "{% macro f(x) %}{{ f(x ~ x) }}{{ f(x ~ x) }}{% endmacro %}{{ f('a') }}".into(),
        "{% macro f(x) %}{% for i in range(9) %}{{ f(x + 1) if x < 20 }}{% endfor %}{% endmacro %}{{ f(1) }}"
            .into(),
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".into(),
        "{{ ('a' * 1000000) | replace('a', 'a' * 1000000) }}".into(),
        "{{ ('a' * 1000000).replace('', 'a' * 1000000) }}".into(),
        "{{ ('a' * 1000000).join(range(99999) | list) }}".into(),
        "{{ '{:>1000000000}'.format(1) }}{{ '%1000000000d' % 1 }}".into(),
        "{{ '%1000000000d' | format(1) }}".into(),
        "{{ [1] | batch(10**12, 1) | list }}".into(),
        "{{ [[1]] | tojson(indent=10**12) }}".into(),
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}".into(),
        "{% set ns = namespace() %}{% set ns.x = ns %}{{ [ns] | tojson }}{{ ns == ns }}".into(),
    ];
    let steps = [
        "{% set ns.s = ns.s + ns.s %}",
        "{% set ns.s = ns.s ~ ns.s %}",
        "{% set ns.s = [ns.s, ns.s] | join(ns.s) %}",
        "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}",
        "{% set ns.s = ns.s | replace('a', ns.s) %}",
        "{% set ns.s = (ns.s | upper)[:] * 2 %}",
        "{% set ns.s = [ns.s, ns.s] | string %}",
        "{% set ns.s = ns.s | tojson %}{% set ns.s = ns.s ~ ns.s %}",
        "{% set ns.l = ns.l + ns.l %}",
        "{% set ns.l = [ns.l, ns.l] %}",
        "{% set ns.l = [ns.l] %}",
        "{% set ns.l = {'a': ns.l, 'b': ns.l} %}",
        "{% set ns.l = (ns.l, ns.l) %}",
        "{% set ns.l = namespace(a=ns.l, b=ns.l) %}",
        "{% set ns.l = dict(a=ns.l) %}",
        "{% set ns.l = ns.l | map('string') | list + ns.l %}",
        "{% filter replace('a', 'aa' * 100) %}{{ 'a' * 100000 }}{% endfilter %}",
    ];
    all.extend(steps.iter().map(|step| grow(step)));
    all
}

#[test]
fn hostile_templates_end_with_an_error() {
    for source in hostile() {
        assert!(render(&source).is_err(), "{source}");
    }
}

#[test]
fn limits_are_told_from_mistakes() {
    let limited = |source: &str| matches!(render(source), Err(TokenizeError::TemplateLimit { .. }));
    assert!(limited("{{ 'a' * 10**9 }}"));
    assert!(limited("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"));
    assert!(!limited("{{ 1 + }}"));
    assert!(!limited("{% include 'other' %}"));
}

#[test]
fn long_and_deep_sources_end_without_overflow() {
    let count = 60_000;
    let repeated = [
        ("{{ 'a'", "~'a'", " }}"),
        ("{{ 1", "+1", " }}"),
        ("{{ a", ".a", " }}"),
        ("{{ a", "[0]", " }}"),
        ("{{ a", "|a", " }}"),
        ("{{ a", "()", " }}"),
        ("{{ ", "(", ""),
        ("{{ ", "[", ""),
        ("{{ ", "-", "1 }}"),
        ("{{ ", "not ", "1 }}"),
        ("{{ 1", " if 1", " }}"),
        ("{{ 1", " and 1", " }}"),
        ("{{ 1", " is a", " }}"),
        ("{{ 1", "**1", " }}"),
        ("{% if 1 %}", "{% elif 1 %}", "{% endif %}"),
        ("", "{% if 1 %}", ""),
        ("", "{% for x in y %}", ""),
        ("", "{{", ""),
        ("", "{#", ""),
    ];
    for (start, step, end) in repeated {
        let count = count.min(250_000 / step.len());
        assert!(render(&format!("{start}{}{end}", step.repeat(count))).is_err(), "{step}");
    }
}

/// Pieces of which templates are made, in any order.
fn piece() -> impl Strategy<Value = String> {
    let pieces = [
        "{% for m in messages %}",
        "{% endfor %}",
        "{% if m %}",
        "{% else %}",
        "{% endif %}",
        "{%- set x = ",
        "{% set ns = namespace(x=1) %}",
        "{% set ns.x = ",
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
        " - ",
        "999999999",
        "1",
        "0",
        "[",
        "]",
        "(",
        ")",
        ", ",
        "| tojson",
        "| join",
        "| replace('a', x)",
        ".split('a')",
        "[-1]",
        ".strip()",
        " is defined",
        " == ",
        " in ",
        "range(9)",
        "x",
        "ns.x",
        "{% generation %}",
        "{% endgeneration %}",
        "{% raw %}",
        "{#",
        "#}",
        "\n",
        "  ",
        "é",
        "{%",
        "%}",
        "{% set y %}",
        "{% endset %}",
        "| map(attribute='role')",
        "| list",
        "| string",
        "strftime_now('%d %Q')",
        "raise_exception('no')",
        "{% break %}",
        "{% call(z) f(1) %}",
        "{% endcall %}",
        "{% filter upper %}",
    ];
    proptest::sample::select(pieces.to_vec()).prop_map(str::to_owned)
}

/// Statements that are well formed, so that they run, and feed each other.
fn statement() -> impl Strategy<Value = String> {
    let operand =
        || proptest::sample::select(vec!["ns.s", "ns.l", "'ab'", "7", "messages", "[ns.l, ns.s]", "i"]);
    let operator = proptest::sample::select(vec!["+", "~", "*", "**", "-", "==", "in", "and", "//", "%"]);
    let filter = proptest::sample::select(vec![
        "",
        "| string",
        "| list",
        "| tojson",
        "| join",
        "| length",
        "| replace('a', ns.s)",
        "| upper",
        "| sort",
        "| reverse",
        "| unique | list",
        "| items | list",
        "| default('d')",
        "| map('string') | join('aa')",
        "| title",
        "| trim",
        "| dictsort",
        "| min",
        "| lines | list",
        "| split('a') | list",
        "| tojson(indent=9)",
    ]);
    let place = proptest::sample::select(vec!["ns.s", "ns.l"]);
    (place, operand(), operator, operand(), filter).prop_map(|(place, left, op, right, filter)| {
        format!("{{% set {place} = ({left} {op} {right}) {filter} %}}")
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text_is_rendered_or_refused(source in ".{0,200}") {
        let _ = render(&source);
    }

    #[test]
    fn any_pieces_are_rendered_or_refused(pieces in proptest::collection::vec(piece(), 0..40)) {
        let _ = render(&pieces.concat());
    }

    #[test]
    fn any_program_ends_within_its_limits(steps in proptest::collection::vec(statement(), 1..6)) {
        let body = steps.concat();
        let source = format!(
            "{{% set ns = namespace(s='ab', l=[1]) %}}{{% for i in range(50) %}}{body}{{% endfor %}}{{{{ ns.s }}}}"
        );
        if let Ok(text) = render(&source) {
            prop_assert!(text.len() <= 1 << 22);
        }
    }

    #[test]
    fn the_user_s_words_are_never_code(words in "\\PC{0,60}") {
        let template = template("{% for m in messages %}{{ m.content }}{% endfor %}", &json!({}));
        prop_assert_eq!(template.render(&[Message::user(words.clone())], true).unwrap(), words);
    }
}

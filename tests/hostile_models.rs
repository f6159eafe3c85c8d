//! Whatever a model directory holds, it is loaded or refused: no panic, no hang, no more than 100 MB.
//!
//! Each case damages valid files, by its number alone; `tests/common/fuzz.rs` says how to repeat one.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/fuzz.rs"]
mod fuzz;
#[path = "common/meter.rs"]
mod meter;
#[path = "common/mutate.rs"]
mod mutate;
#[path = "common/tokenizers.rs"]
mod tokenizers;

use fuzz::{alone, in_memory, run_case, run_cases};
use meter::{Meter, Taken, measure};
use mutate::{Draw, damage, json, number, safetensors};
use rpt::config::{ScratchModel, TokenizerConfig};
use rpt::model::{Decoder, DecoderConfig, Dtype, Layout, directory_digest};
use rpt::tokenize::{ChatTemplate, Message, SpecialTokens, Tokenizer, train_byte_level_bpe};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::Path;

#[global_allocator]
static METER: Meter = Meter;

/// Bytes that reading a damaged file of up to 256 KiB may take at one time.
const MOST: usize = 100_000_000;
/// Cases that one thread runs; what the tokenizers library keeps for a thread goes with it.
const CASES_PER_THREAD: u64 = 500;

/// The files of one case.
type Files = Vec<(&'static str, Vec<u8>)>;

/// Runs the cases of a kind. `caught` says whether a library may panic where that is caught and becomes an
/// error: the tokenizers library and the template engine.
fn fuzz(
    kind: &'static str,
    cases: u64,
    caught: bool,
    make: impl Fn(&mut Draw) -> Files + Sync,
    run: impl Fn(&Path) -> bool + Sync,
) {
    let mut accepted = 0;
    let panics = run_cases(kind, cases, |numbers, most| {
        for from in numbers.clone().step_by(CASES_PER_THREAD as usize) {
            let mut some = from..(from + CASES_PER_THREAD).min(numbers.end);
            let thread = || some.try_for_each(|case| one(kind, case, &make, &run, most, &mut accepted));
            let ended = std::thread::scope(|scope| scope.spawn(thread).join());
            ended.unwrap_or_else(|_| Err("fails in the test itself".into()))?;
        }
        Ok(format!("{accepted} accepted"))
    });
    assert!(caught || panics.is_empty(), "{kind}: {panics:?}");
}

fn one(
    kind: &str,
    case: u64,
    make: &impl Fn(&mut Draw) -> Files,
    run: &impl Fn(&Path) -> bool,
    most: &mut Taken,
    accepted: &mut u64,
) -> Result<(), String> {
    thread_local! {
        static DIRECTORY: tempfile::TempDir = in_memory();
    }
    let files = make(&mut Draw::new(kind, case));
    let result = DIRECTORY.with(|directory| {
        for (name, bytes) in &files {
            std::fs::write(directory.path().join(name), bytes).unwrap();
        }
        run_case(case, MOST, most, || run(directory.path()))
    });
    let shown = || -> String {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).chars().take(2000).collect::<String>();
        let files: Vec<String> =
            files.iter().map(|(name, bytes)| format!("{name}: {}", text(bytes))).collect();
        files.join("\n")
    };
    *accepted += u64::from(result.map_err(|failure| format!("{failure}\n{}", shown()))?);
    Ok(())
}

fn small_config(architecture: &str) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": architecture, "vocab_size": 16, "hidden_size": 8,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 4, "hidden_act": "silu", "max_position_embeddings": 16, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "attention_bias": false, "tie_word_embeddings": true, "use_sliding_window": false,
        "sliding_window": 4096, "max_window_layers": 28, "bos_token_id": 1, "eos_token_id": [2, 3],
        "torch_dtype": "bfloat16", "partial_rotary_factor": 1.0,
    })
}

/// Rotary settings and fields of other models, which may replace any part of a config.json.
fn config_donors() -> Vec<Value> {
    let yarn = json!({
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 0.7, "attention_factor": 1.2, "truncate": false, "rope_theta": 5e5,
    });
    let llama3 = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    });
    let mut donors = vec![
        yarn.clone(),
        json!({ "rope_scaling": yarn, "rope_parameters": {} }),
        json!({ "rope_scaling": llama3 }),
        json!({ "rope_parameters": { "rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0 } }),
        json!({ "rope_scaling": { "type": "linear", "factor": 2.0 }, "head_dim": 2 }),
        json!({ "layer_types": ["full_attention"], "use_sliding_window": true, "max_window_layers": 0 }),
        json!({ "num_experts": 4, "quantization_config": { "bits": 4 }, "mlp_bias": true }),
        json!({ "head_dim": null, "num_key_value_heads": null }),
    ];
    donors.extend(["qwen2", "qwen3", "llama", "mamba", "default", "gelu"].map(Value::from));
    donors
}

fn read_config(directory: &Path) -> bool {
    let Ok(config) = DecoderConfig::load(directory) else { return false };
    // What is accepted can be laid out, turned and written.
    assert!(!Layout::new(&config).is_empty());
    assert!(config.rotary().inverse.iter().all(|inverse| inverse.is_finite()));
    let written = config.to_json(Dtype::F32, &[2], Some(1));
    assert_eq!(DecoderConfig::from_json(Path::new("config.json"), &written).unwrap(), config, "{written}");
    true
}

#[test]
fn any_config_is_read_or_refused() {
    let (starts, donors) = (["qwen2", "qwen3", "llama"].map(small_config), config_donors());
    let generation = json!({ "eos_token_id": [2, 3], "bos_token_id": 1, "temperature": 0.6 });
    let make = |draw: &mut Draw| {
        let start = draw.pick(&starts);
        vec![
            ("config.json", json(draw, start, &donors)),
            ("generation_config.json", json(draw, &generation, &donors)),
        ]
    };
    fuzz("config", 3000, false, make, read_config);
}

/// Settings just within their bounds, which no damage of small files comes near.
#[test]
fn settings_as_large_as_they_may_be_take_no_more_than_the_limit() {
    let values = (1 << 18) - 2;
    let text = format!("{{\"model_type\":\"{}\"}}", "x".repeat((1 << 23) - 20));
    let list = format!("{{\"model_type\":[{}0]}}", "0,".repeat(values - 2));
    let objects = format!("{{\"model_type\":[{}0]}}", "{\"a\":0},".repeat(values / 2 - 2));
    let fields: Vec<String> = (0..values).map(|at| format!("\"{at}\":0")).collect();
    let fields = format!("{{{}}}", fields.join(","));
    let alone = alone();
    let directory = in_memory();
    for settings in [text, list, objects, fields] {
        for name in ["config.json", "tokenizer_config.json"] {
            std::fs::write(directory.path().join(name), &settings).unwrap();
        }
        let read =
            || (DecoderConfig::load(directory.path()).is_err(), ChatTemplate::load(directory.path()).is_ok());
        let (read, taken) = measure(0, read);
        assert_eq!(read, (true, true));
        assert!(taken.peak < MOST, "{taken:?} {}", &settings[..30]);
    }
    drop(alone);
}

/// A tiny model as `Decoder::save` writes it.
fn tiny_model() -> (Value, Vec<u8>) {
    let shape = ScratchModel {
        hidden_size: 8,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: Some(1),
        intermediate_size: 8,
        max_position_embeddings: 16,
        rope_theta: 10_000.0,
        attention_bias: true,
        qk_norm: false,
        tie_word_embeddings: true,
        embedding_std: 0.5,
        attention_bias_std: 0.5,
        zero_init_outputs: false,
        previous_token_head: 0.0,
    };
    let directory = tempfile::tempdir().unwrap();
    Decoder::from_scratch(&shape, Dtype::F32, 16, 1).save(directory.path(), &[2], Some(1)).unwrap();
    let read = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
    (serde_json::from_slice(&read("config.json")).unwrap(), read("model.safetensors"))
}

fn load_model(directory: &Path) -> bool {
    let _ = directory_digest(directory);
    Decoder::load(directory).is_ok()
}

#[test]
fn any_weights_are_loaded_or_refused() {
    let (config, weights) = tiny_model();
    let make = |draw: &mut Draw| {
        vec![
            ("config.json", config.to_string().into_bytes()),
            ("model.safetensors", safetensors(draw, &weights)),
        ]
    };
    fuzz("weights", 3000, false, make, load_model);
}

#[test]
fn any_index_is_followed_or_refused() {
    let (config, weights) = tiny_model();
    let names = ["a.safetensors", "b.safetensors"];
    let tensors = SafeTensors::deserialize(&weights).unwrap();
    let part = |file: usize| {
        let chosen = tensors.names().into_iter().enumerate().filter(|(at, _)| at % 2 == file);
        safetensors::serialize(chosen.map(|(_, name)| (name, tensors.tensor(name).unwrap())), None).unwrap()
    };
    let parts = [part(0), part(1)];
    let placed = tensors.names().into_iter().zip(names.iter().cycle());
    let map: serde_json::Map<String, Value> = placed.map(|(name, file)| (name.into(), json!(file))).collect();
    let index = json!({ "metadata": { "total_size": 1000 }, "weight_map": map });
    let mut donors: Vec<Value> = [
        "../x",
        "/dev/zero",
        "",
        ".",
        "..",
        "a\0b",
        "config.json",
        "absent",
        "a.safetensors/",
        "./a.safetensors",
    ]
    .map(Value::from)
    .into();
    donors.push(json!("x".repeat(5000)));
    donors.push(json!({ "weight_map": {} }));
    donors.push(json!({ "weight_map": { "x": "a.safetensors" } }));
    let make = |draw: &mut Draw| {
        let second = if draw.one_in(3) { safetensors(draw, &parts[1]) } else { parts[1].clone() };
        vec![
            ("config.json", config.to_string().into_bytes()),
            ("a.safetensors", parts[0].clone()),
            ("b.safetensors", second),
            ("model.safetensors.index.json", json(draw, &index, &donors)),
        ]
    };
    fuzz("index", 3000, false, make, load_model);
}

/// A config.json that does not fit the weights beside it, which are whole.
#[test]
fn any_config_beside_whole_weights_is_loaded_or_refused() {
    let ((config, weights), mut donors) = (tiny_model(), config_donors());
    donors.extend([1 << 12, 1 << 14, 1 << 18, 1 << 20, 1 << 24].map(Value::from));
    let make = |draw: &mut Draw| {
        vec![("config.json", json(draw, &config, &donors)), ("model.safetensors", weights.clone())]
    };
    fuzz("directory", 3000, false, make, load_model);
}

const TEXTS: [&str; 5] = [
    "",
    "a",
    "Hello world  \n\t 12345 na\u{ef}ve \u{6570}\u{5b66} \u{1F642}<s></s><think> a  <s>  b",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!",
    " \u{301}\0\u{2581}\u{fdfa}e\u{301}",
];

fn encode(tokenizer: &Tokenizer) {
    for text in TEXTS {
        for ids in [tokenizer.encode_document(text), tokenizer.encode_control(text)].into_iter().flatten() {
            assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocab_size()), "{ids:?}");
            tokenizer.decode_lossy(&ids);
        }
    }
}

#[test]
fn any_tokenizer_is_loaded_or_refused() {
    let words = ["the cat sat on the mat ", "the dog ran to the lake "].map(|words| words.repeat(20));
    let trained = train_byte_level_bpe(words.into_iter(), 280).unwrap();
    let directory = tempfile::tempdir().unwrap();
    trained.save(directory.path(), &SpecialTokens { eos: 3, other_ends: vec![], bos: Some(0) }).unwrap();
    let text = std::fs::read(directory.path().join("tokenizer.json")).unwrap();
    let mut starts = tokenizers::starts();
    starts.push(serde_json::from_slice(&text).unwrap());
    let donors = tokenizers::donors();
    let make = |draw: &mut Draw| {
        let at = if draw.one_in(8) { starts.len() - 1 } else { draw.below(starts.len() - 1) };
        let mut start = starts[at].clone();
        if draw.one_in(2) {
            tokenizers::change_pipeline(draw, &mut start);
        }
        vec![("tokenizer.json", json(draw, &start, &donors))]
    };
    let run = |directory: &Path| {
        let Ok(tokenizer) = Tokenizer::load(&directory.join("tokenizer.json")) else { return false };
        encode(&tokenizer);
        let _ = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default());
        true
    };
    fuzz("tokenizer", 1000, true, make, run);
}

#[test]
fn any_settings_beside_a_tokenizer_are_read_or_refused() {
    let tokenizer = tokenizers::starts()[1].to_string();
    let token = json!({ "content": "</s>", "lstrip": false, "special": true });
    let settings = json!({
        "add_bos_token": true, "bos_token": "<s>", "eos_token": token, "pad_token": null,
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}",
        "added_tokens_decoder": { "0": token }, "model_max_length": 1e30,
    });
    let donors = [
        json!({ "chat_template": [{ "name": "default", "template": "{{ messages }}" }] }),
        json!({ "name": "default", "template": 3 }),
        json!({ "eos_token_id": [3, 4], "eos_token": null }),
        token.clone(),
        json!("<s>"),
    ];
    let model = json!({ "eos_token_id": 3, "bos_token_id": 0 });
    let make = |draw: &mut Draw| {
        vec![
            ("tokenizer_config.json", json(draw, &settings, &donors)),
            ("config.json", json(draw, &model, &donors)),
            ("generation_config.json", json(draw, &model, &donors)),
        ]
    };
    let run = |directory: &Path| {
        std::fs::write(directory.join("tokenizer.json"), &tokenizer).unwrap();
        let tokenizer = Tokenizer::load(&directory.join("tokenizer.json")).unwrap();
        let special = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default());
        render(directory) | special.is_ok()
    };
    fuzz("settings", 1000, true, make, run);
}

fn render(directory: &Path) -> bool {
    let Ok(Some(template)) = ChatTemplate::load(directory) else { return false };
    let said = |role: &str, content: &str| Message { role: role.into(), content: content.into() };
    let turns =
        [said("system", "Be brief."), said("user", "Hello é"), said("assistant", "<think>x</think>Hi")];
    let long = template.render(&turns, false).is_ok();
    template.render(&[Message::user("Hello")], true).is_ok() || long
}

/// Templates of published models in their manner, and pieces of any.
#[test]
fn any_chat_template_is_rendered_or_refused() {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/templates");
    let names = ["engine", "headers", "modes", "opened", "strict", "thoughts", "turns"];
    let starts = names.map(|name| std::fs::read(format!("{own}/{name}.jinja")).unwrap());
    let settings = json!({ "bos_token": "<s>", "eos_token": "</s>" });
    let pieces: Vec<&[u8]> = tokenizers::TEMPLATE_PIECES.iter().map(|piece| piece.as_bytes()).collect();
    let make = |draw: &mut Draw| {
        let mut source = if draw.one_in(5) { Vec::new() } else { draw.pick(&starts).clone() };
        let pieces_only = if source.is_empty() { 6 } else { 1 };
        for _ in 0..draw.few() * pieces_only {
            damage(draw, &mut source, &pieces);
        }
        if draw.one_in(4) {
            let count = number(draw);
            let grow = draw.pick(&[
                "ns.s ~ ns.s",
                "ns.s * 9",
                "[ns.s, ns.s]",
                "ns.s | replace('a', ns.s)",
                "ns.s | tojson",
            ]);
            let body = format!(
                "{{% set ns = namespace(s='ab') %}}{{% for i in range({count}) %}}{{% set ns.s = {grow} %}}{{% endfor %}}"
            );
            source.splice(0..0, body.into_bytes());
        }
        vec![("chat_template.jinja", source), ("tokenizer_config.json", settings.to_string().into_bytes())]
    };
    fuzz("chat_template", 1000, true, make, render);
}

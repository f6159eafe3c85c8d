//! Every config.json of Qwen2, Qwen3 and Llama is loaded exactly, or refused by the name of what is
//! not implemented. `tests/golden/rotary.json` holds what transformers computes.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use rpt::model::{
    Decoder, DecoderConfig, Dtype, Extension, Forest, Layout, ModelError, Tape, Targets, TokenGradient,
    TokenScore, Workspace,
};
use rpt::random::Stream;
use serde_json::{Value, json};
use std::path::Path;

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/rotary.json")).unwrap()
}

/// A config.json of the golden shape with some fields set.
fn with(fields: &Value) -> Value {
    let mut config = golden()["shape"].clone();
    config["model_type"] = json!("llama");
    for (key, value) in fields.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn read(config: &Value) -> Result<DecoderConfig, ModelError> {
    DecoderConfig::from_json(Path::new("config.json"), config)
}

/// A model with random parameters, biases and norms included.
fn random(config: &Value) -> Decoder {
    let config = read(config).unwrap();
    let stream = Stream::new(3, "parameters");
    let values: Vec<f32> =
        (0..Layout::new(&config).len()).map(|at| 0.2 * stream.normal(at as u64) as f32).collect();
    Decoder::new(config, Dtype::F32, &values)
}

#[test]
fn rotary_frequencies_have_the_bits_of_transformers() {
    for case in golden()["cases"].as_array().unwrap() {
        let rotary = read(&with(&case["config"])).unwrap().rotary();
        let expected = case["inverse_frequencies"].as_array().unwrap();
        let expected: Vec<f32> = expected.iter().map(|inverse| inverse.as_f64().unwrap() as f32).collect();
        assert_eq!(rotary.inverse, expected, "{case}");
        let factor = case["attention_factor"].as_f64().unwrap() as f32;
        assert_eq!(rotary.attention_factor.to_bits(), factor.to_bits(), "{case}");
    }
}

#[test]
fn what_was_read_is_written() {
    let biased =
        json!({ "model_type": "qwen3", "attention_bias": true, "head_dim": 8, "rms_norm_eps": 1e-5 });
    let golden = golden();
    let cases = golden["cases"].as_array().unwrap().iter().map(|case| &case["config"]);
    for fields in cases.chain([&biased]) {
        let config = read(&with(fields)).unwrap();
        let mut written = config.to_json(Dtype::F32, &[7], None);
        assert_eq!(read(&written).unwrap(), config, "{written}");
        // Either spelling alone says it too.
        for key in ["rope_scaling", "rope_theta"] {
            written.as_object_mut().unwrap().remove(key);
        }
        assert_eq!(read(&written).unwrap(), config, "{written}");
    }
}

#[test]
fn absent_fields_have_the_defaults_of_transformers() {
    let mut bare = with(&json!({ "num_attention_heads": 64, "hidden_size": 128 }));
    bare.as_object_mut().unwrap().remove("num_key_value_heads");
    let shape = |kind: &str, null: &[&str]| {
        let mut config = bare.clone();
        config["model_type"] = json!(kind);
        for key in null {
            config[*key] = Value::Null;
        }
        let config = read(&config).unwrap();
        (config.kv_heads, config.head_dim, config.max_positions)
    };
    assert_eq!(shape("llama", &[]), (64, 2, 2048));
    assert_eq!(shape("qwen2", &[]), (32, 2, 32_768));
    assert_eq!(shape("qwen3", &[]), (32, 128, 32_768));
    assert_eq!(shape("qwen2", &["num_key_value_heads", "head_dim"]), (64, 2, 32_768));
}

#[test]
fn biases_are_where_transformers_has_them() {
    let biases = |kind: &str, biased: bool| {
        let config = read(&with(&json!({ "model_type": kind, "attention_bias": biased }))).unwrap();
        let layout = Layout::new(&config);
        let names = layout.parameters().iter().filter_map(|parameter| parameter.name.strip_suffix(".bias"));
        names.filter_map(|name| name.rsplit('.').next()).collect::<Vec<_>>().join(" ")
    };
    for biased in [false, true] {
        assert_eq!(biases("qwen2", biased), "q_proj k_proj v_proj");
    }
    for kind in ["qwen3", "llama"] {
        assert_eq!(biases(kind, false), "");
        assert_eq!(biases(kind, true), "q_proj k_proj v_proj o_proj");
    }
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    for (name, value) in [
        ("model_type", json!("qwen3_moe")),
        ("hidden_act", json!("gelu")),
        ("hidden_act", json!(3)),
        ("mlp_bias", json!(true)),
        ("quantization_config", json!({ "bits": 4 })),
        ("logit_scale", json!(0.0625)),
        ("final_logit_softcapping", json!(30.0)),
        ("rope_interleaved", json!(true)),
        ("pretraining_tp", json!(2)),
        ("num_experts", json!(8)),
        ("num_local_experts", json!(8)),
        ("partial_rotary_factor", json!(0.5)),
        ("is_causal", json!(false)),
        ("layer_types", json!(["sliding_attention"])),
    ] {
        let error = read(&with(&json!({ name: value }))).unwrap_err();
        assert!(matches!(&error, ModelError::Unsupported { what, .. } if what.contains(name)), "{error}");
        assert!(error.hint().is_some());
    }
}

#[test]
fn rotary_settings_that_are_not_implemented_are_refused_by_name() {
    for (name, settings) in [
        ("longrope", json!({ "rope_type": "longrope", "factor": 2.0 })),
        ("short_factor", json!({ "rope_type": "linear", "factor": 2.0, "short_factor": [1.0] })),
        ("mrope_section", json!({ "type": "default", "mrope_section": [16, 24, 24] })),
        ("full_attention", json!({ "full_attention": { "rope_type": "default" } })),
        ("partial_rotary_factor", json!({ "rope_type": "default", "partial_rotary_factor": 0.25 })),
        ("factor", json!({ "rope_type": "linear" })),
        ("factor", json!({ "rope_type": "yarn", "factor": -4.0 })),
        ("high_freq_factor", json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0 })),
        (
            "high_freq_factor",
            json!({ "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1 }),
        ),
        ("beta_fast", json!({ "rope_type": "yarn", "factor": 4.0, "beta_fast": "32" })),
        ("beta_slow", json!({ "rope_type": "yarn", "factor": 4.0, "beta_slow": -1 })),
        ("rope_theta", json!({ "rope_type": "yarn", "factor": 4.0, "rope_theta": 1.0 })),
    ] {
        for spelling in ["rope_scaling", "rope_parameters"] {
            let error = read(&with(&json!({ spelling: settings }))).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
    assert!(read(&with(&json!({ "rope_scaling": "linear" }))).is_err());
}

#[test]
fn a_sliding_window_counts_only_where_it_is_active() {
    let refused = |fields: Value| {
        let error = read(&with(&fields)).err()?.to_string();
        assert!(error.contains("sliding"), "{error}");
        Some(error)
    };
    let active = json!({ "model_type": "qwen2", "use_sliding_window": true, "max_window_layers": 0 });
    assert!(refused(active.clone()).is_some());
    for (key, value) in [
        ("use_sliding_window", json!(false)),
        ("sliding_window", Value::Null),
        ("max_window_layers", json!(1)),
        ("layer_types", json!(["full_attention"])),
    ] {
        let mut inactive = active.clone();
        inactive[key] = value;
        assert!(refused(inactive).is_none(), "{key}");
    }
}

#[test]
fn harmless_fields_are_no_obstacle() {
    let plain = read(&with(&json!({}))).unwrap();
    let harmless = json!({
        "architectures": ["LlamaForCausalLM"], "use_cache": true, "initializer_range": 0.02, "dtype": "bfloat16",
        "transformers_version": "5.0.0", "pretraining_tp": 1, "mlp_bias": false, "quantization_config": null,
        "rope_scaling": null, "rope_parameters": {}, "logit_scale": 1.0, "num_experts": 0, "sliding_window": 4096,
        "rope_interleaved": false, "partial_rotary_factor": 1.0, "pad_token_id": 0, "eos_token_id": [1, 2],
    });
    assert_eq!(read(&with(&harmless)).unwrap(), plain);
}

/// Settings whose cosines and sines carry a factor, and biases on all four projections.
fn yarn_with_biases() -> Value {
    with(&json!({
        "model_type": "qwen3", "attention_bias": true, "head_dim": 12, "max_position_embeddings": 64,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16,
        },
    }))
}

fn run(decoder: &Decoder, ids: &[u32], tape: Option<&mut Tape>) -> Result<(Vec<f32>, Workspace), ModelError> {
    let mut forest = Forest::default();
    forest.add(None, ids);
    let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(ids, &extensions, &mut cache, &mut workspace, tape)?;
    let rows: Vec<usize> = (0..ids.len()).collect();
    Ok((decoder.hidden(&workspace, &rows), workspace))
}

fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|at| (7 * at + 3) % 16).collect()
}

#[test]
fn decoding_and_training_have_the_bits_of_prefill() {
    let dynamic =
        json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 }, "max_position_embeddings": 40 });
    for config in [yarn_with_biases(), with(&dynamic)] {
        let (decoder, ids) = (random(&config), ids(40));
        let prefill = run(&decoder, &ids, None).unwrap().0;
        assert_eq!(run(&decoder, &ids, Some(&mut Tape::default())).unwrap().0, prefill);
        let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
        let node = cache.insert(None);
        for (id, expected) in ids.iter().zip(prefill.chunks_exact(decoder.config().hidden_size)) {
            cache.extend(node, 1, 0);
            let extension = Extension { node, rows: 0..1 };
            decoder.forward(&[*id], &[extension], &mut cache, &mut workspace, None).unwrap();
            assert_eq!(decoder.hidden(&workspace, &[0]), expected);
        }
    }
}

#[test]
fn dynamic_rotary_is_refused_past_the_original_positions() {
    let config = with(&json!({
        "rope_scaling": { "type": "dynamic", "factor": 4.0 }, "max_position_embeddings": 10,
    }));
    let decoder = random(&config);
    assert!(run(&decoder, &ids(10), None).is_ok());
    let error = run(&decoder, &ids(11), None).unwrap_err();
    assert!(matches!(error, ModelError::DynamicRotary { length: 11, limit: 10 }));
    assert!(error.to_string().contains("\"dynamic\"") && error.hint().is_some());
}

#[test]
fn gradients_pass_through_biases_and_scaled_rotations() {
    let mut decoder = random(&yarn_with_biases());
    let ids = ids(20);
    let targets: Vec<u32> = ids.iter().skip(1).copied().chain([1]).collect();
    let objective = |decoder: &Decoder| {
        let (states, mut workspace) = run(decoder, &ids, None).unwrap();
        let scores = decoder.score(&states, &targets, 1.0, &mut workspace);
        scores.iter().map(|score| f64::from(score.logprob)).sum::<f64>()
    };
    let gradients = gradients(&decoder, &ids, &targets);
    for parameter in decoder.layout().parameters().to_vec() {
        // Along its own gradient a parameter moves the objective by the gradient's squared length.
        let own = &gradients[parameter.range.clone()];
        let squared: f64 = own.iter().map(|g| f64::from(*g).powi(2)).sum();
        let step = (2e-3 / squared.sqrt()) as f32;
        let mut moved = |by: f32| {
            let mut values = decoder.parameters();
            values[parameter.range.clone()].iter_mut().zip(own).for_each(|(value, g)| *value += by * g);
            decoder.set_parameters(&values);
            objective(&decoder)
        };
        let (up, down) = (moved(step), moved(-2.0 * step));
        moved(step);
        let slope = (up - down) / (2.0 * f64::from(step));
        assert!((slope / squared - 1.0).abs() < 0.05, "{}: {slope} {squared}", parameter.name);
    }
}

fn gradients(decoder: &Decoder, ids: &[u32], targets: &[u32]) -> Vec<f32> {
    let mut forest = Forest::default();
    forest.add(None, ids);
    let (mut cache, mut workspace, mut tape) = (decoder.new_cache(), Workspace::default(), Tape::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(ids, &extensions, &mut cache, &mut workspace, Some(&mut tape)).unwrap();
    let rows: Vec<usize> = (0..ids.len()).collect();
    let targets = Targets { rows: &rows, tokens: targets, inverse_temperature: 1.0 };
    let gradient = |_: usize, _: &TokenScore| TokenGradient::Logprob(1.0);
    let mut gradients = vec![0.0; decoder.parameters().len()];
    decoder.backward(&tape, &mut cache, &targets, gradient, &mut gradients, &mut workspace);
    gradients
}

//! Weight files in and out.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use rpt::config::ScratchModel;
use rpt::model::{Architecture, Decoder, Dtype, Forest, ModelError, Workspace};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

const VOCAB: usize = 300;

/// Every tensor of a directory: format and bytes.
fn tensors(directory: &Path) -> BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            assert!(all.insert(name, tensor).is_none());
        }
    }
    all
}

/// Writes tensors as one file.
fn write(path: &Path, tensors: &BTreeMap<String, (safetensors::Dtype, Vec<usize>, Vec<u8>)>) {
    let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None::<HashMap<String, String>>, path).unwrap();
}

/// A saved model and the place of its weights.
fn saved(kind: usize) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    common::model(kind, VOCAB).save(directory.path(), &[1], None).unwrap();
    let weights = directory.path().join("model.safetensors");
    (directory, weights)
}

/// Log-probabilities of some ids, as bits.
fn logprobs(decoder: &Decoder) -> Vec<u32> {
    let ids: Vec<u32> = (0..200).map(|at| at * 7 % VOCAB as u32).collect();
    let mut forest = Forest::default();
    forest.add(None, &ids[..199]);
    let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(forest.ids(), &extensions, &mut cache, &mut workspace, None).unwrap();
    let states = decoder.hidden(&workspace, &(0..199).collect::<Vec<_>>());
    let scores = decoder.score(&states, &ids[1..], 1.0, &mut workspace);
    scores.iter().map(|score| score.logprob.to_bits()).collect()
}

fn problems(directory: &Path) -> Vec<String> {
    match Decoder::load(directory).unwrap_err() {
        ModelError::Weights { problems, .. } => problems,
        other => panic!("{other}"),
    }
}

#[test]
fn an_untouched_model_is_written_as_it_was_read() {
    for kind in 0..5 {
        let (first, _) = saved(kind);
        let second = tempfile::tempdir().unwrap();
        let decoder = Decoder::load(first.path()).unwrap();
        assert_eq!(decoder.dtype(), common::model(kind, VOCAB).dtype());
        // Small shards: some hold one large tensor, others several.
        decoder.save_as(second.path(), decoder.dtype(), 20_000, &[1], None).unwrap();
        assert!(second.path().join("model.safetensors.index.json").exists());
        assert_eq!(tensors(first.path()), tensors(second.path()));
        let again = Decoder::load(second.path()).unwrap();
        assert_eq!(again.parameters(), decoder.parameters());
    }
}

#[test]
fn a_model_is_loaded_and_written_in_the_format_that_is_asked_for() {
    let (directory, _) = saved(0);
    let whole = Decoder::load(directory.path()).unwrap().parameters();
    for dtype in Dtype::ALL {
        let decoder = Decoder::load_as(directory.path(), Some(dtype)).unwrap();
        let mut rounded = whole.clone();
        dtype.round(&mut rounded);
        assert_eq!(decoder.parameters(), rounded);
        let out = tempfile::tempdir().unwrap();
        decoder.save_as(out.path(), Dtype::Bf16, u64::MAX, &[1, 2], None).unwrap();
        assert_eq!(Decoder::load(out.path()).unwrap().dtype(), Dtype::Bf16);
        let config = fs::read_to_string(out.path().join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["torch_dtype"], "bfloat16");
        assert_eq!(config["eos_token_id"], serde_json::json!([1, 2]));
    }
}

#[test]
fn a_qwen2_written_as_a_llama_is_the_same_model() {
    for (dtype, tie_word_embeddings) in
        [(Dtype::F32, true), (Dtype::F32, false), (Dtype::Bf16, true), (Dtype::F16, false)]
    {
        let shape = ScratchModel { tie_word_embeddings, ..common::shape(0) };
        let qwen2 = Decoder::from_scratch(&shape, dtype, VOCAB, 5);
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        qwen2.save(one.path(), &[1], None).unwrap();
        qwen2.clone().qwen2_into_llama().save_as(other.path(), dtype, 20_000, &[1], None).unwrap();
        let config = fs::read_to_string(other.path().join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        assert_eq!(
            (&config["model_type"], &config["architectures"][0], &config["attention_bias"]),
            (&"llama".into(), &"LlamaForCausalLM".into(), &true.into())
        );
        let llama = Decoder::load(other.path()).unwrap();
        assert_eq!(logprobs(&llama), logprobs(&qwen2));
        let mut written = tensors(other.path());
        for layer in 0..2 {
            let (_, shape, bytes) =
                written.remove(&format!("model.layers.{layer}.self_attn.o_proj.bias")).unwrap();
            assert!(shape == [48] && bytes.iter().all(|byte| *byte == 0));
        }
        assert_eq!(written, tensors(one.path()));
    }
}

#[test]
fn other_families_are_written_as_themselves() {
    for (kind, architecture) in [(1, Architecture::Qwen3), (2, Architecture::Llama)] {
        let model = common::model(kind, VOCAB);
        let same = model.clone().qwen2_into_llama();
        assert_eq!((same.config(), same.parameters()), (model.config(), model.parameters()));
        assert_eq!(same.config().architecture, architecture);
    }
}

#[test]
fn tensors_of_different_formats_are_widened() {
    for name in ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"] {
        let (directory, path) = saved(3);
        let mut all = tensors(directory.path());
        let before = Decoder::load(directory.path()).unwrap().parameters();
        let (dtype, _, bytes) = all.get_mut(name).unwrap();
        let mut values = vec![0.0; bytes.len() / 2];
        Dtype::Bf16.read(bytes, &mut values);
        *dtype = safetensors::Dtype::F32;
        *bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        write(&path, &all);
        let decoder = Decoder::load(directory.path()).unwrap();
        assert_eq!((decoder.dtype(), decoder.parameters()), (Dtype::F32, before));
    }
}

#[test]
fn every_misfit_is_reported_at_once() {
    let (directory, path) = saved(2);
    let mut all = tensors(directory.path());
    all.remove("model.norm.weight").unwrap();
    all.get_mut("lm_head.weight").unwrap().1 = vec![48, VOCAB];
    let extra = all["model.layers.0.input_layernorm.weight"].clone();
    all.insert("model.layers.2.input_layernorm.weight".into(), extra);
    let whole = all.get_mut("model.layers.1.mlp.down_proj.weight").unwrap();
    whole.0 = safetensors::Dtype::I32;
    all.insert(
        "model.layers.0.self_attn.rotary_emb.inv_freq".into(),
        (safetensors::Dtype::F32, vec![0], vec![]),
    );
    write(&path, &all);
    let problems = problems(directory.path());
    assert_eq!(problems.len(), 4, "{problems:?}");
    for said in [
        "missing tensor model.norm.weight",
        "lm_head.weight has shape [48, 300], not [300, 48]",
        "unexpected tensor model.layers.2.input_layernorm.weight",
        "model.layers.1.mlp.down_proj.weight has dtype I32, not F32, BF16 or F16",
    ] {
        assert!(problems.iter().any(|problem| problem == said), "{said}: {problems:?}");
    }
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let (directory, path) = saved(0);
    fs::copy(&path, directory.path().join("b.safetensors")).unwrap();
    let index = r#"{"weight_map": {"x": "model.safetensors", "y": "b.safetensors"}}"#;
    fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
    assert!(problems(directory.path())[0].contains("is in two files"));
    for (index, said) in [
        (r#"{"weight_map": {"x": "../model.safetensors"}}"#, "not a plain file name"),
        (r#"{"weight_map": {}}"#, "names no file"),
        (r#"{"weight_map": {"x": 1}}"#, "no file"),
        ("[", "EOF"),
    ] {
        fs::write(directory.path().join("model.safetensors.index.json"), index).unwrap();
        let message = Decoder::load(directory.path()).unwrap_err().to_string();
        assert!(message.contains(said), "{message}");
    }
}

#[test]
fn what_half_precision_cannot_hold_is_refused() {
    let decoder = common::model(0, VOCAB);
    let mut parameters = decoder.parameters();
    parameters[7] = 1e5;
    let directory = tempfile::tempdir().unwrap();
    Decoder::new(decoder.config().clone(), Dtype::F32, &parameters)
        .save(directory.path(), &[1], None)
        .unwrap();
    assert!(Decoder::load_as(directory.path(), Some(Dtype::Bf16)).is_ok());
    let message = Decoder::load_as(directory.path(), Some(Dtype::F16)).unwrap_err().to_string();
    assert!(message.contains("model.embed_tokens.weight") && message.contains("half precision"), "{message}");
}

#[test]
fn broken_files_are_refused_before_anything_is_allocated() {
    let (directory, path) = saved(0);
    let whole = fs::read(&path).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap());
    let with_header = |header: u64| [&header.to_le_bytes(), &whole[8..]].concat();
    let cases: [(Vec<u8>, &str); 7] = [
        (vec![], "too short"),
        (vec![1, 0, 0], "too short"),
        (with_header(u64::MAX), "header claims"),
        (with_header(5 << 20), "header claims"),
        (with_header(header - 1), "broken header"),
        (whole[..whole.len() - 1].to_vec(), "broken header"),
        ([&whole[..], &[0]].concat(), "broken header"),
    ];
    for (bytes, said) in cases {
        fs::write(&path, bytes).unwrap();
        let found = problems(directory.path());
        assert!(found[0].contains(said), "{said}: {found:?}");
    }
}

/// candle reads the same files on its own.
#[test]
fn values_are_those_that_candle_reads() {
    use candle_core::{DType, Device, safetensors::load};
    for kind in 0..5 {
        let (directory, path) = saved(kind);
        let decoder = Decoder::load(directory.path()).unwrap();
        let (parameters, theirs) = (decoder.parameters(), load(&path, &Device::Cpu).unwrap());
        for parameter in decoder.layout().parameters() {
            let tensor = theirs[&parameter.name].to_dtype(DType::F32).unwrap().flatten_all().unwrap();
            assert_eq!(tensor.to_vec1::<f32>().unwrap(), parameters[parameter.range.clone()]);
        }
    }
}

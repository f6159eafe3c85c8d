//! The commands, through the real binary.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/command.rs"]
mod command;
mod common;

use command::{RPT, refuses, rpt, succeeds, texts, write_texts};
use rpt::config::{Selection, TasksConfig, TemplateName, TokenizerConfig};
use rpt::corpus::{CorpusCounts, Document};
use rpt::eval::ModelProxy;
use rpt::model::Decoder;
use rpt::tasks::{ChatFormat, Fingerprints, PromptTemplate, TaskBuilder, TaskUnits};
use rpt::tokenize::{SpecialTokens, Tokenizer, train_byte_level_bpe};
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::process::{Command, Stdio};

const COMMANDS: [&str; 12] = [
    "run",
    "prepare",
    "train",
    "eval",
    "report",
    "verify",
    "export",
    "rollout",
    "logprobs",
    "inspect",
    "schema",
    "completions",
];
const PIPELINE: &str = "[corpus]\nsource = \"x\"\n[model]\npath = \"m\"\n[train]\nsteps = 3\n";

fn json(text: &str) -> Value {
    assert_eq!(text.trim_end().lines().count(), 1, "one JSON object on one line: {text}");
    serde_json::from_str(text).unwrap()
}

fn json_file(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

/// A random model with a tokenizer of its own.
fn write_model(directory: &Path) {
    let tokenizer = train_byte_level_bpe(texts(50).into_iter(), 300).unwrap();
    let special = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default()).unwrap();
    common::model(0, tokenizer.vocab_size()).save(directory, &[special.eos], special.bos).unwrap();
    tokenizer.save(directory, &special).unwrap();
}

/// An untrained run's export, whose tokenizer is that of its base (a Qwen2), then another one.
#[test]
fn an_export_has_the_files_of_its_own_tokenizer() {
    let place = tempfile::tempdir().unwrap();
    let (base, other) = (place.path().join("base"), place.path().join("other"));
    write_model(&base);
    fs::write(base.join("vocab.json"), "{}").unwrap();
    fs::write(base.join("LICENSE"), "terms").unwrap();
    write_model(&other);
    let text = fs::read_to_string(other.join("tokenizer.json")).unwrap();
    fs::write(other.join("tokenizer.json"), text + "\n").unwrap();
    for (own, model_type) in [(&base, "qwen2"), (&other, "llama")] {
        let (run, out) = (place.path().join(model_type), place.path().join(format!("{model_type}-out")));
        fs::create_dir(&run).unwrap();
        let pipeline = format!(
            "{}\n[tokenizer]\npath = '{}'\n[tasks]\ntemplate = 'plain'\nmax_document_tokens = 64\n\
             [rollout]\nmax_new_tokens = 8\n",
            PIPELINE.replace("\"m\"", &format!("'{}'", base.display())),
            own.join("tokenizer.json").display()
        );
        fs::write(run.join("pipeline.toml"), pipeline).unwrap();
        succeeds([Path::new("export"), &run, Path::new("--out"), &out]);
        let config = json_file(&out.join("config.json"));
        assert_eq!(config["model_type"], model_type);
        let read = |directory: &Path| fs::read(directory.join("tokenizer.json")).unwrap();
        assert_eq!(read(&out), read(own));
        assert_eq!(out.join("vocab.json").exists(), model_type == "qwen2");
        assert_eq!(fs::read_to_string(out.join("LICENSE")).unwrap(), "terms");
    }
}

#[test]
fn the_help_of_every_command_has_an_example_and_the_exit_codes() {
    let overview = succeeds(["--help"]);
    for command in COMMANDS {
        assert!(overview.contains(&format!("\n  {command} ")), "{command} is not in {overview}");
        let help = succeeds([command, "--help"]);
        assert!(help.contains(&format!("Example:\n  rpt {command}")), "{help}");
        assert!(help.contains("75  interrupted"), "{help}");
    }
}

#[test]
fn wrong_usage_exits_with_2() {
    for arguments in
        [&[][..], &["runn"], &["run"], &["rollout", "--text", "x"], &["logprobs", "--model", "m"]]
    {
        let output = rpt(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty());
    }
    let both = rpt(["rollout", "--model", "m", "--run", "r", "--text", "x"]);
    assert_eq!(both.status.code(), Some(2));
    for option in
        ["--temperature=-1", "--top-p=0", "--min-p=1", "--samples=0", "--template=v7", "--top-p=NaN"]
    {
        assert_eq!(
            rpt(["rollout", "--model", "m", "--text", "x", option]).status.code(),
            Some(2),
            "{option}"
        );
    }
}

#[test]
fn pipeline_files_are_refused_with_a_place_and_a_hint() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("p.toml");
    let path = path.to_str().unwrap();
    let refused = |text: &str, sets: &[&str], words: &[&str]| {
        fs::write(path, text).unwrap();
        for command in ["run", "prepare", "train"] {
            let sets = sets.iter().flat_map(|set| ["--set", set]);
            refuses(&rpt([command, path].into_iter().chain(sets)), 2, words);
        }
    };
    refused(
        &PIPELINE.replace("steps", "stpes"),
        &[],
        &["p.toml:6", "unknown field `stpes`", "did you mean `steps`?"],
    );
    refused(&PIPELINE.replace('3', "\"three\""), &[], &["p.toml:6", "invalid type"]);
    refused("[corpus\n", &[], &["p.toml:1"]);
    refused("", &[], &["missing field `corpus`"]);
    refused(PIPELINE, &["train.steps"], &["--set train.steps: no `=`"]);
    refused(PIPELINE, &["train.stpes=3"], &["did you mean `steps`?"]);
    refused(PIPELINE, &["rollout.samples_per_task=1"], &["rollout.samples_per_task"]);
    let fp8 = ["rollout.kv_cache=fp8", "model.device=cuda", "model.batch_invariant=true", "model.dtype=f32"];
    for (sets, words) in [(1, "on a device"), (3, "model.batch_invariant"), (4, "weights of bf16")] {
        refused(PIPELINE, &fp8[..sets], &["rollout.kv_cache", words]);
    }
    refused(PIPELINE, &["model.path=hf://datasets/o/n"], &["model.path", "a model is needed"]);
    refused(PIPELINE, &["corpus.source=hf://datasets/o"], &["corpus.source", "an owner and a name"]);
    refuses(&rpt(["run", "absent.toml"]), 2, &["absent.toml"]);
}

#[test]
fn logprobs_agree_with_transformers() {
    for name in ["qwen2-pico", "qwen3-pico", "llama-pico"] {
        let Some(directory) = common::shared::path(&format!("peers/golden/{name}")) else { return };
        let model = directory.to_str().unwrap();
        let golden: Value =
            serde_json::from_str(&fs::read_to_string(directory.join("golden.json")).unwrap()).unwrap();
        for sequence in golden["sequences"].as_array().unwrap() {
            let ids = sequence["ids"].to_string();
            let found = json(&succeeds([
                "logprobs",
                "--model",
                model,
                "--json",
                "--ids",
                ids.trim_matches(['[', ']']),
            ]));
            assert_eq!(found["ids"], sequence["ids"]);
            for key in ["logprobs", "entropy"] {
                let (found, expected) = (numbers(&found[key]), numbers(&sequence[key]));
                assert_eq!(found.len(), expected.len());
                let gap = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(gap < 1e-5, "{name}: {key} differs by {gap}");
            }
        }
        let text = golden["text"].as_str().unwrap();
        let found = json(&succeeds(["logprobs", "--model", model, "--json", "--text", text]));
        assert_eq!(found["ids"], golden["sequences"][2]["ids"], "{name}");
    }
}

#[test]
fn long_sequences_are_scored_as_their_prefixes_are() {
    let Some(directory) = common::shared::path("peers/golden/qwen2-pico") else { return };
    let scores = |count: usize| {
        let ids: Vec<String> = (0..count).map(|at| (at * 37 % 500).to_string()).collect();
        json(&succeeds([
            "logprobs",
            "--model",
            directory.to_str().unwrap(),
            "--json",
            "--ids",
            &ids.join(","),
        ]))
    };
    let (long, short) = (scores(512), scores(300));
    for key in ["logprobs", "entropy"] {
        let (long, short) = (numbers(&long[key]), numbers(&short[key]));
        assert_eq!(long[..short.len()], short, "{key}");
    }
}

#[test]
fn logprobs_take_texts_from_files_and_refuse_what_does_not_fit() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().to_str().unwrap();
    write_model(directory.path());
    let (text, file) = ("Ann sees a tree.\n", directory.path().join("text"));
    fs::write(&file, text).unwrap();
    let from_file = succeeds(["logprobs", "--model", model, "--json", "--text-file", file.to_str().unwrap()]);
    let from_argument = succeeds(["logprobs", "--model", model, "--json", "--text", text]);
    assert_eq!(from_file, from_argument);
    let table = succeeds(["logprobs", "--model", model, "--text", text]);
    assert_eq!(table.lines().count(), 1 + json(&from_file)["ids"].as_array().unwrap().len());

    // More rows than are scored at a time would be beyond the positions of this model: an error, not a cut.
    let long = vec!["1"; 300].join(",");
    refuses(&rpt(["logprobs", "--model", model, "--ids", &long]), 1, &["300 tokens", "256 positions"]);
    refuses(&rpt(["logprobs", "--model", model, "--ids", "100000"]), 1, &["100000", "outside"]);
    refuses(&rpt(["logprobs", "--model", "absent", "--ids", "1"]), 1, &["absent/config.json"]);
    fs::write(&file, [0xff, 0xfe]).unwrap();
    refuses(&rpt(["logprobs", "--model", model, "--text-file", file.to_str().unwrap()]), 1, &["UTF-8"]);
}

#[test]
fn rollouts_depend_on_the_seed_alone() {
    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let sample = |more: &[&str]| {
        let model = directory.path().to_str().unwrap();
        let fixed =
            ["rollout", "--model", model, "--text", "Bob sees", "--template", "plain", "--samples", "3"];
        succeeds(fixed.iter().chain(&["--max-new-tokens", "8"]).chain(more))
    };
    let first = sample(&["--json"]);
    assert_eq!(first, sample(&["--json"]));
    assert_ne!(first, sample(&["--json", "--seed", "1"]));

    let value = json(&first);
    let replies = value["replies"].as_array().unwrap();
    assert_eq!(replies.len(), 3);
    for reply in replies {
        let logprobs = numbers(&reply["logprobs"]);
        assert_eq!(logprobs.len(), reply["tokens"].as_array().unwrap().len());
        assert!((logprobs.iter().sum::<f64>() - reply["logprob"].as_f64().unwrap()).abs() < 1e-9);
        assert!(["eos", "length"].contains(&reply["finish"].as_str().unwrap()));
    }
    let greedy = json(&sample(&["--json", "--temperature", "0"]));
    assert_eq!(greedy["replies"][0]["tokens"], greedy["replies"][2]["tokens"]);
    let people = sample(&[]);
    assert_eq!(people.matches("log-probability").count(), 3, "{people}");
}

#[test]
fn a_rollout_says_the_log_probabilities_that_logprobs_says() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().to_str().unwrap();
    write_model(directory.path());
    let text = "Dora sees the sea";
    let arguments = ["--template", "plain", "--max-new-tokens", "6", "--json"];
    let sampled = json(&succeeds(["rollout", "--model", model, "--text", text].iter().chain(&arguments)));
    let document = json(&succeeds(["logprobs", "--model", model, "--text", text, "--json"]))["ids"].clone();
    // The plain template: start token, document, think tag (id 1), reply.
    let reply = &sampled["replies"][0];
    let ids: Vec<String> = [&document, &serde_json::json!([1]), &reply["tokens"]]
        .into_iter()
        .flat_map(|ids| ids.as_array().unwrap().iter().map(ToString::to_string))
        .collect();
    let scored = json(&succeeds(["logprobs", "--model", model, "--json", "--ids", &ids.join(",")]));
    let expected = numbers(&reply["logprobs"]);
    let scored = numbers(&scored["logprobs"]);
    assert_eq!(scored[scored.len() - expected.len()..], expected, "bit for bit");
}

#[test]
fn corpora_are_inspected() {
    let directory = tempfile::tempdir().unwrap();
    let texts = texts(7);
    write_texts(&directory.path().join("a.parquet"), &texts);
    write_texts(&directory.path().join("b.parquet"), &[]);
    fs::write(directory.path().join("c.parquet"), "PAR1 not really PAR1").unwrap();
    let found = json(&succeeds(["inspect", "--json", directory.path().to_str().unwrap()]));
    assert_eq!(found["kind"], "corpus");
    assert_eq!(found["documents"], 7);
    assert_eq!(found["bytes"], texts.iter().map(String::len).sum::<usize>());
    assert_eq!(found["columns"]["text"], "Utf8");
    assert_eq!((&found["files"], &found["quarantined"]), (&3.into(), &1.into()));
    assert_eq!(found["sample"].as_array().unwrap().len(), 3);

    let glob = directory.path().join("[b].parquet");
    assert_eq!(json(&succeeds(["inspect", "--json", glob.to_str().unwrap()]))["documents"], 0);
    let people = succeeds(["inspect", directory.path().to_str().unwrap(), "--samples", "1"]);
    assert!(people.contains("documents: 7\n") && people.contains("length of the documents"), "{people}");
    let lines = directory.path().join("d.jsonl");
    fs::write(&lines, "{\"name\": 3, \"text\": \"four\"}\n\n{\"text\": \"of sixteen bytes\"}\n").unwrap();
    let found = json(&succeeds(["inspect", "--json", lines.to_str().unwrap()]));
    assert_eq!((&found["columns"]["name"], &found["listed"][0]["bytes"]), (&"JSON".into(), &58.into()));
    assert_eq!((&found["dropped"]["blank_line"], &found["lengths"]["bins"][4]), (&1.into(), &1.into()));
    let column = rpt(["inspect", directory.path().to_str().unwrap(), "--text-column", "txt"]);
    refuses(&column, 1, &["txt", "did you mean `text`?"]);
    refuses(&rpt(["inspect", "no/such/thing"]), 1, &["no/such/thing"]);
}

/// Counts follow from the workload; times are whatever they are, and phases add up to the whole.
#[test]
fn benchmarks_count_what_the_workload_says() {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().to_str().unwrap();
    write_model(directory.path());
    let bench = |what: &[&str]| {
        json(&succeeds([&["bench"], what, &["--model", model, "--rounds", "1", "--json"]].concat()))
    };
    let step = bench(&["step", "--workload", "2,60,3,4,5"]);
    assert_eq!(step["unique_tokens"], 2 * 60 + 2 * 3 * 4 * 5);
    assert_eq!(step["repeated_tokens"], 2 * 4 * (20 + 40 + 60) + 2 * 3 * 4 * 5);
    let seconds = |kind: &str| -> f64 {
        step["phases"].as_object().unwrap().values().map(|phase| phase[kind].as_f64().unwrap()).sum()
    };
    assert!((seconds("wall_seconds") - step["wall_seconds_per_step"].as_f64().unwrap()).abs() < 1e-9);
    assert!((seconds("cpu_seconds") - step["cpu_seconds_per_step"].as_f64().unwrap()).abs() < 1e-9);
    assert_eq!(step["phases"].as_object().unwrap().len(), 6);
    for key in ["gflops", "share_of_peak", "gflop_per_step", "matmul_gflops"] {
        assert!(step[key].as_f64().unwrap() > 0.0, "{key}");
    }
    let decode = bench(&["decode", "--batch", "3", "--prompt", "20", "--new", "4", "--shared"]);
    assert_eq!((&decode["batch"], &decode["shared"]), (&3.into(), &true.into()));
    assert_eq!(bench(&["train", "--documents", "2", "--length", "30"])["documents"], 2);
    let product = json(&succeeds(["bench", "matmul", "--sizes", "32,48", "--dtype", "bf16", "--json"]));
    assert_eq!((&product[1]["size"], &product[0]["dtype"]), (&48.into(), &"bf16".into()));
    assert_eq!(rpt(["bench", "step", "--model", model, "--workload", "1,2,3"]).status.code(), Some(2));
    refuses(&rpt(["bench", "step", "--model", model, "--workload", "1,256,1,2,9"]), 1, &["265 tokens"]);
}

/// Reading the cache of the Hub takes no cargo feature and no network.
#[test]
fn a_model_of_the_hub_is_found_in_the_cache_or_asked_for_with_its_place() {
    let home = tempfile::tempdir().unwrap();
    let logprobs = |model: &str| {
        let mut command = Command::new(RPT);
        command.env_clear().env("HF_HOME", home.path()).stdin(Stdio::null());
        if cfg!(feature = "hub") {
            command.env("HF_HUB_OFFLINE", "1");
        }
        command.args(["logprobs", "--ids", "1,2", "--json", "--model", model]).output().unwrap()
    };
    let reason = if cfg!(feature = "hub") { "HF_HUB_OFFLINE" } else { "without the feature `hub`" };
    let place = home.path().join("hub/models--o--n");
    let (refs, snapshots) = (place.join("refs/main"), place.join("snapshots/COMMIT"));
    let layout = ["config.json", refs.to_str().unwrap(), snapshots.to_str().unwrap()];
    refuses(
        &logprobs("hf://o/n"),
        1,
        &[&["hf://o/n@main is not in the cache", reason], &layout[..]].concat(),
    );
    for wrong in ["hf://o", "hf://o/n/config.json", "hf://../n", "hf://datasets/o/n"] {
        refuses(&logprobs(wrong), 2, &[wrong, "hf://owner/name"]);
    }

    // Put there by hand, as the hint says.
    let commit = "0123456789abcdef0123456789abcdef01234567";
    fs::create_dir_all(place.join("refs")).unwrap();
    fs::write(refs, commit).unwrap();
    let snapshot = place.join("snapshots").join(commit);
    write_model(&snapshot);
    for model in ["hf://o/n", "hf://o/n@0123456789abcdef0123456789abcdef01234567"] {
        let output = logprobs(model);
        assert!(output.status.success(), "{}", command::stderr(&output));
        assert!(command::stderr(&output).contains(commit) && command::stderr(&output).contains(reason));
        assert_eq!(json(&command::stdout(&output))["logprobs"].as_array().unwrap().len(), 1);
    }
    fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    refuses(&logprobs("hf://o/n"), 1, &["not in the cache", snapshot.to_str().unwrap()]);
}

/// Tasks of a few documents under `directory/tasks`, with the model that scored them in `directory`.
fn write_tasks(directory: &Path) {
    write_model(directory);
    let tokenizer = Tokenizer::load(&directory.join("tokenizer.json")).unwrap();
    let special = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default()).unwrap();
    let template =
        PromptTemplate::new(TemplateName::Plain, &tokenizer, &special, &ChatFormat::of(&tokenizer)).unwrap();
    let settings = TasksConfig { selection: Selection::All, min_context: 2, ..TasksConfig::default() };
    let decoder = Decoder::load(directory).unwrap();
    let builder = TaskBuilder {
        settings: &settings,
        seed: 1,
        tokenizer: &tokenizer,
        proxy: Some(&ModelProxy(&decoder)),
        proxy_header: special.bos.into_iter().collect(),
        keep_marked: false,
    };
    let documents = texts(6)
        .into_iter()
        .enumerate()
        .map(|(number, text)| Ok(Document { id: format!("document-{number}"), text, marks: Vec::new() }));
    let fingerprints = Fingerprints::of(&tokenizer, &template);
    let units = TaskUnits::open(&directory.join("tasks"), fingerprints, u64::MAX, 1).unwrap();
    let mut unit = units.start(0).unwrap();
    let counts = builder.build(documents, &mut unit.writer).unwrap();
    units.commit(unit, Vec::new(), CorpusCounts::default(), counts).unwrap();
    units.complete(&units.gather().unwrap().unwrap()).unwrap();
}

#[test]
fn tasks_are_inspected_with_their_prompt_boundary() {
    let directory = tempfile::tempdir().unwrap();
    write_tasks(directory.path());
    let tasks = directory.path().join("tasks");
    let found = json(&succeeds(["inspect", "--json", tasks.to_str().unwrap()]));
    assert_eq!((&found["kind"], &found["documents"]), (&"tasks".into(), &6.into()));
    let bins: f64 = numbers(&found["entropy"]["bins"]).iter().sum();
    assert_eq!(found["counts"]["positions"], found["positions"]);
    assert!(bins >= found["positions"].as_f64().unwrap());

    let sample = &found["sample"][0];
    let (context, truth) = (sample["context"].as_str().unwrap(), sample["truth"].as_str().unwrap());
    assert!(
        texts(1)[0].contains(&format!("{context}{truth}")),
        "the tokenizer beside the tasks is found: {sample}"
    );
    let people = succeeds(["inspect", tasks.to_str().unwrap()]);
    assert!(people.contains(&format!("{context}⟦{truth}⟧")), "{people}");
    assert!(people.contains("###"), "{people}");

    fs::write(directory.path().join("tokenizer.json"), "{}").unwrap();
    let without = json(&succeeds(["inspect", "--json", tasks.to_str().unwrap()]));
    assert!(without["sample"][0]["context"].is_array(), "another tokenizer would spell something else");
}

#[test]
fn generated_corpora_and_models_are_inspected() {
    let corpus =
        json(&succeeds(["inspect", "--json", concat!(env!("CARGO_MANIFEST_DIR"), "/corpora/quickstart")]));
    assert_eq!(corpus["kind"], "generated_corpus");
    assert_eq!(corpus["sample"].as_array().unwrap().len(), 3);

    let directory = tempfile::tempdir().unwrap();
    write_model(directory.path());
    let model = json(&succeeds(["inspect", "--json", directory.path().to_str().unwrap()]));
    assert_eq!(model["kind"], "model");
    assert_eq!(model["dtype"]["F32"], model["parameters"], "every parameter is one f32 in the file");
    assert_eq!(model["config"]["hidden_size"], 48);
    assert_eq!(model["tokenizer"]["eos"], "<|end|>");
    fs::write(directory.path().join("model.safetensors"), [1; 9]).unwrap();
    let damaged = rpt(["inspect", directory.path().to_str().unwrap()]);
    assert_eq!(damaged.status.code(), Some(1));
}

#[test]
fn a_run_directory_is_inspected_from_its_files() {
    let directory = tempfile::tempdir().unwrap();
    let checkpoint = directory.path().join("checkpoints/train/step-000002");
    fs::create_dir_all(&checkpoint).unwrap();
    fs::write(directory.path().join("pipeline.toml"), PIPELINE).unwrap();
    let metrics = "{\"stage\":\"pretrain\",\"step\":9}\n{\"stage\":\"train\",\"step\":2}\n{\"stage\":";
    fs::write(directory.path().join("metrics.jsonl"), metrics).unwrap();
    let manifest = r#"{"step":2,"identity":"x","files":[{"name":"a","bytes":3},{"name":"b","bytes":4}]}"#;
    fs::write(checkpoint.join("manifest.json"), manifest).unwrap();
    let run = json(&succeeds(["inspect", "--json", directory.path().to_str().unwrap()]));
    assert_eq!(run["stage"], "train");
    assert_eq!((&run["steps"]["pretrain"], &run["steps"]["train"]), (&9.into(), &2.into()));
    assert_eq!(run["unreadable_metrics_lines"], 1);
    assert_eq!(run["checkpoints"][0], checkpoint.to_str().unwrap());
    assert_eq!(run["pipeline"]["train"]["steps"], 3);
    let found = json(&succeeds(["inspect", "--json", checkpoint.to_str().unwrap()]));
    assert_eq!((&found["step"], &found["bytes"]), (&2.into(), &7.into()));
}

#[test]
fn the_schema_knows_every_section_and_completions_know_every_command() {
    let schema: Value = serde_json::from_str(&succeeds(["schema"])).unwrap();
    for section in ["corpus", "tokenizer", "model", "tasks", "rollout", "reward", "train", "eval", "run"] {
        assert!(schema["properties"][section].is_object(), "{section}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let script = succeeds(["completions", shell]);
        assert!(COMMANDS.iter().all(|command| script.contains(command)), "{shell}");
    }
}

#[test]
fn a_closed_pipe_is_no_failure_and_a_full_disk_is_one() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(RPT).arg("schema").stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty());

    let Ok(full) = OpenOptions::new().write(true).open("/dev/full") else { return };
    let output =
        Command::new(RPT).arg("schema").stdout::<File>(full).stderr(Stdio::piped()).output().unwrap();
    refuses(&output, 1, &["standard output", "No space left", "free some space"]);
}

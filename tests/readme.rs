//! The documents say what is true: every path, test, command, default and pipeline that they name.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/command.rs"]
mod command;

use command::{rpt, stderr, stdout, succeeds};
use rpt::config::{Pipeline, load, parse};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

const DOCUMENTS: [&str; 4] = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "benches/RESULTS.md"];
/// Where files of the repository lie: what starts so is one of their paths.
const ROOTS: [&str; 6] = ["src/", "tests/", "pipelines/", "corpora/", "benches/", ".ci/"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn document(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap()
}

/// Words between white space and marks that cannot be part of a path.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c.is_whitespace() || "`()[]|,;\"".contains(c))
        .map(|word| word.trim_end_matches(['.', ':']))
        .filter(|word| !word.is_empty())
}

/// Code in single backquotes, outside of fences.
fn code_spans(text: &str) -> Vec<&str> {
    let prose = text.split("```").step_by(2);
    prose.flat_map(|part| part.split('`').skip(1).step_by(2)).collect()
}

/// The fenced blocks of a language.
fn blocks<'a>(text: &'a str, language: &str) -> Vec<&'a str> {
    let fenced = text.split("```").skip(1).step_by(2);
    fenced.filter_map(|block| block.strip_prefix(language)?.strip_prefix('\n')).collect()
}

/// Whether a source file, or one in a directory of its name, has a function of this name.
fn has_function(stem: &Path, name: &str) -> bool {
    let of_file =
        |path: &Path| fs::read_to_string(path).is_ok_and(|text| text.contains(&format!("fn {name}(")));
    let in_directory = fs::read_dir(stem)
        .is_ok_and(|entries| entries.filter_map(Result::ok).any(|entry| of_file(&entry.path())));
    of_file(&stem.with_extension("rs")) || in_directory
}

#[test]
fn every_path_in_the_documents_exists() {
    let mut found = 0;
    for name in DOCUMENTS {
        let text = document(name);
        let links = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        // Pictures in docs/ are made from a run.
        let files = links.filter(|link| !["http", "#", "docs/"].iter().any(|start| link.starts_with(start)));
        let paths = words(&text)
            .filter(|word| ROOTS.iter().any(|root| word.starts_with(root)) && !word.contains('*'));
        let place = root().join(name);
        let beside = files.map(|file| (file, place.with_file_name(file)));
        for (path, there) in beside.chain(paths.map(|path| (path, root().join(path)))) {
            assert!(there.exists(), "{name} names {path}, which does not exist");
            found += 1;
        }
    }
    assert!(found > 40, "{found}");
}

#[test]
fn every_test_in_the_architecture_exists() {
    let text = document("ARCHITECTURE.md");
    let tests: Vec<&str> = code_spans(&text).into_iter().filter(|span| span.contains("::")).collect();
    assert!(tests.len() > 30, "{tests:?}");
    for test in tests {
        let (file, name) = test.rsplit_once("::").unwrap();
        let file: PathBuf = file.split("::").collect();
        let known = ["tests", "src"].iter().any(|top| has_function(&root().join(top).join(&file), name));
        assert!(known, "ARCHITECTURE.md names {test}, which does not exist");
    }
}

#[test]
fn every_room_is_in_the_architecture() {
    let text = document("ARCHITECTURE.md");
    for entry in fs::read_dir(root().join("src")).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        assert!(!entry.path().is_dir() || text.contains(&format!("| `src/{name}` |")), "no room {name}");
    }
}

#[test]
fn the_readme_and_the_program_know_the_same_commands() {
    let readme = document("README.md");
    let named = code_spans(&readme).into_iter().filter_map(|span| span.strip_prefix("rpt "));
    let named: BTreeSet<&str> = named.filter_map(|rest| rest.split(' ').next()).collect();
    let help = succeeds(["--help"]);
    let list = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    // Lines that go on with a description are indented further.
    let starts =
        list.lines().filter_map(|line| line.strip_prefix("  ")).filter(|line| !line.starts_with(' '));
    let commands = starts.filter_map(|line| line.split(' ').next()).filter(|name| *name != "help");
    let commands: BTreeSet<&str> = commands.collect();
    assert_eq!(named, commands);
}

/// The README's whole pipeline file shows every key; all but the required ones have their default.
#[test]
fn the_defaults_in_the_readme_are_those_of_the_program() {
    const REQUIRED: &str = r#"
        corpus = { source = "data" }
        tokenizer.train = { vocab_size = 8192 }
        pretrain = { steps = 3000, documents_per_step = 8 }
        cold_start = { steps = 200, traces_per_step = 32 }
        train = {}
        eval = {}
        [model.scratch]
        hidden_size = 64
        num_hidden_layers = 2
        num_attention_heads = 4
        intermediate_size = 128
    "#;
    let readme = document("README.md");
    let [own, whole] = blocks(&readme, "toml")[..] else { panic!("two pipeline files") };
    parse(own, "README.md", &[]).unwrap();
    let whole = parse(whole, "README.md", &[]).unwrap();
    assert_eq!(whole, parse(REQUIRED, "the required keys", &[]).unwrap());
}

#[test]
fn the_readme_shows_every_key_of_the_pipeline_file() {
    let readme = document("README.md");
    let block = blocks(&readme, "toml")[1];
    let schema: serde_json::Value = serde_json::from_str(&succeeds(["schema"])).unwrap();
    let definitions = schema["$defs"].as_object().unwrap().values().chain([&schema]);
    let keys: BTreeSet<&String> = definitions
        .filter_map(|definition| definition["properties"].as_object())
        .flat_map(|properties| properties.keys())
        .collect();
    assert!(keys.len() > 80, "{keys:?}");
    let shown: BTreeSet<&str> = block.split(|c: char| !(c.is_alphanumeric() || c == '_')).collect();
    for key in keys {
        assert!(shown.contains(key.as_str()), "README.md does not show {key}");
    }
}

/// Whether the files that a dry run reads, and the corpus, are here.
fn inputs_exist(pipeline: &Pipeline) -> bool {
    let files = [&pipeline.model.path, &pipeline.tokenizer.path, &pipeline.tasks.proxy];
    files.into_iter().flatten().chain([&PathBuf::from(&pipeline.corpus.source)]).all(|path| path.exists())
}

#[test]
fn every_pipeline_that_comes_along_can_be_planned() {
    // Cargo runs tests in the root of the repository, where pipelines expect to be run.
    for entry in fs::read_dir("pipelines").unwrap().map(Result::unwrap) {
        let path = entry.path();
        let loaded = load(&path, &[]).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if !inputs_exist(&loaded.pipeline) {
            eprintln!("SKIPPED: the inputs of {} are not here; only its keys are checked", path.display());
            continue;
        }
        let planned = rpt(["plan", path.to_str().unwrap()]);
        assert!(planned.status.success(), "{}: {}", path.display(), stderr(&planned));
        assert!(stdout(&planned).starts_with(&format!("run {}", loaded.name)));
    }
}

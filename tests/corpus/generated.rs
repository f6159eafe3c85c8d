//! The generated quickstart corpus, checked from its files and its text alone.

use super::{config, fs, read_all, texts};
use rpt::config::CorpusConfig;
use rpt::corpus::generated::{Generated, Recipe, Storyteller, generate};
use rpt::corpus::{CorpusError, Document, generated_recipe, read_traces};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn quickstart() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/corpora/quickstart"))
}

fn documents(path: &Path) -> Vec<Document> {
    let config = CorpusConfig { id_column: Some("id".into()), ..config(path) };
    let (documents, counts) = read_all(&config).unwrap();
    assert!(counts.dropped.is_empty() && counts.quarantined_total == 0);
    documents
}

fn files(generated: &Generated) -> [&Path; 5] {
    let Generated { train, tasks, heldout, traces, clean_traces, .. } = generated;
    [train, tasks, heldout, traces, clean_traces]
}

/// The chain that a report asks about, found from the text alone by following its map.
fn walked(text: &str) -> Option<Vec<&str>> {
    let (map, rest) = text.split_once(": ").unwrap().1.split_once('.').unwrap();
    let lines: BTreeMap<&str, &str> = map.split(", ").map(|pair| pair.split_once(' ').unwrap()).collect();
    let mut chain = vec![rest.split_once(" gets on at ")?.1.split_once(' ').unwrap().0];
    while let Some(next) = lines.get(chain[chain.len() - 1]) {
        chain.push(next);
    }
    Some(chain)
}

#[test]
fn the_quickstart_corpus_is_what_its_readme_says() {
    let directory = TempDir::new().unwrap();
    let generated = generate(&quickstart(), 0, directory.path()).unwrap();
    let train = documents(&generated.train);
    let heldout = documents(&generated.heldout);

    // Kinds, in reading order.
    let kinds: Vec<_> = train.iter().map(|document| document.id.split('-').next().unwrap()).collect();
    assert_eq!(train.len(), 44_000);
    assert!(kinds[..14_520].iter().all(|kind| *kind == "small"));
    let reports = kinds[14_520..].iter().filter(|kind| **kind == "report").count();
    assert!((14_300..15_200).contains(&reports), "{reports}");
    assert!(train.iter().enumerate().all(|(index, document)| document.id.ends_with(&format!("-{index}"))));
    let tasks: Vec<_> = train.iter().filter(|document| document.id.starts_with("report-")).cloned().collect();
    assert_eq!(documents(&generated.tasks), tasks);

    // Every answer is where its chain ends, chains have the lengths promised, maps their sizes.
    let pairs = |text: &str| 1 + text.split('.').next().unwrap().matches(',').count();
    let mut asked = BTreeSet::new();
    for (index, document) in train.iter().enumerate() {
        let pairs = pairs(&document.text);
        assert!(pairs <= if index < 14_520 { 5 + index * 12 / 14_520 } else { 17 }, "{}", document.id);
        let chain = walked(&document.text);
        assert_eq!(chain.is_none(), document.id.starts_with("rides-"));
        if let Some(chain) = chain {
            assert!(document.text.ends_with(&format!(" sees the {}.", chain[chain.len() - 1])));
            assert!((2..=7).contains(&chain.len()));
            asked.insert(chain);
        }
    }

    // Held out: balanced, marked at the answer, no chain that training asks about.
    let mut lengths = BTreeMap::new();
    for document in &heldout {
        let chain = walked(&document.text).unwrap();
        let [mark] = &document.marks[..] else { panic!("{document:?}") };
        assert_eq!(mark.label, (chain.len() - 1).to_string());
        assert_eq!(&document.text[mark.offset as usize..], format!(" {}.", chain[chain.len() - 1]));
        assert!(pairs(&document.text) <= 17);
        assert!(!asked.contains(&chain), "{chain:?} is asked in training too");
        *lengths.entry(mark.label.clone()).or_insert(0) += 1;
    }
    assert_eq!(lengths, (1..=8).map(|length| (length.to_string(), 100)).collect());
    let train: BTreeSet<_> = train.iter().map(|document| &document.text).collect();
    assert!(heldout.iter().all(|document| !train.contains(&document.text)));
}

#[test]
fn traces_walk_the_chain_and_predict_where_it_ends() {
    let directory = TempDir::new().unwrap();
    let generated = generate(&quickstart(), 3, directory.path()).unwrap();
    let train: BTreeSet<_> = texts(&config(&generated.train)).into_iter().collect();
    let read = |path: &Path| read_traces(path.to_str().unwrap()).unwrap();
    let (traces, clean) = (read(&generated.traces), read(&generated.clean_traces));
    assert_eq!((traces.len(), clean.len()), (1333, 1333));
    let mut right = 0;
    for (trace, clean) in traces.iter().zip(&clean) {
        assert!(train.contains(&trace.text));
        assert_eq!((&trace.text, trace.offset, &trace.label), (&clean.text, clean.offset, &clean.label));
        let rest = &trace.text[trace.offset as usize..];
        assert!(rest.starts_with(&clean.prediction));
        let Some(label) = &trace.label else {
            assert!(trace.thought.is_empty() && trace.offset > 0);
            assert_eq!(trace, clean);
            let answered = trace.text[..trace.offset as usize].ends_with(" sees the");
            assert!(!answered, "an empty thought at an answer");
            continue;
        };
        let chain = walked(&trace.text).unwrap();
        assert_eq!(clean.thought, format!(" at {}", chain.join(" ")));
        assert_eq!(label.parse(), Ok(chain.len() - 1));
        assert!(chain.len() <= 4);
        assert!(trace.thought.ends_with(&trace.prediction));
        assert_eq!(trace.thought.split(' ').count(), chain.len() + 2);
        right += usize::from(trace.prediction == clean.prediction);
    }
    assert!((770..860).contains(&right), "{right} of 1000 predictions are right");
    assert_eq!(traces.iter().filter(|trace| trace.label.is_none()).count(), 333);
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_other_text() {
    let [first, again, other] = [11, 11, 12].map(|seed| {
        let directory = TempDir::new().unwrap();
        let generated = generate(&quickstart(), seed, directory.path()).unwrap();
        let bytes = files(&generated).map(|path| fs::read(path).unwrap());
        let names = fs::read_dir(directory.path()).unwrap().count();
        assert_eq!(names, 5, "temporary files are left");
        (bytes, texts(&config(&generated.train)))
    });
    assert!(first.0 == again.0);
    assert!(first.1.iter().zip(&other.1).all(|(a, b)| a != b));
}

#[test]
fn no_seed_mixes_the_sides_of_the_split() {
    let recipe = Recipe::load(&quickstart().join("corpus.toml")).unwrap();
    let asked = |text: &str| walked(text).map(|chain| chain.join(" "));
    let (mut training, mut held_out) = (BTreeSet::new(), BTreeSet::new());
    for seed in 0..5 {
        let teller = Storyteller::new(&recipe, seed);
        for index in 0..2000 {
            training.extend(asked(&teller.training(index * 12).unwrap().text));
            held_out.extend(asked(&teller.held_out(index).unwrap().text));
        }
    }
    assert!(training.is_disjoint(&held_out));
}

#[test]
fn recipes_that_cannot_work_are_refused() {
    let directory = TempDir::new().unwrap();
    let good = fs::read_to_string(quickstart().join("corpus.toml")).unwrap();
    let refusal = |from: &str, to: &str| {
        assert!(good.contains(from));
        fs::write(directory.path().join("corpus.toml"), good.replacen(from, to, 1)).unwrap();
        let error = generate(directory.path(), 0, &directory.path().join("out")).unwrap_err();
        assert!(matches!(error, CorpusError::Recipe { .. }) && error.hint().is_some());
        error.to_string()
    };
    assert!(refusal("told_rides", "told_ridez").contains("told_ridez"));
    assert!(refusal("max_pairs = 17", "max_pairs = 29").contains("between 5 and 28"));
    assert!(refusal("longest_chain = 8", "longest_chain = 14").contains("held_out.longest_chain"));
    assert!(refusal("error_rate = 0.2", "error_rate = nan").contains("traces.error_rate"));
    assert!(refusal("\"Oslo\"", "\"Oslo City\"").contains("single word"));
    assert!(refusal("\"Oslo\"", "\"zoo\"").contains("listed twice"));
    assert!(refusal("documents = 44_000", "documents = 2_000").contains("report stories"));
}

#[test]
fn only_a_directory_with_a_recipe_is_a_generated_corpus() {
    let quickstart = quickstart();
    assert_eq!(generated_recipe(quickstart.to_str().unwrap()), Some(quickstart.clone()));
    assert_eq!(generated_recipe(quickstart.join("corpus.toml").to_str().unwrap()), None);
    assert_eq!(generated_recipe("nowhere"), None);
}

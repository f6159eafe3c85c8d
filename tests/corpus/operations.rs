//! What happens to documents between their files and their readers.

use super::{config, plain, read_all, row_groups, strings, texts, write};
use proptest::prelude::*;
use rpt::config::{CorpusConfig, Decontamination, Deduplication, MixtureSource, Normalization};
use rpt::corpus::{Corpus, CorpusError, Document, DuplicateSearch};
use rpt::random::Stream;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::path::Path;
use tempfile::TempDir;

/// Sentences of words from a small vocabulary; different numbers give different ones.
fn sentence(number: u64, words: u64) -> String {
    let stream = Stream::new(number, "sentence");
    let word = |n: u64| format!("w{}", stream.below(n, 2000));
    (0..words).map(word).collect::<Vec<_>>().join(" ")
}

fn corpus_of(texts: &[String], rows: usize) -> (TempDir, CorpusConfig) {
    let directory = tempfile::tempdir().unwrap();
    for (number, part) in texts.chunks(texts.len().div_ceil(3).max(1)).enumerate() {
        let path = directory.path().join(format!("part-{number}.parquet"));
        write(&path, vec![("text", strings(part))], row_groups(rows));
    }
    let config = config(directory.path());
    (directory, config)
}

/// Finds duplicates as several workers would, the last units first.
fn deduplicated(config: &CorpusConfig, unit_bytes: u64, root: &Path) -> Result<Corpus, CorpusError> {
    let corpus = Corpus::open(config)?;
    let settings = config.deduplicate.clone().unwrap();
    let search = DuplicateSearch::open(&corpus, &settings, unit_bytes, root)?;
    for unit in (0..search.units()).rev() {
        search.find_keys(unit, || Ok::<(), CorpusError>(()))?;
    }
    let partitions = search.partitions()?;
    (0..partitions).rev().try_for_each(|number| search.compare(number, partitions))?;
    Ok(corpus.without(search.finish(partitions)))
}

fn all(corpus: &Corpus) -> Vec<Document> {
    corpus.documents().map(Result::unwrap).collect()
}

#[test]
fn bounds_drop_short_and_long_documents_and_count_them() {
    let (_place, config) = corpus_of(&["a", "bb", "ccc", "dddd", "eeeee"].map(String::from), 10);
    let (documents, counts) = read_all(&CorpusConfig { min_bytes: 2, max_bytes: Some(4), ..config }).unwrap();
    assert_eq!(documents.iter().map(|document| &*document.text).collect::<Vec<_>>(), ["bb", "ccc", "dddd"]);
    assert_eq!(counts.dropped, BTreeMap::from([("too_short".into(), 1), ("too_long".into(), 1)]));
}

#[test]
fn a_normal_form_is_taken_only_where_it_is_asked_for() {
    let (_place, config) = corpus_of(&["e\u{301}t\u{301} \u{fb01}n".into(), "plain ½".into()], 10);
    let of = |normalization| texts(&CorpusConfig { normalization, ..config.clone() });
    assert_eq!(of(None), ["e\u{301}t\u{301} \u{fb01}n", "plain ½"]);
    assert_eq!(of(Some(Normalization::Nfc)), ["ét\u{301} \u{fb01}n", "plain ½"]);
    assert_eq!(of(Some(Normalization::Nfkc)), ["ét\u{301} fin", "plain 1\u{2044}2"]);
}

#[test]
fn a_rate_draws_the_same_documents_wherever_the_corpus_lies() {
    let written: Vec<String> = (0..6000).map(|n| sentence(n, 3)).collect();
    let ((_a, here), (_b, there)) = (corpus_of(&written, 1000), corpus_of(&written, 77));
    let of = |config: &CorpusConfig, rate, seed| {
        let config = CorpusConfig { rate: Some(rate), seed: Some(seed), ..config.clone() };
        read_all(&config).unwrap()
    };
    let (tenth, counts) = of(&here, 0.1, 1);
    assert!((500..700).contains(&tenth.len()), "{}", tenth.len());
    assert_eq!(counts.dropped["not_drawn"] as usize + tenth.len(), 6000);
    assert_eq!(tenth, of(&there, 0.1, 1).0);
    assert_ne!(tenth, of(&here, 0.1, 2).0);
    // A higher rate adds documents and takes none away.
    let half: HashSet<String> = of(&here, 0.5, 1).0.into_iter().map(|document| document.id).collect();
    assert!(tenth.iter().all(|document| half.contains(&document.id)));
    assert_eq!(of(&here, 1.0, 1).0.len(), 6000);
}

#[test]
fn a_mixture_keeps_its_weights_and_its_sources_their_columns() {
    let place = tempfile::tempdir().unwrap();
    let (small, large) = (place.path().join("small/x.parquet"), place.path().join("large/x.parquet"));
    let few: Vec<String> = (0..1000).map(|n| sentence(n, 50)).collect();
    let many: Vec<String> = (0..20_000).map(|n| sentence(10_000 + n, 20)).collect();
    write(&small, vec![("body", strings(&few))], plain());
    write(&large, vec![("text", strings(&many))], row_groups(1000));
    let source = |path: &Path, weight, column: Option<&str>| MixtureSource {
        source: path.parent().unwrap().to_str().unwrap().into(),
        rate: None,
        weight,
        text_column: column.map(Into::into),
        id_column: None,
    };
    let mixture = |a, b| {
        let sources = [("a", source(&small, a, Some("body"))), ("b", source(&large, b, None))];
        let mixture = sources.map(|(name, source)| (name.to_owned(), source)).into();
        read_all(&CorpusConfig { mixture, ..CorpusConfig::new("") }).unwrap().0
    };
    assert_eq!(mixture(None, None).len(), 21_000);
    let drawn = mixture(Some(2.0), Some(1.0));
    let bytes = |name: &str| -> usize {
        let of = drawn.iter().filter(|document| document.id.starts_with(&format!("{name}/x.parquet:")));
        of.map(|document| document.text.len()).sum()
    };
    assert_eq!(bytes("a"), few.iter().map(String::len).sum::<usize>());
    let ratio = bytes("a") as f64 / bytes("b") as f64;
    assert!((1.85..2.15).contains(&ratio), "{ratio}");
}

#[test]
fn documents_that_share_a_run_of_words_with_held_out_text_are_left_out() {
    let place = tempfile::tempdir().unwrap();
    let held_out = place.path().join("held-out.parquet");
    write(&held_out, vec![("question", strings(&[sentence(1, 40), sentence(2, 12)]))], plain());
    let words: Vec<String> = sentence(1, 40).split(' ').map(str::to_uppercase).collect();
    let repeated = format!("Before it: “{}”; and after.", words[20..33].join(", "));
    let nearly = format!("before {} after", words[20..32].join(" "));
    let (_place, config) = corpus_of(&[repeated, nearly.clone(), sentence(2, 12), sentence(3, 90)], 10);
    let settings = Decontamination {
        source: Some(held_out.display().to_string()),
        text_column: Some("question".into()),
        ..Decontamination::default()
    };
    let config = CorpusConfig { decontaminate: Some(settings), ..config };
    let (documents, counts) = read_all(&config).unwrap();
    let kept: Vec<String> = documents.into_iter().map(|document| document.text).collect();
    assert_eq!(kept, [nearly, sentence(2, 12), sentence(3, 90)]);
    assert_eq!(counts.dropped, BTreeMap::from([("in_held_out_text".into(), 1)]));
    let before = Corpus::open(&config).unwrap().fingerprint().unwrap();
    write(&held_out, vec![("question", strings(&[sentence(7, 40)]))], plain());
    assert_ne!(before, Corpus::open(&config).unwrap().fingerprint().unwrap());
}

#[test]
fn held_out_text_that_is_not_there_is_an_error() {
    let (_place, config) = corpus_of(&[sentence(1, 5)], 10);
    let settings = Decontamination { source: Some("/nowhere/eval".into()), ..Decontamination::default() };
    let error = Corpus::open(&CorpusConfig { decontaminate: Some(settings), ..config }).unwrap_err();
    assert!(matches!(error, CorpusError::Missing { .. }), "{error}");
}

/// Documents of which many repeat an earlier one.
fn repeating(count: u64, different: u64) -> Vec<String> {
    let stream = Stream::new(4, "repeating");
    (0..count).map(|n| sentence(stream.below(n, different), 12)).collect()
}

/// The first of every text, by its place.
fn first_ones(texts: &[String]) -> Vec<String> {
    let mut seen = HashSet::new();
    texts.iter().filter(|text| seen.insert(text.as_str())).cloned().collect()
}

#[test]
fn the_first_document_of_each_text_stays_however_the_work_is_cut() {
    let written = repeating(5000, 1500);
    let (_place, config) = corpus_of(&written, 100);
    let config = CorpusConfig { deduplicate: Some(Deduplication::default()), ..config };
    for unit_bytes in [1, 20_000, u64::MAX] {
        let root = tempfile::tempdir().unwrap();
        let corpus = deduplicated(&config, unit_bytes, root.path()).unwrap();
        let mut documents = corpus.documents();
        let kept: Vec<String> = documents.by_ref().map(|document| document.unwrap().text).collect();
        assert_eq!(kept, first_ones(&written), "{unit_bytes}");
        assert_eq!(documents.counts().dropped["duplicate"] as usize, written.len() - kept.len());
        let units = corpus.units(30_000);
        let apart: Vec<String> = units
            .iter()
            .flat_map(|unit| corpus.documents_of(unit))
            .map(|document| document.unwrap().text)
            .collect();
        assert_eq!(apart, kept);
    }
}

#[test]
fn a_limit_counts_documents_before_duplicates_are_left_out() {
    let written = repeating(500, 50);
    let (_place, config) = corpus_of(&written, 100);
    let deduplicate = Some(Deduplication::default());
    let config = CorpusConfig { deduplicate, max_documents: Some(90), ..config };
    let root = tempfile::tempdir().unwrap();
    let kept = all(&deduplicated(&config, 1 << 20, root.path()).unwrap());
    let kept: Vec<String> = kept.into_iter().map(|document| document.text).collect();
    assert_eq!(kept, first_ones(&written[..90]));
}

#[test]
fn what_is_not_read_makes_nothing_a_duplicate() {
    let written: Vec<String> = repeating(3000, 300);
    let (_place, config) = corpus_of(&written, 100);
    let config = CorpusConfig { rate: Some(0.2), ..config };
    let drawn = texts(&config);
    let root = tempfile::tempdir().unwrap();
    let config = CorpusConfig { deduplicate: Some(Deduplication::default()), ..config };
    let kept = all(&deduplicated(&config, 20_000, root.path()).unwrap());
    assert_eq!(kept.into_iter().map(|document| document.text).collect::<Vec<_>>(), first_ones(&drawn));
}

/// The share of runs of five words that two texts have in common.
fn jaccard(a: &str, b: &str) -> f64 {
    let runs = |text: &str| -> BTreeSet<Vec<String>> {
        let words: Vec<String> = text.split(' ').map(Into::into).collect();
        words.windows(5).map(<[String]>::to_vec).collect()
    };
    let (a, b) = (runs(a), runs(b));
    a.intersection(&b).count() as f64 / a.union(&b).count() as f64
}

#[test]
fn near_duplicates_are_those_that_share_most_runs_of_words() {
    let stream = Stream::new(9, "edits");
    let edited = |n: u64| {
        let mut words: Vec<String> = sentence(n / 3, 200).split(' ').map(Into::into).collect();
        // None, a few or very many words of the same sentence are others.
        for edit in 0..[0, 1, 60][n as usize % 3] {
            let at = stream.child(n).below(edit, 200) as usize;
            words[at] = format!("edit{n}x{edit}");
        }
        words.join(" ")
    };
    let written: Vec<String> = (0..600).map(edited).collect();
    let (_place, config) = corpus_of(&written, 50);
    let settings = Deduplication { exact: true, near: true, ..Deduplication::default() };
    let config = CorpusConfig { deduplicate: Some(settings), ..config };
    let root = tempfile::tempdir().unwrap();
    let corpus = deduplicated(&config, 30_000, root.path()).unwrap();
    let kept: HashSet<String> = all(&corpus).into_iter().map(|document| document.text).collect();
    let (mut missed, mut close) = (0, 0);
    for (number, text) in written.iter().enumerate() {
        let nearest = written[..number].iter().map(|earlier| jaccard(earlier, text)).fold(0.0, f64::max);
        assert!(nearest > 0.45 || kept.contains(text), "dropped at {nearest}");
        close += u32::from(nearest > 0.9);
        missed += u32::from(nearest > 0.9 && kept.contains(text));
    }
    assert!(close >= 190 && missed <= 1, "missed {missed} of {close}");
}

#[test]
fn streams_restart_exactly_with_all_operations_on() {
    let written: Vec<String> = (0..2000).map(|n| sentence(n % 900, 3 + n % 900 % 40)).collect();
    let (_place, config) = corpus_of(&written, 64);
    let held_out = tempfile::tempdir().unwrap();
    write(&held_out.path().join("x.parquet"), vec![("text", strings(&written[50..60]))], plain());
    let decontaminate =
        Decontamination { source: Some(held_out.path().display().to_string()), ..Decontamination::default() };
    let config = CorpusConfig {
        rate: Some(0.7),
        max_bytes: Some(200),
        normalization: Some(Normalization::Nfc),
        deduplicate: Some(Deduplication { near: true, ..Deduplication::default() }),
        decontaminate: Some(decontaminate),
        ..config
    };
    let root = tempfile::tempdir().unwrap();
    let corpus = deduplicated(&config, 10_000, root.path()).unwrap();
    let whole = all(&corpus);
    assert!(whole.len() > 300 && whole.len() < 1000, "{}", whole.len());
    proptest!(ProptestConfig::with_cases(40), |(cut in 0..whole.len())| {
        let mut stream = corpus.documents();
        let mut read: Vec<_> = stream.by_ref().take(cut).map(Result::unwrap).collect();
        read.extend(corpus.documents_from(stream.cursor()).map(Result::unwrap));
        prop_assert_eq!(&read, &whole);
    });
}

#[test]
fn a_damaged_file_of_keys_is_named() {
    let (_place, config) = corpus_of(&repeating(100, 20), 100);
    let config = CorpusConfig { deduplicate: Some(Deduplication::default()), ..config };
    let root = tempfile::tempdir().unwrap();
    deduplicated(&config, 1 << 20, root.path()).unwrap();
    let directory = fs::read_dir(root.path()).unwrap().next().unwrap().unwrap().path();
    let keys = directory.join("unit-00000.keys");
    let bytes = fs::read(&keys).unwrap();
    fs::write(&keys, &bytes[..bytes.len() / 2]).unwrap();
    let corpus = Corpus::open(&config).unwrap();
    let search = DuplicateSearch::open(&corpus, &Deduplication::default(), 1 << 20, root.path()).unwrap();
    let error = search.partitions().unwrap_err().to_string();
    assert!(error.contains("unit-00000.keys") && error.contains("delete it"), "{error}");
}

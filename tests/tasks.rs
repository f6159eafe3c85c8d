//! From documents to an endless stream of tasks.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout, missing_docs)]

use proptest::prelude::*;
use rpt::Error;
use rpt::config::{RewardConfig, Selection, TasksConfig, TemplateName, TokenizerConfig};
use rpt::corpus::{CorpusCounts, Document, Mark};
use rpt::reward::{self, Outcome, Verifier};
use rpt::tasks::{
    ChatFormat, ComparedProxies, Fingerprints, KeptScores, Manifest, Position, PositionScore, PromptTemplate,
    Proxy, ShardWriter, Task, TaskBuilder, TaskCounts, TaskCursor, TaskDocument, TaskShards, TaskStream,
    TaskUnits, TasksError, Truth,
};
use rpt::tokenize::{SpecialTokens, Tokenizer, train_byte_level_bpe};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

const TEXT: &str = "The quick brown fox jumps over the lazy dog, and then the dog chases the fox.";

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| train_byte_level_bpe(std::iter::repeat_n(TEXT.to_owned(), 9), 320).unwrap())
}

fn fingerprints() -> Fingerprints {
    Fingerprints { tokenizer: "tokenizer".into(), template: "template".into() }
}

/// A proxy whose entropy grows with the index in a piece, and which remembers what it was asked.
#[derive(Default)]
struct Ramp {
    step: f32,
    asked: Mutex<Vec<Vec<u32>>>,
}

impl Proxy for Ramp {
    fn score(&self, pieces: &[Vec<u32>], _top_k: usize) -> Result<Vec<Vec<PositionScore>>, Error> {
        self.asked.lock().unwrap().extend_from_slice(pieces);
        let score = |index: usize| PositionScore {
            entropy: index as f32 * self.step,
            truth_probability: 0.25,
            proxy_top: index as u32,
            larger_truth_probability: None,
        };
        Ok(pieces.iter().map(|piece| (0..piece.len()).map(score).collect()).collect())
    }
}

fn document(id: &str, text: &str) -> Document {
    Document { id: id.into(), text: text.into(), marks: Vec::new() }
}

fn settings() -> TasksConfig {
    TasksConfig { min_context: 4, positions_per_document: 3, ..TasksConfig::default() }
}

struct Built {
    directory: tempfile::TempDir,
    manifest: Manifest,
}

impl Built {
    fn shards(&self) -> TaskShards {
        TaskShards::open(self.directory.path(), &fingerprints()).unwrap()
    }

    fn documents(&self) -> Vec<TaskDocument> {
        let shards = self.shards();
        (0..shards.documents()).map(|row| shards.document(row).unwrap()).collect()
    }
}

fn try_build(
    settings: &TasksConfig,
    keep_marked: bool,
    proxy: &Ramp,
    documents: &[Document],
) -> Result<Built, Error> {
    let directory = tempfile::tempdir().unwrap();
    let builder = TaskBuilder {
        settings,
        seed: 7,
        tokenizer: tokenizer(),
        proxy: Some(proxy),
        proxy_header: vec![0],
        keep_marked,
    };
    let manifest = build_units(&builder, directory.path(), &[documents])?;
    Ok(Built { directory, manifest })
}

/// Builds one unit of each list of documents.
fn build_units(
    builder: &TaskBuilder<'_>,
    directory: &Path,
    parts: &[&[Document]],
) -> Result<Manifest, Error> {
    let units = TaskUnits::open(directory, fingerprints(), builder.settings.shard_bytes, parts.len())?;
    for (number, documents) in parts.iter().enumerate() {
        assert!(units.gather()?.is_none());
        let mut unit = units.start(number)?;
        let counts = builder.build(documents.iter().cloned().map(Ok), &mut unit.writer)?;
        units.commit(unit, Vec::new(), CorpusCounts::default(), counts)?;
    }
    let manifest = units.gather()?.unwrap();
    units.complete(&manifest)?;
    Ok(manifest)
}

fn build(settings: &TasksConfig, documents: &[Document]) -> Built {
    try_build(settings, false, &Ramp { step: 0.1, ..Ramp::default() }, documents).unwrap()
}

/// Every token is a position or has a reason why not.
fn assert_balance(counts: &TaskCounts) {
    let d = &counts.dropped;
    let reasons = d.tokens_before_min_context
        + d.tokens_below_min_entropy
        + d.tokens_above_max_entropy
        + d.tokens_not_drawn
        + d.tokens_over_document_limit
        + d.tokens_not_finite;
    assert_eq!(counts.tokens, counts.positions + reasons, "{counts:?}");
}

#[test]
fn positions_have_the_proxy_s_scores_and_lie_in_the_band() {
    let built = build(&settings(), &[document("a", TEXT), document("empty", ""), document("short", "The")]);
    let documents = built.documents();
    assert_eq!(documents.len(), 1);
    let TaskDocument { id, tokens, ends_document, positions } = &documents[0];
    assert!(ends_document);
    assert_eq!((id.as_str(), positions.len()), ("a", 3));
    assert_eq!(tokenizer().decode_lossy(tokens), TEXT);
    for position in positions {
        // The header shifts the proxy's indices by one token.
        assert_eq!(position.proxy_top, position.index + 1);
        assert!(position.entropy > 1.0 && position.entropy < 2.5);
    }
    let counts = &built.manifest.counts;
    assert_eq!((counts.documents, counts.pieces, counts.dropped.empty_documents), (3, 2, 1));
    assert_eq!(counts.dropped.pieces_too_short, 1);
    assert_balance(counts);
}

#[test]
fn long_documents_are_cut_without_losing_a_token() {
    let long = vec![TEXT; 40].join(" ");
    let proxy = Ramp { step: 0.0, ..Ramp::default() };
    let settings = TasksConfig {
        selection: Selection::All,
        positions_per_document: usize::MAX,
        min_context: 1,
        max_document_tokens: 50,
        ..settings()
    };
    let built = try_build(&settings, false, &proxy, &[document("long", &long)]).unwrap();
    let documents = built.documents();
    let all = tokenizer().encode_document(&long).unwrap();
    assert_eq!(documents.len(), all.len().div_ceil(50));
    assert_eq!((documents[0].id.as_str(), documents[1].id.as_str()), ("long#1", "long#2"));
    for (piece, start) in documents.iter().zip((0..).step_by(50)) {
        let end = all.len().min(start + 50 + 16);
        assert_eq!(piece.tokens, all[start..end]);
        assert_eq!(piece.ends_document, end == all.len());
        assert_eq!(piece.positions.len(), all.len().min(start + 50) - start - 1);
    }
    for asked in proxy.asked.lock().unwrap().iter() {
        assert!(asked[0] == 0 && asked.len() <= 51);
    }
    assert_balance(&built.manifest.counts);
}

#[test]
fn marks_become_labels_where_a_token_starts() {
    let fox = TEXT.find(" fox jumps").unwrap() as u64;
    let mark = |offset, label: &str| Mark { offset, label: label.into() };
    let marks =
        vec![mark(fox, "k=1"), mark(fox, "again"), mark(fox + 2, "inside"), mark(TEXT.len() as u64, "end")];
    let marked = Document { marks, ..document("marked", TEXT) };
    let closed = TasksConfig { min_entropy: 100.0, max_entropy: 200.0, ..settings() };
    let built =
        try_build(&closed, true, &Ramp { step: 0.1, ..Ramp::default() }, std::slice::from_ref(&marked))
            .unwrap();
    let documents = built.documents();
    let position = &documents[0].positions[0];
    assert_eq!((documents[0].positions.len(), position.label.as_deref()), (1, Some("k=1")));
    let before = tokenizer().decode_lossy(&documents[0].tokens[..position.index as usize]);
    assert_eq!(before, "The quick brown");
    let counts = &built.manifest.counts;
    assert_eq!(
        (counts.marked_positions, counts.dropped.marks_repeated, counts.dropped.marks_off_boundary),
        (1, 1, 2)
    );
    assert_balance(counts);
    let without = try_build(&settings(), false, &Ramp { step: 0.1, ..Ramp::default() }, &[marked]).unwrap();
    let counts = &without.manifest.counts;
    assert_eq!(counts.marked_positions + counts.dropped.marks_not_selected, 1);
}

#[test]
fn a_band_that_leaves_nothing_is_an_error_with_the_quantiles() {
    let closed = TasksConfig { min_entropy: 100.0, max_entropy: 200.0, ..settings() };
    let error = try_build(&closed, false, &Ramp { step: 0.1, ..Ramp::default() }, &[document("a", TEXT)])
        .err()
        .unwrap();
    assert!(error.to_string().contains("below the entropy band"), "{error}");
    assert!(error.hint().unwrap().contains("nats"), "{:?}", error.hint());
    let error = try_build(&settings(), false, &Ramp::default(), &[]).err().unwrap();
    assert!(error.hint().unwrap().contains("min_context"));
}

#[test]
fn building_twice_writes_the_same_bytes() {
    let documents: Vec<Document> = (0..150).map(|number| document(&format!("d{number}"), TEXT)).collect();
    let small = TasksConfig { shard_bytes: 1, ..settings() };
    let (first, second) = (build(&small, &documents), build(&small, &documents));
    assert_eq!(first.manifest, second.manifest);
    assert_eq!(first.manifest.shards.iter().map(|shard| shard.documents).collect::<Vec<_>>(), [64, 64, 22]);
    first.shards().verify().unwrap();
    // A different seed draws other positions; here, a different document name does.
    let drawn: Vec<_> =
        first.documents().iter().map(|d| d.positions.iter().map(|p| p.index).collect::<Vec<_>>()).collect();
    assert!(drawn.windows(2).any(|pair| pair[0] != pair[1]));
}

#[test]
fn documents_are_the_same_in_one_unit_and_in_several() {
    let documents: Vec<Document> = (0..90).map(|number| document(&format!("d{number}"), TEXT)).collect();
    let whole = build(&settings(), &documents);
    let (settings, proxy) = (settings(), Ramp { step: 0.1, ..Ramp::default() });
    let builder = TaskBuilder {
        settings: &settings,
        seed: 7,
        tokenizer: tokenizer(),
        proxy: Some(&proxy),
        proxy_header: vec![0],
        keep_marked: false,
    };
    let directory = tempfile::tempdir().unwrap();
    let parts = [&documents[..20], &[], &documents[20..85], &documents[85..]];
    let manifest = build_units(&builder, directory.path(), &parts).unwrap();
    let parts = Built { directory, manifest };
    assert_eq!(parts.documents(), whole.documents());
    assert_eq!(parts.manifest.counts, whole.manifest.counts);
    assert_eq!(parts.manifest.shards[1].file, "unit-00002/tasks-00000.arrow");
    parts.shards().verify().unwrap();
}

#[test]
fn of_two_workers_on_one_unit_the_first_counts() {
    let directory = tempfile::tempdir().unwrap();
    let units = TaskUnits::open(directory.path(), fingerprints(), 1, 2).unwrap();
    let counts = || TaskCounts { positions: 2, ..build(&settings(), &[document("a", TEXT)]).manifest.counts };
    let (mut first, mut second) = (units.start(1).unwrap(), units.start(1).unwrap());
    let abandoned = units.start(0).unwrap();
    for unit in [&mut first, &mut second] {
        unit.writer.push(&[sample(0, 2)]).unwrap();
    }
    for unit in [first, second] {
        units.commit(unit, Vec::new(), CorpusCounts::default(), counts()).unwrap();
        assert!(units.is_committed(1) && !units.is_committed(0));
    }
    drop(abandoned);
    let mut last = units.start(0).unwrap();
    last.writer.push(&[sample(1, 2)]).unwrap();
    units.commit(last, Vec::new(), CorpusCounts::default(), counts()).unwrap();
    units.complete(&units.gather().unwrap().unwrap()).unwrap();
    let shards = TaskShards::open(directory.path(), &fingerprints()).unwrap();
    assert_eq!([shards.document(0).unwrap(), shards.document(1).unwrap()], [sample(1, 2), sample(0, 2)]);
    // What stopped workers left is gone.
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 3);
}

#[test]
fn errors_of_the_corpus_pass_through() {
    let failing = std::iter::once(Err(Error::from(TasksError::Unfinished { path: "corpus".into() })));
    let directory = tempfile::tempdir().unwrap();
    let (settings, proxy) = (settings(), Ramp::default());
    let builder = TaskBuilder {
        settings: &settings,
        seed: 0,
        tokenizer: tokenizer(),
        proxy: Some(&proxy),
        proxy_header: vec![],
        keep_marked: false,
    };
    let mut writer = ShardWriter::new(directory.path(), fingerprints(), 1);
    assert!(builder.build(failing, &mut writer).is_err());
    assert!(Manifest::load(directory.path()).is_err());
}

#[test]
fn kept_scores_stand_for_the_model_that_left_them() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("unit-00000.arrow");
    let proxy = Ramp { step: 0.1, ..Ramp::default() };
    let calls = [vec![vec![1, 2, 3], vec![4]], vec![vec![5, 6]]];
    let written = KeptScores::open(&proxy, path.clone()).unwrap();
    let fresh: Vec<_> = calls.iter().map(|pieces| written.score(pieces, 16).unwrap()).collect();
    assert!(!path.exists());
    written.finish().unwrap();
    assert_eq!(proxy.asked.lock().unwrap().len(), 3);
    // Calls need not be the same, only the order of the pieces.
    let read = KeptScores::open(&proxy, path.clone()).unwrap();
    let again = read.score(&calls.concat(), 16).unwrap();
    assert_eq!(again, fresh.concat());
    assert!(read.score(&[vec![7]], 16).unwrap_err().to_string().contains("fewer"));
    read.finish().unwrap();
    let other = KeptScores::open(&proxy, path.clone()).unwrap();
    assert!(other.score(&[vec![1, 2, 4]], 16).unwrap_err().to_string().contains("other tokens"));
    assert_eq!(proxy.asked.lock().unwrap().len(), 3);
    let bytes = std::fs::read(&path).unwrap();
    for cut in [0, 10, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&path, &bytes[..cut]).unwrap();
        let opened = KeptScores::open(&proxy, path.clone()).map_err(Error::from);
        assert!(opened.and_then(|scores| scores.score(&calls.concat(), 16)).is_err(), "{cut}");
    }
}

#[test]
fn a_larger_model_adds_its_probability_of_the_truth() {
    let (proxy, larger) = (Ramp { step: 0.1, ..Ramp::default() }, Ramp { step: 9.0, ..Ramp::default() });
    let both = ComparedProxies { proxy: &proxy, larger: &larger };
    let scores = both.score(&[vec![1, 2, 3]], 16).unwrap();
    assert_eq!(scores[0][2].larger_truth_probability, Some(0.25));
    assert_eq!((scores[0][2].entropy, scores[0][2].loss_gap()), (0.2, 0.0));
}

#[test]
fn without_a_proxy_positions_are_drawn_all_the_same() {
    let settings =
        TasksConfig { selection: Selection::Random, random_share: 0.3, score: false, ..settings() };
    let documents = [document("a", TEXT), document("b", TEXT)];
    let scored = build(&settings, &documents);
    let builder = TaskBuilder {
        settings: &settings,
        seed: 7,
        tokenizer: tokenizer(),
        proxy: None,
        proxy_header: vec![0],
        keep_marked: false,
    };
    let directory = tempfile::tempdir().unwrap();
    let manifest = build_units(&builder, directory.path(), &[&documents]).unwrap();
    let unscored = Built { directory, manifest };
    let indices = |built: &Built| -> Vec<Vec<u32>> {
        let of = |document: &TaskDocument| document.positions.iter().map(|position| position.index).collect();
        built.documents().iter().map(of).collect()
    };
    assert_eq!(indices(&unscored), indices(&scored));
    assert!(unscored.documents().iter().flat_map(|d| &d.positions).all(|position| position.entropy == 0.0));
    assert_eq!(unscored.manifest.counts.entropy.quantile(1.0), None);
}

fn sample(number: u32, positions: u32) -> TaskDocument {
    let tokens: Vec<u32> = (0..20 + number % 7).collect();
    let position = |index: u32| Position {
        index: index * 2 + 1,
        entropy: index as f32 + 0.5,
        truth_probability: 1.0 / (index + 2) as f32,
        proxy_top: index,
        label: (index % 2 == 1).then(|| format!("label {index}")),
    };
    TaskDocument {
        id: format!("document {number} é"),
        tokens,
        ends_document: number.is_multiple_of(2),
        positions: (0..positions).map(position).collect(),
    }
}

/// Writes documents as shards.
fn shard(documents: &[TaskDocument], shard_bytes: u64) -> Built {
    let directory = tempfile::tempdir().unwrap();
    let mut writer = ShardWriter::new(directory.path(), fingerprints(), shard_bytes);
    for documents in documents.chunks(37) {
        writer.push(documents).unwrap();
    }
    let mut counts = build(&settings(), &[document("a", TEXT)]).manifest.counts;
    counts.positions = documents.iter().map(|document| document.positions.len() as u64).sum();
    let manifest = writer.finish(Vec::new(), CorpusCounts::default(), counts).unwrap();
    Built { directory, manifest }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn shards_give_back_what_was_written(counts in prop::collection::vec(1_u32..6, 1..150), shard_bytes in 1_u64..60_000) {
        let documents: Vec<TaskDocument> = counts.iter().zip(0..).map(|(&count, number)| sample(number, count)).collect();
        let built = shard(&documents, shard_bytes);
        prop_assert_eq!(built.documents(), documents);
        prop_assert_eq!(built.shards().positions(), u64::from(counts.iter().sum::<u32>()));
        prop_assert!(built.shards().verify().is_ok());
        prop_assert_eq!(Manifest::load(built.directory.path()).unwrap(), built.manifest.clone());
    }

    #[test]
    fn a_stream_goes_on_from_any_cursor(counts in prop::collection::vec(1_u32..5, 1..12), seed: u64, stop in 0_usize..90) {
        let documents: Vec<TaskDocument> = counts.iter().zip(0..).map(|(&count, number)| sample(number, count)).collect();
        let shards = Arc::new(shard(&documents, 5).shards());
        let mut stream = TaskStream::new(Arc::clone(&shards), seed, TaskCursor::default()).unwrap();
        (0..stop).for_each(|_| { stream.next_task().unwrap(); });
        let saved = serde_json::to_string(&stream.cursor()).unwrap();
        let mut resumed = TaskStream::new(shards, seed, serde_json::from_str(&saved).unwrap()).unwrap();
        for _ in 0..60 {
            prop_assert_eq!(key(&stream.next_task().unwrap()), key(&resumed.next_task().unwrap()));
        }
        prop_assert_eq!(stream.cursor(), resumed.cursor());
    }

    #[test]
    fn every_epoch_issues_every_position_once(counts in prop::collection::vec(1_u32..5, 1..40), seed: u64) {
        let documents: Vec<TaskDocument> = counts.iter().zip(0..).map(|(&count, number)| sample(number, count)).collect();
        let shards = Arc::new(shard(&documents, 16).shards());
        let mut stream = TaskStream::new(Arc::clone(&shards), seed, TaskCursor::default()).unwrap();
        for epoch in 0..3 {
            let mut seen = BTreeMap::new();
            for _ in 0..shards.positions() {
                let ordinal = stream.cursor().ordinal;
                let task = stream.next_task().unwrap();
                prop_assert_eq!((task.epoch, task.ordinal), (epoch, ordinal));
                *seen.entry((task.document.id.clone(), task.position().index)).or_insert(0) += 1;
            }
            prop_assert_eq!(seen.len() as u64, shards.positions());
            let cursor = TaskCursor { epoch: epoch + 1, row: 0, position: 0, ordinal: (epoch + 1) * shards.positions() };
            prop_assert_eq!(stream.cursor(), cursor);
        }
    }
}

fn key(task: &Task) -> (u64, u64, String, usize) {
    (task.ordinal, task.epoch, task.document.id.clone(), task.position)
}

#[test]
fn epochs_and_seeds_have_orders_of_their_own_and_documents_stay_together() {
    let documents: Vec<TaskDocument> = (0..50).map(|number| sample(number, 3)).collect();
    let shards = Arc::new(shard(&documents, 16).shards());
    let order = |seed, epoch| {
        let cursor = TaskCursor { epoch, ..TaskCursor::default() };
        let mut stream = TaskStream::new(Arc::clone(&shards), seed, cursor).unwrap();
        (0..150)
            .map(|_| stream.next_task().unwrap())
            .map(|task| (task.document.id.clone(), task.position))
            .collect::<Vec<_>>()
    };
    assert_eq!(order(1, 0), order(1, 0));
    assert_ne!(order(1, 0), order(1, 1));
    assert_ne!(order(1, 0), order(2, 0));
    for group in order(1, 0).chunks(3) {
        assert!(
            group.iter().enumerate().all(|(place, (id, position))| *position == place && *id == group[0].0)
        );
    }
}

#[test]
fn cursors_outside_of_the_shards_are_refused() {
    let shards = Arc::new(shard(&[sample(0, 2)], 4).shards());
    for cursor in
        [TaskCursor { row: 1, ..TaskCursor::default() }, TaskCursor { position: 2, ..TaskCursor::default() }]
    {
        let error = TaskStream::new(Arc::clone(&shards), 0, cursor).unwrap_err();
        assert!(matches!(error, TasksError::OutOfRange { .. }), "{error}");
    }
    assert!(matches!(shards.document(1), Err(TasksError::OutOfRange { .. })));
}

#[test]
fn tasks_of_another_tokenizer_or_template_are_refused() {
    let built = shard(&[sample(0, 2)], 4);
    for (tokenizer, template, what) in
        [("other", "template", "tokenizer"), ("tokenizer", "other", "template")]
    {
        let expected = Fingerprints { tokenizer: tokenizer.into(), template: template.into() };
        let error = TaskShards::open(built.directory.path(), &expected).unwrap_err();
        assert!(matches!(error, TasksError::Mismatch { .. }) && error.to_string().contains(what), "{error}");
        assert!(error.hint().is_some());
    }
}

/// Opens, verifies and reads everything; only damage may come of it.
fn read_damaged(directory: &Path) -> Result<(), TasksError> {
    let shards = TaskShards::open(directory, &fingerprints())?;
    for row in 0..shards.documents() {
        match shards.document(row) {
            Ok(_) | Err(TasksError::Damaged { .. }) => {}
            Err(other) => panic!("{other}"),
        }
    }
    shards.verify()
}

#[test]
fn every_flipped_byte_is_found_and_none_is_fatal() {
    let built = shard(&[sample(0, 2), sample(1, 3)], 4);
    let path = built.directory.path().join("tasks-00000.arrow");
    let whole = std::fs::read(&path).unwrap();
    for index in 0..whole.len() {
        for flip in [0x01, 0x80, 0xFF] {
            let mut damaged = whole.clone();
            damaged[index] ^= flip;
            std::fs::write(&path, &damaged).unwrap();
            let error = read_damaged(built.directory.path()).unwrap_err();
            assert!(matches!(error, TasksError::Damaged { .. }), "byte {index}: {error}");
        }
    }
    for length in (0..whole.len()).step_by(61) {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = read_damaged(built.directory.path()).unwrap_err();
        assert!(
            matches!(error, TasksError::Damaged { .. }) && error.to_string().contains("bytes"),
            "{error}"
        );
    }
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(read_damaged(built.directory.path()), Err(TasksError::Io { .. })));
}

#[test]
fn damaged_manifests_are_refused() {
    let built = shard(&[sample(0, 2), sample(1, 3)], 4);
    let path = built.directory.path().join("tasks.json");
    let whole = std::fs::read_to_string(&path).unwrap();
    let with = |from: &str, to: &str| {
        assert!(whole.contains(from), "{from}");
        std::fs::write(&path, whole.replacen(from, to, 1)).unwrap();
        read_damaged(built.directory.path()).unwrap_err()
    };
    assert!(matches!(
        with("\"schema_version\": 4", "\"schema_version\": 1"),
        TasksError::Version { found: 1, .. }
    ));
    for (from, to) in [
        ("tasks-00000.arrow", "../../etc/passwd"),
        ("\"documents\": 2", "\"documents\": 200"),
        ("\"checksum\": \"", "\"checksum\": \"0"),
        ("\"shards\"", "\"shard\""),
        ("{", ""),
    ] {
        let error = with(from, to);
        assert!(matches!(error, TasksError::Damaged { .. }), "{from}: {error}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(matches!(read_damaged(built.directory.path()), Err(TasksError::Unfinished { .. })));
}

#[test]
fn the_truth_is_the_text_from_the_position_on() {
    let built = build(&settings(), &[document("a", TEXT)]);
    let document = Arc::new(built.documents().remove(0));
    for position in 0..document.positions.len() {
        let task = Task { ordinal: 0, epoch: 0, document: Arc::clone(&document), position };
        let (before, rest) = document.tokens.split_at(task.position().index as usize);
        let before = tokenizer().decode_bytes(before).len();
        let truth = Truth::of(&task, tokenizer());
        assert!(truth.ends_document);
        assert_eq!(truth.bytes, &TEXT.as_bytes()[before..]);
        assert_eq!(truth.boundaries[0], tokenizer().token_bytes(rest[0]).len() as u32);
        assert_eq!(truth.boundaries.last().copied(), Some(truth.bytes.len() as u32));
        assert!(truth.boundaries.windows(2).all(|pair| pair[0] < pair[1]));
    }
}

/// A prediction that runs past the known text of a cut piece may be right: it is not scored.
/// Past the end of the document it is wrong.
#[test]
fn only_the_last_piece_of_a_document_ends_it() {
    let long = [TEXT; 12].join(" ");
    let cut = TasksConfig {
        selection: Selection::All,
        positions_per_document: usize::MAX,
        max_document_tokens: 50,
        ..settings()
    };
    let built = try_build(&cut, false, &Ramp::default(), &[document("long", &long)]).unwrap();
    let documents = built.documents();
    let outcome_past_the_end = |document: &TaskDocument| {
        let position = document.positions.len() - 1;
        let task = Task { ordinal: 0, epoch: 0, document: Arc::new(document.clone()), position };
        let Truth { bytes, boundaries, ends_document } = Truth::of(&task, tokenizer());
        let reply = [b"</think>\\boxed{".as_slice(), &bytes, b" and more}"].concat();
        let truth = reward::Truth { bytes: &bytes, boundaries: &boundaries, ends_document };
        Verifier::new(&RewardConfig::default()).score(&reply, true, &truth).outcome
    };
    let (last, first) = documents.split_last().unwrap();
    assert!(!first.is_empty());
    assert_eq!(outcome_past_the_end(last), Outcome::Wrong);
    assert_eq!(outcome_past_the_end(&first[0]), Outcome::Unscorable);
}

#[test]
fn the_truth_of_an_early_position_is_capped() {
    let tokens = tokenizer().encode_document(&[TEXT; 9].join(" ")).unwrap();
    let position = Position { index: 1, entropy: 1.0, truth_probability: 0.1, proxy_top: 0, label: None };
    let document = TaskDocument {
        id: "a".into(),
        tokens: tokens.clone(),
        ends_document: true,
        positions: vec![position],
    };
    let task = Task { ordinal: 0, epoch: 0, document: Arc::new(document), position: 0 };
    let truth = Truth::of(&task, tokenizer());
    assert_eq!((truth.boundaries.len(), truth.ends_document), (64, false));
    assert_eq!(truth.bytes, tokenizer().decode_bytes(&tokens[1..65]));
}

#[test]
fn plain_prompts_are_the_document_and_an_open_thought() {
    let special = SpecialTokens::resolve(tokenizer(), &TokenizerConfig::default()).unwrap();
    let chat = ChatFormat::of(tokenizer());
    let plain = PromptTemplate::new(TemplateName::Plain, tokenizer(), &special, &chat).unwrap();
    assert_eq!(plain, PromptTemplate { header: vec![0], footer: vec![1] });
    let instruct = PromptTemplate::new(TemplateName::V6, tokenizer(), &special, &chat).unwrap();
    let text = tokenizer().decode_lossy(&instruct.prompt(&tokenizer().encode_document(TEXT).unwrap()));
    assert!(text.starts_with("<|bos|>User: Complete the text"), "{text}");
    assert!(
        text.contains(&format!("```\n{TEXT}\n```\n")) && text.ends_with("Assistant: <think>\n"),
        "{text}"
    );
    assert_ne!(plain.fingerprint(), instruct.fingerprint());
}

#[test]
fn instruction_prompts_are_one_turn_of_the_model_s_chat() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../shared/peers/golden/qwen2-pico/tokenizer.json");
    if !Path::new(path).exists() {
        println!("SKIPPED: {path} is absent");
        return;
    }
    let tokenizer = Tokenizer::load(Path::new(path)).unwrap();
    let special = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default()).unwrap();
    let chat = ChatFormat::of(&tokenizer);
    let v0 = PromptTemplate::new(TemplateName::V0, &tokenizer, &special, &chat).unwrap();
    assert_eq!((v0.header[0], v0.footer[0]), (508, 509));
    assert_eq!(tokenizer.decode_lossy(&v0.footer), "<|im_end|>\n<|im_start|>assistant\n");
}

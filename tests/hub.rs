//! Models and datasets of the Hub, from a server on this machine, through the library and the real binary.
#![cfg(feature = "hub")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/command.rs"]
mod command;
mod common;
#[path = "hub/fixtures.rs"]
mod fixtures;
#[path = "hub/server.rs"]
mod server;

use command::{RPT, refuses, stderr, stdout};
use fixtures::{dataset_files, has_extension, model_files, parquet, small, write_model};
use rpt::hub::{Hub, HubError, HubReference, HubSettings, Selection, Snapshot, Token};
use serde_json::Value;
use server::{FakeHub, Fault, RemoteFile, Request, SIGNATURE, TOKEN, git_hash};
use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tempfile::TempDir;

const MODEL: &str = "hf://someone/tiny-model";
const DATASET: &str = "hf://datasets/someone/texts";
const WEIGHTS: &str = "model.safetensors";
/// Where a connection breaks: within the weights, beyond what is read at a time.
const CUT: usize = 150_000;

/// A Hub and an empty cache.
struct Place {
    hub: FakeHub,
    home: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { hub: FakeHub::new(), home: tempfile::tempdir().unwrap() }
    }

    fn with_model() -> Self {
        let place = Self::new();
        place.hub.publish("models/someone/tiny-model", "main", model_files());
        place
    }

    fn cache(&self) -> PathBuf {
        self.home.path().join("hub/models--someone--tiny-model")
    }

    /// `rpt` with nothing in its environment but this Hub, this cache and a token.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(RPT);
        command.env_clear().env("HF_ENDPOINT", self.hub.endpoint()).env("HF_HOME", self.home.path());
        command.env("HF_TOKEN", TOKEN).args(arguments).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn rpt(&self, arguments: &[&str]) -> Output {
        let output = self.command(arguments).output().unwrap();
        for text in [stdout(&output), stderr(&output)] {
            assert!(!text.contains(TOKEN) && !text.contains(SIGNATURE), "a secret is shown: {text}");
        }
        output
    }

    fn succeeds(&self, arguments: &[&str]) -> String {
        let output = self.rpt(arguments);
        assert!(output.status.success(), "{}", stderr(&output));
        stdout(&output)
    }

    fn settings(&self) -> HubSettings {
        HubSettings {
            endpoint: self.hub.endpoint(),
            cache: self.home.path().join("hub"),
            token: Token::new(TOKEN).unwrap(),
            offline: false,
            certificates: None,
            attempts: 3,
            pause: Duration::ZERO,
        }
    }

    fn fetch(&self, reference: &str, selection: Selection) -> Result<Snapshot, HubError> {
        fetch_with(self.settings(), reference, selection).0
    }

    fn model(&self) -> Result<Snapshot, HubError> {
        self.fetch(MODEL, Selection::Model)
    }

    fn requests_of(&self, part: &str) -> Vec<Request> {
        self.hub.requests().into_iter().filter(|request| request.path.contains(part)).collect()
    }
}

/// The result, and what was said.
fn fetch_with(
    settings: HubSettings,
    reference: &str,
    selection: Selection,
) -> (Result<Snapshot, HubError>, String) {
    let said = RefCell::new(String::new());
    let say = |line: &str| said.borrow_mut().extend([line, "\n"]);
    let hub = Hub { settings, say: &say, interrupt: None };
    let result = hub.fetch(&HubReference::parse(reference).unwrap(), selection);
    if let Err(error) = &result {
        say(&format!("{error} {error:?} {:?}", error.hint()));
    }
    let said = said.borrow().clone();
    assert!(!said.contains(TOKEN) && !said.contains(SIGNATURE), "a secret is shown: {said}");
    (result, said)
}

fn file_names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn logprobs(model: &str) -> [&str; 6] {
    ["logprobs", "--model", model, "--ids", "1,2,3", "--json"]
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn the_server_names_files_as_git_does() {
    assert_eq!(git_hash(b"hello\n"), "ce013625030ba8dba906f756967f9e9ca394464a");
}

#[test]
fn a_model_is_used_by_name_and_lies_where_huggingface_hub_would_put_it() {
    let place = Place::new();
    let files = model_files();
    let commit = place.hub.publish("models/someone/tiny-model", "main", files.clone());
    let local = tempfile::tempdir().unwrap();
    write_model(local.path());
    let expected = place.succeeds(&logprobs(local.path().to_str().unwrap()));
    assert_eq!(place.succeeds(&logprobs(MODEL)), expected);

    let cache = place.cache();
    assert_eq!(fs::read_to_string(cache.join("refs/main")).unwrap(), commit);
    let snapshot = cache.join("snapshots").join(&commit);
    let mut wanted: Vec<&String> = files.keys().filter(|name| !has_extension(name, &["bin", "py"])).collect();
    wanted.sort();
    assert_eq!(file_names(&snapshot).iter().collect::<Vec<_>>(), wanted);
    for name in wanted {
        let target = fs::read_link(snapshot.join(name)).unwrap();
        assert_eq!(target, Path::new("../../blobs").join(files[name].hash()), "{name}");
        assert!(fs::read(snapshot.join(name)).unwrap() == files[name].content, "{name}");
    }
    assert!(file_names(&cache.join("blobs")).iter().all(|name| !name.contains("incomplete")));
    let requests = place.hub.requests();
    assert!(requests.iter().all(|request| !has_extension(&request.path, &["bin", "py"])));

    // What is in the cache needs no Hub, and is found by its commit too.
    for model in [MODEL.to_owned(), format!("{MODEL}@{commit}")] {
        assert_eq!(place.succeeds(&logprobs(&model)), expected);
    }
    assert!(place.hub.requests().is_empty(), "a cache hit makes no request");
    let mut command = place.command(&logprobs(MODEL));
    let offline =
        command.env("HF_HUB_OFFLINE", "1").env("HF_ENDPOINT", "http://127.0.0.1:1").output().unwrap();
    assert_eq!(stdout(&offline), expected, "{}", stderr(&offline));
    assert!(stderr(&offline).contains(&commit), "the commit is said: {}", stderr(&offline));
    let inspected = json(&place.succeeds(&["inspect", MODEL, "--json"]));
    assert_eq!((&inspected["kind"], &inspected["tokenizer"]["eos"]), (&"model".into(), &"<|end|>".into()));
}

#[test]
fn the_token_goes_to_the_hub_and_to_no_other_host() {
    let place = Place::with_model();
    place.succeeds(&logprobs(MODEL));
    let requests = place.hub.requests();
    let (hub, cdn): (Vec<_>, Vec<_>) = requests.iter().partition(|request| request.server == "hub");
    assert_eq!(cdn.len(), 1, "the weights are redirected: {requests:?}");
    assert!(hub.iter().all(|request| request.header("authorization") == Some(&format!("Bearer {TOKEN}"))));
    assert!(cdn.iter().all(|request| request.header("authorization").is_none()));
    for path in [".rpt", "refs", "blobs"].map(|name| place.cache().join(name)) {
        for name in file_names(&path) {
            let content = fs::read(path.join(name)).unwrap();
            assert!(!content.windows(TOKEN.len()).any(|window| window == TOKEN.as_bytes()));
        }
    }

    // A token in a file serves as well; none is sent where none is known.
    fs::write(place.home.path().join("token"), format!("{TOKEN}\n")).unwrap();
    for (present, revision) in [(true, "a"), (false, "b")] {
        place.hub.publish("models/someone/tiny-model", revision, model_files());
        let model = format!("{MODEL}@{revision}");
        let output = place.command(&logprobs(&model)).env_remove("HF_TOKEN").output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let sent = place.hub.requests().iter().any(|request| request.header("authorization").is_some());
        assert_eq!(sent, present);
        fs::remove_file(place.home.path().join("token")).unwrap_or_default();
    }
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let place = Place::with_model();
    let weights = model_files()[WEIGHTS].clone();
    place.hub.fail(SIGNATURE, Fault::Cut(CUT));
    let snapshot = place.model().unwrap();
    assert!(fs::read(snapshot.directory.join(WEIGHTS)).unwrap() == weights.content);
    let ranges: Vec<_> = place
        .requests_of(SIGNATURE)
        .iter()
        .map(|request| request.header("range").map(str::to_owned))
        .collect();
    assert_eq!(ranges, [None, Some(format!("bytes={CUT}-"))]);

    // A process that gives up leaves its part to the next one.
    let place = Place::with_model();
    place.hub.fail(SIGNATURE, Fault::Cut(CUT));
    let once = HubSettings { attempts: 1, ..place.settings() };
    let error = fetch_with(once, MODEL, Selection::Model).0.unwrap_err();
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
    let part = place.cache().join("blobs").join(weights.hash() + ".incomplete");
    assert!(fs::read(&part).unwrap() == weights.content[..CUT]);
    assert!(!place.cache().join("refs/main").exists());
    place.hub.requests();
    let output = place.rpt(&logprobs(MODEL));
    assert!(stderr(&output).contains(&format!("going on at byte {CUT}")), "{}", stderr(&output));
    let requests = place.hub.requests();
    let ranges = requests.iter().filter_map(|request| request.header("range"));
    assert_eq!(
        ranges.collect::<Vec<_>>(),
        vec![format!("bytes={CUT}-"); 2],
        "of the redirect and the weights"
    );
    assert!(requests.iter().all(|request| !request.path.ends_with("/config.json")), "what is complete stays");
    assert!(!part.exists());
}

#[test]
fn a_server_without_ranges_sends_the_whole_again() {
    let place = Place::with_model();
    place.hub.fail(SIGNATURE, Fault::Cut(CUT));
    place.hub.fail(SIGNATURE, Fault::Whole);
    let snapshot = place.model().unwrap();
    assert!(fs::read(snapshot.directory.join(WEIGHTS)).unwrap() == model_files()[WEIGHTS].content);
}

#[test]
fn a_part_that_a_crash_damaged_is_fetched_from_its_beginning() {
    let weights = model_files()[WEIGHTS].clone();
    for left in [vec![0; CUT], vec![0; weights.content.len()], vec![0; weights.content.len() + 1]] {
        let place = Place::with_model();
        let part = place.cache().join("blobs").join(weights.hash() + ".incomplete");
        fs::create_dir_all(part.parent().unwrap()).unwrap();
        fs::write(&part, left).unwrap();
        let snapshot = place.model().unwrap();
        assert!(fs::read(snapshot.directory.join(WEIGHTS)).unwrap() == weights.content);
    }
}

#[test]
fn a_content_that_is_not_the_listed_one_is_refused_and_not_kept() {
    let weights = model_files()[WEIGHTS].content.clone();
    let mut wrong = weights.clone();
    wrong[CUT] ^= 1;
    let config = model_files()["config.json"].content.to_ascii_uppercase();
    let longer = [weights.clone(), vec![0]].concat();
    let cases = [
        (SIGNATURE, wrong, "hash"),
        ("config.json", config, "hash"),
        (SIGNATURE, weights[..CUT].to_vec(), "size"),
        (SIGNATURE, longer, "size"),
    ];
    for (part, content, what) in cases {
        let place = Place::with_model();
        place.hub.fail(part, Fault::Content(content));
        match place.model() {
            Err(HubError::Mismatch { what: found, .. }) => assert_eq!(found, what),
            other => panic!("{other:?}"),
        }
        let hash = model_files()[if part == SIGNATURE { WEIGHTS } else { part }].hash();
        let blobs = file_names(&place.cache().join("blobs"));
        assert!(blobs.iter().all(|name| !name.starts_with(&hash)), "{blobs:?}");
        place.model().unwrap();
    }
}

#[test]
fn passing_failures_are_tried_again_and_lasting_ones_given_up() {
    let place = Place::with_model();
    for part in ["/api/", "config.json", SIGNATURE] {
        place.hub.fail(part, Fault::Status(500, &[]));
        place.hub.fail(part, Fault::Status(503, &[]));
    }
    place.hub.fail(SIGNATURE, Fault::Status(403, &[]));
    let patient = HubSettings { attempts: 4, ..place.settings() };
    fetch_with(patient, MODEL, Selection::Model).0.unwrap();

    let place = Place::with_model();
    for _ in 0..3 {
        place.hub.fail("/api/", Fault::Status(500, &[]));
    }
    let error = place.model().unwrap_err();
    assert!(error.to_string().contains("500") && error.hint().is_some(), "{error}");
    assert_eq!(place.hub.requests().len(), 3);
}

#[test]
fn a_server_that_names_a_pause_is_obeyed_within_reason() {
    let place = Place::with_model();
    place.hub.fail("/api/", Fault::Status(429, &[("Retry-After", "0")]));
    place.hub.fail("tokenizer.json", Fault::Status(429, &[("Retry-After", "0")]));
    // Its own pause would outlast any test.
    let slow = HubSettings { pause: Duration::from_hours(1), ..place.settings() };
    fetch_with(slow, MODEL, Selection::Model).0.unwrap();

    let place = Place::with_model();
    place.hub.fail("/api/", Fault::Status(429, &[("Retry-After", "86400")]));
    let error = place.model().unwrap_err();
    assert!(matches!(error, HubError::Limited { seconds: 86400, .. }), "{error}");
}

#[test]
fn what_the_hub_does_not_show_is_said_with_what_to_do() {
    let place = Place::with_model();
    let absent = place.rpt(&logprobs("hf://someone/absent"));
    refuses(&absent, 1, &["hf://someone/absent@main", "no such repository", "HF_TOKEN"]);
    let revision = place.rpt(&logprobs("hf://someone/tiny-model@v9"));
    refuses(&revision, 1, &["tiny-model@v9", "no such revision", "the default is main"]);

    place.hub.fail("/api/", Fault::Status(401, &[]));
    let anonymous = place.command(&logprobs(MODEL)).env_remove("HF_TOKEN").output().unwrap();
    refuses(&anonymous, 1, &["401", "without a token", "set HF_TOKEN", "/someone/tiny-model"]);
    place.hub.fail("config.json", Fault::Status(403, &[("X-Error-Code", "GatedRepo")]));
    refuses(&place.rpt(&logprobs(MODEL)), 1, &["403", "with a token", "was given access at"]);
}

#[test]
fn names_that_lead_out_of_the_cache_are_refused() {
    for name in ["../../../escaped", "/tmp/escaped", "a/../../escaped", "a\\..\\escaped", ""] {
        let place = Place::new();
        let mut files = model_files();
        files.insert(name.into(), small("hostile"));
        place.hub.publish("models/someone/tiny-model", "main", files);
        let error = place.model().unwrap_err();
        assert!(matches!(error, HubError::HostileName { .. }), "{error}");
        assert!(!place.cache().exists(), "nothing is written");
    }
    for shard in ["../../../escaped.safetensors", "/tmp/escaped.safetensors", "absent.safetensors"] {
        let place = Place::new();
        let mut files = model_files();
        let index = format!(r#"{{"weight_map": {{"x": "{shard}"}}}}"#);
        files.insert("model.safetensors.index.json".into(), small(&index));
        place.hub.publish("models/someone/tiny-model", "main", files);
        let error = place.model().unwrap_err();
        assert!(matches!(error, HubError::HostileName { .. } | HubError::NoFiles { .. }), "{error}");
        assert!(
            place.requests_of("escaped").is_empty()
                && !place.home.path().join("escaped.safetensors").exists()
        );
    }
}

#[test]
fn a_sharded_model_is_fetched_by_its_index() {
    let place = Place::new();
    let mut files = model_files();
    let weights = files.remove(WEIGHTS).unwrap();
    files.insert("model-00001-of-00001.safetensors".into(), weights);
    files.insert("model-unused.safetensors".into(), RemoteFile { content: vec![0; 9], large: true });
    let index = r#"{"weight_map": {"x": "model-00001-of-00001.safetensors", "y": "model-00001-of-00001.safetensors"}}"#;
    files.insert("model.safetensors.index.json".into(), small(index));
    place.hub.publish("models/someone/tiny-model", "main", files);
    assert!(json(&place.succeeds(&logprobs(MODEL)))["logprobs"].is_array());
    assert_eq!(place.requests_of(SIGNATURE).len(), 1);
    place.succeeds(&logprobs(MODEL));
    assert!(place.hub.requests().is_empty());

    let place = Place::new();
    place.hub.publish("models/someone/tiny-model", "main", {
        let mut files = model_files();
        files.remove(WEIGHTS);
        files
    });
    refuses(&place.rpt(&logprobs(MODEL)), 1, &["has no safetensors weights", "pickle"]);
}

#[test]
fn datasets_are_their_parquet_files_or_those_that_are_named() {
    let place = Place::new();
    let commit = place.hub.publish("datasets/someone/texts", "main", dataset_files());
    place.hub.publish(
        "datasets/someone/texts",
        "refs/convert/parquet",
        [("x.parquet".into(), parquet(2))].into(),
    );
    let documents = |source: &str| json(&place.succeeds(&["inspect", source, "--json"]))["documents"].clone();
    assert_eq!(documents(&format!("{DATASET}/data/train-*.parquet")), 17);
    assert_eq!(place.requests_of(SIGNATURE).len(), 2, "only what is named");
    assert_eq!(documents(DATASET), 20);
    assert_eq!(place.requests_of(SIGNATURE).len(), 1, "only what is missing");
    assert_eq!(documents(&format!("{DATASET}@{commit}/data/test-0.parquet")), 3);
    assert!(place.hub.requests().is_empty());
    assert_eq!(documents(&format!("{DATASET}@refs/convert/parquet")), 2);
    let cache = place.home.path().join("hub/datasets--someone--texts");
    assert!(cache.join("refs/refs/convert/parquet").is_file());
    let link = cache.join("snapshots").join(&commit).join("data/test-0.parquet");
    assert_eq!(fs::read_link(link).unwrap(), Path::new("../../../blobs").join(parquet(3).hash()));

    place.hub.publish("datasets/someone/csv", "main", [("a.csv".into(), small("a,b\n"))].into());
    let refused = place.rpt(&["inspect", "hf://datasets/someone/csv"]);
    refuses(
        &refused,
        1,
        &["no parquet or JSON-lines files", "try hf://datasets/someone/csv@refs/convert/parquet"],
    );
}

#[test]
fn processes_and_threads_that_want_the_same_share_one_download() {
    let place = Place::with_model();
    let commands: Vec<_> = (0..3).map(|_| place.command(&logprobs(MODEL)).spawn().unwrap()).collect();
    let outputs: Vec<String> = commands
        .into_iter()
        .map(|child| {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", stderr(&output));
            stdout(&output)
        })
        .collect();
    assert!(outputs.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(place.requests_of(SIGNATURE).len(), 1);

    let place = Place::with_model();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| place.model().unwrap())).collect();
        assert!(
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap())
                .all(|found| found == place.model().unwrap())
        );
    });
    assert_eq!(place.requests_of(SIGNATURE).len(), 1);
}

/// A cache that was filled by something that keeps no listing, an older `huggingface_hub` for example.
#[test]
fn a_cache_without_a_listing_is_checked_once_or_used_as_it_is() {
    let place = Place::with_model();
    let snapshot = place.model().unwrap();
    let listings = place.cache().join(".rpt");
    fs::remove_dir_all(&listings).unwrap();
    let offline = HubSettings { offline: true, ..place.settings() };
    let nobody = HubSettings { endpoint: "http://127.0.0.1:1".into(), attempts: 1, ..place.settings() };
    for (settings, reason) in [(offline.clone(), "HF_HUB_OFFLINE"), (nobody, "cannot reach")] {
        let (found, said) = fetch_with(settings, MODEL, Selection::Model);
        assert_eq!(found.unwrap(), snapshot);
        assert!(said.contains(&snapshot.commit) && said.contains(reason), "{said}");
    }
    place.hub.requests();
    assert_eq!(place.model().unwrap(), snapshot);
    assert_eq!(place.hub.requests().len(), 1, "the listing");
    assert_eq!(place.model().unwrap(), snapshot);
    assert!(place.hub.requests().is_empty());

    // Nothing has to be written where nothing is missing: `.rpt` is a file here, as good as a cache of others.
    fs::remove_dir_all(&listings).unwrap();
    fs::write(&listings, "").unwrap();
    let (found, said) = fetch_with(place.settings(), MODEL, Selection::Model);
    assert_eq!(found.unwrap(), snapshot);
    assert!(said.contains("the listing is not kept"), "{said}");
    fs::remove_file(&listings).unwrap();
    place.model().unwrap();

    // Known to be incomplete.
    fs::remove_file(snapshot.directory.join(WEIGHTS)).unwrap();
    let error = fetch_with(offline, MODEL, Selection::Model).0.unwrap_err();
    assert!(matches!(error, HubError::Incomplete { missing: 1, .. }), "{error}");
    // The listing that newer versions of huggingface_hub keep serves as well.
    fs::rename(&listings, place.cache().join("trees")).unwrap();
    place.model().unwrap();
    fs::remove_dir_all(listings).unwrap();
    place.hub.requests();
    assert_eq!(place.model().unwrap(), snapshot);
    assert!(place.hub.requests().is_empty());
}

#[test]
fn an_interrupted_download_ends_and_goes_on_the_next_time() {
    let place = Place::with_model();
    let interrupt = AtomicBool::new(true);
    let hub = Hub { settings: place.settings(), say: &|_| {}, interrupt: Some(&interrupt) };
    let error = hub.fetch(&HubReference::parse(MODEL).unwrap(), Selection::Model).unwrap_err();
    assert!(matches!(error, HubError::Interrupted { .. }), "{error}");
    assert_eq!(rpt::Error::from(error).exit_code(), 75);
}

const PIPELINE: &str = r#"
[corpus]
source = "hf://datasets/someone/texts/data/train-*.parquet"
[model]
path = "hf://someone/tiny-model"
[tasks]
template = "plain"
selection = "all"
min_context = 4
max_document_tokens = 64
[rollout]
max_new_tokens = 4
[train]
steps = 1
tasks_per_step = 1
"#;

#[test]
fn a_run_keeps_the_commits_that_it_began_with() {
    let place = Place::with_model();
    let data = place.hub.publish("datasets/someone/texts", "main", dataset_files());
    let pipeline = place.home.path().join("remote.toml");
    fs::write(&pipeline, PIPELINE).unwrap();
    let (pipeline, out) = (pipeline.to_str().unwrap(), place.home.path().join("run"));
    let prepare = ["prepare", pipeline, "--out", out.to_str().unwrap()];

    place.succeeds(&["run", pipeline, "--dry-run"]);
    let planned: Vec<String> = place.hub.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(planned.len(), 2, "a plan needs the listing and config.json: {planned:?}");

    place.succeeds(&prepare);
    let inputs = json(&fs::read_to_string(out.join("inputs.json")).unwrap());
    let model = fs::read_to_string(place.cache().join("refs/main")).unwrap();
    assert_eq!(inputs["hf://someone/tiny-model@main"], model);
    assert_eq!(inputs["hf://datasets/someone/texts@main"], data);
    let log = fs::read_to_string(out.join("logs/attempt-1.log")).unwrap();
    assert!(log.contains(&model) && log.contains(&data), "{log}");
    let kept = fs::read_to_string(out.join("pipeline.toml")).unwrap();
    assert!(kept.contains("hf://someone/tiny-model") && !kept.contains("snapshots"), "{kept}");

    // The names move on; the run does not.
    let mut moved = dataset_files();
    moved.insert("data/train-2.parquet".into(), parquet(9));
    let newer = place.hub.publish("datasets/someone/texts", "main", moved);
    fs::write(place.home.path().join("hub/datasets--someone--texts/refs/main"), &newer).unwrap();
    place.hub.requests();
    fs::remove_dir_all(out.join("tasks")).unwrap();
    place.succeeds(&prepare);
    let offline = place.command(&prepare).env("HF_HUB_OFFLINE", "1").output().unwrap();
    assert!(offline.status.success(), "{}", stderr(&offline));
    assert!(place.hub.requests().is_empty(), "a run that goes on needs the cache alone");
    assert_eq!(json(&fs::read_to_string(out.join("inputs.json")).unwrap()), inputs);
    let spelled = place.succeeds(&["inspect", out.join("tasks/train").to_str().unwrap(), "--json"]);
    assert!(
        json(&spelled)["sample"][0]["truth"].is_string(),
        "the tokenizer is found through the run: {spelled}"
    );
}

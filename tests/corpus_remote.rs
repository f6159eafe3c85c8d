//! Corpora in a store on this machine: the documents are those of the local files, whatever goes wrong
//! on the way, and secrets stay where they belong.
#![cfg(feature = "remote")]
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/command.rs"]
mod command;
#[path = "corpus_remote/server.rs"]
mod server;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use command::{PIPELINE, RPT, stderr, stdout};
use flate2::write::GzEncoder;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use rpt::config::CorpusConfig;
use rpt::corpus::{Corpus, Cursor};
use serde::{Deserialize, Serialize};
use server::{FakeStore, Fault};
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use tempfile::TempDir;

const SECRETS: [&str; 3] = ["AKIDSECRETSECRET", "verysecretkeyverysecret", "secretsessiontoken"];

/// What reading a corpus gave.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Outcome {
    documents: Vec<(String, String)>,
    dropped: String,
    quarantined: Vec<String>,
    fingerprint: String,
    files: Vec<String>,
    /// The error in every form, if there was one.
    error: String,
    /// What was read by cutting the stream after every hundredth document.
    restarted: usize,
}

impl Outcome {
    fn of(source: &str) -> Self {
        let config =
            CorpusConfig { id_column: Some("id".into()), max_quarantined: 4, ..CorpusConfig::new(source) };
        let mut outcome = Self::default();
        if let Err(error) = outcome.read(&config) {
            outcome.error = format!("{error}\n{error:?}\n{:?}", error.hint());
        }
        outcome
    }

    fn read(&mut self, config: &CorpusConfig) -> Result<(), rpt::corpus::CorpusError> {
        let corpus = Corpus::open(config)?;
        self.files = corpus.files().map(|path| path.display().to_string()).collect();
        self.fingerprint = corpus.fingerprint()?;
        let mut stream = corpus.documents();
        for document in stream.by_ref() {
            let document = document?;
            self.documents.push((document.id, document.text));
        }
        self.dropped = format!("{:?}", stream.counts().dropped);
        self.quarantined = stream.counts().quarantined.iter().map(ToString::to_string).collect();
        let mut cursor = Cursor::default();
        loop {
            let mut part = corpus.documents_from(cursor);
            let count = part.by_ref().take(100).collect::<Result<Vec<_>, _>>()?.len();
            self.restarted += count;
            if count < 100 {
                return Ok(());
            }
            cursor = part.cursor();
        }
    }

    /// What is said, in one text.
    fn said(&self) -> String {
        format!("{} {:?} {:?} {}", self.error, self.quarantined, self.files, self.fingerprint)
    }
}

/// Reads a corpus in a process of its own, because stores are set up from the environment.
#[test]
#[ignore = "other tests run it as a process of its own"]
fn reader() {
    let (Ok(source), Ok(out)) = (std::env::var("READER_SOURCE"), std::env::var("READER_OUT")) else { return };
    fs::write(out, serde_json::to_string(&Outcome::of(&source)).unwrap()).unwrap();
}

/// A local corpus and its copy in a store.
struct Place {
    store: FakeStore,
    directory: TempDir,
}

impl Place {
    /// Several row groups of several blocks, lists of more than one page, other files in between.
    fn new() -> Self {
        let place = Self { store: FakeStore::new(), directory: tempfile::tempdir().unwrap() };
        for (number, name) in
            ["b.parquet", "a/z.parquet", "a.parquet", "a/deep/er.parquet"].iter().enumerate()
        {
            place.put(name, parquet(number, if number == 0 { 900 } else { 150 }));
        }
        place.put("c.jsonl", lines("c", 300).into_bytes());
        place.put("d.jsonl.gz", gzip(&lines("d", 300)));
        place.put("e.jsonl.zst", zstd::encode_all(lines("e", 300).as_bytes(), 1).unwrap());
        place.put("notes.txt", b"no corpus".to_vec());
        place.put(".hidden/f.parquet", b"no corpus".to_vec());
        place
    }

    fn put(&self, name: &str, content: Vec<u8>) {
        let path = self.directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, &content).unwrap();
        self.store.put(&format!("bucket/data/{name}"), content);
    }

    fn local(&self, name: &str) -> Outcome {
        Outcome::of(self.directory.path().join(name).to_str().unwrap())
    }

    fn environment(&self, command: &mut Command) {
        command.env_clear().env("AWS_ENDPOINT_URL", self.store.endpoint());
        let names = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"];
        command.envs(names.into_iter().zip(SECRETS)).env("RPT_REMOTE_TIMEOUT", "1");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }

    /// Reads a source in a process of its own.
    fn remote(&self, source: &str) -> Outcome {
        let out = self.directory.path().join("outcome");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "reader", "--ignored", "--nocapture"]);
        self.environment(&mut command);
        let output = command.env("READER_SOURCE", source).env("READER_OUT", &out).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let outcome: Outcome = serde_json::from_str(&fs::read_to_string(&out).unwrap()).unwrap();
        fs::remove_file(out).unwrap();
        silent(&format!("{} {} {}", outcome.said(), stdout(&output), stderr(&output)));
        outcome
    }

    fn rpt(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(RPT);
        self.environment(&mut command);
        let output = command.args(arguments).output().unwrap();
        silent(&(stdout(&output) + &stderr(&output)));
        output
    }
}

/// No secret, and nothing that was made with one, may be in a text.
fn silent(text: &str) {
    for secret in SECRETS.iter().chain(&["Signature", "Credential="]) {
        assert!(!text.contains(secret), "{secret} is shown: {text}");
    }
}

/// Documents that hardly compress, in row groups of 200 rows.
fn parquet(seed: usize, count: usize) -> Vec<u8> {
    let texts: Vec<String> = (0..count).map(|index| text(seed * 10_000 + index, 20_000)).collect();
    let properties = WriterProperties::builder().set_dictionary_enabled(false);
    let properties = properties.set_max_row_group_row_count(Some(200)).build();
    let id: ArrayRef = Arc::new(Int64Array::from_iter_values((0..count as i64).map(|index| index * 7)));
    let text: ArrayRef = Arc::new(StringArray::from_iter_values(texts));
    let batch = RecordBatch::try_from_iter(vec![("id", id), ("text", text)]).unwrap();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

fn text(seed: usize, most: usize) -> String {
    let mut text = String::new();
    let mut next = blake3::hash(&seed.to_le_bytes());
    for _ in 0..=(seed * 7919) % (most / 64) {
        write!(text, "{}", next.to_hex()).unwrap();
        next = blake3::hash(next.as_bytes());
    }
    text
}

fn lines(name: &str, count: usize) -> String {
    let line = |index: usize| format!("{{\"id\":\"{name}{index}\",\"text\":\"{}\"}}\n", text(index, 3000));
    (0..count).map(line).collect()
}

fn gzip(content: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

/// The same but for where the files are.
fn assert_same(remote: &Outcome, local: Outcome) {
    assert_eq!(remote.error, "");
    assert!(remote.documents == local.documents, "the documents differ");
    let remote = Outcome {
        documents: Vec::new(),
        ..serde_json::from_value(serde_json::to_value(remote).unwrap()).unwrap()
    };
    let local = Outcome { documents: Vec::new(), ..local };
    assert_eq!(remote, Outcome { files: remote.files.clone(), ..local });
}

#[test]
fn documents_and_fingerprint_are_those_of_the_local_files() {
    let place = Place::new();
    for name in ["", "*.parquet", "a/**/*.parquet", "a", "b.parquet", "[cde].jsonl*", "d.jsonl.gz"] {
        let remote = place.remote(&format!("s3://bucket/data/{name}"));
        let local = place.local(name);
        assert!(local.documents.len() >= 150, "{name}: {}", local.error);
        assert_eq!(remote.restarted, remote.documents.len());
        let files = local
            .files
            .iter()
            .map(|file| file.strip_prefix(place.directory.path().to_str().unwrap()).unwrap());
        let files: Vec<_> =
            files.map(|file| format!("s3://bucket/data/{}", file.trim_start_matches('/'))).collect();
        assert_eq!(remote.files, files);
        assert_same(&remote, local);
    }
    let web = format!("{}/bucket/data/b.parquet", place.store.endpoint());
    assert_same(&place.remote(&web), place.local("b.parquet"));
    assert_same(
        &place.remote(&format!("{}/bucket/data/a/deep/%65r.parquet", place.store.endpoint())),
        place.local("a/deep/er.parquet"),
    );
}

#[test]
fn only_footers_and_needed_columns_are_asked_for_in_blocks() {
    let place = Place::new();
    let other: ArrayRef = Arc::new(StringArray::from_iter_values((0..300).map(|index| text(index, 80_000))));
    let wanted: ArrayRef = Arc::new(StringArray::from_iter_values((0..300).map(|index| text(index, 2000))));
    let id: ArrayRef = Arc::new(Int64Array::from_iter_values(0..300));
    let batch = RecordBatch::try_from_iter(vec![("other", other), ("text", wanted), ("id", id)]).unwrap();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    let content = writer.into_inner().unwrap();
    let length = content.len();
    place.put("wide/w.parquet", content);
    place.store.requests();
    assert_same(&place.remote("s3://bucket/data/wide"), place.local("wide"));
    let requests = place.store.requests();
    let ranges: Vec<_> = requests.iter().filter_map(server::Request::range).collect();
    assert!(ranges.iter().all(|range| range.len() <= 4 << 20), "{ranges:?}");
    let most = ranges.iter().map(std::iter::ExactSizeIterator::len).sum::<usize>();
    assert!(most < length / 2, "{most} of {length} bytes were asked for");
    let bare =
        |request: &&server::Request| request.method == "GET" && !request.query.contains_key("list-type");
    assert!(requests.iter().filter(bare).all(|request| request.range().is_some()), "{requests:?}");
}

#[test]
fn what_goes_wrong_on_the_way_is_tried_again() {
    let place = Place::new();
    let local = place.local("");
    let faults = [
        Fault::Status(500),
        Fault::Status(503),
        Fault::Status(429),
        Fault::Cut(0),
        Fault::Cut(100_000),
        Fault::Stall(1000),
        Fault::Short(1),
        Fault::Short(5000),
    ];
    for (index, fault) in faults.iter().enumerate() {
        place.store.fail(if index % 2 == 0 { "b.parquet" } else { "d.jsonl.gz" }, *fault);
    }
    place.store.fail("data/", Fault::Status(502));
    assert_same(&place.remote("s3://bucket/data"), local);
    assert_eq!(place.store.faults_left(), 0, "every fault was met");
}

#[test]
fn what_does_not_pass_is_named_and_secrets_are_not() {
    let place = Place::new();
    let fails = |source: &str, words: &[&str]| {
        let outcome = place.remote(source);
        for word in words {
            assert!(outcome.said().contains(word), "no `{word}` in: {}", outcome.said());
        }
    };
    fails("s3://bucket/nothing/here", &["holds no parquet"]);
    fails("s3://nobucket/data", &["s3://nobucket/data", "answered 404: NoSuchBucket"]);
    fails("s3://bucket/data/[", &["is not a valid glob"]);
    fails("https://user:secretsessiontoken@host/a.parquet", &["must not carry credentials"]);
    fails("https://host/a.parquet?X-Amz-Signature=AKIDSECRETSECRET", &["must not carry credentials"]);
    fails("http://192.0.2.1/a.parquet", &["http://192.0.2.1/a.parquet", "is not encrypted"]);
    fails("gs://bucket/a", &["gs://bucket/a"]);
    fails("az://container/a", &["az://container/a"]);
    for status in [400, 401, 403] {
        place.store.fail("data/", Fault::Status(status));
        fails(
            "s3://bucket/data",
            &["s3://bucket/data", &format!("answered {status}: SlowDown"), "AWS_REGION"],
        );
    }
    for _ in 0..10 {
        place.store.fail("data/", Fault::Status(500));
    }
    fails("s3://bucket/data", &["answered 500: SlowDown", "attempts: "]);
    place.store.forget_faults();
    for (fault, words) in [
        (Fault::Status(403), "answered 403"),
        (Fault::Whole, "does not serve parts"),
        (Fault::Changed, "has changed since it was listed"),
    ] {
        place.store.fail("data/a.parquet", fault);
        fails("s3://bucket/data/[a].parquet", &["s3://bucket/data/a.parquet", words]);
        assert_eq!(place.store.faults_left(), 0);
    }
}

#[test]
fn what_a_store_does_not_give_is_not_taken_for_damage() {
    let place = Place::new();
    // Two ends of the file go into the fingerprint; what follows is read for its documents.
    for (fault, word) in [(Fault::Status(403), "answered 403"), (Fault::Changed, "has changed")] {
        place.store.fail_after(2, "data/d.jsonl.gz", fault);
        let outcome = place.remote("s3://bucket/data");
        assert!(outcome.error.contains(word) && outcome.error.contains("d.jsonl.gz"), "{}", outcome.error);
        assert!(outcome.error.contains("Store"), "{}", outcome.error);
        assert!(outcome.documents.len() > 1000 && outcome.quarantined.is_empty());
    }
}

#[test]
fn no_manifest_of_a_run_holds_a_secret() {
    let place = Place::new();
    let texts: ArrayRef = Arc::new(StringArray::from_iter_values(command::texts(12)));
    let batch = RecordBatch::try_from_iter(vec![("text", texts)]).unwrap();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    place.put("run/small.parquet", writer.into_inner().unwrap());
    let pipeline = place.directory.path().join("pipeline.toml");
    fs::write(&pipeline, PIPELINE.replace("SOURCE", "s3://bucket/data/run")).unwrap();
    let out = place.directory.path().join("run-directory");
    let output = place.rpt(&["run", pipeline.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    assert!(output.status.success(), "{}", stderr(&output));
    let mut seen = 0;
    each_file(&out, &mut |content| {
        seen += 1;
        silent(&String::from_utf8_lossy(content));
    });
    assert!(seen > 5, "only {seen} files");
    let shown = stdout(&place.rpt(&["inspect", "s3://bucket/data/run", "--json"]));
    assert!(shown.contains("\"documents\":12"), "{shown}");
}

fn each_file(directory: &Path, visit: &mut dyn FnMut(&[u8])) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            each_file(&path, visit);
        } else {
            visit(&fs::read(path).unwrap());
        }
    }
}

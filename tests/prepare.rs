//! Tasks built by one worker or by many, killed or not, through the real binary: the same bytes.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/command.rs"]
mod command;
#[path = "common/run.rs"]
mod run;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use command::{RPT, refuses, rpt, succeeds};
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use rpt::config::TokenizerConfig;
use rpt::random::Stream;
use rpt::tokenize::{SpecialTokens, train_byte_level_bpe};
use run::{files, json, snapshot, succeeded};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread::sleep;
use std::time::{Duration, Instant};

struct Place(PathBuf);

/// Documents of some hundred bytes each. From the second file on, every tenth repeats one of the first,
/// and the one after it does so but for its last word.
fn texts(file: u64) -> Vec<String> {
    let word = |stream: Stream, n: u64| {
        ["tree ", "sea ", "dog ", "runs ", "and ", "12 ", "of ", "éß "][stream.below(n, 8) as usize]
    };
    let text = |row: u64| {
        let stream = Stream::new(if row % 10 < 2 { 0 } else { file }, "text");
        let last = if row % 10 == 1 && file > 0 { format!("last{file}.") } else { String::new() };
        (0..100).map(|n| word(stream, row * 100 + n)).collect::<String>() + &last
    };
    (0..600).map(text).collect()
}

fn write_corpus(directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    for file in 0..5 {
        let column = Arc::new(StringArray::from(texts(file))) as ArrayRef;
        let batch = RecordBatch::try_from_iter([("text", column)]).unwrap();
        let settings = WriterProperties::builder().set_max_row_group_row_count(Some(100)).build();
        let file = File::create(directory.join(format!("part-{file}.parquet"))).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(settings)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }
}

impl Place {
    /// A corpus, a tokenizer and a pipeline that needs no model.
    fn new(name: &str) -> Self {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let _ = fs::remove_dir_all(&root);
        write_corpus(&root.join("corpus"));
        let tokenizer = train_byte_level_bpe(texts(0).into_iter(), 400).unwrap();
        let special = SpecialTokens::resolve(&tokenizer, &TokenizerConfig::default()).unwrap();
        tokenizer.save(&root, &special).unwrap();
        let place = root.display();
        let pipeline = format!(
            "[corpus]\nsource = '{place}/corpus'\n[corpus.deduplicate]\nnear = true\n[tokenizer]\npath = '{place}/tokenizer.json'\n[model.scratch]\n\
             hidden_size = 16\nnum_hidden_layers = 1\nnum_attention_heads = 2\nintermediate_size = 16\n[tasks]\n\
             template = 'plain'\nselection = 'random'\nscore = false\nmin_context = 4\nmax_document_tokens = 64\n\
             unit_bytes = 40000\nshard_bytes = 20000\n"
        );
        fs::write(root.join("pipeline.toml"), pipeline).unwrap();
        Self(root)
    }

    fn path(&self, run: &str) -> PathBuf {
        self.0.join(run)
    }

    fn command(&self, run: &str, further: &[&str]) -> Command {
        let mut process = Command::new(RPT);
        process.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        process
            .arg("prepare")
            .arg(self.0.join("pipeline.toml"))
            .arg("--out")
            .arg(self.path(run))
            .args(further);
        process
    }

    fn prepare(&self, run: &str, further: &[&str]) -> String {
        succeeded(&self.command(run, further).output().unwrap())
    }

    fn start(&self, run: &str, further: &[&str]) -> Child {
        self.command(run, further).spawn().unwrap()
    }

    /// Every file of the training tasks, by its name there.
    fn tasks(&self, run: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let root = self.path(run).join("tasks/train");
        let named = |path: PathBuf| (path.strip_prefix(&root).unwrap().to_owned(), fs::read(&path).unwrap());
        files(&root).into_iter().map(named).collect()
    }
}

/// The place with the undisturbed run `whole`, and its duration.
fn place() -> (&'static Place, Duration) {
    static PLACE: OnceLock<(Place, Duration)> = OnceLock::new();
    let (place, duration) = PLACE.get_or_init(|| {
        let (place, start) = (Place::new("prepare"), Instant::now());
        place.prepare("whole", &[]);
        (place, start.elapsed())
    });
    (place, *duration)
}

#[test]
fn a_corpus_is_many_units_of_several_shards() {
    let manifest = json(&place().0.path("whole").join("tasks/train/tasks.json"));
    let shards = manifest["shards"].as_array().unwrap();
    assert!(shards.last().unwrap()["file"].as_str().unwrap() > "unit-00015", "{}", shards.len());
    assert!(shards.iter().any(|shard| shard["file"].as_str().unwrap().ends_with("tasks-00001.arrow")));
    let dropped = &manifest["corpus"]["dropped"];
    assert_eq!((&dropped["duplicate"], &dropped["near_duplicate"]), (&240.into(), &240.into()));
    assert_eq!(manifest["counts"]["documents"], 2520);
    assert_eq!((&manifest["corpus"]["documents"], &manifest["corpus"]["files"]), (&2520.into(), &5.into()));
    let unit = json(&place().0.path("whole").join("tasks/train/unit-00001/tasks.json"));
    assert_eq!(unit["sources"][0]["file"], "part-0.parquet");
}

#[test]
fn a_unit_is_inspected_as_all_are_and_shows_whole_prompts() {
    let run = place().0.path("whole");
    for part in ["tasks/train", "tasks/train/unit-00002"] {
        let found: serde_json::Value =
            serde_json::from_str(&succeeds([Path::new("inspect"), Path::new("--json"), &run.join(part)]))
                .unwrap();
        assert_eq!(found["corpus"]["documents"], found["counts"]["documents"]);
        let lengths: u64 =
            found["lengths"]["bins"].as_array().unwrap().iter().map(|bin| bin.as_u64().unwrap()).sum();
        assert_eq!(found["counts"]["pieces"], lengths);
        assert_eq!(found["top_drops"][0]["reason"], "tokens_not_drawn");
        assert_eq!(found["sample"][0]["footer"], "<think>");
        assert_eq!(found["sources"].as_array().unwrap().is_empty(), part == "tasks/train");
    }
    let shard = run.join("tasks/train/unit-00002/tasks-00001.arrow");
    let found: serde_json::Value =
        serde_json::from_str(&succeeds([Path::new("inspect"), Path::new("--json"), &shard])).unwrap();
    let positions: u64 =
        found["entropy"]["bins"].as_array().unwrap().iter().map(|bin| bin.as_u64().unwrap()).sum();
    assert_eq!((&found["kind"], &found["shard"]["positions"]), (&"task shard".into(), &positions.into()));
    assert_eq!(found["sample"][0]["footer"], "<think>");
    assert!(succeeds([Path::new("inspect"), &shard]).contains("entropy of the positions"));
    let people = succeeds([Path::new("inspect"), &run.join("tasks/train/unit-00002")]);
    assert!(people.contains("<think>⟦") && people.contains("length of the pieces"), "{people}");
}

#[test]
fn workers_in_any_order_make_the_same_tasks() {
    let (place, _) = place();
    for share in ["2/3", "0/3"] {
        place.prepare("apart", &["--shard", share]);
        assert!(!place.path("apart/tasks/train/tasks.json").exists());
    }
    let mut last = place.command("apart", &["--json"]);
    last.env("SLURM_ARRAY_TASK_ID", "2").env("SLURM_ARRAY_TASK_MIN", "1").env("SLURM_ARRAY_TASK_COUNT", "3");
    let last = last.output().unwrap();
    succeeded(&last);
    assert!(String::from_utf8(last.stdout).unwrap().contains("\"complete\":true"));
    assert!(place.tasks("apart") == place.tasks("whole"));
}

#[test]
fn killed_fifty_times_the_tasks_are_the_same() {
    let (place, duration) = place();
    let moments = Stream::new(5, "kill");
    let shares = ["0/3", "1/3", "2/3"];
    let (mut kills, mut number) = (0, 0);
    while kills < 50 {
        let name = format!("killed-{number}");
        let mut attempt = place.start(&name, &["--shard", shares[kills as usize % 3]]);
        sleep(duration.mul_f64(0.4 * moments.uniform(kills)));
        let _ = attempt.kill();
        let _ = attempt.wait();
        kills += 1;
        if place.path(&name).join("tasks/train/tasks.json").exists() || kills == 50 {
            for share in shares {
                place.prepare(&name, &["--shard", share]);
            }
            assert!(place.tasks(&name) == place.tasks("whole"), "{name}");
            number += 1;
        }
    }
}

#[test]
fn two_workers_at_once_on_the_same_units_leave_one_of_each() {
    let (place, _) = place();
    for number in 0..3 {
        let name = format!("twice-{number}");
        let workers: Vec<Child> = (0..3).map(|_| place.start(&name, &["--shard", "0/1"])).collect();
        for worker in workers {
            succeeded(&worker.wait_with_output().unwrap());
        }
        assert!(place.tasks(&name) == place.tasks("whole"));
    }
}

#[test]
fn other_bounds_need_no_second_model_pass_where_scores_are_kept() {
    let (place, _) = place();
    let scores = format!("tasks.scores='{}'", place.path("scores").display());
    let of = |bounds: &'static str, kept: bool| {
        let settings = [
            "tasks.score=true",
            "tasks.selection=entropy",
            "tasks.top_share=0.9",
            "tasks.max_documents=200",
            "model.scratch.embedding_std=0.3",
            bounds,
        ];
        let kept = kept.then_some(scores.as_str());
        settings.into_iter().chain(kept).flat_map(|setting| ["--set", setting]).map(String::from).collect()
    };
    let run = |name: &str, settings: Vec<String>| {
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        place.prepare(name, &settings);
        place.tasks(name)
    };
    let first = run("scored", of("tasks.min_entropy=0.1", true));
    let written = snapshot(&place.path("scores"));
    assert_eq!(written.keys().filter(|path| path.extension().is_some_and(|e| e == "arrow")).count(), 1);
    let again = run("scored-again", of("tasks.min_entropy=1.5", true));
    assert!(snapshot(&place.path("scores")) == written);
    assert!(again == run("scored-afresh", of("tasks.min_entropy=1.5", false)) && again != first);
}

#[test]
fn a_damaged_file_is_named_in_the_manifest_and_too_many_stop_the_job() {
    let place = Place::new("prepare-damaged");
    let damaged = place.path("corpus/part-2.parquet");
    let length = fs::metadata(&damaged).unwrap().len();
    File::options().write(true).open(&damaged).unwrap().set_len(length / 2).unwrap();
    let said = place.prepare("damaged", &[]);
    assert!(said.contains("quarantined") && said.contains("part-2.parquet"), "{said}");
    let manifest = json(&place.path("damaged/tasks/train/tasks.json"));
    assert_eq!(
        (&manifest["corpus"]["quarantined_total"], &manifest["counts"]["documents"]),
        (&1.into(), &2040.into())
    );
    for share in ["0/2", "1/2"] {
        let refused =
            place.command("refused", &["--shard", share, "--set", "corpus.max_quarantined=0"]).output();
        if refused.as_ref().unwrap().status.success() {
            continue;
        }
        refuses(&refused.unwrap(), 1, &["part-2.parquet"]);
        return;
    }
    panic!("nobody was refused");
}

#[test]
fn what_one_worker_must_make_is_refused_to_many() {
    let quickstart = "pipelines/quickstart-short.toml";
    let out = place().0.path("refused-share");
    let arguments = ["prepare", quickstart, "--shard", "0/2", "--out"].map(Path::new);
    refuses(&rpt(arguments.into_iter().chain([out.as_path()])), 1, &["generated corpus"]);
    assert!(!out.exists());
    assert_eq!(rpt(["prepare", quickstart, "--shard", "2/2"]).status.code(), Some(2));
    succeeds(["prepare", quickstart, "--shard", "1/2", "--dry-run"]);
}

//! A run that trains a low-rank adapter, through the real binary.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/command.rs"]
mod command;
#[path = "common/run.rs"]
mod run;

use command::{RPT, refuses, rpt, succeeds};
use rpt::model::{Decoder, Forest, Tape, Workspace};
use run::{Workplace, assert_same_result, checkpoints, metrics, succeeded};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::Duration;

/// Seconds of training on the adapter of a small model that a scratch run has pretrained.
const SETTINGS: &str = "
[pretrain]
steps = 20
documents_per_step = 4
optimizer = { learning_rate = 1e-3 }
[tasks]
template = 'plain'
min_entropy = 0.05
min_context = 1
positions_per_document = 4
max_document_tokens = 300
max_documents = 60
[cold_start]
steps = 60
traces_per_step = 8
optimizer = { learning_rate = 1e-2 }
[rollout]
samples_per_task = 4
max_new_tokens = 12
[reward]
answer = 'rest'
[train]
steps = 12
tasks_per_step = 8
min_initial_reward = 0.0
min_initial_mixed_groups = 0.0
optimizer = { learning_rate = 1e-3 }
[eval]
max_documents = 4
max_positions = 20
resamples = 100
[run]
checkpoint_every = 3
";

struct Adapted {
    place: Workplace,
    base: PathBuf,
    pipeline: PathBuf,
}

impl Adapted {
    fn command(&self, run: &str) -> Command {
        let mut process = Command::new(RPT);
        process.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        process.arg("run").arg(&self.pipeline).arg("--out").arg(self.place.path(run));
        process
    }
}

/// The undisturbed run `whole`, made once.
fn adapted() -> &'static Adapted {
    static PLACE: OnceLock<Adapted> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = Workplace::new("adapters");
        let scratch =
            ["cold_start.steps=1", "train.steps=1", "pretrain.steps=150", "controls.more_cold_start=false"];
        place.run("scratch", &scratch);
        let base = place.path("base");
        let arguments = ["export", "--stage", "pretrain", "--out"].map(Path::new);
        succeeds(arguments.into_iter().chain([base.as_path(), &place.path("scratch")]));
        let text = format!(
            "seed = 1\n[corpus]\nsource = '{}'\n[model]\npath = '{}'\n[model.lora]\nrank = 4\nalpha = 8.0\n",
            place.path("corpus").display(),
            base.display()
        );
        let pipeline = place.path("adapter.toml");
        fs::write(&pipeline, text + SETTINGS).unwrap();
        let adapted = Adapted { place, base, pipeline };
        succeeded(&adapted.command("whole").output().unwrap());
        adapted
    })
}

/// States of a fixed text, as bits.
fn states(decoder: &Decoder) -> Vec<u32> {
    let ids: Vec<u32> = (0..40).map(|at| at * 7 % 256).collect();
    let mut forest = Forest::default();
    forest.add(None, &ids);
    let (mut cache, mut workspace) = (decoder.new_cache(), Workspace::default());
    let extensions = forest.enter(&mut cache);
    decoder.forward(forest.ids(), &extensions, &mut cache, &mut workspace, None::<&mut Tape>).unwrap();
    let rows: Vec<usize> = (0..ids.len()).collect();
    decoder.hidden(&workspace, &rows).iter().map(|value| value.to_bits()).collect()
}

#[test]
fn it_learns_and_the_engine_samples_from_what_the_trainer_trains() {
    let adapted = adapted();
    let lines = metrics(&adapted.place.path("whole"));
    let updates: Vec<_> = lines.iter().filter(|line| line.contains_key("mismatched_tokens")).collect();
    assert!(!updates.is_empty());
    assert!(updates.iter().all(|line| line["mismatched_tokens"] == 0));
    let exported = adapted.place.path("learnt");
    succeeds(
        ["export", "--out"]
            .map(Path::new)
            .into_iter()
            .chain([exported.as_path(), &adapted.place.path("whole")]),
    );
    assert!(states(&Decoder::load(&exported).unwrap()) != states(&Decoder::load(&adapted.base).unwrap()));
}

#[test]
fn killed_it_ends_as_if_it_had_not_been() {
    let adapted = adapted();
    for (name, stage, enough) in [("killed-early", "pretrain", 2), ("killed-late", "train", 2)] {
        let mut attempt = adapted.command(name).spawn().unwrap();
        while checkpoints(&adapted.place.path(name), stage).len() < enough
            && attempt.try_wait().unwrap().is_none()
        {
            sleep(Duration::from_millis(1));
        }
        let _ = attempt.kill();
        let _ = attempt.wait();
        succeeded(&adapted.command(name).output().unwrap());
        assert_same_result(&adapted.place.path(name), &adapted.place.path("whole"));
    }
}

#[test]
fn the_adapter_alone_on_its_base_is_the_merged_model() {
    let adapted = adapted();
    let (whole, merged, alone) =
        (adapted.place.path("whole"), adapted.place.path("merged"), adapted.place.path("alone"));
    succeeds(["export", "--out"].map(Path::new).into_iter().chain([merged.as_path(), &whole]));
    succeeds(["export", "--adapter", "--out"].map(Path::new).into_iter().chain([alone.as_path(), &whole]));
    let together = Decoder::load(&adapted.base).unwrap().with_adapter_of(&alone).unwrap();
    assert!(states(&together) == states(&Decoder::load(&merged).unwrap()));
    let card = fs::read_to_string(alone.join("README.md")).unwrap();
    assert!(card.contains("library_name: peft") && card.contains("base_model: \"base\""), "{card}");
}

#[test]
fn a_run_without_an_adapter_has_none_to_export() {
    let (scratch, out) = (adapted().place.path("scratch"), adapted().place.path("none"));
    let arguments = ["export", "--adapter", "--out"].map(Path::new);
    refuses(&rpt(arguments.into_iter().chain([out.as_path(), &scratch])), 1, &["adapter"]);
    assert!(!out.exists());
}

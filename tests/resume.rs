//! A run that is killed, stopped or damaged ends as one that was not, or says why it cannot.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

#[path = "common/command.rs"]
mod command;
#[path = "common/run.rs"]
mod run;

use command::{refuses, rpt, stderr, stdout};
use rpt::model::{Decoder, Dtype};
use rpt::random::Stream;
use run::{
    STAGES, TINY, Workplace, assert_same_result, checkpoints, flip, json, metrics, newest, optimizer_state,
    rollouts, snapshot, succeeded, weights,
};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The undisturbed run `whole` that others are compared with, made once; with its duration.
fn place() -> (&'static Workplace, Duration) {
    static PLACE: OnceLock<(Workplace, Duration)> = OnceLock::new();
    let (place, duration) = PLACE.get_or_init(|| {
        let (place, start) = (Workplace::new("resume"), Instant::now());
        place.run("whole", &[]);
        (place, start.elapsed())
    });
    (place, *duration)
}

fn verify(run: &Path) -> std::process::Output {
    rpt([Path::new("verify"), run])
}

/// Removes what the end of a run writes, so that the next attempt goes through every stage again.
fn forget_the_end(run: &Path) {
    fs::remove_file(run.join("summary.json")).unwrap();
    fs::remove_dir_all(run.join("eval")).unwrap();
}

#[test]
fn the_run_that_others_are_compared_with_has_learnt_something() {
    let whole = place().0.path("whole");
    for stage in STAGES {
        assert!(checkpoints(&whole, stage).len() > 1, "{stage}");
    }
    let train: Vec<_> = metrics(&whole).into_iter().filter(|line| line["stage"] == "train").collect();
    assert_eq!(train.len(), 24);
    assert!(train.iter().filter(|line| line["reward"].as_f64() > Some(0.0)).count() > 3);
    assert!(train.iter().any(|line| line["kept_groups"] != line["groups"]));
    // Steps whose groups are all dropped have no such figures.
    let updates: Vec<_> = train.iter().filter(|line| line.contains_key("mismatched_tokens")).collect();
    assert!(updates.len() > 12);
    assert!(updates.iter().all(|line| line["mismatched_tokens"] == 0 && line["logprob_gap"] == 0.0));
    assert!(rollouts(&whole).iter().any(|row| row.reward > 0.0 && row.advantage > 0.0));
    assert_eq!(json(&whole.join("summary.json"))["ledger"]["balanced"], true);
}

#[test]
fn killed_at_twenty_moments_it_ends_as_if_it_had_not_been() {
    let (place, duration) = place();
    let moments = Stream::new(3, "kill");
    let (mut kills, mut number) = (0, 0);
    while kills < 20 {
        let name = format!("killed-{number}");
        let mut attempt = place.command("run", &name, &[]).spawn().unwrap();
        sleep(duration.mul_f64(0.25 * moments.uniform(kills)));
        if attempt.try_wait().unwrap().is_some() {
            succeeded(&attempt.wait_with_output().unwrap());
            assert_same_result(&place.path(&name), &place.path("whole"));
            number += 1;
        } else {
            attempt.kill().unwrap();
            attempt.wait().unwrap();
            kills += 1;
        }
    }
    let name = format!("killed-{number}");
    place.run(&name, &[]);
    assert_same_result(&place.path(&name), &place.path("whole"));
    assert!(verify(&place.path(&name)).status.success());
}

/// Waits until a stage has logged some steps.
fn wait_for(attempt: &mut Child, run: &Path, stage: &str, steps: usize) {
    let line = format!("\"stage\":\"{stage}\"");
    let seen =
        || fs::read_to_string(run.join("metrics.jsonl")).is_ok_and(|log| log.matches(&line).count() >= steps);
    while !seen() {
        assert!(attempt.try_wait().unwrap().is_none(), "the run ended before {stage}");
        sleep(Duration::from_millis(1));
    }
}

/// Starts a run and asks it to stop once a stage has logged some steps; what it said.
fn stop(place: &Workplace, name: &str, stage: &str, steps: usize) -> String {
    let mut attempt = place.command("run", name, &[]).spawn().unwrap();
    wait_for(&mut attempt, &place.path(name), stage, steps);
    assert!(Command::new("kill").args(["-TERM", &attempt.id().to_string()]).status().unwrap().success());
    let output = attempt.wait_with_output().unwrap();
    refuses(&output, 75, &["interrupted", "saved", "hint: run the same command again"]);
    stderr(&output)
}

#[test]
fn asked_to_stop_it_saves_its_last_step_and_goes_on_from_there() {
    let (place, _) = place();
    let run = place.path("stopped");
    for (stage, steps) in [("pretrain", 3), ("cold_start", 7), ("train", 8)] {
        let said = stop(place, "stopped", stage, steps);
        // The signal may reach the process a stage later, but never unsaved work.
        let last = metrics(&run).pop().unwrap();
        let state = json(&newest(&run, last["stage"].as_str().unwrap()).join("state.json"));
        assert_eq!(state["step"], last["step"], "{said}");
    }
    let output = verify(&run);
    assert!(output.status.success(), "{}", stdout(&output));
    // Commands that read a run between its attempts leave no trace in its result.
    for command in ["eval", "report"] {
        succeeded(&rpt([Path::new(command), &run]));
    }
    place.run("stopped", &[]);
    assert_same_result(&run, &place.path("whole"));
}

#[test]
fn an_evaluation_needs_the_finished_model_that_chooses_its_positions() {
    let (place, _) = place();
    stop(place, "unfinished", "pretrain", 3);
    let run = place.path("unfinished");
    refuses(&rpt([Path::new("eval"), &run]), 1, &["pre-training has not finished"]);
    assert!(!run.join("tasks/eval").exists());
}

#[test]
fn a_finished_run_stays_as_it_is() {
    let (place, _) = place();
    let run = place.copy("whole", "finished");
    let before = snapshot(&run);
    let output = place.command("run", "finished", &[]).output().unwrap();
    assert!(succeeded(&output).contains("already finished"));
    assert_eq!(stdout(&output).trim(), run.display().to_string());
    assert!(snapshot(&run) == before, "files changed");
}

#[test]
fn a_damaged_checkpoint_is_skipped_loudly_and_made_again() {
    let (place, _) = place();
    succeeded(&place.command("train", "damaged", &[]).output().unwrap());
    let run = place.path("damaged");
    let damaged = newest(&run, "train");
    flip(&weights(&damaged));
    let said = place.run("damaged", &[]);
    let warning = format!("warning: skipping checkpoint {}", damaged.display());
    assert!(said.contains(&warning) && said.contains("train: going on from step 20 of 24"), "{said}");
    assert_same_result(&run, &place.path("whole"));
    assert!(verify(&run).status.success());
}

#[test]
fn stages_that_later_ones_were_built_on_are_made_again_with_the_same_bits() {
    let (place, _) = place();
    let run = place.copy("whole", "damaged-everywhere");
    forget_the_end(&run);
    for stage in STAGES {
        flip(&weights(&newest(&run, stage)));
    }
    let said = place.run("damaged-everywhere", &[]);
    assert_eq!(said.matches("warning: skipping checkpoint").count(), STAGES.len(), "{said}");
    assert_same_result(&run, &place.path("whole"));
}

#[test]
fn without_any_intact_checkpoint_it_refuses_to_start_over() {
    let (place, _) = place();
    let run = place.copy("whole", "hopeless");
    forget_the_end(&run);
    for checkpoint in checkpoints(&run, "train") {
        flip(&weights(&checkpoint));
    }
    let before = snapshot(&run.join("checkpoints"));
    let output = place.command("run", "hopeless", &[]).output().unwrap();
    refuses(&output, 1, &["checkpoints/train", "intact"]);
    assert!(snapshot(&run.join("checkpoints")) == before, "checkpoints changed");
    assert!(!run.join("summary.json").exists());
    let output = verify(&run);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("checkpoints/train"), "{}", stdout(&output));
}

#[test]
fn damaged_tasks_stop_a_run() {
    let (place, _) = place();
    let run = place.copy("whole", "damaged-tasks");
    forget_the_end(&run);
    flip(&run.join("tasks/train/unit-00000/tasks-00000.arrow"));
    let output = place.command("run", "damaged-tasks", &[]).output().unwrap();
    refuses(&output, 1, &["tasks-00000.arrow", "checksum"]);
    fs::remove_dir_all(run.join("tasks/train")).unwrap();
    place.run("damaged-tasks", &[]);
    assert_same_result(&run, &place.path("whole"));
}

#[test]
fn another_pipelines_directory_is_refused_untouched() {
    let (place, _) = place();
    let run = place.copy("whole", "foreign");
    let before = snapshot(&run);
    let output = place.command("run", "foreign", &["seed=1"]).output().unwrap();
    refuses(&output, 1, &["another pipeline", "seed is 0 there and 1 here", "--out"]);
    assert!(snapshot(&run) == before, "files changed");

    let other = place.path("not-a-run");
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("thesis.tex"), "mine").unwrap();
    let before = snapshot(&other);
    refuses(&place.command("run", "not-a-run", &[]).output().unwrap(), 1, &["holds no run", "--out"]);
    assert!(snapshot(&other) == before, "files changed");
}

#[test]
fn verify_names_every_damaged_file_and_changes_nothing() {
    let (place, _) = place();
    let run = place.copy("whole", "verified");
    // What a commit that is under way, or was killed, has on the disk.
    let temporary = run.join("checkpoints/train/.step-000099.tmp-1");
    fs::create_dir(&temporary).unwrap();
    fs::write(temporary.join("config.json"), "{").unwrap();
    let before = snapshot(&run);
    assert!(verify(&run).status.success());
    assert!(snapshot(&run) == before, "files changed");

    let damaged: Vec<(PathBuf, &str)> = vec![
        (weights(&newest(&run, "train")), "model-00001-of-00001.safetensors"),
        (
            newest(&run, "clean_traces").join("optimizer-00001-of-00001.safetensors"),
            "optimizer-00001-of-00001",
        ),
        (checkpoints(&run, "pretrain")[0].join("state.json"), "state.json"),
        (run.join("ledger.jsonl"), "ledger.jsonl"),
        (run.join("tasks/train/unit-00000/tasks-00000.arrow"), "tasks/train/unit-00000/tasks-00000.arrow"),
        (run.join("tasks/eval/unit-00000/tasks-00000.arrow"), "tasks/eval/unit-00000/tasks-00000.arrow"),
    ];
    for (file, name) in damaged {
        let intact = fs::read(&file).unwrap();
        flip(&file);
        let before = snapshot(&run);
        let output = verify(&run);
        assert_eq!(output.status.code(), Some(1), "{}", file.display());
        assert!(stdout(&output).contains(name), "no {name} in {}", stdout(&output));
        assert!(stderr(&output).contains("is damaged"), "{}", stderr(&output));
        assert!(snapshot(&run) == before, "files changed");
        fs::write(&file, intact).unwrap();
    }
    // A manifest that is cut short must not pass for tasks that were never built.
    let manifest = run.join("tasks/train/tasks.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, &text[..text.len() / 2]).unwrap();
    let output = verify(&run);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("tasks.json"), "{}", stdout(&output));
    fs::write(&manifest, text).unwrap();
    assert!(verify(&run).status.success());
}

#[test]
fn weights_that_are_not_finite_are_never_committed() {
    let (place, _) = place();
    // The first rate is too much for the numbers themselves, the second for what is made of them.
    for (stage, rate, words, commits) in [
        ("pretrain", "3e38", "weights that are not finite", false),
        ("train", "3e38", "weights that are not finite", false),
        ("train", "1e19", "the loss of update 1 is", true),
    ] {
        let setting = format!("{stage}.optimizer.learning_rate={rate}");
        let mut settings: Vec<&str> = TINY.to_vec();
        settings.extend(["train.optimizer.warmup_steps=0", "run.checkpoint_every=1", &setting]);
        let name = format!("{stage}-{rate}");
        let output = place.command("run", &name, &settings).output().unwrap();
        refuses(&output, 1, &[words, "learning_rate"]);
        assert_eq!(!checkpoints(&place.path(&name), stage).is_empty(), commits, "{}", stderr(&output));
        for checkpoint in checkpoints(&place.path(&name), stage) {
            let bytes = fs::read(weights(&checkpoint)).unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            for (tensor, view) in tensors.iter() {
                let floats = view.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                assert!(floats.into_iter().all(f32::is_finite), "{stage} {tensor}");
            }
        }
    }
}

#[test]
fn too_little_skill_stops_the_run_before_the_first_update() {
    let (place, _) = place();
    let mut settings: Vec<&str> = TINY.to_vec();
    settings.push("train.min_initial_reward=0.9");
    let output = place.command("run", "gate", &settings).output().unwrap();
    let words = ["reinforcement stage cannot start", "mean reward of 0.", "at least 0.9", "cold_start.steps"];
    refuses(&output, 1, &words);
    let run = place.path("gate");
    assert!(checkpoints(&run, "train").is_empty());
    assert!(!metrics(&run).iter().any(|line| line["stage"] == "train"));
}

#[test]
fn two_runs_never_share_a_directory() {
    let (place, _) = place();
    let mut first = place.command("run", "shared", &[]).spawn().unwrap();
    wait_for(&mut first, &place.path("shared"), "pretrain", 1);
    let second = place.command("run", "shared", &[]).output().unwrap();
    refuses(&second, 1, &[&format!("process {}", first.id())]);
    // Readers may look at any time; what they find, the writer still finds afterwards.
    while first.try_wait().unwrap().is_none() {
        let output = verify(&place.path("shared"));
        assert!(!stderr(&output).contains("panicked"), "{}", stderr(&output));
    }
    succeeded(&first.wait_with_output().unwrap());
    assert_same_result(&place.path("shared"), &place.path("whole"));
}

#[test]
fn an_exported_model_is_the_newest_checkpoint() {
    let (place, _) = place();
    let (whole, exported) = (place.path("whole"), place.path("exported"));
    succeeded(&rpt([Path::new("export"), &whole, Path::new("--out"), &exported]));
    let decoder = Decoder::load(&exported).unwrap();
    let parameters = decoder.parameters();
    let bytes = fs::read(weights(&newest(&whole, "train"))).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(json(&exported.join("config.json"))["model_type"], "llama");
    for parameter in decoder.layout().parameters() {
        let ours: Vec<u8> =
            parameters[parameter.range.clone()].iter().flat_map(|x| x.to_le_bytes()).collect();
        // What makes a Llama of the Qwen2 that was trained.
        if parameter.name.ends_with("o_proj.bias") {
            assert!(ours.iter().all(|byte| *byte == 0), "{}", parameter.name);
            continue;
        }
        assert!(tensors.tensor(&parameter.name).unwrap().data() == ours, "{}", parameter.name);
    }
}

#[test]
fn a_running_average_is_exported_from_the_stage_that_keeps_one() {
    let (place, _) = place();
    let (whole, out) = (place.path("whole"), place.path("average"));
    succeeded(&rpt([Path::new("export"), &whole, Path::new("--average"), Path::new("--out"), &out]));
    let averaged = Decoder::load(&out).unwrap();
    let newest = newest(&whole, "train");
    let (last, state) = (fs::read(weights(&newest)).unwrap(), fs::read(optimizer_state(&newest)).unwrap());
    let last = safetensors::SafeTensors::deserialize(&last).unwrap();
    let state = safetensors::SafeTensors::deserialize(&state).unwrap();
    let parameters = averaged.parameters();
    let mut moved = 0;
    for parameter in averaged.layout().parameters() {
        let ours: Vec<u8> =
            parameters[parameter.range.clone()].iter().flat_map(|x| x.to_le_bytes()).collect();
        // What makes a Llama of the Qwen2 that was trained.
        if parameter.name.ends_with("o_proj.bias") {
            continue;
        }
        let average = state.tensor(&format!("{}.ema", parameter.name)).unwrap();
        assert!(average.data() == ours, "{}", parameter.name);
        moved += usize::from(last.tensor(&parameter.name).unwrap().data() != ours);
    }
    assert!(moved > 5, "{moved}");
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.contains("Running average of the parameters of stage `train`"), "{card}");
    assert!(!card.contains("## Evaluation"), "what was measured with other weights: {card}");
    let (none, stage) = (place.path("none"), ["--average", "--stage", "pretrain"].map(Path::new));
    let command = [Path::new("export"), &whole, Path::new("--out"), &none].into_iter().chain(stage);
    refuses(&rpt(command), 1, &["stage pretrain has kept no average", "hint: ", "ema_decay"]);
    assert!(!none.exists());
}

#[test]
fn an_export_says_what_it_is() {
    let (place, _) = place();
    let (whole, out) = (place.path("whole"), place.path("half"));
    let last = newest(&whole, "train");
    let step = last.file_name().unwrap().to_str().unwrap().trim_start_matches("step-").to_owned();
    let arguments = ["--step", &step, "--dtype", "bf16", "--shard-bytes", "30000"].map(Path::new);
    let command = [Path::new("export"), &whole, Path::new("--out"), &out].into_iter().chain(arguments);
    succeeded(&rpt(command));
    assert!(out.join("model.safetensors.index.json").exists());
    let decoder = Decoder::load(&out).unwrap();
    assert_eq!(decoder.dtype(), Dtype::Bf16);
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    for part in
        ["library_name: transformers", "stage `train`", "## Evaluation", "reasoning, after RPT", "[train]"]
    {
        assert!(card.contains(part), "{part}: {card}");
    }
    let absent = ["--step", "999999"].map(Path::new);
    let nowhere = place.path("nowhere");
    let command = [Path::new("export"), &whole, Path::new("--out"), &nowhere].into_iter().chain(absent);
    let refused = rpt(command);
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains(step.trim_start_matches('0')));
}

//! The commit protocol: a crash at any operation, damage to any byte, and what resumes afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use proptest::prelude::*;
use rpt::checkpoint::{
    Checkpoint, CheckpointError, CheckpointStore, CheckpointWriter, Disk, Recovery, Storage, StorageFile,
    TensorView, atomic_write, atomic_write_on, verify,
};
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

const IDENTITY: &str = "pipeline-1";

// ---------------------------------------------------------------- a machine that fails

/// What happens at the operation that fails.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Failure {
    /// The process dies; what it wrote stays.
    Killed,
    /// The machine dies; what was not synced is gone.
    PowerLoss,
    /// This one operation fails; the process goes on.
    Full,
}

#[derive(Debug)]
struct State {
    failure: Failure,
    /// Operations that still succeed.
    left: usize,
    done: usize,
    failed: bool,
    unsynced_files: Vec<PathBuf>,
    unsynced_renames: Vec<(PathBuf, PathBuf)>,
}

#[derive(Clone, Debug)]
struct Machine(Arc<Mutex<State>>);

impl Machine {
    fn new(failure: Failure, left: usize) -> Self {
        Self(Arc::new(Mutex::new(State {
            failure,
            left,
            done: 0,
            failed: false,
            unsynced_files: Vec::new(),
            unsynced_renames: Vec::new(),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn operation(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        if state.failed {
            return if state.failure == Failure::Full { Ok(state) } else { Err(io::Error::other("dead")) };
        }
        if state.left == 0 {
            state.failed = true;
            return Err(ErrorKind::StorageFull.into());
        }
        state.left -= 1;
        state.done += 1;
        Ok(state)
    }

    /// Takes back what the medium never got.
    fn settle(&self) {
        let state = self.state();
        if state.failure != Failure::PowerLoss || !state.failed {
            return;
        }
        for (from, to) in state.unsynced_renames.iter().rev() {
            fs::rename(to, from).unwrap();
        }
        for file in &state.unsynced_files {
            // The name may be there without the content.
            if let Ok(file) = fs::OpenOptions::new().write(true).open(file) {
                file.set_len(3.min(file.metadata().unwrap().len())).unwrap();
            }
        }
    }
}

struct MachineFile {
    machine: Machine,
    path: PathBuf,
    file: Box<dyn StorageFile>,
}

impl Write for MachineFile {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if let Err(error) = self.machine.operation().map(drop) {
            // A write that fails may have written some of it.
            self.file.write_all(&buffer[..buffer.len() / 2])?;
            return Err(error);
        }
        self.file.write_all(buffer).map(|()| buffer.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl StorageFile for MachineFile {
    fn sync(&mut self) -> io::Result<()> {
        self.machine.operation()?.unsynced_files.retain(|path| *path != self.path);
        self.file.sync()
    }
}

impl Storage for Machine {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let _state = self.operation()?;
        Disk.create_dir(path)
    }
    fn create(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        let file = {
            let mut state = self.operation()?;
            state.unsynced_files.push(path.to_owned());
            Disk.create(path)?
        };
        Ok(Box::new(MachineFile { machine: self.clone(), path: path.to_owned(), file }))
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.operation()?;
        // Of a rename that replaces a file, the harder case is that it survives and the content does not.
        if !to.exists() {
            state.unsynced_renames.push((from.to_owned(), to.to_owned()));
        }
        // Files that move with their directory stay unsynced.
        for file in &mut state.unsynced_files {
            if let Ok(rest) = file.strip_prefix(from) {
                *file = if rest.as_os_str().is_empty() { to.to_owned() } else { to.join(rest) };
            }
        }
        Disk.rename(from, to)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.operation()?;
        state.unsynced_renames.retain(|(from, _)| from.parent() != Some(path));
        Disk.sync_dir(path)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        let _state = self.operation()?;
        Disk.remove_file(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        let _state = self.operation()?;
        Disk.remove_dir(path)
    }
}

// ---------------------------------------------------------------- what is committed

fn write_values(writer: &mut CheckpointWriter, value: f32) -> Result<(), CheckpointError> {
    let data: Vec<f32> = (0..12).map(|index| value + index as f32 / 7.0).collect();
    let view = |name, shape, data| TensorView { name, shape, data };
    writer.tensors(
        "model",
        &[view("b.weight", &[3, 4], &data), view("a.bias", &[4], &data[..4]), view("scale", &[], &data[..1])],
    )?;
    writer.json("state", &BTreeMap::from([("value", value)]))
}

fn commit(store: &mut CheckpointStore, step: u64, value: f32) -> Result<Vec<u64>, CheckpointError> {
    let committed = store.commit(step, IDENTITY, |writer| write_values(writer, value))?;
    assert!(committed.cleanup_errors.iter().all(|error| matches!(error, CheckpointError::Io { .. })));
    Ok(committed.removed)
}

/// The value that a checkpoint was made of, after comparing everything in it.
fn value_of(checkpoint: &Checkpoint) -> f32 {
    let value = checkpoint.json::<BTreeMap<String, f32>>("state").unwrap()["value"];
    let tensors = checkpoint.tensors("model").unwrap();
    let expected: Vec<f32> = (0..12).map(|index| value + index as f32 / 7.0).collect();
    assert_eq!(tensors.read("b.weight").unwrap(), expected);
    assert_eq!(tensors.read("a.bias").unwrap(), expected[..4]);
    assert_eq!(tensors.read("scale").unwrap(), expected[..1]);
    value
}

fn open(root: &Path) -> CheckpointStore {
    CheckpointStore::open(root, 1).unwrap().with_shard_bytes(40)
}

/// Step and value of the newest checkpoint; there must be no damaged one.
fn newest(root: &Path) -> Option<(u64, f32)> {
    let found = open(root).newest(IDENTITY).unwrap();
    assert!(found.skipped.is_empty(), "{:?}", found.skipped);
    found.checkpoint.map(|checkpoint| (checkpoint.step(), value_of(&checkpoint)))
}

fn step_directories(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).unwrap().map(|entry| entry.unwrap());
    let mut names: Vec<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

// ---------------------------------------------------------------- crashes

/// Fails each operation of `commit(step, 9.0)` on top of `before`, in every way.
fn fail_everywhere(before: &[(u64, f32)], step: u64) {
    let old = before.last().copied();
    for failure in [Failure::Killed, Failure::PowerLoss, Failure::Full] {
        for left in 0.. {
            let directory = tempfile::tempdir().unwrap();
            let root = directory.path();
            for (step, value) in before {
                commit(&mut open(root), *step, *value).unwrap();
            }
            let machine = Machine::new(failure, left);
            let mut store = CheckpointStore::open_on(Arc::new(machine.clone()), root, 1).unwrap();
            store = store.with_shard_bytes(40);
            let result = commit(&mut store, step, 9.0);
            let case = format!("{failure:?} after {left} operations");
            machine.settle();
            let reached = machine.state().failed;
            if failure == Failure::Full && reached {
                retry_in_the_same_process(&mut store, root, step, old, result.is_ok());
                continue;
            }
            let found = newest(root);
            assert!(found == old || found == Some((step, 9.0)), "{case}: {found:?}");
            if result.is_ok() {
                assert_eq!(found, Some((step, 9.0)), "{case}: a commit that was reported is lost");
            }
            let report = verify(root).unwrap();
            assert!(report.intact() && report.leftovers.is_empty(), "{case}: {report:?}");
            commit(&mut open(root), step, 9.5).unwrap();
            assert_eq!(newest(root), Some((step, 9.5)), "{case}");
            if !reached {
                assert!(machine.state().done > 15, "the plan did not reach the commit");
                break;
            }
        }
    }
}

/// After one failed operation the process may try again, and finds nothing worse than before.
fn retry_in_the_same_process(
    store: &mut CheckpointStore,
    root: &Path,
    step: u64,
    old: Option<(u64, f32)>,
    committed: bool,
) {
    let found = store.newest(IDENTITY).unwrap();
    assert!(found.skipped.is_empty(), "{:?}", found.skipped);
    let found = found.checkpoint.map(|checkpoint| (checkpoint.step(), value_of(&checkpoint)));
    assert_eq!(found, if committed { Some((step, 9.0)) } else { old });
    commit(store, step, 9.5).unwrap();
    assert_eq!(newest(root), Some((step, 9.5)));
}

#[test]
fn a_first_commit_that_fails_anywhere_leaves_nothing_or_everything() {
    fail_everywhere(&[], 1);
}

#[test]
fn a_commit_with_retention_that_fails_anywhere_leaves_the_old_or_the_new() {
    fail_everywhere(&[(1, 1.0), (2, 2.0)], 3);
}

#[test]
fn a_replacement_that_fails_anywhere_leaves_the_old_or_the_new() {
    fail_everywhere(&[(1, 1.0), (2, 2.0)], 2);
}

/// Recovery itself can be interrupted too.
#[test]
fn a_recovery_that_fails_anywhere_can_be_done_again() {
    for left in 0.. {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        commit(&mut open(root), 1, 1.0).unwrap();
        commit(&mut open(root), 2, 2.0).unwrap();
        fs::rename(root.join("step-000002"), root.join(".step-000002.old-77")).unwrap();
        fs::create_dir(root.join(".step-000002.tmp-77")).unwrap();
        fs::write(root.join(".step-000002.tmp-77/model.json"), "{").unwrap();
        let machine = Machine::new(Failure::Killed, left);
        let opened = CheckpointStore::open_on(Arc::new(machine.clone()), root, 1);
        if let Ok(store) = opened {
            let done: Vec<_> = store.recovered().iter().map(ToString::to_string).collect();
            assert_eq!(
                done,
                [
                    "restored .step-000002.old-77, left behind by an interrupted commit",
                    "removed .step-000002.tmp-77, left behind by an interrupted commit"
                ]
            );
            assert_eq!(store.recovered()[0].recovery, Recovery::Restored);
            break;
        }
        assert_eq!(newest(root), Some((2, 2.0)), "after {left} operations");
    }
}

#[test]
fn an_atomic_write_that_fails_anywhere_leaves_the_old_or_the_new() {
    for failure in [Failure::Killed, Failure::PowerLoss, Failure::Full] {
        for left in 0.. {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("pipeline.toml");
            atomic_write(&path, b"old").unwrap();
            let machine = Machine::new(failure, left);
            let result = atomic_write_on(&machine, &path, b"brand new");
            machine.settle();
            let content = fs::read(&path).unwrap();
            assert!(content == b"old" || content == b"brand new");
            let Err(error) = result else {
                assert_eq!(content, b"brand new");
                break;
            };
            assert!(error.to_string().contains("pipeline.toml"), "{error}");
            assert!(error.hint().unwrap().contains("full"), "{error}");
        }
    }
}

#[test]
fn a_full_disk_says_so_and_frees_what_it_took() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    commit(&mut open(root), 1, 1.0).unwrap();
    let machine = Machine::new(Failure::Full, 5);
    let mut store = CheckpointStore::open_on(Arc::new(machine), root, 1).unwrap();
    let error = commit(&mut store, 2, 2.0).unwrap_err();
    let hint = error.hint().unwrap();
    assert!(hint.contains("full") && hint.contains("can be removed"), "{hint}");
    assert!(error.to_string().contains("step-000002"), "{error}");
    assert_eq!(step_directories(root), ["step-000001"]);
}

#[test]
fn a_caller_that_fails_commits_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = open(directory.path());
    for (shape, name) in [(&[2, 2][..], "wrong shape"), (&[usize::MAX, 2], "overflow")] {
        let view = TensorView { name, shape, data: &[1.0; 3] };
        let error = store.commit(1, IDENTITY, |writer| writer.tensors("model", &[view])).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    let view = TensorView { name: "a", shape: &[1], data: &[1.0] };
    assert!(store.commit(1, IDENTITY, |writer| writer.tensors("model", &[view, view])).is_err());
    for section in ["manifest", "../model", "Model", "", "a-b"] {
        assert!(store.commit(1, IDENTITY, |writer| writer.json(section, &1)).is_err(), "{section}");
    }
    let twice = |writer: &mut CheckpointWriter| writer.json("a", &1).and_then(|()| writer.json("a", &2));
    assert!(store.commit(1, IDENTITY, twice).is_err());
    assert!(step_directories(directory.path()).is_empty());
}

// ---------------------------------------------------------------- damage

fn two_checkpoints() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    commit(&mut open(directory.path()), 1, 1.0).unwrap();
    commit(&mut open(directory.path()), 2, 2.0).unwrap();
    directory
}

/// The newest is damaged: the one before is found, and the reason is said.
fn falls_back(root: &Path) -> String {
    let mut store = open(root);
    let found = store.newest(IDENTITY).unwrap();
    assert_eq!(found.checkpoint.map(|checkpoint| value_of(&checkpoint)), Some(1.0));
    assert_eq!(found.skipped.iter().map(|skipped| skipped.step).collect::<Vec<_>>(), [2]);
    assert!(!verify(root).unwrap().intact());
    assert_eq!(verify(root).unwrap().newest_intact(), Some(1));
    found.skipped[0].to_string()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_bit_flip_in_any_file_falls_back(place in any::<prop::sample::Index>(), bit in 0_u8..8) {
        let directory = two_checkpoints();
        let newest = directory.path().join("step-000002");
        for name in step_directories(&newest) {
            let path = newest.join(&name);
            let good = fs::read(&path).unwrap();
            let mut bad = good.clone();
            bad[place.index(good.len())] ^= 1 << bit;
            fs::write(&path, bad).unwrap();
            let said = falls_back(directory.path());
            prop_assert!(said.contains(&name), "{said}");
            fs::write(&path, good).unwrap();
        }
    }
}

#[test]
fn missing_short_and_strange_files_fall_back() {
    let directory = two_checkpoints();
    let newest = directory.path().join("step-000002");
    for name in step_directories(&newest) {
        let path = newest.join(&name);
        let good = fs::read(&path).unwrap();
        fs::write(&path, &good[..good.len() - 1]).unwrap();
        falls_back(directory.path());
        fs::remove_file(&path).unwrap();
        assert!(falls_back(directory.path()).contains(&name));
        std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
        assert!(falls_back(directory.path()).contains("regular file"));
        fs::remove_file(&path).unwrap();
        fs::write(&path, good).unwrap();
    }
    fs::rename(&newest, directory.path().join("step-000003")).unwrap();
    let found = open(directory.path()).newest(IDENTITY).unwrap();
    assert!(found.skipped[0].to_string().contains("is of step 2"));
}

#[test]
fn when_every_checkpoint_is_damaged_nothing_starts_anew_silently() {
    let directory = two_checkpoints();
    for step in ["step-000001", "step-000002"] {
        fs::remove_file(directory.path().join(step).join("state.json")).unwrap();
    }
    let error = open(directory.path()).newest(IDENTITY).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("step-000001") && text.contains("step-000002"), "{text}");
    assert!(error.hint().is_some());
}

#[test]
fn a_checkpoint_of_another_pipeline_is_an_error() {
    let directory = two_checkpoints();
    let error = open(directory.path()).newest("pipeline-2").unwrap_err();
    assert!(matches!(&error, CheckpointError::Foreign { found, .. } if found == IDENTITY), "{error}");
}

// ---------------------------------------------------------------- retention

#[test]
fn the_newest_and_as_many_as_asked_stay() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    fs::write(root.join("notes.txt"), "mine").unwrap();
    fs::create_dir(root.join("step-1")).unwrap();
    fs::create_dir(root.join(".step-000001.tmp-mine")).unwrap();
    let mut store = open(root);
    let removed: Vec<_> = (1..=4).map(|step| commit(&mut store, step, step as f32).unwrap()).collect();
    assert_eq!(removed, [vec![], vec![], vec![1], vec![2]]);
    let expected = [".step-000001.tmp-mine", "notes.txt", "step-000003", "step-000004", "step-1"];
    assert_eq!(step_directories(root), expected);
}

#[test]
fn damaged_and_foreign_checkpoints_neither_count_nor_go() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    CheckpointStore::open(root, 1).unwrap().commit(1, "another", |writer| write_values(writer, 1.0)).unwrap();
    for step in 2..=3 {
        commit(&mut open(root), step, step as f32).unwrap();
    }
    fs::write(root.join("step-000003/state.json"), "{}").unwrap();
    assert!(commit(&mut open(root), 4, 4.0).unwrap().is_empty());
    let expected = ["step-000001", "step-000002", "step-000003", "step-000004"];
    assert_eq!(step_directories(root), expected);
    assert_eq!(commit(&mut open(root), 5, 5.0).unwrap(), [2]);
}

/// Damage after the first look is noticed before anything is removed in its favour.
#[test]
fn a_checkpoint_that_breaks_during_the_run_is_not_counted() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let mut store = open(root);
    commit(&mut store, 1, 1.0).unwrap();
    commit(&mut store, 2, 2.0).unwrap();
    fs::remove_file(root.join("step-000002/state.json")).unwrap();
    assert!(commit(&mut store, 3, 3.0).unwrap().is_empty());
    fs::remove_file(root.join("step-000003/state.json")).unwrap();
    assert_eq!(open(root).newest(IDENTITY).unwrap().checkpoint.unwrap().step(), 1);
}

#[test]
fn an_older_step_that_was_just_committed_stays() {
    let directory = tempfile::tempdir().unwrap();
    let mut store = CheckpointStore::open(directory.path(), 0).unwrap();
    commit(&mut store, 9, 9.0).unwrap();
    assert_eq!(commit(&mut store, 5, 5.0).unwrap(), [9]);
    assert_eq!(step_directories(directory.path()), ["step-000005"]);
}

/// A checkpoint that was moved to another disk and linked is read; removing it removes the link.
#[test]
fn links_are_read_and_never_followed_by_removal() {
    let directory = two_checkpoints();
    let elsewhere = tempfile::tempdir().unwrap();
    let (place, moved) = (directory.path().join("step-000001"), elsewhere.path().join("moved"));
    fs::rename(&place, &moved).unwrap();
    std::os::unix::fs::symlink(&moved, &place).unwrap();
    assert!(verify(directory.path()).unwrap().intact());
    assert_eq!(commit(&mut open(directory.path()), 3, 3.0).unwrap(), [1]);
    assert!(!place.exists() && moved.join("manifest.json").exists());
}

// ---------------------------------------------------------------- content

#[test]
fn shards_are_readable_by_the_safetensors_crate_and_bounded() {
    let directory = tempfile::tempdir().unwrap();
    commit(&mut open(directory.path()), 1, 0.5).unwrap();
    let step = directory.path().join("step-000001");
    let expected = [
        "manifest.json",
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
        "state.json",
    ];
    assert_eq!(step_directories(&step), expected);
    let bytes = fs::read(step.join(expected[2])).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor("b.weight").unwrap();
    assert_eq!(tensor.shape(), [3, 4]);
    assert_eq!(tensor.data()[..4], 0.5_f32.to_le_bytes());
}

#[test]
fn the_same_content_gives_the_same_bytes() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for root in [one.path(), two.path()] {
        commit(&mut open(root), 1, 0.1).unwrap();
    }
    for name in step_directories(&one.path().join("step-000001")) {
        let read = |root: &Path| fs::read(root.join("step-000001").join(&name)).unwrap();
        assert_eq!(read(one.path()), read(two.path()), "{name}");
    }
}

#[test]
fn large_tensors_and_special_values_come_back_bit_for_bit() {
    let directory = tempfile::tempdir().unwrap();
    let mut data: Vec<f32> =
        (0..50_001_u32).map(|bits| f32::from_bits(bits.wrapping_mul(2_654_435_761))).collect();
    data[..4].copy_from_slice(&[f32::NAN, f32::NEG_INFINITY, -0.0, f32::MIN_POSITIVE / 2.0]);
    let views = [
        TensorView { name: "large", shape: &[50_001], data: &data },
        TensorView { name: "empty", shape: &[0, 7], data: &[] },
    ];
    let mut store = open(directory.path());
    store
        .commit(1, IDENTITY, |writer| {
            writer.tensors("model", &views).and_then(|()| writer.tensors("none", &[]))
        })
        .unwrap();
    let checkpoint = store.newest(IDENTITY).unwrap().checkpoint.unwrap();
    let tensors = checkpoint.tensors("model").unwrap();
    let bits = |data: &[f32]| data.iter().map(|element| element.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&tensors.read("large").unwrap()), bits(&data));
    assert_eq!(tensors.shape("empty"), Some(&[0, 7][..]));
    assert!(tensors.read("empty").unwrap().is_empty());
    assert!(checkpoint.tensors("none").unwrap().is_empty());
    assert!(tensors.read("missing").is_err());
    assert!(tensors.read_into("large", &mut [0.0; 3]).is_err());
    assert!(checkpoint.tensors("missing").is_err() && checkpoint.tensors("../model").is_err());
    assert!(checkpoint.json::<u32>("missing").is_err() && checkpoint.json::<u32>("../../state").is_err());
}

//! Compiles the CUDA kernels when the feature `cuda` is on, and does nothing otherwise.
//!
//! Each file of `src/cuda/kernels` becomes a fat binary: machine code for Hopper and PTX for everything since Ampere,
//! which the driver translates. A fat binary is named after a digest of all that it depends on, so files that did not
//! change are not compiled again.

use std::collections::hash_map::DefaultHasher;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{env, fs, io, thread};

/// `--fmad=false`: a fused multiply-add is written as one, so that the same formula has the same bits in every kernel.
const FLAGS: [&str; 8] = [
    "-std=c++17",
    "-O3",
    "--fmad=false",
    "-fatbin",
    "-gencode",
    "arch=compute_90a,code=sm_90a",
    "-gencode",
    "arch=compute_80,code=compute_80",
];

type Outcome<T> = Result<T, String>;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    if let Err(message) = build() {
        for line in message.lines() {
            println!("cargo::error={line}");
        }
    }
}

fn build() -> Outcome<()> {
    for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    println!("cargo::rerun-if-changed=src/cuda/kernels");
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(variable("OUT_DIR")?);
    let nvcc = find_nvcc()?;
    // The tests' emulated driver is compiled against the toolkit's cuda.h.
    if let Some(home) = nvcc.parent().and_then(Path::parent) {
        println!("cargo::rustc-env=RPT_CUDA_INCLUDE={}", home.join("include").display());
    }
    let kernels = Kernels::read(&root.join("src/cuda/kernels"), &version(&nvcc)?)?;
    let binaries = kernels.compile(&nvcc, &out)?;
    write_table(&binaries, &out.join("kernels.rs")).map_err(|error| error.to_string())
}

fn variable(name: &str) -> Outcome<String> {
    env::var(name).map_err(|error| format!("{name}: {error}"))
}

fn find_nvcc() -> Outcome<PathBuf> {
    let of_home = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os);
    let named = env::var_os("NVCC").map(PathBuf::from).into_iter();
    let mut named = named.chain(of_home.map(|home| Path::new(&home).join("bin/nvcc")));
    if let Some(found) = named.find(|candidate| candidate.is_file()) {
        return Ok(found);
    }
    println!("cargo::rerun-if-env-changed=PATH");
    let path = env::var_os("PATH").unwrap_or_default();
    let mut candidates = env::split_paths(&path).map(|folder| folder.join("nvcc"));
    candidates.find(|candidate| candidate.is_file()).ok_or_else(|| {
        "the feature `cuda` needs nvcc of CUDA 13 and found none through $NVCC, $CUDA_HOME, $CUDA_PATH or $PATH\n\
         without a toolkit: scripts/cuda-toolkit target/cuda && CUDA_HOME=target/cuda cargo build --features cuda"
            .to_owned()
    })
}

fn version(nvcc: &Path) -> Outcome<String> {
    let output = Command::new(nvcc).arg("--version").output();
    let output = output.map_err(|error| format!("{} --version: {error}", nvcc.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The sources of the kernels.
struct Kernels {
    folder: PathBuf,
    /// Files to compile, with the digest of all that each depends on.
    sources: Vec<(PathBuf, u64)>,
}

impl Kernels {
    fn read(folder: &Path, version: &str) -> Outcome<Self> {
        let place = |error: io::Error| format!("{}: {error}", folder.display());
        let entries = fs::read_dir(folder).map_err(place)?;
        let mut paths =
            entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>().map_err(place)?;
        paths.sort();
        let mut sources = Vec::new();
        for path in paths.into_iter().filter(|path| has_extension(path, "cu")) {
            let mut digest = DefaultHasher::new();
            (FLAGS, version).hash(&mut digest);
            for part in parts(folder, &path).map_err(place)? {
                part.hash(&mut digest);
            }
            sources.push((path, digest.finish()));
        }
        Ok(Self { folder: folder.to_owned(), sources })
    }

    /// The fat binaries in order of their names; as many compilers run at once as cargo grants.
    fn compile(&self, nvcc: &Path, out: &Path) -> Outcome<Vec<PathBuf>> {
        let binaries: Vec<_> =
            self.sources.iter().map(|(source, digest)| binary(source, *digest, out)).collect();
        let waiting: Vec<_> =
            self.sources.iter().zip(&binaries).filter(|(_, binary)| !binary.is_file()).collect();
        let waiting = Mutex::new(waiting.into_iter());
        let jobs: usize = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1);
        let next = || waiting.lock().ok()?.next();
        let work = || -> Outcome<()> {
            while let Some(((source, _), binary)) = next() {
                self.compile_one(nvcc, source, binary)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs.min(binaries.len())).map(|_| scope.spawn(work)).collect();
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().map_err(|_| "a compiling thread panicked")?)
        })?;
        Ok(binaries)
    }

    fn compile_one(&self, nvcc: &Path, source: &Path, binary: &Path) -> Outcome<()> {
        let unfinished = binary.with_extension("unfinished");
        let mut command = Command::new(nvcc);
        command.args(FLAGS).arg("-I").arg(&self.folder).arg("-o").arg(&unfinished).arg(source);
        let output = command.output().map_err(|error| format!("{}: {error}", nvcc.display()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("nvcc refused {}\n{said}", source.display()));
        }
        fs::rename(&unfinished, binary).map_err(|error| format!("{}: {error}", binary.display()))
    }
}

/// The text of a source and of all headers of this folder that it includes, directly or not.
fn parts(folder: &Path, source: &Path) -> io::Result<Vec<String>> {
    let mut paths = vec![source.to_owned()];
    let mut texts = Vec::new();
    while let Some(path) = paths.get(texts.len()) {
        let text = fs::read_to_string(path)?;
        let included =
            text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.strip_suffix('"'));
        let included: Vec<_> = included.map(|name| folder.join(name)).filter(|path| path.is_file()).collect();
        for path in included {
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
        texts.push(text);
    }
    Ok(texts)
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|own| own == extension)
}

fn binary(source: &Path, digest: u64, out: &Path) -> PathBuf {
    let name = source.file_stem().unwrap_or_default().to_string_lossy();
    out.join(format!("{name}-{digest:016x}.fatbin"))
}

/// A Rust expression: the embedded fat binaries.
fn write_table(binaries: &[PathBuf], to: &Path) -> io::Result<()> {
    let mut text = String::from("&[\n");
    for binary in binaries {
        let _ = writeln!(text, "    include_bytes!(r#\"{}\"#),", binary.display());
    }
    text.push_str("]\n");
    fs::write(to, text)
}

//! A CUDA device for tests: a real one where there is one, otherwise an emulated one.
//!
//! The emulated driver and all kernels are compiled by the system's C++ compiler, each file once for its content, and
//! loaded under the name by which the program then finds its driver. `RPT_CUDA_TESTS=emulated` uses them even where
//! there is a GPU.

#![allow(dead_code, unreachable_pub, reason = "every test uses a part")]
#![allow(clippy::print_stdout, reason = "what is skipped is said")]

use libloading::{Library, Symbol};
use rpt::cuda::Device;
use std::collections::hash_map::DefaultHasher;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, OnceLock};
use std::{env, fs, process, thread};

const FLAGS: [&str; 10] = [
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-Wall",
    "-Wextra",
    "-Wno-attributes",
];
const KERNEL_FLAGS: [&str; 6] = [
    "-DRPT_EMULATED",
    "-fsanitize=bounds,alignment",
    "-fsanitize-undefined-trap-on-error",
    "-Wno-unknown-pragmas",
    "-Wno-sign-compare",
    "-Wno-unused-function",
];

/// The device that this process tests with. Every call opens it anew, with a stream of its own.
pub fn device() -> Device {
    driver();
    Device::open(0).unwrap()
}

/// The emulated device; `None`, with a note, where the tests run on a real one.
pub fn emulated_device() -> Option<Device> {
    if driver().is_some() {
        return Some(device());
    }
    println!("SKIPPED: only the emulated device checks this");
    None
}

/// The emulated device as [`emulated_device`], whose n-th allocation from now on, on this thread, fails.
pub fn fail_allocation(nth: i32) {
    tell(b"emulated_fail_allocation", nth);
}

/// As [`fail_allocation`], and so does the attempt that follows after giving memory back.
pub fn refuse_allocation(nth: i32) {
    tell(b"emulated_refuse_allocation", nth);
}

/// As [`fail_allocation`], for launches.
pub fn fail_launch(nth: i32) {
    tell(b"emulated_fail_launch", nth);
}

/// What the emulated device has done on this thread that was beside other work.
pub fn late_work() -> i32 {
    let library = driver().expect("an emulated device");
    // SAFETY: the emulated driver defines it with this signature.
    let function: Symbol<'_, unsafe extern "C" fn() -> i32> =
        unsafe { library.get(b"emulated_late_work") }.unwrap();
    // SAFETY: it reads a thread-local number.
    unsafe { function() }
}

fn tell(name: &[u8], nth: i32) {
    let library = driver().expect("an emulated device");
    // SAFETY: the emulated driver defines both with this signature.
    let function: Symbol<'_, unsafe extern "C" fn(i32)> = unsafe { library.get(name) }.unwrap();
    // SAFETY: they set a thread-local number.
    unsafe { function(nth) };
}

/// Runs another test of this binary in a process of its own, with these variables.
pub fn in_child(test: &str, variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args([test, "--exact", "--ignored", "--nocapture"]).env("RPT_CUDA_TESTS", "emulated");
    command.envs(variables.iter().copied()).output().unwrap()
}

/// Makes the driver that tests use the one that the program finds: `None` is the machine's own.
pub fn driver() -> Option<&'static Library> {
    static DRIVER: OnceLock<Option<Library>> = OnceLock::new();
    DRIVER.get_or_init(|| if has_real_device() { None } else { Some(load()) }).as_ref()
}

fn has_real_device() -> bool {
    if env::var_os("RPT_CUDA_TESTS").is_some_and(|choice| choice == "emulated") {
        return false;
    }
    // SAFETY: loads the vendor's library.
    let Ok(library) = (unsafe { Library::new("libcuda.so.1") }) else { return false };
    let mut count = 0;
    // SAFETY: both functions have these signatures in every release.
    unsafe {
        let initialise: Symbol<'_, unsafe extern "C" fn(u32) -> i32> = library.get(b"cuInit").unwrap();
        let devices: Symbol<'_, unsafe extern "C" fn(*mut i32) -> i32> =
            library.get(b"cuDeviceGetCount").unwrap();
        initialise(0) == 0 && devices(&raw mut count) == 0 && count > 0
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn own_folder() -> PathBuf {
    root().join("tests/cuda_emulator")
}

/// Lets another program find the device that tests use: the emulated one, where there is no other, is loaded before it.
pub fn lend(command: &mut Command) {
    if driver().is_none() {
        return;
    }
    let (driver, others) = libraries();
    let paths: Vec<String> =
        std::iter::once(driver).chain(others).map(|path| path.display().to_string()).collect();
    command.env("LD_PRELOAD", paths.join(":"));
}

/// The emulated driver; the kernels and, unless `RPT_EMULATED_NO_BLAS` is set, the library of products.
fn libraries() -> (PathBuf, Vec<PathBuf>) {
    let emulator = Emulator::new();
    let driver = emulator.driver();
    let mut others = emulator.kernels(&driver);
    if env::var_os("RPT_EMULATED_NO_BLAS").is_none() {
        others.push(emulator.blas(&driver));
    }
    (driver, others)
}

fn load() -> Library {
    let (driver, others) = libraries();
    // SAFETY: our own code; it is found under its name by whoever asks for libcuda.so afterwards.
    let library = unsafe { Library::new(&driver) }.unwrap();
    for path in others {
        // SAFETY: our own code, which registers its kernels with the driver or is found as libcublasLt.so. Never unloaded.
        std::mem::forget(unsafe { Library::new(path) }.unwrap());
    }
    library
}

/// Compiles what is not there yet.
struct Emulator {
    compiler: String,
    /// Digest of compiler, flags and headers.
    common: DefaultHasher,
    out: PathBuf,
}

impl Emulator {
    fn new() -> Self {
        let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
        let version = Command::new(&compiler).arg("--version").output();
        let version =
            version.unwrap_or_else(|error| panic!("{compiler}: {error}; tests with cuda need it")).stdout;
        let mut common = DefaultHasher::new();
        (version, machine_flags(), FLAGS, KERNEL_FLAGS).hash(&mut common);
        for header in files(&own_folder(), &["h"]) {
            fs::read(header).unwrap().hash(&mut common);
        }
        let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-emulator");
        fs::create_dir_all(&out).unwrap();
        Self { compiler, common, out }
    }

    fn driver(&self) -> PathBuf {
        let sources = ["driver.cpp", "memory.cpp", "runtime.cpp"].map(|name| own_folder().join(name));
        self.once("libcuda", &sources, |command| {
            command.args(&sources).args(["-isystem", env!("RPT_CUDA_INCLUDE")]);
            command.args(["-Wl,-soname,libcuda.so", "-Wl,-z,defs"]);
        })
    }

    fn blas(&self, driver: &Path) -> PathBuf {
        let source = own_folder().join("cublaslt.cpp");
        self.once("libcublasLt", &[source.clone(), driver.to_owned()], |command| {
            command.arg(&source).args(["-isystem", env!("RPT_CUDA_INCLUDE"), "-Wl,-soname,libcublasLt.so"]);
            command.arg("-Wl,--no-as-needed").arg(driver).arg("-Wl,-z,defs");
        })
    }

    /// Every file of kernels, in the order of their names.
    fn kernels(&self, driver: &Path) -> Vec<PathBuf> {
        let mut sources = files(&kernel_folder(), &["cu"]);
        sources.extend(files(&own_folder().join("kernels"), &["cu"]));
        let waiting = Mutex::new(sources.iter());
        let built = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(1, Into::into) {
                scope.spawn(|| {
                    loop {
                        let next = waiting.lock().unwrap().next();
                        let Some(source) = next else { break };
                        let library = self.kernel(source, driver);
                        built.lock().unwrap().push(library);
                    }
                });
            }
        });
        let mut built = built.into_inner().unwrap();
        built.sort();
        built
    }

    fn kernel(&self, source: &Path, driver: &Path) -> PathBuf {
        let name = source.file_stem().unwrap().to_string_lossy();
        let mut sources = with_headers(source);
        sources.push(driver.to_owned());
        self.once(&name, &sources, |command| {
            let wrapper = self.wrapper(source);
            command.args(Self::include_flags()).args(KERNEL_FLAGS).args(machine_flags());
            command.arg(wrapper).arg("-Wl,--no-as-needed").arg(driver).arg("-Wl,-z,defs");
        })
    }

    fn include_flags() -> [PathBuf; 4] {
        ["-I".into(), kernel_folder(), "-I".into(), own_folder()]
    }

    /// A source that contains the kernels in a namespace of their own, and tells the driver of them.
    fn wrapper(&self, source: &Path) -> PathBuf {
        let mut command = Command::new(&self.compiler);
        command.args(["-std=c++20", "-E", "-P", "-x", "c++"]).args(KERNEL_FLAGS).args(Self::include_flags());
        let text = said(command.arg(source)).stdout;
        let mut wrapper = format!(
            "#include \"runtime.h\"\n#include \"common.cuh\"\nnamespace file_of_kernels {{\n#include \"{}\"\n\
             static thread_local char shared_start;\nstatic const void* shared_anchor() {{ return &shared_start; }}\n",
            source.display()
        );
        for Declaration { name, bounds } in declarations(&String::from_utf8(text).unwrap()) {
            let _ = writeln!(
                wrapper,
                "static const bool {name}_is_known = (emulated::register_kernel(emulated::entry<&{name}>(\
                 \"{name}\", emulated::thread_limit({bounds}), &shared_anchor, &{name})), true);"
            );
        }
        wrapper.push_str("}\n");
        let name = source.file_stem().unwrap().to_string_lossy();
        let path = self.out.join(format!("{name}-{}.cpp", process::id()));
        fs::write(&path, wrapper).unwrap();
        path
    }

    /// The library made from these sources with what `complete` adds to the compiler's arguments.
    fn once(&self, name: &str, sources: &[PathBuf], complete: impl FnOnce(&mut Command)) -> PathBuf {
        let mut digest = self.common.clone();
        for source in sources {
            (source, fs::read(source).unwrap()).hash(&mut digest);
        }
        let library = self.out.join(format!("{name}-{:016x}.so", digest.finish()));
        if library.is_file() {
            return library;
        }
        let unfinished = library.with_extension(format!("{}.unfinished", process::id()));
        let mut command = Command::new(&self.compiler);
        command.args(FLAGS).arg("-o").arg(&unfinished);
        complete(&mut command);
        said(&mut command);
        fs::rename(&unfinished, &library).unwrap();
        library
    }
}

/// A source and all headers of kernels that it includes, directly or not.
fn with_headers(source: &Path) -> Vec<PathBuf> {
    let mut paths = vec![source.to_owned()];
    let mut seen = 0;
    while let Some(path) = paths.get(seen) {
        let text = fs::read_to_string(path).unwrap();
        let included =
            text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.strip_suffix('"'));
        for path in included.map(|name| kernel_folder().join(name)).filter(|path| path.is_file()) {
            if !paths.contains(&path) {
                paths.push(path);
            }
        }
        seen += 1;
    }
    paths
}

fn kernel_folder() -> PathBuf {
    root().join("src/cuda/kernels")
}

/// Without it, fmaf is a call of the mathematical library.
fn machine_flags() -> &'static [&'static str] {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        return &["-mavx2", "-mfma"];
    }
    &[]
}

fn files(folder: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let wanted = |path: &PathBuf| {
        path.extension().and_then(OsStr::to_str).is_some_and(|own| extensions.contains(&own))
    };
    let mut found: Vec<_> = entries.filter(wanted).collect();
    found.sort();
    found
}

/// Runs a compiler, which must be content and silent.
fn said(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{command:?}\n{errors}");
    output
}

#[derive(Debug, PartialEq, Eq)]
pub struct Declaration {
    pub name: String,
    pub bounds: String,
}

/// The kernels in preprocessed text: `__global__` and `__launch_bounds__` are attributes there.
pub fn declarations(text: &str) -> Vec<Declaration> {
    text.split("__attribute__((emulated_kernel))").skip(1).filter_map(declaration).collect()
}

fn declaration(mut text: &str) -> Option<Declaration> {
    let mut bounds = String::new();
    loop {
        text = text.trim_start();
        if let Some(rest) = text.strip_prefix("__attribute__") {
            let (inside, behind) = rest.trim_start().split_at(closing(rest.trim_start())?);
            if let Some(at) = inside.find("emulated_launch_bounds(") {
                let arguments = &inside[at + "emulated_launch_bounds".len()..];
                arguments[1..closing(arguments)? - 1].clone_into(&mut bounds);
            }
            text = behind;
            continue;
        }
        let end = text.find(|letter: char| !letter.is_alphanumeric() && letter != '_')?;
        let (word, rest) = text.split_at(end.max(1));
        if rest.trim_start().starts_with('(') {
            return Some(Declaration { name: word.to_owned(), bounds });
        }
        text = rest;
    }
}

/// The place behind the parenthesis that closes the one with which the text begins.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    for (at, letter) in text.char_indices() {
        match letter {
            '(' => depth += 1,
            ')' if depth == 1 => return Some(at + 1),
            ')' => depth -= 1,
            _ => {}
        }
    }
    None
}

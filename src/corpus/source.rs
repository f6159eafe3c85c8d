//! From the `source` of a pipeline file to a stable list of files.

use super::error::{CorpusError, nearest};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Endings that directories are searched for, and what they say about a file.
const ENDINGS: [(&str, Format); 9] = [
    (".parquet", Format::Parquet),
    (".jsonl", Format::Lines(Compression::None)),
    (".jsonl.gz", Format::Lines(Compression::Gzip)),
    (".jsonl.zst", Format::Lines(Compression::Zstd)),
    (".ndjson", Format::Lines(Compression::None)),
    (".ndjson.gz", Format::Lines(Compression::Gzip)),
    (".ndjson.zst", Format::Lines(Compression::Zstd)),
    (".json.gz", Format::Lines(Compression::Gzip)),
    (".json.zst", Format::Lines(Compression::Zstd)),
];

/// Whether directories are searched for files of such a name.
pub(crate) fn has_known_ending(name: &str) -> bool {
    Format::of(name).is_some()
}

/// How a file holds its documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Parquet,
    /// A JSON object on each line.
    Lines(Compression),
}

/// How a file of lines is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Format {
    /// What the ending of a name says.
    pub(super) fn of(name: &str) -> Option<Self> {
        ENDINGS.iter().find(|(ending, _)| name.ends_with(ending)).map(|(_, format)| *format)
    }
}

/// One file of a corpus.
#[derive(Clone, Debug)]
pub(super) struct SourceFile {
    /// Where it is: a path, or the address in a store.
    pub(super) path: PathBuf,
    /// Its name below the source, with `/` between directories: the same wherever the corpus lies.
    pub(super) name: String,
    /// Number of the source that it is of.
    pub(super) part: usize,
    /// What its bytes are read from.
    pub(super) place: Place,
}

/// What the bytes of a file are read from.
#[derive(Clone, Debug)]
pub(super) enum Place {
    /// The file system.
    Local,
    /// A store.
    #[cfg(feature = "remote")]
    Remote(super::remote::RemoteObject),
}

impl SourceFile {
    /// Why a store did not give what was read last, if it did not.
    pub(super) fn failure(&self) -> Option<CorpusError> {
        match &self.place {
            Place::Local => None,
            #[cfg(feature = "remote")]
            Place::Remote(object) => object
                .failure()
                .map(|message| CorpusError::Store { place: self.path.display().to_string(), message }),
        }
    }

    /// A file that is named explicitly may have any ending: it is parquet, unless that is `.json`.
    pub(super) fn format(&self) -> Format {
        let json = Path::new(&self.name).extension().is_some_and(|extension| extension == "json");
        let other = if json { Format::Lines(Compression::None) } else { Format::Parquet };
        Format::of(&self.name).unwrap_or(other)
    }
}

/// The files of a source, ordered by path.
///
/// An existing file or directory is taken as such; anything else with `*`, `?` or `[` is a glob, and
/// with `://` an address.
pub(super) fn resolve(source: &str) -> Result<Vec<SourceFile>, CorpusError> {
    let path = Path::new(source);
    let (base, mut paths) = if path.is_file() {
        (path.parent().unwrap_or(Path::new("")).to_path_buf(), vec![path.to_path_buf()])
    } else if path.is_dir() {
        (path.to_path_buf(), directory(path)?)
    } else if source.contains("://") {
        return remote(source);
    } else if is_pattern(source) {
        (literal_prefix(path), matches(source)?)
    } else {
        return Err(CorpusError::Missing { place: source.into(), nearest: sibling(path) });
    };
    paths.sort();
    if paths.is_empty() {
        return Err(CorpusError::NoFiles { place: source.into() });
    }
    let file =
        |path: PathBuf| SourceFile { name: name_below(&base, &path), path, part: 0, place: Place::Local };
    Ok(paths.into_iter().map(file).collect())
}

#[cfg(feature = "remote")]
fn remote(source: &str) -> Result<Vec<SourceFile>, CorpusError> {
    super::remote::resolve(source)
}

#[cfg(not(feature = "remote"))]
fn remote(source: &str) -> Result<Vec<SourceFile>, CorpusError> {
    Err(CorpusError::Remote { place: super::error::without_secrets(source) })
}

pub(super) fn is_pattern(text: &str) -> bool {
    text.contains(['*', '?', '['])
}

/// The directories of a glob before its first wildcard.
fn literal_prefix(pattern: &Path) -> PathBuf {
    pattern.components().take_while(|part| !is_pattern(&part.as_os_str().to_string_lossy())).collect()
}

fn name_below(base: &Path, path: &Path) -> String {
    let below = path.strip_prefix(base).unwrap_or(path);
    let parts: Vec<_> = below.components().map(|part| part.as_os_str().to_string_lossy()).collect();
    parts.join("/")
}

fn matches(pattern: &str) -> Result<Vec<PathBuf>, CorpusError> {
    let found = glob::glob(pattern)
        .map_err(|error| CorpusError::Pattern { place: pattern.into(), message: error.msg.into() })?;
    let mut files = Vec::new();
    for entry in found {
        let path = entry.map_err(|error| {
            let path = error.path().to_path_buf();
            CorpusError::Io { path, source: error.into() }
        })?;
        if path.is_file() {
            files.push(path);
        }
    }
    Ok(files)
}

/// Every file of a corpus below a directory, following links but visiting no directory twice.
fn directory(root: &Path) -> Result<Vec<PathBuf>, CorpusError> {
    let mut files = Vec::new();
    let mut visited = BTreeSet::new();
    let mut waiting = vec![root.to_path_buf()];
    while let Some(directory) = waiting.pop() {
        if !visited.insert(fs::canonicalize(&directory).map_err(CorpusError::io(&directory))?) {
            continue;
        }
        for entry in fs::read_dir(&directory).map_err(CorpusError::io(&directory))? {
            let path = entry.map_err(CorpusError::io(&directory))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.starts_with('.') {
                continue;
            }
            if path.is_dir() {
                waiting.push(path);
            } else if Format::of(&name).is_some() {
                files.push(path);
            }
        }
        // A directory that two links reach must be entered by the same one every time.
        waiting.sort_by(|a, b| b.cmp(a));
    }
    Ok(files)
}

/// The entry of the same directory whose name is most like the missing one.
fn sibling(path: &Path) -> Option<PathBuf> {
    let parent = path.parent()?;
    let listed = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let mut names: Vec<String> =
        fs::read_dir(listed).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    names.sort();
    let wanted = path.file_name()?.to_string_lossy();
    nearest(&wanted, names.iter().map(String::as_str)).map(|name| parent.join(name))
}

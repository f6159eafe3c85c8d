//! `manifest.json`: what a checkpoint consists of, and whether it still does.

use super::names::{is_plain_file, step_name};
use super::{BUFFER_BYTES, Damage};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// Name of the manifest.
pub(super) const MANIFEST: &str = "manifest.json";
/// Form of the manifest that this version writes and reads.
pub(super) const SCHEMA_VERSION: u64 = 1;
/// A manifest has about 150 bytes per file; more than this is not one.
const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// One file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileEntry {
    /// Name inside the checkpoint's directory.
    pub(super) name: String,
    /// Size.
    pub(super) bytes: u64,
    /// Checksum, hexadecimal.
    pub(super) blake3: String,
}

/// Content of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    schema_version: u64,
    /// Step of the checkpoint.
    pub(super) step: u64,
    /// Pipeline that it belongs to.
    pub(super) identity: String,
    /// Every other file, by name.
    pub(super) files: Vec<FileEntry>,
    /// BLAKE3 of this manifest with an empty checksum.
    checksum: String,
}

impl Manifest {
    /// A sealed manifest.
    pub(super) fn new(step: u64, identity: &str, mut files: Vec<FileEntry>) -> serde_json::Result<Self> {
        files.sort_by(|left, right| left.name.cmp(&right.name));
        let open = Self {
            schema_version: SCHEMA_VERSION,
            step,
            identity: identity.to_owned(),
            files,
            checksum: String::new(),
        };
        let checksum = open.expected_checksum()?;
        Ok(Self { checksum, ..open })
    }

    fn expected_checksum(&self) -> serde_json::Result<String> {
        let open = Self { checksum: String::new(), ..self.clone() };
        Ok(blake3::hash(&open.encode()?).to_hex().to_string())
    }

    /// The one form in which this manifest is written.
    pub(super) fn encode(&self) -> serde_json::Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Reads and checks a checkpoint's manifest, without looking at the other files.
    pub(super) fn read(directory: &Path, step: u64) -> Result<Self, Damage> {
        let path = directory.join(MANIFEST);
        if !path.exists() {
            return Err(Damage::NoManifest);
        }
        let bytes = read_limited(&path).map_err(|error| Damage::Manifest(error.to_string()))?;
        let manifest = Self::parse(&bytes)?;
        if manifest.step != step {
            return Err(Damage::Step { found: manifest.step });
        }
        Ok(manifest)
    }

    fn parse(bytes: &[u8]) -> Result<Self, Damage> {
        /// The one field that every version has.
        #[derive(Deserialize)]
        struct Version {
            schema_version: u64,
        }
        let form = |error: serde_json::Error| Damage::Manifest(error.to_string());
        let version: Version = serde_json::from_slice(bytes).map_err(form)?;
        if version.schema_version != SCHEMA_VERSION {
            return Err(Damage::Schema { found: version.schema_version, known: SCHEMA_VERSION });
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(form)?;
        // The canonical form leaves no byte that could change unseen, not even white space.
        if manifest.encode().map_err(form)? != bytes
            || manifest.expected_checksum().map_err(form)? != manifest.checksum
        {
            return Err(Damage::Manifest("it does not match its checksum".into()));
        }
        manifest.check_names()?;
        Ok(manifest)
    }

    fn check_names(&self) -> Result<(), Damage> {
        let mut seen = BTreeSet::new();
        for name in self.files.iter().map(|file| file.name.as_str()) {
            if !is_plain_file(name) || name == MANIFEST {
                return Err(Damage::Manifest(format!("{name:?} is not a plain file name")));
            }
            if !seen.insert(name) {
                return Err(Damage::Manifest(format!("{name} is listed twice")));
            }
        }
        Ok(())
    }

    /// Whether every file is there with its size.
    pub(super) fn check_sizes(&self, directory: &Path) -> Result<(), Damage> {
        self.files.iter().try_for_each(|file| file.check_size(directory))
    }

    /// Whether every file is there, unchanged; reads everything.
    pub(super) fn check_content(&self, directory: &Path) -> Result<(), Damage> {
        self.check_sizes(directory)?;
        self.files.iter().try_for_each(|file| file.check_content(directory))
    }

    /// Bytes of all files, the manifest not counted.
    pub(super) fn bytes(&self) -> u64 {
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.bytes))
    }
}

impl FileEntry {
    fn check_size(&self, directory: &Path) -> Result<(), Damage> {
        let name = || self.name.clone();
        let found = match fs::symlink_metadata(directory.join(&self.name)) {
            Ok(metadata) if metadata.is_file() => metadata.len(),
            Ok(_) => return Err(Damage::NotAFile(name())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Damage::Missing(name())),
            Err(error) => return Err(self.unreadable(&error)),
        };
        if found == self.bytes {
            return Ok(());
        }
        Err(Damage::Size { name: name(), expected: self.bytes, found })
    }

    fn check_content(&self, directory: &Path) -> Result<(), Damage> {
        let hash = hash_file(&directory.join(&self.name)).map_err(|error| self.unreadable(&error))?;
        if hash == self.blake3 { Ok(()) } else { Err(Damage::Checksum(self.name.clone())) }
    }

    fn unreadable(&self, error: &io::Error) -> Damage {
        Damage::Unreadable { name: self.name.clone(), reason: error.to_string() }
    }
}

/// The checkpoint's manifest, if the checkpoint is intact to the last byte.
pub(super) fn verify_checkpoint(root: &Path, step: u64) -> Result<Manifest, Damage> {
    let directory = root.join(step_name(step));
    let manifest = Manifest::read(&directory, step)?;
    manifest.check_content(&directory)?;
    Ok(manifest)
}

fn read_limited(path: &Path) -> io::Result<Vec<u8>> {
    if !fs::symlink_metadata(path)?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_MANIFEST_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(io::Error::other(format!("more than {MAX_MANIFEST_BYTES} bytes")));
    }
    Ok(bytes)
}

fn hash_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().to_hex().to_string()),
            Ok(count) => {
                hasher.update(&buffer[..count]);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealed(files: &[&str]) -> Vec<u8> {
        let entry = |name: &&str| FileEntry { name: (*name).into(), bytes: u64::MAX, blake3: "0".into() };
        Manifest::new(1, "me", files.iter().map(entry).collect()).unwrap().encode().unwrap()
    }

    #[test]
    fn a_sealed_manifest_reads_back() {
        assert_eq!(Manifest::parse(&sealed(&["b", "a"])).unwrap().files.len(), 2);
    }

    #[test]
    fn paths_and_doubles_are_refused_even_with_a_right_checksum() {
        for names in [&["../a"][..], &["/etc/passwd"], &["a/b"], &[".."], &[""], &["a", "a"], &[MANIFEST]] {
            assert!(matches!(Manifest::parse(&sealed(names)), Err(Damage::Manifest(_))), "{names:?}");
        }
    }

    #[test]
    fn every_single_bit_counts() {
        let good = sealed(&["model-00001-of-00001.safetensors", "state.json"]);
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Manifest::parse(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn other_schema_versions_are_named() {
        let damage = Manifest::parse(br#"{"schema_version": 99, "shiny": true}"#).unwrap_err();
        assert!(damage.to_string().contains("schema version 99"), "{damage}");
    }

    #[test]
    fn sizes_do_not_overflow() {
        assert_eq!(Manifest::parse(&sealed(&["a", "b"])).unwrap().bytes(), u64::MAX);
    }
}

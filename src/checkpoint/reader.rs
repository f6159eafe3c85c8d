//! Reading one checkpoint.

use super::error::at;
use super::manifest::Manifest;
use super::names::{check_section, json_name, parse_shards, shard_name};
use super::{BUFFER_BYTES, CheckpointError, Damage};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const FLOAT_BYTES: usize = size_of::<f32>();
/// Bytes of the number at the start of a safetensors file: the header's length.
const LENGTH_BYTES: u64 = 8;
/// Limit of the safetensors format.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A checkpoint that was intact when it was opened.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    manifest: Manifest,
}

impl Checkpoint {
    /// A checkpoint that has been verified.
    pub(super) fn new(path: PathBuf, manifest: Manifest) -> Self {
        Self { path, manifest }
    }

    /// Its step.
    pub fn step(&self) -> u64 {
        self.manifest.step
    }

    /// The pipeline that it belongs to.
    pub fn identity(&self) -> &str {
        &self.manifest.identity
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of its files, the manifest not counted.
    pub fn bytes(&self) -> u64 {
        self.manifest.bytes()
    }

    /// Opens a section of tensors; reads their headers only.
    ///
    /// # Errors
    /// A section that does not exist, or a file that does not have the right form.
    pub fn tensors(&self, section: &str) -> Result<TensorFile, CheckpointError> {
        check_section(section)?;
        let mut tensors = TensorFile::default();
        for name in self.shards(section)? {
            tensors.add_shard(&self.path, &name)?;
        }
        Ok(tensors)
    }

    /// Reads a JSON section.
    ///
    /// # Errors
    /// A section that does not exist, or one that is not a `T`.
    pub fn json<T: DeserializeOwned>(&self, section: &str) -> Result<T, CheckpointError> {
        check_section(section)?;
        let name = json_name(section);
        if !self.manifest.files.iter().any(|file| file.name == name) {
            return Err(self.damaged(Damage::NoSection(section.to_owned())));
        }
        let path = self.path.join(name);
        let file = BufReader::new(File::open(&path).map_err(at(&path))?);
        serde_json::from_reader(file).map_err(|source| CheckpointError::Json { path, source })
    }

    /// Names of a section's shards, in order.
    fn shards(&self, section: &str) -> Result<Vec<String>, CheckpointError> {
        let found = self.manifest.files.iter().filter_map(|file| parse_shards(section, &file.name));
        let counts: Vec<usize> = found.collect();
        match counts.first() {
            None => Err(self.damaged(Damage::NoSection(section.to_owned()))),
            // Names in a manifest are unique, so N of them that say "of N" are 1 to N or out of range.
            Some(&count) if counts.len() == count && counts.iter().all(|one| *one == count) => {
                Ok((1..=count).map(|number| shard_name(section, number, count)).collect())
            }
            Some(_) => {
                let reason = format!("the shards of section `{section}` are incomplete");
                Err(self.damaged(Damage::Manifest(reason)))
            }
        }
    }

    fn damaged(&self, damage: Damage) -> CheckpointError {
        CheckpointError::Damaged { path: self.path.clone(), damage }
    }
}

/// Where a tensor's elements are.
#[derive(Debug)]
struct Place {
    shape: Vec<usize>,
    shard: usize,
    offset: u64,
    elements: usize,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    file: File,
}

/// The f32 tensors of one section, read by name when asked for.
#[derive(Debug, Default)]
pub struct TensorFile {
    shards: Vec<Shard>,
    places: BTreeMap<String, Place>,
}

impl TensorFile {
    /// Names and shapes, in order of the names.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &[usize])> {
        self.places.iter().map(|(name, place)| (name.as_str(), place.shape.as_slice()))
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Extent of each dimension of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.places.get(name).map(|place| place.shape.as_slice())
    }

    /// A tensor's elements in row-major order.
    ///
    /// # Errors
    /// A tensor that does not exist, or what the system said.
    pub fn read(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let mut elements = vec![0.0; self.place(name)?.elements];
        self.read_into(name, &mut elements)?;
        Ok(elements)
    }

    /// Copies a tensor's elements, in row-major order, to where they belong.
    ///
    /// # Errors
    /// A tensor that does not exist or has another number of elements, or what the system said.
    pub fn read_into(&self, name: &str, destination: &mut [f32]) -> Result<(), CheckpointError> {
        let place = self.place(name)?;
        if place.elements != destination.len() {
            let reason = format!("it has {} elements, {} are wanted", place.elements, destination.len());
            return Err(CheckpointError::Tensor { name: name.to_owned(), reason });
        }
        let shard = &self.shards[place.shard];
        let mut buffer = vec![0; BUFFER_BYTES.min(size_of_val(destination))];
        let mut offset = place.offset;
        for piece in destination.chunks_mut(BUFFER_BYTES / FLOAT_BYTES) {
            let bytes = &mut buffer[..size_of_val(piece)];
            shard.file.read_exact_at(bytes, offset).map_err(at(&shard.path))?;
            let (floats, _) = bytes.as_chunks::<FLOAT_BYTES>();
            piece.iter_mut().zip(floats).for_each(|(to, from)| *to = f32::from_le_bytes(*from));
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    fn place(&self, name: &str) -> Result<&Place, CheckpointError> {
        self.places.get(name).ok_or_else(|| CheckpointError::Tensor {
            name: name.to_owned(),
            reason: "the checkpoint does not hold it".into(),
        })
    }

    fn add_shard(&mut self, directory: &Path, name: &str) -> Result<(), CheckpointError> {
        let path = directory.join(name);
        let file = File::open(&path).map_err(at(&path))?;
        let form = |reason: String| CheckpointError::Damaged {
            path: directory.to_owned(),
            damage: Damage::Form { name: name.to_owned(), reason },
        };
        let (start, metadata) = read_header(&file).map_err(&form)?;
        let shard = self.shards.len();
        for tensor in metadata.offset_keys() {
            let Some(info) = metadata.info(&tensor) else { continue };
            let place = place_of(info, shard, start).map_err(|reason| form(format!("{tensor}: {reason}")))?;
            if self.places.contains_key(&tensor) {
                return Err(form(format!("{tensor} is in two shards")));
            }
            self.places.insert(tensor, place);
        }
        self.shards.push(Shard { path, file });
        Ok(())
    }
}

fn place_of(info: &TensorInfo, shard: usize, start: u64) -> Result<Place, String> {
    if info.dtype != Dtype::F32 {
        return Err(format!("elements are {} instead of F32", info.dtype));
    }
    let (from, to) = info.data_offsets;
    let offset = start + from as u64;
    Ok(Place { shape: info.shape.clone(), shard, offset, elements: (to - from) / FLOAT_BYTES })
}

/// Where the elements start, and the header. Every offset in it lies inside the file, and every
/// shape matches its offsets.
fn read_header(file: &File) -> Result<(u64, Metadata), String> {
    let size = file.metadata().map_err(|error| error.to_string())?.len();
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0).map_err(|error| error.to_string())?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > size - LENGTH_BYTES {
        return Err(format!("a header of {length} bytes does not fit"));
    }
    let mut header = vec![0; length as usize];
    file.read_exact_at(&mut header, LENGTH_BYTES).map_err(|error| error.to_string())?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| error.to_string())?;
    let start = LENGTH_BYTES + length;
    // Deserialising has checked that the tensors follow each other without gaps from offset 0.
    if metadata.data_len() as u64 != size - start {
        return Err(format!("tensors of {} bytes do not fill the file", metadata.data_len()));
    }
    Ok((start, metadata))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn open(bytes: &[u8]) -> Result<TensorFile, CheckpointError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let mut tensors = TensorFile::default();
        let path = file.path();
        tensors.add_shard(path.parent().unwrap(), path.file_name().unwrap().to_str().unwrap())?;
        Ok(tensors)
    }

    fn shard(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    #[test]
    fn hostile_headers_are_errors() {
        let one = |shape: &str, offsets: &str, dtype: &str| {
            let header = format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
            open(&shard(&header, 8))
        };
        assert!(one("[2]", "[0,8]", "F32").is_ok());
        assert!(one("[2]", "[8,0]", "F32").is_err());
        assert!(one("[2]", "[0,4]", "F32").is_err());
        assert!(one("[4]", "[0,16]", "F32").is_err());
        assert!(one("[1]", "[0,8]", "F64").is_err());
        assert!(one("[18446744073709551615,2]", "[0,8]", "F32").is_err());
        assert!(one("[2]", "[0,18446744073709551615]", "F32").is_err());
        assert!(open(&u64::MAX.to_le_bytes()).is_err());
        assert!(open(&99_999_999_u64.to_le_bytes()).is_err());
        assert!(open(&[]).is_err());
        assert!(open(&[0; 7]).is_err());
        assert!(open(&shard(&"[".repeat(100_000), 0)).is_err());
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic(length in 0_u64..80, rest in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend(rest);
            let _ = open(&bytes);
        }
    }
}

//! Writing the files of one checkpoint.

use super::error::at;
use super::manifest::{FileEntry, MANIFEST, Manifest};
use super::names::{check_section, json_name, shard_name};
use super::{BUFFER_BYTES, CheckpointError, Storage, StorageFile};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::Serialize;
use std::collections::BTreeSet;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

const FLOAT_BYTES: usize = size_of::<f32>();

/// A tensor to write.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Name, unique within its section.
    pub name: &'a str,
    /// Extent of each dimension; empty for a scalar.
    pub shape: &'a [usize],
    /// Elements in row-major order.
    pub data: &'a [f32],
}

impl TensorView<'_> {
    fn bytes(&self) -> usize {
        size_of_val(self.data)
    }

    fn check(&self) -> Result<(), CheckpointError> {
        let elements = self.shape.iter().try_fold(1_usize, |product, extent| product.checked_mul(*extent));
        if elements == Some(self.data.len()) {
            return Ok(());
        }
        let reason = format!("shape {:?} does not hold {} elements", self.shape, self.data.len());
        Err(CheckpointError::Tensor { name: self.name.to_owned(), reason })
    }
}

/// Collects the files of one checkpoint; given to the closure of a commit.
#[derive(Debug)]
pub struct CheckpointWriter<'a> {
    storage: &'a dyn Storage,
    directory: PathBuf,
    shard_bytes: usize,
    sections: BTreeSet<String>,
    files: Vec<FileEntry>,
}

impl<'a> CheckpointWriter<'a> {
    /// Starts in a directory that exists and is empty.
    pub(super) fn new(storage: &'a dyn Storage, directory: PathBuf, shard_bytes: usize) -> Self {
        Self { storage, directory, shard_bytes, sections: BTreeSet::new(), files: Vec::new() }
    }

    /// Writes a section of f32 tensors as `SECTION-00001-of-0000N.safetensors`, in order of their
    /// names. A shard holds at most the store's shard size, or one tensor that is larger.
    ///
    /// # Errors
    /// A name that is taken or not plain, a shape that does not fit, or what the system said.
    pub fn tensors(&mut self, section: &str, tensors: &[TensorView]) -> Result<(), CheckpointError> {
        self.claim(section)?;
        let mut tensors: Vec<_> = tensors.iter().collect();
        tensors.sort_by_key(|tensor| tensor.name);
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            let reason = format!("it is twice in section `{section}`");
            return Err(CheckpointError::Tensor { name: pair[0].name.to_owned(), reason });
        }
        tensors.iter().try_for_each(|tensor| tensor.check())?;
        let shards = split(&tensors, self.shard_bytes);
        for (index, shard) in shards.iter().enumerate() {
            self.shard(&shard_name(section, index + 1, shards.len()), shard)?;
        }
        Ok(())
    }

    /// Writes a value as `SECTION.json`. JSON has no infinities: they and NaN become `null`.
    ///
    /// # Errors
    /// A name that is taken or not plain, a value that has no JSON form, or what the system said.
    pub fn json<T: Serialize + ?Sized>(&mut self, section: &str, value: &T) -> Result<(), CheckpointError> {
        self.claim(section)?;
        let name = json_name(section);
        let path = self.directory.join(&name);
        let mut file = self.create(&path)?;
        serde_json::to_writer_pretty(&mut file, value).map_err(|error| json_error(&path, error))?;
        file.write_all(b"\n").map_err(at(&path))?;
        self.seal(name, file)
    }

    /// Writes the manifest and waits until everything is on the medium.
    pub(super) fn finish(self, step: u64, identity: &str) -> Result<Manifest, CheckpointError> {
        let path = self.directory.join(MANIFEST);
        let encode = |error| json_error(&path, error);
        let manifest = Manifest::new(step, identity, self.files).map_err(encode)?;
        let bytes = manifest.encode().map_err(encode)?;
        let mut file = self.storage.create(&path).map_err(at(&path))?;
        file.write_all(&bytes).and_then(|()| file.sync()).map_err(at(&path))?;
        self.storage.sync_dir(&self.directory).map_err(at(&self.directory))?;
        Ok(manifest)
    }

    fn claim(&mut self, section: &str) -> Result<(), CheckpointError> {
        check_section(section)?;
        if self.sections.insert(section.to_owned()) {
            return Ok(());
        }
        let reason = "it is written twice";
        Err(CheckpointError::Section { name: section.to_owned(), reason })
    }

    fn shard(&mut self, name: &str, tensors: &[&TensorView]) -> Result<(), CheckpointError> {
        let path = self.directory.join(name);
        let header = header(tensors).map_err(|error| at(&path)(io::Error::other(error)))?;
        let mut file = self.create(&path)?;
        write_shard(&mut file, &header, tensors).map_err(at(&path))?;
        self.seal(name.to_owned(), file)
    }

    fn create(&self, path: &Path) -> Result<BufWriter<Hashed>, CheckpointError> {
        let file = self.storage.create(path).map_err(at(path))?;
        let hashed = Hashed { file, hasher: blake3::Hasher::new(), bytes: 0 };
        Ok(BufWriter::with_capacity(BUFFER_BYTES, hashed))
    }

    fn seal(&mut self, name: String, file: BufWriter<Hashed>) -> Result<(), CheckpointError> {
        let path = self.directory.join(&name);
        let mut hashed = file.into_inner().map_err(|error| at(&path)(error.into_error()))?;
        hashed.file.sync().map_err(at(&path))?;
        let blake3 = hashed.hasher.finalize().to_hex().to_string();
        self.files.push(FileEntry { name, bytes: hashed.bytes, blake3 });
        Ok(())
    }
}

/// A full disk is an error of the disk and not of the JSON.
fn json_error(path: &Path, error: serde_json::Error) -> CheckpointError {
    if error.is_io() {
        return at(path)(error.into());
    }
    CheckpointError::Json { path: path.to_owned(), source: error }
}

/// Groups tensors into shards, in order; there is always at least one.
fn split<'t, 'd>(tensors: &[&'t TensorView<'d>], shard_bytes: usize) -> Vec<Vec<&'t TensorView<'d>>> {
    let mut shards = vec![Vec::new()];
    let mut bytes = 0_usize;
    for tensor in tensors {
        bytes = bytes.saturating_add(tensor.bytes());
        match shards.last_mut() {
            Some(shard) if bytes <= shard_bytes || shard.is_empty() => shard.push(*tensor),
            _ => {
                shards.push(vec![*tensor]);
                bytes = tensor.bytes();
            }
        }
    }
    shards
}

/// The header of a safetensors file, padded so that the elements are aligned.
fn header(tensors: &[&TensorView]) -> Result<Vec<u8>, Box<dyn std::error::Error + Send + Sync>> {
    let mut end = 0;
    let infos = tensors.iter().map(|tensor| {
        let start = end;
        end += tensor.bytes();
        let shape = tensor.shape.to_vec();
        (tensor.name.to_owned(), TensorInfo { dtype: Dtype::F32, shape, data_offsets: (start, end) })
    });
    let mut header = serde_json::to_vec(&Metadata::new(None, infos.collect())?)?;
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    Ok(header)
}

fn write_shard(file: &mut impl Write, header: &[u8], tensors: &[&TensorView]) -> io::Result<()> {
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header)?;
    let mut buffer = Vec::with_capacity(BUFFER_BYTES);
    for piece in tensors.iter().flat_map(|tensor| tensor.data.chunks(BUFFER_BYTES / FLOAT_BYTES)) {
        buffer.clear();
        buffer.extend(piece.iter().flat_map(|element| element.to_le_bytes()));
        file.write_all(&buffer)?;
    }
    Ok(())
}

/// A file that is hashed while it is written.
struct Hashed {
    file: Box<dyn StorageFile>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Write for Hashed {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.file.write(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_hold_what_fits_and_large_tensors_alone() {
        let data = [0.0; 10];
        let tensor = |length: usize| TensorView { name: "", shape: &[], data: &data[..length] };
        let sizes = |lengths: &[usize], bytes| {
            let tensors: Vec<_> = lengths.iter().map(|length| tensor(*length)).collect();
            let tensors: Vec<_> = tensors.iter().collect();
            split(&tensors, bytes).iter().map(Vec::len).collect::<Vec<_>>()
        };
        assert_eq!(sizes(&[], 16), [0]);
        assert_eq!(sizes(&[2, 2, 2], 16), [2, 1]);
        assert_eq!(sizes(&[1, 10, 1, 3, 1], 16), [1, 1, 2, 1]);
        assert_eq!(sizes(&[0, 4, 0], 16), [3]);
    }

    #[test]
    fn the_header_is_what_the_safetensors_crate_writes() {
        let data = [1.0, -2.5, f32::MIN_POSITIVE];
        let views = [
            TensorView { name: "a", shape: &[3, 1], data: &data },
            TensorView { name: "b", shape: &[], data: &data[..1] },
        ];
        let mut ours = Vec::new();
        let references: Vec<_> = views.iter().collect();
        write_shard(&mut ours, &header(&references).unwrap(), &references).unwrap();
        let bytes: Vec<Vec<u8>> =
            views.iter().map(|view| view.data.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
        let theirs = views.iter().zip(&bytes).map(|(view, bytes)| {
            let tensor = safetensors::tensor::TensorView::new(Dtype::F32, view.shape.to_vec(), bytes);
            (view.name, tensor.unwrap())
        });
        assert_eq!(ours, safetensors::serialize(theirs, None).unwrap());
    }
}

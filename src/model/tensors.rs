//! Tensors in mapped safetensors files.

use super::ModelError;
use crate::kernels::dtype::Dtype;
use memmap2::Mmap;
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Largest header that is parsed: some twenty thousand tensors.
const HEADER_BYTES: u64 = 4 << 20;

/// The tensors of some files by name. Only headers have been read.
pub(super) struct TensorFiles {
    maps: Vec<Mmap>,
    tensors: BTreeMap<String, Entry>,
    repeated: Vec<String>,
}

struct Entry {
    file: usize,
    bytes: Range<usize>,
    shape: Vec<usize>,
    dtype: safetensors::Dtype,
}

/// A tensor in a file.
pub(super) struct Tensor<'a> {
    /// Its shape.
    pub(super) shape: &'a [usize],
    /// Its number format, or the one that no weight can have.
    pub(super) dtype: Result<Dtype, safetensors::Dtype>,
    map: &'a Mmap,
    bytes: Range<usize>,
}

impl TensorFiles {
    /// Maps files and reads their headers.
    ///
    /// # Errors
    /// When a file cannot be read, or its header is not that of a safetensors file of its length.
    pub(super) fn open(files: &[PathBuf]) -> Result<Self, ModelError> {
        let mut all = Self { maps: Vec::new(), tensors: BTreeMap::new(), repeated: Vec::new() };
        for path in files {
            all.add(path)?;
        }
        Ok(all)
    }

    fn add(&mut self, path: &Path) -> Result<(), ModelError> {
        let bad = |problem: String| ModelError::Weights { path: path.to_path_buf(), problems: vec![problem] };
        let file = File::open(path).map_err(ModelError::io(path))?;
        // SAFETY: the mapping is only read; a file that another process truncates meanwhile ends this
        // process with a bus error, never with values that go unnoticed: lengths are checked below.
        let map = unsafe { Mmap::map(&file) }.map_err(ModelError::io(path))?;
        let length = map.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        match length {
            None => return Err(bad("it is too short for a safetensors file".into())),
            Some(length) if length > HEADER_BYTES => {
                return Err(bad(format!(
                    "its header claims {length} bytes: at most {HEADER_BYTES} are read"
                )));
            }
            Some(_) => {}
        }
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| bad(format!("broken header: {error}")))?;
        let start = size_of::<u64>() + header;
        for (name, info) in metadata.tensors() {
            let bytes = start + info.data_offsets.0..start + info.data_offsets.1;
            let entry = Entry { file: self.maps.len(), bytes, shape: info.shape.clone(), dtype: info.dtype };
            if self.tensors.insert(name.clone(), entry).is_some() {
                self.repeated.push(name);
            }
        }
        self.maps.push(map);
        Ok(())
    }

    /// Names of all tensors, in order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Names that more than one file holds.
    pub(super) fn repeated(&self) -> impl Iterator<Item = &str> {
        self.repeated.iter().map(String::as_str)
    }

    /// A tensor by its name.
    pub(super) fn get(&self, name: &str) -> Option<Tensor<'_>> {
        let Entry { file, bytes, shape, dtype } = self.tensors.get(name)?;
        let dtype = match dtype {
            safetensors::Dtype::F32 => Ok(Dtype::F32),
            safetensors::Dtype::BF16 => Ok(Dtype::Bf16),
            safetensors::Dtype::F16 => Ok(Dtype::F16),
            other => Err(*other),
        };
        Some(Tensor { shape, dtype, map: &self.maps[*file], bytes: bytes.clone() })
    }
}

impl Tensor<'_> {
    /// Lets `read` see some of the tensor's bytes, then gives their pages back to the system.
    pub(super) fn window(&self, range: Range<usize>, read: impl FnOnce(&[u8])) {
        let place = self.bytes.start + range.start..self.bytes.start + range.end;
        read(&self.map[place.clone()]);
        forget(self.map, place);
    }
}

/// Without this, every page of the file that was read would stay in this process's memory.
#[cfg(unix)]
fn forget(map: &Mmap, place: Range<usize>) {
    // SAFETY: the mapping is of a file and never written to, so a page that is dropped is read from the
    // file again when it is touched.
    let dropped =
        unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, place.start, place.len()) };
    // The advice only saves memory: without it everything still works.
    drop(dropped);
}

#[cfg(not(unix))]
fn forget(_map: &Mmap, _place: Range<usize>) {}

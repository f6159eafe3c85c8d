//! The bytes of a file, wherever it lies.

#[cfg(feature = "remote")]
use super::remote::RemoteFile;
use super::source::{Place, SourceFile};
use bytes::Bytes;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of the end (and of the start) of a file that go into its fingerprint.
const MARGIN: u64 = 64 * 1024;

/// An open file of a corpus.
pub(super) struct Blob {
    length: u64,
    place: Opened,
}

enum Opened {
    Local(Mutex<File>),
    #[cfg(feature = "remote")]
    Remote(RemoteFile),
}

impl Blob {
    pub(super) fn open(file: &SourceFile) -> io::Result<Self> {
        match &file.place {
            Place::Local => {
                let file = File::open(&file.path)?;
                Ok(Self { length: file.metadata()?.len(), place: Opened::Local(Mutex::new(file)) })
            }
            #[cfg(feature = "remote")]
            Place::Remote(object) => {
                Ok(Self { length: object.length, place: Opened::Remote(RemoteFile::open(object)) })
            }
        }
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Exactly the bytes of a range; memory for them is taken once they are known to be there.
    pub(super) fn read(&self, range: Range<u64>) -> io::Result<Bytes> {
        let inside = range.start <= range.end && range.end <= self.length;
        let wanted = usize::try_from(range.end.saturating_sub(range.start)).ok().filter(|_| inside);
        let wanted = wanted.ok_or(io::ErrorKind::UnexpectedEof)?;
        match &self.place {
            Opened::Local(file) => {
                let mut buffer = Vec::with_capacity(wanted);
                let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
                file.seek(SeekFrom::Start(range.start))?;
                (&mut *file).take(wanted as u64).read_to_end(&mut buffer)?;
                if buffer.len() < wanted {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(buffer.into())
            }
            #[cfg(feature = "remote")]
            Opened::Remote(file) => file.read(range),
        }
    }

    /// Says which ranges are read now, each from its start on, and which after them; a remote file is
    /// fetched ahead.
    #[cfg_attr(not(feature = "remote"), allow(unused_variables, reason = "local files need no notice"))]
    pub(super) fn expect(&self, now: &[Range<u64>], next: &[Range<u64>]) {
        match &self.place {
            Opened::Local(_) => {}
            #[cfg(feature = "remote")]
            Opened::Remote(file) => file.expect(now, next),
        }
    }

    /// The first bytes of a file of lines, and the last bytes of any file: there, parquet keeps sizes,
    /// offsets and statistics.
    pub(super) fn margins(&self, first: bool) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if first {
            bytes.extend_from_slice(&self.read(0..self.length.min(MARGIN))?);
        }
        bytes.extend_from_slice(&self.read(self.length.saturating_sub(MARGIN)..self.length)?);
        Ok(bytes)
    }
}

/// A file from its start to its end, in large pieces.
pub(super) struct Stream {
    blob: Arc<Blob>,
    next: u64,
    piece: Bytes,
}

impl Stream {
    const PIECE: u64 = 1 << 20;

    pub(super) fn new(blob: Arc<Blob>) -> Self {
        blob.expect(std::slice::from_ref(&(0..blob.length())), &[]);
        Self { blob, next: 0, piece: Bytes::new() }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.piece.is_empty() {
            let end = self.blob.length().min(self.next + Self::PIECE);
            self.piece = self.blob.read(self.next..end)?;
            self.next = end;
        }
        let count = buffer.len().min(self.piece.len());
        buffer[..count].copy_from_slice(&self.piece.split_to(count));
        Ok(count)
    }
}

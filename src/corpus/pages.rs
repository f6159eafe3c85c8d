//! Pages of column chunks, checked before and after decompression.
//!
//! Decoders reserve memory for what page headers and encoded lengths announce. [`ChunkBytes`] checks
//! headers before a page is decompressed, [`CheckedPages`] what came out before it is decoded.

use super::blob::Blob;
use super::thrift::{INTEGER, STRUCT, Stop, Walk};
use bytes::Bytes;
use parquet::basic::Encoding;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length, SerializedPageReader};
use parquet::schema::types::{ColumnDescPtr, ColumnDescriptor};
use std::io::{self, Cursor, Read};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// A page may be so large whatever it was compressed from; a single document of 100 MB must fit.
const PLAIN_PAGE: u64 = 160 << 20;
/// Beyond that, a page may be so many times as large as its compressed form.
const RATIO: u64 = 256;
/// Page headers hold extreme values of the column, which some writers do not shorten.
const LONGEST_HEADER: usize = 32 << 20;
/// Bytes in which most headers end.
const HEADER_PEEK: u64 = 512;
/// Pages of more than so many bytes are not decoded for one batch, unless it is a batch of one row.
const BATCH_BYTES: u64 = 64 << 20;

/// What a page header announces.
#[derive(Debug, Default, PartialEq, Eq)]
struct Announced {
    header: usize,
    uncompressed: i64,
    compressed: i64,
    values: i64,
    dictionary: bool,
}

impl Announced {
    fn read(bytes: &[u8]) -> Result<Self, Stop> {
        let mut page = Self::default();
        let mut walk = Walk::new(bytes);
        walk.fields(&mut |walk, number, kind| {
            match (number, kind) {
                (2, INTEGER) => page.uncompressed = walk.signed()?,
                (3, INTEGER) => page.compressed = walk.signed()?,
                (5 | 7 | 8, STRUCT) => {
                    page.dictionary |= number == 7;
                    page.values = page.values.max(first_integer(walk)?);
                }
                _ => return Ok(false),
            }
            Ok(true)
        })?;
        Ok(Self { header: walk.position(), ..page })
    }

    fn check(&self) -> Result<(), String> {
        let (Ok(uncompressed), Ok(compressed), Ok(values)) =
            (u64::try_from(self.uncompressed), u64::try_from(self.compressed), u64::try_from(self.values))
        else {
            return Err("announces a negative size".into());
        };
        if uncompressed > PLAIN_PAGE.saturating_add(RATIO.saturating_mul(compressed)) {
            return Err(format!("claims to hold {uncompressed} bytes in {compressed}"));
        }
        if self.dictionary && values > uncompressed {
            return Err(format!("claims {values} dictionary entries in {uncompressed} bytes"));
        }
        Ok(())
    }
}

/// The number of values, which comes first in the part of a header that belongs to its kind of page.
fn first_integer(walk: &mut Walk) -> Result<i64, Stop> {
    let mut values = 0;
    walk.fields(&mut |walk, number, kind| {
        let first = number == 1 && kind == INTEGER;
        if first {
            values = walk.signed()?;
        }
        Ok(first)
    })?;
    Ok(values)
}

/// A column chunk that is read.
pub(super) struct Chunk {
    pub(super) range: Range<u64>,
    /// Values that the footer announces.
    pub(super) values: u64,
    /// Values that its page headers have announced so far.
    pub(super) announced: AtomicU64,
}

/// The bytes of a file's column chunks for the parquet crate, which asks for a reader where a page
/// header begins and for the body by its length.
#[derive(Clone)]
pub(super) struct ChunkBytes(Arc<Source>);

struct Source {
    blob: Arc<Blob>,
    chunks: Vec<Chunk>,
}

impl ChunkBytes {
    pub(super) fn new(blob: Arc<Blob>, chunks: Vec<Chunk>) -> Self {
        Self(Arc::new(Source { blob, chunks }))
    }
}

impl Source {
    /// The bytes of the page header at `start`, if it is one that may be believed.
    fn header(&self, start: u64) -> io::Result<Bytes> {
        let refuse = |reason: String| io::Error::other(format!("the page at {start} {reason}"));
        let chunk = self.chunks.iter().find(|chunk| chunk.range.contains(&start));
        let chunk = chunk.ok_or_else(|| refuse("lies outside the column chunks".into()))?;
        let mut peek = HEADER_PEEK;
        loop {
            let end = chunk.range.end.min(start.saturating_add(peek));
            let bytes = self.blob.read(start..end)?;
            match Announced::read(&bytes) {
                Ok(page) => {
                    page.check().and_then(|()| chunk.announce(&page)).map_err(refuse)?;
                    return Ok(bytes.slice(..page.header));
                }
                Err(Stop::Short) if end < chunk.range.end && bytes.len() < LONGEST_HEADER => peek *= 8,
                Err(_) => return Err(refuse("has no header".into())),
            }
        }
    }
}

impl Chunk {
    /// The pages of a chunk must not announce more values than the footer does.
    fn announce(&self, page: &Announced) -> Result<(), String> {
        let values = if page.dictionary { 0 } else { page.values as u64 };
        let announced = self.announced.fetch_add(values, Relaxed).saturating_add(values);
        if announced > self.values {
            return Err(format!("brings the values of its chunk to {announced} of {}", self.values));
        }
        Ok(())
    }
}

impl Length for ChunkBytes {
    fn len(&self) -> u64 {
        self.0.blob.length()
    }
}

impl ChunkReader for ChunkBytes {
    type T = HeaderRead;

    /// Where a header has been met before, the parquet crate asks here for its body and reads nothing:
    /// only a reader that is read from looks at the file.
    fn get_read(&self, start: u64) -> parquet::errors::Result<HeaderRead> {
        Ok(HeaderRead { source: self.0.clone(), start, header: None })
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        Ok(self.0.blob.read(start..start.saturating_add(length as u64))?)
    }
}

/// The bytes of one page header.
pub(super) struct HeaderRead {
    source: Arc<Source>,
    start: u64,
    header: Option<Cursor<Bytes>>,
}

impl Read for HeaderRead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let header = match &mut self.header {
            Some(header) => header,
            none => none.insert(Cursor::new(self.source.header(self.start)?)),
        };
        header.read(buffer)
    }
}

/// Bytes of the pages that were decoded since a batch began.
#[derive(Debug, Default)]
pub(super) struct Budget {
    spent: AtomicU64,
    unlimited: AtomicBool,
}

impl Budget {
    /// A batch begins. Batches of one row must pass whatever they hold.
    pub(super) fn renew(&self, unlimited: bool) {
        self.spent.store(0, Relaxed);
        self.unlimited.store(unlimited, Relaxed);
    }

    fn spend(&self, bytes: usize) -> Result<(), String> {
        let before = self.spent.fetch_add(bytes as u64, Relaxed);
        if before > BATCH_BYTES && !self.unlimited.load(Relaxed) {
            return Err(format!("a batch takes more than {BATCH_BYTES} bytes"));
        }
        Ok(())
    }
}

/// The pages of a column chunk, each looked at before it is decoded.
pub(super) struct CheckedPages {
    pub(super) pages: SerializedPageReader<ChunkBytes>,
    pub(super) column: ColumnDescPtr,
    pub(super) budget: Arc<Budget>,
}

impl CheckedPages {
    fn check(&self, page: Page) -> parquet::errors::Result<Page> {
        let checked = match &page {
            Page::DictionaryPage { .. } => Ok(()),
            page => self.budget.spend(page.buffer().len()).and_then(|()| check_lengths(page, &self.column)),
        };
        checked.map_err(ParquetError::General)?;
        Ok(page)
    }
}

impl Iterator for CheckedPages {
    type Item = parquet::errors::Result<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

impl PageReader for CheckedPages {
    fn get_next_page(&mut self) -> parquet::errors::Result<Option<Page>> {
        let page = self.pages.get_next_page()?;
        page.map(|page| self.check(page)).transpose()
    }

    fn peek_next_page(&mut self) -> parquet::errors::Result<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> parquet::errors::Result<()> {
        self.pages.skip_next_page()
    }

    fn supports_deferred_dictionary(&self) -> bool {
        self.pages.supports_deferred_dictionary()
    }

    fn take_deferred_dictionary(&mut self) -> parquet::errors::Result<Option<Page>> {
        self.pages.take_deferred_dictionary()
    }

    fn at_record_boundary(&mut self) -> parquet::errors::Result<bool> {
        self.pages.at_record_boundary()
    }
}

/// Decoders of delta-encoded strings reserve memory for as many lengths as the encoded data announce.
fn check_lengths(page: &Page, column: &ColumnDescriptor) -> Result<(), String> {
    let lists = match page.encoding() {
        Encoding::DELTA_LENGTH_BYTE_ARRAY | Encoding::DELTA_BINARY_PACKED => 1,
        Encoding::DELTA_BYTE_ARRAY => 2,
        _ => return Ok(()),
    };
    let buffer = page.buffer();
    let start = levels_end(page, column).ok_or("the levels of a page are longer than the page")?;
    let values = buffer.get(start..).ok_or("the levels of a page are longer than the page")?;
    // A page of nulls alone may hold no values at all.
    if values.is_empty() {
        return Ok(());
    }
    let mut walk = Walk::new(values);
    (0..lists).try_for_each(|list| {
        let last = list + 1 == lists;
        let walked = skip_deltas(&mut walk, u64::from(page.num_values()), last);
        walked.map_err(|_| "a page announces more delta-encoded values than it has".to_owned())
    })
}

/// Where the values of a data page begin.
fn levels_end(page: &Page, column: &ColumnDescriptor) -> Option<usize> {
    match page {
        Page::DataPageV2 { def_levels_byte_len, rep_levels_byte_len, .. } => {
            usize::try_from(def_levels_byte_len.checked_add(*rep_levels_byte_len)?).ok()
        }
        Page::DataPage { buf, num_values, def_level_encoding, rep_level_encoding, .. } => {
            let kinds =
                [(column.max_rep_level(), rep_level_encoding), (column.max_def_level(), def_level_encoding)];
            kinds.into_iter().filter(|(highest, _)| *highest > 0).try_fold(
                0_usize,
                |start, (highest, encoding)| {
                    let length = if *encoding == Encoding::RLE {
                        let length = buf.get(start..start.checked_add(4)?)?.try_into().ok()?;
                        (u32::from_le_bytes(length) as usize).checked_add(4)?
                    } else {
                        let width = 16 - highest.leading_zeros() as usize;
                        (*num_values as usize).checked_mul(width)?.div_ceil(8)
                    };
                    start.checked_add(length)
                },
            )
        }
        Page::DictionaryPage { .. } => Some(0),
    }
}

/// Walks over a list of delta-encoded integers that holds at most so many; of the `last` list only its
/// beginning matters.
fn skip_deltas(walk: &mut Walk, most: u64, last: bool) -> Result<(), Stop> {
    let (block, per_block, count) = (walk.unsigned()?, walk.unsigned()?, walk.unsigned()?);
    walk.unsigned()?;
    if count > most || per_block == 0 {
        return Err(Stop::Malformed);
    }
    let in_miniblock = block / per_block;
    let mut left = count.saturating_sub(1);
    while left > 0 && !last {
        walk.unsigned()?;
        let mut widths = Vec::new();
        for _ in 0..per_block {
            widths.push(u64::from(walk.byte()?));
        }
        for width in widths {
            if left > 0 {
                walk.advance(in_miniblock.saturating_mul(width).div_ceil(8))?;
                left = left.saturating_sub(in_miniblock.max(1));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_that_claim_too_much_are_refused() {
        let page = |uncompressed, compressed, values, dictionary| Announced {
            header: 0,
            uncompressed,
            compressed,
            values,
            dictionary,
        };
        assert!(page(100 << 20, 1 << 10, 1, false).check().is_ok(), "100 MiB of one letter");
        assert!(page(i64::from(i32::MAX), 1 << 30, 1, false).check().is_ok());
        for bad in [
            page(-1, 1, 1, false),
            page(1, -1, 1, false),
            page(1, 1, -1, false),
            page(i64::from(i32::MAX), 1 << 20, 1, false),
            page(10, 10, 11, true),
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn announced_sizes_are_read_from_a_header() {
        // Type 0, 300 bytes from 200, a data page of 7 values, no statistics.
        let header = [0x15, 0, 0x15, 0xd8, 4, 0x15, 0x90, 3, 0x2c, 0x15, 14, 0x15, 0, 0x15, 6, 0x15, 6, 0, 0];
        let page = Announced::read(&header).unwrap();
        let expected =
            Announced { header: 19, uncompressed: 300, compressed: 200, values: 7, dictionary: false };
        assert_eq!(page, expected);
        assert_eq!(Announced::read(&header[..10]), Err(Stop::Short));
    }
}

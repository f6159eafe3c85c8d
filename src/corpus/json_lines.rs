//! JSON lines, plain or compressed, streamed with bounded memory.
//!
//! A file is one row group and its lines are the rows. Lines that cannot be used are dropped and counted
//! by reason. Reading from a row on reads the file from its start: compressed streams cannot be entered
//! in the middle.

use super::blob::{Blob, Stream};
use super::columns::{Columns, Rows};
use super::counts::{BAD_JSON, BLANK_LINE, LONG_LINE, NO_TEXT, NOT_UTF8, NULL_TEXT, TEXT_NOT_STRING};
use super::error::CorpusError;
use super::json_fields::{Field, keys, read};
use super::source::Compression;
use flate2::bufread::MultiGzDecoder;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

/// Longest line that is read; longer ones are passed over without being held in memory.
const LONGEST_LINE: usize = 256 << 20;
/// Lines, and bytes of them, that are read at a time.
const BATCH_LINES: usize = 256;
const BATCH_BYTES: usize = 8 << 20;
const BUFFER: usize = 256 * 1024;
/// Largest window of a zstd frame, as a power of two: what `zstd --long` writes.
const ZSTD_WINDOW: u32 = 27;

/// A file of JSON lines.
pub(super) struct LinesFile {
    blob: Arc<Blob>,
    compression: Compression,
}

impl LinesFile {
    pub(super) fn new(blob: Blob, compression: Compression) -> Self {
        Self { blob: Arc::new(blob), compression }
    }

    /// Bytes of the file as it is stored.
    pub(super) fn length(&self) -> u64 {
        self.blob.length()
    }

    /// Reads the lines from line `offset` on.
    pub(super) fn lines(&self, columns: &Columns, offset: usize) -> Result<Lines, String> {
        let reader = self.reader().map_err(|error| error.to_string())?;
        let mut reader = LineReader { reader, line: Vec::new(), read: 0 };
        while reader.read < offset {
            if !reader.skip().map_err(|error| error.to_string())? {
                return Err(format!("{} of {offset} lines are there", reader.read));
            }
        }
        Ok(Lines { reader, columns: columns.clone(), failed: None })
    }

    fn reader(&self) -> io::Result<Box<dyn BufRead + Send>> {
        let file = BufReader::with_capacity(BUFFER, Stream::new(self.blob.clone()));
        Ok(match self.compression {
            Compression::None => Box::new(file),
            // The decoder takes an empty file for one that is cut off.
            Compression::Gzip if self.blob.length() == 0 => Box::new(file),
            Compression::Gzip => Box::new(BufReader::with_capacity(BUFFER, MultiGzDecoder::new(file))),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(file)?;
                decoder.window_log_max(ZSTD_WINDOW)?;
                Box::new(BufReader::with_capacity(BUFFER, decoder))
            }
        })
    }

    /// The keys of the first object among the first lines.
    pub(super) fn first_keys(&self) -> Vec<String> {
        let Ok(mut lines) = self.lines(&Columns::keys("", None), 0) else { return Vec::new() };
        let mut found = Vec::new();
        lines.batch(|line| {
            if let (Ok(line), true) = (line, found.is_empty()) {
                found = keys(line);
            }
        });
        found
    }

    /// Whether any of the first lines has the columns. Where none has, they are misnamed.
    pub(super) fn check(&self, path: &Path, columns: &Columns) -> Result<(), CorpusError> {
        let unreadable = |reason| CorpusError::Unreadable { file: path.to_path_buf(), reason };
        let mut lines = self.lines(columns, 0).map_err(unreadable)?;
        let (text, id) = &columns.names;
        let (mut first, mut texts, mut names) = (None, Field::Absent, Field::Absent);
        lines.batch(|line| {
            if let Some((line, [text, id])) =
                line.ok().and_then(|line| Some((line, fields(line, columns).ok()?)))
            {
                first.get_or_insert_with(|| keys(line));
                better(&mut texts, text, |field| matches!(field, Field::Text(_)));
                better(&mut names, id, |field| matches!(field, Field::Text(_) | Field::Integer(_)));
            }
        });
        let Some(columns) = first else {
            return lines.failed.map_or(Ok(()), |reason| Err(unreadable(reason)));
        };
        let judge = |name: &str, field: &Field, expected| match field {
            Field::Absent => Err(CorpusError::NoColumn {
                file: path.to_path_buf(),
                column: name.into(),
                columns: columns.clone(),
            }),
            Field::Other(_) | Field::Integer(_) => Err(CorpusError::WrongType {
                file: path.to_path_buf(),
                column: name.into(),
                found: field.kind().into(),
                expected,
            }),
            Field::Null | Field::Text(_) => Ok(()),
        };
        judge(text, &texts, "text (a string)")?;
        match (id, &names) {
            (Some(_), Field::Integer(_)) | (None, _) => Ok(()),
            (Some(id), names) => judge(id, names, "names (strings or integers)"),
        }
    }
}

/// Keeps the field that says most about a column: a good one, or else the first that is there.
fn better(kept: &mut Field, field: Field, good: fn(&Field) -> bool) {
    if !good(kept) && (good(&field) || matches!(kept, Field::Absent | Field::Null)) && field != Field::Absent
    {
        *kept = field;
    }
}

fn fields(line: &str, columns: &Columns) -> Result<[Field; 2], serde_json::Error> {
    read(line, [Some(&columns.names.0), columns.names.1.as_deref()])
}

/// The lines of a file that are left.
pub(super) struct Lines {
    reader: LineReader,
    columns: Columns,
    /// Why no line follows, when those before it have been delivered.
    failed: Option<String>,
}

impl Lines {
    /// The next lines, or nothing after the last.
    pub(super) fn advance(&mut self) -> Result<Option<Rows>, String> {
        let (start, mut rows) = (self.reader.read, Vec::new());
        let columns = self.columns.clone();
        if self.failed.is_none() {
            self.batch(|line| rows.push(row(line, &columns)));
        }
        if !rows.is_empty() {
            return Ok(Some(Rows::of_lines(start, rows)));
        }
        self.failed.take().map_or(Ok(None), Err)
    }

    /// Reads so many lines as make a batch.
    fn batch(&mut self, mut each: impl FnMut(Result<&str, &'static str>)) {
        let (mut count, mut bytes) = (0, 0);
        while count < BATCH_LINES && bytes < BATCH_BYTES {
            match self.reader.next() {
                Ok(Line::End) => return,
                Ok(Line::Long) => each(Err(LONG_LINE)),
                Ok(Line::Read) => {
                    let line = &self.reader.line;
                    bytes += line.len();
                    each(std::str::from_utf8(line).map_err(|_| NOT_UTF8));
                }
                Err(error) => {
                    self.failed = Some(error.to_string());
                    return;
                }
            }
            count += 1;
        }
    }
}

/// Text and name of a line.
fn row(
    line: Result<&str, &'static str>,
    columns: &Columns,
) -> (Result<String, &'static str>, Option<String>) {
    let line = match line {
        Ok(line) if line.trim_ascii().is_empty() => return (Err(BLANK_LINE), None),
        Ok(line) => line,
        Err(reason) => return (Err(reason), None),
    };
    let Ok([text, id]) = fields(line, columns) else { return (Err(BAD_JSON), None) };
    let text = match text {
        Field::Text(text) => Ok(text),
        Field::Null => Err(NULL_TEXT),
        Field::Absent => Err(NO_TEXT),
        Field::Integer(_) | Field::Other(_) => Err(TEXT_NOT_STRING),
    };
    let id = match id {
        Field::Text(id) | Field::Integer(id) => Some(id),
        Field::Absent | Field::Null | Field::Other(_) => None,
    };
    (text, id)
}

/// What was read.
enum Line {
    /// A line, without its end.
    Read,
    /// A line of more than [`LONGEST_LINE`] bytes, which is not kept.
    Long,
    End,
}

/// Lines of a stream, one at a time.
struct LineReader {
    reader: Box<dyn BufRead + Send>,
    line: Vec<u8>,
    /// Lines that have been read or passed over.
    read: usize,
}

impl LineReader {
    const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
    /// A buffer that a long line has left is not kept beyond this.
    const KEPT: usize = 16 << 20;

    fn next(&mut self) -> io::Result<Line> {
        self.line.clear();
        self.line.shrink_to(Self::KEPT);
        let (mut length, mut kept) = (0_usize, std::mem::take(&mut self.line));
        let found = self.pieces(|piece| {
            length = length.saturating_add(piece.len());
            if length <= LONGEST_LINE {
                kept.extend_from_slice(piece);
            } else {
                kept = Vec::new();
            }
        })?;
        self.line = kept;
        if !found {
            return Ok(Line::End);
        }
        if self.read == 0 && self.line.starts_with(Self::BYTE_ORDER_MARK) {
            self.line.drain(..Self::BYTE_ORDER_MARK.len());
        }
        self.read += 1;
        Ok(if length <= LONGEST_LINE { Line::Read } else { Line::Long })
    }

    /// Passes over a line, if there is one.
    fn skip(&mut self) -> io::Result<bool> {
        let found = self.pieces(|_| ())?;
        self.read += usize::from(found);
        Ok(found)
    }

    /// The pieces of the next line without its end, which that of the file may be; whether there is one.
    fn pieces(&mut self, mut each: impl FnMut(&[u8])) -> io::Result<bool> {
        let mut found = false;
        loop {
            let buffer = match self.reader.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                buffer => buffer?,
            };
            if buffer.is_empty() {
                return Ok(found);
            }
            found = true;
            if let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
                each(&buffer[..end]);
                self.reader.consume(end + 1);
                return Ok(true);
            }
            let length = buffer.len();
            each(buffer);
            self.reader.consume(length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn lines(bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
        let reader = Box::new(BufReader::with_capacity(3, io::Cursor::new(bytes.to_vec())));
        let mut lines = LineReader { reader, line: Vec::new(), read: 0 };
        std::iter::from_fn(|| match lines.next().unwrap() {
            Line::End => None,
            Line::Long => Some(None),
            Line::Read => Some(Some(lines.line.clone())),
        })
        .collect()
    }

    #[test]
    fn lines_end_with_a_newline_or_with_the_file() {
        let some = |line: &str| Some(line.as_bytes().to_vec());
        assert_eq!(lines(b""), []);
        assert_eq!(lines(b"\n"), [some("")]);
        assert_eq!(lines(b"ab\n\ncdefg"), [some("ab"), some(""), some("cdefg")]);
        assert_eq!(lines(b"\xef\xbb\xbfab\n"), [some("ab")]);
    }

    #[test]
    fn a_line_that_is_too_long_is_passed_over_without_being_held() {
        let endless = io::repeat(b'x').take(LONGEST_LINE as u64 + 1).chain(&b"\nshort\n"[..]);
        let reader = Box::new(BufReader::with_capacity(BUFFER, endless));
        let mut lines = LineReader { reader, line: Vec::new(), read: 0 };
        assert!(matches!(lines.next().unwrap(), Line::Long));
        assert!(lines.line.capacity() <= LineReader::KEPT);
        assert!(matches!(lines.next().unwrap(), Line::Read));
        assert_eq!((lines.line.as_slice(), lines.read), (&b"short"[..], 2));
    }
}

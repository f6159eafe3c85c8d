//! JSON that others wrote, read within bounds.

use serde_json::Value;
use std::io::{Error, ErrorKind, Read};
use std::path::Path;

/// What a file may hold at most.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Bytes of the file.
    pub(crate) bytes: u64,
    /// Values in it. One takes about a hundred bytes of memory, however short it stands in the file.
    pub(crate) values: usize,
}

/// Settings of a model, its chat template included. The longest published ones, lists of thousands
/// of added tokens, have 1 MiB and 50,000 values.
pub(crate) const SETTINGS: Bounds = Bounds { bytes: 1 << 23, values: 1 << 18 };
/// A vocabulary with its merges. The largest published ones have 33 MiB and two million values.
pub(crate) const VOCABULARY: Bounds = Bounds { bytes: 1 << 26, values: 1 << 22 };
/// Bytes of the longest part of a foreign file that a message repeats.
const LONGEST_QUOTE: usize = 400;

/// The bytes of a regular file. Nothing else is opened, since a pipe could be waited on for ever.
///
/// # Errors
/// When the file cannot be read or is longer than its bounds.
pub(crate) fn read(path: &Path, bounds: Bounds) -> Result<Vec<u8>, Error> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(Error::new(ErrorKind::InvalidInput, "not a file"));
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(bounds.bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bounds.bytes {
        return Err(Error::new(
            ErrorKind::FileTooLarge,
            format!("has more than {} bytes, which no published model needs", bounds.bytes),
        ));
    }
    Ok(bytes)
}

/// The value that some bytes spell.
///
/// # Errors
/// When they are not JSON, or hold more values than their bounds.
pub(crate) fn parse(bytes: &[u8], bounds: Bounds) -> Result<Value, String> {
    if most_values(bytes) > bounds.values {
        return Err(format!("holds more than {} values, which no published model needs", bounds.values));
    }
    serde_json::from_slice(bytes).map_err(|error| error.to_string())
}

/// At least the number of values: one after each comma and each opening bracket outside of texts.
fn most_values(bytes: &[u8]) -> usize {
    let (mut count, mut in_text, mut escaped) = (1, false, false);
    for byte in bytes {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_text,
            b'"' => in_text = !in_text,
            b',' | b'[' | b'{' if !in_text => count += 1,
            _ => {}
        }
    }
    count
}

/// A message that repeats no more of a foreign file than one wants to read.
pub(crate) fn shortened(mut message: String) -> String {
    if message.len() > LONGEST_QUOTE {
        let end = (0..=LONGEST_QUOTE).rev().find(|&end| message.is_char_boundary(end)).unwrap_or(0);
        message.truncate(end);
        message.push('…');
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_short_values_are_refused_before_they_are_built() {
        let bounds = Bounds { bytes: 1 << 20, values: 100 };
        let list = |count: usize| format!("[{}0]", "0,".repeat(count - 1));
        assert!(parse(list(99).as_bytes(), bounds).is_ok());
        assert!(parse(list(100).as_bytes(), bounds).unwrap_err().contains("100 values"));
        assert!(parse("[".repeat(1 << 20).as_bytes(), bounds).is_err());
        let text = serde_json::to_vec(&",[{\\\"".repeat(1000)).unwrap();
        assert!(parse(&text, bounds).is_ok(), "what stands in a text is no value");
    }

    #[test]
    fn long_files_and_what_is_no_file_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("long.json");
        std::fs::write(&path, [b' '; 11]).unwrap();
        let bounded = |bytes| read(&path, Bounds { bytes, values: 1 });
        assert_eq!(bounded(11).unwrap().len(), 11);
        assert_eq!(bounded(10).unwrap_err().kind(), ErrorKind::FileTooLarge);
        assert_eq!(read(directory.path(), SETTINGS).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(read(&path.join("none"), SETTINGS).unwrap_err().kind(), ErrorKind::NotADirectory);
    }

    #[test]
    fn messages_stay_readable() {
        assert_eq!(shortened("short".into()), "short");
        let long = shortened("é".repeat(1000));
        assert!(long.len() <= LONGEST_QUOTE + 3 && long.ends_with("é…"), "{long}");
    }
}

//! The bytes of text behind each token id.

use serde_json::Value;

/// How a vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// One character per byte, after GPT-2's table.
    ByteLevel,
    /// `▁` for a space, `<0xNN>` for a byte without a piece of its own (`SentencePiece`).
    Metaspace,
}

/// A space in `SentencePiece`'s spelling.
pub(super) const METASPACE: char = '▁';

impl Spelling {
    /// Recognises the spelling from the decoder, or else the pre-tokenizer, of a tokenizer.json.
    pub(super) fn detect(json: &Value) -> Result<Self, String> {
        let mut kinds = Vec::new();
        for part in ["decoder", "pre_tokenizer"] {
            collect_kinds(&json[part], &mut kinds);
        }
        if kinds.iter().any(|kind| kind == "ByteLevel") {
            Ok(Self::ByteLevel)
        } else if kinds.iter().any(|kind| kind == "Metaspace") {
            Ok(Self::Metaspace)
        } else {
            Err(format!("decoder and pre-tokenizer are of the kinds {kinds:?}"))
        }
    }

    /// Bytes of a vocabulary entry.
    pub(super) fn bytes(self, token: &str) -> Vec<u8> {
        match self {
            Self::ByteLevel => {
                let mapped: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
                mapped.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Self::Metaspace => match fallback_byte(token) {
                Some(byte) => vec![byte],
                None => token.replace(METASPACE, " ").into_bytes(),
            },
        }
    }
}

/// Names of all components inside `part`; a `Replace` of [`METASPACE`] counts as `Metaspace`.
fn collect_kinds(part: &Value, kinds: &mut Vec<String>) {
    if let Some(kind) = part["type"].as_str() {
        let metaspace = METASPACE.to_string();
        let replaces = kind == "Replace" && part["pattern"]["String"] == metaspace.as_str();
        let other_mark =
            kind == "Metaspace" && part["replacement"].as_str().is_some_and(|mark| mark != metaspace);
        kinds.push(match (replaces, other_mark) {
            (true, _) => "Metaspace".to_owned(),
            (_, true) => format!("Metaspace with `{}`", part["replacement"]),
            _ => kind.to_owned(),
        });
    }
    for list in ["decoders", "pretokenizers"] {
        for inner in part[list].as_array().into_iter().flatten() {
            collect_kinds(inner, kinds);
        }
    }
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hexadecimal = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if is_hexadecimal { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// Whether GPT-2's table leaves a byte as the character with the same number.
fn is_own_character(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// GPT-2's table: printable Latin-1 stands for itself, the 68 other bytes follow from U+0100 on.
pub(super) fn char_of_byte(byte: u8) -> char {
    if is_own_character(byte) {
        return char::from(byte);
    }
    let rank = (0..byte).filter(|&lower| !is_own_character(lower)).count() as u32;
    char::from_u32(0x100 + rank).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// The inverse of [`char_of_byte`].
pub(super) fn byte_of_char(character: char) -> Option<u8> {
    match u32::from(character) {
        number @ 0..=0xFF => u8::try_from(number).ok().filter(|&byte| is_own_character(byte)),
        0x100..=0x120 => Some((u32::from(character) - 0x100) as u8),
        number @ 0x121..=0x142 => Some((number - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}

/// The bytes of every id in one allocation: ids without a token have none.
#[derive(Debug)]
pub(super) struct ByteTable {
    bytes: Vec<u8>,
    /// `offsets[id]..offsets[id + 1]` bounds the bytes of `id`.
    offsets: Vec<usize>,
}

impl ByteTable {
    /// Lays out the bytes of ids 0, 1, 2, ...
    pub(super) fn new<'a>(tokens: impl Iterator<Item = &'a [u8]>) -> Self {
        let (mut bytes, mut offsets) = (Vec::new(), vec![0]);
        for token in tokens {
            bytes.extend_from_slice(token);
            offsets.push(bytes.len());
        }
        Self { bytes, offsets }
    }

    /// Number of ids.
    pub(super) fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Bytes of an id; none for an id outside of the table.
    pub(super) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        match (self.offsets.get(id), self.offsets.get(id + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start..end],
            _ => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn byte_characters_are_those_of_the_tokenizers_library() {
        let mine: std::collections::BTreeSet<char> = (0..=255).map(char_of_byte).collect();
        let theirs = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        assert_eq!(mine, theirs.into_iter().collect());
        for byte in 0..=255 {
            assert_eq!(byte_of_char(char_of_byte(byte)), Some(byte));
        }
        assert_eq!(char_of_byte(b' '), 'Ġ');
        assert_eq!(char_of_byte(b'\n'), 'Ċ');
    }

    #[test]
    fn spells_bytes_in_both_styles() {
        assert_eq!(Spelling::ByteLevel.bytes("Ġhello"), b" hello");
        assert_eq!(Spelling::ByteLevel.bytes("Ã©"), "é".as_bytes());
        assert_eq!(Spelling::Metaspace.bytes("▁hello▁"), b" hello ");
        assert_eq!(Spelling::Metaspace.bytes("<0x0A>"), b"\n");
        assert_eq!(Spelling::Metaspace.bytes("<0xZZ>"), b"<0xZZ>");
        assert_eq!(Spelling::Metaspace.bytes("<0x+1>"), b"<0x+1>");
    }

    #[test]
    fn finds_the_spelling_inside_of_sequences() {
        let nested = json!({"decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}]}});
        assert_eq!(Spelling::detect(&nested), Ok(Spelling::Metaspace));
        let byte_level = json!({"decoder": null, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split"}, {"type": "ByteLevel"}]}});
        assert_eq!(Spelling::detect(&byte_level), Ok(Spelling::ByteLevel));
        assert!(Spelling::detect(&json!({"decoder": {"type": "WordPiece"}})).is_err());
        assert!(Spelling::detect(&json!({"decoder": {"type": "Metaspace", "replacement": "_"}})).is_err());
    }

    #[test]
    fn ids_outside_of_the_table_have_no_bytes() {
        let table = ByteTable::new([b"ab".as_slice(), b"", b"c"].into_iter());
        assert_eq!(
            (table.get(0), table.get(1), table.get(2)),
            (b"ab".as_slice(), b"".as_slice(), b"c".as_slice())
        );
        assert_eq!(table.get(3), b"");
        assert_eq!(table.get(u32::MAX), b"");
    }
}

//! Pre-tokenizers by hand: where the piece that begins at a position ends.
//!
//! The patterns are alternations of which the first that matches wins, with greedy repetitions
//! over disjoint classes, so one look at the classes of the next characters decides.

use super::classes::{Class, Classes};
use serde_json::Value;

/// Longer white space is left to the library: a million characters of it overflow the stack of
/// its look-ahead, whereupon it takes all that is left of a text for one piece.
const MAX_SPACE: usize = 500_000;

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The patterns that are known.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Known {
    /// `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
    Gpt2,
    /// GPT-4's pattern, digits in groups of up to three.
    Llama3,
    /// The same with single digits.
    Qwen2,
}

impl Known {
    /// Recognises the pre-tokenizer of a tokenizer.json by its very text.
    pub(super) fn detect(pre_tokenizer: &Value) -> Option<Self> {
        let byte_level = |part: &Value, splits: bool| {
            let use_regex = part["use_regex"].as_bool().unwrap_or(part["use_regex"].is_null());
            part["type"] == "ByteLevel" && part["add_prefix_space"] == false && use_regex == splits
        };
        if byte_level(pre_tokenizer, true) {
            return Some(Self::Gpt2);
        }
        let [split, bytes] = pre_tokenizer["pretokenizers"].as_array()?.as_slice() else { return None };
        let isolates =
            split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] == false;
        if pre_tokenizer["type"] != "Sequence" || !isolates || !byte_level(bytes, false) {
            return None;
        }
        match split["pattern"]["Regex"].as_str()? {
            LLAMA_3 => Some(Self::Llama3),
            QWEN_2 => Some(Self::Qwen2),
            _ => None,
        }
    }
}

/// A way to cut text into pieces.
pub(super) trait Pattern {
    /// End of the piece of `text` (UTF-8) that begins at `start`, which is before the text's end;
    /// none where the library is to decide.
    fn end_of_piece(text: &[u8], start: usize, classes: &Classes) -> Option<usize>;
}

/// [`Known::Gpt2`].
pub(super) struct Gpt2;

impl Pattern for Gpt2 {
    #[inline]
    fn end_of_piece(text: &[u8], start: usize, classes: &Classes) -> Option<usize> {
        let body = start + usize::from(text[start] == b' ');
        let end = letters(text, body, classes);
        if end > body {
            return Some(end);
        }
        match classes.at(text, body) {
            Some((Class::Number, length)) => Some(run(text, body + length, Class::Number, classes)),
            Some((Class::Other, length)) => Some(match contraction(text, start) {
                Some(end) => end,
                None => run(text, body + length, Class::Other, classes),
            }),
            _ => Some(Space::from(text, start, classes)?.piece(text)),
        }
    }
}

/// [`Known::Llama3`] and [`Known::Qwen2`], by the greatest number of digits in a piece.
pub(super) struct Gpt4<const DIGITS: usize>;

impl<const DIGITS: usize> Pattern for Gpt4<DIGITS> {
    #[inline]
    fn end_of_piece(text: &[u8], start: usize, classes: &Classes) -> Option<usize> {
        let first = text[start];
        let body = start + usize::from(first == b' ');
        let end = letters(text, body, classes);
        if end > body {
            return Some(end);
        }
        let (class, length) = classes.at(text, start)?;
        let rest = start + length;
        match class {
            Class::Number => return Some(digits::<DIGITS>(text, start, classes)),
            _ if matches!(first, b'\r' | b'\n' | b' ') => {}
            _ => {
                if let Some(end) = contraction_of_any_case(text, start) {
                    return Some(end);
                }
                let end = letters(text, rest, classes);
                if end > rest {
                    return Some(end);
                }
            }
        }
        if let Some((Class::Other, length)) = classes.at(text, body) {
            let end = run(text, body + length, Class::Other, classes);
            return Some(end + newlines(&text[end..]));
        }
        let space = Space::from(text, start, classes)?;
        Some(space.after_newline.unwrap_or_else(|| space.piece(text)))
    }
}

/// A maximal run of white space.
struct Space {
    end: usize,
    /// Where its last character begins, if that is not its first.
    last: Option<usize>,
    /// Behind its last carriage return or line feed.
    after_newline: Option<usize>,
}

impl Space {
    fn from(text: &[u8], start: usize, classes: &Classes) -> Option<Self> {
        let mut space = Self { end: start, last: None, after_newline: None };
        while let Some((Class::Space, length)) = classes.at(text, space.end) {
            if space.end > start {
                space.last = Some(space.end);
            }
            let is_newline = matches!(text[space.end], b'\r' | b'\n');
            space.end += length;
            if is_newline {
                space.after_newline = Some(space.end);
            }
        }
        (space.end - start <= MAX_SPACE).then_some(space)
    }

    /// `\s+(?!\S)|\s+`: the last character is left to the word behind it.
    fn piece(&self, text: &[u8]) -> usize {
        if self.end == text.len() { self.end } else { self.last.unwrap_or(self.end) }
    }
}

/// Where the characters of a class that begin at `position` end.
fn run(text: &[u8], mut position: usize, class: Class, classes: &Classes) -> usize {
    while let Some((found, length)) = classes.at(text, position)
        && found == class
    {
        position += length;
    }
    position
}

/// Where the letters that begin at `position` end.
#[inline]
fn letters(text: &[u8], mut position: usize, classes: &Classes) -> usize {
    loop {
        while let Some(eight) = text.get(position..).and_then(<[u8]>::first_chunk) {
            let count = leading_ascii_letters(u64::from_le_bytes(*eight));
            position += count;
            if count < 8 {
                break;
            }
        }
        match text.get(position) {
            // Either behind the last letter, or within the last eight bytes.
            Some(byte) if byte.is_ascii_alphabetic() => position += 1,
            Some(byte) if byte.is_ascii() => return position,
            _ => match classes.at(text, position) {
                Some((Class::Letter, length)) => position += length,
                _ => return position,
            },
        }
    }
}

/// How many of eight bytes, the lowest first, are ASCII letters before the first that is not.
#[inline]
fn leading_ascii_letters(eight: u64) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x80 * ONES;
    // Bytes of seven bits: a sum below 256 reaches the high bit from a limit on.
    let lower = (eight | (0x20 * ONES)) & !HIGH;
    let from_a = lower + (0x80 - u64::from(b'a')) * ONES;
    let beyond_z = lower + (0x80 - u64::from(b'z') - 1) * ONES;
    let others = !(from_a & !beyond_z & !eight) & HIGH;
    others.trailing_zeros() as usize / 8
}

fn digits<const DIGITS: usize>(text: &[u8], mut position: usize, classes: &Classes) -> usize {
    for _ in 0..DIGITS {
        match classes.at(text, position) {
            Some((Class::Number, length)) => position += length,
            _ => break,
        }
    }
    position
}

/// Number of carriage returns and line feeds at the beginning.
fn newlines(text: &[u8]) -> usize {
    text.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count()
}

/// End of `'s|'t|'re|'ve|'m|'ll|'d`.
fn contraction(text: &[u8], start: usize) -> Option<usize> {
    let length = match text.get(start..)? {
        [b'\'', b's' | b't' | b'm' | b'd', ..] => 2,
        [b'\'', b'r' | b'v', b'e', ..] | [b'\'', b'l', b'l', ..] => 3,
        _ => return None,
    };
    Some(start + length)
}

/// End of `(?i:'s|'t|'re|'ve|'m|'ll|'d)`; the long s (U+017F) is an s of another case.
fn contraction_of_any_case(text: &[u8], start: usize) -> Option<usize> {
    let length = match text.get(start..)? {
        [b'\'', b's' | b't' | b'm' | b'd' | b'S' | b'T' | b'M' | b'D', ..] => 2,
        [b'\'', b'r' | b'v' | b'R' | b'V', b'e' | b'E', ..]
        | [b'\'', b'l' | b'L', b'l' | b'L', ..]
        | [b'\'', 0xC5, 0xBF, ..] => 3,
        _ => return None,
    };
    Some(start + length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tokenizers::utils::SysRegex;

    const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

    fn pieces<P: Pattern>(text: &str) -> Vec<(usize, usize)> {
        let classes = Classes::get().unwrap();
        let mut start = 0;
        let mut pieces = Vec::new();
        while start < text.len() {
            let end = P::end_of_piece(text.as_bytes(), start, classes).unwrap();
            pieces.push((start, end));
            start = end;
        }
        pieces
    }

    /// All texts of up to four characters that the patterns tell apart.
    #[test]
    fn every_short_text_is_split_as_the_librarys_engine_splits_it() {
        let patterns = [GPT_2, LLAMA_3, QWEN_2].map(|pattern| SysRegex::new(pattern).unwrap());
        let alphabet =
            [' ', '\n', '\r', '\t', '\u{a0}', 'a', 'é', '7', '½', '!', '\'', 's', 'l', 'ſ', '\u{301}'];
        for number in 0..alphabet.len().pow(4) {
            let text: String =
                (0..4).map(|place| alphabet[number / alphabet.len().pow(place) % alphabet.len()]).collect();
            for text in [text.as_str(), text.trim_end_matches(' ')] {
                let theirs = patterns.each_ref().map(|pattern| pattern.find_iter(text).collect::<Vec<_>>());
                assert_eq!(pieces::<Gpt2>(text), theirs[0], "{text:?}");
                assert_eq!(pieces::<Gpt4<3>>(text), theirs[1], "{text:?}");
                assert_eq!(pieces::<Gpt4<1>>(text), theirs[2], "{text:?}");
            }
        }
    }

    #[test]
    fn letters_are_found_in_any_of_eight_bytes() {
        for byte in 0..=u8::MAX {
            for place in 0..8 {
                let mut eight = *b"aZzAmMaz";
                eight[place] = byte;
                let expected = if byte.is_ascii_alphabetic() { 8 } else { place };
                assert_eq!(leading_ascii_letters(u64::from_le_bytes(eight)), expected, "{byte} at {place}");
            }
        }
    }

    #[test]
    fn patterns_are_recognised_by_their_very_text_alone() {
        let bytes = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "use_regex": regex});
        let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
        let sequence = |parts: &[Value]| json!({"type": "Sequence", "pretokenizers": parts});
        assert_eq!(Known::detect(&bytes(true)), Some(Known::Gpt2));
        assert_eq!(
            Known::detect(&json!({"type": "ByteLevel", "add_prefix_space": false})),
            Some(Known::Gpt2)
        );
        assert_eq!(Known::detect(&sequence(&[split(LLAMA_3), bytes(false)])), Some(Known::Llama3));
        assert_eq!(Known::detect(&sequence(&[split(QWEN_2), bytes(false)])), Some(Known::Qwen2));
        let mut inverted = split(QWEN_2);
        inverted["invert"] = true.into();
        for other in [
            bytes(false),
            Value::Null,
            json!({"type": "ByteLevel", "add_prefix_space": true}),
            sequence(&[split(r"\s+"), bytes(false)]),
            sequence(&[split(QWEN_2), bytes(true)]),
            sequence(&[split(QWEN_2)]),
            sequence(&[split(QWEN_2), bytes(false), bytes(false)]),
            sequence(&[inverted, bytes(false)]),
        ] {
            assert_eq!(Known::detect(&other), None, "{other}");
        }
    }
}

//! The character classes of the patterns, from the tables of the library's own regex engine.

use regex_syntax::hir::{Class as HirClass, HirKind};
use std::collections::HashMap;
use std::sync::LazyLock;

/// What a pattern tells characters apart by.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, PartialEq)]
pub(super) enum Class {
    /// `[^\s\p{L}\p{N}]`
    #[default]
    Other,
    /// `\p{L}`
    Letter,
    /// `\p{N}`
    Number,
    /// `\s`
    Space,
}

const CODE_POINTS: usize = 0x11_0000;
const BLOCK: usize = 128;

/// The class of every code point, in blocks that equal stretches share.
pub(super) struct Classes {
    /// The first block, which is looked up most.
    ascii: [Class; BLOCK],
    /// Number of the block of each [`BLOCK`] code points.
    index: Vec<u16>,
    blocks: Vec<Class>,
}

impl Classes {
    /// The tables, made once per process; none should the engine not know a class.
    pub(super) fn get() -> Option<&'static Self> {
        static CLASSES: LazyLock<Option<Classes>> = LazyLock::new(Classes::new);
        CLASSES.as_ref()
    }

    fn new() -> Option<Self> {
        let mut flat = vec![Class::Other; CODE_POINTS];
        for (pattern, class) in [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)]
        {
            let parsed = regex_syntax::parse(pattern).ok()?;
            let HirKind::Class(HirClass::Unicode(ranges)) = parsed.kind() else { return None };
            for range in ranges.ranges() {
                flat[range.start() as usize..=range.end() as usize].fill(class);
            }
        }
        Some(Self::compress(&flat))
    }

    fn compress(flat: &[Class]) -> Self {
        let (mut index, mut blocks) = (Vec::new(), Vec::new());
        let mut known = HashMap::new();
        for block in flat.chunks(BLOCK) {
            index.push(*known.entry(block).or_insert_with(|| {
                blocks.extend_from_slice(block);
                (blocks.len() / BLOCK - 1) as u16
            }));
        }
        let mut ascii = [Class::Other; BLOCK];
        ascii.copy_from_slice(&flat[..BLOCK]);
        Self { ascii, index, blocks }
    }

    fn of(&self, code_point: u32) -> Class {
        let code_point = code_point as usize;
        self.blocks[usize::from(self.index[code_point / BLOCK]) * BLOCK + code_point % BLOCK]
    }

    /// Class and length in bytes of the character at `position`; none at the end of `text`, which
    /// is UTF-8.
    #[inline]
    pub(super) fn at(&self, text: &[u8], position: usize) -> Option<(Class, usize)> {
        let first = *text.get(position)?;
        if first < 0x80 {
            return Some((self.ascii[usize::from(first)], 1));
        }
        let length = 2 + usize::from(first >= 0xE0) + usize::from(first >= 0xF0);
        let lead = u32::from(first) & (0x7F >> length);
        let rest = text.get(position + 1..position + length)?;
        let code_point = rest.iter().fold(lead, |bits, &byte| bits << 6 | u32::from(byte & 0x3F));
        Some((self.of(code_point), length))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::utils::SysRegex;

    /// Every character, in the engine that the library splits with.
    #[test]
    fn every_character_has_the_class_that_the_librarys_engine_gives_it() {
        let classes = Classes::get().unwrap();
        let text: String = ('\0'..=char::MAX).collect();
        for (pattern, class) in [
            (r"\p{L}", Class::Letter),
            (r"\p{N}", Class::Number),
            (r"\s", Class::Space),
            (r"[^\s\p{L}\p{N}]", Class::Other),
        ] {
            let theirs: Vec<usize> =
                SysRegex::new(pattern).unwrap().find_iter(&text).map(|(start, _)| start).collect();
            let of = |position| classes.at(text.as_bytes(), position);
            let mine: Vec<usize> = text
                .char_indices()
                .filter(|&(start, c)| of(start) == Some((class, c.len_utf8())))
                .map(|(start, _)| start)
                .collect();
            assert!(mine == theirs, "{pattern}");
        }
        assert_eq!(classes.at(text.as_bytes(), text.len()), None);
    }
}

//! Where the parts of a reply stand.

use std::ops::Range;

const BOX_OPENING: &[u8] = b"\\boxed{";

/// Start of the first occurrence of `needle`; an empty needle is found at 0.
pub(super) fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    if needle.is_empty() {
        return Some(0);
    }
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// Raw content of the last `\boxed{...}`, nested braces included.
///
/// Braces are counted byte by byte without regard to backslashes, because ` \` is itself a common
/// token of mathematical text; a prediction whose own braces do not balance cannot be boxed. When
/// the last box is never closed there is no content: an earlier box has been superseded.
pub(super) fn last_box(answer: &[u8]) -> Option<Range<usize>> {
    let opening = answer.windows(BOX_OPENING.len()).rposition(|window| window == BOX_OPENING)?;
    let start = opening + BOX_OPENING.len();
    let length = closing_brace(&answer[start..])?;
    Some(start..start + length)
}

/// Index of the brace that closes a box whose content starts with the first byte.
fn closing_brace(content: &[u8]) -> Option<usize> {
    let mut depth = 0_usize;
    for (index, byte) in content.iter().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' if depth == 0 => return Some(index),
            b'}' => depth -= 1,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(answer: &[u8]) -> Option<&[u8]> {
        last_box(answer).map(|range| &answer[range])
    }

    #[test]
    fn box_content_is_raw_and_may_nest() {
        assert_eq!(content(br"so \boxed{ the}."), Some(&b" the"[..]));
        assert_eq!(content(br"\boxed{ \frac{1}{2} } ok"), Some(&br" \frac{1}{2} "[..]));
        assert_eq!(content(b"\\boxed{\xff\n}"), Some(&b"\xff\n"[..]));
        assert_eq!(content(br"\boxed{\}"), Some(&br"\"[..]));
        assert_eq!(content(br"\boxed{}"), Some(&b""[..]));
    }

    #[test]
    fn the_last_box_counts_even_when_it_is_never_closed() {
        assert_eq!(content(br"\boxed{a} no, \boxed{b}"), Some(&b"b"[..]));
        assert_eq!(content(br"\boxed{a} no, \boxed{b"), None);
        assert_eq!(content(br"\boxed{a\boxed{b}}"), Some(&b"b"[..]));
        assert_eq!(content(br"\boxed a}"), None);
        assert_eq!(content(b""), None);
    }

    #[test]
    fn the_first_occurrence_is_found() {
        assert_eq!(find(b"a--b--", b"--"), Some(1));
        assert_eq!(find(b"a-", b"--"), None);
        assert_eq!(find(b"-", b"--"), None);
        assert_eq!(find(b"a", b""), Some(0));
    }
}

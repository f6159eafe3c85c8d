//! The words of a text as hashes, and runs of them: what texts are compared by.

use crate::random::{finalise, mix};

/// Multiplier of the polynomial that a run of words is hashed by: odd, so that no word is lost in it.
const BASE: u64 = 0x9e6c_63d0_876a_3f6b;
/// What a word's hash starts from, and is multiplied by after every character.
const START: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0000_0100_0000_01b3;

/// Calls `take` with the hash of every word, in order.
///
/// Words are runs of letters and digits, in lower case; where a script puts no spaces between words,
/// every character is one.
fn each_word(text: &str, mut take: impl FnMut(u64)) {
    let mut word = START;
    let mut end = |word: &mut u64| {
        if *word != START {
            take(mix(*word));
            *word = START;
        }
    };
    for character in text.chars() {
        if character.is_ascii_alphanumeric() {
            word = (word ^ u64::from(character.to_ascii_lowercase())).wrapping_mul(PRIME);
        } else if character.is_ascii() || !character.is_alphanumeric() {
            end(&mut word);
        } else if is_written_without_spaces(character) {
            end(&mut word);
            word = (word ^ u64::from(character)).wrapping_mul(PRIME);
            end(&mut word);
        } else {
            let lower = character.to_lowercase();
            word = lower.fold(word, |word, part| (word ^ u64::from(part)).wrapping_mul(PRIME));
        }
    }
    end(&mut word);
}

/// Thai, Lao, Myanmar and Khmer; Chinese, Japanese and what else stands among the ideographs but Hangul,
/// which has spaces.
fn is_written_without_spaces(character: char) -> bool {
    matches!(u32::from(character),
        0x0E00..=0x0EFF | 0x1000..=0x109F | 0x1780..=0x17FF | 0x2E80..=0xA4CF | 0xF900..=0xFAFF
        | 0x20000..=0x3FFFF)
        && !matches!(u32::from(character), 0x3130..=0x318F)
}

/// Calls `take` with the hash of every run of `length` words, in order, and returns how many words there
/// are. A rolling hash: the time does not depend on the length.
pub(super) fn each_run(text: &str, length: usize, mut take: impl FnMut(u64)) -> usize {
    let leaving = (1..length).fold(1_u64, |power, _| power.wrapping_mul(BASE));
    let (mut last, mut hash, mut count) = (vec![0_u64; length.max(1)], 0_u64, 0_usize);
    each_word(text, |word| {
        let oldest = std::mem::replace(&mut last[count % length.max(1)], word);
        hash = hash.wrapping_sub(oldest.wrapping_mul(leaving)).wrapping_mul(BASE).wrapping_add(word);
        count += 1;
        if count >= length {
            take(finalise(hash));
        }
    });
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<u64> {
        let mut words = Vec::new();
        each_word(text, |word| words.push(word));
        words
    }

    fn runs(text: &str, length: usize) -> Vec<u64> {
        let mut runs = Vec::new();
        each_run(text, length, |run| runs.push(run));
        runs
    }

    #[test]
    fn words_are_what_is_left_without_case_and_punctuation() {
        assert_eq!(words("The Cat, (sat) on 12 mats."), words("the cat sat on 12 MATS"));
        assert_eq!(words("the cat").len(), 2);
        assert_ne!(words("the cat"), words("thecat"));
        assert_eq!(words("ÉTÉ à Paris"), words("été À paris"));
        assert_eq!(words("강아지는 개"), words("강아지는, 개!"));
        assert_eq!((words("強化学習とは").len(), words("강아지는 개").len()), (6, 2));
        assert_eq!((words(" ,.!"), words("")), (vec![], vec![]));
    }

    #[test]
    fn a_run_depends_on_its_own_words_and_their_order_alone() {
        let (a, b) = (runs("x a b c d y", 4), runs("k l m n a b c d", 4));
        assert_eq!((a.len(), b.len()), (3, 5));
        assert_eq!(a[1], b[4]);
        assert_ne!(runs("a b c d", 4), runs("a b d c", 4));
        assert!(runs("a b c", 4).is_empty());
        assert_eq!(runs("a b c", 1).len(), 3);
    }
}

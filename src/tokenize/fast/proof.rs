//! Whether documents take the fast path, and the texts that it must prove itself on.

use crate::json::shortened;

/// Who encodes documents.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum FastPath {
    /// The crate's own encoder, which has given the ids of the `tokenizers` library for every
    /// text that it was compared on.
    Active,
    /// The library, since the tokenizer is of a kind that the crate's own encoder does not know.
    Unsupported {
        /// What it does not know.
        reason: String,
    },
    /// The library, since the crate's own encoder gave other ids for some text: a defect.
    Refuted {
        /// The text and the ids, for whoever is to be told.
        message: String,
    },
}

impl FastPath {
    /// Whether the crate's own encoder is used.
    pub fn is_active(&self) -> bool {
        *self == Self::Active
    }
}

/// A text for which the two encoders differ.
#[derive(Debug)]
pub(in crate::tokenize) struct Refutation {
    /// For the user.
    pub(in crate::tokenize) message: String,
}

impl Refutation {
    /// Compares the ids for a text, if there are any.
    ///
    /// # Errors
    /// They differ.
    pub(in crate::tokenize) fn compare(text: &str, fast: &[u32], library: &[u32]) -> Result<(), Self> {
        if fast == library {
            return Ok(());
        }
        let place = fast.iter().zip(library).take_while(|(mine, theirs)| mine == theirs).count();
        let excerpt = shortened(format!("{text:?}"));
        let message = format!(
            "the fast encoder gave other ids than the tokenizers library, so documents are encoded by the \
             library from here on, slowly; please report this text of {} bytes, where id {place} is {:?} and \
             should be {:?}: {excerpt}",
            text.len(),
            fast.get(place),
            library.get(place),
        );
        Err(Self { message })
    }
}

/// Texts at the seams of the patterns, the classes and the normal form.
pub(in crate::tokenize) const NASTY: [&str; 24] = [
    "",
    " ",
    "  ",
    "\n",
    " \n ",
    "a b  c   d\te\t f\n\n g \r\n h\r\r\n  \n   i ",
    "don't DON'T I'll I'LL we're WE'RE they've it's IT'S I'd I'm 'tis 'S'T'RE'VE'M'LL'D 'ſ '\u{17f}x ''s !'s",
    "x's y'll' z're'nt 'l 'r 'v 'e ' s '\n's",
    "0 12 123 1234 12345678901234567890 3.14159 1,000,000 ½ ²³ ٣٤٥ 一二三 Ⅷ 𝟘𝟙𝟚",
    "a1b22c333d4444 7x 77x x7 x77 +7 -77 $1234.50 99%",
    "!!! ... ?! (a) [b] {c} <d> \"e\" 'f' `g` ~h @i #j $k %l ^m &n *o _p =q +r |s \\t /u :v ;w ,x .y",
    "/\n//\n\n///\r\n .\n ,\r\r \n!\n\n\n  !\n  \n",
    "if x == 1:\n    return [y for y in z]\n\n\tfn main() {\n\t\tprintln!(\"{}\", 0x1F);\n\t}\n}",
    "<|endoftext|> <|im_start|>user\nhi<|im_end|> <think>no</think> <s></s> [INST] <|eot_id|> <pad>",
    "naïve café Ångström ÀÉÎÕÜ ß straße ŒUVRE œuvre Żółć İstanbul ıi ǅ ªº",
    "cafe\u{301} A\u{30a} e\u{323}\u{302} e\u{302}\u{323} \u{301}x \u{1100}\u{1161}\u{11a8} 각 \u{2126} \u{212b} \u{340} \u{958} \u{fb1d}",
    "Привет, мир! Ελληνικά: ΐΰ. עברית שָׁלוֹם العربية ٱلسَّلَامُ हिन्दी नमस्ते ภาษาไทย ကမြန်မာ",
    "数学は楽しい。中文，没有空格！한국어 텍스트　全角\u{3000}空白　１２３ＡＢＣ",
    "🙂 👩\u{200d}👩\u{200d}👧\u{200d}👦 🇩🇪 1\u{fe0f}\u{20e3} 𝔘𝔫𝔦 𐍈 𠜎 \u{10ffff} \u{e000} \u{fffd}\u{fffd}",
    "\u{a0}x \u{a0} y\u{2003}z\u{2028}a\u{2029}b\u{85}c\u{1680}d\u{205f}e\u{3000}f\u{b}g\u{c}h \u{2009}\n\u{2009}i\u{2009}",
    "\0\u{1}\u{7}\u{8}\u{1b}[0m\u{1c}\u{1d}\u{1e}\u{1f}\u{7f}\u{80}\u{9f}\u{ad}\u{200b}\u{200c}\u{200d}\u{2060}\u{feff}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft antidisestablishmentarianism",
    "--------------------------------------------------------------------------------================================",
];

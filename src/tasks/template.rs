//! Prompt templates: the words around a context.
//!
//! A prompt is header tokens, the document's own tokens and footer tokens. All positions of a
//! document share the header and a prefix of the document, and most templates put the context
//! last, so prompts of one document share nearly everything.

use super::Fingerprints;
use crate::config::TemplateName;
use crate::tokenize::{ChatTemplate, Message, SpecialTokens, THINK, TokenizeError, Tokenizer};

/// The text around the turn of a user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatFormat {
    /// Before the user's words.
    pub user_start: String,
    /// After the user's words, up to where the model goes on.
    pub user_end_and_assistant_start: String,
    /// Whether the texts are those of the model's own template, which then also says whether a
    /// start token comes first.
    pub from_model: bool,
    /// Whether the reply begins inside a thought that the template has opened.
    pub opens_thought: bool,
}

/// Stands for the user's words while a template is rendered: a character for private use that no
/// template has a reason to contain, on both sides of a word.
const USER_WORDS: &str = "\u{f0000}words of the user\u{f0000}";

/// Chat formats by a token that only they use.
const KNOWN_FORMATS: [(&str, &str, &str); 3] = [
    ("<|im_start|>", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ("<｜User｜>", "<｜User｜>", "<｜Assistant｜><think>\n"),
    (
        "<|start_header_id|>",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
];

impl ChatFormat {
    /// The format of the chat template beside a tokenizer, or else what its control tokens tell
    /// (see [`Self::of`]).
    ///
    /// # Errors
    /// When there is a template that cannot be read or rendered.
    pub fn beside(tokenizer: &Tokenizer) -> Result<Self, TokenizeError> {
        match ChatTemplate::beside(tokenizer)? {
            Some(template) => Self::from_template(&template),
            None => Ok(Self::of(tokenizer)),
        }
    }

    /// The text that a model's own template puts around the only turn of a user.
    ///
    /// # Errors
    /// When the template cannot be rendered, or does not write the user's words exactly once.
    pub fn from_template(template: &ChatTemplate) -> Result<Self, TokenizeError> {
        let text = template.render(&[Message::user(USER_WORDS)], true)?;
        let parts: Vec<&str> = text.split(USER_WORDS).collect();
        let [start, end] = parts[..] else {
            return Err(TokenizeError::Template {
                path: template.path().to_owned(),
                message: format!("writes the words of the user {} times", parts.len() - 1),
            });
        };
        Ok(Self::new(start, end, true))
    }

    fn new(start: &str, end: &str, from_model: bool) -> Self {
        Self {
            user_start: start.to_owned(),
            user_end_and_assistant_start: end.to_owned(),
            from_model,
            opens_thought: end.trim_end().ends_with(THINK),
        }
    }

    /// The format that a tokenizer's control tokens tell (`ChatML`, `DeepSeek` R1, Llama 3), or else
    /// plain words with an opened thought.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        let known = KNOWN_FORMATS.iter().find(|(token, ..)| tokenizer.id_of(token).is_some());
        let (_, start, end) = known.copied().unwrap_or(("", "User: ", "\n\nAssistant: <think>\n"));
        Self::new(start, end, false)
    }
}

/// The token sequences around a context.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PromptTemplate {
    /// Before the document's tokens.
    pub header: Vec<u32>,
    /// After them.
    pub footer: Vec<u32>,
}

impl PromptTemplate {
    /// Encodes a template for the model of a tokenizer's directory: instructions become one user
    /// turn of its chat template, or of [`ChatFormat::of`] where it has none.
    ///
    /// # Errors
    /// When the chat template cannot be used, or the text cannot be encoded.
    pub fn resolve(
        name: TemplateName,
        tokenizer: &Tokenizer,
        special: &SpecialTokens,
    ) -> Result<Self, TokenizeError> {
        // The plain template needs no chat, and so no template that may be broken.
        let chat = match name {
            TemplateName::Plain => ChatFormat::of(tokenizer),
            _ => ChatFormat::beside(tokenizer)?,
        };
        Self::new(name, tokenizer, special, &chat)
    }

    /// Encodes a template. Instruction templates become one user turn of `chat`; the plain
    /// template is the document's start token and an opening think tag.
    ///
    /// # Errors
    /// Fails when the text cannot be encoded.
    pub fn new(
        name: TemplateName,
        tokenizer: &Tokenizer,
        special: &SpecialTokens,
        chat: &ChatFormat,
    ) -> Result<Self, TokenizeError> {
        let Some(words) = words(name) else {
            return Ok(Self {
                header: special.bos.into_iter().collect(),
                footer: tokenizer.encode_control(THINK)?,
            });
        };
        let before = format!("{}{}", chat.user_start, words.before);
        let after = format!("{}{}", words.after, chat.user_end_and_assistant_start);
        let mut header = tokenizer.encode_control(&before)?;
        if let Some(bos) = special.bos.filter(|bos| !chat.from_model && header.first() != Some(bos)) {
            header.insert(0, bos);
        }
        Ok(Self { header, footer: tokenizer.encode_control(&after)? })
    }

    /// The prompt for a context: header, context, footer.
    pub fn prompt(&self, context: &[u32]) -> Vec<u32> {
        [&self.header, context, &self.footer].concat()
    }

    /// BLAKE3 of header and footer, in hexadecimal.
    pub fn fingerprint(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for part in [&self.header, &self.footer] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            for token in part {
                hasher.update(&token.to_le_bytes());
            }
        }
        hasher.finalize().to_hex().to_string()
    }
}

impl Fingerprints {
    /// Fingerprints of what tasks are built with.
    pub fn of(tokenizer: &Tokenizer, template: &PromptTemplate) -> Self {
        Self { tokenizer: tokenizer.fingerprint().to_owned(), template: template.fingerprint() }
    }
}

/// The words of an instruction template around the context.
struct Words {
    before: String,
    after: String,
}

/// The task, and how to think about it step by step.
const STEPS: &str = "Complete the text under \"### Context\" by predicting the token that comes next. Reason step by \
    step about what the text says and how it may go on, and settle on the most likely next token.";
/// The same, for a choice among candidates.
const CANDIDATES: &str = "Complete the text under \"### Context\" by predicting the token that comes next. First list \
    several tokens that could come next, weigh them against each other, and then choose the most probable one.";
const CANDIDATES_IN_FENCE: &str = "Complete the text that is wrapped in ``` and ``` by predicting the token that comes \
    next. First list several tokens that could come next, weigh them against each other, and then choose the most \
    probable one.";
const ROLE: &str = "You are a helpful assistant who is good at predicting how a text goes on.\n\n";
const ANSWER: &str = " Give your answer in \\boxed{}.";
const FINAL_ANSWER: &str = " Give your final prediction in \\boxed{}.";
/// Spaces belong to tokens, and models tend to drop them or to wrap the answer in markup.
const SPACES: &str = " The token may begin with a space, which then belongs inside the box, for example \
    \\boxed{ para} or \\boxed{ =}. Do not use \\text{} inside the box.";
const SPACES_IN_CODE: &str = " The token may begin with a space, which then belongs inside the box, for example \
    \\boxed{ para} or \\boxed{ +=}. Do not use \\text{} inside the box.";
const EXAMPLES: &str = "\n\nThree examples:\n\n\
    ### Context\n```\nThe proof has two parts. We begin with the first one;\n```\nAnswer: \\boxed{ this}\n\n\
    ### Context\n```\nThe square of 7 is 4\n```\nAnswer: \\boxed{9}\n\n\
    ### Context\n```\nThe ingredients are\n```\nAnswer: \\boxed{:\n}\n\nNow the context is";
const CONTEXT: &str = "\n\n### Context\n";
const FENCE: &str = "```\n";
const FENCE_END: &str = "\n```";
const CLOSING_REQUEST: &str = "\n```\nNow please predict the next token.";

/// After Table 10 of the RPT paper (arXiv 2506.08007), in our own words; `None` for plain.
fn words(name: TemplateName) -> Option<Words> {
    let (before, after): (&[&str], &str) = match name {
        TemplateName::V0 => (&[STEPS, ANSWER, SPACES, CONTEXT], ""),
        TemplateName::V1 => (&[STEPS, FINAL_ANSWER, SPACES, CONTEXT, FENCE], FENCE_END),
        TemplateName::V2 => (&[ROLE, STEPS, FINAL_ANSWER, SPACES_IN_CODE, CONTEXT, FENCE], FENCE_END),
        TemplateName::V3 => (&[CANDIDATES, ANSWER, SPACES, CONTEXT, FENCE], FENCE_END),
        TemplateName::V4 => (&[STEPS, ANSWER, EXAMPLES, CONTEXT, FENCE], FENCE_END),
        TemplateName::V5 => (&[STEPS, ANSWER, SPACES, CONTEXT, FENCE], FENCE_END),
        TemplateName::V6 => {
            (&[CANDIDATES_IN_FENCE, ANSWER, SPACES, "\n\nThe context is:\n", FENCE], CLOSING_REQUEST)
        }
        TemplateName::Plain => return None,
    };
    Some(Words { before: before.concat(), after: after.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const INSTRUCTIONS: [TemplateName; 7] = [
        TemplateName::V0,
        TemplateName::V1,
        TemplateName::V2,
        TemplateName::V3,
        TemplateName::V4,
        TemplateName::V5,
        TemplateName::V6,
    ];

    #[test]
    fn the_context_comes_last_except_in_v6() {
        for name in &INSTRUCTIONS[..6] {
            let after = words(*name).unwrap().after;
            assert!(after.is_empty() || after == FENCE_END, "{name:?}");
        }
        assert!(words(TemplateName::V6).unwrap().after.contains("predict the next token"));
        assert!(words(TemplateName::Plain).is_none());
    }

    #[test]
    fn fences_are_balanced_and_the_context_starts_a_line() {
        for name in INSTRUCTIONS {
            let Words { before, after } = words(name).unwrap();
            assert!(before.ends_with('\n'), "{name:?}");
            assert_eq!(before.ends_with(FENCE), after.starts_with(FENCE_END), "{name:?}");
            assert!(before.contains("\\boxed{"), "{name:?}");
            assert_eq!((before + &after).matches("```").count() % 2, 0, "{name:?}");
        }
    }

    #[test]
    fn templates_differ() {
        let texts: std::collections::BTreeSet<String> = INSTRUCTIONS
            .iter()
            .map(|&name| words(name).unwrap())
            .map(|words| words.before + &words.after)
            .collect();
        assert_eq!(texts.len(), INSTRUCTIONS.len());
    }

    #[test]
    fn fingerprints_see_where_the_context_goes() {
        let template =
            |header: &[u32], footer: &[u32]| PromptTemplate { header: header.into(), footer: footer.into() };
        assert_ne!(template(&[1, 2], &[3]).fingerprint(), template(&[1], &[2, 3]).fingerprint());
        assert_eq!(template(&[1], &[3]).prompt(&[7, 8]), [1, 7, 8, 3]);
    }
}

//! The text that really follows a position.

use super::Task;
use crate::tokenize::Tokenizer;

/// Tokens of truth that a prediction can be compared with.
pub const TRUTH_TOKENS: usize = 64;

/// The bytes from the predicted token on, with the token boundaries among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Truth {
    /// Bytes of the token to predict and of those after it, at most [`TRUTH_TOKENS`] tokens.
    pub bytes: Vec<u8>,
    /// Number of bytes up to the end of the 1st, 2nd, ... token: `L_gt` of the RPT paper's
    /// equation 3. Ascending; tokens without bytes add none.
    pub boundaries: Vec<u32>,
    /// `bytes` run to the end of the document, so that no text follows them.
    pub ends_document: bool,
}

impl Truth {
    /// The truth of a task.
    pub fn of(task: &Task, tokenizer: &Tokenizer) -> Self {
        let tokens = &task.document.tokens;
        let start = (task.position().index as usize).min(tokens.len());
        let end = tokens.len().min(start + TRUTH_TOKENS);
        let (mut bytes, mut boundaries) = (Vec::new(), Vec::new());
        for &token in &tokens[start..end] {
            let before = bytes.len();
            bytes.extend_from_slice(tokenizer.token_bytes(token));
            if bytes.len() > before {
                boundaries.push(bytes.len() as u32);
            }
        }
        Self { bytes, boundaries, ends_document: task.document.ends_document && end == tokens.len() }
    }
}

//! What a decoder says of one sequence, wherever it computes.

use super::{Decoder, Forest, ModelError, TokenScore, Workspace, on_device};

/// Rows whose scores are computed at a time on the CPU: bounds the memory for logits.
const ROWS_AT_ONCE: usize = 256;

impl Decoder {
    /// For every token of a sequence the log-probability of the token behind it, and the entropy of the distribution that
    /// it is one of. Behind the last token there is none: token 0 stands in for it.
    ///
    /// # Errors
    /// When the sequence is longer than the model's positions, a token is outside its vocabulary, or a device fails.
    pub fn score_sequence(&self, ids: &[u32]) -> Result<Vec<TokenScore>, ModelError> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut forest = Forest::default();
        forest.add(None, ids);
        let rows: Vec<usize> = (0..ids.len()).collect();
        let tokens: Vec<u32> = ids.iter().skip(1).copied().chain([0]).collect();
        match self.on_device()? {
            None => self.score_rows(&forest, &rows, &tokens),
            Some(device) => on_device!(&**device, there => {
                let batch = there.batch(&forest)?;
                let x = there.forward(&batch, None)?;
                let targets = super::Targets { rows: &rows, tokens: &tokens, inverse_temperature: 1.0 };
                Ok(there.score(&batch, &x, &targets)?)
            }),
        }
    }

    fn score_rows(
        &self,
        forest: &Forest,
        rows: &[usize],
        tokens: &[u32],
    ) -> Result<Vec<TokenScore>, ModelError> {
        let (mut cache, mut workspace) = (self.new_cache(), Workspace::default());
        let extensions = forest.enter(&mut cache);
        self.forward(forest.ids(), &extensions, &mut cache, &mut workspace, None)?;
        let mut scores = Vec::with_capacity(rows.len());
        for (rows, tokens) in rows.chunks(ROWS_AT_ONCE).zip(tokens.chunks(ROWS_AT_ONCE)) {
            let states = self.hidden(&workspace, rows);
            scores.extend(self.score(&states, tokens, 1.0, &mut workspace));
        }
        Ok(scores)
    }
}

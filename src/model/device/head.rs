//! Final norm and head: logits, scores of targets, and their gradients, some rows at a time.

use super::{Batch, DeviceDecoder, Format};
use crate::cuda::embedding::{self, Runs};
use crate::cuda::head;
use crate::cuda::norm::{self, Rows};
use crate::cuda::{Buffer, IndexSlice, Indices, Matrix, MatrixMut, Result, Slice, SliceMut};
use crate::model::{Targets, TokenScore};

/// Logits that exist at a time.
const LOGITS_AT_ONCE: usize = 1 << 27;

/// Some targets on the device: rows of the residual stream with the tokens behind them.
struct Chunk {
    places: Indices,
    tokens: Indices,
    inverse_temperature: f32,
    /// The row of each target, for the row's gradient.
    rows: Vec<u32>,
}

impl Chunk {
    fn targets(&self) -> head::Targets<'_> {
        head::Targets { tokens: self.tokens.view(), inverse_temperature: self.inverse_temperature }
    }
}

impl<T: Format> DeviceDecoder<T> {
    /// Rows of logits that the head computes at a time.
    pub fn rows_of_logits(&self) -> usize {
        (LOGITS_AT_ONCE / self.config.vocab_size.max(1)).max(1)
    }

    /// Logits `[places, vocabulary]` of some rows of the residual stream `[rows, hidden]`; the caller bounds their number.
    ///
    /// # Errors
    /// When the device has no room or has failed.
    pub fn logits(&self, x: &Buffer<f32>, places: IndexSlice) -> Result<Buffer<f32>> {
        let (states, _) = self.states(x, places)?;
        self.logits_of(&states)
    }

    /// As [`DeviceDecoder::logits`], with normalised states `[places, hidden]` and logits in buffers that there are. May be
    /// recorded.
    ///
    /// # Errors
    /// When lengths do not fit, or the device has failed.
    pub fn logits_into(
        &self,
        x: Rows,
        rows: usize,
        states: &mut Buffer<T>,
        logits: &mut Buffer<f32>,
    ) -> Result<()> {
        let (hidden, vocabulary) = (self.config.hidden_size, self.config.vocab_size);
        let weight = self.norm_of(&self.layout.final_norm)?;
        norm::forward(&self.device, weight, x, states.slice_mut(..rows * hidden)?, None)?;
        let states = Matrix::new(states.slice(..rows * hidden)?, rows, hidden)?;
        let logits = MatrixMut::new(logits.slice_mut(..rows * vocabulary)?, rows, vocabulary)?;
        self.gemm.forward(states, self.matrix(&self.layout.head)?, logits, false)
    }

    /// Normalised states of some rows, and the factors of their norm.
    fn states(&self, x: &Buffer<f32>, places: IndexSlice) -> Result<(Buffer<T>, Buffer<f32>)> {
        let mut states = self.device.allocate("hidden states", places.len() * self.config.hidden_size)?;
        let mut scales = self.device.allocate("hidden states", places.len())?;
        let rows = Rows { values: x.into(), places: Some(places) };
        self.norm(&self.layout.final_norm, rows, &mut states, Some(&mut scales))?;
        Ok((states, scales))
    }

    fn logits_of(&self, states: &Buffer<T>) -> Result<Buffer<f32>> {
        let (hidden, vocabulary) = (self.config.hidden_size, self.config.vocab_size);
        let rows = states.len() / hidden;
        let mut logits = self.device.allocate("logits", rows * vocabulary)?;
        let out = MatrixMut::new(&mut logits, rows, vocabulary)?;
        self.gemm.forward(Matrix::new(states, rows, hidden)?, self.matrix(&self.layout.head)?, out, false)?;
        Ok(logits)
    }

    /// Scores of targets, in their order.
    ///
    /// # Errors
    /// When the device has no room or has failed.
    pub fn score(&self, batch: &Batch, x: &Buffer<f32>, targets: &Targets) -> Result<Vec<TokenScore>> {
        let mut all = Vec::with_capacity(targets.rows.len());
        for chunk in self.chunks(batch, targets) {
            let chunk = chunk?;
            let logits = self.logits(x, chunk.places.view())?;
            let scores =
                head::score(&self.device, Slice::from(&logits), self.config.vocab_size, chunk.targets())?;
            all.extend(downloaded(&scores)?);
        }
        Ok(all)
    }

    /// Scores `targets` and asks `derivative` (in their order) for the derivative of the loss with respect to the
    /// log-probability of each at the targets' temperature. Adds to the gradient `grad_x [rows, hidden]` of the residual
    /// stream `x`, and to those of the head and the final norm in `gradients`, which is laid out as the layout says.
    ///
    /// # Errors
    /// When the device has no room or has failed.
    pub fn head_backward(
        &self,
        batch: &Batch,
        x: &Buffer<f32>,
        targets: &Targets,
        mut derivative: impl FnMut(usize, &TokenScore) -> f32,
        grad_x: &mut Buffer<f32>,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        let mut done = 0;
        for chunk in self.chunks(batch, targets) {
            let chunk = chunk?;
            let (states, scales) = self.states(x, chunk.places.view())?;
            let logits = self.logits_of(&states)?;
            let vocabulary = self.config.vocab_size;
            let scores = head::score(&self.device, Slice::from(&logits), vocabulary, chunk.targets())?;
            let derivatives: Vec<f32> = downloaded(&scores)?
                .iter()
                .enumerate()
                .map(|(at, score)| derivative(done + at, score))
                .collect();
            done += derivatives.len();
            let derivatives = self.device.upload("derivatives", &derivatives)?;
            let mut grad_logits = self.device.allocate::<T>("gradients of logits", logits.len())?;
            head::gradient(
                &self.device,
                Slice::from(&logits),
                vocabulary,
                chunk.targets(),
                Slice::from(&derivatives),
                Slice::from(&scores.log_sums),
                SliceMut::from(&mut grad_logits),
            )?;
            drop(logits);
            self.chunk_backward(&chunk, x, &states, &scales, &grad_logits, grad_x, gradients)?;
        }
        Ok(())
    }

    /// From the gradient of a chunk's logits to those of the head, the final norm and the residual stream.
    fn chunk_backward(
        &self,
        chunk: &Chunk,
        x: &Buffer<f32>,
        states: &Buffer<T>,
        scales: &Buffer<f32>,
        grad_logits: &Buffer<T>,
        grad_x: &mut Buffer<f32>,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        let (hidden, vocabulary) = (self.config.hidden_size, self.config.vocab_size);
        let (rows, runs) = (scales.len(), Runs::new(&self.device, &chunk.rows)?);
        let grad_out = || Matrix::new(grad_logits, rows, vocabulary);
        let grad_head = MatrixMut::new(gradients.slice_mut(self.layout.head.clone())?, vocabulary, hidden)?;
        self.gemm.weight_gradient(grad_out()?, Matrix::new(states, rows, hidden)?, grad_head, true)?;
        let mut grad_states = self.device.allocate::<f32>("gradients of states", states.len())?;
        let grad_in = MatrixMut::new(&mut grad_states, rows, hidden)?;
        self.gemm.input_gradient(grad_out()?, self.matrix(&self.layout.head)?, grad_in, false)?;
        let mut grad_rows = self.device.zeroed::<f32>("gradients of states", states.len())?;
        norm::backward(
            &self.device,
            self.norm_of(&self.layout.final_norm)?,
            Rows { values: x.into(), places: Some(chunk.places.view()) },
            Slice::from(scales),
            Slice::from(&grad_states),
            SliceMut::from(&mut grad_rows),
            None,
            gradients.slice_mut(self.layout.final_norm.clone())?,
        )?;
        embedding::add_rows(&self.device, Slice::from(&grad_rows), &runs, grad_x.into(), hidden)
    }

    /// Targets on the device, as many at a time as logits of them may exist.
    fn chunks<'a>(
        &'a self,
        batch: &'a Batch,
        targets: &'a Targets,
    ) -> impl Iterator<Item = Result<Chunk>> + 'a {
        let rows_at_once = self.rows_of_logits();
        let chunks = targets.rows.chunks(rows_at_once).zip(targets.tokens.chunks(rows_at_once));
        chunks.map(move |(rows, tokens)| {
            let places = batch.places(rows);
            Ok(Chunk {
                places: Indices::upload(&self.device, "targets", &places)?,
                tokens: Indices::upload(&self.device, "targets", tokens)?,
                inverse_temperature: targets.inverse_temperature,
                rows: places,
            })
        })
    }
}

fn downloaded(scores: &head::Scores) -> Result<Vec<TokenScore>> {
    let logprobs = scores.logprobs.download()?;
    let (policy, entropies) = (scores.policy_logprobs.download()?, scores.entropies.download()?);
    let both = logprobs.into_iter().zip(policy).zip(entropies);
    Ok(both
        .map(|((logprob, policy_logprob), entropy)| TokenScore { logprob, policy_logprob, entropy })
        .collect())
}

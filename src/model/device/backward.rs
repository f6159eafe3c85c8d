//! The backward pass through the layers, over the tape that the forward pass kept.

use super::forward::{Inside, LayerTape, WithinForest};
use super::{Batch, DeviceDecoder, DevicePrefix, DeviceTape, Format};
use crate::cuda::attention::{ForestGradients, ForestInputs, ForestSaved};
use crate::cuda::embedding::{self, Runs};
use crate::cuda::gemm::Sum;
use crate::cuda::norm;
use crate::cuda::{Buffer, Matrix, MatrixMut, Result, Slice, SliceMut};
use crate::cuda::{reduce, swiglu};
use std::ops::Range;

impl<T: Format> DeviceDecoder<T> {
    /// Turns the gradient `grad_x [rows, hidden]` of the residual stream after the last layer into gradients of all layers
    /// and of the embedding, added to `gradients`, which is laid out as the layout says. `tape` is the forward pass's.
    ///
    /// # Errors
    /// When the device has no room or has failed; then part of the gradients has been added.
    pub fn backward(
        &self,
        batch: &Batch,
        tape: DeviceTape<T>,
        grad_x: Buffer<f32>,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        self.backward_in_schedule(batch, None, tape, grad_x, gradients)
    }

    /// The same for a part of a schedule, which adds to the gradients of the prefix, or at last for the prefix, which takes
    /// them.
    ///
    /// # Errors
    /// As [`DeviceDecoder::backward`].
    pub fn backward_in_schedule(
        &self,
        batch: &Batch,
        mut prefix: Option<&mut DevicePrefix<T>>,
        mut tape: DeviceTape<T>,
        mut grad_x: Buffer<f32>,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        // While the device is still busy with the head.
        let runs = Runs::new(&self.device, &batch.tokens)?;
        let mut again = None;
        while let Some(LayerTape { input, inside }) = tape.layers.pop() {
            let layer = tape.layers.len();
            let inside = match inside {
                Some(inside) => inside,
                None => self.again(layer, batch, prefix.as_deref_mut(), &input, &mut again)?,
            };
            let prefix = prefix.as_deref_mut();
            self.layer_backward(layer, batch, prefix, &input, inside, &mut grad_x, gradients)?;
        }
        let table = gradients.slice_mut(self.layout.embedding.clone())?;
        embedding::add_rows(&self.device, Slice::from(&grad_x), &runs, table, self.config.hidden_size)
    }

    /// Computes a layer once more, from its input. `buffers` serve all layers.
    fn again(
        &self,
        layer: usize,
        batch: &Batch,
        prefix: Option<&mut DevicePrefix<T>>,
        input: &Buffer<f32>,
        buffers: &mut Option<super::Work<T>>,
    ) -> Result<Inside<T>> {
        let mut work = match buffers.take() {
            Some(work) => work,
            None => self.work(batch.rows())?,
        };
        let rotary = self.rotary(layer, &batch.angles, batch.positions.view())?;
        // The prefix's keys and values are kept already.
        let prefix = prefix.filter(|_| batch.seen.is_some());
        let mut attend = WithinForest::new(self, batch, prefix)?;
        let inside = self.layer_on_tape(layer, &rotary, &mut self.copy_of(input)?, &mut work, &mut attend)?;
        *buffers = Some(work);
        Ok(inside)
    }

    fn layer_backward(
        &self,
        layer: usize,
        batch: &Batch,
        prefix: Option<&mut DevicePrefix<T>>,
        input: &Buffer<f32>,
        mut inside: Inside<T>,
        grad_x: &mut Buffer<f32>,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        self.feed_forward_backward(layer, &mut inside, grad_x, gradients)?;
        let at = &self.layout.layers[layer];
        let grad_out = self.narrowed(grad_x)?;
        self.weight_gradient(&grad_out, &inside.attended, &at.output, gradients)?;
        if !at.output_bias.is_empty() {
            let target = gradients.slice_mut(at.output_bias.clone())?;
            reduce::add_column_sums(&self.device, Slice::from(&*grad_x), self.config.hidden_size, target)?;
        }
        let grad_attended: Buffer<T> = self.input_gradient(&grad_out, &at.output)?;
        drop(grad_out);
        let grad_qkv = self.attention_backward(layer, batch, prefix, &inside, &grad_attended)?;
        let grad_qkv = self.unturned(layer, batch, &inside, &grad_qkv, gradients)?;
        let normed = self.normed(input, &at.input_norm)?;
        self.weight_gradient(&grad_qkv, &normed, &at.qkv, gradients)?;
        let grad_normed: Buffer<f32> = self.input_gradient(&grad_qkv, &at.qkv)?;
        self.norm_backward(&at.input_norm, input, &inside.input_scales, &grad_normed, grad_x, gradients)
    }

    fn feed_forward_backward(
        &self,
        layer: usize,
        inside: &mut Inside<T>,
        grad_x: &mut Buffer<f32>,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        let (at, inner) = (&self.layout.layers[layer], self.config.intermediate_size);
        let grad_out = self.narrowed(grad_x)?;
        let grad_activated: Buffer<T> = self.input_gradient(&grad_out, &at.down)?;
        let mut activated = self.device.allocate::<T>("activations", grad_activated.len())?;
        swiglu::backward(
            &self.device,
            Slice::from(&grad_activated),
            SliceMut::from(&mut inside.gate_up),
            Some(SliceMut::from(&mut activated)),
            inner,
        )?;
        self.weight_gradient(&grad_out, &activated, &at.down, gradients)?;
        drop((grad_out, grad_activated, activated));
        let normed = self.normed(&inside.middle, &at.post_norm)?;
        self.weight_gradient(&inside.gate_up, &normed, &at.gate_up, gradients)?;
        let grad_normed: Buffer<f32> = self.input_gradient(&inside.gate_up, &at.gate_up)?;
        let scales = &inside.middle_scales;
        self.norm_backward(&at.post_norm, &inside.middle, scales, &grad_normed, grad_x, gradients)
    }

    /// Gradients of rotated queries and keys and of values.
    fn attention_backward(
        &self,
        layer: usize,
        batch: &Batch,
        mut prefix: Option<&mut DevicePrefix<T>>,
        inside: &Inside<T>,
        grad_attended: &Buffer<T>,
    ) -> Result<Buffer<f32>> {
        let (geometry, tables) = (self.config.geometry(), &batch.tables);
        let allocate = |count: usize| self.device.allocate::<f32>("gradients of attention", count);
        let mut grad_qkv = allocate(inside.qkv.len())?;
        let mut deltas = allocate(tables.statistics(geometry))?;
        let mut partial_sums = allocate(tables.partial_sums(geometry))?;
        let (mut seen, mut sums, mut carried) = (None, None, None);
        match (&batch.seen, prefix.as_deref_mut()) {
            (_, None) => {}
            (Some(rows), Some(prefix)) => {
                seen = Some(prefix.seen(self, layer, rows)?);
                sums = Some(prefix.sums(self, layer, rows)?);
            }
            (None, Some(prefix)) => carried = prefix.carried(layer),
        }
        let seen = seen.as_ref().map(|seen| seen.as_prefix(self)).transpose()?.flatten();
        let inputs = ForestInputs { qkv: Slice::from(&inside.qkv), prefix: seen };
        let saved = ForestSaved {
            out: Slice::from(&inside.attended),
            grad_out: grad_attended.into(),
            log_sums: Slice::from(&inside.log_sums),
        };
        let mut targets = ForestGradients {
            qkv: SliceMut::from(&mut grad_qkv),
            prefix: sums.as_mut().map(SliceMut::from),
            carried,
            deltas: SliceMut::from(&mut deltas),
            partial_sums: SliceMut::from(&mut partial_sums),
        };
        self.attention.forest_backward(tables, &inputs, &saved, &mut targets)?;
        if let (Some(rows), Some(prefix), Some(sums)) = (&batch.seen, prefix, sums) {
            prefix.set_sums(self, layer, rows, &sums)?;
        }
        Ok(grad_qkv)
    }

    /// The gradient of the projections from that of what attention read; adds those of q/k norms and biases.
    fn unturned(
        &self,
        layer: usize,
        batch: &Batch,
        inside: &Inside<T>,
        grad_qkv: &Buffer<f32>,
        gradients: &mut Buffer<f32>,
    ) -> Result<Buffer<T>> {
        let at = &self.layout.layers[layer];
        let rotary = self.rotary(layer, &batch.angles, batch.positions.view())?;
        let mut grad = self.device.allocate::<T>("gradients of projections", grad_qkv.len())?;
        let norms = if at.q_norm.is_empty() {
            None
        } else {
            Some(gradients.slice_mut(at.q_norm.start..at.k_norm.end)?)
        };
        let before = inside.before.as_ref().map(Slice::from);
        rotary.backward(&self.device, Slice::from(grad_qkv), before, SliceMut::from(&mut grad), norms)?;
        if !at.qkv_bias.is_empty() {
            let target = gradients.slice_mut(at.qkv_bias.clone())?;
            reduce::add_column_sums(&self.device, Slice::from(&grad), self.config.qkv_width(), target)?;
        }
        Ok(grad)
    }

    /// The gradient of the residual stream as matrix products take it.
    fn narrowed(&self, grad_x: &Buffer<f32>) -> Result<Buffer<T>> {
        let mut narrowed = self.device.allocate("gradients", grad_x.len())?;
        reduce::convert(&self.device, Slice::from(grad_x), SliceMut::from(&mut narrowed))?;
        Ok(narrowed)
    }

    fn normed(&self, x: &Buffer<f32>, weight: &Range<usize>) -> Result<Buffer<T>> {
        let mut normed = self.device.allocate("activations", x.len())?;
        self.norm(weight, x, &mut normed, None)?;
        Ok(normed)
    }

    /// Adds `grad_out^T [outputs, rows] x input [rows, inputs]` to the gradient of a matrix.
    fn weight_gradient(
        &self,
        grad_out: &Buffer<T>,
        input: &Buffer<T>,
        weight: &Range<usize>,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        let inputs = self.inputs(weight);
        let (rows, outputs) = (input.len() / inputs, weight.len() / inputs);
        let target = MatrixMut::new(gradients.slice_mut(weight.clone())?, outputs, inputs)?;
        let (grad_out, input) = (Matrix::new(grad_out, rows, outputs)?, Matrix::new(input, rows, inputs)?);
        self.gemm.weight_gradient(grad_out, input, target, true)
    }

    /// `grad_out [rows, outputs] x w [outputs, inputs]`.
    fn input_gradient<U: Sum<T>>(&self, grad_out: &Buffer<T>, weight: &Range<usize>) -> Result<Buffer<U>> {
        let inputs = self.inputs(weight);
        let outputs = weight.len() / inputs;
        let rows = grad_out.len() / outputs;
        let mut grad_in = self.device.allocate("gradients", rows * inputs)?;
        let target = MatrixMut::new(&mut grad_in, rows, inputs)?;
        self.gemm.input_gradient(
            Matrix::new(grad_out, rows, outputs)?,
            self.matrix(weight)?,
            target,
            false,
        )?;
        Ok(grad_in)
    }

    fn norm_backward(
        &self,
        weight: &Range<usize>,
        x: &Buffer<f32>,
        scales: &Buffer<f32>,
        grad_normed: &Buffer<f32>,
        grad_x: &mut Buffer<f32>,
        gradients: &mut Buffer<f32>,
    ) -> Result<()> {
        let (norm, grad_weight) = (self.norm_of(weight)?, gradients.slice_mut(weight.clone())?);
        let (scales, grad_normed) = (Slice::from(scales), Slice::from(grad_normed));
        norm::backward(&self.device, norm, x.into(), scales, grad_normed, grad_x.into(), None, grad_weight)
    }
}

//! The explicit backward pass: layer by layer over the tape that the forward pass kept.

use super::decoder::{LayerTape, sized};
use super::layout::{LayerLayout, Matrix, Vector};
use super::weights::LayerWeights;
use super::{Carried, Decoder, KvCache, Tape, Workspace};
use crate::kernels::attention::{self, Gradients, Saved, Tile};
use crate::kernels::elementary::{add, add_rows};
use crate::kernels::head::{self, TokenGradient, TokenScore};
use crate::kernels::matmul::{Left, matmul, matmul_transposed};
use crate::kernels::packed::Packed;
use crate::kernels::parallel::for_each_row;
use crate::kernels::{norm, swiglu};
use rayon::prelude::*;
use std::mem::take;
use std::ops::Range;

/// Buffers of the backward pass, kept between calls.
#[derive(Debug, Default)]
pub(super) struct BackwardBuffers {
    /// Gradient of the residual stream, `[rows, hidden]`.
    x: Vec<f32>,
    /// The layer that is computed again, where the tape holds only its input.
    again: LayerTape,
    head: HeadBuffers,
    layer: LayerBuffers,
    sink: SinkBuffers,
}

/// Final norm and head, a row for each target.
#[derive(Debug, Default)]
struct HeadBuffers {
    inputs: Vec<f32>,
    scales: Vec<f32>,
    states: Vec<f32>,
    grad_states: Vec<f32>,
    grad_inputs: Vec<f32>,
    chunk: head::ChunkBuffers,
}

#[derive(Debug, Default)]
struct LayerBuffers {
    normed: Vec<f32>,
    activated: Vec<f32>,
    inner: Vec<f32>,
    attended: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    qkv: Vec<f32>,
}

#[derive(Debug, Default)]
struct SinkBuffers {
    /// Takes the gradients of vectors that are not trained.
    unused: Vec<f32>,
    packed: Packed,
}

/// What is to be predicted from the hidden states of some rows.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    /// Rows of the forward pass.
    pub rows: &'a [usize],
    /// The token behind each.
    pub tokens: &'a [u32],
    /// Inverse temperature of the policy.
    pub inverse_temperature: f32,
}

impl Decoder {
    /// Scores `targets`, asks `gradient` (in their order) for the derivative of the loss with respect
    /// to each score, and adds the gradients of all parameters to `gradients`, which is laid out as
    /// [`Decoder::trainable`].
    ///
    /// `tape`, `cache` and `workspace` are those of the forward pass; the latter's contents are lost.
    pub fn backward(
        &self,
        tape: &Tape,
        cache: &mut KvCache,
        targets: &Targets,
        gradient: impl FnMut(usize, &TokenScore) -> TokenGradient,
        gradients: &mut [f32],
        workspace: &mut Workspace,
    ) {
        self.backward_in_schedule(tape, cache, targets, gradient, Carried::Nothing, gradients, workspace);
    }

    /// The same for the prefix or a part of a schedule (see [`Schedule`](super::Schedule)).
    ///
    /// Rows of the pass are those of its forward pass, and so are those of keys and values in the prefix's pass; those of a
    /// part stand behind them (see [`Forest::enter_behind`](super::Forest::enter_behind)).
    pub fn backward_in_schedule(
        &self,
        tape: &Tape,
        cache: &mut KvCache,
        targets: &Targets,
        gradient: impl FnMut(usize, &TokenScore) -> TokenGradient,
        mut carried: Carried,
        gradients: &mut [f32],
        workspace: &mut Workspace,
    ) {
        let mut buffers = take(&mut workspace.backward);
        let BackwardBuffers { x: grad_x, again, head, layer: layer_buffers, sink } = &mut buffers;
        sink.packed.set_passing(self.products());
        let mut sink = Sink { decoder: self, gradients, buffers: sink };
        grad_x.clear();
        grad_x.resize(tape.residual.len(), 0.0);
        self.head_backward(tape, targets, gradient, grad_x, &mut sink, head);
        // The cache holds the keys and values of layers that are computed again.
        workspace.places.clear();
        workspace.positions.clone_from(&tape.positions);
        for layer in (0..self.config().layers).rev() {
            let saved = if tape.recompute {
                workspace.x.clone_from(&tape.layers[layer].input);
                self.layer(layer, &tape.tiles, cache, workspace, Some(again));
                &*again
            } else {
                &tape.layers[layer]
            };
            self.layer_backward(layer, tape, saved, cache, &mut carried, grad_x, &mut sink, layer_buffers);
        }
        let hidden = self.config().hidden_size;
        if let Some(embedding) = sink.entries(&self.layout().embedding) {
            for (id, grad) in tape.ids.iter().zip(grad_x.chunks_exact(hidden)) {
                add(&mut embedding[*id as usize * hidden..][..hidden], grad);
            }
        }
        workspace.backward = buffers;
        let pairs: usize = tape.tiles.iter().map(Tile::pairs).sum();
        // Twice the forward pass for the gradients of inputs and weights; the head's forward pass
        // is part of this one.
        let passes = if tape.recompute { 3 } else { 2 };
        let head = 3 * self.config().head_flops(targets.rows.len());
        workspace.flops += passes * self.config().layer_flops(tape.ids.len(), pairs) + head;
    }

    fn head_backward(
        &self,
        tape: &Tape,
        targets: &Targets,
        gradient: impl FnMut(usize, &TokenScore) -> TokenGradient,
        grad_x: &mut [f32],
        sink: &mut Sink,
        buffers: &mut HeadBuffers,
    ) {
        let (hidden, rows) = (self.config().hidden_size, targets.rows);
        let HeadBuffers { inputs, scales, states, grad_states, grad_inputs, chunk } = buffers;
        let inputs = sized(inputs, rows.len() * hidden);
        for_each_row(inputs, hidden, |at, row| {
            row.copy_from_slice(&tape.residual[rows[at] * hidden..][..hidden]);
        });
        let (scales, states) = (sized(scales, rows.len()), sized(states, inputs.len()));
        let weight = &self.weights.final_norm;
        norm::forward_rows(inputs, weight, self.config().norm_epsilon, states, scales);
        let (grad_states, grad_inputs) = (sized(grad_states, inputs.len()), sized(grad_inputs, inputs.len()));
        grad_states.fill(0.0);
        grad_inputs.fill(0.0);
        let scored = head::Scored {
            hidden: states,
            targets: targets.tokens,
            inverse_temperature: targets.inverse_temperature,
        };
        let grad_weight = sink.entries(&self.layout().head);
        head::score_and_backward(&self.weights.head, &scored, gradient, grad_states, grad_weight, chunk);
        let grad_norm = sink.vector(&self.layout().final_norm);
        norm::backward_rows(inputs, weight, scales, grad_states, grad_inputs, grad_norm);
        for (row, grad) in rows.iter().zip(grad_inputs.chunks_exact(hidden)) {
            add(&mut grad_x[row * hidden..][..hidden], grad);
        }
    }

    fn layer_backward(
        &self,
        layer: usize,
        tape: &Tape,
        saved: &LayerTape,
        cache: &KvCache,
        carried: &mut Carried,
        grad_x: &mut [f32],
        sink: &mut Sink,
        buffers: &mut LayerBuffers,
    ) {
        let at = &self.layout().layers[layer];
        self.feed_forward_backward(layer, saved, at, grad_x, sink, buffers);
        let config = self.config();
        let (rows, queries) = (tape.ids.len(), config.heads * config.head_dim);
        let weights = &self.weights.layers[layer];
        let grad_attended = sized(&mut buffers.attended, rows * queries);
        matmul_transposed(grad_x, rows, &weights[Matrix::Output], grad_attended, false);
        sink.matrix(layer, Matrix::Output, grad_x, &saved.attended);
        if config.output_bias() {
            add_rows(sink.vector(&at.output_bias), grad_x);
        }
        self.attention_backward(layer, tape, saved, cache, carried, buffers);
        self.unturn(layer, saved, &tape.positions, sink, buffers);
        let hidden = config.hidden_size;
        self.replay_norm(&saved.input, &weights[Vector::InputNorm], &saved.input_scales, &mut buffers.normed);
        sink.matrix(layer, Matrix::Qkv, &buffers.qkv, &buffers.normed);
        let grad_normed = sized(&mut buffers.normed, rows * hidden);
        matmul_transposed(&buffers.qkv, rows, &weights[Matrix::Qkv], grad_normed, false);
        let grad_weight = sink.vector(&at.input_norm);
        let weight = &weights[Vector::InputNorm];
        norm::backward_rows(&saved.input, weight, &saved.input_scales, grad_normed, grad_x, grad_weight);
    }

    fn feed_forward_backward(
        &self,
        layer: usize,
        saved: &LayerTape,
        at: &LayerLayout,
        grad_x: &mut [f32],
        sink: &mut Sink,
        buffers: &mut LayerBuffers,
    ) {
        let (hidden, inner) = (self.config().hidden_size, self.config().intermediate_size);
        let (rows, weights) = (grad_x.len() / hidden, &self.weights.layers[layer]);
        let activated = sized(&mut buffers.activated, rows * inner);
        matmul_transposed(grad_x, rows, &weights[Matrix::Down], activated, false);
        let grad_gate_up = sized(&mut buffers.inner, rows * 2 * inner);
        swiglu::backward_rows(&saved.gate_up, inner, activated, grad_gate_up);
        sink.matrix(layer, Matrix::Down, grad_x, &buffers.activated);
        self.replay_norm(
            &saved.middle,
            &weights[Vector::PostNorm],
            &saved.middle_scales,
            &mut buffers.normed,
        );
        sink.matrix(layer, Matrix::GateUp, &buffers.inner, &buffers.normed);
        let grad_normed = sized(&mut buffers.normed, rows * hidden);
        matmul_transposed(&buffers.inner, rows, &weights[Matrix::GateUp], grad_normed, false);
        let grad_weight = sink.vector(&at.post_norm);
        let weight = &weights[Vector::PostNorm];
        norm::backward_rows(&saved.middle, weight, &saved.middle_scales, grad_normed, grad_x, grad_weight);
    }

    /// Gradients of rotated queries and keys and of values, as rows like those of the forward pass.
    fn attention_backward(
        &self,
        layer: usize,
        tape: &Tape,
        saved: &LayerTape,
        cache: &KvCache,
        carried: &mut Carried,
        buffers: &mut LayerBuffers,
    ) {
        let config = self.config();
        let geometry = config.geometry();
        let (rows, padded, dim) = (tape.ids.len(), geometry.padded(), config.head_dim);
        let before = carried.rows_before();
        for buffer in [&mut buffers.keys, &mut buffers.values] {
            buffer.clear();
            buffer.resize(config.kv_heads * (before + rows) * padded, 0.0);
        }
        carried.load(layer, config.kv_heads, [&mut buffers.keys, &mut buffers.values]);
        let queries = config.heads * dim;
        let mut targets = Gradients {
            queries: sized(&mut buffers.queries, rows * queries),
            keys: &mut buffers.keys,
            values: &mut buffers.values,
        };
        let inputs = Saved {
            queries: &saved.qkv,
            query_stride: config.qkv_width(),
            out: &saved.attended,
            log_sums: &saved.log_sums,
            grad_out: &buffers.attended,
        };
        attention::backward(geometry, &tape.tiles, cache.layer(layer), inputs, &mut targets);
        carried.store(layer, config.kv_heads, [&buffers.keys, &buffers.values]);
        let (query_grads, keys, values) = (&buffers.queries, &buffers.keys, &buffers.values);
        let width = config.qkv_width();
        for_each_row(sized(&mut buffers.qkv, rows * width), width, |row, out| {
            let (out_queries, out_keys_values) = out.split_at_mut(queries);
            out_queries.copy_from_slice(&query_grads[row * queries..][..queries]);
            for (head, out) in out_keys_values.chunks_exact_mut(dim).enumerate() {
                let source = if head < config.kv_heads { keys } else { values };
                let place = (head % config.kv_heads * (before + rows) + before + row) * padded;
                out.copy_from_slice(&source[place..][..dim]);
            }
        });
    }

    /// Turns the gradients in `buffers.qkv` back through rotary embedding, q/k norms and biases.
    fn unturn(
        &self,
        layer: usize,
        saved: &LayerTape,
        positions: &[usize],
        sink: &mut Sink,
        buffers: &mut LayerBuffers,
    ) {
        let config = self.config();
        let (width, turned) = (config.qkv_width(), (config.heads + config.kv_heads) * config.head_dim);
        for_each_row(&mut buffers.qkv, width, |row, values| {
            self.rotary.rotate_back(&mut values[..turned], positions[row]);
        });
        if config.qk_norm {
            self.qk_norms_backward(layer, &saved.before_norm, &mut buffers.qkv, sink);
        }
        if config.attention_bias {
            add_rows(sink.vector(&self.layout().layers[layer].qkv_bias), &buffers.qkv);
        }
    }

    /// Turns gradients behind the norms of queries and keys into those before them, `before [rows, qkv width]`. The gradients
    /// of the norms' weights are summed by runs of rows, then in the runs' order.
    fn qk_norms_backward(&self, layer: usize, before: &[f32], grads: &mut [f32], sink: &mut Sink) {
        let (weights, at) = (&self.weights.layers[layer], &self.layout().layers[layer]);
        let run = norm::ROWS_PER_TASK * self.config().qkv_width();
        let runs = before.par_chunks(run).zip(grads.par_chunks_mut(run));
        let parts: Vec<[Vec<f32>; 2]> =
            runs.map(|(before, grads)| self.qk_norms_backward_rows(weights, before, grads)).collect();
        for [queries, keys] in &parts {
            add(sink.vector(&at.q_norm), queries);
            add(sink.vector(&at.k_norm), keys);
        }
    }

    /// The same for some rows; returns the gradients of the weights of the queries' and of the keys' norm.
    fn qk_norms_backward_rows(
        &self,
        weights: &LayerWeights,
        before: &[f32],
        grads: &mut [f32],
    ) -> [Vec<f32>; 2] {
        let config = self.config();
        let (width, dim) = (config.qkv_width(), config.head_dim);
        let turned = (config.heads + config.kv_heads) * dim;
        let (mut queries, mut keys, mut grad_x) = (vec![0.0; dim], vec![0.0; dim], vec![0.0; dim]);
        for (before, grads) in before.chunks_exact(width).zip(grads.chunks_exact_mut(width)) {
            let heads = before[..turned].chunks_exact(dim).zip(grads[..turned].chunks_exact_mut(dim));
            for (head, (x, grad)) in heads.enumerate() {
                let (vector, grad_weight) = if head < config.heads {
                    (Vector::QueryNorm, &mut queries)
                } else {
                    (Vector::KeyNorm, &mut keys)
                };
                grad_x.fill(0.0);
                let scale = norm::factor(x, config.norm_epsilon);
                norm::backward(x, &weights[vector], scale, grad, &mut grad_x, grad_weight);
                grad.copy_from_slice(&grad_x);
            }
        }
        [queries, keys]
    }

    fn replay_norm(&self, x: &[f32], weight: &[f32], scales: &[f32], out: &mut Vec<f32>) {
        let hidden = self.config().hidden_size;
        for_each_row(sized(out, x.len()), hidden, |row, out| {
            norm::replay(&x[row * hidden..][..hidden], weight, scales[row], out);
        });
    }
}

/// Where gradients go: to all parameters, or to those of the adapter alone.
struct Sink<'a> {
    decoder: &'a Decoder,
    gradients: &'a mut [f32],
    buffers: &'a mut SinkBuffers,
}

impl Sink<'_> {
    /// The gradient of a vector.
    fn vector(&mut self, range: &Range<usize>) -> &mut [f32] {
        if self.decoder.adapter.is_none() {
            return &mut self.gradients[range.clone()];
        }
        sized(&mut self.buffers.unused, range.len())
    }

    /// The gradient of the embedding or the head, if it is trained.
    fn entries(&mut self, range: &Range<usize>) -> Option<&mut [f32]> {
        self.decoder.adapter.is_none().then(|| &mut self.gradients[range.clone()])
    }

    /// Adds `grad_out^T [outputs, rows] x input [rows, inputs]` to the gradient of a matrix.
    fn matrix(&mut self, layer: usize, matrix: Matrix, grad_out: &[f32], input: &[f32]) {
        let weight = &self.decoder.weights.layers[layer][matrix];
        let (inputs, outputs) = (weight.inner(), weight.columns());
        if let Some(adapter) = &self.decoder.adapter {
            return adapter.add_gradient(layer, matrix, grad_out, outputs, input, self.gradients);
        }
        let at = &self.decoder.layout().layers[layer];
        let range = match matrix {
            Matrix::Qkv => &at.qkv,
            Matrix::Output => &at.output,
            Matrix::GateUp => &at.gate_up,
            Matrix::Down => &at.down,
        };
        let packed = &mut self.buffers.packed;
        packed.pack(input, input.len() / inputs, inputs, inputs);
        let left = Left::transposed(grad_out, outputs);
        matmul(left, outputs, packed, &mut self.gradients[range.clone()], true);
    }
}

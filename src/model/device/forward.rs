//! The forward pass over packed rows, for training, scoring and sampling.

use super::{DeviceDecoder, DevicePrefix, Format};
use crate::cuda::attention::{ForestInputs, ForestTables};
use crate::cuda::embedding;
use crate::cuda::forest::{ForestPlan, Planning};
use crate::cuda::norm::{self, Norm, Rows};
use crate::cuda::reduce;
use crate::cuda::rotary::Rotary;
use crate::cuda::swiglu;
use crate::cuda::{Buffer, Element, IndexSlice, Indices, Matrix, MatrixMut, Result, Slice, SliceMut};
use crate::model::layout::LayerLayout;
use crate::model::{Forest, ModelError};
use std::mem::replace;
use std::ops::Range;
use std::sync::Arc;

/// A forest on the device, ready for passes over it.
#[derive(Debug)]
pub struct Batch {
    /// How its rows lie.
    pub plan: ForestPlan,
    pub(crate) tables: ForestTables,
    pub(crate) ids: Indices,
    pub(crate) positions: Indices,
    pub(crate) angles: Arc<Buffer<f32>>,
    /// The token of each packed row that is computed, for the embedding's gradient.
    pub(super) tokens: Vec<u32>,
    /// For each of the forest's rows that are computed, the packed row where it lies.
    places: Vec<u32>,
    /// Of a part of a schedule: the packed rows of the prefix that it sees.
    pub(super) seen: Option<Vec<Range<usize>>>,
}

impl Batch {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.plan.rows()
    }

    /// The packed rows at which some of the forest's rows lie; those of a part count from behind its path.
    pub fn places(&self, rows: &[usize]) -> Vec<u32> {
        rows.iter().map(|row| self.places[*row]).collect()
    }
}

/// What a forward pass over a forest keeps for the backward pass.
#[derive(Debug)]
pub struct DeviceTape<T> {
    /// Keep only the input of each layer; the backward pass computes the rest again, with the same bits.
    pub recompute: bool,
    pub(super) layers: Vec<LayerTape<T>>,
}

impl<T> DeviceTape<T> {
    /// An empty tape.
    pub fn new(recompute: bool) -> Self {
        Self { recompute, layers: Vec::new() }
    }
}

/// What one layer's backward pass needs.
#[derive(Debug)]
pub(super) struct LayerTape<T> {
    pub(super) input: Buffer<f32>,
    /// Nothing where the layer is to be computed again.
    pub(super) inside: Option<Inside<T>>,
}

/// What happened inside a layer.
#[derive(Debug)]
pub(super) struct Inside<T> {
    pub(super) input_scales: Buffer<f32>,
    /// Queries, keys and values before their norm (only with q/k norm).
    pub(super) before: Option<Buffer<T>>,
    /// Rotated queries and keys, and values.
    pub(super) qkv: Buffer<T>,
    pub(super) attended: Buffer<T>,
    pub(super) log_sums: Buffer<f32>,
    pub(super) middle: Buffer<f32>,
    pub(super) middle_scales: Buffer<f32>,
    pub(super) gate_up: Buffer<T>,
}

/// Buffers that layers compute in.
#[derive(Debug)]
pub struct Work<T> {
    normed: Buffer<T>,
    before: Option<Buffer<T>>,
    qkv: Buffer<T>,
    attended: Buffer<T>,
    gate_up: Buffer<T>,
    activated: Buffer<T>,
    input_scales: Buffer<f32>,
    middle_scales: Buffer<f32>,
}

/// How the rows of a pass turn and attend.
pub trait Attend<T: Element> {
    /// Turns the projections `qkv` of a layer's rows (from `before`, where that is not missing), and attends.
    ///
    /// # Errors
    /// When the device has failed.
    fn attend(
        &mut self,
        layer: usize,
        rotary: &Rotary<T>,
        before: Option<Slice<T>>,
        qkv: &mut Buffer<T>,
        attended: &mut Buffer<T>,
    ) -> Result<()>;
}

/// Rows of a forest that see each other, and those of a prefix.
pub(super) struct WithinForest<'a, T> {
    decoder: &'a DeviceDecoder<T>,
    batch: &'a Batch,
    prefix: Option<&'a mut DevicePrefix<T>>,
    pub(super) log_sums: Buffer<f32>,
}

impl<'a, T: Format> WithinForest<'a, T> {
    /// `prefix` is read by a part, and filled by a pass that is not one.
    pub(super) fn new(
        decoder: &'a DeviceDecoder<T>,
        batch: &'a Batch,
        prefix: Option<&'a mut DevicePrefix<T>>,
    ) -> Result<Self> {
        let count = batch.tables.statistics(decoder.config.geometry());
        let log_sums = decoder.device.allocate("log-sums", count)?;
        Ok(Self { decoder, batch, prefix, log_sums })
    }
}

impl<T: Format> Attend<T> for WithinForest<'_, T> {
    fn attend(
        &mut self,
        layer: usize,
        rotary: &Rotary<T>,
        before: Option<Slice<T>>,
        qkv: &mut Buffer<T>,
        attended: &mut Buffer<T>,
    ) -> Result<()> {
        rotary.forward(&self.decoder.device, before, qkv.into())?;
        let seen = match (&self.batch.seen, self.prefix.as_deref_mut()) {
            (_, None) => None,
            (Some(rows), Some(prefix)) => Some(prefix.seen(self.decoder, layer, rows)?),
            (None, Some(prefix)) => {
                prefix.keep(self.decoder, qkv)?;
                None
            }
        };
        let prefix = seen.as_ref().map(|seen| seen.as_prefix(self.decoder)).transpose()?.flatten();
        let inputs = ForestInputs { qkv: Slice::from(&*qkv), prefix };
        let (out, log_sums) = (&mut SliceMut::from(attended), &mut SliceMut::from(&mut self.log_sums));
        self.decoder.attention.forest(&self.batch.tables, &inputs, out, log_sums)
    }
}

impl<T: Format> DeviceDecoder<T> {
    /// Copies a forest to the device.
    ///
    /// # Errors
    /// When a path is longer than the model's positions, a token is outside its vocabulary, there are too many rows, or
    /// the device has no room.
    pub fn batch(&self, forest: &Forest) -> std::result::Result<Batch, ModelError> {
        self.batch_behind_first(forest, 0)
    }

    /// The same for a part of a schedule: a forest that begins with a path of the prefix's segments, which are not computed
    /// again.
    ///
    /// # Errors
    /// As [`DeviceDecoder::batch`].
    pub fn batch_behind(
        &self,
        forest: &Forest,
        prefix: &DevicePrefix<T>,
        path: &[usize],
    ) -> std::result::Result<Batch, ModelError> {
        let batch = self.batch_behind_first(forest, path.len())?;
        Ok(Batch { seen: Some(prefix.rows_of(path)), ..batch })
    }

    fn batch_behind_first(&self, forest: &Forest, prefix: usize) -> std::result::Result<Batch, ModelError> {
        self.config.check(forest.ids(), forest.longest_path())?;
        let kv_heads = self.config.kv_heads;
        let planning = Planning { prefix, kv_heads, batch_invariant: self.batch_invariant };
        let plan = ForestPlan::new(forest, planning)?;
        // Rows of the first segments are the first ones in both orders.
        let first = plan.prefix_rows;
        let ids: Vec<u32> = plan.packed.sources().skip(first).map(|row| forest.ids()[row]).collect();
        let positions = plan.packed.positions().skip(first).map(|position| position as u32);
        let positions: Vec<u32> = positions.collect();
        Ok(Batch {
            tables: ForestTables::upload(&self.device, &plan)?,
            ids: Indices::upload(&self.device, "tokens", &ids)?,
            tokens: ids,
            positions: Indices::upload(&self.device, "positions", &positions)?,
            angles: self.angles(forest.longest_path())?,
            places: plan.packed.places().iter().skip(first).map(|place| place - first as u32).collect(),
            seen: None,
            plan,
        })
    }

    /// The residual stream after the last layer, `[rows, hidden]` in packed order.
    ///
    /// # Errors
    /// When the device has no room or has failed.
    pub fn forward(&self, batch: &Batch, tape: Option<&mut DeviceTape<T>>) -> Result<Buffer<f32>> {
        self.forward_in_schedule(batch, None, tape)
    }

    /// The same for a part of a schedule, or for its prefix, whose keys and values `prefix` then takes.
    ///
    /// # Errors
    /// As [`DeviceDecoder::forward`].
    pub fn forward_in_schedule(
        &self,
        batch: &Batch,
        prefix: Option<&mut DevicePrefix<T>>,
        mut tape: Option<&mut DeviceTape<T>>,
    ) -> Result<Buffer<f32>> {
        let mut x = self.embed(batch.ids.view())?;
        let mut work = self.work(batch.rows())?;
        let mut attend = WithinForest::new(self, batch, prefix)?;
        for layer in 0..self.config.layers {
            let rotary = self.rotary(layer, &batch.angles, batch.positions.view())?;
            match tape.as_deref_mut() {
                None => self.layer(layer, &rotary, &mut x, &mut work, &mut attend)?,
                Some(tape) => {
                    let input = self.copy_of(&x)?;
                    let inside = if tape.recompute {
                        self.layer(layer, &rotary, &mut x, &mut work, &mut attend)?;
                        None
                    } else {
                        Some(self.layer_on_tape(layer, &rotary, &mut x, &mut work, &mut attend)?)
                    };
                    tape.layers.push(LayerTape { input, inside });
                }
            }
        }
        Ok(x)
    }

    /// Rows of the embedding, `[rows, hidden]`.
    ///
    /// # Errors
    /// When the device has no room or has failed.
    pub fn embed(&self, ids: IndexSlice) -> Result<Buffer<f32>> {
        let mut x = self.device.allocate("the residual stream", ids.len() * self.config.hidden_size)?;
        self.embed_into(ids, (&mut x).into())?;
        Ok(x)
    }

    /// As [`DeviceDecoder::embed`], into a buffer that there is.
    ///
    /// # Errors
    /// When the lengths differ, or the device has failed.
    pub fn embed_into(&self, ids: IndexSlice, x: SliceMut<f32>) -> Result<()> {
        let table = self.weight(&self.layout.embedding)?;
        embedding::gather(&self.device, table, ids, x, self.config.hidden_size)
    }

    /// Buffers for so many rows.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn work(&self, rows: usize) -> Result<Work<T>> {
        let config = &self.config;
        let allocate = |width: usize| self.device.allocate("activations", rows * width);
        Ok(Work {
            normed: allocate(config.hidden_size)?,
            before: if config.qk_norm { Some(allocate(config.qkv_width())?) } else { None },
            qkv: allocate(config.qkv_width())?,
            attended: allocate(config.heads * config.head_dim)?,
            gate_up: allocate(2 * config.intermediate_size)?,
            activated: allocate(config.intermediate_size)?,
            input_scales: self.device.allocate("activations", rows)?,
            middle_scales: self.device.allocate("activations", rows)?,
        })
    }

    /// How the heads of a layer turn.
    ///
    /// # Errors
    /// None that a caller could cause.
    pub fn rotary<'a>(
        &'a self,
        layer: usize,
        angles: &'a Buffer<f32>,
        positions: IndexSlice<'a>,
    ) -> Result<Rotary<'a, T>> {
        let at = &self.layout.layers[layer];
        let some = |range: &Range<usize>| {
            if range.is_empty() { Ok(None) } else { self.weight(range).map(Some) }
        };
        Ok(Rotary {
            geometry: self.config.geometry(),
            bias: some(&at.qkv_bias)?,
            norms: some(&at.q_norm)?.zip(some(&at.k_norm)?),
            epsilon: self.config.norm_epsilon,
            angles: angles.into(),
            positions,
        })
    }

    /// One layer on the residual stream `x`, nothing kept. May be recorded.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn layer(
        &self,
        layer: usize,
        rotary: &Rotary<T>,
        x: &mut Buffer<f32>,
        work: &mut Work<T>,
        attend: &mut impl Attend<T>,
    ) -> Result<()> {
        self.attention_block(layer, rotary, x, work, attend)?;
        self.feed_forward(layer, x, work)
    }

    /// The same, and what the backward pass needs of it.
    pub(super) fn layer_on_tape(
        &self,
        layer: usize,
        rotary: &Rotary<T>,
        x: &mut Buffer<f32>,
        work: &mut Work<T>,
        attend: &mut WithinForest<T>,
    ) -> Result<Inside<T>> {
        self.attention_block(layer, rotary, x, work, attend)?;
        let middle = self.copy_of(x)?;
        self.feed_forward(layer, x, work)?;
        let before = work.before.as_mut().map(|before| self.taken(before)).transpose()?;
        Ok(Inside {
            input_scales: self.taken(&mut work.input_scales)?,
            before,
            qkv: self.taken(&mut work.qkv)?,
            attended: self.taken(&mut work.attended)?,
            log_sums: self.taken(&mut attend.log_sums)?,
            middle,
            middle_scales: self.taken(&mut work.middle_scales)?,
            gate_up: self.taken(&mut work.gate_up)?,
        })
    }

    fn attention_block(
        &self,
        layer: usize,
        rotary: &Rotary<T>,
        x: &mut Buffer<f32>,
        work: &mut Work<T>,
        attend: &mut impl Attend<T>,
    ) -> Result<()> {
        let at = &self.layout.layers[layer];
        self.norm(&at.input_norm, &*x, &mut work.normed, Some(&mut work.input_scales))?;
        let projected = work.before.as_mut().unwrap_or(&mut work.qkv);
        self.project(&work.normed, &at.qkv, projected, false)?;
        let before = work.before.as_ref().map(Slice::from);
        attend.attend(layer, rotary, before, &mut work.qkv, &mut work.attended)?;
        self.project(&work.attended, &at.output, x, true)?;
        self.add_output_bias(at, x)
    }

    fn add_output_bias(&self, at: &LayerLayout, x: &mut Buffer<f32>) -> Result<()> {
        if at.output_bias.is_empty() {
            return Ok(());
        }
        reduce::add_bias(&self.device, x.into(), self.weight(&at.output_bias)?)
    }

    fn feed_forward(&self, layer: usize, x: &mut Buffer<f32>, work: &mut Work<T>) -> Result<()> {
        let at = &self.layout.layers[layer];
        self.norm(&at.post_norm, &*x, &mut work.normed, Some(&mut work.middle_scales))?;
        self.project(&work.normed, &at.gate_up, &mut work.gate_up, false)?;
        let (gate_up, activated) = (Slice::from(&work.gate_up), SliceMut::from(&mut work.activated));
        swiglu::forward(&self.device, gate_up, activated, self.config.intermediate_size)?;
        self.project(&work.activated, &at.down, x, true)
    }

    pub(super) fn norm<'a>(
        &self,
        weight: &Range<usize>,
        x: impl Into<Rows<'a>>,
        out: &mut Buffer<T>,
        scales: Option<&mut Buffer<f32>>,
    ) -> Result<()> {
        norm::forward(&self.device, self.norm_of(weight)?, x.into(), out.into(), scales.map(SliceMut::from))
    }

    pub(super) fn norm_of(&self, weight: &Range<usize>) -> Result<Norm<'_, T>> {
        Ok(Norm { weight: self.weight(weight)?, epsilon: self.config.norm_epsilon })
    }

    /// `out [rows, outputs] = x [rows, inputs] w^T`, or added to it.
    fn project<U: crate::cuda::gemm::Sum<T>>(
        &self,
        x: &Buffer<T>,
        weight: &Range<usize>,
        out: &mut Buffer<U>,
        accumulate: bool,
    ) -> Result<()> {
        let rows = x.len() / self.inputs(weight);
        let (x, weight) = (Matrix::new(x, rows, self.inputs(weight))?, self.matrix(weight)?);
        let outputs = out.len().checked_div(rows).unwrap_or(0);
        self.gemm.forward(x, weight, MatrixMut::new(out, rows, outputs)?, accumulate)
    }

    /// A weight matrix `[outputs, inputs]`.
    pub(super) fn matrix(&self, weight: &Range<usize>) -> Result<Matrix<'_, T>> {
        let inputs = self.inputs(weight);
        Matrix::new(self.weight(weight)?, weight.len() / inputs, inputs)
    }

    /// Columns of a weight matrix.
    pub(super) fn inputs(&self, weight: &Range<usize>) -> usize {
        let named = self.layout.parameters().partition_point(|parameter| parameter.range.end <= weight.start);
        self.layout.parameters().get(named).map_or(1, |parameter| parameter.columns.max(1))
    }

    pub(super) fn copy_of<U: Element>(&self, values: &Buffer<U>) -> Result<Buffer<U>> {
        let mut copy = self.device.allocate("activations", values.len())?;
        SliceMut::from(&mut copy).copy_from(values)?;
        Ok(copy)
    }

    /// Takes a buffer out and puts another of its length there.
    fn taken<U: Element>(&self, buffer: &mut Buffer<U>) -> Result<Buffer<U>> {
        let fresh = self.device.allocate("activations", buffer.len())?;
        Ok(replace(buffer, fresh))
    }
}

//! The prefix of a schedule: its keys and values, which the parts read, and the sums of their gradients.

use super::{Batch, DeviceDecoder, Format};
use crate::cuda::attention::Prefix;
use crate::cuda::embedding;
use crate::cuda::reduce;
use crate::cuda::{Buffer, Device, Element, Indices, Result, Slice, SliceMut};
use std::ops::Range;

/// Keys and values of a prefix's rows, of every layer, and what the parts have found of their gradients.
#[derive(Debug)]
pub struct DevicePrefix<T> {
    /// Where the keys and the values of each row lie in the projections, in units of their width.
    places: Indices,
    rows: usize,
    /// Rows of each segment.
    segments: Vec<Range<usize>>,
    /// Of each layer `[rows, 2, kv_heads, head_dim]`.
    layers: Vec<Buffer<T>>,
    /// Of each layer alike; nothing before the first backward pass over a part.
    gradients: Vec<Option<Buffer<f32>>>,
}

/// One layer's keys and values of the rows that a part sees, one behind the other.
pub(super) struct Seen<T> {
    rows: usize,
    keys_and_values: Buffer<T>,
}

impl<T: Format> DevicePrefix<T> {
    /// For the passes over a prefix, of which `batch` is the forest, and its parts.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(decoder: &DeviceDecoder<T>, batch: &Batch) -> Result<Self> {
        let (heads, kv_heads) = (decoder.config.heads, decoder.config.kv_heads);
        let group = heads / kv_heads;
        let place = |row: usize| [row * (group + 2) + group, row * (group + 2) + group + 1];
        let places: Vec<u32> = (0..batch.rows()).flat_map(place).map(|place| place as u32).collect();
        let packed = batch.plan.packed.segments();
        let mut segments = vec![0..0; packed.len()];
        for at in packed {
            segments[at.segment] = at.row..at.row + at.length;
        }
        let mut gradients = Vec::new();
        gradients.resize_with(decoder.config.layers, || None);
        Ok(Self {
            places: Indices::upload(&decoder.device, "rows of the prefix", &places)?,
            rows: batch.rows(),
            segments,
            layers: Vec::with_capacity(decoder.config.layers),
            gradients,
        })
    }

    /// The rows of a path of segments.
    pub(super) fn rows_of(&self, path: &[usize]) -> Vec<Range<usize>> {
        let mut rows: Vec<Range<usize>> = Vec::new();
        for next in path.iter().map(|segment| &self.segments[*segment]).filter(|next| !next.is_empty()) {
            match rows.last_mut().filter(|last| last.end == next.start) {
                Some(last) => last.end = next.end,
                None => rows.push(next.clone()),
            }
        }
        rows
    }

    /// Keeps the keys and values of the next layer's projections `[rows, (heads + 2 kv_heads) x head_dim]`.
    pub(super) fn keep(&mut self, decoder: &DeviceDecoder<T>, qkv: &Buffer<T>) -> Result<()> {
        let (device, width) = (&decoder.device, decoder.kv_width());
        let mut widened = device.allocate::<f32>("keys and values of the prefix", self.rows * 2 * width)?;
        let mut kept = device.allocate::<T>("keys and values of the prefix", widened.len())?;
        embedding::gather(device, qkv.into(), self.places.view(), (&mut widened).into(), width)?;
        reduce::convert(device, Slice::from(&widened), SliceMut::from(&mut kept))?;
        self.layers.push(kept);
        Ok(())
    }

    /// What a part sees of a layer.
    pub(super) fn seen(
        &self,
        decoder: &DeviceDecoder<T>,
        layer: usize,
        rows: &[Range<usize>],
    ) -> Result<Seen<T>> {
        let keys_and_values = gathered(&decoder.device, &self.layers[layer], rows, 2 * decoder.kv_width())?;
        Ok(Seen { rows: rows.iter().map(Range::len).sum(), keys_and_values })
    }

    /// The gradients so far of what a part sees of a layer.
    pub(super) fn sums(
        &mut self,
        decoder: &DeviceDecoder<T>,
        layer: usize,
        rows: &[Range<usize>],
    ) -> Result<Buffer<f32>> {
        let (device, width) = (&decoder.device, 2 * decoder.kv_width());
        let sums = match self.gradients[layer].take() {
            Some(sums) => sums,
            None => device.zeroed("gradients of the prefix", self.rows * width)?,
        };
        gathered(device, self.gradients[layer].insert(sums), rows, width)
    }

    /// Puts them back.
    pub(super) fn set_sums(
        &mut self,
        decoder: &DeviceDecoder<T>,
        layer: usize,
        rows: &[Range<usize>],
        sums: &Buffer<f32>,
    ) -> Result<()> {
        let (width, mut done) = (2 * decoder.kv_width(), 0);
        let Some(target) = &mut self.gradients[layer] else { return Ok(()) };
        for range in rows {
            let part = sums.slice(done * width..(done + range.len()) * width)?;
            target.slice_mut(range.start * width..range.end * width)?.copy_from(part)?;
            done += range.len();
        }
        Ok(())
    }

    /// The gradients that the parts have found of a layer's keys and values.
    pub(super) fn carried(&self, layer: usize) -> Option<Slice<'_, f32>> {
        self.gradients[layer].as_ref().map(Slice::from)
    }
}

impl<T: Format> Seen<T> {
    /// As attention takes it; nothing where no row is seen.
    pub(super) fn as_prefix(&self, decoder: &DeviceDecoder<T>) -> Result<Option<Prefix<'_, T>>> {
        if self.rows == 0 {
            return Ok(None);
        }
        let (keys, width) = (Slice::from(&self.keys_and_values), decoder.kv_width());
        Ok(Some(Prefix { keys, values: keys.slice(width..)?, stride: 2 * width }))
    }
}

impl<T: Format> DeviceDecoder<T> {
    /// Keys, or values, of one row.
    pub(super) fn kv_width(&self) -> usize {
        self.config.kv_heads * self.config.head_dim
    }
}

/// Some rows of a table, one behind the other.
fn gathered<U: Element>(
    device: &Device,
    table: &Buffer<U>,
    rows: &[Range<usize>],
    width: usize,
) -> Result<Buffer<U>> {
    let count: usize = rows.iter().map(Range::len).sum();
    let mut out = device.allocate("rows of the prefix", count * width)?;
    let mut done = 0;
    for range in rows {
        let part = table.slice(range.start * width..range.end * width)?;
        out.slice_mut(done * width..(done + range.len()) * width)?.copy_from(part)?;
        done += range.len();
    }
    Ok(out)
}

//! Prompts through the model: their keys and values into pages, and the first token of each reply.

use super::format::PageFormat;
use super::landing::Landing;
use super::pages::{Cache, CachedTokens};
use super::waiting::Portion;
use crate::cuda::attention::{ForestInputs, ForestTables};
use crate::cuda::rotary::Rotary;
use crate::cuda::sampling::{self, Drawn, Replies, Settings};
use crate::cuda::{self, Buffer, Indices, Slice, SliceMut};
use crate::model::device::{Attend, Batch, DeviceDecoder, Format};
use crate::model::{Forest, ModelError};
use crate::rollout::Draw;
use crate::rollout::engine::add_trunk;
use std::rc::Rc;

/// The forest of some prompts, and the segment with which each of them ends.
fn forest(portions: &[Portion]) -> (Forest, Vec<usize>) {
    let (mut forest, mut ends) = (Forest::default(), Vec::new());
    for portion in portions {
        let trunks = portion
            .prompts
            .first()
            .map(|prompt| add_trunk(&mut forest, prompt, portion.cuts()))
            .unwrap_or_default();
        for prompt in portion.prompts {
            ends.push(forest.add(trunks.get(&prompt.length).copied(), &prompt.footer));
        }
    }
    (forest, ends)
}

/// Rows of a forest that see each other, as they are computed, and are kept in pages of the format `S`.
struct IntoPages<'a, T, S> {
    decoder: &'a DeviceDecoder<T>,
    tables: &'a ForestTables,
    slots: &'a Buffer<i32>,
    cache: &'a mut Cache<S>,
    log_sums: Buffer<f32>,
}

impl<T: Format, S: PageFormat<T>> Attend<T> for IntoPages<'_, T, S> {
    fn attend(
        &mut self,
        layer: usize,
        rotary: &Rotary<T>,
        before: Option<Slice<T>>,
        qkv: &mut Buffer<T>,
        attended: &mut Buffer<T>,
    ) -> cuda::Result<()> {
        let (pages, slots) = (&mut self.cache.layers[layer], self.slots.into());
        // SAFETY: slots are those of pages that came from the cache's pool.
        unsafe { S::turn_and_keep(self.decoder, rotary, before, qkv, slots, pages)? };
        let inputs = ForestInputs { qkv: Slice::from(&*qkv), prefix: None };
        let (out, log_sums) = (&mut SliceMut::from(attended), &mut SliceMut::from(&mut self.log_sums));
        self.decoder.attention().forest(self.tables, &inputs, out, log_sums)
    }
}

/// Prompts that have been through the layers.
pub(super) struct Prefilled {
    /// The residual stream behind the last layer.
    x: Buffer<f32>,
    /// Where in it the last token of each prompt is.
    places: Vec<u32>,
    /// What the replies to each prompt continue.
    pub(super) ends: Vec<Rc<CachedTokens>>,
}

/// Computes prompts; writes to pages that it takes for them. Behind what it brings to the device it waits for nothing.
///
/// # Errors
/// When a token is outside the vocabulary, there is no room, or the device has failed.
pub(super) fn prefill<T: Format, S: PageFormat<T>>(
    decoder: &DeviceDecoder<T>,
    cache: &mut Cache<S>,
    portions: &[Portion],
) -> Result<Prefilled, ModelError> {
    let (forest, ends) = forest(portions);
    let batch = decoder.batch(&forest)?;
    let mut segments: Vec<Rc<CachedTokens>> = Vec::with_capacity(forest.segments().len());
    for segment in forest.segments() {
        let parent = segment.parent.map(|parent| Rc::clone(&segments[parent]));
        segments.push(cache.insert(parent, segment.length)?);
    }
    let x = residual(decoder, cache, &batch, &segments)?;
    let rows: Vec<usize> =
        ends.iter().filter_map(|end| forest.row_before(*end, forest.segments()[*end].length)).collect();
    let ends = ends.into_iter().map(|end| Rc::clone(&segments[end])).collect();
    Ok(Prefilled { x, places: batch.places(&rows), ends })
}

/// The residual stream behind the last layer.
fn residual<T: Format, S: PageFormat<T>>(
    decoder: &DeviceDecoder<T>,
    cache: &mut Cache<S>,
    batch: &Batch,
    segments: &[Rc<CachedTokens>],
) -> cuda::Result<Buffer<f32>> {
    let device = decoder.device();
    let packed = batch.plan.packed.segments().iter();
    let slots =
        packed.flat_map(|at| (0..at.length).map(|position| segments[at.segment].pages.slot(position)));
    let slots = device.upload("slots of prompts", &slots.collect::<Vec<i32>>())?;
    let log_sums = device.allocate("log-sums", batch.tables.statistics(decoder.config().geometry()))?;
    let mut attend = IntoPages { decoder, tables: &batch.tables, slots: &slots, cache, log_sums };
    let mut x = decoder.embed(batch.ids.view())?;
    let mut work = decoder.work(batch.rows())?;
    for layer in 0..decoder.config().layers {
        let rotary = decoder.rotary(layer, &batch.angles, batch.positions.view())?;
        decoder.layer(layer, &rotary, &mut x, &mut work, &mut attend)?;
    }
    Ok(x)
}

impl Prefilled {
    /// Draws the first token of each reply, some prompts at a time; `keys` are those of the replies' random streams, those of a
    /// prompt together.
    ///
    /// # Errors
    /// When the device has no room or has failed.
    pub(super) fn first_tokens<T: Format>(
        &self,
        decoder: &DeviceDecoder<T>,
        settings: &Settings,
        keys: &[u64],
    ) -> cuda::Result<Vec<Draw>> {
        let samples = keys.len() / self.places.len().max(1);
        let mut drawn = Vec::with_capacity(keys.len());
        let prompts_at_once = decoder.rows_of_logits();
        for (chunk, places) in self.places.chunks(prompts_at_once).enumerate() {
            let indices = Indices::upload(decoder.device(), "rows of prompts", places)?;
            let logits = decoder.logits(&self.x, indices.view())?;
            let first = chunk * prompts_at_once * samples;
            let keys = &keys[first..first + places.len() * samples];
            drawn.extend(draw_from(decoder, &logits, samples, settings, keys)?);
        }
        Ok(drawn)
    }
}

/// Draws `samples` tokens from each row of logits.
fn draw_from<T: Format>(
    decoder: &DeviceDecoder<T>,
    logits: &Buffer<f32>,
    samples: usize,
    settings: &Settings,
    keys: &[u64],
) -> cuda::Result<Vec<Draw>> {
    if keys.is_empty() {
        return Ok(Vec::new());
    }
    let device = decoder.device();
    let numbers: Vec<u32> = (0..keys.len() as u32).collect();
    let sources: Vec<u32> = numbers.iter().map(|row| row / samples as u32).collect();
    let sources = Indices::upload(device, "rows of prompts", &sources)?;
    let numbers = Indices::upload(device, "replies", &numbers)?;
    let (mut replies, mut drawn) = (Replies::new(device, keys.len())?, Drawn::new(device, keys.len())?);
    replies.keys.upload(keys)?;
    let rows = sampling::Rows {
        logits: logits.into(),
        vocabulary: decoder.config().vocab_size,
        sources: Some(sources.view()),
        replies: numbers.view(),
    };
    sampling::sample(device, settings, rows, &replies, &mut drawn)?;
    let mut landing = Landing::new(device, keys.len())?;
    landing.copy(&drawn)?;
    landing.draws()
}

//! Steps of decoding, recorded as a graph: the device draws a token for each reply and goes on with it, and the host looks at
//! the tokens some steps later.

use super::Limits;
use super::format::PageFormat;
use super::landing::Landing;
use super::pages::{Cache, CachedTokens, Pages};
use crate::cuda::attention::{PagedInputs, PagedTables};
use crate::cuda::paged::{CachedSegment, Cut, PAGE, PagedPlan, PagedQuery};
use crate::cuda::rotary::Rotary;
use crate::cuda::sampling::{self, Bounds, Drawn, NextRows, Replies, Settings};
use crate::cuda::{Buffer, CudaError, Device, Graph, IndexSlice, Indices, Result, Slice, SliceMut};
use crate::model::device::{Attend, DeviceDecoder, Format};
use crate::rollout::Draw;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// Items of attention for each multiprocessor, where rows need not have the same bits in every batch.
const ITEMS_PER_MULTIPROCESSOR: usize = 4;

/// A reply that takes part in some steps.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seat<'a> {
    /// Key of its random stream.
    pub(super) key: u64,
    /// Its newest token, whose keys and values are not in the cache yet.
    pub(super) last: u32,
    /// Its tokens, at least one.
    pub(super) length: usize,
    /// Tokens of its prompt.
    pub(super) start: usize,
    /// Its prompt.
    pub(super) prompt: &'a CachedTokens,
    /// Where its own tokens are and will be.
    pub(super) pages: &'a Pages,
    /// How many of them those steps may put there in the end.
    pub(super) positions: usize,
}

/// Which keys the rows of a step read, and where these lie.
struct Reading {
    plan: PagedPlan,
    page_table: Vec<u32>,
}

impl Reading {
    fn new<T: Format>(decoder: &DeviceDecoder<T>, seats: &[Seat], rows: usize) -> Result<Self> {
        let (mut segments, mut page_table, mut numbers) = (Vec::new(), Vec::new(), BTreeMap::new());
        let mut paths = Vec::with_capacity(seats.len());
        for seat in seats {
            let mut path: Vec<usize> = Vec::new();
            for tokens in seat.prompt.path() {
                let number = match numbers.entry(tokens.number) {
                    Entry::Occupied(known) => *known.get(),
                    Entry::Vacant(new) => {
                        new.insert(segments.len());
                        let (first_page, positions) = (page_table.len(), tokens.length);
                        segments.push(CachedSegment { first_page, positions, grows: false });
                        page_table.extend_from_slice(tokens.pages.numbers());
                        segments.len() - 1
                    }
                };
                path.push(number);
            }
            path.push(segments.len());
            let (first_page, positions) = (page_table.len(), seat.positions);
            segments.push(CachedSegment { first_page, positions, grows: true });
            page_table.extend_from_slice(seat.pages.numbers());
            paths.push(path);
        }
        // Rows of nobody see nothing.
        paths.resize(rows, Vec::new());
        let queries = paths.iter().enumerate().map(|(row, path)| PagedQuery { row, path, visible: 0 });
        let plan = planned(decoder, &segments, &queries.collect::<Vec<_>>())?;
        Ok(Self { plan, page_table })
    }
}

fn planned<T: Format>(
    decoder: &DeviceDecoder<T>,
    segments: &[CachedSegment],
    queries: &[PagedQuery],
) -> Result<PagedPlan> {
    let (config, properties) = (decoder.config(), decoder.device().properties());
    let group = config.heads / config.kv_heads;
    let cut = if decoder.is_batch_invariant() {
        Cut::Invariant
    } else {
        let items = (properties.multiprocessors * ITEMS_PER_MULTIPROCESSOR).div_ceil(config.kv_heads);
        Cut::filling(segments, queries, group, items)
    };
    PagedPlan::new(segments, queries, group, cut).map_err(|error| CudaError::Launch {
        kernel: "decode_attention".into(),
        reason: format!("{error}; {}", error.hint()),
    })
}

/// Rows that are one token each and see what is in pages of the format `S`.
struct FromPages<'a, T, S> {
    decoder: &'a DeviceDecoder<T>,
    tables: &'a PagedTables,
    page_table: &'a Buffer<u32>,
    slots: Slice<'a, i32>,
    lengths: Slice<'a, u32>,
    cache: &'a mut Cache<S>,
    statistics: &'a mut Buffer<f32>,
    partials: &'a mut Buffer<f32>,
}

impl<T: Format, S: PageFormat<T>> Attend<T> for FromPages<'_, T, S> {
    fn attend(
        &mut self,
        layer: usize,
        rotary: &Rotary<T>,
        before: Option<Slice<T>>,
        qkv: &mut Buffer<T>,
        attended: &mut Buffer<T>,
    ) -> Result<()> {
        let pages = &mut self.cache.layers[layer];
        // SAFETY: slots are those of pages that came from the cache's pool, at first and as the page table of the replies
        // has them.
        unsafe { S::turn_and_keep(self.decoder, rotary, before, qkv, self.slots, pages)? };
        let inputs = PagedInputs {
            queries: Slice::from(&*qkv),
            stride: self.decoder.config().qkv_width(),
            keys: Slice::from(&pages.keys),
            values: Slice::from(&pages.values),
            scales: S::SCALED.then(|| (Slice::from(&pages.key_scales), Slice::from(&pages.value_scales))),
            page_table: self.page_table.into(),
            lengths: self.lengths,
        };
        let (statistics, partials) = (&mut (&mut *self.statistics).into(), &mut (&mut *self.partials).into());
        let attention = self.decoder.attention();
        // SAFETY: the plan was made for these rows and this table, whose pages came from the cache's pool.
        unsafe { attention.paged(self.tables, &inputs, statistics, partials, &mut SliceMut::from(attended)) }
    }
}

/// What of a step is made anew when other replies take part; the graph keeps it.
struct Step<T> {
    tables: PagedTables,
    page_table: Buffer<u32>,
    statistics: Buffer<f32>,
    partials: Buffer<f32>,
    /// For each reply, tokens before it and pages of its own.
    starts: Buffer<u32>,
    reply_pages: Buffer<u32>,
    numbers: Indices,
    x: Buffer<f32>,
    work: crate::model::device::Work<T>,
    states: Buffer<T>,
    logits: Buffer<f32>,
    /// Above all positions.
    positions: usize,
}

impl<T: Format> Step<T> {
    fn new(
        decoder: &DeviceDecoder<T>,
        seats: &[Seat],
        rows: usize,
        pages_per_reply: usize,
        capacity: usize,
    ) -> Result<Self> {
        let (device, config) = (decoder.device(), decoder.config());
        let Reading { plan, page_table } = Reading::new(decoder, seats, rows)?;
        let tables = PagedTables::upload(device, &plan)?;
        let geometry = config.geometry();
        let mut reply_pages = vec![0; rows * pages_per_reply];
        for (own, seat) in reply_pages.chunks_mut(pages_per_reply).zip(seats) {
            let pages = seat.pages.numbers();
            own[..pages.len()].copy_from_slice(pages);
        }
        let starts = of_rows(seats, rows, |seat| seat.start as u32, 0);
        let numbers: Vec<u32> = (0..rows as u32).collect();
        Ok(Self {
            statistics: device.allocate("partial attention", tables.statistics(geometry))?,
            partials: device.allocate("partial attention", tables.values(geometry))?,
            tables,
            page_table: device.upload("pages of rows", &page_table)?,
            starts: device.upload("starts of replies", &starts)?,
            reply_pages: device.upload("pages of replies", &reply_pages)?,
            numbers: Indices::upload(device, "replies", &numbers)?,
            x: device.allocate("the residual stream", rows * config.hidden_size)?,
            work: decoder.work(rows)?,
            states: device.allocate("hidden states", rows * config.hidden_size)?,
            logits: device.allocate("logits", rows * config.vocab_size)?,
            positions: seats.iter().map(|seat| seat.start + capacity).max().unwrap_or(0),
        })
    }
}

/// The number of rows of a round with so many replies: one of few, at most twice as many and from 32 on at most half as many
/// again.
fn padded(replies: usize) -> usize {
    let above = replies.next_power_of_two();
    let between = above / 4 * 3;
    if above > 32 && replies <= between { between } else { above }
}

/// A value for the row of each reply, and `nobody` for the others.
fn of_rows<V: Copy>(seats: &[Seat], rows: usize, value: impl Fn(&Seat) -> V, nobody: V) -> Vec<V> {
    let mut values: Vec<V> = seats.iter().map(value).collect();
    values.resize(rows, nobody);
    values
}

/// The state of decoding on the device, for some replies side by side.
#[derive(Debug)]
pub(super) struct Decoding {
    settings: Settings,
    capacity: usize,
    padded: bool,
    pages_per_reply: usize,
    replies: Replies,
    drawn: Drawn,
    next: NextRows,
    end_tokens: Buffer<u32>,
    landings: Vec<Landing>,
}

impl Decoding {
    /// For replies of at most `capacity` tokens, as many and as far ahead of the host as the limits say.
    ///
    /// # Errors
    /// When the device has no room.
    pub(super) fn new(
        device: &Device,
        settings: Settings,
        end_tokens: &[u32],
        capacity: usize,
        &Limits { replies, lag, padded: is_padded, .. }: &Limits,
    ) -> Result<Self> {
        let rows = if is_padded { padded(replies) } else { replies };
        Ok(Self {
            settings,
            capacity,
            padded: is_padded,
            pages_per_reply: capacity.saturating_sub(1).div_ceil(PAGE).max(1),
            replies: Replies::new(device, rows)?,
            drawn: Drawn::new(device, rows)?,
            next: NextRows::new(device, rows)?,
            end_tokens: device.upload("end tokens", end_tokens)?,
            landings: (0..lag.max(1)).map(|_| Landing::new(device, rows)).collect::<Result<_>>()?,
        })
    }

    /// How many steps the device may be ahead.
    pub(super) fn lag(&self) -> usize {
        self.landings.len()
    }

    /// Records the step of these replies. It may be launched as often as there are positions for it.
    ///
    /// # Errors
    /// When the device has no room or has failed.
    pub(super) fn record<T: Format, S: PageFormat<T>>(
        &mut self,
        decoder: &DeviceDecoder<T>,
        cache: &mut Cache<S>,
        seats: &[Seat],
    ) -> Result<Graph> {
        let rows = if self.padded { padded(seats.len()) } else { seats.len() };
        self.seat(seats, rows)?;
        let mut step = Step::new(decoder, seats, rows, self.pages_per_reply, self.capacity)?;
        let angles = decoder.angles(step.positions)?;
        decoder.device().record(|| self.step(decoder, cache, &angles, &mut step))
    }

    /// Brings the replies' state to the device. Rows of nobody are replies that have ended: nothing is drawn for them, and
    /// they write nothing to the cache.
    fn seat(&mut self, seats: &[Seat], rows: usize) -> Result<()> {
        let of = |value: fn(&Seat) -> usize| of_rows(seats, rows, |seat| value(seat) as u32, 0);
        let slots = of_rows(seats, rows, |seat| seat.pages.slot(seat.length - 1), -1);
        let lengths = of(|seat| seat.length);
        let finishes = of_rows(seats, rows, |_| sampling::LIVE, sampling::STOPPED);
        self.replies.keys.slice_mut(..rows)?.upload(&of_rows(seats, rows, |seat| seat.key, 0))?;
        self.replies.lengths.slice_mut(..rows)?.upload(&lengths)?;
        self.replies.finishes.slice_mut(..rows)?.upload(&finishes)?;
        self.next.ids.slice_mut(..rows)?.upload(&of(|seat| seat.last as usize))?;
        self.next.positions.slice_mut(..rows)?.upload(&of(|seat| seat.start + seat.length - 1))?;
        self.next.slots.slice_mut(..rows)?.upload(&slots)?;
        self.next.lengths.slice_mut(..rows)?.upload(&lengths)
    }

    fn step<T: Format, S: PageFormat<T>>(
        &mut self,
        decoder: &DeviceDecoder<T>,
        cache: &mut Cache<S>,
        angles: &Buffer<f32>,
        step: &mut Step<T>,
    ) -> Result<()> {
        let (device, config, rows) = (decoder.device(), decoder.config(), step.numbers.len());
        // SAFETY: tokens come from rows of as many logits as the vocabulary has tokens.
        let ids = unsafe { IndexSlice::assume(self.next.ids.slice(..rows)?, config.vocab_size) };
        // SAFETY: a reply's positions are below its start and the most tokens that it may have.
        let positions = unsafe { IndexSlice::assume(self.next.positions.slice(..rows)?, step.positions) };
        let mut attend = FromPages {
            decoder,
            tables: &step.tables,
            page_table: &step.page_table,
            slots: self.next.slots.slice(..rows)?,
            lengths: self.next.lengths.slice(..rows)?,
            cache,
            statistics: &mut step.statistics,
            partials: &mut step.partials,
        };
        decoder.embed_into(ids, (&mut step.x).into())?;
        for layer in 0..config.layers {
            let rotary = decoder.rotary(layer, angles, positions)?;
            decoder.layer(layer, &rotary, &mut step.x, &mut step.work, &mut attend)?;
        }
        let x = Slice::from(&step.x).into();
        decoder.logits_into(x, rows, &mut step.states, &mut step.logits)?;
        self.draw_and_advance(device, config.vocab_size, step)
    }

    fn draw_and_advance<T: Format>(
        &mut self,
        device: &Device,
        vocabulary: usize,
        step: &Step<T>,
    ) -> Result<()> {
        let numbers = step.numbers.view();
        let rows =
            sampling::Rows { logits: Slice::from(&step.logits), vocabulary, sources: None, replies: numbers };
        sampling::sample(device, &self.settings, rows, &self.replies, &mut self.drawn)?;
        let bounds = Bounds {
            end_tokens: (&self.end_tokens).into(),
            starts: (&step.starts).into(),
            page_table: (&step.reply_pages).into(),
            pages_per_reply: self.pages_per_reply,
            capacity: self.capacity,
        };
        let (replies, next) = (&mut self.replies, &mut self.next);
        // SAFETY: a reply takes part only while it is shorter than the capacity.
        unsafe { sampling::advance(device, numbers, &self.drawn, bounds, replies, next) }
    }

    /// Launches a step, whose tokens [`Decoding::landed`] will have.
    ///
    /// # Errors
    /// When the device has failed.
    pub(super) fn launch(&mut self, graph: &Graph, number: usize) -> Result<()> {
        graph.launch()?;
        let lag = self.lag();
        self.landings[number % lag].copy(&self.drawn)
    }

    /// The tokens of a step, at most [`Decoding::lag`] behind the last that was launched.
    ///
    /// # Errors
    /// When the device has failed.
    pub(super) fn landed(&self, number: usize) -> Result<Vec<Draw>> {
        self.landings[number % self.lag()].draws()
    }
}

#[cfg(test)]
mod tests {
    use super::padded;
    use std::collections::BTreeSet;

    #[test]
    fn numbers_of_rows_are_few() {
        let numbers: BTreeSet<usize> = (1..=512).map(padded).collect();
        let expected = [1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512];
        assert!(numbers.iter().eq(&expected));
        for replies in 1..=512 {
            assert!(expected.iter().find(|number| **number >= replies) == Some(&padded(replies)));
        }
    }
}

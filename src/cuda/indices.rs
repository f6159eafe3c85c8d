//! Indices on the device, of which it is known here how far they reach.

use super::lengths::room;
use super::{Buffer, CudaError, Device, Result, Slice};
use std::ops::RangeBounds;

/// Indices on the device whose largest is known, so that what they point at can be checked before a launch.
#[derive(Debug)]
pub struct Indices {
    buffer: Buffer<u32>,
    below: usize,
}

impl Indices {
    /// Copies indices, which must be below 2^31.
    ///
    /// # Errors
    /// [`CudaError::Index`] for larger ones; as [`Device::upload`].
    pub fn upload(device: &Device, what: &'static str, values: &[u32]) -> Result<Self> {
        let below = values.iter().max().map_or(0, |largest| *largest as usize + 1);
        within(what, below, i32::MAX as usize + 1)?;
        Ok(Self { buffer: device.upload(what, values)?, below })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.buffer.is_empty()
    }

    /// All of them.
    pub fn view(&self) -> IndexSlice<'_> {
        IndexSlice { slice: Slice::from(&self.buffer), below: self.below }
    }
}

/// Some indices on the device, all of which are below a known number.
#[derive(Clone, Copy, Debug)]
pub struct IndexSlice<'a> {
    slice: Slice<'a, u32>,
    below: usize,
}

impl<'a> From<&'a Indices> for IndexSlice<'a> {
    fn from(indices: &'a Indices) -> Self {
        indices.view()
    }
}
impl<'a> From<IndexSlice<'a>> for Slice<'a, u32> {
    fn from(indices: IndexSlice<'a>) -> Self {
        indices.slice
    }
}

impl<'a> IndexSlice<'a> {
    /// Indices that kernels write.
    ///
    /// # Safety
    /// All values must be below `below`, also those that kernels write there later, and `below` at most 2^31.
    pub unsafe fn assume(slice: Slice<'a, u32>, below: usize) -> Self {
        Self { slice, below }
    }

    /// A part of them.
    ///
    /// # Errors
    /// [`CudaError::Length`] when it does not lie within.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Result<Self> {
        Ok(Self { slice: self.slice.slice(range)?, below: self.below })
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.slice.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.slice.is_empty()
    }

    /// What all of them are below; 0 when that of no index is known.
    pub fn below(&self) -> usize {
        self.below
    }

    /// Whether each of them names one of `count` things.
    pub(super) fn check(&self, what: &'static str, count: usize) -> Result<()> {
        within(what, self.below, count)
    }
}

fn within(what: &'static str, below: usize, count: usize) -> Result<()> {
    if below <= count { Ok(()) } else { Err(CudaError::Index { what, index: below - 1, count }) }
}

/// Whether `rows` rows of `columns`, those at `places` or the first ones, lie within so many elements.
pub(super) fn check_rows(
    what: &'static str,
    places: Option<IndexSlice>,
    rows: usize,
    columns: usize,
    elements: usize,
) -> Result<()> {
    let Some(places) = places else { return room(what, rows.saturating_mul(columns), elements) };
    room("places of rows", rows, places.len())?;
    places.check(what, elements / columns.max(1))
}

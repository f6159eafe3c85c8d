//! Keys and values on the device, in pages of sixteen positions that return to their pool when nobody needs them.

use super::format::PageFormat;
use crate::cuda::paged::PAGE;
use crate::cuda::{Buffer, CudaError, Result};
use crate::model::DecoderConfig;
use crate::model::device::{DeviceDecoder, Format};
use std::cell::RefCell;
use std::rc::Rc;

/// Numbers of pages that nobody holds.
#[derive(Debug)]
pub(super) struct Pool {
    free: RefCell<Vec<u32>>,
    total: usize,
    page_bytes: usize,
}

impl Pool {
    fn new(total: usize, page_bytes: usize) -> Rc<Self> {
        Rc::new(Self { free: RefCell::new((0..total as u32).rev().collect()), total, page_bytes })
    }

    /// All pages.
    pub(super) fn total(&self) -> usize {
        self.total
    }

    /// Bytes of all pages.
    pub(super) fn bytes(&self) -> usize {
        self.total * self.page_bytes
    }

    /// Pages that nobody holds.
    pub(super) fn free(&self) -> usize {
        self.free.borrow().len()
    }

    /// Some pages.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] when there are fewer.
    pub(super) fn take(self: &Rc<Self>, count: usize) -> Result<Pages> {
        let mut pages = Pages { numbers: Vec::new(), pool: Rc::clone(self) };
        pages.grow_to(count)?;
        Ok(pages)
    }
}

/// Pages with one holder.
#[derive(Debug)]
pub(super) struct Pages {
    numbers: Vec<u32>,
    pool: Rc<Pool>,
}

impl Pages {
    /// Takes more, unless there are so many already.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] when the pool has fewer.
    pub(super) fn grow_to(&mut self, count: usize) -> Result<()> {
        let more = count.saturating_sub(self.numbers.len());
        let mut free = self.pool.free.borrow_mut();
        let Some(left) = free.len().checked_sub(more) else {
            let bytes = |pages: usize| pages.saturating_mul(self.pool.page_bytes);
            return Err(CudaError::OutOfMemory {
                what: "keys and values",
                requested: bytes(more),
                free: bytes(free.len()),
                total: bytes(self.pool.total),
            });
        };
        self.numbers.extend(free.drain(left..).rev());
        Ok(())
    }

    /// Their numbers.
    pub(super) fn numbers(&self) -> &[u32] {
        &self.numbers
    }

    /// Where a position lies: page x 16 + lane.
    pub(super) fn slot(&self, at: usize) -> i32 {
        self.numbers[at / PAGE] as i32 * PAGE as i32 + (at % PAGE) as i32
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        self.pool.free.borrow_mut().extend(self.numbers.drain(..).rev());
    }
}

/// Cached tokens that continue others. Whoever continues them keeps them.
#[derive(Debug)]
pub(super) struct CachedTokens {
    /// No other has it.
    pub(super) number: usize,
    /// What they continue.
    pub(super) parent: Option<Rc<Self>>,
    /// How many they are.
    pub(super) length: usize,
    /// Where they are.
    pub(super) pages: Pages,
}

impl CachedTokens {
    /// What leads here, root first, this included.
    pub(super) fn path(&self) -> Vec<&Self> {
        let mut path = Vec::new();
        let mut next = Some(self);
        while let Some(tokens) = next {
            if tokens.length > 0 {
                path.push(tokens);
            }
            next = tokens.parent.as_deref();
        }
        path.reverse();
        path
    }
}

/// Keys and values of one layer in the format `S`: pages of `[kv_heads, 16, head_dim]`.
#[derive(Debug)]
pub(super) struct LayerPages<S> {
    pub(super) keys: Buffer<S>,
    pub(super) values: Buffer<S>,
    /// `[pages, kv_heads]`, or nothing where the format has no scales.
    pub(super) key_scales: Buffer<f32>,
    /// As those of the keys.
    pub(super) value_scales: Buffer<f32>,
}

/// Keys and values of all layers.
#[derive(Debug)]
pub(super) struct Cache<S> {
    pub(super) layers: Vec<LayerPages<S>>,
    pub(super) pool: Rc<Pool>,
    segments: usize,
}

impl<S> Cache<S> {
    /// A cache of so many pages.
    ///
    /// # Errors
    /// When the device has no room for it.
    pub(super) fn new<T: Format>(decoder: &DeviceDecoder<T>, pages: usize) -> Result<Self>
    where
        S: PageFormat<T>,
    {
        let (config, device) = (decoder.config(), decoder.device());
        let numbers = || device.allocate("keys and values", pages.saturating_mul(page_elements(config)));
        let scales = || {
            device.allocate("scales of keys and values", pages.saturating_mul(page_scales::<T, S>(config)))
        };
        let layer = |_| {
            let (keys, values) = (numbers()?, numbers()?);
            Ok(LayerPages { keys, values, key_scales: scales()?, value_scales: scales()? })
        };
        Ok(Self {
            layers: (0..config.layers).map(layer).collect::<Result<_>>()?,
            pool: Pool::new(pages, page_bytes::<T, S>(config)),
            segments: 0,
        })
    }

    /// Room for tokens that continue others.
    ///
    /// # Errors
    /// When there are not enough pages.
    pub(super) fn insert(
        &mut self,
        parent: Option<Rc<CachedTokens>>,
        length: usize,
    ) -> Result<Rc<CachedTokens>> {
        let pages = self.pool.take(length.div_ceil(PAGE))?;
        self.segments += 1;
        Ok(Rc::new(CachedTokens { number: self.segments, parent, length, pages }))
    }
}

fn page_elements(config: &DecoderConfig) -> usize {
    config.kv_heads * PAGE * config.head_dim
}

fn page_scales<T: Format, S: PageFormat<T>>(config: &DecoderConfig) -> usize {
    if S::SCALED { config.kv_heads } else { 0 }
}

/// Bytes of a page in all layers.
pub(super) fn page_bytes<T: Format, S: PageFormat<T>>(config: &DecoderConfig) -> usize {
    let numbers = page_elements(config) * size_of::<S>();
    2 * config.layers * (numbers + page_scales::<T, S>(config) * size_of::<f32>())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::config::ScratchModel;
    use half::bf16;

    #[test]
    fn pages_of_eight_bits_take_half_of_those_of_sixteen_and_their_scales() {
        let shape = serde_json::json!({
            "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2,
        });
        let scratch: ScratchModel = serde_json::from_value(shape).unwrap();
        let config = DecoderConfig::from_scratch(&scratch, 10);
        let (narrow, wide) = (page_bytes::<bf16, u8>(&config), page_bytes::<bf16, bf16>(&config));
        assert_eq!(wide, 3 * 2 * 2 * 16 * 16 * 2);
        assert_eq!(narrow, wide / 2 + 3 * 2 * 2 * 4);
    }

    #[test]
    fn pages_come_back_when_the_last_that_continues_them_goes() {
        let pool = Pool::new(10, 1);
        let tokens = |number, parent: Option<&Rc<CachedTokens>>, length: usize| {
            let pages = pool.take(length.div_ceil(PAGE)).unwrap();
            Rc::new(CachedTokens { number, parent: parent.cloned(), length, pages })
        };
        let trunk = tokens(1, None, 40);
        let (left, right) = (tokens(2, Some(&trunk), 0), tokens(3, Some(&trunk), 17));
        drop(trunk);
        assert_eq!(pool.free(), 5);
        assert_eq!(right.path().iter().map(|tokens| tokens.number).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(left.path().len(), 1, "empty segments are no part of a path");
        assert_eq!((right.pages.slot(0), right.pages.slot(16)), (3 * 16, 4 * 16));
        drop(right);
        assert_eq!(pool.free(), 7);
        drop(left);
        assert_eq!(pool.free(), 10);
        let mut all = pool.take(4).unwrap();
        all.grow_to(2).unwrap();
        assert_eq!(all.numbers().len(), 4);
        assert!(all.grow_to(11).unwrap_err().is_out_of_memory());
        all.grow_to(10).unwrap();
        let mut numbers = all.numbers().to_vec();
        numbers.sort_unstable();
        assert_eq!(numbers, (0..10).collect::<Vec<_>>());
    }
}

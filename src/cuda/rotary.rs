//! What happens to queries, keys and values between their projection and attention: bias, norm of each head, rotation by
//! position, and the way into the pages of the cache; and back.
//!
//! Rows are fused: `[rows, (heads + 2 kv_heads) x head_dim]`, queries first, then keys, then values.

use super::gemm::{Element, gradient_suffix};
use super::lengths::{refuse, room, same_length, side};
use super::{Device, IndexSlice, Launch, Result, Shape, Slice, SliceMut, reduce};
use crate::kernels::attention::Geometry;

const THREADS: usize = 256;
/// Rows whose gradients of the norms' weights one block of the backward pass adds up.
const ROWS: usize = 16;
/// The largest head that there are kernels for.
const LARGEST_HEAD: usize = 256;

/// What is done to the fused rows at some positions.
#[derive(Clone, Copy, Debug)]
pub struct Rotary<'a, T> {
    /// The heads; their size is a multiple of 8 up to 256.
    pub geometry: Geometry,
    /// What is added to every row at first.
    pub bias: Option<Slice<'a, T>>,
    /// The weights of the norms of the queries' and of the keys' heads, `head_dim` each.
    pub norms: Option<(Slice<'a, T>, Slice<'a, T>)>,
    /// What the norms add to the mean of squares.
    pub epsilon: f32,
    /// For each position `head_dim / 2` cosines and as many sines.
    pub angles: Slice<'a, f32>,
    /// The position of each row.
    pub positions: IndexSlice<'a>,
}

/// Where keys and values go besides.
#[derive(Debug)]
pub struct PageWrites<'a, T> {
    /// For each row page x 16 + lane, or a negative number for none.
    pub slots: Slice<'a, i32>,
    /// Pages of `[kv_heads, 16, head_dim]`.
    pub keys: SliceMut<'a, T>,
    /// As the keys.
    pub values: SliceMut<'a, T>,
}

impl<T: Element> Rotary<'_, T> {
    /// out = rotated(normalised(from + bias)); where `from` is missing `out` holds it.
    ///
    /// # Errors
    /// When lengths or positions do not fit, or the device has failed.
    pub fn forward(&self, device: &Device, from: Option<Slice<T>>, out: SliceMut<T>) -> Result<()> {
        // SAFETY: there are no pages.
        unsafe { self.launch_forward(device, from, out, None) }
    }

    /// As [`Rotary::forward`]; keys and values are written to pages too.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Safety
    /// All slots must lie within the pages, also those that kernels write later where this is recorded.
    pub unsafe fn forward_into_pages(
        &self,
        device: &Device,
        from: Option<Slice<T>>,
        out: SliceMut<T>,
        pages: PageWrites<T>,
    ) -> Result<()> {
        room("slots of keys and values", self.positions.len(), pages.slots.len())?;
        // SAFETY: as this function's.
        unsafe { self.launch_forward(device, from, out, Some(pages)) }
    }

    /// # Safety
    /// Where there are pages, each row has a slot, which lies within them.
    unsafe fn launch_forward(
        &self,
        device: &Device,
        from: Option<Slice<T>>,
        out: SliceMut<T>,
        pages: Option<PageWrites<T>>,
    ) -> Result<()> {
        let name = format!("rotary_forward_{}", T::NAME);
        let elements = self.check(&name)?;
        room("rotated rows", elements, out.len())?;
        from.map_or(Ok(()), |from| room("rows to rotate", elements, from.len()))?;
        let (slots, keys, values) = match pages {
            Some(pages) => (Some(pages.slots), Some(pages.keys), Some(pages.values)),
            None => (None, None, None),
        };
        let lanes = (self.geometry.head_dim / 8).next_power_of_two();
        let heads = elements / self.geometry.head_dim;
        side(&name, heads)?;
        let kernel = device.kernel(&name)?;
        let launch = kernel.with(Shape::of(heads.div_ceil(THREADS / lanes), THREADS)).read_optional(from);
        let (query_norm, key_norm) = self.norms.unzip();
        let launch = launch.read_optional(self.bias).read_optional(query_norm).read_optional(key_norm);
        let launch = launch.value(self.epsilon).read(self.angles).read(self.positions).read_optional(slots);
        let launch = launch.write(out).write_optional(keys).write_optional(values);
        let sizes = self.sizes(&name)?;
        // SAFETY: the parameters are those of the kernel; lengths and positions were checked, and slots are the caller's
        // promise.
        unsafe { sizes.into_iter().fold(launch, Launch::value).launch() }
    }

    /// The gradient of the forward pass's `from`, from that of its `out`. With norms `before` is that `from`, and the
    /// gradients of both weights are added to `grad_norms` of 2 `head_dim` elements where that is given. The gradient of
    /// the bias is `grad` summed over rows.
    ///
    /// # Errors
    /// When lengths or positions do not fit, norms lack `before` or `grad_norms` lacks norms, memory does not suffice, or
    /// the device has failed.
    pub fn backward<G: Element>(
        &self,
        device: &Device,
        grad_out: Slice<G>,
        before: Option<Slice<T>>,
        grad: SliceMut<T>,
        grad_norms: Option<SliceMut<f32>>,
    ) -> Result<()> {
        let name = format!("rotary_backward_{}", gradient_suffix::<G, T>());
        let (elements, dim) = (self.check(&name)?, self.geometry.head_dim);
        room("gradients of rotated rows", elements, grad_out.len())?;
        room("gradients of rows to rotate", elements, grad.len())?;
        let before = before.filter(|_| self.norms.is_some());
        let normed = self.norms.map_or(0, |_| elements);
        room("rows before norm and rotation", normed, before.map_or(0, |before| before.len()))?;
        if let Some(gradients) = &grad_norms {
            same_length("gradients of the heads' norms", self.norms.map_or(0, |_| 2 * dim), gradients.len())?;
        }
        let blocks = self.positions.len().div_ceil(ROWS);
        let partial =
            self.norms.map(|_| device.allocate("partial sums of norms' gradients", blocks * 2 * dim));
        let mut partial = partial.transpose()?;
        let kernel = device.kernel(&name)?;
        let launch = kernel.with(Shape::of(blocks, THREADS)).read(grad_out).read_optional(before);
        let (query_norm, key_norm) = self.norms.unzip();
        let launch = launch.read_optional(self.bias).read_optional(query_norm).read_optional(key_norm);
        let launch = launch.value(self.epsilon).read(self.angles).read(self.positions).write(grad);
        let launch = launch.write_optional(partial.as_mut());
        let sizes = self.sizes(&name)?;
        // SAFETY: the parameters are those of the kernel; lengths and positions were checked.
        unsafe { sizes.into_iter().fold(launch, Launch::value).launch()? };
        match (partial, grad_norms) {
            (Some(partial), Some(target)) => reduce::add_partial_sums(device, (&partial).into(), target),
            _ => Ok(()),
        }
    }

    /// The elements of all rows, if everything fits.
    fn check(&self, kernel: &str) -> Result<usize> {
        let Geometry { heads, kv_heads, head_dim } = self.geometry;
        if heads == 0
            || kv_heads == 0
            || head_dim == 0
            || head_dim > LARGEST_HEAD
            || !head_dim.is_multiple_of(8)
        {
            let heads = format!("{heads} heads of {head_dim} elements for {kv_heads} key/value heads");
            return refuse(
                kernel,
                format!("{heads}: their size must be a multiple of 8 up to {LARGEST_HEAD}"),
            );
        }
        let units = heads.saturating_add(kv_heads.saturating_mul(2));
        let width = units.saturating_mul(head_dim);
        self.bias
            .map_or(Ok(()), |bias| same_length("bias of queries, keys and values", width, bias.len()))?;
        for weight in self.norms.iter().flat_map(|(queries, keys)| [queries, keys]) {
            same_length("weight of the heads' norm", head_dim, weight.len())?;
        }
        self.positions.check("positions of rows", self.angles.len() / head_dim)?;
        Ok(self.positions.len().saturating_mul(width))
    }

    fn sizes(&self, kernel: &str) -> Result<[i32; 4]> {
        let Geometry { heads, kv_heads, head_dim } = self.geometry;
        let side = |size| side(kernel, size);
        Ok([side(self.positions.len())?, side(heads)?, side(kv_heads)?, side(head_dim)?])
    }
}

//! Typed memory on the device, and page-locked memory on the host for copies that run beside the caller.

use super::device::{Context, Device, check, handle, locked};
use super::error::{CudaError, Result};
use super::event::Event;
use super::lengths::same_length;
use cudarc::driver::sys::{self, CUresult};
use std::any::TypeId;
use std::marker::PhantomData;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex};
use std::{ptr, slice};

mod sealed {
    pub trait Sealed {}
}

/// A number that memory of a device can hold: any bits are one.
pub trait Number: sealed::Sealed + Copy + Default + Send + Sync + 'static {}

macro_rules! numbers {
    ($($number:ty),*) => {$(
        impl sealed::Sealed for $number {}
        impl Number for $number {}
    )*};
}
numbers!(u8, u16, i32, u32, i64, u64, f32, half::bf16);

/// Bytes on the device, released in the order of its work.
#[derive(Debug)]
pub(super) struct Allocation {
    context: Arc<Context>,
    pointer: sys::CUdeviceptr,
}

impl Allocation {
    fn new(device: &Device, what: &'static str, bytes: usize) -> Result<Self> {
        let context = Arc::clone(&device.context);
        context.refuse_recording("an allocation")?;
        context.make_current()?;
        let ask = || {
            let mut pointer = 0;
            // SAFETY: `pointer` is writable, the stream lives as long as the context.
            let status = unsafe { sys::cuMemAllocAsync(&raw mut pointer, bytes.max(1), context.stream()) };
            (status, pointer)
        };
        let (mut status, mut pointer) = ask();
        if status == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            context.trim()?;
            (status, pointer) = ask();
        }
        if status == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let memory = context.memory()?;
            return Err(CudaError::OutOfMemory {
                what,
                requested: bytes,
                free: memory.free,
                total: memory.total,
            });
        }
        context.check("cuMemAllocAsync", status)?;
        Ok(Self { context, pointer })
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if let Some(recording) = self.context.recording().as_mut() {
            recording.release_later(self.pointer);
        } else {
            self.context.release(self.pointer);
        }
    }
}

impl Context {
    /// Releases memory once the work that was asked for before has been done.
    pub(super) fn release(&self, pointer: sys::CUdeviceptr) {
        if self.make_current().is_ok() {
            // SAFETY: allocated on this stream or one that it has waited for, and released once. Failure means that the context
            // is lost with its memory.
            let _ = unsafe { sys::cuMemFreeAsync(pointer, self.stream()) };
        }
    }
}

/// Numbers on a device.
#[derive(Debug)]
pub struct Buffer<T> {
    allocation: Arc<Allocation>,
    count: usize,
    element: PhantomData<T>,
}

impl Device {
    /// Memory for `count` numbers with whatever bits are there. `what` names it when there is not enough.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`]; while a graph is recorded; when the device has failed.
    pub fn allocate<T: Number>(&self, what: &'static str, count: usize) -> Result<Buffer<T>> {
        let Some(bytes) = count.checked_mul(size_of::<T>()) else {
            let total = self.memory()?.total;
            return Err(CudaError::OutOfMemory { what, requested: usize::MAX, free: total, total });
        };
        let allocation = Arc::new(Allocation::new(self, what, bytes)?);
        Ok(Buffer { allocation, count, element: PhantomData })
    }

    /// As [`Device::allocate`], of zeros.
    ///
    /// # Errors
    /// As there.
    pub fn zeroed<T: Number>(&self, what: &'static str, count: usize) -> Result<Buffer<T>> {
        let mut buffer = self.allocate(what, count)?;
        buffer.slice_all_mut().fill_with_zeros()?;
        Ok(buffer)
    }

    /// A copy of `values` on the device.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn upload<T: Number>(&self, what: &'static str, values: &[T]) -> Result<Buffer<T>> {
        let mut buffer = self.allocate(what, values.len())?;
        buffer.upload(values)?;
        Ok(buffer)
    }
}

impl<T: Number> Buffer<T> {
    /// How many numbers there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// A part of it to read.
    ///
    /// # Errors
    /// [`CudaError::Length`] when it does not lie within.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Result<Slice<'_, T>> {
        let (start, count) = place(range, self.count)?;
        Ok(Slice { allocation: &self.allocation, start, count, element: PhantomData })
    }

    /// A part of it to read and write.
    ///
    /// # Errors
    /// [`CudaError::Length`] when it does not lie within.
    pub fn slice_mut(&mut self, range: impl RangeBounds<usize>) -> Result<SliceMut<'_, T>> {
        let (start, count) = place(range, self.count)?;
        Ok(SliceMut { allocation: &self.allocation, start, count, element: PhantomData })
    }

    fn slice_all_mut(&mut self) -> SliceMut<'_, T> {
        SliceMut { allocation: &self.allocation, start: 0, count: self.count, element: PhantomData }
    }

    /// Replaces all numbers by `values`; returns when `values` may be changed.
    ///
    /// # Errors
    /// When the lengths differ, while a graph is recorded, or when the device has failed.
    pub fn upload(&mut self, values: &[T]) -> Result<()> {
        self.slice_all_mut().upload(values)
    }

    /// All numbers, after all work that was asked for before.
    ///
    /// # Errors
    /// While a graph is recorded, or when the device has failed.
    pub fn download(&self) -> Result<Vec<T>> {
        Slice::from(self).download()
    }
}

/// A part of a [`Buffer`] to read.
#[derive(Debug)]
pub struct Slice<'a, T> {
    pub(super) allocation: &'a Arc<Allocation>,
    start: usize,
    count: usize,
    element: PhantomData<&'a T>,
}

impl<T> Clone for Slice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Slice<'_, T> {}

/// A part of a [`Buffer`] to read and write.
#[derive(Debug)]
pub struct SliceMut<'a, T> {
    pub(super) allocation: &'a Arc<Allocation>,
    start: usize,
    count: usize,
    element: PhantomData<&'a mut T>,
}

impl<'a, T: Number> From<&'a Buffer<T>> for Slice<'a, T> {
    fn from(buffer: &'a Buffer<T>) -> Self {
        Self { allocation: &buffer.allocation, start: 0, count: buffer.count, element: PhantomData }
    }
}
impl<'a, T: Number> From<&'a SliceMut<'_, T>> for Slice<'a, T> {
    fn from(slice: &'a SliceMut<'_, T>) -> Self {
        Self { allocation: slice.allocation, start: slice.start, count: slice.count, element: PhantomData }
    }
}
impl<'a, T: Number> From<&'a mut Buffer<T>> for SliceMut<'a, T> {
    fn from(buffer: &'a mut Buffer<T>) -> Self {
        buffer.slice_all_mut()
    }
}
impl<'a, T: Number> From<&'a mut SliceMut<'_, T>> for SliceMut<'a, T> {
    fn from(slice: &'a mut SliceMut<'_, T>) -> Self {
        Self { allocation: slice.allocation, start: slice.start, count: slice.count, element: PhantomData }
    }
}

impl<'a, T: Number> Slice<'a, T> {
    /// How many numbers there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// A part of it.
    ///
    /// # Errors
    /// [`CudaError::Length`] when it does not lie within.
    pub fn slice(&self, range: impl RangeBounds<usize>) -> Result<Slice<'a, T>> {
        let (start, count) = place(range, self.count)?;
        Ok(Slice { start: self.start + start, count, ..*self })
    }

    /// The same where `U` is the type that these numbers have.
    pub(super) fn typed<U: Number>(&self) -> Option<Slice<'a, U>> {
        let Self { allocation, start, count, .. } = *self;
        (TypeId::of::<T>() == TypeId::of::<U>()).then_some(Slice {
            allocation,
            start,
            count,
            element: PhantomData,
        })
    }

    /// The address on the device.
    pub fn address(&self) -> u64 {
        self.allocation.pointer + (self.start * size_of::<T>()) as u64
    }

    /// All numbers, after all work that was asked for before.
    ///
    /// # Errors
    /// While a graph is recorded, or when the device has failed.
    pub fn download(&self) -> Result<Vec<T>> {
        let context = &self.allocation.context;
        context.refuse_recording("a copy into plain memory of the host")?;
        let mut values = vec![T::default(); self.count];
        self.copy_to_host(values.as_mut_ptr())?;
        context.wait()?;
        Ok(values)
    }

    /// Copies to page-locked memory beside the caller; [`Pinned::read`] waits for it.
    ///
    /// # Errors
    /// When the lengths differ, or when the device has failed.
    pub fn download_to(&self, pinned: &mut Pinned<T>) -> Result<()> {
        same_length("a copy from the device", pinned.len(), self.count)?;
        self.copy_to_host(pinned.memory.pointer.cast())?;
        pinned.in_use(&self.allocation.context, self.allocation)
    }

    fn copy_to_host(&self, to: *mut T) -> Result<()> {
        let context = &self.allocation.context;
        context.make_current()?;
        if self.count == 0 {
            return Ok(());
        }
        let bytes = self.count * size_of::<T>();
        // SAFETY: the slice lies within its allocation, `to` has room for it and stays until the copy is done: the
        // callers wait for it, or keep the page-locked memory.
        let status = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), self.address(), bytes, context.stream()) };
        context.check("cuMemcpyDtoHAsync", status)
    }
}

impl<T: Number> SliceMut<'_, T> {
    /// How many numbers there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The address on the device.
    pub fn address(&self) -> u64 {
        Slice::from(self).address()
    }

    /// The numbers before `middle`, and the others.
    ///
    /// # Errors
    /// [`CudaError::Length`] when there are fewer.
    pub fn split_at(&mut self, middle: usize) -> Result<(SliceMut<'_, T>, SliceMut<'_, T>)> {
        place(..middle, self.count)?;
        let part =
            |start, count| SliceMut { allocation: self.allocation, start, count, element: PhantomData };
        Ok((part(self.start, middle), part(self.start + middle, self.count - middle)))
    }

    /// Replaces all numbers by zeros.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn fill_with_zeros(&mut self) -> Result<()> {
        let context = &self.allocation.context;
        context.make_current()?;
        if self.count == 0 {
            return Ok(());
        }
        let bytes = self.count * size_of::<T>();
        // SAFETY: the slice lies within its allocation.
        let status = unsafe { sys::cuMemsetD8Async(self.address(), 0, bytes, context.stream()) };
        context.check("cuMemsetD8Async", status)?;
        context.keep(self.allocation);
        Ok(())
    }

    /// Replaces all numbers by `values`; returns when `values` may be changed.
    ///
    /// # Errors
    /// When the lengths differ, while a graph is recorded, or when the device has failed.
    pub fn upload(&mut self, values: &[T]) -> Result<()> {
        let context = &self.allocation.context;
        context.refuse_recording("a copy from plain memory of the host")?;
        same_length("a copy to the device", self.count, values.len())?;
        self.copy_from_host(values.as_ptr())?;
        context.wait()
    }

    /// Copies from page-locked memory beside the caller; [`Pinned::write`] waits for it.
    ///
    /// # Errors
    /// When the lengths differ, or when the device has failed.
    pub fn upload_from(&mut self, pinned: &Pinned<T>) -> Result<()> {
        same_length("a copy to the device", self.count, pinned.len())?;
        self.copy_from_host(pinned.memory.pointer.cast())?;
        pinned.in_use(&self.allocation.context, self.allocation)
    }

    fn copy_from_host(&mut self, from: *const T) -> Result<()> {
        let context = &self.allocation.context;
        context.make_current()?;
        if self.count == 0 {
            return Ok(());
        }
        let bytes = self.count * size_of::<T>();
        // SAFETY: as for `Slice::copy_to_host`.
        let status =
            unsafe { sys::cuMemcpyHtoDAsync_v2(self.address(), from.cast(), bytes, context.stream()) };
        context.check("cuMemcpyHtoDAsync", status)
    }

    /// Replaces all numbers by those of `from`, which may overlap.
    ///
    /// # Errors
    /// When the lengths differ, or when the device has failed.
    pub fn copy_from<'b>(&mut self, from: impl Into<Slice<'b, T>>) -> Result<()> {
        let from = from.into();
        same_length("a copy on the device", self.count, from.count)?;
        let context = &self.allocation.context;
        context.make_current()?;
        if self.count == 0 {
            return Ok(());
        }
        let bytes = self.count * size_of::<T>();
        // SAFETY: both slices lie within their allocations.
        let status =
            unsafe { sys::cuMemcpyDtoDAsync_v2(self.address(), from.address(), bytes, context.stream()) };
        context.check("cuMemcpyDtoDAsync", status)?;
        context.keep(self.allocation);
        context.keep(from.allocation);
        Ok(())
    }
}

impl Context {
    /// A recorded graph keeps the memory that it uses.
    pub(super) fn keep(&self, allocation: &Arc<Allocation>) {
        if let Some(recording) = self.recording().as_mut() {
            recording.keep(allocation);
        }
    }
}

/// Page-locked memory of the host: copies from and to it run beside the caller.
#[derive(Debug)]
pub struct Pinned<T> {
    memory: Arc<PinnedMemory>,
    count: usize,
    element: PhantomData<T>,
}

#[derive(Debug)]
pub(super) struct PinnedMemory {
    context: Arc<Context>,
    pointer: *mut u8,
    /// The last copy from or to it.
    last_use: Mutex<Event>,
}

// SAFETY: the memory is reached through `Pinned` alone, which borrows it as a slice does.
unsafe impl Send for PinnedMemory {}
// SAFETY: as above.
unsafe impl Sync for PinnedMemory {}

impl Device {
    /// Page-locked memory for `count` zeros.
    ///
    /// # Errors
    /// When the host cannot lock so much memory.
    pub fn pinned<T: Number>(&self, count: usize) -> Result<Pinned<T>> {
        self.context.refuse_recording("an allocation")?;
        self.context.make_current()?;
        let bytes = count.saturating_mul(size_of::<T>());
        let last_use = Mutex::new(self.event()?);
        let pointer = handle("cuMemHostAlloc", |pointer| {
            // SAFETY: `pointer` is writable, a context current.
            unsafe { sys::cuMemHostAlloc(pointer, bytes.max(1), 0) }
        })?
        .cast::<u8>();
        // SAFETY: just allocated with this size.
        unsafe { ptr::write_bytes(pointer, 0, bytes) };
        let memory = PinnedMemory { context: Arc::clone(&self.context), pointer, last_use };
        Ok(Pinned { memory: Arc::new(memory), count, element: PhantomData })
    }
}

impl<T: Number> Pinned<T> {
    /// How many numbers there are.
    pub fn len(&self) -> usize {
        self.count
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The numbers, once the last copy has been done.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn read(&self) -> Result<&[T]> {
        self.memory.wait()?;
        // SAFETY: `count` numbers were allocated and initialised; page-locked memory is aligned to a page; no copy is
        // under way, and starting one that writes needs `&mut self`.
        Ok(unsafe { slice::from_raw_parts(self.memory.pointer.cast(), self.count) })
    }

    /// The numbers, to be changed, once the last copy has been done.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn write(&mut self) -> Result<&mut [T]> {
        self.memory.wait()?;
        // SAFETY: as for `read`, and `self` is borrowed for as long as the slice.
        Ok(unsafe { slice::from_raw_parts_mut(self.memory.pointer.cast(), self.count) })
    }

    fn in_use(&self, context: &Arc<Context>, allocation: &Arc<Allocation>) -> Result<()> {
        if let Some(recording) = context.recording().as_mut() {
            recording.keep(allocation);
            recording.keep_pinned(&self.memory);
            return Ok(());
        }
        self.memory.mark()
    }
}

impl PinnedMemory {
    /// Work up to here may use it.
    pub(super) fn mark(&self) -> Result<()> {
        locked(&self.last_use).record()
    }

    fn wait(&self) -> Result<()> {
        self.context.refuse_recording("waiting for a copy")?;
        locked(&self.last_use).wait()
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        let waited = locked(&self.last_use).wait();
        if waited.is_ok() && self.context.make_current().is_ok() {
            // SAFETY: allocated by the driver, released once, no copy under way.
            let _ = check("cuMemFreeHost", unsafe { sys::cuMemFreeHost(self.pointer.cast()) });
        }
    }
}

/// Start and length of a range within `count` elements.
fn place(range: impl RangeBounds<usize>, count: usize) -> Result<(usize, usize)> {
    let start = match range.start_bound() {
        Bound::Included(start) => *start,
        Bound::Excluded(start) => start.saturating_add(1),
        Bound::Unbounded => 0,
    };
    let end = match range.end_bound() {
        Bound::Included(end) => end.saturating_add(1),
        Bound::Excluded(end) => *end,
        Bound::Unbounded => count,
    };
    if start <= end && end <= count {
        Ok((start, end - start))
    } else {
        Err(CudaError::Length { what: "a part of a buffer", expected: count, found: end.max(start) })
    }
}

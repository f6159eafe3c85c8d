//! Kernels by name, and their launches.

use super::buffer::{Allocation, Number, Slice, SliceMut};
use super::device::{Context, Device, check, handle, locked};
use super::error::{CudaError, Result};
use cudarc::driver::sys::{self, CUfunction_attribute_enum as Attribute, CUresult};
use std::collections::HashMap;
use std::ffi::CString;
use std::marker::PhantomData;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// What nvcc made of `src/cuda/kernels`, one fat binary for each file.
const BINARIES: &[&[u8]] = include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Dynamic shared memory that a kernel may have without being told so.
const SHARED_BYTES: usize = 48 << 10;

/// The kernels of this program on a device.
#[derive(Debug, Default)]
pub(super) struct Modules {
    loaded: Vec<sys::CUmodule>,
    functions: Mutex<HashMap<String, Arc<Function>>>,
}

impl Modules {
    /// Needs a current context.
    pub(super) fn load() -> Result<Self> {
        let mut modules = Self::default();
        for binary in BINARIES {
            let module = handle("cuModuleLoadData", |module| {
                // SAFETY: `module` is writable; a fat binary knows its own length.
                unsafe { sys::cuModuleLoadData(module, binary.as_ptr().cast()) }
            });
            modules.loaded.push(module.inspect_err(|_| modules.unload())?);
        }
        Ok(modules)
    }

    /// Needs a current context, and kernels are not to be used afterwards.
    pub(super) fn unload(&self) {
        for module in &self.loaded {
            // SAFETY: loaded by `load`, and unloaded when the context goes.
            let _ = unsafe { sys::cuModuleUnload(*module) };
        }
    }

    fn find(&self, name: &str) -> Result<Option<Arc<Function>>> {
        let mut functions = locked(&self.functions);
        if let Some(known) = functions.get(name) {
            return Ok(Some(Arc::clone(known)));
        }
        let Ok(symbol) = CString::new(name) else { return Ok(None) };
        for module in &self.loaded {
            let mut raw = ptr::null_mut();
            // SAFETY: `raw` is writable, the module is loaded and the name ends with a zero.
            let status = unsafe { sys::cuModuleGetFunction(&raw mut raw, *module, symbol.as_ptr()) };
            if status == CUresult::CUDA_ERROR_NOT_FOUND {
                continue;
            }
            check("cuModuleGetFunction", status)?;
            let function = Arc::new(Function::new(name, raw)?);
            functions.insert(name.to_owned(), Arc::clone(&function));
            return Ok(Some(function));
        }
        Ok(None)
    }
}

#[derive(Debug)]
struct Function {
    name: Arc<str>,
    raw: sys::CUfunction,
    parameter_bytes: Vec<usize>,
    thread_limit: usize,
    static_shared_bytes: usize,
    /// Dynamic shared memory that it may have.
    consented: AtomicUsize,
}

// SAFETY: the handle lives as long as its module, and the driver locks what concurrent calls share.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Function {
    fn new(name: &str, raw: sys::CUfunction) -> Result<Self> {
        // Now, not at the first launch, which may be a graph's.
        // SAFETY: the function was just found.
        check("cuFuncLoad", unsafe { sys::cuFuncLoad(raw) })?;
        let attribute = |attribute| {
            let value = handle("cuFuncGetAttribute", |value| {
                // SAFETY: `value` is writable, the function just found.
                unsafe { sys::cuFuncGetAttribute(value, attribute, raw) }
            });
            value.map(|value| value as usize)
        };
        Ok(Self {
            name: Arc::from(name),
            raw,
            parameter_bytes: parameter_bytes(raw)?,
            thread_limit: attribute(Attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            static_shared_bytes: attribute(Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            consented: AtomicUsize::new(SHARED_BYTES),
        })
    }

    fn refuse(&self, reason: String) -> CudaError {
        CudaError::Launch { kernel: self.name.to_string(), reason }
    }
}

/// The size of each parameter, as compiled.
fn parameter_bytes(function: sys::CUfunction) -> Result<Vec<usize>> {
    let mut sizes = Vec::new();
    loop {
        let (mut offset, mut bytes) = (0, 0);
        // SAFETY: both are writable, the function was just found.
        let status =
            unsafe { sys::cuFuncGetParamInfo(function, sizes.len(), &raw mut offset, &raw mut bytes) };
        if status == CUresult::CUDA_ERROR_INVALID_VALUE {
            return Ok(sizes);
        }
        check("cuFuncGetParamInfo", status)?;
        sizes.push(bytes);
    }
}

/// How many threads run a kernel, and the shared memory of each block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Blocks in x, y and z. With no blocks nothing is launched.
    pub blocks: [usize; 3],
    /// Threads of a block in x, y and z.
    pub threads: [usize; 3],
    /// Dynamic shared memory of a block in bytes.
    pub shared_bytes: usize,
}

impl Shape {
    /// One-dimensional, without dynamic shared memory.
    pub fn of(blocks: usize, threads: usize) -> Self {
        Self { blocks: [blocks, 1, 1], threads: [threads, 1, 1], shared_bytes: 0 }
    }

    /// With blocks in two dimensions.
    pub fn grid(x: usize, y: usize, threads: usize) -> Self {
        Self { blocks: [x, y, 1], ..Self::of(1, threads) }
    }

    /// With dynamic shared memory of so many bytes.
    #[must_use]
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared_bytes: bytes, ..self }
    }
}

/// A kernel on a device.
#[derive(Clone, Debug)]
pub struct Kernel {
    context: Arc<Context>,
    function: Arc<Function>,
}

impl Device {
    /// The kernel of this name.
    ///
    /// # Errors
    /// [`CudaError::NoKernel`].
    pub fn kernel(&self, name: &str) -> Result<Kernel> {
        self.context.make_current()?;
        let function = self.context.modules.find(name)?;
        let function = function.ok_or_else(|| CudaError::NoKernel { name: name.to_owned() })?;
        Ok(Kernel { context: Arc::clone(&self.context), function })
    }
}

impl Kernel {
    /// Begins a launch; parameters follow in the kernel's order.
    pub fn with(&self, shape: Shape) -> Launch<'_> {
        let (values, bytes, memory) = Default::default();
        Launch { kernel: self, shape, values, bytes, memory, borrowed: PhantomData }
    }

    /// The most threads that a block of it may have.
    pub fn thread_limit(&self) -> usize {
        self.function.thread_limit
    }
}

/// A value that is a kernel's parameter.
pub trait Value: Number {
    /// Its bits, the lowest first.
    fn bits(self) -> u64;
}

impl Value for i32 {
    fn bits(self) -> u64 {
        u64::from(self as u32)
    }
}
impl Value for u32 {
    fn bits(self) -> u64 {
        u64::from(self)
    }
}
impl Value for i64 {
    fn bits(self) -> u64 {
        self as u64
    }
}
impl Value for u64 {
    fn bits(self) -> u64 {
        self
    }
}
impl Value for f32 {
    fn bits(self) -> u64 {
        u64::from(self.to_bits())
    }
}

/// A launch under preparation. It borrows the memory that the kernel will use.
#[derive(Debug)]
#[must_use = "nothing happens before `launch`"]
pub struct Launch<'a> {
    kernel: &'a Kernel,
    shape: Shape,
    values: Vec<u64>,
    bytes: Vec<usize>,
    memory: Vec<&'a Arc<Allocation>>,
    borrowed: PhantomData<&'a mut ()>,
}

impl<'a> Launch<'a> {
    /// A pointer to memory that the kernel reads.
    pub fn read<T: Number>(mut self, slice: impl Into<Slice<'a, T>>) -> Self {
        let slice = slice.into();
        self.memory.push(slice.allocation);
        self.push(slice.address(), 8)
    }

    /// A pointer to memory that the kernel writes, or reads and writes.
    pub fn write<T: Number>(mut self, slice: impl Into<SliceMut<'a, T>>) -> Self {
        let slice = slice.into();
        self.memory.push(slice.allocation);
        self.push(slice.address(), 8)
    }

    /// As [`Launch::read`], or a null pointer.
    pub fn read_optional<T: Number>(self, slice: Option<impl Into<Slice<'a, T>>>) -> Self {
        match slice {
            Some(slice) => self.read(slice),
            None => self.missing(),
        }
    }

    /// As [`Launch::write`], or a null pointer.
    pub fn write_optional<T: Number>(self, slice: Option<impl Into<SliceMut<'a, T>>>) -> Self {
        match slice {
            Some(slice) => self.write(slice),
            None => self.missing(),
        }
    }

    /// A null pointer, where the kernel takes memory that may be missing.
    pub fn missing(self) -> Self {
        self.push(0, 8)
    }

    /// A number.
    pub fn value<V: Value>(self, value: V) -> Self {
        self.push(value.bits(), size_of::<V>())
    }

    fn push(mut self, value: u64, bytes: usize) -> Self {
        self.values.push(value);
        self.bytes.push(bytes);
        self
    }

    /// Asks the device to run the kernel, or records it for a graph.
    ///
    /// # Errors
    /// [`CudaError::Launch`] when shape or parameters cannot be right; when the device has failed.
    ///
    /// # Safety
    /// The parameters must be those that the kernel's source asks for, in order and type, and the kernel must stay within
    /// the memory that they name. Their number and sizes are checked.
    pub unsafe fn launch(mut self) -> Result<()> {
        let function = &self.kernel.function;
        self.check_parameters()?;
        if self.shape.blocks.contains(&0) {
            return Ok(());
        }
        self.check_shape()?;
        let context = &self.kernel.context;
        context.make_current()?;
        self.consent()?;
        let mut parameters: Vec<_> =
            self.values.iter_mut().map(|value| ptr::from_mut(value).cast()).collect();
        let ([x, y, z], [i, j, k]) =
            (self.shape.blocks.map(|n| n as u32), self.shape.threads.map(|n| n as u32));
        let shared = self.shape.shared_bytes as u32;
        *locked(&context.last_kernel) = Arc::clone(&function.name);
        let (parameters, extra) = (parameters.as_mut_ptr(), ptr::null_mut());
        // SAFETY: parameters are of the number and sizes that the function has, and copied before the call returns; that
        // they mean what it expects is the caller's promise. Stream and function live as long as the context.
        let status = unsafe {
            sys::cuLaunchKernel(function.raw, x, y, z, i, j, k, shared, context.stream(), parameters, extra)
        };
        context.check("cuLaunchKernel", status)?;
        for allocation in self.memory {
            context.keep(allocation);
        }
        Ok(())
    }

    fn check_parameters(&self) -> Result<()> {
        let function = &self.kernel.function;
        if self.bytes == function.parameter_bytes {
            return Ok(());
        }
        let (given, wanted) = (&self.bytes, &function.parameter_bytes);
        Err(function.refuse(format!("its parameters have the sizes {wanted:?}, those given have {given:?}")))
    }

    fn check_shape(&self) -> Result<()> {
        let (function, Shape { blocks, threads, shared_bytes }) = (&self.kernel.function, self.shape);
        let in_block = threads.iter().copied().fold(1usize, usize::saturating_mul);
        if in_block == 0 || in_block > function.thread_limit {
            let limit = function.thread_limit;
            return Err(function.refuse(format!("{in_block} threads in a block, of at most {limit}")));
        }
        if blocks[0] > i32::MAX as usize || blocks[1] > 65535 || blocks[2] > 65535 {
            return Err(function
                .refuse(format!("a grid of {blocks:?} blocks, of at most [2147483647, 65535, 65535]")));
        }
        let limit = self.kernel.context.properties.shared_bytes.saturating_sub(function.static_shared_bytes);
        if shared_bytes > limit {
            return Err(function.refuse(format!("{shared_bytes} bytes of shared memory, of at most {limit}")));
        }
        Ok(())
    }

    /// Tells the driver about much shared memory.
    fn consent(&self) -> Result<()> {
        let (function, bytes) = (&self.kernel.function, self.shape.shared_bytes);
        if bytes <= function.consented.load(Ordering::Relaxed) {
            return Ok(());
        }
        let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function lives as long as its module.
        let status = unsafe { sys::cuFuncSetAttribute(function.raw, attribute, bytes as i32) };
        self.kernel.context.check("cuFuncSetAttribute", status)?;
        function.consented.fetch_max(bytes, Ordering::Relaxed);
        Ok(())
    }
}

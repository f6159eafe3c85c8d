//! A device: its context, its streams, what it can do, and the check of every call.

use super::error::{CudaError, Result};
use super::graph::Recording;
use super::module::Modules;
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The oldest driver that loads what nvcc 13.0 compiles.
const OLDEST_DRIVER: i32 = 13_000;

/// What a device is and can do.
#[derive(Clone, Debug)]
pub struct Properties {
    /// The vendor's name of it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Its processors.
    pub multiprocessors: usize,
    /// Most bytes of shared memory for a block.
    pub shared_bytes: usize,
    /// The driver's version, as 1000 major + 10 minor.
    pub driver: i32,
}

/// Bytes of a device's memory.
#[derive(Clone, Copy, Debug)]
pub struct Memory {
    /// Bytes that may still be allocated; what this process has released counts.
    pub free: usize,
    /// All bytes.
    pub total: usize,
}

/// A GPU with one stream of work, and a second for [`Device::beside`]. Clones are the same device.
#[derive(Clone, Debug)]
pub struct Device {
    pub(super) context: Arc<Context>,
}

impl Device {
    /// Opens the device of this number, as the driver counts.
    ///
    /// # Errors
    /// Without a driver, with one that is too old, without such a device, or with one that is too old.
    pub fn open(ordinal: usize) -> Result<Self> {
        let driver = start_driver(ordinal)?;
        Ok(Self { context: Arc::new(Context::open(ordinal, driver)?) })
    }

    /// What the device is and can do.
    pub fn properties(&self) -> &Properties {
        &self.context.properties
    }

    /// How much memory there is now.
    ///
    /// # Errors
    /// When the device has failed.
    pub fn memory(&self) -> Result<Memory> {
        self.context.memory()
    }

    /// Waits until all work has been done.
    ///
    /// # Errors
    /// When any of it has failed, or while a graph is recorded.
    pub fn synchronize(&self) -> Result<()> {
        self.context.synchronize()
    }
}

/// What all handles of a device share.
#[derive(Debug)]
pub(super) struct Context {
    device: sys::CUdevice,
    raw: sys::CUcontext,
    pool: sys::CUmemoryPool,
    pub(super) first: sys::CUstream,
    /// For work beside that of the first, which goes before it where there is room for one of them.
    pub(super) second: sys::CUstream,
    /// Whether work goes to the second now.
    pub(super) beside: AtomicBool,
    pub(super) modules: Modules,
    pub(super) properties: Properties,
    /// The kernel to name when a failure is seen.
    pub(super) last_kernel: Mutex<Arc<str>>,
    /// What belongs to the graph that is being recorded.
    recording: Mutex<Option<Recording>>,
}

// SAFETY: the driver's handles belong to the process; any thread may use them once the context is current on it, which
// every method sees to.
unsafe impl Send for Context {}
// SAFETY: as above; the driver locks what concurrent calls share.
unsafe impl Sync for Context {}

impl Context {
    fn open(ordinal: usize, driver: i32) -> Result<Self> {
        let device = handle("cuDeviceGet", |device| {
            // SAFETY: `device` is writable, the driver initialised.
            unsafe { sys::cuDeviceGet(device, ordinal as i32) }
        })?;
        let properties = properties(device, driver)?;
        if properties.capability < (8, 0) {
            let Properties { name, capability, .. } = properties;
            return Err(CudaError::DeviceTooOld { name, capability });
        }
        let raw = handle("cuDevicePrimaryCtxRetain", |context| {
            // SAFETY: `context` is writable, `device` came from the driver.
            unsafe { sys::cuDevicePrimaryCtxRetain(context, device) }
        })?;
        // From here on dropping releases what there is.
        let mut context = Self {
            device,
            raw,
            pool: ptr::null_mut(),
            first: ptr::null_mut(),
            second: ptr::null_mut(),
            beside: AtomicBool::new(false),
            modules: Modules::default(),
            properties,
            last_kernel: Mutex::new(Arc::from("none")),
            recording: Mutex::new(None),
        };
        context.prepare()?;
        Ok(context)
    }

    /// The streams, the pool of memory and the kernels.
    fn prepare(&mut self) -> Result<()> {
        self.make_current()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: both are writable, a context current.
        let status = unsafe { sys::cuCtxGetStreamPriorityRange(&raw mut least, &raw mut greatest) };
        check("cuCtxGetStreamPriorityRange", status)?;
        for (stream, priority) in [(&mut self.first, greatest), (&mut self.second, least)] {
            let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
            *stream = handle("cuStreamCreate", |stream| {
                // SAFETY: `stream` is writable, a context current.
                unsafe { sys::cuStreamCreateWithPriority(stream, flags, priority) }
            })?;
        }
        let device = self.device;
        self.pool = handle("cuDeviceGetDefaultMemPool", |pool| {
            // SAFETY: `pool` is writable, `device` came from the driver.
            unsafe { sys::cuDeviceGetDefaultMemPool(pool, device) }
        })?;
        // Released memory stays with the process, since the next step wants the same again.
        let mut keep = u64::MAX;
        let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the attribute is a u64, which is read before the call returns.
        let status = unsafe { sys::cuMemPoolSetAttribute(self.pool, attribute, (&raw mut keep).cast()) };
        check("cuMemPoolSetAttribute", status)?;
        self.modules = Modules::load()?;
        Ok(())
    }

    /// Where work goes now.
    pub(super) fn stream(&self) -> sys::CUstream {
        if self.is_beside() { self.second } else { self.first }
    }

    pub(super) fn is_beside(&self) -> bool {
        self.beside.load(Ordering::Relaxed)
    }

    /// Makes this context the calling thread's.
    pub(super) fn make_current(&self) -> Result<()> {
        // SAFETY: the context is retained for as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }

    pub(super) fn memory(&self) -> Result<Memory> {
        self.make_current()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are writable, a context is current.
        let status = unsafe { sys::cuMemGetInfo_v2(&raw mut free, &raw mut total) };
        self.check("cuMemGetInfo", status)?;
        let reserved =
            self.pool_bytes(sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?;
        let used = self.pool_bytes(sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?;
        Ok(Memory { free: free + reserved.saturating_sub(used), total })
    }

    fn pool_bytes(&self, attribute: sys::CUmemPool_attribute) -> Result<usize> {
        let mut bytes = 0u64;
        // SAFETY: these attributes are of type cuuint64_t.
        let status = unsafe { sys::cuMemPoolGetAttribute(self.pool, attribute, (&raw mut bytes).cast()) };
        self.check("cuMemPoolGetAttribute", status)?;
        Ok(bytes as usize)
    }

    /// Gives released memory back to the device, for an allocation that did not fit between it.
    pub(super) fn trim(&self) -> Result<()> {
        self.synchronize()?;
        // SAFETY: the pool is the device's own, which is never destroyed.
        self.check("cuMemPoolTrimTo", unsafe { sys::cuMemPoolTrimTo(self.pool, 0) })
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        [self.first, self.second].into_iter().try_for_each(|stream| self.wait_for(stream))
    }

    /// Waits for the work that went where work goes now.
    pub(super) fn wait(&self) -> Result<()> {
        self.wait_for(self.stream())
    }

    fn wait_for(&self, stream: sys::CUstream) -> Result<()> {
        self.refuse_recording("waiting for the device")?;
        self.make_current()?;
        // SAFETY: the stream lives as long as `self`.
        self.check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(stream) })
    }

    /// As [`check`], and failures of kernels name the last one launched.
    pub(super) fn check(&self, call: &'static str, status: CUresult) -> Result<()> {
        use CUresult as C;
        match status {
            C::CUDA_ERROR_ILLEGAL_ADDRESS
            | C::CUDA_ERROR_MISALIGNED_ADDRESS
            | C::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | C::CUDA_ERROR_INVALID_PC
            | C::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | C::CUDA_ERROR_HARDWARE_STACK_ERROR
            | C::CUDA_ERROR_ASSERT
            | C::CUDA_ERROR_LAUNCH_TIMEOUT
            | C::CUDA_ERROR_LAUNCH_FAILED => {
                let (code, text) = words(status);
                let kernel = locked(&self.last_kernel).to_string();
                Err(CudaError::KernelFailed { kernel, code, text })
            }
            _ => check(call, status),
        }
    }

    pub(super) fn recording(&self) -> MutexGuard<'_, Option<Recording>> {
        locked(&self.recording)
    }

    pub(super) fn refuse_recording(&self, what: &'static str) -> Result<()> {
        if self.recording().is_some() { Err(CudaError::Recording { what }) } else { Ok(()) }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // What fails here has failed before and was reported then.
        if self.make_current().is_err() {
            return;
        }
        self.modules.unload();
        for stream in [self.second, self.first].into_iter().filter(|stream| !stream.is_null()) {
            // SAFETY: nothing refers to the stream any more.
            unsafe {
                let _ = sys::cuStreamSynchronize(stream);
                let _ = sys::cuStreamDestroy_v2(stream);
            }
        }
        // SAFETY: retained once, by `open`.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// Loads and initialises the driver; returns its version.
fn start_driver(ordinal: usize) -> Result<i32> {
    // SAFETY: loads a library, whose initialisers are the vendor's.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver);
    }
    let mut version = 0;
    // SAFETY: `version` is writable; this call needs no initialisation.
    check("cuDriverGetVersion", unsafe { sys::cuDriverGetVersion(&raw mut version) })?;
    if version < OLDEST_DRIVER {
        return Err(CudaError::DriverTooOld { found: version, needed: OLDEST_DRIVER });
    }
    // SAFETY: the driver wants 0 here.
    let status = unsafe { sys::cuInit(0) };
    if status == CUresult::CUDA_ERROR_NO_DEVICE {
        return Err(CudaError::NoDevice { ordinal, count: 0 });
    }
    check("cuInit", status)?;
    let mut count = 0;
    // SAFETY: `count` is writable.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    let count = usize::try_from(count).unwrap_or(0);
    if ordinal >= count { Err(CudaError::NoDevice { ordinal, count }) } else { Ok(version) }
}

fn properties(device: sys::CUdevice, driver: i32) -> Result<Properties> {
    let attribute = |attribute: Attribute| {
        handle("cuDeviceGetAttribute", |value| {
            // SAFETY: `value` is writable, `device` came from the driver.
            unsafe { sys::cuDeviceGetAttribute(value, attribute, device) }
        })
    };
    let mut name = [0u8; 256];
    // SAFETY: at most 255 bytes and a zero are written.
    check("cuDeviceGetName", unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), 255, device) })?;
    let name = CStr::from_bytes_until_nul(&name).unwrap_or_default().to_string_lossy().into_owned();
    Ok(Properties {
        name,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        driver,
    })
}

/// What a call of the driver writes when it succeeds.
pub(super) fn handle<T>(call: &'static str, make: impl FnOnce(*mut T) -> CUresult) -> Result<T> {
    let mut made = MaybeUninit::uninit();
    check(call, make(made.as_mut_ptr()))?;
    // SAFETY: the driver has written it, since the call succeeded.
    Ok(unsafe { made.assume_init() })
}

/// Turns what a call of the driver returned into a result.
pub(super) fn check(call: &'static str, status: CUresult) -> Result<()> {
    if status == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let (code, text) = words(status);
    Err(CudaError::Driver { call, code, text })
}

/// The driver's name of a failure and its words for it.
fn words(status: CUresult) -> (String, String) {
    let word = |ask: unsafe fn(CUresult, *mut *const std::ffi::c_char) -> CUresult| {
        let mut text = ptr::null();
        // SAFETY: the driver stores a pointer to a constant of its own, or null.
        unsafe {
            let known = ask(status, &raw mut text) == CUresult::CUDA_SUCCESS && !text.is_null();
            if known { CStr::from_ptr(text).to_string_lossy().into_owned() } else { format!("{status:?}") }
        }
    };
    (word(sys::cuGetErrorName), word(sys::cuGetErrorString))
}

/// A lock that a panic elsewhere does not take away.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

//! What can go wrong between this process and a GPU.

/// Result of a call of this room.
pub type Result<T> = std::result::Result<T, CudaError>;

/// A CUDA device could not be had, or did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The driver's library is not on this machine.
    #[error("no CUDA driver: libcuda.so could not be loaded")]
    NoDriver,
    /// The driver cannot load what this program was compiled to.
    #[error("the CUDA driver is made for CUDA {}, and this program for {}", version(*found), version(*needed))]
    DriverTooOld {
        /// The driver's version, as 1000 major + 10 minor.
        found: i32,
        /// The oldest that will do.
        needed: i32,
    },
    /// There is no device of this number.
    #[error("no CUDA device {ordinal}: the driver shows {count}")]
    NoDevice {
        /// The number asked for.
        ordinal: usize,
        /// How many devices there are.
        count: usize,
    },
    /// The device is older than the kernels.
    #[error("{name} has compute capability {}.{}, and the kernels need 8.0 or newer", capability.0, capability.1)]
    DeviceTooOld {
        /// The device's name.
        name: String,
        /// Its compute capability.
        capability: (i32, i32),
    },
    /// Memory did not suffice. Nothing was changed; a caller may ask for less.
    #[error(
        "out of memory on the CUDA device: {what} needs {requested} bytes, and {free} of {total} are free"
    )]
    OutOfMemory {
        /// What the memory was for.
        what: &'static str,
        /// Bytes that were asked for.
        requested: usize,
        /// Bytes that were free.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// A kernel of this name was not compiled into the program.
    #[error("no CUDA kernel is named {name}")]
    NoKernel {
        /// The name asked for.
        name: String,
    },
    /// A launch was refused before it reached the device.
    #[error("CUDA kernel {kernel} cannot be launched: {reason}")]
    Launch {
        /// The kernel's name.
        kernel: String,
        /// Why not.
        reason: String,
    },
    /// A kernel failed on the device, which accepts no more work of this process.
    #[error("CUDA kernel {kernel} or one before it failed: {text} ({code})")]
    KernelFailed {
        /// The last kernel that was launched before the failure was seen.
        kernel: String,
        /// The driver's name of the failure.
        code: String,
        /// The driver's words for it.
        text: String,
    },
    /// Any other failure of a call of the driver.
    #[error("{call}: {text} ({code})")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// The driver's name of the failure.
        code: String,
        /// The driver's words for it.
        text: String,
    },
    /// A place lies outside of a buffer, or two lengths differ.
    #[error("{what}: {found} elements where {expected} are")]
    Length {
        /// What was asked.
        what: &'static str,
        /// Elements that there are.
        expected: usize,
        /// Elements that were asked for.
        found: usize,
    },
    /// An index names what there is not.
    #[error("{what}: index {index}, where there are {count}")]
    Index {
        /// What is counted.
        what: &'static str,
        /// The largest index.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// What cannot be done while a graph is recorded was asked for then.
    #[error("{what} cannot be part of a CUDA graph")]
    Recording {
        /// What was asked for.
        what: &'static str,
    },
    /// The vendor's library of matrix products is not on this machine.
    #[error("no cuBLASLt: libcublasLt.so could not be loaded")]
    NoBlas,
    /// A call of the vendor's library of matrix products failed.
    #[error("{call}: {code}")]
    Blas {
        /// The library's function.
        call: &'static str,
        /// The library's name of the failure.
        code: String,
    },
    /// Matrices do not fit together.
    #[error("a product of matrices that do not fit: {reason}")]
    Shape {
        /// What does not fit.
        reason: String,
    },
}

impl CudaError {
    /// Advice for the user, if there is any.
    pub fn hint(&self) -> Option<String> {
        let advice = match self {
            Self::NoDriver => {
                "install the NVIDIA driver, or put the folder of libcuda.so.1 into LD_LIBRARY_PATH; \
                 device = \"cpu\" works without"
            }
            Self::DriverTooOld { .. } | Self::Driver { call: "cuModuleLoadData", .. } => {
                "update the NVIDIA driver to release 580 or newer"
            }
            Self::NoDevice { .. } => "nvidia-smi lists the devices; CUDA_VISIBLE_DEVICES may hide some",
            Self::DeviceTooOld { .. } => {
                "use a device of the Ampere generation or newer, or device = \"cpu\""
            }
            Self::OutOfMemory { .. } => {
                "make batches smaller or sequences shorter; nvidia-smi shows who else uses the device"
            }
            Self::KernelFailed { .. } => {
                "CUDA_LAUNCH_BLOCKING=1 names the kernel exactly; compute-sanitizer shows the place"
            }
            Self::NoBlas => {
                "put the folder of libcublasLt.so.13 (nvidia-cublas) into LD_LIBRARY_PATH, or set batch_invariant"
            }
            _ => return None,
        };
        Some(advice.to_owned())
    }

    /// Whether less memory would have done.
    pub fn is_out_of_memory(&self) -> bool {
        matches!(self, Self::OutOfMemory { .. })
    }
}

fn version(number: i32) -> String {
    format!("{}.{}", number / 1000, number % 1000 / 10)
}

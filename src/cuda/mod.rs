//! NVIDIA GPUs: devices, their memory, kernels, graphs and matrix products.
//!
//! Everything that is asked of a [`Device`] happens there in the order in which it was asked, but for [`Device::beside`],
//! while the caller goes on. Only copies from and to plain memory of the host wait. Memory is released in the same order, so a [`Buffer`] may
//! be dropped as soon as the last call that uses it has been made.
//!
//! The driver is loaded when a device is first opened: a program with this room starts anywhere.
//!
//! ```no_run
//! # fn main() -> rpt::cuda::Result<()> {
//! use rpt::cuda::{Device, Shape};
//! let device = Device::open(0)?;
//! let x = device.upload("x", &[1.0f32, 2.0, 3.0])?;
//! let mut y = device.zeroed::<half::bf16>("y", x.len())?;
//! let kernel = device.kernel("narrow")?;
//! // SAFETY: narrow(const float* from, bf16* to, int count) touches `count` elements of each.
//! unsafe { kernel.with(Shape::of(1, 256)).read(&x).write(&mut y).value(x.len() as i32).launch()? };
//! assert_eq!(y.download()?.len(), 3);
//! # Ok(())
//! # }
//! ```

pub mod attention;
pub mod beside;
mod blas;
pub mod buffer;
pub mod device;
pub mod embedding;
pub mod error;
pub mod event;
pub mod forest;
pub mod gemm;
pub mod graph;
pub mod head;
pub mod indices;
mod lengths;
pub mod module;
pub mod norm;
pub mod optimizer;
pub mod paged;
pub mod quantized;
pub mod reduce;
pub mod rotary;
pub mod row_scores;
pub mod sampling;
pub mod swiglu;

pub use beside::Beside;
pub use buffer::{Buffer, Number, Pinned, Slice, SliceMut};
pub use device::{Device, Memory, Properties};
pub use error::{CudaError, Result};
pub use event::Event;
pub use gemm::{Element, Gemm, Matrix, MatrixMut};
pub use graph::Graph;
pub use indices::{IndexSlice, Indices};
pub use module::{Kernel, Launch, Shape};

//! The matrix product alone.

use super::median;
use crate::kernels::matmul::{Left, matmul as product};
use crate::kernels::packed::Packed;
use crate::kernels::simd::isa;
use crate::model::{Decoder, DeviceSettings, Dtype, ModelError, Products, on_device};
use crate::random::Stream;
use crate::time::Time;
use serde::Serialize;

/// Size of the product that stands for the peak, and how often it is made.
const PEAK_SIZE: usize = 1024;
const PEAK_ROUNDS: usize = 20;

/// What a product of square matrices reached: the median over the rounds but the first.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MatmulFigures {
    /// Rows, columns and inner dimension.
    pub size: usize,
    /// Number format of the weights.
    pub dtype: Dtype,
    /// How products are computed.
    pub products: Products,
    /// Threads.
    pub threads: usize,
    /// Instructions that were used, or the device.
    pub instructions: String,
    /// Seconds of a product.
    pub wall_seconds: f64,
    /// Floating-point operations by second, in units of 10^9.
    pub gflops: f64,
}

/// Measures `rounds` products of a row-major matrix with packed weights, after one that is not counted; or those of a device.
///
/// # Errors
/// When a device fails, or has no products of this format.
pub fn matmul(
    size: usize,
    dtype: Dtype,
    products: Products,
    rounds: usize,
    device: Option<&DeviceSettings>,
) -> Result<MatmulFigures, ModelError> {
    let (seconds, instructions) = match device {
        None => (seconds(size, dtype, products, rounds), format!("{:?}", isa()).to_lowercase()),
        Some(device) => on_device(device, dtype, size, rounds)?,
    };
    let wall_seconds = median(seconds);
    Ok(MatmulFigures {
        size,
        dtype,
        products,
        threads: rayon::current_num_threads(),
        instructions,
        wall_seconds,
        gflops: gflop(size) / wall_seconds,
    })
}

/// Seconds of a device's products, and its name.
#[cfg(feature = "cuda")]
fn on_device(
    settings: &DeviceSettings,
    dtype: Dtype,
    size: usize,
    rounds: usize,
) -> Result<(Vec<f64>, String), ModelError> {
    if dtype == Dtype::F16 {
        return Err(ModelError::DeviceDtype { dtype: dtype.name() });
    }
    let seconds = super::device::matmul_seconds(settings, dtype == Dtype::Bf16, size, rounds)?;
    Ok((seconds, settings.device.properties().name.clone()))
}

#[cfg(not(feature = "cuda"))]
fn on_device(
    settings: &DeviceSettings,
    _: Dtype,
    _: usize,
    _: usize,
) -> Result<(Vec<f64>, String), ModelError> {
    match *settings {}
}

/// The most that the product reaches where a decoder computes, with all threads, in units of 10^9 floating-point
/// operations by second.
///
/// # Errors
/// When a device fails.
pub fn peak(decoder: &Decoder) -> Result<f64, ModelError> {
    let Some(device) = decoder.on_device()? else {
        let seconds = seconds(PEAK_SIZE, decoder.dtype(), decoder.products(), PEAK_ROUNDS);
        return Ok(gflop(PEAK_SIZE) / seconds.into_iter().fold(f64::INFINITY, f64::min));
    };
    on_device!(&**device, decoder => Ok(super::device::peak(decoder)?))
}

pub(super) fn gflop(size: usize) -> f64 {
    2.0 * (size as f64).powi(3) * 1e-9
}

/// Seconds of each product.
fn seconds(size: usize, dtype: Dtype, products: Products, rounds: usize) -> Vec<f64> {
    let numbers = |name: &str| -> Vec<f32> {
        let stream = Stream::new(0, name);
        (0..size * size).map(|at| stream.uniform(at as u64) as f32 - 0.5).collect()
    };
    let (left, mut right) = (numbers("left"), Packed::of_weight(dtype, &numbers("right"), size, size));
    right.set_products(products);
    let mut out = vec![0.0; size * size];
    let mut round = || Time::of(|| product(Left::rows(&left, size), size, &right, &mut out, false)).1;
    round();
    (0..rounds).map(|_| round().wall_seconds).collect()
}

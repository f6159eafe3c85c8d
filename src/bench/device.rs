//! What a device itself reaches: products of matrices, and copies within its memory.

use super::matmul::gflop;
use super::median;
use crate::cuda::{Buffer, Device, Gemm, Matrix, MatrixMut, Result, SliceMut};
use crate::model::device::{DeviceDecoder, DeviceSettings, Format};
use crate::random::Stream;
use half::bf16;

/// Size of the product that stands for the peak, and how often it is made.
const PEAK_SIZE: usize = 4096;
const PEAK_ROUNDS: usize = 20;
/// Bytes that are copied to measure the memory, at most.
const COPIED_BYTES: usize = 4 << 30;
const COPY_ROUNDS: usize = 20;

/// The most that products in a decoder's format reach on its device, in units of 10^9 operations by second.
pub(super) fn peak<T: Format>(decoder: &DeviceDecoder<T>) -> Result<f64> {
    let settings =
        DeviceSettings { device: decoder.device().clone(), batch_invariant: decoder.is_batch_invariant() };
    // An emulated device, which is only good for tests, would take hours.
    let size = if settings.device.properties().name == "emulated" { 64 } else { PEAK_SIZE };
    let fastest = seconds::<T>(&settings, size, PEAK_ROUNDS)?.into_iter().fold(f64::INFINITY, f64::min);
    Ok(gflop(size) / fastest)
}

/// Seconds of each of `rounds` products of square matrices, after one that is not counted.
pub(super) fn matmul_seconds(
    settings: &DeviceSettings,
    is_bf16: bool,
    size: usize,
    rounds: usize,
) -> Result<Vec<f64>> {
    if is_bf16 { seconds::<bf16>(settings, size, rounds) } else { seconds::<f32>(settings, size, rounds) }
}

fn seconds<T: Format>(settings: &DeviceSettings, size: usize, rounds: usize) -> Result<Vec<f64>> {
    let DeviceSettings { device, batch_invariant } = settings;
    let gemm = Gemm::new(device, *batch_invariant)?;
    let numbers = |name: &str| -> Result<Buffer<T>> {
        let stream = Stream::new(0, name);
        let number = |at: usize| T::narrow(stream.uniform(at as u64) as f32 - 0.5);
        device.upload("matrices", &(0..size * size).map(number).collect::<Vec<_>>())
    };
    let (left, right) = (numbers("left")?, numbers("right")?);
    let mut out = device.allocate::<T>("matrices", size * size)?;
    each(device, rounds, || {
        let (left, right) = (Matrix::new(&left, size, size)?, Matrix::new(&right, size, size)?);
        gemm.forward(left, right, MatrixMut::new(&mut out, size, size)?, false)
    })
}

/// Bytes by second that a copy within the device's memory reads and writes together.
///
/// # Errors
/// When the device has failed.
pub fn copy_bandwidth(device: &Device) -> Result<f64> {
    let count = (device.memory()?.free / 4).min(COPIED_BYTES) / size_of::<u64>();
    let count = if device.properties().name == "emulated" { 1 << 16 } else { count };
    let from = device.zeroed::<u64>("memory to copy", count)?;
    let mut to = device.zeroed::<u64>("memory to copy", count)?;
    let seconds = each(device, COPY_ROUNDS, || SliceMut::from(&mut to).copy_from(&from))?;
    Ok(2.0 * (count * size_of::<u64>()) as f64 / median(seconds))
}

/// Seconds of some work, each time by the device's own clock, after one that is not counted.
fn each(device: &Device, rounds: usize, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    work()?;
    let mut marks = vec![device.event()?];
    marks[0].record()?;
    for _ in 0..rounds {
        work()?;
        let mark = device.event()?;
        mark.record()?;
        marks.push(mark);
    }
    let pairs = marks.iter().zip(&marks[1..]);
    pairs.map(|(before, after)| Ok(f64::from(after.milliseconds_since(before)?) / 1e3)).collect()
}

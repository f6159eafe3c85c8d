//! Numbers on their way to a device and back, and comparisons.

use half::bf16;
use rpt::cuda::{Buffer, CudaError, Device, Element, Number, Result};
use rpt::random::Stream;

/// A storage type of the kernels.
pub(crate) trait Format: Element {
    fn of(value: f32) -> Self;
    fn value(self) -> f32;
    /// How far a stored result may be from the CPU's, relative to values of about 1: for bf16 one unit in the last place.
    const TOLERANCE: f32;
}
impl Format for f32 {
    fn of(value: f32) -> Self {
        value
    }
    fn value(self) -> f32 {
        self
    }
    const TOLERANCE: f32 = 1e-5;
}
impl Format for bf16 {
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
    fn value(self) -> f32 {
        self.to_f32()
    }
    const TOLERANCE: f32 = 1.0 / 128.0;
}

/// Standard normal values.
pub(crate) fn values(seed: u64, length: usize) -> Vec<f32> {
    let stream = Stream::new(seed, "cuda kernels");
    (0..length as u64).map(|n| stream.normal(n) as f32).collect()
}

/// As [`values`], of those that `T` can store.
pub(crate) fn stored_values<T: Format>(seed: u64, length: usize) -> Vec<f32> {
    rounded::<T>(&values(seed, length))
}

pub(crate) fn rounded<T: Format>(values: &[f32]) -> Vec<f32> {
    values.iter().map(|value| T::of(*value).value()).collect()
}

pub(crate) fn upload<T: Number>(device: &Device, values: &[T]) -> Buffer<T> {
    device.upload("a test", values).unwrap()
}

pub(crate) fn store<T: Format>(device: &Device, values: &[f32]) -> Buffer<T> {
    upload(device, &values.iter().map(|value| T::of(*value)).collect::<Vec<_>>())
}

/// NaNs, which nothing that is computed may keep.
pub(crate) fn blank<T: Format>(device: &Device, length: usize) -> Buffer<T> {
    store(device, &vec![f32::NAN; length])
}

pub(crate) fn read<T: Format>(buffer: &Buffer<T>) -> Vec<f32> {
    buffer.download().unwrap().into_iter().map(T::value).collect()
}

/// Fails unless a launch was refused for what it was given, in words that contain `what`.
pub(crate) fn assert_refused<T>(result: Result<T>, what: &str) {
    let error = result.map(|_| ()).unwrap_err();
    let given =
        matches!(error, CudaError::Length { .. } | CudaError::Index { .. } | CudaError::Launch { .. });
    let text = error.to_string();
    assert!(given && text.contains(what), "{text}");
}

/// Fails where a value is further from the expected one than `tolerance`, relative to it or to 1.
pub(crate) fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len());
    for (at, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let difference = (actual - expected).abs();
        assert!(
            difference <= tolerance * expected.abs().max(1.0),
            "element {at}: {actual} is not {expected}"
        );
    }
}

/// Inner product in double precision.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}

/// Compares a gradient with central differences of a loss that is computed in single precision.
pub(crate) fn check_gradient(point: &[f32], gradient: &[f32], loss: impl Fn(&[f32]) -> f64) {
    let step = 1e-2;
    for (at, gradient) in gradient.iter().enumerate() {
        let shifted = |by: f32| {
            let mut point = point.to_vec();
            point[at] += by;
            loss(&point)
        };
        let numeric = (shifted(step) - shifted(-step)) / f64::from(2.0 * step);
        let difference = (numeric - f64::from(*gradient)).abs();
        assert!(difference < 5e-3 * numeric.abs().max(1.0), "element {at}: {gradient} is not {numeric}");
    }
}

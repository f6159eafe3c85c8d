//! A device for tests whose launches are lists of arguments, and comparisons.

use crate::cuda_emulator;
use rpt::cuda::{Buffer, Device, Shape};
use rpt::kernels::dtype::Dtype;
use rpt::random::Stream;
use std::cell::{RefCell, RefMut};

/// Storage types of the kernels.
pub(crate) const FORMATS: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];

/// How kernels' names end for a storage type.
pub(crate) fn suffix(dtype: Dtype) -> &'static str {
    if dtype == Dtype::F32 { "f32" } else { "bf16" }
}

/// A backward kernel's name for formats of the gradient that comes in and of everything else stored.
pub(crate) fn backward_name(name: &str, grad: Dtype, dtype: Dtype) -> String {
    if grad == dtype {
        return format!("{name}_{}", suffix(dtype));
    }
    format!("{name}_{}_{}", suffix(grad), suffix(dtype))
}

/// How far a stored result may be from the CPU's, relative to values of about 1: for bf16 one unit in the last place.
pub(crate) fn tolerance(dtype: Dtype) -> f32 {
    if dtype == Dtype::F32 { 1e-5 } else { 1.0 / 128.0 }
}

/// Standard normal values.
pub(crate) fn values(seed: u64, length: usize) -> Vec<f32> {
    let stream = Stream::new(seed, "cuda kernels");
    (0..length as u64).map(|n| stream.normal(n) as f32).collect()
}

/// Bytes on the device.
pub(crate) struct Memory(RefCell<Buffer<u8>>);

impl Memory {
    fn bytes(&self) -> Vec<u8> {
        self.0.borrow().download().unwrap()
    }

    pub(crate) fn stored(&self, dtype: Dtype) -> Vec<f32> {
        let bytes = self.bytes();
        let mut values = vec![0.0; bytes.len() / dtype.bytes()];
        dtype.read(&bytes, &mut values);
        values
    }

    pub(crate) fn floats(&self) -> Vec<f32> {
        self.stored(Dtype::F32)
    }

    pub(crate) fn words(&self) -> Vec<u32> {
        self.bytes().chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    pub(crate) fn ints(&self) -> Vec<i32> {
        self.words().into_iter().map(|word| word as i32).collect()
    }
}

/// An argument of a launch.
pub(crate) enum Arg<'a> {
    To(&'a Memory),
    Missing,
    Int(usize),
    Long(u64),
    Float(f32),
}

impl<'a> Arg<'a> {
    pub(crate) fn optional(memory: Option<&'a Memory>) -> Self {
        memory.map_or(Self::Missing, Self::To)
    }
}

/// The device that tests use.
pub(crate) struct Gpu(Device);

impl Gpu {
    pub(crate) fn new() -> Self {
        Self(cuda_emulator::device())
    }

    fn upload(&self, bytes: &[u8]) -> Memory {
        Memory(RefCell::new(self.0.upload("a test", bytes).unwrap()))
    }

    pub(crate) fn stored(&self, dtype: Dtype, values: &[f32]) -> Memory {
        let mut bytes = Vec::new();
        dtype.write(values, &mut bytes);
        self.upload(&bytes)
    }

    pub(crate) fn floats(&self, values: &[f32]) -> Memory {
        self.stored(Dtype::F32, values)
    }

    pub(crate) fn ints(&self, values: &[i32]) -> Memory {
        self.upload(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(crate) fn words(&self, values: &[u32]) -> Memory {
        self.upload(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    pub(crate) fn longs(&self, values: &[u64]) -> Memory {
        self.upload(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>())
    }

    /// Launches a kernel on a grid of blocks of `threads` threads. Each memory may be named once.
    pub(crate) fn launch(&self, name: &str, grid: (usize, usize), threads: usize, arguments: &[Arg]) {
        let kernel = self.0.kernel(name).unwrap();
        let mut borrowed: Vec<Option<RefMut<Buffer<u8>>>> = arguments
            .iter()
            .map(|argument| if let Arg::To(memory) = argument { Some(memory.0.borrow_mut()) } else { None })
            .collect();
        let mut launch = kernel.with(Shape::grid(grid.0, grid.1, threads));
        for (argument, memory) in arguments.iter().zip(&mut borrowed) {
            launch = match (argument, memory) {
                (_, Some(memory)) => launch.write(&mut **memory),
                (Arg::Int(value), _) => launch.value(i32::try_from(*value).unwrap()),
                (Arg::Long(value), _) => launch.value(*value),
                (Arg::Float(value), _) => launch.value(*value),
                _ => launch.missing(),
            };
        }
        // SAFETY: the emulator ends a launch that touches other memory than it was given.
        unsafe { launch.launch().unwrap() };
    }
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

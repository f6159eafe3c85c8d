//! Memory, events and graphs, on any device.

use super::cuda_emulator::{device, emulated_device};
use half::bf16;
use rpt::cuda::{CudaError, Device, Number, Shape};
use std::fmt::Debug;

fn comes_back<T: Number + PartialEq + Debug>(device: &Device, values: &[T]) {
    let buffer = device.upload("values", values).unwrap();
    assert_eq!(buffer.len(), values.len());
    assert_eq!(buffer.download().unwrap(), values);
    let mut pinned = device.pinned::<T>(values.len()).unwrap();
    pinned.write().unwrap().copy_from_slice(values);
    let mut other = device.allocate::<T>("other", values.len()).unwrap();
    other.slice_mut(..).unwrap().upload_from(&pinned).unwrap();
    pinned.write().unwrap().fill(T::default());
    other.slice(..).unwrap().download_to(&mut pinned).unwrap();
    assert_eq!(pinned.read().unwrap(), values);
}

#[test]
fn a_device_says_what_it_is() {
    let device = device();
    let properties = device.properties();
    assert!(properties.capability >= (8, 0) && properties.driver >= 13000 && !properties.name.is_empty());
    assert!(properties.multiprocessors > 0 && properties.shared_bytes >= 48 << 10);
    let memory = device.memory().unwrap();
    assert!(memory.free <= memory.total && memory.free > 0);
}

#[test]
fn numbers_of_every_type_come_back() {
    let device = device();
    comes_back(&device, &[f32::MIN_POSITIVE, -0.0, 1.5]);
    comes_back(&device, &[bf16::from_f32(1.5), bf16::MAX]);
    comes_back(&device, &(0..1000u64).map(|at| at << 40).collect::<Vec<_>>());
    comes_back(&device, &[i32::MIN, 7]);
    comes_back(&device, &[255u8; 77]);
    comes_back::<u16>(&device, &[]);
}

#[test]
fn parts_are_bounded_and_copied() {
    let device = device();
    let values: Vec<i32> = (0..100).collect();
    let mut buffer = device.upload("values", &values).unwrap();
    assert_eq!(buffer.slice(90..).unwrap().download().unwrap(), values[90..]);
    assert_eq!(buffer.slice(20..80).unwrap().slice(5..=6).unwrap().download().unwrap(), [25, 26]);
    assert!(matches!(buffer.slice(90..101), Err(CudaError::Length { expected: 100, found: 101, .. })));
    #[allow(clippy::reversed_empty_ranges, reason = "the range that must be refused")]
    let reversed = buffer.slice(5..4).is_err();
    assert!(reversed && buffer.slice_mut(..=usize::MAX).is_err());
    let mut whole = buffer.slice_mut(..).unwrap();
    let (mut low, high) = whole.split_at(50).unwrap();
    low.copy_from(&high).unwrap();
    assert!(whole.split_at(101).is_err());
    buffer.slice_mut(10..20).unwrap().fill_with_zeros().unwrap();
    let expected: Vec<i32> =
        (0..100).map(|at| if (10..20).contains(&at) { 0 } else { at % 50 + 50 }).collect();
    assert_eq!(buffer.download().unwrap(), expected);
    assert!(buffer.upload(&values[1..]).is_err(), "another length");
    let (mut x, y) = (device.zeroed::<i32>("x", 3).unwrap(), device.zeroed::<i32>("y", 4).unwrap());
    assert!(x.slice_mut(..).unwrap().copy_from(&y).is_err(), "another length");
}

#[test]
fn released_memory_is_free_again() {
    let Some(device) = emulated_device() else { return };
    let part = device.memory().unwrap().total / 3;
    for _ in 0..20 {
        drop(device.allocate::<u8>("part", part).unwrap());
    }
}

#[test]
fn marks_measure_the_time_between() {
    let device = device();
    let (start, end) = (device.event().unwrap(), device.event().unwrap());
    start.wait().unwrap();
    start.record().unwrap();
    let mut buffer = device.zeroed::<f32>("x", 1 << 20).unwrap();
    buffer.slice_mut(..).unwrap().fill_with_zeros().unwrap();
    end.record().unwrap();
    assert!(end.milliseconds_since(&start).unwrap() >= 0.0);
}

#[test]
fn a_kernel_runs_on_all_elements_of_any_number() {
    let Some(device) = emulated_device() else { return };
    let kernel = device.kernel("test_add").unwrap();
    for count in [0usize, 1, 255, 256, 257, 5000] {
        let x: Vec<f32> = (0..count).map(|at| at as f32).collect();
        let (x, mut y) = (device.upload("x", &x).unwrap(), device.upload("y", &vec![1.0f32; count]).unwrap());
        let shape = Shape::of(count.div_ceil(256), 256);
        let launch = kernel.with(shape).read(&x).write(&mut y).value(count as i32).value(0.5f32);
        // SAFETY: `count` elements in both.
        unsafe { launch.launch() }.unwrap();
        let expected: Vec<f32> = (0..count).map(|at| 1.0 + 0.5 * at as f32).collect();
        assert_eq!(y.download().unwrap(), expected);
    }
}

/// A graph that doubles, through page-locked memory, what is in `input` when it is launched.
#[test]
fn a_graph_repeats_its_work_on_what_is_there_then() {
    let device = device();
    let mut input = device.pinned::<f32>(100).unwrap();
    let mut output = device.pinned::<f32>(100).unwrap();
    let mut x = device.upload("x", &[9.0f32; 100]).unwrap();
    let graph = device
        .record(|| {
            let mut y = device.zeroed::<f32>("y", 1);
            assert!(matches!(y, Err(CudaError::Recording { .. })), "no memory while recording");
            y = device.upload("y", &[1.0]);
            assert!(y.is_err() && device.synchronize().is_err() && x.download().is_err());
            x.slice_mut(..)?.upload_from(&input)?;
            x.slice_mut(50..)?.fill_with_zeros()?;
            x.slice(..)?.download_to(&mut output)
        })
        .unwrap();
    assert_eq!(x.download().unwrap(), [9.0; 100], "recorded, not done");
    drop(x);
    for round in 1..4 {
        input.write().unwrap().fill(round as f32);
        graph.launch().unwrap();
        let found = output.read().unwrap();
        assert!(found[..50].iter().all(|value| *value == round as f32));
        assert!(found[50..].iter().all(|value| *value == 0.0));
    }
}

#[test]
fn a_graph_repeats_launches() {
    let Some(device) = emulated_device() else { return };
    let kernel = device.kernel("test_add").unwrap();
    let x = device.upload("x", &[1.0f32; 100]).unwrap();
    let mut y = device.zeroed::<f32>("y", 100).unwrap();
    let graph = device
        .record(|| {
            let launch = kernel.with(Shape::of(1, 128)).read(&x).write(&mut y).value(100).value(2.0f32);
            // SAFETY: 100 elements in both.
            unsafe { launch.launch() }
        })
        .unwrap();
    drop(x);
    for round in 0..5 {
        assert_eq!(y.download().unwrap(), vec![2.0 * round as f32; 100]);
        graph.launch().unwrap();
    }
}

#[test]
fn what_fails_or_panics_while_recording_leaves_the_device_usable() {
    let device = device();
    let failed = device.record(|| Err(CudaError::Recording { what: "this" }));
    assert!(matches!(failed, Err(CudaError::Recording { what: "this" })));
    let buffer = device.upload("x", &[1.0f32]).unwrap();
    let mut dropped = Some(device.upload("y", &[2.0f32]).unwrap());
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        device.record(|| -> Result<(), CudaError> {
            drop(dropped.take());
            panic!("on purpose")
        })
    }));
    assert!(panicked.is_err());
    assert_eq!(buffer.download().unwrap(), [1.0]);
    assert!(device.record(|| Ok::<(), CudaError>(())).unwrap().launch().is_ok(), "an empty graph");
}

/// The emulated device does what is beside other work as late as it may.
#[test]
fn work_beside_other_work_is_waited_for_when_it_must_be() {
    let Some(device) = emulated_device() else { return };
    let mut x = device.upload("x", &[1.0f32; 100]).unwrap();
    let (mut found, mut early) = (device.pinned::<f32>(100).unwrap(), device.pinned::<f32>(100).unwrap());
    let start = device.event().unwrap();
    start.record().unwrap();
    let work = || {
        let y = device.upload("y", &[2.0f32; 100]);
        x.slice_mut(..)?.fill_with_zeros()?;
        y
    };
    // SAFETY: what reads `x` before the join only shows that it is early.
    let (beside, y) = unsafe { device.beside(&start, work) }.unwrap();
    x.slice(..).unwrap().download_to(&mut early).unwrap();
    assert_eq!(early.read().unwrap(), [1.0; 100]);
    drop(beside);
    x.slice(..).unwrap().download_to(&mut found).unwrap();
    assert_eq!(found.read().unwrap(), [0.0; 100]);
    assert_eq!(y.download().unwrap(), [2.0; 100]);
}

#[test]
fn what_fails_or_panics_beside_is_waited_for_as_well() {
    let device = device();
    let mut x = device.upload("x", &[1.0f32; 100]).unwrap();
    let (mut found, start) = (device.pinned::<f32>(100).unwrap(), device.event().unwrap());
    for panics in [false, true] {
        x.upload(&[1.0; 100]).unwrap();
        start.record().unwrap();
        let work = || -> Result<(), CudaError> {
            x.slice_mut(..)?.fill_with_zeros()?;
            assert!(!panics, "on purpose");
            Err(CudaError::Recording { what: "this" })
        };
        // SAFETY: nobody uses `x` before the work is waited for.
        let beside = || unsafe { device.beside(&start, work) }.map(|(_, ())| ());
        let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(beside));
        assert!(failed.map_or(panics, |failed| failed.is_err()));
        x.slice(..).unwrap().download_to(&mut found).unwrap();
        assert_eq!(found.read().unwrap(), [0.0; 100]);
    }
    let refused = device.record(|| {
        // SAFETY: nothing is asked for.
        unsafe { device.beside(&start, || Ok(())) }.map(|(_, ())| ())
    });
    assert!(matches!(refused, Err(CudaError::Recording { .. })));
}

#[test]
fn several_threads_share_a_device() {
    let device = device();
    std::thread::scope(|scope| {
        for thread in 0..4u32 {
            let device = device.clone();
            scope.spawn(move || {
                for round in 0..20 {
                    let values = vec![thread * 100 + round; 333];
                    assert_eq!(device.upload("values", &values).unwrap().download().unwrap(), values);
                }
            });
        }
    });
}

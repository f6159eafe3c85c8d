//! Every way in which a device fails becomes an error that says what to do.

use super::cuda_emulator::{driver, emulated_device, fail_allocation, fail_launch, in_child};
use rpt::cuda::{CudaError, Device, Shape};

/// Opens a device in another process under these variables, and returns what that process says.
fn opened_with(variables: &[(&str, &str)]) -> String {
    let output = in_child("failures::opens_a_device", variables);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
#[ignore = "run by others with variables"]
fn opens_a_device() {
    driver();
    match Device::open(0) {
        Ok(device) => println!("opened {}", device.properties().name),
        Err(error) => println!("error: {error}; hint: {}", error.hint().unwrap_or_default()),
    }
}

#[test]
fn no_device() {
    let text = opened_with(&[("RPT_EMULATED_NO_DEVICE", "1")]);
    assert!(text.contains("error: no CUDA device 0: the driver shows 0; hint: nvidia-smi"), "{text}");
}

#[test]
fn an_old_driver() {
    let text = opened_with(&[("RPT_EMULATED_DRIVER_VERSION", "12080")]);
    assert!(text.contains("made for CUDA 12.8, and this program for 13.0; hint: update"), "{text}");
    assert!(opened_with(&[]).contains("opened emulated"));
}

#[test]
fn no_driver() {
    let output = in_child("failures::opens_without_driver", &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    let absent =
        text.contains("no CUDA driver: libcuda.so could not be loaded; hint: install the NVIDIA driver");
    assert!(absent || text.contains("this machine has a driver"), "{text}");
}

#[test]
#[ignore = "run by no_driver"]
fn opens_without_driver() {
    match Device::open(0) {
        Err(error @ CudaError::NoDriver) => println!("{error}; hint: {}", error.hint().unwrap()),
        _ => println!("this machine has a driver"),
    }
}

#[test]
fn no_such_device() {
    driver();
    assert!(matches!(Device::open(4711), Err(CudaError::NoDevice { ordinal: 4711, .. })));
}

#[test]
fn too_little_memory_leaves_the_device_usable() {
    let device = super::cuda_emulator::device();
    let total = device.memory().unwrap().total;
    let error = device.allocate::<f32>("a large thing", total).unwrap_err();
    let CudaError::OutOfMemory { what, requested, .. } = error else { panic!("{error}") };
    assert_eq!((what, requested), ("a large thing", 4 * total));
    assert!(error.is_out_of_memory() && error.hint().is_some());
    assert!(device.allocate::<u64>("more than can be counted", usize::MAX).unwrap_err().is_out_of_memory());
    assert_eq!(device.upload("x", &[1, 2, 3]).unwrap().download().unwrap(), [1, 2, 3]);
}

#[test]
fn an_allocation_is_tried_again_after_giving_back() {
    let Some(device) = emulated_device() else { return };
    fail_allocation(1);
    assert!(device.zeroed::<f32>("x", 10).is_ok());
    fail_allocation(2);
    assert!(device.zeroed::<f32>("x", 10).is_ok());
    assert!(device.pinned::<f32>(10).is_err(), "the second");
}

#[test]
fn a_failed_launch_names_its_kernel() {
    let Some(device) = emulated_device() else { return };
    let mut x = device.zeroed::<f32>("x", 256).unwrap();
    let other = device.zeroed::<f32>("y", 256).unwrap();
    let kernel = device.kernel("test_add").unwrap();
    let mut launch = || {
        let launch = kernel.with(Shape::of(1, 256)).read(&other).write(&mut x).value(256).value(1.0f32);
        // SAFETY: 256 elements in both.
        unsafe { launch.launch() }
    };
    fail_launch(2);
    launch().unwrap();
    let error = launch().unwrap_err();
    assert!(error.to_string().contains("kernel test_add or one before it failed"), "{error}");
    assert!(error.hint().unwrap().contains("CUDA_LAUNCH_BLOCKING"));
    assert!(matches!(device.synchronize(), Err(CudaError::KernelFailed { .. })));
}

#[test]
fn wrong_launches_are_refused_before_they_reach_the_device() {
    let Some(device) = emulated_device() else { return };
    assert!(matches!(device.kernel("no_such_kernel"), Err(CudaError::NoKernel { .. })));
    let mut x = device.zeroed::<f32>("x", 256).unwrap();
    let other = device.zeroed::<f32>("y", 256).unwrap();
    let kernel = device.kernel("test_add").unwrap();
    assert_eq!(kernel.thread_limit(), 256);
    let mut refused = |shape: Shape, part: &str| {
        let launch = kernel.with(shape).read(&other).write(&mut x).value(256).value(1.0f32);
        // SAFETY: refused.
        let error = unsafe { launch.launch() }.unwrap_err();
        assert!(matches!(error, CudaError::Launch { .. }) && error.to_string().contains(part), "{error}");
    };
    refused(Shape::of(1, 257), "257 threads in a block, of at most 256");
    refused(Shape::of(1, 0), "0 threads");
    refused(Shape::of(1 << 40, 1), "a grid of");
    refused(Shape::grid(1, 65536, 1), "a grid of");
    refused(Shape::of(1, 32).shared(1 << 20), "bytes of shared memory, of at most 232448");
    let short = kernel.with(Shape::of(1, 32)).read(&other).write(&mut x).value(256);
    // SAFETY: refused.
    assert!(unsafe { short.launch() }.unwrap_err().to_string().contains("parameters"));
    let wide = kernel.with(Shape::of(1, 32)).read(&other).write(&mut x).value(256i64).value(1.0f32);
    // SAFETY: refused.
    assert!(unsafe { wide.launch() }.unwrap_err().to_string().contains("[8, 8, 4, 4]"));
    device.synchronize().unwrap();
}

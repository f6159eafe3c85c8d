//! What the emulated device finds in kernels, one kernel for each.

use super::cuda_emulator::{emulated_device, in_child};
use rpt::cuda::{CudaError, Shape};

/// Launches a defective kernel on 64 floats; returns how it failed, or the numbers that it made.
fn outcome(name: &str, shape: Shape, count: i32) -> Option<Result<Vec<f32>, (String, String)>> {
    let device = emulated_device()?;
    let values: Vec<f32> = (0..1024).map(|at| at as f32).collect();
    let length = if name == "defect_no_wait" { 1024 } else { 64 * shape.blocks[0] };
    let mut x = device.upload("x", &values[..length]).unwrap();
    let kernel = device.kernel(name).unwrap();
    // SAFETY: it is not; that is what the emulated device must find.
    let launched = unsafe { kernel.with(shape).write(&mut x).value(count).launch() };
    Some(match launched {
        Ok(()) => Ok(x.download().unwrap()),
        Err(CudaError::KernelFailed { kernel, code, .. }) => {
            // A device that has failed does nothing more.
            assert!(matches!(x.download(), Err(CudaError::KernelFailed { .. })));
            Err((kernel, code))
        }
        Err(other) => panic!("{other}"),
    })
}

fn is_found(name: &str, shape: Shape, count: i32, code: &str) {
    if let Some(outcome) = outcome(name, shape, count) {
        assert_eq!(outcome, Err((name.to_owned(), code.to_owned())));
    }
}

const ILLEGAL: &str = "CUDA_ERROR_ILLEGAL_ADDRESS";
const FAILED: &str = "CUDA_ERROR_LAUNCH_FAILED";

#[test]
fn accesses_outside_of_memory() {
    is_found("defect_writes_behind", Shape::of(1, 64), 64, ILLEGAL);
    is_found("defect_reads_before", Shape::of(1, 32), 1024, ILLEGAL);
}

#[test]
fn accesses_outside_of_shared_memory() {
    is_found("defect_shared_index", Shape::of(1, 32), 1, FAILED);
    is_found("defect_dynamic_shared_index", Shape::of(1, 32).shared(128), 1, ILLEGAL);
}

#[test]
fn misaligned_accesses() {
    is_found("defect_misaligned", Shape::of(1, 32), 1, FAILED);
}

#[test]
fn barriers_that_some_threads_pass_by() {
    is_found("defect_barrier_in_a_branch", Shape::of(2, 64), 32, FAILED);
    is_found("defect_barrier_in_a_branch", Shape::of(2, 64), 1, FAILED);
    is_found("defect_two_barriers", Shape::of(2, 64), 32, FAILED);
}

#[test]
fn collectives_that_some_lanes_pass_by() {
    is_found("defect_shuffle_in_a_branch", Shape::of(1, 32), 31, FAILED);
    is_found("defect_mask_without_the_caller", Shape::of(1, 32), 16, FAILED);
    // Lanes that do not exist.
    is_found("defect_shuffle_in_a_branch", Shape::of(1, 48), 48, FAILED);
}

#[test]
fn too_deep_a_stack() {
    is_found("defect_deep_recursion", Shape::of(1, 32), 0, ILLEGAL);
}

#[test]
fn missing_barriers_and_waits_show_in_the_numbers() {
    let Some(found) = outcome("defect_no_barrier", Shape::of(8, 64), 0) else { return };
    let right: Vec<f32> = (0..512).map(|at| ((at % 64 + 1) % 64) as f32).collect();
    assert_ne!(found.unwrap(), right);
    let found = outcome("defect_no_wait", Shape::of(4, 64), 0).unwrap().unwrap();
    assert!(found.iter().any(|value| value.is_nan()), "shared memory that nobody wrote is not a number");
}

#[test]
fn a_defect_is_described() {
    let output = in_child("defects::writes_just_behind", &[]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("kernel defect_writes_just_behind wrote just outside of an allocation"), "{text}");
    let output = in_child("defects::writes_far_behind", &[]);
    let text = String::from_utf8_lossy(&output.stderr);
    let expected = "kernel defect_writes_behind, block (0, 0, 0), thread (0, 0, 0): writes to an address 8192 bytes \
                    behind an allocation of 256 bytes";
    assert!(text.contains("writes to an address") && text.contains("of 256 bytes"), "{expected}\n{text}");
}

#[test]
#[ignore = "run by a_defect_is_described"]
fn writes_just_behind() {
    let device = emulated_device().unwrap();
    let mut x = device.zeroed::<f32>("x", 63).unwrap();
    let kernel = device.kernel("defect_writes_just_behind").unwrap();
    // SAFETY: it is not; that is what the emulated device must find.
    let launched = unsafe { kernel.with(Shape::of(1, 1)).write(&mut x).value(63).launch() };
    assert!(matches!(launched, Err(CudaError::KernelFailed { .. })));
}

#[test]
#[ignore = "run by a_defect_is_described"]
fn writes_far_behind() {
    is_found("defect_writes_behind", Shape::of(1, 64), 64, ILLEGAL);
}

//! Whether what a launch is given has the sizes that its kernel takes for granted.

use super::error::{CudaError, Result};

/// Kernels count sides in 32 bits, those of the last block's threads beyond the end too.
const LARGEST_SIDE: usize = i32::MAX as usize - (1 << 16);

pub(super) fn room(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if found < expected { Err(CudaError::Length { what, expected, found }) } else { Ok(()) }
}

pub(super) fn same_length(what: &'static str, expected: usize, found: usize) -> Result<()> {
    if expected == found { Ok(()) } else { Err(CudaError::Length { what, expected, found }) }
}

/// How many rows of `columns` elements there are in `elements`, all of which must belong to one.
pub(super) fn rows_of(what: &'static str, elements: usize, columns: usize) -> Result<usize> {
    if columns > 0 && elements.is_multiple_of(columns) {
        return Ok(elements / columns);
    }
    let expected = elements.div_ceil(columns.max(1)).saturating_mul(columns).max(1);
    Err(CudaError::Length { what, expected, found: elements })
}

/// A number of elements, rows or columns as kernels take it.
pub(super) fn side(kernel: &str, elements: usize) -> Result<i32> {
    if elements <= LARGEST_SIDE {
        return Ok(elements as i32);
    }
    refuse(kernel, format!("a side of {elements} is longer than {LARGEST_SIDE}"))
}

pub(super) fn refuse<T>(kernel: &str, reason: impl Into<String>) -> Result<T> {
    Err(CudaError::Launch { kernel: kernel.to_owned(), reason: reason.into() })
}

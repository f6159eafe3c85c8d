//! Products by cuBLASLt, with one algorithm for each shape.
//!
//! The library sees columns where we see rows, so it is asked for the transposed product: cᵀ = bᵀ aᵀ, whose operands are
//! our matrices as they lie. Algorithms that split a sum among blocks are ruled out; the others give the same bits every
//! time.

use super::buffer::{Buffer, Slice, SliceMut};
use super::device::{Context, Device, locked};
use super::error::{CudaError, Result};
use super::gemm::{Element, Operand, Product};
use cudarc::cublaslt::sys::{self, cublasStatus_t};
use std::collections::HashMap;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::sync::{Arc, Mutex};

/// What the vendor recommends for Hopper.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Shapes whose algorithm is kept; asking again gives the same one.
const KEPT_PLANS: usize = 4096;
/// The library's `CUBLAS_OP_N` and `CUBLAS_OP_T`.
const AS_IT_LIES: i32 = 0;
const TURNED: i32 = 1;
/// Algorithms that are looked at for a shape.
const CANDIDATES: usize = 8;

/// The library on a device.
#[derive(Debug)]
pub(super) struct Blas {
    context: Arc<Context>,
    handle: sys::cublasLtHandle_t,
    /// For products on the first stream and on the second.
    workspaces: [Buffer<u8>; 2],
    /// `None` where the library has no algorithm.
    plans: Mutex<HashMap<Product, Option<Arc<Plan>>>>,
}

// SAFETY: the library allows its handle to be used by several threads.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

impl Blas {
    pub(super) fn new(device: &Device) -> Result<Self> {
        // SAFETY: loads a library, whose initialisers are the vendor's.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoBlas);
        }
        let workspace = || device.allocate("workspace of matrix products", WORKSPACE_BYTES);
        let workspaces = [workspace()?, workspace()?];
        device.context.make_current()?;
        let handle = made("cublasLtCreate", |handle| {
            // SAFETY: `handle` is writable, a context current.
            unsafe { sys::cublasLtCreate(handle) }
        })?;
        Ok(Self { context: Arc::clone(&device.context), handle, workspaces, plans: Mutex::default() })
    }

    /// Asks the device for the product; `false` when the library has no algorithm for it.
    pub(super) fn multiply<T: Element, U: Element>(
        &self,
        product: &Product,
        a: Slice<'_, T>,
        b: Slice<'_, T>,
        c: &SliceMut<'_, U>,
        accumulate: bool,
    ) -> Result<bool> {
        let Some(plan) = self.plan(product)? else { return Ok(false) };
        let one = 1.0f32;
        let beta = if accumulate { 1.0f32 } else { 0.0 };
        let workspace = Slice::from(&self.workspaces[usize::from(self.context.is_beside())]);
        self.context.make_current()?;
        // SAFETY: the plan describes these matrices, which lie within their memory; alpha and beta are of the scale's
        // type and read before the call returns; products on one stream may share the workspace.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.handle,
                plan.operation.0,
                (&raw const one).cast(),
                b.address() as *const c_void,
                plan.b.0,
                a.address() as *const c_void,
                plan.a.0,
                (&raw const beta).cast(),
                c.address() as *const c_void,
                plan.c.0,
                c.address() as *mut c_void,
                plan.c.0,
                &raw const plan.algorithm,
                workspace.address() as *mut c_void,
                WORKSPACE_BYTES,
                self.context.stream().cast(),
            )
        };
        check("cublasLtMatmul", status)?;
        for allocation in [a.allocation, b.allocation, c.allocation, workspace.allocation] {
            self.context.keep(allocation);
        }
        Ok(true)
    }

    fn plan(&self, product: &Product) -> Result<Option<Arc<Plan>>> {
        if let Some(known) = locked(&self.plans).get(product) {
            return Ok(known.clone());
        }
        self.context.make_current()?;
        let plan = Plan::new(self.handle, product)?.map(Arc::new);
        let mut plans = locked(&self.plans);
        if plans.len() >= KEPT_PLANS {
            plans.clear();
        }
        plans.insert(*product, plan.clone());
        Ok(plan)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made by `new`, destroyed once.
            let _ = unsafe { sys::cublasLtDestroy(self.handle) };
        }
    }
}

/// A product as the library knows it.
#[derive(Debug)]
struct Plan {
    operation: Operation,
    a: Columns,
    b: Columns,
    c: Columns,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: descriptors are plain data that the library only reads once they are made.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, product: &Product) -> Result<Option<Self>> {
        let operation = Operation::new(product)?;
        let (a, b) = (Columns::new(&product.a)?, Columns::new(&product.b)?);
        let c = Columns::new(&product.c)?;
        let preference = Preference::new(product)?;
        let mut found: [MaybeUninit<sys::cublasLtMatmulHeuristicResult_t>; CANDIDATES] =
            [const { MaybeUninit::uninit() }; CANDIDATES];
        let mut count = 0;
        // SAFETY: all descriptors live; at most `CANDIDATES` results are written and `count` tells how many.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                operation.0,
                b.0,
                a.0,
                c.0,
                c.0,
                preference.0,
                CANDIDATES as i32,
                found.as_mut_ptr().cast(),
                &raw mut count,
            )
        };
        if status == cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED {
            return Ok(None);
        }
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        let found = found.iter().take(usize::try_from(count).unwrap_or(0));
        // SAFETY: the library has written these.
        let mut found = found.map(|result| unsafe { result.assume_init_ref() });
        let fits = |result: &&sys::cublasLtMatmulHeuristicResult_t| {
            result.state == cublasStatus_t::CUBLAS_STATUS_SUCCESS && result.workspaceSize <= WORKSPACE_BYTES
        };
        let algorithm = found.find(fits).map(|best| best.algo);
        Ok(algorithm.map(|algorithm| Self { operation, a, b, c, algorithm }))
    }
}

fn number_type(element: &str) -> sys::cudaDataType {
    if element == <f32 as Element>::NAME {
        sys::cudaDataType::CUDA_R_32F
    } else {
        sys::cudaDataType::CUDA_R_16BF
    }
}

/// Sums of f32, and which operands are turned.
#[derive(Debug)]
struct Operation(sys::cublasLtMatmulDesc_t);

impl Operation {
    fn new(product: &Product) -> Result<Self> {
        let (compute, scale) = (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F);
        let own = Self(made("cublasLtMatmulDescCreate", |operation| {
            // SAFETY: `operation` is writable.
            unsafe { sys::cublasLtMatmulDescCreate(operation, compute, scale) }
        })?);
        // Our b comes first; as columns it lies turned when its rows are the result's columns.
        own.set(
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
            product.layout.b_is_transposed(),
        )?;
        own.set(
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSB,
            product.layout.a_is_transposed(),
        )?;
        Ok(own)
    }

    fn set(&self, attribute: sys::cublasLtMatmulDescAttributes_t, turned: bool) -> Result<()> {
        let turn = if turned { TURNED } else { AS_IT_LIES };
        // SAFETY: both attributes are of type int32_t, which is read before the call returns.
        let status = unsafe {
            sys::cublasLtMatmulDescSetAttribute(self.0, attribute, (&raw const turn).cast(), size_of::<i32>())
        };
        check("cublasLtMatmulDescSetAttribute", status)
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { sys::cublasLtMatmulDescDestroy(self.0) };
    }
}

/// A matrix of rows, as columns.
#[derive(Debug)]
struct Columns(sys::cublasLtMatrixLayout_t);

impl Columns {
    fn new(operand: &Operand) -> Result<Self> {
        let (rows, columns) = (operand.columns as u64, operand.rows as u64);
        Ok(Self(made("cublasLtMatrixLayoutCreate", |layout| {
            // SAFETY: `layout` is writable.
            unsafe {
                sys::cublasLtMatrixLayoutCreate(
                    layout,
                    number_type(operand.element),
                    rows,
                    columns,
                    operand.stride as i64,
                )
            }
        })?))
    }
}

impl Drop for Columns {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { sys::cublasLtMatrixLayoutDestroy(self.0) };
    }
}

/// What an algorithm must heed.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new(product: &Product) -> Result<Self> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let own = Self(made("cublasLtMatmulPreferenceCreate", |preference| {
            // SAFETY: `preference` is writable.
            unsafe { sys::cublasLtMatmulPreferenceCreate(preference) }
        })?);
        own.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, WORKSPACE_BYTES as u64)?;
        let whole_sums = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE as u32;
        own.set(Attribute::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, whole_sums)?;
        own.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, product.b.alignment)?;
        own.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, product.a.alignment)?;
        own.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, product.c.alignment)?;
        own.set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, product.c.alignment)?;
        Ok(own)
    }

    fn set<V: Copy>(&self, attribute: sys::cublasLtMatmulPreferenceAttributes_t, value: V) -> Result<()> {
        let (pointer, bytes) = ((&raw const value).cast(), size_of::<V>());
        // SAFETY: the workspace is a uint64_t and the others are uint32_t, read before the call returns.
        let status = unsafe { sys::cublasLtMatmulPreferenceSetAttribute(self.0, attribute, pointer, bytes) };
        check("cublasLtMatmulPreferenceSetAttribute", status)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made by `new`, destroyed once.
        let _ = unsafe { sys::cublasLtMatmulPreferenceDestroy(self.0) };
    }
}

fn made<T>(call: &'static str, make: impl FnOnce(*mut T) -> cublasStatus_t) -> Result<T> {
    let mut made = MaybeUninit::uninit();
    check(call, make(made.as_mut_ptr()))?;
    // SAFETY: the library has written it, since the call succeeded.
    Ok(unsafe { made.assume_init() })
}

fn check(call: &'static str, status: cublasStatus_t) -> Result<()> {
    if status == cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    Err(CudaError::Blas { call, code: format!("{status:?}") })
}

//! Matrix products of a layer: its forward pass and both gradients.
//!
//! There are two ways. The vendor's library is fastest; its algorithm is chosen once for each shape, so equal shapes give
//! equal bits, but other numbers of rows may not. Our own kernel sums every element in order of the inner index, so a
//! row has the same bits in every batch: that is the mode `batch_invariant`.

use super::blas::Blas;
use super::buffer::{Number, Slice, SliceMut};
use super::device::Device;
use super::error::{CudaError, Result};
use super::module::Shape;
use half::bf16;

/// A type of numbers that models calculate with. Products of its matrices may be stored in it, and in f32.
pub trait Element: Number + SummedIn<Self> + SummedIn<f32> {
    /// Its part in the names of kernels.
    #[doc(hidden)]
    const NAME: &'static str;
}

impl Element for f32 {
    const NAME: &'static str = "f32";
}
impl Element for bf16 {
    const NAME: &'static str = "bf16";
}

/// [`Sum`] seen from the operands: what every element promises.
#[doc(hidden)]
pub trait SummedIn<U> {}
impl SummedIn<f32> for f32 {}
impl SummedIn<f32> for bf16 {}
impl SummedIn<bf16> for bf16 {}

/// A type of numbers that products of matrices of `T` are stored in: `T` itself, or f32.
pub trait Sum<T>: Element {}
impl<T: SummedIn<U>, U: Element> Sum<T> for U {}

/// How kernels' names end that take a gradient of `G` and everything else of `T`.
pub(super) fn gradient_suffix<G: Element, T: Element>() -> String {
    if G::NAME == T::NAME { T::NAME.to_owned() } else { format!("{}_{}", G::NAME, T::NAME) }
}

/// A matrix to read, row after row.
#[derive(Clone, Copy, Debug)]
pub struct Matrix<'a, T> {
    data: Slice<'a, T>,
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<'a, T: Element> Matrix<'a, T> {
    /// All of `data`.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when it has another number of elements.
    pub fn new(data: impl Into<Slice<'a, T>>, rows: usize, columns: usize) -> Result<Self> {
        let data = data.into();
        all_of(data.len(), rows, columns)?;
        Self::with_stride(data, rows, columns, columns)
    }

    /// Rows that begin `stride` elements apart.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when they overlap or do not lie within `data`.
    pub fn with_stride(
        data: impl Into<Slice<'a, T>>,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<Self> {
        let data = data.into();
        lies_within(data.len(), rows, columns, stride)?;
        Ok(Self { data, rows, columns, stride })
    }
}

/// A matrix to write, row after row.
#[derive(Debug)]
pub struct MatrixMut<'a, T> {
    data: SliceMut<'a, T>,
    rows: usize,
    columns: usize,
    stride: usize,
}

impl<'a, T: Element> MatrixMut<'a, T> {
    /// All of `data`.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when it has another number of elements.
    pub fn new(data: impl Into<SliceMut<'a, T>>, rows: usize, columns: usize) -> Result<Self> {
        let data = data.into();
        all_of(data.len(), rows, columns)?;
        Self::with_stride(data, rows, columns, columns)
    }

    /// Rows that begin `stride` elements apart; what lies between them stays.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when they overlap or do not lie within `data`.
    pub fn with_stride(
        data: impl Into<SliceMut<'a, T>>,
        rows: usize,
        columns: usize,
        stride: usize,
    ) -> Result<Self> {
        let data = data.into();
        lies_within(data.len(), rows, columns, stride)?;
        Ok(Self { data, rows, columns, stride })
    }
}

/// Which of the two operands lie transposed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Layout {
    /// a\[m, k\] b\[n, k\]ᵀ
    Nt,
    /// a\[m, k\] b\[k, n\]
    Nn,
    /// a\[k, m\]ᵀ b\[k, n\]
    Tn,
}

impl Layout {
    fn name(self) -> &'static str {
        match self {
            Self::Nt => "nt",
            Self::Nn => "nn",
            Self::Tn => "tn",
        }
    }

    pub(super) fn a_is_transposed(self) -> bool {
        self == Self::Tn
    }

    pub(super) fn b_is_transposed(self) -> bool {
        self == Self::Nt
    }
}

/// One operand as both ways see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Operand {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) stride: usize,
    pub(super) element: &'static str,
    /// The largest power of two that divides its address, at most 256.
    pub(super) alignment: u32,
}

impl Operand {
    fn of<T: Element>(address: u64, rows: usize, columns: usize, stride: usize) -> Self {
        Self { rows, columns, stride, element: T::NAME, alignment: 1 << address.trailing_zeros().min(8) }
    }

    /// Whether all its rows can be read 16 bytes at a time.
    fn is_aligned(&self) -> bool {
        self.alignment >= 16 && self.stride.is_multiple_of(8)
    }
}

/// A product c\[m, n\] of two operands with inner dimension k.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    pub(super) layout: Layout,
    pub(super) a: Operand,
    pub(super) b: Operand,
    pub(super) c: Operand,
}

impl Product {
    fn inner(&self) -> usize {
        if self.layout.a_is_transposed() { self.a.rows } else { self.a.columns }
    }

    fn check(&self) -> Result<()> {
        let turned = |operand: &Operand, turn: bool| {
            if turn { (operand.columns, operand.rows) } else { (operand.rows, operand.columns) }
        };
        let (m, k) = turned(&self.a, self.layout.a_is_transposed());
        let (inner, n) = turned(&self.b, self.layout.b_is_transposed());
        if k != inner || (m, n) != (self.c.rows, self.c.columns) {
            let reason =
                format!("[{m}, {k}] times [{inner}, {n}] is not [{}, {}]", self.c.rows, self.c.columns);
            return Err(CudaError::Shape { reason });
        }
        let largest =
            [&self.a, &self.b, &self.c].map(|operand| operand.rows.max(operand.stride)).into_iter().max();
        if largest > Some(i32::MAX as usize - 256) {
            return Err(CudaError::Shape { reason: format!("a side of {largest:?} elements is too long") });
        }
        Ok(())
    }
}

/// Tiles of the own kernel for bf16: rows and columns of a block's part of c, threads, and shared memory.
struct Tiles {
    name: &'static str,
    side: usize,
    threads: usize,
    depth: usize,
    stages: usize,
}

const WIDE: Tiles = Tiles { name: "wide", side: 128, threads: 256, depth: 32, stages: 3 };
const NARROW: Tiles = Tiles { name: "narrow", side: 32, threads: 128, depth: 128, stages: 4 };

impl Tiles {
    fn blocks(&self, product: &Product) -> usize {
        product.c.rows.div_ceil(self.side) * product.c.columns.div_ceil(self.side)
    }

    /// Lines of an operand's tile are eight elements longer than what they hold.
    fn shared_bytes(&self, layout: Layout) -> usize {
        let along = self.side * (self.depth + 8);
        let across = self.depth * (self.side + 8);
        let a = if layout.a_is_transposed() { across } else { along };
        let b = if layout.b_is_transposed() { along } else { across };
        self.stages * (a + b) * size_of::<bf16>()
    }
}

/// Side of a block's part of c in the own kernel for f32, and its threads.
const F32_TILE: (usize, usize) = (64, 256);

/// Products of matrices on one device. All sums are of f32 and without shortened operands.
#[derive(Debug)]
pub struct Gemm {
    device: Device,
    blas: Option<Blas>,
}

impl Gemm {
    /// With the own kernel when rows must have the same bits in every batch, otherwise with the vendor's library, and the
    /// own kernel for what that cannot do.
    ///
    /// # Errors
    /// [`CudaError::NoBlas`] when the library is wanted and absent.
    pub fn new(device: &Device, batch_invariant: bool) -> Result<Self> {
        let blas = if batch_invariant { None } else { Some(Blas::new(device)?) };
        Ok(Self { device: device.clone(), blas })
    }

    /// y\[rows, out\] = x\[rows, in\] w\[out, in\]ᵀ, added to y when `accumulate`.
    ///
    /// # Errors
    /// When shapes do not fit, or the device has failed.
    pub fn forward<T: Element, U: Sum<T>>(
        &self,
        x: Matrix<'_, T>,
        w: Matrix<'_, T>,
        y: MatrixMut<'_, U>,
        accumulate: bool,
    ) -> Result<()> {
        self.product(Layout::Nt, x, w, y, accumulate)
    }

    /// dx\[rows, in\] = dy\[rows, out\] w\[out, in\], added to dx when `accumulate`.
    ///
    /// # Errors
    /// When shapes do not fit, or the device has failed.
    pub fn input_gradient<T: Element, U: Sum<T>>(
        &self,
        dy: Matrix<'_, T>,
        w: Matrix<'_, T>,
        dx: MatrixMut<'_, U>,
        accumulate: bool,
    ) -> Result<()> {
        self.product(Layout::Nn, dy, w, dx, accumulate)
    }

    /// dw\[out, in\] = dy\[rows, out\]ᵀ x\[rows, in\], added to dw when `accumulate`.
    ///
    /// # Errors
    /// When shapes do not fit, or the device has failed.
    pub fn weight_gradient<T: Element, U: Sum<T>>(
        &self,
        dy: Matrix<'_, T>,
        x: Matrix<'_, T>,
        dw: MatrixMut<'_, U>,
        accumulate: bool,
    ) -> Result<()> {
        self.product(Layout::Tn, dy, x, dw, accumulate)
    }

    fn product<T: Element, U: Sum<T>>(
        &self,
        layout: Layout,
        a: Matrix<'_, T>,
        b: Matrix<'_, T>,
        c: MatrixMut<'_, U>,
        accumulate: bool,
    ) -> Result<()> {
        let product = Product {
            layout,
            a: Operand::of::<T>(a.data.address(), a.rows, a.columns, a.stride),
            b: Operand::of::<T>(b.data.address(), b.rows, b.columns, b.stride),
            c: Operand::of::<U>(c.data.address(), c.rows, c.columns, c.stride),
        };
        product.check()?;
        if product.c.rows == 0 || product.c.columns == 0 {
            return Ok(());
        }
        if let Some(blas) = &self.blas
            && product.inner() > 0
            && blas.multiply(&product, a.data, b.data, &c.data, accumulate)?
        {
            return Ok(());
        }
        self.own(&product, a.data, b.data, c.data, accumulate)
    }

    fn own<T: Element, U: Element>(
        &self,
        product: &Product,
        a: Slice<'_, T>,
        b: Slice<'_, T>,
        c: SliceMut<'_, U>,
        accumulate: bool,
    ) -> Result<()> {
        let layout = product.layout.name();
        let is_bf16 = T::NAME == bf16::NAME;
        let (name, shape) = if is_bf16 {
            let enough = WIDE.blocks(product) >= self.device.properties().multiprocessors;
            let tiles = if enough { &WIDE } else { &NARROW };
            let shape = Shape::of(tiles.blocks(product), tiles.threads);
            let name = format!("matmul_{layout}_bf16_{}_{}", U::NAME, tiles.name);
            (name, shape.shared(tiles.shared_bytes(product.layout)))
        } else {
            let (side, threads) = F32_TILE;
            let blocks = product.c.rows.div_ceil(side) * product.c.columns.div_ceil(side);
            (format!("matmul_{layout}_f32_f32"), Shape::of(blocks, threads))
        };
        let kernel = self.device.kernel(&name)?;
        let launch = kernel.with(shape);
        let launch = launch.read(a).value(product.a.stride as i32);
        let launch = launch.read(b).value(product.b.stride as i32);
        let launch = launch.write(c).value(product.c.stride as i32);
        let sides = [product.c.rows, product.c.columns, product.inner()];
        let mut launch = sides.into_iter().fold(launch, |launch, side| launch.value(side as i32));
        if is_bf16 {
            launch = launch.value(i32::from(product.a.is_aligned() && product.b.is_aligned()));
        }
        // SAFETY: the parameters are those of matmul.cu; the matrices lie within their memory and fit together, which
        // was checked, and sides and strides are i32.
        unsafe { launch.value(i32::from(accumulate)).launch() }
    }
}

fn all_of(elements: usize, rows: usize, columns: usize) -> Result<()> {
    if rows.checked_mul(columns) == Some(elements) {
        return Ok(());
    }
    Err(CudaError::Shape { reason: format!("{elements} elements are not a matrix of [{rows}, {columns}]") })
}

fn lies_within(elements: usize, rows: usize, columns: usize, stride: usize) -> Result<()> {
    let end = rows.saturating_sub(1).checked_mul(stride).and_then(|last| last.checked_add(columns));
    let fits = end.is_some_and(|end| end <= elements) || rows == 0;
    if fits && stride >= columns {
        return Ok(());
    }
    let reason =
        format!("rows of {columns} that begin {stride} apart, {rows} of them, in {elements} elements");
    Err(CudaError::Shape { reason })
}

//! Choice of instruction set at run time, and the vector type behind the matrix product.
//!
//! AVX-512, AVX2 and portable code give the same bits: each lane is a chain of fused
//! multiply-adds, and only the number of lanes that run side by side differs.

use super::dtype::Element;
use half::{bf16, f16};
use std::sync::OnceLock;

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// 512-bit vectors with fused multiply-add.
    Avx512,
    /// 256-bit vectors with fused multiply-add.
    Avx2,
    /// Whatever the compiler makes of plain loops (NEON on 64-bit Arm).
    Portable,
}

/// The best instruction set of this machine, or the one that the environment variable `RPT_ISA`
/// names (`avx512`, `avx2`, `portable`) where the machine has it.
pub fn isa() -> Isa {
    static CHOICE: OnceLock<Isa> = OnceLock::new();
    *CHOICE.get_or_init(|| {
        let wanted = std::env::var("RPT_ISA").unwrap_or_default();
        let best = detect();
        match wanted.as_str() {
            "portable" => Isa::Portable,
            "avx2" if best == Isa::Avx512 => Isa::Avx2,
            _ => best,
        }
    })
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = ["avx512f", "avx512vl", "avx512dq", "avx512bw"]
        .iter()
        .zip([
            is_x86_feature_detected!("avx512f"),
            is_x86_feature_detected!("avx512vl"),
            is_x86_feature_detected!("avx512dq"),
            is_x86_feature_detected!("avx512bw"),
        ])
        .all(|(_, present)| present);
    match (avx2, avx512) {
        (true, true) => Isa::Avx512,
        (true, false) => Isa::Avx2,
        _ => Isa::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}

/// Whether [`isa`] multiplies pairs of bf16 numbers.
pub fn has_bf16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return isa() == Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Compiles a function once per instruction set and calls the one that [`isa`] names.
///
/// The body must be plain Rust; loops over sixteen lanes become vector code.
macro_rules! multiversion {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $return:ty)? $body:block) => {
        $(#[$meta])*
        $visibility fn $name($($argument: $type),*) $(-> $return)? {
            #[inline(always)]
            fn body($($argument: $type),*) $(-> $return)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx2,f16c,fma")]
                fn avx512($($argument: $type),*) $(-> $return)? {
                    body($($argument),*)
                }
                #[target_feature(enable = "avx2,f16c,fma")]
                fn avx2($($argument: $type),*) $(-> $return)? {
                    body($($argument),*)
                }
                match $crate::kernels::simd::isa() {
                    // SAFETY: `isa` names an instruction set only after detecting it.
                    $crate::kernels::simd::Isa::Avx512 => return unsafe { avx512($($argument),*) },
                    // SAFETY: as above.
                    $crate::kernels::simd::Isa::Avx2 => return unsafe { avx2($($argument),*) },
                    $crate::kernels::simd::Isa::Portable => {}
                }
            }
            body($($argument),*)
        }
    };
}
pub(crate) use multiversion;

/// Bytes that travel together between memory and a core.
const CACHE_LINE: usize = 64;

/// Asks for the cache lines that begin within `start..end`, so that they are near when they are read. A hint, where there is
/// one: it reads nothing, and any address will do.
#[inline(always)]
pub(crate) fn prefetch(start: *const u8, end: *const u8) {
    let mut line = start.addr().next_multiple_of(CACHE_LINE);
    while line < end.addr() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the instruction changes no state that a program sees, and does not fail on any address.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(
                start.with_addr(line).cast(),
            );
        }
        line += CACHE_LINE;
    }
}

/// Sixteen `f32` lanes.
///
/// # Safety
/// Implementations may use instructions that only code compiled for their instruction set may
/// run; `load` and `store` access sixteen consecutive elements.
pub(crate) unsafe trait Lanes: Copy {
    /// All lanes zero.
    unsafe fn zero() -> Self;
    /// Reads sixteen elements.
    unsafe fn load(from: *const f32) -> Self;
    /// Reads sixteen elements and widens them.
    unsafe fn load_bf16(from: *const bf16) -> Self;
    /// Reads sixteen elements and widens them.
    unsafe fn load_f16(from: *const f16) -> Self;
    /// Writes sixteen elements.
    unsafe fn store(self, to: *mut f32);
    /// `self + a * b` with one rounding, `a` the same in every lane.
    unsafe fn add_product(self, a: f32, b: Self) -> Self;
}

// SAFETY: plain loops; `load` and `store` touch exactly sixteen elements.
unsafe impl Lanes for [f32; 16] {
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; 16]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for sixteen readable elements.
        unsafe { from.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> Self {
        // SAFETY: as above.
        unsafe { from.cast::<[bf16; 16]>().read_unaligned() }.map(Element::widen_one)
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> Self {
        // SAFETY: as above.
        unsafe { from.cast::<[f16; 16]>().read_unaligned() }.map(Element::widen_one)
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for sixteen writable elements.
        unsafe { to.cast::<[f32; 16]>().write_unaligned(self) }
    }
    #[inline(always)]
    unsafe fn add_product(mut self, a: f32, b: Self) -> Self {
        for (lane, value) in self.iter_mut().zip(b) {
            *lane = a.mul_add(value, *lane);
        }
        self
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    //! The vector types of x86-64.
    use super::Lanes;
    use half::{bf16, f16};
    use std::arch::x86_64::{
        __m256, __m512, __m512bh, _mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32,
        _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_set1_ps,
        _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm512_castsi512_ps, _mm512_cvtepu16_epi32,
        _mm512_cvtph_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_set1_ps,
        _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
    };

    /// One AVX-512 register.
    #[derive(Clone, Copy)]
    pub(crate) struct Wide(__m512);

    // SAFETY: used only from code compiled for AVX-512; sixteen elements per access.
    unsafe impl Lanes for Wide {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: see the trait.
            Self(unsafe { _mm512_setzero_ps() })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see the trait.
            Self(unsafe { _mm512_loadu_ps(from) })
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: see the trait.
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            // SAFETY: see the trait.
            Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see the trait.
            unsafe { _mm512_storeu_ps(to, self.0) }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: f32, b: Self) -> Self {
            // SAFETY: see the trait.
            Self(unsafe { _mm512_fmadd_ps(_mm512_set1_ps(a), b.0, self.0) })
        }
    }

    /// One AVX-512 register whose products are of pairs of bf16 numbers (see `pairs`).
    #[derive(Clone, Copy)]
    pub(crate) struct WidePairs(Wide);

    // SAFETY: used only from code compiled for AVX-512 with bf16; sixteen elements per access.
    unsafe impl Lanes for WidePairs {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: see the trait.
            Self(unsafe { Wide::zero() })
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see the trait.
            Self(unsafe { Wide::load(from) })
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: see the trait.
            Self(unsafe { Wide::load_bf16(from) })
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            // SAFETY: see the trait.
            Self(unsafe { Wide::load_f16(from) })
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see the trait.
            unsafe { self.0.store(to) }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: f32, b: Self) -> Self {
            // SAFETY: see the trait; registers of words and of pairs of bf16 have the same bits.
            unsafe {
                let pairs = |words: __m512| std::mem::transmute::<__m512, __m512bh>(words);
                let product = _mm512_dpbf16_ps(self.0.0, pairs(_mm512_set1_ps(a)), pairs(b.0.0));
                Self(Wide(product))
            }
        }
    }

    /// Two AVX registers.
    #[derive(Clone, Copy)]
    pub(crate) struct Pair(__m256, __m256);

    // SAFETY: used only from code compiled for AVX2 and FMA; sixteen elements per access.
    unsafe impl Lanes for Pair {
        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: see the trait.
            unsafe { Self(_mm256_setzero_ps(), _mm256_setzero_ps()) }
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see the trait.
            unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
        }
        #[inline(always)]
        unsafe fn load_bf16(from: *const bf16) -> Self {
            // SAFETY: see the trait.
            unsafe {
                let widen = |half| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(half)));
                Self(widen(_mm_loadu_si128(from.cast())), widen(_mm_loadu_si128(from.add(8).cast())))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const f16) -> Self {
            // SAFETY: see the trait.
            unsafe {
                Self(
                    _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                    _mm256_cvtph_ps(_mm_loadu_si128(from.add(8).cast())),
                )
            }
        }
        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see the trait.
            unsafe {
                _mm256_storeu_ps(to, self.0);
                _mm256_storeu_ps(to.add(8), self.1);
            }
        }
        #[inline(always)]
        unsafe fn add_product(self, a: f32, b: Self) -> Self {
            // SAFETY: see the trait.
            unsafe {
                let a = _mm256_set1_ps(a);
                Self(_mm256_fmadd_ps(a, b.0, self.0), _mm256_fmadd_ps(a, b.1, self.1))
            }
        }
    }
}

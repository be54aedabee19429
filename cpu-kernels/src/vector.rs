//! The vector operations that the tile kernels use, implemented once per instruction set.
//!
//! Every method is `#[inline(always)]` and is meant to end up inside a function that enables the
//! instruction set (`kernel.rs`): only there do the intrinsics become single instructions.

use crate::LINE;

/// A register of `LANES` floats.
pub trait Vector: Copy {
    const LANES: usize;

    /// # Safety
    /// The caller runs with the vector's instruction set enabled.
    unsafe fn zero() -> Self;

    /// All lanes equal to `*p`.
    ///
    /// # Safety
    /// The instruction set is enabled; `p` is readable.
    unsafe fn splat(p: *const f32) -> Self;

    /// # Safety
    /// The instruction set is enabled; `LANES` floats at `p` are readable.
    unsafe fn load(p: *const f32) -> Self;

    /// # Safety
    /// The instruction set is enabled; `LANES` floats at `p` are writable.
    unsafe fn store(self, p: *mut f32);

    /// The first `live` lanes from `p`, the others zero.
    ///
    /// # Safety
    /// The instruction set is enabled; `live <= LANES` floats at `p` are readable.
    unsafe fn load_first(p: *const f32, live: usize) -> Self;

    /// The first `live` lanes to `p`.
    ///
    /// # Safety
    /// The instruction set is enabled; `live <= LANES` floats at `p` are writable.
    unsafe fn store_first(self, p: *mut f32, live: usize);

    /// # Safety
    /// The instruction set is enabled.
    unsafe fn add(self, other: Self) -> Self;

    /// # Safety
    /// The instruction set is enabled.
    unsafe fn sub(self, other: Self) -> Self;

    /// `self * factor + sum`, rounded once where the machine can.
    ///
    /// # Safety
    /// The instruction set is enabled.
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self;
}

/// Prefetches the cache line at `p`, which may be an invalid address.
#[inline(always)]
pub fn prefetch<T>(p: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch never faults, and SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Memory that will be read next, prefetched in shares, so that it arrives while tiles are computed.
#[derive(Clone, Copy)]
pub struct Coming<'a> {
    bytes: &'a [u8],
    share: usize,
}

impl<'a> Coming<'a> {
    /// In `shares` equal shares.
    pub fn new(bytes: &'a [u8], shares: usize) -> Self {
        Self {
            bytes,
            share: bytes.len().div_ceil(shares.max(1)).next_multiple_of(LINE * size_of::<f32>()),
        }
    }

    /// Prefetches the next share.
    #[inline]
    pub fn prefetch_share(&mut self) {
        let (now, later) = self.bytes.split_at(self.share.min(self.bytes.len()));
        now.iter().step_by(LINE * size_of::<f32>()).for_each(|line| prefetch(line));
        self.bytes = later;
    }
}

/// Four floats, for any target.
#[derive(Clone, Copy)]
pub struct Plain([f32; 4]);

impl Vector for Plain {
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Plain([0.0; 4])
    }

    #[inline(always)]
    unsafe fn splat(p: *const f32) -> Self {
        // SAFETY: the caller vouches for `p`.
        Plain([unsafe { *p }; 4])
    }

    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller vouches for four floats at `p`; an array of floats may be read
        // unaligned.
        Plain(unsafe { p.cast::<[f32; 4]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller vouches for four floats at `p`.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn load_first(p: *const f32, live: usize) -> Self {
        let mut lanes = [0.0; 4];
        for (i, lane) in lanes.iter_mut().enumerate().take(live) {
            // SAFETY: the caller vouches for `live` floats at `p`.
            *lane = unsafe { *p.add(i) };
        }
        Plain(lanes)
    }

    #[inline(always)]
    unsafe fn store_first(self, p: *mut f32, live: usize) {
        for (i, lane) in self.0.into_iter().enumerate().take(live) {
            // SAFETY: the caller vouches for `live` floats at `p`.
            unsafe { *p.add(i) = lane }
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i] + other.0[i]))
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        Plain(std::array::from_fn(|i| self.0[i] - other.0[i]))
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
        // without hardware for it, f32::mul_add is a library call per lane
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            Plain(std::array::from_fn(|i| self.0[i].mul_add(factor.0[i], sum.0[i])))
        } else {
            Plain(std::array::from_fn(|i| self.0[i] * factor.0[i] + sum.0[i]))
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Ymm, Zmm};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::Vector;
    use std::arch::x86_64::*;

    /// Eight floats, AVX2 and FMA.
    #[derive(Clone, Copy)]
    pub struct Ymm(__m256);

    /// The mask of the first `live` of eight lanes.
    #[inline(always)]
    unsafe fn first_of_eight(live: usize) -> __m256i {
        // SAFETY: the caller runs with AVX2.
        unsafe {
            let lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
            _mm256_cmpgt_epi32(_mm256_set1_epi32(live as i32), lane)
        }
    }

    // SAFETY (all blocks below): the trait's contract is the intrinsics' contract, word for word.
    impl Vector for Ymm {
        const LANES: usize = 8;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: AVX2 is enabled.
            Ymm(unsafe { _mm256_setzero_ps() })
        }

        #[inline(always)]
        unsafe fn splat(p: *const f32) -> Self {
            // SAFETY: AVX2 is enabled and `p` readable.
            Ymm(unsafe { _mm256_broadcast_ss(&*p) })
        }

        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            // SAFETY: AVX2 is enabled and 8 floats at `p` readable.
            Ymm(unsafe { _mm256_loadu_ps(p) })
        }

        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            // SAFETY: AVX2 is enabled and 8 floats at `p` writable.
            unsafe { _mm256_storeu_ps(p, self.0) }
        }

        #[inline(always)]
        unsafe fn load_first(p: *const f32, live: usize) -> Self {
            // SAFETY: AVX2 is enabled; masked lanes are not accessed.
            Ymm(unsafe { _mm256_maskload_ps(p, first_of_eight(live)) })
        }

        #[inline(always)]
        unsafe fn store_first(self, p: *mut f32, live: usize) {
            // SAFETY: AVX2 is enabled; masked lanes are not accessed.
            unsafe { _mm256_maskstore_ps(p, first_of_eight(live), self.0) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: AVX2 is enabled.
            Ymm(unsafe { _mm256_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            // SAFETY: AVX2 is enabled.
            Ymm(unsafe { _mm256_sub_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
            // SAFETY: FMA is enabled.
            Ymm(unsafe { _mm256_fmadd_ps(self.0, factor.0, sum.0) })
        }
    }

    /// Sixteen floats, AVX-512F.
    #[derive(Clone, Copy)]
    pub struct Zmm(__m512);

    impl Vector for Zmm {
        const LANES: usize = 16;

        #[inline(always)]
        unsafe fn zero() -> Self {
            // SAFETY: AVX-512F is enabled.
            Zmm(unsafe { _mm512_setzero_ps() })
        }

        #[inline(always)]
        unsafe fn splat(p: *const f32) -> Self {
            // SAFETY: AVX-512F is enabled and `p` readable.
            Zmm(unsafe { _mm512_set1_ps(*p) })
        }

        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self {
            // SAFETY: AVX-512F is enabled and 16 floats at `p` readable.
            Zmm(unsafe { _mm512_loadu_ps(p) })
        }

        #[inline(always)]
        unsafe fn store(self, p: *mut f32) {
            // SAFETY: AVX-512F is enabled and 16 floats at `p` writable.
            unsafe { _mm512_storeu_ps(p, self.0) }
        }

        #[inline(always)]
        unsafe fn load_first(p: *const f32, live: usize) -> Self {
            // SAFETY: AVX-512F is enabled; masked lanes are not accessed.
            Zmm(unsafe { _mm512_maskz_loadu_ps(((1u32 << live) - 1) as __mmask16, p) })
        }

        #[inline(always)]
        unsafe fn store_first(self, p: *mut f32, live: usize) {
            // SAFETY: AVX-512F is enabled; masked lanes are not accessed.
            unsafe { _mm512_mask_storeu_ps(p, ((1u32 << live) - 1) as __mmask16, self.0) }
        }

        #[inline(always)]
        unsafe fn add(self, other: Self) -> Self {
            // SAFETY: AVX-512F is enabled.
            Zmm(unsafe { _mm512_add_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn sub(self, other: Self) -> Self {
            // SAFETY: AVX-512F is enabled.
            Zmm(unsafe { _mm512_sub_ps(self.0, other.0) })
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
            // SAFETY: AVX-512F is enabled.
            Zmm(unsafe { _mm512_fmadd_ps(self.0, factor.0, sum.0) })
        }
    }
}

//! Tables of the tile kernels, with one instance per tile height and instruction set, and functions
//! that select one.
//!
//! The heights are compile-time constants so that the accumulators stay in registers. The selection
//! checks the instruction set's tile limits; the caller is responsible for the addresses.

use crate::Isa;
use crate::tile::{Correlate, Outer};
use crate::transform::{Filters, Form, Gradient, Input, Output};

/// Floats from one pixel of a tile to the next: the blocks of a slab, then [`DIRECT`].
const PITCHES: [usize; 7] = [4, 8, 16, 64, 128, 256, 512];

/// Channel counts of tensors that the kernels can read without packing. With 1,024 the rows of a tile
/// would all map to one set of the first-level cache.
pub const DIRECT: [usize; 4] = [64, 128, 256, 512];

/// A tile of a correlation. Its safety is that of `tile::correlate` with the height, vectors and pitch it was selected by, on a
/// machine that has the instruction set.
pub type CorrelateKernel = unsafe fn(&Correlate<'_>);
/// A tile of a weight gradient. Its safety is that of `tile::outer` with the height and vectors it was selected by, on a machine
/// that has the instruction set.
pub type OuterKernel = unsafe fn(&Outer);

/// The transforms of a form, on a machine that has the instruction set; their safety is that of the functions of these names in
/// `transform`, for the form's outputs and inputs.
#[derive(Clone, Copy, Debug)]
pub struct Transforms {
    /// Transforms a row of tiles.
    pub input: unsafe fn(&Input),
    /// Transforms a row of tiles back.
    pub output: unsafe fn(&Output),
    /// Transforms a row of tiles of gradients.
    pub gradient: unsafe fn(&Gradient),
    /// Transforms filters.
    pub filters: unsafe fn(&Filters),
}

/// The tables of one instruction set: `$feature` enabled, vector `$v`; heights up to `$one` for
/// tiles one vector wide, up to `$two` for tiles of two.
macro_rules! kernels {
    ($set:ident, $v:ty, $(#[$feature:meta])?, [$($one:literal)*], [$($two:literal)*]) => {
        mod $set {
            use crate::tile::{self, Correlate, Outer};
            use crate::transform::{self, Filters, Four, Gradient, Input, Matrices, Output, Two};
            use crate::vector::*;
            use super::{CorrelateKernel, OuterKernel, Transforms};

            /// # Safety
            /// That of [`tile::correlate`], with the instruction set present.
            $(#[$feature])?
            unsafe fn correlate<const M: usize, const NV: usize, const PITCH: usize>(
                t: &Correlate<'_>,
            ) {
                // SAFETY: the caller vouches for the same.
                unsafe { tile::correlate::<$v, M, NV, PITCH>(t) }
            }

            /// # Safety
            /// That of [`tile::outer`], with the instruction set present.
            $(#[$feature])?
            unsafe fn outer<const M: usize, const NV: usize>(t: &Outer) {
                // SAFETY: the caller vouches for the same.
                unsafe { tile::outer::<$v, M, NV>(t) }
            }

            /// # Safety
            /// That of [`transform::input`], with the instruction set present.
            $(#[$feature])?
            unsafe fn input<F: Matrices<M, N>, const M: usize, const N: usize>(t: &Input) {
                // SAFETY: the caller vouches for the same.
                unsafe { transform::input::<$v, F, M, N>(t) }
            }

            /// # Safety
            /// That of [`transform::output`], with the instruction set present.
            $(#[$feature])?
            unsafe fn output<F: Matrices<M, N>, const M: usize, const N: usize>(t: &Output) {
                // SAFETY: the caller vouches for the same.
                unsafe { transform::output::<$v, F, M, N>(t) }
            }

            /// # Safety
            /// That of [`transform::gradient`], with the instruction set present.
            $(#[$feature])?
            unsafe fn gradient<F: Matrices<M, N>, const M: usize, const N: usize>(t: &Gradient) {
                // SAFETY: the caller vouches for the same.
                unsafe { transform::gradient::<$v, F, M, N>(t) }
            }

            /// # Safety
            /// That of [`transform::filters`], with the instruction set present.
            $(#[$feature])?
            unsafe fn filters<F: Matrices<M, N>, const M: usize, const N: usize>(t: &Filters) {
                // SAFETY: the caller vouches for the same.
                unsafe { transform::filters::<$v, F, M, N>(t) }
            }

            /// By form.
            pub(super) static TRANSFORMS: [Transforms; 2] = [
                Transforms {
                    input: input::<Two, 2, 4>,
                    output: output::<Two, 2, 4>,
                    gradient: gradient::<Two, 2, 4>,
                    filters: filters::<Two, 2, 4>,
                },
                Transforms {
                    input: input::<Four, 4, 6>,
                    output: output::<Four, 4, 6>,
                    gradient: gradient::<Four, 4, 6>,
                    filters: filters::<Four, 4, 6>,
                },
            ];
            /// Indexed like [`super::PITCHES`].
            pub(super) static CORRELATE_ONE: [&[CorrelateKernel]; super::PITCHES.len()] = [
                &[$(correlate::<$one, 1, 4>),*],
                &[$(correlate::<$one, 1, 8>),*],
                &[$(correlate::<$one, 1, 16>),*],
                &[$(correlate::<$one, 1, 64>),*],
                &[$(correlate::<$one, 1, 128>),*],
                &[$(correlate::<$one, 1, 256>),*],
                &[$(correlate::<$one, 1, 512>),*],
            ];
            pub(super) static CORRELATE_TWO: [&[CorrelateKernel]; super::PITCHES.len()] = [
                &[$(correlate::<$two, 2, 4>),*],
                &[$(correlate::<$two, 2, 8>),*],
                &[$(correlate::<$two, 2, 16>),*],
                &[$(correlate::<$two, 2, 64>),*],
                &[$(correlate::<$two, 2, 128>),*],
                &[$(correlate::<$two, 2, 256>),*],
                &[$(correlate::<$two, 2, 512>),*],
            ];
            pub(super) static OUTER_ONE: &[OuterKernel] = &[$(outer::<$one, 1>),*];
            pub(super) static OUTER_TWO: &[OuterKernel] = &[$(outer::<$two, 2>),*];
        }
    };
}

kernels!(portable, Plain, , [1 2 3 4 5 6 7 8 9 10 11 12], [1 2 3 4 5 6]);

#[cfg(target_arch = "x86_64")]
kernels!(avx2, Ymm, #[target_feature(enable = "avx2,fma")],
    [1 2 3 4 5 6 7 8 9 10 11 12],
    [1 2 3 4 5 6]);

#[cfg(target_arch = "x86_64")]
kernels!(avx512, Zmm, #[target_feature(enable = "avx512f")],
    [1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28],
    [1 2 3 4 5 6 7 8 9 10 11 12 13 14]);

macro_rules! table {
    ($isa:expr, $name:ident) => {
        match $isa {
            Isa::Portable => portable::$name,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::$name,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::$name,
            #[cfg(not(target_arch = "x86_64"))]
            _ => unreachable!("an x86 instruction set on another processor"),
        }
    };
}

/// The kernel for `rows` pixels, `vectors` vectors of filters, and pixels `pitch` floats apart: 4, 8 or
/// 16 in a slab, one of [`DIRECT`] in a tensor.
pub fn correlate(isa: Isa, rows: usize, vectors: usize, pitch: usize) -> CorrelateKernel {
    let tables = match vectors {
        1 => &table!(isa, CORRELATE_ONE),
        2 => &table!(isa, CORRELATE_TWO),
        _ => unreachable!("no tile of {vectors} vectors"),
    };
    let index = PITCHES.iter().position(|&p| p == pitch);
    let index = index.unwrap_or_else(|| unreachable!("no tile of pixels {pitch} floats apart"));
    tables[index][rows - 1]
}

/// The kernel for `rows` channels and `vectors` vectors of filters.
pub fn outer(isa: Isa, rows: usize, vectors: usize) -> OuterKernel {
    let table = match vectors {
        1 => table!(isa, OUTER_ONE),
        2 => table!(isa, OUTER_TWO),
        _ => unreachable!("no tile of {vectors} vectors"),
    };
    table[rows - 1]
}

/// The transforms of a form.
pub fn transforms(isa: Isa, form: Form) -> Transforms {
    table!(isa, TRANSFORMS)[form as usize]
}

//! The transforms of Winograd's F(2x2, 3x3) and F(4x4, 3x3), on vectors of channels.
//!
//! A tile of `m` x `m` outputs depends on `m + 2` x `m + 2` inputs `d` and 3x3 taps `g`. With the matrices of Lavin and Gray 2016,
//! "Fast algorithms for convolutional neural networks" (section 4), for `m = 2`
//!
//! ```text
//!       1  0 -1  0          1    0    0            1  1  1  0
//! B' =  0  1  1  0     G =  1/2  1/2  1/2     A' = 0  1 -1 -1
//!       0 -1  1  0          1/2 -1/2  1/2
//!       0  1  0 -1          0    0    1
//! ```
//!
//! the outputs are `A' [(G g G') . (B' d B)] A`: 16 products instead of 36, and 36 instead of 144 for `m = 4`. The elements of a
//! transformed tile are its components; component `(m + 2) i + j` is in row `i`, column `j`.
//!
//! For `m = 4` the matrices interpolate at 0, `a`, `-a`, `b`, `-b` and infinity:
//!
//! ```text
//!       a2 b2    0  -a2-b2     0   1   0            1/(a2 b2)         1  1  1  1  1  0
//!       0    -a b2  -b2        a   1   0            n (1  a a2)  A' = 0  a -a  b -b  0
//! B' =  0     a b2  -b2       -a   1   0       G =  n (1 -a a2)       0 a2 a2 b2 b2  0
//!       0    -a2 b  -a2        b   1   0            o (1  b b2)       0 a3-a3 b3-b3  1
//!       0     a2 b  -a2       -b   1   0            o (1 -b b2)
//!       0     a2 b2    0  -a2-b2   0   1            0  0  1
//! ```
//!
//! with `n = 1/(2 a2 (a2 - b2))` and `o = 1/(2 b2 (b2 - a2))`. `a = 5/8` and `b = 3/2` keep the powers small and are exact.
//! The L2 error over 64 channels is 8e-7 of the outputs and 1.3e-6 of the filters' gradient; with the usual 1 and 2 it is 1.7e-6 and
//! 2.8e-6, with `m = 2` 3e-7 and 4e-7.
//!
//! The outputs are linear in `g`, so their gradient `dy` gives that of the taps as
//! `G' [(A dy A') . (B' d B)] G`, with the bracket summed over tiles.
//!
//! Generic over the form and the vector type, like `tile.rs`; `kernel.rs` instantiates the functions.

// The loops are over rows and columns of matrices, and their bounds are what unrolls them.
#![allow(clippy::needless_range_loop)]

use crate::vector::Vector;

/// Contiguous channels of the transformed input. A multiple of every vector's lanes.
pub const BLOCK: usize = 16;

/// The outputs of a tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// F(2x2, 3x3).
    Two,
    /// F(4x4, 3x3).
    Four,
}

impl Form {
    /// Both.
    pub const ALL: [Form; 2] = [Form::Two, Form::Four];

    /// Rows and columns of outputs of a tile.
    pub const fn outputs(self) -> usize {
        match self {
            Form::Two => 2,
            Form::Four => 4,
        }
    }

    /// Rows and columns of inputs of a tile.
    pub const fn inputs(self) -> usize {
        self.outputs() + 2
    }

    /// Elements of a transformed tile.
    pub const fn components(self) -> usize {
        self.inputs() * self.inputs()
    }

    /// Tiles that cover this many rows or columns.
    pub const fn tiles(self, pixels: usize) -> usize {
        pixels.div_ceil(self.outputs())
    }
}

/// The most rows of inputs of a tile, and of outputs.
pub const MOST: [usize; 2] = [Form::Four.inputs(), Form::Four.outputs()];

/// The most elements of a transformed tile.
pub const MOST_COMPONENTS: usize = Form::Four.components();

/// Zeros to read instead of pixels outside the image: as wide as the widest vector.
static OUTSIDE: [f32; BLOCK] = [0.0; BLOCK];

/// A row of tiles to transform into `[component][c / BLOCK][tile][BLOCK]`.
pub struct Input {
    /// The first pixel of the image rows that the tiles read, as many as the form has inputs; null for a row outside the image.
    pub rows: [*const f32; MOST[0]],
    /// Columns of the image.
    pub w: usize,
    /// Channels: a multiple of [`BLOCK`].
    pub c: usize,
    /// Component 0, channel 0 of the row's first tile.
    pub v: *mut f32,
    /// Floats from a component to the next.
    pub component: usize,
    /// Floats from a block of channels to the next.
    pub block: usize,
}

/// A row of tiles to transform back from `[component][tile][width]`.
pub struct Output {
    /// Component 0 of the row's first tile.
    pub m: *const f32,
    /// Floats from a component to the next.
    pub component: usize,
    /// Floats from a tile to the next: a multiple of the lanes.
    pub width: usize,
    /// The first pixel of the image rows, as many as the form has outputs; null for a row outside the image.
    pub rows: [*mut f32; MOST[1]],
    /// Columns of the image.
    pub w: usize,
    /// Floats from a column to the next.
    pub k: usize,
    /// Whether the outputs are added to what the rows hold.
    pub accumulate: bool,
}

/// A row of tiles of the gradient of the outputs, to transform into `[component][tile][width]`.
pub struct Gradient {
    /// The first pixel of the image rows, as many as the form has outputs; null for a row outside the image.
    pub rows: [*const f32; MOST[1]],
    /// Columns of the image.
    pub w: usize,
    /// Floats from a column to the next.
    pub k: usize,
    /// Component 0 of the row's first tile.
    pub m: *mut f32,
    /// Floats from a component to the next.
    pub component: usize,
    /// Floats from a tile to the next: a multiple of the lanes.
    pub width: usize,
}

/// Filters to transform: `[3][3][vectors][LANES]` into `[component][vectors][LANES]`.
pub struct Filters {
    /// The first vector of tap (0, 0).
    pub g: *const f32,
    /// Floats from a tap to the next.
    pub tap: usize,
    /// The first vector of component 0.
    pub u: *mut f32,
    /// Floats from a component to the next.
    pub component: usize,
    /// Floats to transform in each tap: a multiple of `LANES`.
    pub len: usize,
}

/// The matrices of a form with `M` outputs and `N` inputs.
pub(crate) trait Matrices<const M: usize, const N: usize> {
    /// `B' x`.
    ///
    /// # Safety
    /// `V`'s instruction set is enabled, here and below.
    unsafe fn into_components<V: Vector>(x: [V; N]) -> [V; N];
    /// `A' x`.
    ///
    /// # Safety
    /// As above.
    unsafe fn from_components<V: Vector>(x: [V; N]) -> [V; M];
    /// `A x`.
    ///
    /// # Safety
    /// As above.
    unsafe fn into_gradients<V: Vector>(x: [V; M]) -> [V; N];
    /// `G x`.
    ///
    /// # Safety
    /// As above.
    unsafe fn expand<V: Vector>(x: [V; 3]) -> [V; N];
}

/// F(2x2, 3x3).
pub(crate) struct Two;

// SAFETY, of all calls: the caller vouches for the instruction set; constants are readable.
impl Matrices<2, 4> for Two {
    #[inline(always)]
    unsafe fn into_components<V: Vector>(x: [V; 4]) -> [V; 4] {
        // SAFETY: see above.
        unsafe { [x[0].sub(x[2]), x[1].add(x[2]), x[2].sub(x[1]), x[1].sub(x[3])] }
    }

    #[inline(always)]
    unsafe fn from_components<V: Vector>(x: [V; 4]) -> [V; 2] {
        // SAFETY: see above.
        unsafe { [x[0].add(x[1]).add(x[2]), x[1].sub(x[2]).sub(x[3])] }
    }

    #[inline(always)]
    unsafe fn into_gradients<V: Vector>([x, y]: [V; 2]) -> [V; 4] {
        // SAFETY: see above.
        unsafe { [x, x.add(y), x.sub(y), V::zero().sub(y)] }
    }

    #[inline(always)]
    unsafe fn expand<V: Vector>(x: [V; 3]) -> [V; 4] {
        // SAFETY: see above.
        unsafe {
            let (half, minus_half) = (V::splat(&0.5), V::splat(&-0.5));
            let outer = half.mul_add(x[0].add(x[2]), V::zero());
            [x[0], x[1].mul_add(half, outer), x[1].mul_add(minus_half, outer), x[2]]
        }
    }
}

/// F(4x4, 3x3).
pub(crate) struct Four;

/// Numbers of the matrices of F(4x4, 3x3), by their names in the module's text.
mod four {
    pub const A: f32 = 0.625;
    pub const B: f32 = 1.5;
    pub const A2: f32 = A * A;
    pub const B2: f32 = B * B;
    pub const A2_B2: f32 = A2 * B2;
    pub const SUM: f32 = A2 + B2;
    pub const A3: f32 = A2 * A;
    pub const B3: f32 = B2 * B;
    pub const FIRST: f32 = 1.0 / A2_B2;
    pub const N: f32 = 1.0 / (2.0 * A2 * (A2 - B2));
    pub const O: f32 = 1.0 / (2.0 * B2 * (B2 - A2));
}

/// The numbers with which [`Form::Four`] turns sums of components into taps: those of a row of `G'`, by the power of the point.
pub const BACK: [[f32; 3]; 2] = [
    [four::N, four::N * four::A, four::N * four::A2],
    [four::O, four::O * four::B, four::O * four::B2],
];
/// The number of the first row of `G`.
pub const BACK_FIRST: f32 = four::FIRST;

// SAFETY, of all calls: the caller vouches for the instruction set; constants are readable.
impl Matrices<4, 6> for Four {
    #[inline(always)]
    unsafe fn into_components<V: Vector>(x: [V; 6]) -> [V; 6] {
        use four::*;
        // SAFETY: see above.
        unsafe {
            let (minus_a2, minus_b2) = (V::splat(&-A2), V::splat(&-B2));
            let (a, b) = (V::splat(&A), V::splat(&B));
            let (minus_a, minus_b) = (V::splat(&-A), V::splat(&-B));
            let (product, minus_sum) = (V::splat(&A2_B2), V::splat(&-SUM));
            let (even_a, odd_a) = (x[2].mul_add(minus_b2, x[4]), x[1].mul_add(minus_b2, x[3]));
            let (even_b, odd_b) = (x[2].mul_add(minus_a2, x[4]), x[1].mul_add(minus_a2, x[3]));
            [
                x[0].mul_add(product, x[2].mul_add(minus_sum, x[4])),
                odd_a.mul_add(a, even_a),
                odd_a.mul_add(minus_a, even_a),
                odd_b.mul_add(b, even_b),
                odd_b.mul_add(minus_b, even_b),
                x[1].mul_add(product, x[3].mul_add(minus_sum, x[5])),
            ]
        }
    }

    #[inline(always)]
    unsafe fn from_components<V: Vector>(x: [V; 6]) -> [V; 4] {
        use four::*;
        // SAFETY: see above.
        unsafe {
            let (sum_a, sum_b) = (x[1].add(x[2]), x[3].add(x[4]));
            let (odd_a, odd_b) = (x[1].sub(x[2]), x[3].sub(x[4]));
            let (a, a2, a3) = (V::splat(&A), V::splat(&A2), V::splat(&A3));
            let (b, b2, b3) = (V::splat(&B), V::splat(&B2), V::splat(&B3));
            [
                x[0].add(sum_a).add(sum_b),
                odd_a.mul_add(a, odd_b.mul_add(b, V::zero())),
                sum_a.mul_add(a2, sum_b.mul_add(b2, V::zero())),
                odd_a.mul_add(a3, odd_b.mul_add(b3, x[5])),
            ]
        }
    }

    #[inline(always)]
    unsafe fn into_gradients<V: Vector>(y: [V; 4]) -> [V; 6] {
        use four::*;
        // SAFETY: see above.
        unsafe {
            let (a, a2, a3) = (V::splat(&A), V::splat(&A2), V::splat(&A3));
            let (b, b2, b3) = (V::splat(&B), V::splat(&B2), V::splat(&B3));
            let (even_a, even_b) = (y[2].mul_add(a2, y[0]), y[2].mul_add(b2, y[0]));
            let odd_a = y[1].mul_add(a, y[3].mul_add(a3, V::zero()));
            let odd_b = y[1].mul_add(b, y[3].mul_add(b3, V::zero()));
            [y[0], even_a.add(odd_a), even_a.sub(odd_a), even_b.add(odd_b), even_b.sub(odd_b), y[3]]
        }
    }

    #[inline(always)]
    unsafe fn expand<V: Vector>(x: [V; 3]) -> [V; 6] {
        use four::*;
        // SAFETY: see above.
        unsafe {
            let (n, o, first) = (V::splat(&N), V::splat(&O), V::splat(&FIRST));
            let (even_a, even_b) =
                (x[2].mul_add(V::splat(&A2), x[0]), x[2].mul_add(V::splat(&B2), x[0]));
            let (even_a, even_b) = (even_a.mul_add(n, V::zero()), even_b.mul_add(o, V::zero()));
            let odd_a = x[1].mul_add(V::splat(&(N * A)), V::zero());
            let odd_b = x[1].mul_add(V::splat(&(O * B)), V::zero());
            [
                x[0].mul_add(first, V::zero()),
                even_a.add(odd_a),
                even_a.sub(odd_a),
                even_b.add(odd_b),
                even_b.sub(odd_b),
                x[2],
            ]
        }
    }
}

/// `B' x` of the next pixel of each row, from which the rows then go on by `steps`.
///
/// # Safety
/// `V`'s instruction set is enabled; `V` can be read from each pointer.
#[inline(always)]
unsafe fn next_column<V: Vector, F: Matrices<M, N>, const M: usize, const N: usize>(
    pixels: &mut [*const f32; N],
    steps: &[usize; N],
) -> [V; N] {
    // SAFETY: the caller vouches for the same.
    unsafe {
        let mut column = [V::zero(); N];
        for i in 0..N {
            column[i] = V::load(pixels[i]);
            pixels[i] = pixels[i].wrapping_add(steps[i]);
        }
        F::into_components(column)
    }
}

/// # Safety
/// `V`'s instruction set is enabled. Each of the first `N` rows that is not null holds `t.w` pixels of `t.c` floats;
/// `t.v` holds all components of `t.w.div_ceil(M)` tiles in `t.c / BLOCK` blocks.
#[inline(always)]
pub(crate) unsafe fn input<V: Vector, F: Matrices<M, N>, const M: usize, const N: usize>(
    t: &Input,
) {
    // SAFETY: every address below is one that the caller vouches for.
    unsafe {
        let mut steps = [0; N];
        for i in 0..N {
            steps[i] = if t.rows[i].is_null() { 0 } else { t.c };
        }
        for c in (0..t.c).step_by(V::LANES) {
            let mut pixels = [OUTSIDE.as_ptr(); N];
            for i in 0..N {
                if !t.rows[i].is_null() {
                    pixels[i] = t.rows[i].add(c);
                }
            }
            let outside = [V::zero(); N];
            let mut v = t.v.add(c / BLOCK * t.block + c % BLOCK);
            // Transformed columns; a tile has its first two from the tile before. A closure here would lack the instruction set,
            // unless it is inlined.
            let mut columns = [outside; N];
            columns[M + 1] = next_column::<V, F, M, N>(&mut pixels, &steps);
            for column in (0..t.w).step_by(M) {
                (columns[0], columns[1]) = (columns[M], columns[M + 1]);
                if column + M < t.w {
                    for j in 0..M {
                        columns[2 + j] = next_column::<V, F, M, N>(&mut pixels, &steps);
                    }
                } else {
                    for j in 0..M {
                        columns[2 + j] = outside;
                        if column + 1 + j < t.w {
                            columns[2 + j] = next_column::<V, F, M, N>(&mut pixels, &steps);
                        }
                    }
                }
                for i in 0..N {
                    let mut row = [V::zero(); N];
                    for j in 0..N {
                        row[j] = columns[j][i];
                    }
                    let row = F::into_components(row);
                    for j in 0..N {
                        row[j].store(v.add((N * i + j) * t.component));
                    }
                }
                v = v.add(BLOCK);
            }
        }
    }
}

/// # Safety
/// `V`'s instruction set is enabled. `t.m` holds all components of `t.w.div_ceil(M)` tiles; each of the first `M` rows
/// that is not null holds `t.w` pixels, `t.k` floats apart, of `t.width` writable floats (readable too when accumulating).
#[inline(always)]
pub(crate) unsafe fn output<V: Vector, F: Matrices<M, N>, const M: usize, const N: usize>(
    t: &Output,
) {
    // SAFETY: every address below is one that the caller vouches for.
    unsafe {
        for tile in 0..t.w.div_ceil(M) {
            let inside = (t.w - M * tile).min(M);
            for lane in (0..t.width).step_by(V::LANES) {
                let m = t.m.add(tile * t.width + lane);
                // plain loops: with closures the convolution took 1.6 times as long
                let mut rows = [[V::zero(); N]; M];
                for j in 0..N {
                    let mut column = [V::zero(); N];
                    for i in 0..N {
                        column[i] = V::load(m.add((N * i + j) * t.component));
                    }
                    let column = F::from_components(column);
                    for i in 0..M {
                        rows[i][j] = column[i];
                    }
                }
                for i in 0..M {
                    if t.rows[i].is_null() {
                        continue;
                    }
                    let y = t.rows[i].add(M * tile * t.k + lane);
                    let values = F::from_components(rows[i]);
                    for j in 0..M {
                        if j < inside {
                            let (y, value) = (y.add(j * t.k), values[j]);
                            let sum = if t.accumulate { V::load(y).add(value) } else { value };
                            sum.store(y);
                        }
                    }
                }
            }
        }
    }
}

/// # Safety
/// `V`'s instruction set is enabled. Each of the first `M` rows that is not null holds `t.w` pixels, `t.k` floats apart, of
/// `t.width` floats; `t.m` holds all components of `t.w.div_ceil(M)` tiles.
#[inline(always)]
pub(crate) unsafe fn gradient<V: Vector, F: Matrices<M, N>, const M: usize, const N: usize>(
    t: &Gradient,
) {
    // SAFETY: every address below is one that the caller vouches for.
    unsafe {
        for tile in 0..t.w.div_ceil(M) {
            let inside = (t.w - M * tile).min(M);
            for lane in (0..t.width).step_by(V::LANES) {
                let mut columns = [[V::zero(); N]; M];
                for j in 0..M {
                    if j < inside {
                        let mut pixels = [V::zero(); M];
                        for i in 0..M {
                            if !t.rows[i].is_null() {
                                pixels[i] = V::load(t.rows[i].add((M * tile + j) * t.k + lane));
                            }
                        }
                        columns[j] = F::into_gradients(pixels);
                    }
                }
                let m = t.m.add(tile * t.width + lane);
                for i in 0..N {
                    let mut row = [V::zero(); M];
                    for j in 0..M {
                        row[j] = columns[j][i];
                    }
                    let row = F::into_gradients(row);
                    for j in 0..N {
                        row[j].store(m.add((N * i + j) * t.component));
                    }
                }
            }
        }
    }
}

/// # Safety
/// `V`'s instruction set is enabled. `t.g` holds nine taps and `t.u` all components of `t.len` floats.
#[inline(always)]
pub(crate) unsafe fn filters<V: Vector, F: Matrices<M, N>, const M: usize, const N: usize>(
    t: &Filters,
) {
    // SAFETY: every address below is one that the caller vouches for.
    unsafe {
        for lane in (0..t.len).step_by(V::LANES) {
            let mut columns = [[V::zero(); N]; 3];
            for s in 0..3 {
                let mut taps = [V::zero(); 3];
                for r in 0..3 {
                    taps[r] = V::load(t.g.add((3 * r + s) * t.tap + lane));
                }
                columns[s] = F::expand(taps);
            }
            for i in 0..N {
                let row = F::expand([columns[0][i], columns[1][i], columns[2][i]]);
                for j in 0..N {
                    row[j].store(t.u.add((N * i + j) * t.component + lane));
                }
            }
        }
    }
}

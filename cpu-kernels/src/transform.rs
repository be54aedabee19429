//! The transforms of Winograd's F(2x2, 3x3), on vectors of channels.
//!
//! A tile of 2x2 outputs depends on 4x4 inputs `d` and 3x3 taps `g`. With the matrices of Lavin and
//! Gray 2016, "Fast algorithms for convolutional neural networks" (section 4.1),
//!
//! ```text
//!       1  0 -1  0          1    0    0            1  1  1  0
//! B' =  0  1  1  0     G =  1/2  1/2  1/2     A' = 0  1 -1 -1
//!       0 -1  1  0          1/2 -1/2  1/2
//!       0  1  0 -1          0    0    1
//! ```
//!
//! the outputs are `A' [(G g G') . (B' d B)] A`: 16 products instead of 36. The 16 elements of a
//! transformed tile are its components; component `4 i + j` is in row `i`, column `j`.
//!
//! The outputs are linear in `g`, so their gradient `dy` gives that of the taps as
//! `G' [(A dy A') . (B' d B)] G`, with the bracket summed over tiles.
//!
//! Generic over the vector type, like `tile.rs`; `kernel.rs` instantiates the functions.

use crate::vector::Vector;

/// Contiguous channels of the transformed input. A multiple of every vector's lanes.
pub const BLOCK: usize = 16;

/// Elements of a transformed tile.
pub const COMPONENTS: usize = 16;

/// Zeros to read instead of pixels outside the image: as wide as the widest vector.
static OUTSIDE: [f32; BLOCK] = [0.0; BLOCK];

/// A row of tiles to transform into `[16 components][c / BLOCK][tile][BLOCK]`.
pub struct Input {
    /// The first pixel of the four image rows that the tiles read; null for a row outside the image.
    pub rows: [*const f32; 4],
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

/// A row of tiles to transform back from `[16 components][tile][width]`.
pub struct Output {
    /// Component 0 of the row's first tile.
    pub m: *const f32,
    /// Floats from a component to the next.
    pub component: usize,
    /// Floats from a tile to the next: a multiple of the lanes.
    pub width: usize,
    /// The first pixel of the two image rows; null for a row outside the image.
    pub rows: [*mut f32; 2],
    /// Columns of the image.
    pub w: usize,
    /// Floats from a column to the next.
    pub k: usize,
    /// Whether the outputs are added to what the rows hold.
    pub accumulate: bool,
}

/// A row of tiles of the gradient of the outputs, to transform into `[16 components][tile][width]`.
pub struct Gradient {
    /// The first pixel of the two image rows; null for a row outside the image.
    pub rows: [*const f32; 2],
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

/// Filters to transform: `[3][3][vectors][LANES]` into `[16 components][vectors][LANES]`.
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

/// `B' x`.
///
/// # Safety
/// `V`'s instruction set is enabled.
#[inline(always)]
unsafe fn into_components<V: Vector>(x: [V; 4]) -> [V; 4] {
    // SAFETY: the caller vouches for the instruction set.
    unsafe { [x[0].sub(x[2]), x[1].add(x[2]), x[2].sub(x[1]), x[1].sub(x[3])] }
}

/// `A' x`.
///
/// # Safety
/// `V`'s instruction set is enabled.
#[inline(always)]
unsafe fn from_components<V: Vector>(x: [V; 4]) -> [V; 2] {
    // SAFETY: the caller vouches for the instruction set.
    unsafe { [x[0].add(x[1]).add(x[2]), x[1].sub(x[2]).sub(x[3])] }
}

/// `A x`.
///
/// # Safety
/// `V`'s instruction set is enabled.
#[inline(always)]
unsafe fn into_gradients<V: Vector>([x, y]: [V; 2]) -> [V; 4] {
    // SAFETY: the caller vouches for the instruction set.
    unsafe { [x, x.add(y), x.sub(y), V::zero().sub(y)] }
}

/// `G x`.
///
/// # Safety
/// `V`'s instruction set is enabled.
#[inline(always)]
unsafe fn expand<V: Vector>(x: [V; 3]) -> [V; 4] {
    // SAFETY: the caller vouches for the instruction set; the constants are readable.
    unsafe {
        let (half, minus_half) = (V::splat(&0.5), V::splat(&-0.5));
        let outer = half.mul_add(x[0].add(x[2]), V::zero());
        [x[0], x[1].mul_add(half, outer), x[1].mul_add(minus_half, outer), x[2]]
    }
}

/// # Safety
/// `V`'s instruction set is enabled. Each row that is not null holds `t.w` pixels of `t.c` floats;
/// `t.v` holds 16 components of `t.w.div_ceil(2)` tiles in `t.c / BLOCK` blocks.
#[inline(always)]
pub(crate) unsafe fn input<V: Vector>(t: &Input) {
    // SAFETY: every address below is one that the caller vouches for.
    unsafe {
        let steps = t.rows.map(|row| if row.is_null() { 0 } else { t.c });
        for c in (0..t.c).step_by(V::LANES) {
            let mut pixels =
                t.rows.map(|row| if row.is_null() { OUTSIDE.as_ptr() } else { row.add(c) });
            // column transforms; two tiles share each
            let mut next = || {
                let column = into_components(pixels.map(|p| V::load(p)));
                for (p, step) in pixels.iter_mut().zip(steps) {
                    *p = p.wrapping_add(step);
                }
                column
            };
            let outside = [V::zero(); 4];
            let mut v = t.v.add(c / BLOCK * t.block + c % BLOCK);
            let (mut a, mut b) = (outside, next());
            for column in (0..t.w).step_by(2) {
                let c = if column + 1 < t.w { next() } else { outside };
                let d = if column + 2 < t.w { next() } else { outside };
                for i in 0..4 {
                    let row = into_components([a[i], b[i], c[i], d[i]]);
                    for (j, value) in row.into_iter().enumerate() {
                        value.store(v.add((4 * i + j) * t.component));
                    }
                }
                (a, b) = (c, d);
                v = v.add(BLOCK);
            }
        }
    }
}

/// # Safety
/// `V`'s instruction set is enabled. `t.m` holds 16 components of `t.w.div_ceil(2)` tiles; each row
/// that is not null holds `t.w` pixels, `t.k` floats apart, of `t.width` writable floats (readable
/// too when accumulating).
#[inline(always)]
pub(crate) unsafe fn output<V: Vector>(t: &Output) {
    // SAFETY: every address below is one that the caller vouches for.
    unsafe {
        for tile in 0..t.w.div_ceil(2) {
            let inside = (t.w - 2 * tile).min(2);
            for lane in (0..t.width).step_by(V::LANES) {
                let m = t.m.add(tile * t.width + lane);
                // plain loops: with closures the convolution took 1.6 times as long
                let (mut upper, mut lower) = ([V::zero(); 4], [V::zero(); 4]);
                for j in 0..4 {
                    let mut column = [V::zero(); 4];
                    for (i, value) in column.iter_mut().enumerate() {
                        *value = V::load(m.add((4 * i + j) * t.component));
                    }
                    [upper[j], lower[j]] = from_components(column);
                }
                for (half, row) in [upper, lower].into_iter().zip(t.rows) {
                    if row.is_null() {
                        continue;
                    }
                    let y = row.add(2 * tile * t.k + lane);
                    for (j, value) in from_components(half).into_iter().enumerate() {
                        if j < inside {
                            let y = y.add(j * t.k);
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
/// `V`'s instruction set is enabled. Each row that is not null holds `t.w` pixels, `t.k` floats apart, of `t.width` floats;
/// `t.m` holds 16 components of `t.w.div_ceil(2)` tiles.
#[inline(always)]
pub(crate) unsafe fn gradient<V: Vector>(t: &Gradient) {
    // SAFETY: every address below is one that the caller vouches for.
    unsafe {
        for tile in 0..t.w.div_ceil(2) {
            let right = 2 * tile + 1 < t.w;
            for lane in (0..t.width).step_by(V::LANES) {
                let (mut left_column, mut right_column) = ([V::zero(); 2], [V::zero(); 2]);
                for (i, row) in t.rows.into_iter().enumerate() {
                    if row.is_null() {
                        continue;
                    }
                    let dy = row.add(2 * tile * t.k + lane);
                    left_column[i] = V::load(dy);
                    if right {
                        right_column[i] = V::load(dy.add(t.k));
                    }
                }
                let (left, right) = (into_gradients(left_column), into_gradients(right_column));
                let m = t.m.add(tile * t.width + lane);
                for i in 0..4 {
                    let row = into_gradients([left[i], right[i]]);
                    for (j, value) in row.into_iter().enumerate() {
                        value.store(m.add((4 * i + j) * t.component));
                    }
                }
            }
        }
    }
}

/// # Safety
/// `V`'s instruction set is enabled. `t.g` holds nine taps and `t.u` sixteen components of `t.len`
/// floats.
#[inline(always)]
pub(crate) unsafe fn filters<V: Vector>(t: &Filters) {
    // SAFETY: every address below is one that the caller vouches for.
    unsafe {
        for lane in (0..t.len).step_by(V::LANES) {
            let mut columns = [[V::zero(); 4]; 3];
            for (s, column) in columns.iter_mut().enumerate() {
                let tap = |r: usize| V::load(t.g.add((3 * r + s) * t.tap + lane));
                *column = expand([tap(0), tap(1), tap(2)]);
            }
            let [left, middle, right] = columns;
            for i in 0..4 {
                let row = expand([left[i], middle[i], right[i]]);
                for (j, value) in row.into_iter().enumerate() {
                    value.store(t.u.add((4 * i + j) * t.component + lane));
                }
            }
        }
    }
}

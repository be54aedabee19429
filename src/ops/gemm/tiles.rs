//! The tile table: which tile of `kernels/gemm_tile.cuh` a GEMM on a GPU gets, and its number of split-K splits. The choice
//! depends on sizes alone, so that sums have the same order on every chip.
//!
//! The table picks the smallest estimate in cycles for a chip of 132 multiprocessors with two blocks each. An mma of 16 x 8 x
//! 16 costs its shared-memory traffic at 128 bytes a cycle, but at least its tensor-core time; a block alone on its
//! multiprocessor hides less latency; splits are written and read once.

use crate::cpu::conv2d::Conv2dDims;

/// A GEMM `C [m, n] = A B` over `k`, as the key of the tile table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gemm {
    /// The kind of the operands.
    pub kind: GemmKind,
    /// Rows of `C`.
    pub m: usize,
    /// Columns of `C`.
    pub n: usize,
    /// Length of the sums.
    pub k: usize,
    /// Number of GEMMs of this size in one launch: the phases of a strided data gradient, otherwise 1.
    pub count: usize,
    /// Lengths of the sums of all `count` GEMMs, of which `k` is the largest.
    pub k_of_all: usize,
    /// Length of the aligned contiguous runs of both operands, in elements: 8 (16 bytes of bf16) is required by the large
    /// tiles, 4 by the stem's; 1 means that nothing is known.
    pub run: usize,
    /// Whether split-K is allowed.
    pub splittable: bool,
}

/// The operands of a [`Gemm`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GemmKind {
    /// `A [m, k]`, `B [n, k]`
    Nt,
    /// `A [m, k]`, `B [k, n]`
    Nn,
    /// `A [k, m]`, `B [k, n]`
    Tn,
    /// Patches of images, and filters.
    Convolution,
    /// Patches of the output's gradient, and filters.
    DataGradient,
    /// The output's gradient, and patches of images.
    WeightGradient,
}

/// The shape of a tile. `Half` is 128 x 64, or 64 x 128 if both operands are MN-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileShape {
    /// 128 x 128
    Large,
    /// 256 x 64, of convolutions: as many mma as the large one for half the columns. Needs dynamic shared memory.
    Tall,
    /// 128 x 64 or 64 x 128
    Half,
    /// `Half`, with one operand loaded in pieces of 8 bytes.
    Stem,
    /// 64 x 64, for any size and alignment; the only shape in f32.
    Small,
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// The shape.
    pub shape: TileShape,
    /// Rows of `C` in a tile.
    pub m: usize,
    /// Columns of `C` in a tile.
    pub n: usize,
    /// Length of the sum in one iteration of the main loop.
    pub depth: usize,
    /// Pipeline stages in shared memory.
    pub stages: usize,
    /// Warps along the rows and along the columns.
    pub warps: [usize; 2],
    /// Tiles of `C`, over all phases.
    pub tiles: usize,
    /// Split-K splits of the sum.
    pub splits: usize,
    /// Length of the sum in one split, a multiple of `depth`.
    pub k_per_split: usize,
}

/// Multiprocessors, and blocks per multiprocessor, that the estimate assumes: those of an H100.
const PROCESSORS: usize = 132;
const BLOCKS: usize = 2;
/// Length of the sum in one iteration of the main loop.
const DEPTH: usize = 32;
/// The shortest sum of a split.
const MIN_K_PER_SPLIT: usize = 512;
/// The most splits.
const MAX_SPLITS: usize = 128;
/// The most static shared memory of a kernel.
const STATIC_SHARED: usize = 48 << 10;
/// The most elements of an image for the large tiles, whose 31-bit offsets cover 128 images.
const MAX_IMAGE: usize = 1 << 24;

impl Gemm {
    /// The implicit GEMM of a convolution's forward pass.
    pub fn convolution(d: &Conv2dDims) -> Self {
        let (m, n, k) = (d.n * d.p * d.q, d.k, d.r * d.s * d.c);
        let run = run(&[d.c], d, d.h * d.w * d.c);
        Self { kind: GemmKind::Convolution, m, n, k, count: 1, k_of_all: k, run, splittable: false }
    }

    /// The implicit GEMMs of a convolution's data gradient: one for each phase of the stride, sized for the largest phase.
    pub fn data_gradient(d: &Conv2dDims) -> Self {
        let m = d.n * d.h.div_ceil(d.stride) * d.w.div_ceil(d.stride);
        let k = d.r.div_ceil(d.stride) * d.s.div_ceil(d.stride) * d.k;
        let run = run(&[d.c, if d.k.is_multiple_of(DEPTH) { 8 } else { 1 }], d, d.p * d.q * d.k);
        let (kind, count) = (GemmKind::DataGradient, d.stride * d.stride);
        // Each tap reaches one phase.
        let k_of_all = d.r * d.s * d.k;
        Self { kind, m, n: d.c, k, count, k_of_all, run, splittable: false }
    }

    /// The implicit GEMM of a convolution's weight gradient, whose sum runs over pixels.
    pub fn weight_gradient(d: &Conv2dDims) -> Self {
        let (m, n, k) = (d.k, d.r * d.s * d.c, d.n * d.p * d.q);
        let run = run(&[d.c, if d.k.is_multiple_of(8) { 8 } else { 1 }], d, 0);
        // The large tiles count pieces of that many elements of `x` in 31 bits.
        let run = if d.n * d.h * d.w * d.c / run < 1 << 31 { run } else { 1 };
        Self {
            kind: GemmKind::WeightGradient,
            m,
            n,
            k,
            count: 1,
            k_of_all: k,
            run,
            splittable: true,
        }
    }

    /// Selects the tile and the number of splits.
    pub fn tile(&self) -> Tile {
        let shapes: &[TileShape] = match (self.run, self.kind) {
            (8, GemmKind::Convolution | GemmKind::DataGradient) => {
                &[TileShape::Large, TileShape::Tall, TileShape::Half, TileShape::Small]
            }
            (8, _) => &[TileShape::Large, TileShape::Half, TileShape::Small],
            (4, GemmKind::Convolution | GemmKind::WeightGradient) => {
                &[TileShape::Stem, TileShape::Small]
            }
            _ => &[TileShape::Small],
        };
        let most =
            if self.splittable { (self.k / MIN_K_PER_SPLIT).clamp(1, MAX_SPLITS) } else { 1 };
        let all = shapes.iter().flat_map(|&shape| (1..=most).map(move |splits| (shape, splits)));
        let tiles = all.map(|(shape, splits)| self.with(shape, splits));
        // `min_by` keeps the first of equals: the larger tile, fewer splits.
        tiles.min_by(|a, b| self.cycles(a).total_cmp(&self.cycles(b))).expect("at least one tile")
    }

    /// A tile of this shape with about this many splits. The kernels support no other sizes.
    pub fn with(&self, shape: TileShape, splits: usize) -> Tile {
        let mn_major = matches!(self.kind, GemmKind::Tn | GemmKind::WeightGradient);
        let (m, n, stages) = match shape {
            TileShape::Large => (128, 128, 3),
            TileShape::Tall => (256, 64, 3),
            TileShape::Half | TileShape::Stem if mn_major => (64, 128, 4),
            TileShape::Half | TileShape::Stem => (128, 64, 4),
            TileShape::Small => (64, 64, 4),
        };
        let k_per_split = self.k.div_ceil(splits).next_multiple_of(DEPTH).max(DEPTH);
        Tile {
            shape,
            m,
            n,
            depth: DEPTH,
            stages,
            warps: if shape == TileShape::Tall { [4, 1] } else { [2, 2] },
            tiles: self.m.div_ceil(m) * self.n.div_ceil(n) * self.count,
            splits: self.k.div_ceil(k_per_split).max(1),
            k_per_split,
        }
    }

    /// Iterations of the main loop in a block, on the average.
    pub fn steps(&self, tile: &Tile) -> f64 {
        if self.count > 1 {
            return self.k_of_all as f64 / (self.count * DEPTH) as f64;
        }
        tile.k_per_split.min(self.k.max(1)).div_ceil(DEPTH) as f64
    }

    /// The estimated cycles with a tile on a chip of 132 multiprocessors, by which the table chooses.
    pub fn cycles(&self, tile: &Tile) -> f64 {
        let blocks = tile.tiles * tile.splits;
        let (full, left) = (blocks / (PROCESSORS * BLOCKS), blocks % (PROCESSORS * BLOCKS));
        // Sequential blocks per multiprocessor; 1.3 is an estimate of the cost of a block that runs alone.
        let waves = (full * BLOCKS) as f64
            + match left {
                0 => 0.0,
                1..=PROCESSORS => 1.3,
                _ => BLOCKS as f64,
            };
        let steps = self.steps(tile);
        let mmas = (tile.m * tile.n * DEPTH) as f64 / (16.0 * 8.0 * 16.0);
        // One more launch, and writing and reading the splits at 1900 bytes a cycle.
        let bytes = (tile.splits * self.m * self.n * 8) as f64;
        let splits = if tile.splits > 1 { 3000.0 + bytes / 1900.0 } else { 0.0 };
        waves * steps * mmas * tile.cycles_per_mma() + splits
    }
}

impl Tile {
    /// Bytes of dynamic shared memory that a launch gives each block: of the stages in bf16, if they are more than a kernel may have
    /// as static shared memory.
    pub fn dynamic_shared(&self) -> usize {
        let bytes = self.stages * (self.m + self.n) * self.depth * 2;
        if bytes > STATIC_SHARED { bytes } else { 0 }
    }

    /// Shared-memory bytes read and written per mma of 16 x 8 x 16: its share of the fragment loads and tile stores.
    pub fn bytes_per_mma(&self) -> f64 {
        let warp = [self.m / self.warps[0], self.n / self.warps[1]];
        let of = |m: usize, n: usize| ((m + n) * 16 * 2) as f64 / ((m / 16) * (n / 8)) as f64;
        of(warp[0], warp[1]) + of(self.m, self.n)
    }

    /// Cycles per mma on an sm_90 multiprocessor: shared memory at 128 bytes a cycle, at least the 1.6 cycles that `mma.sync`
    /// takes on its tensor cores.
    fn cycles_per_mma(&self) -> f64 {
        (self.bytes_per_mma() / 128.0).max(1.6)
    }
}

/// The common run length of the channels, or 1 if taps or pixels exceed what the large tiles support.
fn run(channels: &[usize], d: &Conv2dDims, image: usize) -> usize {
    let all = |by: usize| channels.iter().all(|c| c.is_multiple_of(by));
    match () {
        () if d.r > 8 || d.s > 8 || image > MAX_IMAGE => 1,
        () if all(8) => 8,
        () if all(4) => 4,
        () => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ResNet-50's layers at 256 images, and their tiles.
    #[test]
    fn the_table_of_resnet_50() {
        let rows = [
            // image, filters, stride: forward, data gradient, weight gradient
            ([224, 4], [64, 7], 2, "Stem 128x64", "Small 64x64", "Stem 64x128"),
            ([56, 64], [64, 3], 1, "Tall 256x64", "Tall 256x64", "Half 64x128"),
            ([56, 128], [128, 3], 2, "Large 128x128", "Large 128x128", "Large 128x128"),
            ([14, 256], [256, 3], 1, "Large 128x128", "Large 128x128", "Large 128x128"),
            ([7, 512], [512, 3], 1, "Large 128x128", "Large 128x128", "Large 128x128"),
        ];
        for ([size, c], [k, filter], stride, forward, data, weight) in rows {
            let dims =
                Conv2dDims::new([256, size, size, c], [k, filter, filter, c], stride, filter / 2);
            let gemms = [Gemm::convolution, Gemm::data_gradient, Gemm::weight_gradient];
            let got = gemms.map(|gemm| {
                let tile = gemm(&dims).tile();
                println!("{dims:?}: {tile:?}");
                assert!(tile.splits * tile.k_per_split >= gemm(&dims).k);
                format!("{:?} {}x{}", tile.shape, tile.m, tile.n)
            });
            assert_eq!(got, [forward, data, weight], "{dims:?}");
        }
    }

    #[test]
    fn sizes_beyond_the_large_tiles_get_the_small_one() {
        let image = |h: usize, c: usize, k: usize, r: usize| {
            Conv2dDims::new([4096, h, 64, c], [k, r, 3, c], 1, 4)
        };
        for dims in [image(64, 12, 64, 9), image(64, 9, 64, 3), image(1 << 15, 16, 64, 3)] {
            assert_eq!(Gemm::convolution(&dims).tile().shape, TileShape::Small, "{dims:?}");
        }
        let odd = image(64, 64, 40, 3);
        assert_eq!(
            Gemm::data_gradient(&odd).tile().shape,
            TileShape::Small,
            "k is not a multiple of 32"
        );
        assert_ne!(Gemm::convolution(&odd).tile().shape, TileShape::Small);
        let batch = |n: usize| Conv2dDims::new([n, 128, 128, 512], [64, 3, 3, 512], 1, 1);
        assert_ne!(Gemm::weight_gradient(&batch(2047)).tile().shape, TileShape::Small);
        assert_eq!(Gemm::weight_gradient(&batch(2048)).tile().shape, TileShape::Small);
    }

    /// Sums are split if they are long and tiles are few; never below the shortest split, and only if splitting is allowed.
    #[test]
    fn splits_fill_a_chip() {
        let dims = Conv2dDims::new([256, 56, 56, 64], [64, 3, 3, 64], 1, 1);
        let tile = Gemm::weight_gradient(&dims).tile();
        assert!((100..=PROCESSORS * BLOCKS).contains(&(tile.tiles * tile.splits)), "{tile:?}");
        let unsplit = Gemm { splittable: false, ..Gemm::weight_gradient(&dims) };
        assert_eq!(unsplit.tile().splits, 1);
        let short = Gemm { k: 700, ..Gemm::weight_gradient(&dims) };
        assert_eq!(short.tile().splits, 1);
    }
}

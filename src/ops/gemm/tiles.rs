//! Which tile a matrix product on a GPU gets, and into how many splits its sum is cut: one table, a function of sizes alone,
//! so that sums have one order on every chip. What it chooses from are the tiles of `kernels/gemm_tile.cuh`.
//!
//! The choice is the smallest estimate in cycles of a chip of 132 multiprocessors with two blocks each. A product of 16 x 8 x
//! 16 costs the shared memory that it moves at 128 bytes a cycle, and no less than tensor cores take for it; a block alone
//! on its multiprocessor hides less of its latency; splits are written and read once.

use crate::cpu::conv2d::Conv2dDims;

/// A product `C [m, n] = A B` over `k`, as the table sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gemm {
    /// What the operands are.
    pub kind: GemmKind,
    /// Rows of `C`.
    pub m: usize,
    /// Columns of `C`.
    pub n: usize,
    /// Terms of each sum.
    pub k: usize,
    /// How many products of this size one launch makes: phases of a strided data gradient, else 1.
    pub count: usize,
    /// Elements of both operands that lie together from each multiple of so many on: 8 is 16 bytes of bf16, and what large
    /// tiles need; 4 is the stem's; 1 where nothing is known.
    pub run: usize,
    /// Whether the sum may be cut into splits.
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

/// The form of a tile. `Half` is 128 x 64, or 64 x 128 where the sum runs across both operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TileShape {
    /// 128 x 128
    Large,
    /// 128 x 64 or 64 x 128
    Half,
    /// `Half`, with an operand that comes in pieces of 8 bytes.
    Stem,
    /// 64 x 64, for any size and address; the only one in f32.
    Small,
}

/// A row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// The form.
    pub form: TileShape,
    /// Rows of `C` in a tile.
    pub m: usize,
    /// Columns of `C` in a tile.
    pub n: usize,
    /// Terms of a step.
    pub depth: usize,
    /// Steps in shared memory at once.
    pub stages: usize,
    /// Warps along the rows and along the columns.
    pub warps: [usize; 2],
    /// Tiles of `C`, all phases together.
    pub tiles: usize,
    /// ColumnSplits of the sum.
    pub splits: usize,
    /// Terms of a slice, a multiple of `depth`.
    pub k_per_split: usize,
}

/// Multiprocessors and blocks of a multiprocessor that the estimate is for: an H100's.
const PROCESSORS: usize = 132;
const BLOCKS: usize = 2;
/// Terms of a step.
const DEPTH: usize = 32;
/// A slice has at least so many terms, and there are no more splits than this.
const LEAST: usize = 512;
const MOST: usize = 128;
/// Elements of an image that the offsets of large tiles can count: 128 images' in 31 bits.
const IMAGE: usize = 1 << 24;

impl Gemm {
    /// The forward pass of a convolution.
    pub fn convolution(d: &Conv2dDims) -> Self {
        let (m, n, k) = (d.n * d.p * d.q, d.k, d.r * d.s * d.c);
        let run = run(&[d.c], d, d.h * d.w * d.c);
        Self { kind: GemmKind::Convolution, m, n, k, count: 1, run, splittable: false }
    }

    /// The gradient of a convolution's input: a product for each phase of the stride, of this many pixels and taps at most.
    pub fn data_gradient(d: &Conv2dDims) -> Self {
        let m = d.n * d.h.div_ceil(d.stride) * d.w.div_ceil(d.stride);
        let k = d.r.div_ceil(d.stride) * d.s.div_ceil(d.stride) * d.k;
        let run = run(&[d.c, if d.k.is_multiple_of(DEPTH) { 8 } else { 1 }], d, d.p * d.q * d.k);
        let (kind, count) = (GemmKind::DataGradient, d.stride * d.stride);
        Self { kind, m, n: d.c, k, count, run, splittable: false }
    }

    /// The gradient of a convolution's filters; the sum runs over pixels.
    pub fn weight_gradient(d: &Conv2dDims) -> Self {
        let (m, n, k) = (d.k, d.r * d.s * d.c, d.n * d.p * d.q);
        let run = run(&[d.c, if d.k.is_multiple_of(8) { 8 } else { 1 }], d, 0);
        Self { kind: GemmKind::WeightGradient, m, n, k, count: 1, run, splittable: true }
    }

    /// The product's tile and splits.
    pub fn tile(&self) -> Tile {
        let forms: &[TileShape] = match (self.run, self.kind) {
            (8, _) => &[TileShape::Large, TileShape::Half, TileShape::Small],
            (4, GemmKind::Convolution | GemmKind::WeightGradient) => {
                &[TileShape::Stem, TileShape::Small]
            }
            _ => &[TileShape::Small],
        };
        let most = if self.splittable { (self.k / LEAST).clamp(1, MOST) } else { 1 };
        let all = forms.iter().flat_map(|&form| (1..=most).map(move |splits| (form, splits)));
        let tiles = all.map(|(form, splits)| self.with(form, splits));
        // The first of equals: the larger tile, fewer splits.
        tiles.min_by(|a, b| self.cycles(a).total_cmp(&self.cycles(b))).expect("there is one")
    }

    /// This tile and about so many splits; kernels take no other sizes.
    pub fn with(&self, form: TileShape, splits: usize) -> Tile {
        let across = matches!(self.kind, GemmKind::Tn | GemmKind::WeightGradient);
        let (m, n, stages) = match form {
            TileShape::Large => (128, 128, 3),
            TileShape::Half | TileShape::Stem if across => (64, 128, 4),
            TileShape::Half | TileShape::Stem => (128, 64, 4),
            TileShape::Small => (64, 64, 4),
        };
        let k_per_split = self.k.div_ceil(splits).next_multiple_of(DEPTH).max(DEPTH);
        Tile {
            form,
            m,
            n,
            depth: DEPTH,
            stages,
            warps: [2, 2],
            tiles: self.m.div_ceil(m) * self.n.div_ceil(n) * self.count,
            splits: self.k.div_ceil(k_per_split).max(1),
            k_per_split,
        }
    }

    /// The estimate of a tile's cycles on a chip of 132 multiprocessors, by which the table chooses.
    pub fn cycles(&self, tile: &Tile) -> f64 {
        let blocks = tile.tiles * tile.splits;
        let (full, left) = (blocks / (PROCESSORS * BLOCKS), blocks % (PROCESSORS * BLOCKS));
        // In blocks that a multiprocessor has one after another; 1.3 is a guess of what being alone costs.
        let waves = (full * BLOCKS) as f64
            + match left {
                0 => 0.0,
                1..=PROCESSORS => 1.3,
                _ => BLOCKS as f64,
            };
        let steps = tile.k_per_split.min(self.k.max(1)).div_ceil(DEPTH) as f64;
        let products = (tile.m * tile.n * DEPTH) as f64 / (16.0 * 8.0 * 16.0);
        // One more launch, and the splits to memory and back at 1900 bytes a cycle.
        let bytes = (tile.splits * self.m * self.n * 8) as f64;
        let splits = if tile.splits > 1 { 3000.0 + bytes / 1900.0 } else { 0.0 };
        waves * steps * products * tile.cycles_of_a_product() + splits
    }
}

impl Tile {
    /// Bytes of shared memory that one `mma` of 16 x 8 x 16 reads as fragments and writes as panels.
    pub fn bytes_of_a_product(&self) -> f64 {
        let warp = [self.m / self.warps[0], self.n / self.warps[1]];
        let of = |m: usize, n: usize| ((m + n) * 16 * 2) as f64 / ((m / 16) * (n / 8)) as f64;
        of(warp[0], warp[1]) + of(self.m, self.n)
    }

    /// Cycles of a multiprocessor of sm_90: at 128 bytes a cycle, and the 1.6 that its tensor cores take by `mma.sync`.
    fn cycles_of_a_product(&self) -> f64 {
        (self.bytes_of_a_product() / 128.0).max(1.6)
    }
}

/// The common run of channels, where large tiles can count taps and pixels.
fn run(channels: &[usize], d: &Conv2dDims, image: usize) -> usize {
    let all = |by: usize| channels.iter().all(|c| c.is_multiple_of(by));
    match () {
        () if d.r > 8 || d.s > 8 || image > IMAGE => 1,
        () if all(8) => 8,
        () if all(4) => 4,
        () => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ResNet-50's layers at 256 images, and what they get.
    #[test]
    fn the_table_of_resnet_50() {
        let rows = [
            // image, filters, stride: forward, data gradient, weight gradient
            ([224, 4], [64, 7], 2, "Stem 128x64", "Small 64x64", "Stem 64x128"),
            ([56, 64], [64, 3], 1, "Half 128x64", "Half 128x64", "Half 64x128"),
            ([56, 128], [128, 3], 2, "Large 128x128", "Large 128x128", "Large 128x128"),
            ([14, 256], [256, 3], 1, "Large 128x128", "Large 128x128", "Large 128x128"),
            ([7, 512], [512, 3], 1, "Large 128x128", "Large 128x128", "Large 128x128"),
        ];
        for ([size, c], [k, filter], stride, forward, data, weight) in rows {
            let dims =
                Conv2dDims::new([256, size, size, c], [k, filter, filter, c], stride, filter / 2);
            let products = [Gemm::convolution, Gemm::data_gradient, Gemm::weight_gradient];
            let got = products.map(|product| {
                let tile = product(&dims).tile();
                println!("{dims:?}: {tile:?}");
                assert!(tile.splits * tile.k_per_split >= product(&dims).k);
                format!("{:?} {}x{}", tile.form, tile.m, tile.n)
            });
            assert_eq!(got, [forward, data, weight], "{dims:?}");
        }
    }

    #[test]
    fn what_large_tiles_cannot_count_gets_the_small_one() {
        let image = |h: usize, c: usize, k: usize, r: usize| {
            Conv2dDims::new([4096, h, 64, c], [k, r, 3, c], 1, 4)
        };
        for dims in [image(64, 12, 64, 9), image(64, 9, 64, 3), image(1 << 15, 16, 64, 3)] {
            assert_eq!(Gemm::convolution(&dims).tile().form, TileShape::Small, "{dims:?}");
        }
        let odd = image(64, 64, 40, 3);
        assert_eq!(
            Gemm::data_gradient(&odd).tile().form,
            TileShape::Small,
            "k is no multiple of 32"
        );
        assert_ne!(Gemm::convolution(&odd).tile().form, TileShape::Small);
    }

    /// Cut where the sum is long and tiles are few; never below what a slice has at least, or where nobody adds splits.
    #[test]
    fn slices_fill_a_chip() {
        let dims = Conv2dDims::new([256, 56, 56, 64], [64, 3, 3, 64], 1, 1);
        let tile = Gemm::weight_gradient(&dims).tile();
        assert!((100..=PROCESSORS * BLOCKS).contains(&(tile.tiles * tile.splits)), "{tile:?}");
        let whole = Gemm { splittable: false, ..Gemm::weight_gradient(&dims) };
        assert_eq!(whole.tile().splits, 1);
        let short = Gemm { k: 700, ..Gemm::weight_gradient(&dims) };
        assert_eq!(short.tile().splits, 1);
    }
}

//! Every kernel on every path of the machine, against sums in f64 of the same bf16 operands; bits across thread counts.

use half::bf16;

use super::conv2d::*;
use super::gemm::{gemm_on, workspace_len_on as gemm_workspace_len_on};
use super::*;
use crate::cpu::conv2d::{Conv2dDims, Direction};
use selfsup_cpu_kernels::transform::Form;

const DIRECTIONS: [Direction; 3] =
    [Direction::Forward, Direction::DataGradient, Direction::WeightGradient];

/// The paths of the machine. Tiles are emulated where they are missing.
fn paths() -> impl Iterator<Item = Bf16Path> {
    let runs = |path: &Bf16Path| path.is_available() || emulated(*path);
    [Bf16Path::Portable, Bf16Path::Avx512, Bf16Path::Amx].into_iter().filter(runs)
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn emulated(path: Bf16Path) -> bool {
    path == Bf16Path::Amx && blocks::emulate::install()
}

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
fn emulated(_: Bf16Path) -> bool {
    false
}

/// Numbers of a fixed sequence, so that the shapes never change.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // splitmix64 (Steele et al. 2014)
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn within(&mut self, lo: usize, hi: usize) -> usize {
        lo + (self.next() % (hi - lo + 1) as u64) as usize
    }

    fn floats(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).collect()
    }

    fn bf16s(&mut self, len: usize) -> Vec<bf16> {
        self.floats(len).into_iter().map(bf16::from_f32).collect()
    }
}

fn f64s(x: &[bf16]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

/// A sum of products and the sum of their sizes, which bounds the error of any order.
#[derive(Clone, Copy, Default)]
struct Sum {
    value: f64,
    size: f64,
}

impl Sum {
    fn of(value: f64) -> Self {
        Self { value, size: value.abs() }
    }

    fn add(&mut self, product: f64) {
        self.value += product;
        self.size += product.abs();
    }
}

/// Each of `got` is its sum but for the error of f32 sums and, with `rounded`, half a unit in the last place of bf16.
fn assert_close(got: &[f64], expected: &[Sum], rounded: bool, what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (i, (got, sum)) in got.iter().zip(expected).enumerate() {
        let unit = if rounded { sum.value.abs() / 256.0 } else { 0.0 };
        let bound = 1e-6 * sum.size + unit + 1e-30;
        let error = (got - sum.value).abs();
        assert!(
            error <= bound,
            "{what}: element {i} is {got}, expected {} (error {error:e}, at most {bound:e})",
            sum.value
        );
    }
}

/// A GEMM in all kinds of output against the definition.
fn check_gemm(path: Bf16Path, kind: GemmKind, [m, n, k]: [usize; 3], seed: u64) {
    let mut random = Random(seed);
    let (a, b, bias) = (random.bf16s(m * k), random.bf16s(k * n), random.floats(n));
    let size = GemmSize { m, n, k };
    let (wide_a, wide_b) = (f64s(&a), f64s(&b));
    let at = |i: usize, j: usize, t: usize| match kind {
        GemmKind::Nt => (i * k + t, j * k + t),
        GemmKind::Nn => (i * k + t, t * n + j),
        GemmKind::Tn => (t * m + i, t * n + j),
    };
    for (accumulate, biased) in [(false, false), (true, false), (false, true), (true, true)] {
        let what = format!("{path:?} {kind:?} {size:?}, accumulate {accumulate}, bias {biased}");
        let before = random.bf16s(m * n);
        let mut expected = vec![Sum::default(); m * n];
        for (index, sum) in expected.iter_mut().enumerate() {
            let (i, j) = (index / n, index % n);
            if accumulate {
                *sum = Sum::of(before[index].to_f64());
            }
            if biased {
                sum.add(bias[j].into());
            }
            for t in 0..k {
                let (from_a, from_b) = at(i, j, t);
                sum.add(wide_a[from_a] * wide_b[from_b]);
            }
        }
        let bias = biased.then_some(&bias[..]);
        let gemm = Gemm { kind, size, a: &a, b: &b, bias, accumulate };
        let mut workspace = vec![f32::NAN; gemm_workspace_len_on(path, kind, size)];
        let mut c: Vec<f32> = match accumulate {
            true => before.iter().map(|x| x.to_f32()).collect(),
            false => vec![f32::NAN; m * n],
        };
        gemm_on(path, Output::F32(&mut c), &gemm, &mut workspace);
        let got: Vec<f64> = c.iter().map(|&c| c.into()).collect();
        assert_close(&got, &expected, false, &what);
        workspace.fill(f32::NAN);
        let mut c = if accumulate { before.clone() } else { vec![bf16::NAN; m * n] };
        gemm_on(path, Output::Bf16(&mut c), &gemm, &mut workspace);
        assert_close(&f64s(&c), &expected, true, &what);
    }
}

const KINDS: [GemmKind; 3] = [GemmKind::Nt, GemmKind::Nn, GemmKind::Tn];

#[test]
fn gemms_agree_with_the_definition() {
    // One, primes, whole tiles and one off them.
    let sizes = [1, 2, 13, 15, 16, 17, 31, 32, 33, 64, 67];
    let mut random = Random(1);
    for path in paths() {
        for kind in KINDS {
            for (seed, fixed) in sizes.into_iter().enumerate() {
                let mut size = [0; 3].map(|_: usize| sizes[random.within(0, sizes.len() - 1)]);
                size[seed % 3] = fixed;
                check_gemm(path, kind, size, seed as u64);
            }
            // Several tasks and several chunks of the sum; nothing to sum.
            for size in [[517, 33, 34], [17, 300, 33], [35, 20, 1100], [3, 5, 0], [0, 4, 3]] {
                check_gemm(path, kind, size, 7);
            }
        }
    }
}

/// The dims for `[n, h, w, c]`, `[k, r, s]`, stride and padding.
fn dims(image: [usize; 4], filter: [usize; 3], stride: usize, pad: usize) -> Conv2dDims {
    let [k, r, s] = filter;
    Conv2dDims::new(image, [k, r, s, image[3]], stride, pad)
}

/// Calls `add` with the offsets of image, filter and output for every product in the sum.
fn each_product(d: &Conv2dDims, mut add: impl FnMut(usize, usize, usize)) {
    for n in 0..d.n {
        for p in 0..d.p {
            for q in 0..d.q {
                for r in 0..d.r {
                    for s in 0..d.s {
                        let (h, w) = (p * d.stride + r, q * d.stride + s);
                        if h < d.pad || w < d.pad || h - d.pad >= d.h || w - d.pad >= d.w {
                            continue;
                        }
                        let x = ((n * d.h + h - d.pad) * d.w + w - d.pad) * d.c;
                        let y = ((n * d.p + p) * d.q + q) * d.k;
                        for k in 0..d.k {
                            let f = ((k * d.r + r) * d.s + s) * d.c;
                            (0..d.c).for_each(|c| add(x + c, f + c, y + k));
                        }
                    }
                }
            }
        }
    }
}

struct Case {
    d: Conv2dDims,
    x: Vec<bf16>,
    w: Vec<bf16>,
    dy: Vec<bf16>,
}

impl Case {
    fn new(d: Conv2dDims, seed: u64) -> Case {
        let mut random = Random(seed);
        let x = random.bf16s(d.n * d.h * d.w * d.c);
        let w = random.bf16s(d.k * d.r * d.s * d.c);
        let dy = random.bf16s(d.n * d.p * d.q * d.k);
        Case { d, x, w, dy }
    }

    fn output_len(&self, direction: Direction) -> usize {
        match direction {
            Direction::Forward => self.dy.len(),
            Direction::DataGradient => self.x.len(),
            Direction::WeightGradient => self.w.len(),
        }
    }

    /// Added to `before` if given.
    fn reference(&self, direction: Direction, before: Option<&[bf16]>) -> Vec<Sum> {
        let (x, w, dy) = (f64s(&self.x), f64s(&self.w), f64s(&self.dy));
        let none = vec![Sum::default(); self.output_len(direction)];
        let mut out = before.map_or(none, |b| b.iter().map(|b| Sum::of(b.to_f64())).collect());
        each_product(&self.d, |i, f, o| match direction {
            Direction::Forward => out[o].add(x[i] * w[f]),
            Direction::DataGradient => out[i].add(dy[o] * w[f]),
            Direction::WeightGradient => out[f].add(x[i] * dy[o]),
        });
        out
    }

    /// On poisoned buffers; added to `before` if given. With the moments of the output for `groups` groups.
    fn run(
        &self,
        path: Bf16Path,
        direction: Direction,
        before: Option<&[bf16]>,
        groups: Option<usize>,
    ) -> (Vec<f64>, [Vec<f32>; 2]) {
        let Case { d, x, w, dy } = self;
        let mut workspace = vec![f32::NAN; workspace_len_on(path, d, direction)];
        let accumulate = before.is_some();
        let len = self.output_len(direction);
        let mut out = before.map_or(vec![bf16::NAN; len], <[bf16]>::to_vec);
        let (mut mean, mut variance) = (vec![], vec![]);
        match direction {
            Direction::Forward => {
                let moments = groups.map(|groups| {
                    mean = vec![f32::NAN; groups * d.k];
                    variance = mean.clone();
                    Moments { groups, mean: &mut mean, variance: &mut variance }
                });
                forward_on(path, &mut out, x, w, moments, &mut workspace, d);
            }
            Direction::DataGradient => {
                data_gradient_on(path, &mut out, dy, w, &mut workspace, d, accumulate);
            }
            Direction::WeightGradient => {
                let mut out: Vec<f32> = out.iter().map(|x| x.to_f32()).collect();
                weight_gradient_on(path, &mut out, x, dy, &mut workspace, d, accumulate);
                return (out.into_iter().map(f64::from).collect(), [mean, variance]);
            }
        }
        (f64s(&out), [mean, variance])
    }

    fn check(&self, path: Bf16Path) {
        for direction in DIRECTIONS {
            let before = Random(9).bf16s(self.output_len(direction));
            for before in [None, Some(&before[..])] {
                if direction == Direction::Forward && before.is_some() {
                    continue;
                }
                let what = format!("{path:?} {direction:?} {:?}", self.d);
                let (got, _) = self.run(path, direction, before, None);
                let rounded = direction != Direction::WeightGradient;
                assert_close(&got, &self.reference(direction, before), rounded, &what);
            }
        }
        for groups in [1, 2].into_iter().filter(|groups| self.d.n.is_multiple_of(*groups)) {
            let (y, moments) = self.run(path, Direction::Forward, None, Some(groups));
            check_moments(&y, moments, self.d.k, &format!("{path:?} {:?}", self.d));
        }
    }
}

/// Mean and variance are those of the rows of `y`.
fn check_moments(y: &[f64], [mean, variance]: [Vec<f32>; 2], columns: usize, what: &str) {
    let groups = mean.len() / columns.max(1);
    let rows = y.len() / columns.max(1) / groups.max(1);
    for (i, (mean, variance)) in mean.iter().zip(&variance).enumerate() {
        let (group, column) = (i / columns, i % columns);
        let of_column = (0..rows).map(|row| y[(group * rows + row) * columns + column]);
        let expected = of_column.clone().sum::<f64>() / rows as f64;
        let squares = of_column.map(|y| (y - expected).powi(2));
        let spread = squares.clone().sum::<f64>() / rows as f64;
        // Sums are shifted by the value of some row, which may be the farthest from the mean.
        let shift = squares.fold(0.0, f64::max);
        let size = expected.abs() + spread.sqrt();
        assert!(
            (f64::from(*mean) - expected).abs() <= 1e-6 * size,
            "{what}: mean {mean} of column {column}, expected {expected}"
        );
        let error = (f64::from(*variance) - spread).abs();
        assert!(
            error <= 1e-6 * (spread + shift),
            "{what}: variance {variance} of column {column}, expected {spread}"
        );
    }
}

/// Large enough for Winograd's F(4x4, 3x3) in all directions, with tiles that end outside the image.
const TRANSFORMED: Conv2dDims =
    Conv2dDims { n: 10, h: 15, w: 16, c: 32, k: 48, r: 3, s: 3, stride: 1, pad: 1, p: 15, q: 16 };

#[test]
fn transforms_stand_in_for_dot_products_and_not_for_tiles() {
    for direction in DIRECTIONS {
        let by = |path| Algorithm::select(path, &TRANSFORMED, direction);
        assert_eq!(by(Bf16Path::Portable), Algorithm::Winograd(Form::Four));
        assert_eq!(by(Bf16Path::Avx512), Algorithm::Winograd(Form::Four));
        assert_eq!(by(Bf16Path::Amx), Algorithm::Blocks);
    }
}

#[test]
fn convolutions_agree_with_the_definition() {
    let shapes = [
        dims([1, 1, 1, 1], [1, 1, 1], 1, 0),
        dims([2, 5, 7, 3], [5, 3, 3], 1, 1),
        dims([3, 6, 5, 4], [17, 3, 3], 2, 1),
        // Whole tiles, and one off them.
        dims([2, 16, 16, 32], [32, 3, 3], 1, 1),
        dims([1, 4, 33, 31], [33, 3, 3], 1, 1),
        dims([16, 4, 4, 32], [32, 3, 3], 1, 1),
        dims([17, 3, 3, 33], [31, 3, 3], 1, 1),
        dims([33, 2, 2, 16], [16, 3, 3], 2, 1),
        // Wide images in low bands.
        dims([17, 9, 17, 65], [3, 3, 3], 1, 1),
        // 1x1, plain and strided.
        dims([2, 7, 7, 48], [40, 1, 1], 1, 0),
        dims([16, 4, 4, 64], [64, 1, 1], 1, 0),
        dims([2, 9, 8, 32], [48, 1, 1], 2, 0),
        dims([2, 4, 4, 5], [6, 1, 1], 1, 1),
        // A stem, and its small sibling.
        dims([2, 17, 19, 4], [16, 7, 7], 2, 3),
        dims([2, 8, 8, 4], [16, 3, 3], 1, 1),
        // Odd filters and strides, also longer than the filter.
        dims([2, 9, 11, 6], [7, 2, 4], 3, 2),
        dims([1, 11, 10, 5], [4, 2, 1], 4, 0),
        dims([2, 3, 2, 8], [8, 5, 6], 1, 3),
        TRANSFORMED,
        // By transforms forward only; two blocks of outputs, of which one is narrower.
        dims([3, 8, 8, 16], [48, 3, 3], 1, 1),
    ];
    for path in paths() {
        for (seed, d) in shapes.into_iter().enumerate() {
            Case::new(d, seed as u64).check(path);
        }
    }
}

#[test]
fn random_convolutions_agree_with_the_definition() {
    let mut random = Random(5);
    let cases = if cfg!(debug_assertions) { 8 } else { 120 };
    for seed in 0..cases {
        let mut pick = |lo, hi| random.within(lo, hi);
        let (n, c, k) = (pick(1, 20), pick(1, 40), pick(1, 40));
        let (r, s, stride, pad) = (pick(1, 4), pick(1, 4), pick(1, 3), pick(0, 3));
        let (h, w) = (pick(r, r + 6), pick(s, s + 20));
        let d = dims([n, h, w, c], [k, r, s], stride, pad);
        for path in paths() {
            Case::new(d, seed).check(path);
        }
    }
}

#[test]
fn moments_survive_a_mean_far_from_zero() {
    // All products are near 1, so that means are near `c` and deviations are hundreds of times smaller.
    let d = dims([4, 8, 8, 64], [16, 1, 1], 1, 0);
    let mut case = Case::new(d, 3);
    case.x.iter_mut().for_each(|x| *x = bf16::from_f32(1.0 + x.to_f32() / 16.0));
    case.w.fill(bf16::ONE);
    for path in paths() {
        let (y, moments) = case.run(path, Direction::Forward, None, Some(2));
        check_moments(&y, moments, d.k, &format!("{path:?}"));
    }
}

#[test]
fn empty_tensors_give_zeros() {
    for path in paths() {
        for d in [dims([2, 3, 3, 0], [4, 3, 3], 1, 1), dims([0, 3, 3, 4], [4, 3, 3], 1, 1)] {
            for direction in DIRECTIONS {
                let case = Case::new(d, 1);
                let (got, _) = case.run(path, direction, None, None);
                assert_eq!(got, vec![0.0; case.output_len(direction)]);
            }
        }
    }
}

#[test]
fn threads_do_not_change_bits() {
    let shapes = [
        dims([16, 9, 9, 24], [40, 3, 3], 1, 1),
        dims([4, 20, 20, 32], [32, 1, 1], 1, 0),
        dims([3, 12, 40, 8], [24, 3, 3], 2, 1),
        TRANSFORMED,
    ];
    for path in paths() {
        for d in shapes {
            let case = Case::new(d, 2);
            let run = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                DIRECTIONS.map(|direction| {
                    let groups = Some(1);
                    pool.install(|| case.run(path, direction, None, groups))
                })
            };
            let one = run(1);
            for threads in [2, 3, 7] {
                assert!(one == run(threads), "{path:?} {d:?}: {threads} threads");
            }
        }
    }
}

#[test]
fn infinities_and_nan_pass_through() {
    for path in paths() {
        let a = [f32::INFINITY, 1.0, f32::NAN, 1.0, 3e38, 3e38].map(bf16::from_f32);
        let b = [bf16::ONE; 2];
        let size = GemmSize { m: 3, n: 1, k: 2 };
        let (kind, bias, accumulate) = (GemmKind::Nt, None, false);
        let gemm = Gemm { kind, size, a: &a, b: &b, bias, accumulate };
        let mut workspace = vec![0.0; gemm_workspace_len_on(path, kind, size)];
        let mut c = [bf16::ZERO; 3];
        gemm_on(path, Output::Bf16(&mut c), &gemm, &mut workspace);
        assert!(
            c[0] == bf16::INFINITY && c[1].is_nan() && c[2] == bf16::INFINITY,
            "{path:?} {c:?}"
        );
    }
}

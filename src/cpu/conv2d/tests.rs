//! Every direction on every instruction set the machine has, against a naive f64 sum; bits across
//! thread counts.

use super::*;

const DIRECTIONS: [Direction; 3] =
    [Direction::Forward, Direction::DataGradient, Direction::WeightGradient];

fn sets() -> impl Iterator<Item = Isa> {
    [Isa::Portable, Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.is_available())
}

/// A random generator of its own, so that the shapes never change.
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
    x: Vec<f32>,
    w: Vec<f32>,
    dy: Vec<f32>,
}

impl Case {
    fn new(d: Conv2dDims, seed: u64) -> Case {
        let mut random = Random(seed);
        let x = random.floats(d.n * d.h * d.w * d.c);
        let w = random.floats(d.k * d.r * d.s * d.c);
        let dy = random.floats(d.n * d.p * d.q * d.k);
        Case { d, x, w, dy }
    }

    /// In f64; added to `before` if given.
    fn reference(&self, direction: Direction, before: Option<&[f32]>) -> Vec<f64> {
        let Case { d, x, w, dy } = self;
        let len = match direction {
            Direction::Forward => dy.len(),
            Direction::DataGradient => x.len(),
            Direction::WeightGradient => w.len(),
        };
        let mut out = before.map_or(vec![0.0; len], |b| b.iter().map(|&v| v as f64).collect());
        each_product(d, |i, f, o| match direction {
            Direction::Forward => out[o] += x[i] as f64 * w[f] as f64,
            Direction::DataGradient => out[i] += dy[o] as f64 * w[f] as f64,
            Direction::WeightGradient => out[f] += x[i] as f64 * dy[o] as f64,
        });
        out
    }

    /// On poisoned buffers; added to `before` if given.
    fn run(&self, isa: Isa, direction: Direction, before: Option<&[f32]>) -> Vec<f32> {
        let Case { d, x, w, dy } = self;
        let mut workspace = vec![f32::NAN; workspace_len_on(isa, d, direction)];
        let accumulate = before.is_some();
        let output = |len| before.map_or(vec![f32::NAN; len], <[f32]>::to_vec);
        match direction {
            Direction::Forward => {
                let mut y = vec![f32::NAN; dy.len()];
                forward_on(isa, &mut y, x, w, &mut workspace, d);
                y
            }
            Direction::DataGradient => {
                let mut dx = output(x.len());
                data_gradient_on(isa, &mut dx, dy, w, &mut workspace, d, accumulate);
                dx
            }
            Direction::WeightGradient => {
                let mut dw = output(w.len());
                weight_gradient_on(isa, &mut dw, x, dy, &mut workspace, d, accumulate);
                dw
            }
        }
    }
}

impl Case {
    /// As [`Case::run`], with [`winograd`] even if it is slower.
    fn run_winograd(
        &self,
        form: Form,
        isa: Isa,
        direction: Direction,
        before: Option<&[f32]>,
    ) -> Vec<f32> {
        let Case { d, x, w, dy } = self;
        let output = |len| before.map_or(vec![f32::NAN; len], <[f32]>::to_vec);
        let (p, x, len) = match direction {
            Direction::Forward => (winograd::Problem::forward(d, form), x, dy.len()),
            Direction::DataGradient => (winograd::Problem::data_gradient(d, form), dy, x.len()),
            Direction::WeightGradient => {
                let mut workspace =
                    vec![f32::NAN; winograd_weight::workspace_len::<f32>(d, form, isa)];
                let mut dw = output(w.len());
                let accumulate = before.is_some();
                winograd_weight::run(d, (form, isa), &mut dw, x, dy, &mut workspace, accumulate);
                return dw;
            }
        };
        let mut workspace = vec![f32::NAN; winograd::workspace_len::<f32>(&p, isa)];
        let mut out = output(len);
        winograd::run(&p, isa, &mut out, x, w, &mut workspace, before.is_some());
        out
    }
}

fn assert_close(got: &[f32], expected: &[f64], what: &str) {
    assert_eq!(got.len(), expected.len(), "{what}");
    let (mut error, mut norm, mut worst, mut largest) = (0.0f64, 0.0f64, 0.0f64, 0.0f64);
    for (i, (&g, &e)) in got.iter().zip(expected).enumerate() {
        assert!(g.is_finite(), "{what}: element {i} is {g}, expected {e}");
        error += (g as f64 - e).powi(2);
        norm += e * e;
        worst = worst.max((g as f64 - e).abs());
        largest = largest.max(e.abs());
    }
    let (error, norm) = (error.sqrt(), norm.sqrt());
    assert!(error <= 1e-5 * norm, "{what}: L2 error {error:e} of {norm:e}");
    assert!(worst <= 16e-5 * largest, "{what}: largest error {worst:e} of {largest:e}");
}

fn check(case: &Case) {
    check_run(case, &DIRECTIONS, Case::run);
}

fn check_run(
    case: &Case,
    directions: &[Direction],
    run: impl Fn(&Case, Isa, Direction, Option<&[f32]>) -> Vec<f32>,
) {
    let before = Random(3).floats(case.x.len().max(case.w.len()));
    for &direction in directions {
        let expected = case.reference(direction, None);
        let before = &before[..expected.len().min(before.len())];
        let sum: Vec<f64> = before.iter().zip(&expected).map(|(&b, e)| b as f64 + e).collect();
        for isa in sets() {
            let what = format!("{direction:?} on {isa:?} of {:?}", case.d);
            assert_close(&run(case, isa, direction, None), &expected, &what);
            if direction != Direction::Forward {
                let got = run(case, isa, direction, Some(before));
                assert_close(&got, &sum, &format!("{what}, accumulating"));
            }
        }
    }
}

/// Shapes with special cases.
fn table() -> Vec<Conv2dDims> {
    vec![
        dims([0, 4, 4, 3], [5, 3, 3], 1, 1),
        dims([0, 4, 4, 3], [5, 1, 1], 1, 0), // no images for a GEMM
        dims([0, 8, 8, 64], [32, 3, 3], 1, 1), // nor for Winograd
        dims([2, 4, 4, 0], [5, 3, 3], 1, 1), // no input channels
        dims([2, 4, 4, 3], [0, 3, 3], 1, 1), // no filters
        dims([2, 0, 4, 3], [5, 2, 2], 1, 1), // no input rows
        dims([2, 3, 2, 5], [6, 2, 2], usize::MAX, 1), // one output
        dims([1, 40, 1, 3], [2, 3, 1], 40, 0), // fewer columns than phases
        dims([1, 1, 1, 1], [1, 1, 1], 1, 0),
        // images of one pixel with a stride
        dims([9, 1, 1, 16], [32, 1, 1], 2, 0),
        dims([9, 1, 1, 14], [32, 3, 3], 2, 1),
        dims([1, 2, 2, 1], [1, 7, 7], 1, 3), // image smaller than the filter
        dims([2, 1, 1, 4], [16, 3, 3], 1, 1), // one tap inside the image
        dims([1, 3, 2, 3], [4, 3, 3], 3, 5), // outputs entirely in the padding
        dims([2, 8, 8, 4], [16, 3, 3], 1, 1), // stem of small images
        dims([1, 21, 19, 4], [64, 7, 7], 2, 3), // stem of large images
        dims([2, 7, 9, 4], [20, 2, 3], 3, 2), // a stem of stride 3
        dims([3, 7, 6, 4], [33, 7, 5], 2, 4), // a stem, mostly padding
        dims([2, 9, 9, 16], [16, 3, 3], 1, 1), // one vector of filters
        dims([2, 9, 9, 16], [32, 3, 3], 2, 1), // stride 2, odd
        dims([2, 8, 8, 32], [64, 3, 3], 2, 1), // stride 2, a row and a column unused
        dims([2, 8, 8, 32], [64, 1, 1], 2, 0), // projection: three phases of dx have no tap
        dims([3, 7, 7, 64], [48, 1, 1], 1, 0), // GEMM, one block and a half
        dims([1, 5, 5, 67], [17, 3, 3], 1, 1), // primes
        dims([2, 6, 11, 17], [67, 3, 5], 2, 2), // not square
        dims([1, 10, 10, 2], [3, 1, 7], 4, 0), // stride beyond the taps
        dims([1, 9, 9, 5], [6, 2, 2], 5, 1), // the same, with padding
        dims([1, 6, 6, 8], [8, 2, 2], 1, 4), // padding beyond the taps
        dims([40, 4, 4, 20], [33, 3, 3], 1, 1), // tiles over images
        dims([37, 5, 3, 6], [18, 3, 3], 2, 1), // the same with stride
        dims([33, 1, 1, 40], [7, 1, 1], 1, 0), // a linear layer
        dims([9, 7, 7, 18], [35, 3, 3], 1, 1), // tiles over images and columns
        dims([1, 40, 3, 8], [8, 3, 3], 1, 1), // rows of one image over lanes
        dims([1, 3, 70, 5], [40, 3, 3], 2, 0), // long rows
        dims([1, 4, 4, 300], [40, 1, 1], 1, 0), // many channels
        dims([34, 12, 30, 48], [17, 3, 1], 1, 1), // the last group is smaller, with bands of equal height
        dims([4, 8, 8, 64], [32, 3, 3], 1, 1),    // Winograd
    ]
}

/// Shapes that Winograd supports; for most of them it would not be selected.
fn winograd_table() -> Vec<Conv2dDims> {
    let dims = |image, k| dims(image, [k, 3, 3], 1, 1);
    vec![
        dims([1, 1, 1, 16], 16),  // most of a tile is outside the image
        dims([3, 1, 2, 16], 32),  // the same in one direction
        dims([2, 3, 7, 32], 16),  // odd
        dims([1, 7, 5, 16], 48),  // a block and a half of outputs
        dims([37, 4, 4, 16], 32), // groups over images, the last smaller
        dims([5, 7, 7, 48], 16),
        dims([1, 43, 6, 16], 16), // rows of one image over lanes, the last shorter
        dims([3, 13, 17, 32], 32), // groups of rows
        dims([2, 5, 139, 16], 16), // rows longer than a group
        dims([70, 9, 15, 16], 16), // several images in a lane
        dims([7, 6, 3, 272], 16), // filters prefetched
        dims([19, 4, 5, 16], 272), // many blocks; the same for the gradient
        dims([41, 4, 4, 512], 16), // wide: groups of twice as many tiles
    ]
}

#[test]
fn every_direction_agrees_with_the_f64_sum() {
    for (i, d) in table().into_iter().enumerate() {
        check(&Case::new(d, i as u64));
    }
}

#[test]
fn winograd_agrees_with_the_f64_sum() {
    for (i, d) in winograd_table().into_iter().enumerate() {
        assert!(winograd::fits(&d), "{d:?}");
        for form in Form::ALL {
            check_run(&Case::new(d, i as u64), &DIRECTIONS, |case, isa, direction, before| {
                case.run_winograd(form, isa, direction, before)
            });
        }
    }
}

#[test]
fn winograd_is_selected_where_it_was_measured_to_be_faster() {
    let square = |n, size, c, k| dims([n, size, size, c], [k, 3, 3], 1, 1);
    let faster = [
        square(128, 32, 64, 64), // ResNet-18 with the small stem, batch 64 in two views
        square(128, 16, 128, 128),
        square(128, 8, 256, 256),
        square(128, 4, 512, 512),
        square(16, 8, 256, 256),
        square(2, 8, 64, 64),
        square(64, 16, 32, 32),
        square(64, 32, 16, 16), // a quarter of its width
    ];
    let slower = [
        square(16, 4, 512, 512), // the filter transform costs more than Winograd saves
        square(8, 7, 512, 512),
        square(32, 5, 256, 256),
        square(128, 1, 64, 64),
        dims([128, 32, 32, 64], [64, 3, 3], 2, 1),
        dims([128, 32, 32, 64], [64, 3, 3], 1, 0),
        dims([128, 32, 32, 64], [40, 3, 3], 1, 1),
    ];
    let selected = |d: &Conv2dDims, direction| match Algorithm::select(d, direction) {
        Algorithm::Direct => None,
        Algorithm::Winograd(form) => Some(form),
    };
    for direction in [Direction::Forward, Direction::DataGradient] {
        faster.iter().for_each(|d| assert_eq!(selected(d, direction), Some(Form::Four), "{d:?}"));
        slower.iter().for_each(|d| assert_eq!(selected(d, direction), None, "{d:?}"));
    }
    // 6x6 pixels are nine tiles of 2x2 and four of 4x4: the same products.
    let tied = square(64, 6, 64, 64);
    assert_eq!(selected(&tied, Direction::Forward), Some(Form::Two));
    let weights = |i: usize| selected(&faster[i], Direction::WeightGradient);
    assert_eq!([0, 1, 2, 6, 7].map(weights), [Some(Form::Four); 5]);
    // Few tiles: of 4x4 too few to share the sums, of 2x2 just enough, and not even these.
    assert_eq!([4, 3, 5].map(weights), [Some(Form::Two), None, None]);
}

#[test]
fn random_legal_shapes_agree_with_the_f64_sum() {
    let mut random = Random(20_260_101);
    let mut checked = 0;
    while checked < 150 {
        let mut at_most = |hi| random.within(1, hi);
        let (n, h, w, c) = (at_most(10), at_most(12), at_most(12), at_most(40));
        let (k, r, s, stride, pad) =
            (at_most(70), at_most(7), at_most(7), at_most(4), at_most(5) - 1);
        if h + 2 * pad < r || w + 2 * pad < s || n * h * w * c * k * r * s > 4_000_000 {
            continue;
        }
        check(&Case::new(dims([n, h, w, c], [k, r, s], stride, pad), checked));
        checked += 1;
    }
}

#[test]
fn bits_do_not_depend_on_the_number_of_threads() {
    let shapes = [
        dims([3, 12, 12, 24], [40, 3, 3], 1, 1),
        dims([24, 8, 8, 16], [16, 3, 3], 2, 1),
        dims([5, 9, 9, 70], [65, 1, 1], 1, 0),
        dims([1, 60, 20, 4], [16, 7, 7], 2, 3),
        dims([9, 8, 8, 32], [48, 3, 3], 1, 1), // Winograd, over images
        dims([2, 32, 30, 32], [32, 3, 3], 1, 1), // and over rows
    ];
    for (i, d) in shapes.into_iter().enumerate() {
        let case = Case::new(d, i as u64);
        for isa in sets() {
            for direction in DIRECTIONS {
                let runs = [1, 2, 3].map(|threads| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    let pool = pool.expect("a pool of three threads at most");
                    pool.install(|| case.run(isa, direction, None))
                });
                let bits = runs.map(|run| run.into_iter().map(f32::to_bits).collect::<Vec<_>>());
                assert_eq!(bits[0], bits[1], "{direction:?} on {isa:?}, 1 and 2 threads, {d:?}");
                assert_eq!(bits[0], bits[2], "{direction:?} on {isa:?}, 1 and 3 threads, {d:?}");
            }
        }
    }
}

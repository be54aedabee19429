//! Convolution kernels against plain f64 host code, in all directions, plain and instrumented.

use half::bf16;

use crate::numbers::{Float, close, noise};
use crate::stage::{Memory, Stage, Value};

/// The sizes of a convolution, as `Conv2dDims`.
#[derive(Clone, Copy, Debug)]
struct Dims {
    n: usize,
    h: usize,
    w: usize,
    c: usize,
    k: usize,
    r: usize,
    s: usize,
    p: usize,
    q: usize,
    stride: usize,
    pad: usize,
}

impl Dims {
    fn new([n, h, w, c]: [usize; 4], [k, r, s]: [usize; 3], stride: usize, pad: usize) -> Self {
        let (p, q) = ((h + 2 * pad - r) / stride + 1, (w + 2 * pad - s) / stride + 1);
        Self { n, h, w, c, k, r, s, p, q, stride, pad }
    }

    fn values(&self) -> impl Iterator<Item = Value> {
        let Self { n, h, w, c, k, r, s, p, q, stride, pad } = *self;
        [n, h, w, c, k, r, s, p, q, stride, pad].map(|x| Value::from(x as i32)).into_iter()
    }

    /// Calls `f(y index, x index, filter index)` for every multiply-add.
    fn multiply_adds(&self, mut f: impl FnMut(usize, usize, usize)) {
        for pixel in 0..self.n * self.p * self.q {
            let (n, p, q) = (pixel / self.p / self.q, pixel / self.q % self.p, pixel % self.q);
            for tap in 0..self.r * self.s {
                let i = (p * self.stride + tap / self.s).wrapping_sub(self.pad);
                let j = (q * self.stride + tap % self.s).wrapping_sub(self.pad);
                if i >= self.h || j >= self.w {
                    continue;
                }
                for k in 0..self.k {
                    for c in 0..self.c {
                        f(
                            pixel * self.k + k,
                            ((n * self.h + i) * self.w + j) * self.c + c,
                            (k * self.r * self.s + tap) * self.c + c,
                        );
                    }
                }
            }
        }
    }
}

/// A kernel's suffix after its dtype, and the rows and columns of its tile.
type Form = (&'static str, [usize; 2]);
const SMALL: Form = ("_64x64", [64, 64]);
const F32: Form = ("", [64, 64]);

fn tiles(m: usize, n: usize, form: Form) -> u32 {
    (m.div_ceil(form.1[0]) * n.div_ceil(form.1[1])) as u32
}

/// The kernels of a dtype that accept a convolution, for each of the three directions, as the head of conv2d.cu says.
fn forms<T: Float>(d: &Dims) -> [Vec<Form>; 3] {
    if T::NAME == "f32" {
        return [vec![F32], vec![F32], vec![F32]];
    }
    let mut all = [vec![SMALL], vec![SMALL], vec![SMALL]];
    let by = |channels: usize, run: usize| channels.is_multiple_of(run);
    if by(d.c, 8) {
        let large: [Form; 3] =
            [("_128x128", [128, 128]), ("_128x64", [128, 64]), ("_256x64", [256, 64])];
        all[0].extend(large);
        if by(d.k, 32) {
            all[1].extend(large);
        }
        if by(d.k, 8) {
            all[2].extend([("_128x128", [128, 128]), ("_64x128", [64, 128])]);
        }
    }
    if by(d.c, 4) && !by(d.c, 8) {
        all[0].push(("_stem", [128, 64]));
        if by(d.k, 8) {
            all[2].push(("_stem", [64, 128]));
        }
    }
    all
}

/// The launches that the head of conv2d.cu describes.
struct Launcher<'a> {
    stage: &'a Stage,
    d: Dims,
}

impl Launcher<'_> {
    fn run<T: Float>(
        &self,
        name: &str,
        form: Form,
        grid: [u32; 3],
        pointers: Vec<Value>,
        more: &[i32],
    ) {
        let mut arguments = pointers;
        arguments.extend(self.d.values());
        arguments.extend(more.iter().map(|x| Value::from(*x)));
        let threads = if T::NAME == "bf16" { 128 } else { 256 };
        let name = format!("{name}_{}{}", T::NAME, form.0);
        let shared = if form.0 == "_256x64" { 61_440 } else { 0 };
        self.stage.launch(&name, grid, [threads, 1, 1], shared, &arguments);
    }

    fn forward<T: Float>(
        &self,
        form: Form,
        y: &Memory<T>,
        moments: &Memory<f32>,
        x: &Memory<T>,
        filters: &Memory<T>,
    ) {
        let grid = [tiles(self.d.n * self.d.p * self.d.q, self.d.k, form), 1, 1];
        let mut pointers = vec![y.into(), x.into(), filters.into()];
        if T::NAME == "bf16" {
            pointers.insert(1, moments.into());
        }
        self.run::<T>("conv2d", form, grid, pointers, &[]);
    }

    fn data_gradient<T: Float>(
        &self,
        form: Form,
        dx: &Memory<T>,
        dy: &Memory<T>,
        filters: &Memory<T>,
        accumulate: bool,
    ) {
        let d = &self.d;
        let pixels = d.n * d.h.div_ceil(d.stride) * d.w.div_ceil(d.stride);
        let grid = [tiles(pixels, d.c, form), 1, (d.stride * d.stride) as u32];
        let pointers = vec![dx.into(), dy.into(), filters.into()];
        self.run::<T>("conv2d_data_gradient", form, grid, pointers, &[accumulate.into()]);
    }

    /// Split-K, with `pixels_per_split` pixels in each split.
    fn weight_gradient<T: Float>(
        &self,
        form: Form,
        dw: &Memory<f32>,
        x: &Memory<T>,
        dy: &Memory<T>,
        pixels_per_split: usize,
        accumulate: bool,
    ) {
        let d = &self.d;
        let size = d.k * d.r * d.s * d.c;
        let splits = (d.n * d.p * d.q).div_ceil(pixels_per_split);
        let grid = [tiles(d.k, d.r * d.s * d.c, form), 1, splits as u32];
        let run = |out: &Memory<f32>, accumulate: bool| {
            let more = [pixels_per_split as i32, accumulate.into()];
            let pointers = vec![out.into(), x.into(), dy.into()];
            self.run::<T>("conv2d_weight_gradient", form, grid, pointers, &more);
        };
        if splits == 1 {
            return run(dw, accumulate);
        }
        let workspace = self.stage.room::<f32>(splits * size);
        run(&workspace, false);
        let arguments = [
            dw.into(),
            (&workspace).into(),
            Value::from(splits as i32),
            Value::from(size as i64),
            Value::from(i32::from(accumulate)),
        ];
        self.stage.launch("split_k_reduce_f32", [3, 1, 1], [64, 1, 1], 0, &arguments);
        self.stage.wait().expect("the workspace outlives the launch");
    }
}

/// Mean and sum of squared deviations of each column of `y [rows, columns]`, per chunk of `step` rows.
pub fn moments_of<T: Float>(y: &[T], columns: usize, step: usize) -> Vec<f64> {
    let mut moments = Vec::new();
    for rows in y.chunks(step * columns) {
        let n = (rows.len() / columns) as f64;
        let column = |j: usize| rows.iter().skip(j).step_by(columns).map(|v| v.to_f64());
        let means: Vec<f64> = (0..columns).map(|j| column(j).sum::<f64>() / n).collect();
        let m2 = (0..columns).map(|j| column(j).map(|v| (v - means[j]).powi(2)).sum::<f64>());
        let m2: Vec<f64> = m2.collect();
        moments.extend(means.iter().chain(&m2));
    }
    moments
}

fn convolution<T: Float>(stage: &Stage, d: Dims) {
    let what = format!("conv2d_{} {d:?}", T::NAME);
    let (inputs, outputs) = (d.n * d.h * d.w * d.c, d.n * d.p * d.q * d.k);
    let (x, dy): (Vec<T>, Vec<T>) = (noise(inputs, 1), noise(outputs, 2));
    let w: Vec<T> = noise(d.k * d.r * d.s * d.c, 3);
    let (mut y, mut dx, mut dw) = (vec![0.0; outputs], vec![0.0; inputs], vec![0.0; w.len()]);
    d.multiply_adds(|at_y, at_x, at_w| {
        y[at_y] += x[at_x].to_f64() * w[at_w].to_f64();
        dx[at_x] += dy[at_y].to_f64() * w[at_w].to_f64();
        dw[at_w] += dy[at_y].to_f64() * x[at_x].to_f64();
    });
    let plus = |before: &[f64], what: &[f64]| -> Vec<f64> {
        before.iter().zip(what).map(|(b, w)| b + w).collect()
    };

    let launcher = Launcher { stage, d };
    let (x_, dy_, w_) = (stage.upload(&x), stage.upload(&dy), stage.upload(&w));
    let [forward, data, weight] = forms::<T>(&d);
    for form in forward {
        let what = format!("{what}{}", form.0);
        let y_ = stage.room::<T>(outputs);
        let moments_ = stage.room::<f32>((d.n * d.p * d.q).div_ceil(form.1[0]) * 2 * d.k);
        launcher.forward(form, &y_, &moments_, &x_, &w_);
        let got = y_.read(stage);
        close(&what, &got, &y, T::TOLERANCE);
        if T::NAME == "bf16" {
            let want = moments_of(&got, d.k, form.1[0]);
            close(&format!("{what}: moments"), &moments_.read(stage), &want, 1e-5);
        }
    }
    for form in data {
        let what = format!("{what}{}: dx", form.0);
        let dx_ = stage.room::<T>(inputs);
        launcher.data_gradient(form, &dx_, &dy_, &w_, false);
        let first = dx_.read(stage);
        close(&what, &first, &dx, T::TOLERANCE);
        launcher.data_gradient(form, &dx_, &dy_, &w_, true);
        let first: Vec<f64> = first.iter().map(|x| x.to_f64()).collect();
        close(&format!("{what}, accumulated"), &dx_.read(stage), &plus(&first, &dx), T::TOLERANCE);
    }
    // Without split-K, and with splits of two steps.
    let all_pixels = (d.n * d.p * d.q).next_multiple_of(32);
    for (form, split) in weight.into_iter().flat_map(|form| [(form, all_pixels), (form, 64)]) {
        let what = format!("{what}{}: dw in splits of {split} pixels", form.0);
        let dw_ = stage.room::<f32>(w.len());
        launcher.weight_gradient(form, &dw_, &x_, &dy_, split, false);
        let first = dw_.read(stage);
        close(&what, &first, &dw, 1e-5);
        launcher.weight_gradient(form, &dw_, &x_, &dy_, split, true);
        let first: Vec<f64> = first.iter().map(|x| f64::from(*x)).collect();
        close(&format!("{what}, accumulated"), &dw_.read(stage), &plus(&first, &dw), 1e-5);
    }
}

/// Sizes that fit no tile; sizes one off the edges of large tiles in pixels, channels and depth; sizes with few steps.
const SHAPES: [([usize; 4], [usize; 3], usize, usize); 20] = [
    ([1, 1, 1, 1], [1, 1, 1], 1, 0),
    ([2, 7, 5, 3], [5, 3, 3], 1, 1),
    ([2, 19, 17, 4], [8, 7, 7], 2, 3),
    ([1, 9, 9, 2], [6, 3, 3], 2, 1),
    ([1, 5, 13, 16], [65, 1, 1], 1, 0),
    ([3, 7, 5, 24], [32, 1, 1], 2, 0),
    ([1, 8, 8, 64], [72, 3, 3], 1, 1),
    ([2, 9, 6, 31], [33, 3, 3], 2, 1),
    ([1, 11, 8, 12], [20, 3, 5], 3, 2),
    ([1, 8, 7, 8], [8, 1, 1], 3, 0),
    ([1, 6, 6, 130], [7, 2, 2], 2, 0),
    ([2, 2, 3, 8], [16, 3, 3], 2, 1),
    ([1, 1, 127, 24], [129, 1, 1], 1, 0),
    ([1, 2, 64, 32], [64, 1, 1], 1, 0),
    ([1, 3, 43, 40], [128, 1, 1], 1, 0),
    ([4, 6, 7, 64], [64, 3, 3], 2, 1),
    ([40, 1, 1, 16], [32, 3, 3], 1, 1),
    ([1, 11, 8, 8], [32, 3, 5], 3, 2),
    ([3, 5, 9, 8], [160, 8, 2], 1, 4),
    ([1, 10, 9, 136], [32, 1, 1], 2, 0),
];

fn convolutions<T: Float>() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (image, filters, stride, pad) in SHAPES {
            convolution::<T>(&stage, Dims::new(image, filters, stride, pad));
        }
    }
}

#[test]
fn conv2d_f32() {
    convolutions::<f32>();
}

#[test]
fn conv2d_bf16() {
    convolutions::<bf16>();
}

/// With split-K, every order of threads gives the same bits.
#[test]
fn weight_gradient_has_the_same_bits_in_any_order() {
    let d = Dims::new([2, 24, 24, 8], [8, 3, 3], 1, 1);
    let stage = Stage::take(false);
    let launcher = Launcher { stage: &stage, d };
    let (x, dy): (Vec<bf16>, Vec<bf16>) =
        (noise(d.n * d.h * d.w * d.c, 1), noise(d.n * d.p * d.q * d.k, 2));
    let (x, dy) = (stage.upload(&x), stage.upload(&dy));
    for form in forms::<bf16>(&d)[2].clone() {
        let dw: Vec<Vec<u32>> = (0..3)
            .map(|seed| {
                stage.seed(seed);
                let dw = stage.room::<f32>(d.k * d.r * d.s * d.c);
                launcher.weight_gradient(form, &dw, &x, &dy, 256, false);
                dw.read(&stage).iter().map(|x| x.to_bits()).collect()
            })
            .collect();
        assert!(dw.windows(2).all(|pair| pair[0] == pair[1]), "{form:?}");
    }
}

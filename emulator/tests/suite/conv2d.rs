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

    /// Calls `f(y index, x index, filter index)` for every product.
    fn products(&self, mut f: impl FnMut(usize, usize, usize)) {
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

const TILE: usize = 64;

fn tiles(m: usize, n: usize) -> u32 {
    (m.div_ceil(TILE) * n.div_ceil(TILE)) as u32
}

/// The launches that the head of conv2d.cu describes.
struct Launcher<'a> {
    stage: &'a Stage,
    d: Dims,
}

impl Launcher<'_> {
    fn run<T: Float>(&self, name: &str, grid: [u32; 3], pointers: [Value; 3], more: &[i32]) {
        let mut arguments: Vec<Value> = pointers.into();
        arguments.extend(self.d.values());
        arguments.extend(more.iter().map(|x| Value::from(*x)));
        let threads = if T::NAME == "bf16" { 128 } else { 256 };
        let name = format!("{name}_{}", T::NAME);
        self.stage.launch(&name, grid, [threads, 1, 1], 0, &arguments);
    }

    fn forward<T: Float>(&self, y: &Memory<T>, x: &Memory<T>, filters: &Memory<T>) {
        let grid = [tiles(self.d.n * self.d.p * self.d.q, self.d.k), 1, 1];
        self.run::<T>("conv2d", grid, [y.into(), x.into(), filters.into()], &[]);
    }

    fn data_gradient<T: Float>(
        &self,
        dx: &Memory<T>,
        dy: &Memory<T>,
        filters: &Memory<T>,
        accumulate: bool,
    ) {
        let d = &self.d;
        let pixels = d.n * d.h.div_ceil(d.stride) * d.w.div_ceil(d.stride);
        let grid = [tiles(pixels, d.c), 1, (d.stride * d.stride) as u32];
        let pointers = [dx.into(), dy.into(), filters.into()];
        self.run::<T>("conv2d_data_gradient", grid, pointers, &[accumulate.into()]);
    }

    /// In slices of so many pixels.
    fn weight_gradient<T: Float>(
        &self,
        dw: &Memory<f32>,
        x: &Memory<T>,
        dy: &Memory<T>,
        pixels_per_slice: usize,
        accumulate: bool,
    ) {
        let d = &self.d;
        let size = d.k * d.r * d.s * d.c;
        let slices = (d.n * d.p * d.q).div_ceil(pixels_per_slice);
        let grid = [tiles(d.k, d.r * d.s * d.c), 1, slices as u32];
        let run = |out: &Memory<f32>, accumulate: bool| {
            let more = [pixels_per_slice as i32, accumulate.into()];
            let pointers = [out.into(), x.into(), dy.into()];
            self.run::<T>("conv2d_weight_gradient", grid, pointers, &more);
        };
        if slices == 1 {
            return run(dw, accumulate);
        }
        let workspace = self.stage.room::<f32>(slices * size);
        run(&workspace, false);
        let arguments = [
            dw.into(),
            (&workspace).into(),
            Value::from(slices as i32),
            Value::from(size as i64),
            Value::from(i32::from(accumulate)),
        ];
        self.stage.launch("sum_slices_f32", [3, 1, 1], [64, 1, 1], 0, &arguments);
        self.stage.wait().expect("the workspace outlives the launch");
    }

    /// The rule of the head of conv2d.cu.
    fn pixels_per_slice(&self) -> usize {
        let d = &self.d;
        let (pixels, tiles) = (d.n * d.p * d.q, tiles(d.k, d.r * d.s * d.c) as usize);
        let most = (512 / tiles).min(pixels / 256).max(1);
        pixels.div_ceil(most).next_multiple_of(32)
    }
}

fn convolution<T: Float>(stage: &Stage, d: Dims) {
    let what = format!("conv2d_{} {d:?}", T::NAME);
    let (inputs, outputs) = (d.n * d.h * d.w * d.c, d.n * d.p * d.q * d.k);
    let (x, dy): (Vec<T>, Vec<T>) = (noise(inputs, 1), noise(outputs, 2));
    let w: Vec<T> = noise(d.k * d.r * d.s * d.c, 3);
    let (mut y, mut dx, mut dw) = (vec![0.0; outputs], vec![0.0; inputs], vec![0.0; w.len()]);
    d.products(|at_y, at_x, at_w| {
        y[at_y] += x[at_x].to_f64() * w[at_w].to_f64();
        dx[at_x] += dy[at_y].to_f64() * w[at_w].to_f64();
        dw[at_w] += dy[at_y].to_f64() * x[at_x].to_f64();
    });
    let plus = |before: &[f64], what: &[f64]| -> Vec<f64> {
        before.iter().zip(what).map(|(b, w)| b + w).collect()
    };

    let launcher = Launcher { stage, d };
    let (x_, dy_, w_) = (stage.upload(&x), stage.upload(&dy), stage.upload(&w));
    let y_ = stage.room::<T>(outputs);
    launcher.forward(&y_, &x_, &w_);
    close(&what, &y_.read(stage), &y, T::TOLERANCE);

    let dx_ = stage.room::<T>(inputs);
    launcher.data_gradient(&dx_, &dy_, &w_, false);
    let first = dx_.read(stage);
    close(&format!("{what}: dx"), &first, &dx, T::TOLERANCE);
    launcher.data_gradient(&dx_, &dy_, &w_, true);
    let first: Vec<f64> = first.iter().map(|x| x.to_f64()).collect();
    let twice = plus(&first, &dx);
    close(&format!("{what}: dx, accumulated"), &dx_.read(stage), &twice, T::TOLERANCE);

    // All pixels in one slice, in the smallest slices, and as the rule has it.
    let whole = (d.n * d.p * d.q).next_multiple_of(32);
    for slice in [whole, 32, launcher.pixels_per_slice()] {
        let what = format!("{what}: dw in slices of {slice}");
        let dw_ = stage.room::<f32>(w.len());
        launcher.weight_gradient(&dw_, &x_, &dy_, slice, false);
        let first = dw_.read(stage);
        close(&what, &first, &dw, 1e-5);
        launcher.weight_gradient(&dw_, &x_, &dy_, slice, true);
        let first: Vec<f64> = first.iter().map(|x| f64::from(*x)).collect();
        close(&format!("{what}, accumulated"), &dw_.read(stage), &plus(&first, &dw), 1e-5);
    }
}

fn convolutions<T: Float>() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (image, filters, stride, pad) in [
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
        ] {
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

/// More pixels than one slice has by the rule, and the same bits in every order of threads.
#[test]
fn weight_gradient_is_the_same_in_any_order() {
    let d = Dims::new([2, 24, 24, 8], [8, 3, 3], 1, 1);
    let stage = Stage::take(false);
    let launcher = Launcher { stage: &stage, d };
    let slice = launcher.pixels_per_slice();
    assert!(slice < d.n * d.p * d.q, "the rule cuts {d:?}");
    let (x, dy): (Vec<bf16>, Vec<bf16>) =
        (noise(d.n * d.h * d.w * d.c, 1), noise(d.n * d.p * d.q * d.k, 2));
    let (x, dy) = (stage.upload(&x), stage.upload(&dy));
    let dw: Vec<Vec<u32>> = (0..3)
        .map(|seed| {
            stage.seed(seed);
            let dw = stage.room::<f32>(d.k * d.r * d.s * d.c);
            launcher.weight_gradient(&dw, &x, &dy, slice, false);
            dw.read(&stage).iter().map(|x| x.to_bits()).collect()
        })
        .collect();
    assert!(dw.windows(2).all(|pair| pair[0] == pair[1]));
}

//! Pooling kernels against plain f64 host code, plain and instrumented.

use half::bf16;

use crate::numbers::{Float, close, noise};
use crate::stage::{Stage, Value};

/// A pooling operation.
#[derive(Clone, Copy, Debug)]
struct Pool {
    image: [usize; 4],
    size: usize,
    stride: usize,
    pad: usize,
    p: usize,
    q: usize,
}

impl Pool {
    fn max(image: [usize; 4], size: usize, stride: usize, pad: usize) -> Self {
        let out = |x: usize| (x + 2 * pad - size) / stride + 1;
        Self { image, size, stride, pad, p: out(image[1]), q: out(image[2]) }
    }

    fn avg(image: [usize; 4], size: usize, stride: usize) -> Self {
        let out = |x: usize| x.div_ceil(stride);
        Self { image, size, stride, pad: 0, p: out(image[1]), q: out(image[2]) }
    }

    fn inputs(&self) -> usize {
        self.image.iter().product()
    }

    fn outputs(&self) -> usize {
        self.image[0] * self.p * self.q * self.image[3]
    }

    /// The input elements of output `o`, with their positions in the window, in row order.
    fn window(&self, o: usize) -> Vec<(usize, usize)> {
        let [_, h, w, c] = self.image;
        let (channel, pixel) = (o % c, o / c);
        let (b, a, n) = (pixel % self.q, pixel / self.q % self.p, pixel / self.q / self.p);
        let mut found = Vec::new();
        for i in 0..self.size {
            for j in 0..self.size {
                let (y, x) = (a * self.stride + i, b * self.stride + j);
                if (self.pad..h + self.pad).contains(&y) && (self.pad..w + self.pad).contains(&x) {
                    let at = ((n * h + y - self.pad) * w + x - self.pad) * c + channel;
                    found.push((at, i * self.size + j));
                }
            }
        }
        found
    }

    fn sizes(&self) -> Vec<Value> {
        let [n, h, w, c] = self.image;
        [n, h, w, c, self.p, self.q, self.size, self.stride].map(|x| Value::from(x as i32)).into()
    }
}

/// The launch layout that the head of pool.cu describes.
fn launch<T: Float>(stage: &Stage, name: &str, pixels: usize, c: usize, arguments: &[Value]) {
    let vectors = c.div_ceil(16 / size_of::<T>()) as u32;
    let across = vectors.next_power_of_two().min(32);
    let block = [across, 256 / across, 1];
    let grid = [(pixels as u32).div_ceil(block[1]), vectors.div_ceil(across), 1];
    stage.launch(&format!("{name}_{}", T::NAME), grid, block, 0, arguments);
}

/// Compares the gradient that `run` writes with `want`.
fn gradient<T: Float>(
    stage: &Stage,
    what: &str,
    want: &[f64],
    run: impl Fn(&crate::stage::Memory<T>),
) {
    let dx = stage.room::<T>(want.len());
    run(&dx);
    close(what, &dx.read(stage), want, T::TOLERANCE);
}

fn max_pool<T: Float>(stage: &Stage, pool: Pool, ties: bool) {
    let what = format!("max_pool_{} {pool:?}", T::NAME);
    let mut x: Vec<T> = noise(pool.inputs(), 1);
    if ties {
        // As after a ReLU: many zeros, and few distinct values.
        x = x.iter().map(|x| T::from_f64((x.to_f64() * 2.0).round().max(0.0))).collect();
    }
    let dy: Vec<T> = noise(pool.outputs(), 2);
    let (mut want, mut want_index) = (vec![0.0; dy.len()], vec![0_u8; dy.len()]);
    let mut want_dx = vec![0.0; x.len()];
    for o in 0..dy.len() {
        let mut best: Option<(usize, usize)> = None;
        for (at, place) in pool.window(o) {
            if best.is_none_or(|(best, _)| x[at].to_f64() > x[best].to_f64()) {
                best = Some((at, place));
            }
        }
        let (at, place) = best.expect("a window holds a pixel");
        (want[o], want_index[o]) = (x[at].to_f64(), place as u8);
        want_dx[at] += dy[o].to_f64();
    }

    let [n, h, w, c] = pool.image;
    let (x_, dy_) = (stage.upload(&x), stage.upload(&dy));
    let (y_, index_) = (stage.room::<T>(dy.len()), stage.room::<u8>(dy.len()));
    for index in [Value::from(&index_), 0_u64.into()] {
        let mut arguments = vec![(&y_).into(), index, (&x_).into()];
        arguments.extend(pool.sizes());
        arguments.push((pool.pad as i32).into());
        launch::<T>(stage, "max_pool", n * pool.p * pool.q, c, &arguments);
        close(&what, &y_.read(stage), &want, 0.0);
    }
    assert_eq!(index_.read(stage), want_index, "{what}: index");
    gradient::<T>(stage, &format!("{what}: dx"), &want_dx, |dx| {
        let mut arguments = vec![dx.into(), (&dy_).into(), (&index_).into()];
        arguments.extend(pool.sizes());
        arguments.push((pool.pad as i32).into());
        launch::<T>(stage, "max_pool_backward", n * h * w, c, &arguments);
    });
}

fn max_pools<T: Float>() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (image, size, stride, pad) in [
            ([1, 1, 1, 1], 1, 1, 0),
            ([2, 7, 5, 3], 3, 2, 1),
            ([2, 8, 11, 8], 3, 2, 1),
            ([1, 9, 6, 67], 2, 2, 0),
            ([3, 5, 5, 16], 5, 1, 2),
            ([1, 10, 7, 129], 2, 3, 1),
            ([1, 3, 4, 260], 3, 2, 1),
        ] {
            for ties in [false, true] {
                max_pool::<T>(&stage, Pool::max(image, size, stride, pad), ties);
            }
        }
    }
}

#[test]
fn max_pool_f32() {
    max_pools::<f32>();
}

#[test]
fn max_pool_bf16() {
    max_pools::<bf16>();
}

#[test]
fn max_pool_propagates_nan() {
    let stage = Stage::take(true);
    let mut x: Vec<f32> = noise(9, 1);
    x[4] = f32::NAN;
    x[8] = 7.0;
    let (x_, y_, index_) = (stage.upload(&x), stage.room::<f32>(1), stage.room::<u8>(1));
    let mut arguments = vec![(&y_).into(), (&index_).into(), (&x_).into()];
    arguments.extend(Pool::max([1, 3, 3, 1], 3, 1, 0).sizes());
    arguments.push(0.into());
    launch::<f32>(&stage, "max_pool", 1, 1, &arguments);
    assert!(y_.read(&stage)[0].is_nan());
    assert_eq!(index_.read(&stage), [4]);
}

fn mean_pools<T: Float>() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for [n, pixels, c] in [[1, 1, 1], [3, 49, 5], [2, 16, 64], [5, 7, 131], [300, 2, 8]] {
            let what = format!("mean_pool_{} {n} x {pixels} x {c}", T::NAME);
            let (x, dy): (Vec<T>, Vec<T>) = (noise(n * pixels * c, 1), noise(n * c, 2));
            let (mut want, mut want_dx) = (vec![0.0; n * c], vec![0.0; x.len()]);
            for (e, x) in x.iter().enumerate() {
                let o = e / c / pixels * c + e % c;
                want[o] += x.to_f64() / pixels as f64;
                want_dx[e] = dy[o].to_f64() / pixels as f64;
            }
            let (x_, dy_, y_) = (stage.upload(&x), stage.upload(&dy), stage.room::<T>(n * c));
            let sizes = || [n, pixels, c].map(|x| Value::from(x as i32));
            let mut arguments = vec![(&y_).into(), (&x_).into()];
            arguments.extend(sizes());
            launch::<T>(&stage, "mean_pool", n, c, &arguments);
            close(&what, &y_.read(&stage), &want, T::TOLERANCE);
            gradient::<T>(&stage, &format!("{what}: dx"), &want_dx, |dx| {
                let mut arguments = vec![dx.into(), (&dy_).into()];
                arguments.extend(sizes());
                launch::<T>(&stage, "mean_pool_backward", n * pixels, c, &arguments);
            });
        }
    }
}

#[test]
fn mean_pool_f32() {
    mean_pools::<f32>();
}

#[test]
fn mean_pool_bf16() {
    mean_pools::<bf16>();
}

fn avg_pools<T: Float>() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        for (image, size, stride) in [
            ([1, 1, 1, 1], 2, 2),
            ([2, 7, 5, 3], 2, 2),
            ([2, 8, 6, 8], 2, 2),
            ([2, 7, 5, 9], 2, 1),
            ([1, 11, 4, 67], 3, 2),
            ([1, 7, 8, 16], 2, 3),
        ] {
            let pool = Pool::avg(image, size, stride);
            let what = format!("avg_pool_{} {pool:?}", T::NAME);
            let (x, dy): (Vec<T>, Vec<T>) = (noise(pool.inputs(), 1), noise(pool.outputs(), 2));
            let (mut want, mut want_dx) = (vec![0.0; dy.len()], vec![0.0; x.len()]);
            for o in 0..dy.len() {
                let window = pool.window(o);
                let all = if stride == 1 { window.len() } else { size * size } as f64;
                for (at, _) in window {
                    want[o] += x[at].to_f64() / all;
                    want_dx[at] += dy[o].to_f64() / all;
                }
            }
            let [n, h, w, c] = image;
            let (x_, dy_, y_) = (stage.upload(&x), stage.upload(&dy), stage.room::<T>(dy.len()));
            let mut arguments = vec![(&y_).into(), (&x_).into()];
            arguments.extend(pool.sizes());
            launch::<T>(&stage, "avg_pool", n * pool.p * pool.q, c, &arguments);
            close(&what, &y_.read(&stage), &want, T::TOLERANCE);
            gradient::<T>(&stage, &format!("{what}: dx"), &want_dx, |dx| {
                let mut arguments = vec![dx.into(), (&dy_).into()];
                arguments.extend(pool.sizes());
                launch::<T>(&stage, "avg_pool_backward", n * h * w, c, &arguments);
            });
        }
    }
}

#[test]
fn avg_pool_f32() {
    avg_pools::<f32>();
}

#[test]
fn avg_pool_bf16() {
    avg_pools::<bf16>();
}

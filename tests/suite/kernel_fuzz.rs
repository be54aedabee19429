//! The CPU's convolution kernels over slices, and tensors' views, with random sizes, legal and illegal. Buffers end where their
//! data end, so that under AddressSanitizer (`fuzz/fuzz_targets/kernels.rs`, `tensors.rs`) an access beyond is an error.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

use selfsup::device::Device;
use selfsup::ops::kernels::conv2d::{
    Direction, data_gradient, forward, weight_gradient, workspace_len,
};
use selfsup::ops::{Conv2dDims, kernels};
use selfsup::tensor::{Shape, Tensor};

thread_local! {
    /// Panics of this thread are expected.
    static EXPECTED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// What `f` returns, or the message of its panic, which is not printed.
fn quietly<R>(f: impl FnOnce() -> R) -> Result<R, String> {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let hook = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !EXPECTED.get() {
                hook(info);
            }
        }));
    });
    EXPECTED.set(true);
    let done = panic::catch_unwind(AssertUnwindSafe(f));
    EXPECTED.set(false);
    done.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_string());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
    })
}

/// Choices, one from each byte; 0 when they are used up.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> usize {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        usize::from(*first)
    }

    fn of<const N: usize>(&mut self, values: [usize; N]) -> usize {
        values[self.byte() % N]
    }

    /// Mostly `usual`, else absurd.
    fn absurd_or(&mut self, usual: usize) -> usize {
        match self.byte() {
            byte @ 250.. => [usize::MAX, 1 << 63, 1 << 40, 1 << 32, 1 << 31, 0][byte - 250],
            _ => usual,
        }
    }
}

/// Numbers in `[-1, 1)`.
fn numbers(len: usize, seed: usize) -> Vec<f32> {
    let number = |i: usize| ((i + 1) * 7919 + seed * 104_729) % 16_381;
    (0..len).map(|i| number(i) as f32 / 8_190.5 - 1.0).collect()
}

/// Calls `add` with the places in image, filters and output of every product of the sum.
fn each_product(d: &Conv2dDims, mut add: impl FnMut(usize, usize, usize)) {
    for output in 0..d.n() * d.p() * d.q() {
        let (n, p, q) = (output / (d.p() * d.q()), output / d.q() % d.p(), output % d.q());
        for tap in 0..d.r() * d.s() {
            let row = (p * d.stride() + tap / d.s()).checked_sub(d.pad());
            let column = (q * d.stride() + tap % d.s()).checked_sub(d.pad());
            let (Some(i), Some(j)) = (row, column) else { continue };
            if i >= d.h() || j >= d.w() {
                continue;
            }
            let pixel = (n * d.h() + i) * d.w() + j;
            for k in 0..d.k() {
                let filter = k * d.r() * d.s() + tap;
                for c in 0..d.c() {
                    add(pixel * d.c() + c, filter * d.c() + c, output * d.k() + k);
                }
            }
        }
    }
}

#[track_caller]
fn assert_close(got: &[f32], want: &[f64], what: &str) {
    let largest = want.iter().fold(1.0_f64, |largest, v| largest.max(v.abs()));
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*got) - want).abs();
        assert!(error <= 1e-4 * largest, "{what}: element {i} is {got}, expected {want}");
    }
}

/// A convolution in its three directions, or sizes and buffers that must be refused. Returns whether it was computed.
pub fn kernels(bytes: &[u8]) -> bool {
    let c = &mut Choices(bytes);
    let n = c.of([1, 2, 3, 5, 9, 17, 1, 0]);
    let [h, w] = [0, 1].map(|_| c.of([1, 2, 3, 4, 5, 7, 9, 14, 19, 0]));
    let [channels, k] =
        [0, 1].map(|_| c.of([1, 2, 3, 4, 5, 7, 8, 16, 17, 32, 33, 48, 64, 128, 4, 0]));
    let [r, s] = [0, 1].map(|_| c.of([1, 3, 2, 3, 5, 7, 1, 0]));
    let (stride, pad) = (c.of([1, 2, 1, 3, 5]), c.of([0, 1, 2, 3, 6]));
    let (stride, pad) = (c.absurd_or(stride), c.absurd_or(pad));
    // What the naive sum can check in milliseconds.
    if n * (h + 12) * (w + 12) * channels * k * r * s > 1 << 23 {
        return false;
    }
    let made = quietly(|| Conv2dDims::new([n, h, w, channels], [k, r, s, channels], stride, pad));
    let d = match made {
        Ok(d) => d,
        Err(message) => {
            assert!(message.starts_with("conv2d: "), "{message}");
            return false;
        }
    };
    // Tiles are chosen for any sizes that dims allow.
    for gemm in
        [kernels::Gemm::convolution, kernels::Gemm::data_gradient, kernels::Gemm::weight_gradient]
    {
        let (gemm, tile) = (gemm(&d), gemm(&d).tile());
        assert!(tile.splits * tile.k_per_split >= gemm.k, "{tile:?} of {gemm:?}");
    }
    if n * d.p() * d.q() * k * channels * r * s > 1 << 24 {
        return false; // far outputs that are padding alone
    }
    let x = numbers(n * h * w * channels, 1);
    let filters = numbers(k * r * s * channels, 2);
    let dy = numbers(n * d.p() * d.q() * k, 3);
    let lens = [dy.len(), x.len(), filters.len()];
    let mut want = lens.map(|len| vec![0.0_f64; len]);
    each_product(&d, |i, f, o| {
        want[0][o] += f64::from(x[i]) * f64::from(filters[f]);
        want[1][i] += f64::from(dy[o]) * f64::from(filters[f]);
        want[2][f] += f64::from(x[i]) * f64::from(dy[o]);
    });
    let scratch = [Direction::Forward, Direction::DataGradient, Direction::WeightGradient]
        .map(|direction| vec![f32::NAN; workspace_len(&d, direction)]);
    let accumulate = c.byte() % 2 == 1;
    let before = if accumulate { 0.5 } else { f32::NAN };
    let (mut y, mut dx, mut dw) =
        (vec![f32::NAN; lens[0]], vec![before; lens[1]], vec![before; lens[2]]);
    // Once in a while a buffer is one short, or one long.
    let wrong = c.byte();
    let [mut of_y, mut of_dx, mut of_dw] = scratch;
    match wrong {
        255 => drop(of_y.pop()),
        254 => y.push(0.0),
        _ => {}
    }
    let computed = quietly(|| {
        forward(&mut y, &x, &filters, &mut of_y, &d);
        data_gradient(&mut dx, &dy, &filters, &mut of_dx, &d, accumulate);
        weight_gradient(&mut dw, &x, &dy, &mut of_dw, &d, accumulate);
    });
    if let Err(message) = computed {
        assert!(wrong >= 254 && message.contains("conv2d "), "{message}");
        return false;
    }
    assert!(wrong < 254, "a buffer of a wrong length was taken: {d:?}");
    if accumulate {
        want[1..].iter_mut().flatten().for_each(|v| *v += 0.5);
    }
    for (what, got, want) in [("y", &y, &want[0]), ("dx", &dx, &want[1]), ("dw", &dw, &want[2])] {
        assert_close(got, want, &format!("{what} of {d:?}"));
    }
    true
}

/// Views of tensors, against a model: a tensor is its shape, and the places of its elements in one array.
pub fn tensors(bytes: &[u8]) {
    let c = &mut Choices(bytes);
    let device = Device::reference();
    let shape = |c: &mut Choices<'_>| {
        let rank = c.byte() % 5;
        let mut sizes = [0; 4].map(|_| c.of([1, 2, 3, 4, 5, 0]));
        if rank > 0 {
            sizes[c.byte() % rank] = c.absurd_or(sizes[0]);
        }
        quietly(|| Shape::from(&sizes[..rank])).ok()
    };
    let Some(first) = shape(c).filter(|shape| shape.elements() <= 625) else { return };
    let values = numbers(first.elements(), 4);
    let mut memory: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
    let mut x = Tensor::from_f64(&device, first, &memory);
    let (mut start, mut sizes) = (0, first.to_vec());
    let mut alone = true;
    let mut kept = Vec::new();
    for _ in 0..12 {
        let len: usize = sizes.iter().product();
        match c.byte() % 6 {
            0 => {
                let (from, count) = (c.byte() % 6, c.byte() % 6);
                let (from, count) = (c.absurd_or(from), c.absurd_or(count));
                let fits = sizes
                    .first()
                    .is_some_and(|&rows| from.checked_add(count).is_some_and(|end| end <= rows));
                let rows = quietly(|| x.rows(from, count));
                assert_eq!(rows.is_ok(), fits, "rows {from} and {count} more of {sizes:?}");
                let Ok(rows) = rows else { continue };
                start += from * sizes[1..].iter().product::<usize>();
                sizes[0] = count;
                kept.push(std::mem::replace(&mut x, rows));
                alone = false;
            }
            1 => {
                let offset = c.byte() % 8;
                let offset = c.absurd_or(offset);
                let Some(part) = shape(c) else { continue };
                let fits = offset.checked_add(part.elements()).is_some_and(|end| end <= len);
                let view = quietly(|| x.slice(offset, part));
                assert_eq!(view.is_ok(), fits, "{part:?} at {offset} of {sizes:?}");
                let Ok(view) = view else { continue };
                (start, sizes) = (start + offset, part.to_vec());
                kept.push(std::mem::replace(&mut x, view));
                alone = false;
            }
            2 => {
                let Some(other) = shape(c) else { continue };
                let reshaped = quietly(|| x.reshape(other));
                assert_eq!(reshaped.is_ok(), other.elements() == len);
                let Ok(reshaped) = reshaped else { continue };
                sizes = other.to_vec();
                kept.push(std::mem::replace(&mut x, reshaped));
                alone = false;
            }
            3 => {
                kept.clear();
                alone = true;
            }
            4 => {
                let offset = c.byte() % 8;
                let offset = c.absurd_or(offset);
                let Some(part) = shape(c) else { continue };
                let fits = offset.checked_add(part.elements()).is_some_and(|end| end <= len);
                let filled = quietly(|| x.view_mut().slice(offset, part).fill(0.25));
                assert_eq!(filled.is_ok(), fits && alone, "{part:?} at {offset} of {sizes:?}");
                if filled.is_ok() {
                    memory[start + offset..][..part.elements()].fill(0.25);
                }
            }
            _ => {
                let written = quietly(|| x.view_mut().write(&vec![0.5_f64; len]));
                assert_eq!(written.is_ok(), alone);
                if written.is_ok() {
                    memory[start..][..len].fill(0.5);
                }
            }
        }
        assert_eq!(**x.shape(), sizes[..]);
        assert_eq!(x.data::<f64>(), &memory[start..][..x.len()]);
        assert_eq!(x.to_f64(), memory[start..][..x.len()]);
    }
}

/// Bytes that differ from call to call, the same in each run.
#[cfg(test)]
fn random_bytes() -> impl FnMut(usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    move |count| {
        let mut next = || {
            // xorshift64 (Marsaglia 2003)
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        (0..count).map(|_| next()).collect()
    }
}

#[test]
fn inputs_that_the_fuzzer_found_are_handled() {
    let kernels = |bytes: &[u8]| {
        kernels(bytes);
    };
    for (name, target) in [("kernels", &kernels as &dyn Fn(&[u8])), ("tensors", &tensors)] {
        for entry in std::fs::read_dir(format!("tests/corpus/{name}")).unwrap() {
            target(&std::fs::read(entry.unwrap().path()).unwrap());
        }
    }
}

#[test]
fn convolution_kernels_compute_or_refuse_any_sizes() {
    let mut random = random_bytes();
    let computed = (0..600).filter(|_| kernels(&random(14))).count();
    assert!(computed >= 100, "{computed} legal cases");
}

#[test]
fn views_of_tensors_are_what_their_model_says_or_are_refused() {
    let mut random = random_bytes();
    for _ in 0..1000 {
        tensors(&random(100));
    }
}

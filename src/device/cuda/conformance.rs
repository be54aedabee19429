//! Runs `kernels/conformance.cu` and compares it with host maths written from the layouts in the PTX manual: every
//! instruction that kernels use through `kernels/ptx.cuh` and every warp and block primitive, on random bits, bit for bit.
//! Run it first on an untried chip. The grid barrier is not covered, because no kernel of the engine uses it.

use half::bf16;

use super::{Launch, Table};
use super::{
    conform_block, conform_cp_async, conform_half_warp, conform_ldmatrix, conform_mma_bf16,
    conform_mma_tf32, conform_warp,
};
use crate::device::{Device, Philox, Purpose};
use crate::error::{Error, Result};

/// Runs all checks, each on several random inputs. Returns each one's name with `None`, or with what is wrong. After a failure of
/// the device the rest fails with the same reason.
pub(crate) fn check(gpu: &Device) -> Vec<(&'static str, Option<Error>)> {
    type Case = fn(&Device, Bits) -> bool;
    let cases: [(&str, Case); 7] = [
        ("mma.m16n8k16 of bf16", mma_of_bf16),
        ("mma.m16n8k8 of tf32", mma_of_tf32),
        ("ldmatrix", ldmatrix),
        ("cp.async", cp_async),
        ("shuffles and votes of a warp", warp),
        ("shuffles of half a warp", half_warp),
        ("atomics and counting barriers", block),
    ];
    let run = |(name, case): (&'static str, Case)| {
        let right = |seed| -> Result<()> {
            let agrees = case(gpu, Bits(Philox::new(seed, Purpose::Test, 0, 0)));
            gpu.check()?;
            let wrong = || Error::Device(format!("{gpu}: {name} disagrees with its documentation"));
            agrees.then_some(()).ok_or_else(wrong)
        };
        (name, (0..3).try_for_each(right).err())
    };
    cases.map(run).into()
}

struct Bits(Philox);

impl Bits {
    fn take(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.0.next_u32()).collect()
    }
}

fn launch(gpu: &Device, blocks: usize, threads: usize) -> Launch<'_> {
    Launch::new(gpu.gpu(), [blocks, 1, 1], [threads, 1, 1])
}

/// Multiples of 0.5 between -4 and 4: sums of their products are exact.
fn small(bits: u32) -> f32 {
    (bits % 17) as f32 / 2.0 - 4.0
}

/// `d + A B` for `A [16, depth]` and `B [depth, 8]`, in the layout of the accumulator fragments, lane after lane.
fn mma(
    d: &[f32],
    depth: usize,
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) -> Vec<f32> {
    let element = |(i, d): (usize, &f32)| {
        let (lane, e) = (i / 4, i % 4);
        let (row, column) = (lane / 4 + e / 2 * 8, lane % 4 * 2 + e % 2);
        (0..depth).fold(*d, |sum, k| sum + a(row, k) * b(k, column))
    };
    d.iter().enumerate().map(element).collect()
}

fn mma_of_bf16(gpu: &Device, mut bits: Bits) -> bool {
    let [d, a, b] =
        [128, 256, 128].map(|n| bits.take(n).into_iter().map(small).collect::<Vec<_>>());
    let (of_a, of_b) = (|row: usize, k: usize| a[row * 16 + k], |k: usize, j: usize| b[k * 8 + j]);
    let pair = |low: f32, high: f32| {
        let [low, high] = [low, high].map(|x| u32::from(bf16::from_f32(x).to_bits()));
        low | high << 16
    };
    let (mut fa, mut fb) = (Vec::new(), Vec::new());
    for lane in 0..32 {
        let (row, k) = (lane / 4, lane % 4 * 2);
        for r in 0..4 {
            let (row, k) = (row + r % 2 * 8, k + r / 2 * 8);
            fa.push(pair(of_a(row, k), of_a(row, k + 1)));
        }
        for r in 0..2 {
            let k = k + r * 8;
            fb.push(pair(of_b(k, row), of_b(k + 1, row)));
        }
    }
    let (mut out, fa, fb) = (Table::new(gpu, &d), Table::new(gpu, &fa), Table::new(gpu, &fb));
    // SAFETY: fragments of one warp.
    unsafe {
        conform_mma_bf16(launch(gpu, 1, 32), out.device_out(), fa.device_in(), fb.device_in())
    };
    out.read() == mma(&d, 16, of_a, of_b)
}

fn mma_of_tf32(gpu: &Device, mut bits: Bits) -> bool {
    let [d, a, b] = [128, 128, 64].map(|n| bits.take(n).into_iter().map(small).collect::<Vec<_>>());
    let (of_a, of_b) = (|row: usize, k: usize| a[row * 8 + k], |k: usize, j: usize| b[k * 8 + j]);
    // tf32 ignores the 13 lowest bits.
    let mut dirty = |x: f32| x.to_bits() | bits.0.next_u32() >> 19;
    let (mut fa, mut fb) = (Vec::new(), Vec::new());
    for lane in 0..32 {
        let (row, k) = (lane / 4, lane % 4);
        fa.extend((0..4).map(|r| dirty(of_a(row + r % 2 * 8, k + r / 2 * 4))));
        fb.extend((0..2).map(|r| dirty(of_b(k + r * 4, row))));
    }
    let (mut out, fa, fb) = (Table::new(gpu, &d), Table::new(gpu, &fa), Table::new(gpu, &fb));
    // SAFETY: fragments of one warp.
    unsafe {
        conform_mma_tf32(launch(gpu, 1, 32), out.device_out(), fa.device_in(), fb.device_in())
    };
    out.read() == mma(&d, 8, of_a, of_b)
}

/// Four matrices of 8 x 8 two-byte elements, plain and transposed, loaded four at a time and two at a time.
fn ldmatrix(gpu: &Device, mut bits: Bits) -> bool {
    let m = bits.take(128);
    let element = |matrix: usize, i: usize, j: usize| {
        let at = matrix * 64 + i * 8 + j;
        m[at / 2] >> (at % 2 * 16) & 0xffff
    };
    let register = |i: usize| {
        let (lane, form, matrix) = (i / 16, i / 4 % 4, i % 4);
        let (row, column) = (lane / 4, lane % 4 * 2);
        let [low, high] = match form % 2 {
            0 => [element(matrix, row, column), element(matrix, row, column + 1)],
            _ => [element(matrix, column, row), element(matrix, column + 1, row)],
        };
        if form >= 2 && matrix >= 2 { 0 } else { low | high << 16 }
    };
    let (mut out, matrices) = (Table::new(gpu, &[0_u32; 512]), Table::new(gpu, &m));
    // SAFETY: sixteen registers for each lane of one warp, from four matrices.
    unsafe { conform_ldmatrix(launch(gpu, 1, 32), out.device_out(), matrices.device_in()) };
    out.read() == (0..512).map(register).collect::<Vec<_>>()
}

/// Each lane reads its neighbour's copy. The copies of odd lanes are predicated off and write zeros.
fn cp_async(gpu: &Device, mut bits: Bits) -> bool {
    let x = bits.take(256);
    let want = (0..256).map(|i: usize| if i / 4 % 2 == 1 { x[i ^ 4] } else { 0 });
    let (mut out, from) = (Table::new(gpu, &[1_u32; 256]), Table::new(gpu, &x));
    // SAFETY: two groups of 16 bytes for each lane of one warp.
    unsafe { conform_cp_async(launch(gpu, 1, 32), out.device_out(), from.device_in()) };
    out.read() == want.collect::<Vec<_>>()
}

fn warp(gpu: &Device, mut bits: Bits) -> bool {
    let x = bits.take(32);
    let ballot = (0..32).fold(0, |all, i| all | (x[i] % 2) << i);
    let rows: [&dyn Fn(usize) -> u32; 8] = [
        &|i| x[i ^ 5],
        &|i| if i + 3 < 32 { x[i + 3] } else { x[i] },
        &|i| if i >= 3 { x[i - 3] } else { x[i] },
        &|_| x[7],
        &|i| x[i ^ 1],
        &|i| if i % 8 + 3 < 8 { x[i + 3] } else { x[i] },
        &|_| ballot,
        &|_| u32::from(ballot != 0) + 2 * u32::from(ballot == u32::MAX),
    ];
    let want = rows.iter().flat_map(|row| (0..32).map(row));
    let (mut out, from) = (Table::new(gpu, &[0_u32; 256]), Table::new(gpu, &x));
    // SAFETY: eight rows of a warp.
    unsafe { conform_warp(launch(gpu, 1, 32), out.device_out(), from.device_in()) };
    out.read() == want.collect::<Vec<_>>()
}

fn half_warp(gpu: &Device, mut bits: Bits) -> bool {
    let x = bits.take(32);
    let (mut out, from) = (Table::new(gpu, &[0_u32; 32]), Table::new(gpu, &x));
    // SAFETY: a number for each lane.
    unsafe { conform_half_warp(launch(gpu, 1, 32), out.device_out(), from.device_in()) };
    out.read() == (0..32).map(|i: usize| x[i ^ 15]).collect::<Vec<_>>()
}

fn block(gpu: &Device, mut bits: Bits) -> bool {
    let x = bits.take(3 * 96);
    let (mut counts, mut sums) = (Table::new(gpu, &[0_i32; 3]), Table::new(gpu, &[0_u64]));
    let (mut extremes, from) = (Table::new(gpu, &[0, u32::MAX]), Table::new(gpu, &x));
    // SAFETY: three blocks of 96 numbers, a count for each, one sum, a largest and a smallest.
    unsafe {
        conform_block(
            launch(gpu, 3, 96),
            counts.device_out(),
            sums.device_out(),
            extremes.device_out(),
            from.device_in(),
        );
    }
    let odd = x.chunks(96).map(|block| block.iter().filter(|v| *v % 2 == 1).count() as i32);
    sums.read() == [x.iter().map(|v| u64::from(*v)).sum::<u64>()]
        && extremes.read() == [x.iter().max(), x.iter().min()].map(|v| *v.expect("288 numbers"))
        && counts.read() == odd.collect::<Vec<_>>()
}

//! Compares every function of kernels/ptx.cuh and every collective with plain host code, written independently from the layouts
//! of the PTX ISA. Inputs are random bits, and data movement must be bit-exact. On a new GPU, run these tests first.

use crate::numbers::{bits, noise};
use crate::stage::Stage;

fn both(run: impl Fn(&Stage)) {
    for checked in [false, true] {
        for seed in 1..=3 {
            let stage = Stage::take(checked);
            stage.seed(seed);
            run(&stage);
        }
    }
}

/// Runs an mma of the fragments, and compares it with the product of `a [row][k]` and `b [k][column]`.
fn mma(
    kernel: &str,
    depth: usize,
    a: [[f64; 16]; 16],
    b: [[f64; 8]; 16],
    fragments: (Vec<u32>, Vec<u32>),
) {
    both(|stage| {
        let d: Vec<f32> = noise(128, 5);
        let dd = stage.upload(&d);
        let (fa, fb) = (stage.upload(&fragments.0), stage.upload(&fragments.1));
        stage.launch(kernel, [1, 1, 1], [32, 1, 1], 0, &[(&dd).into(), (&fa).into(), (&fb).into()]);
        for (i, got) in dd.read(stage).into_iter().enumerate() {
            let (lane, e) = (i / 4, i % 4);
            let (row, column) = (lane / 4 + e / 2 * 8, lane % 4 * 2 + e % 2);
            let want = (0..depth).fold(f64::from(d[i]), |sum, k| sum + a[row][k] * b[k][column]);
            assert!(
                (f64::from(got) - want).abs() < 1e-4,
                "{kernel}: d[{row}][{column}] is {got}, not {want}"
            );
        }
    });
}

#[test]
fn mma_bf16_multiplies() {
    let value = |bits: u32| f64::from(f32::from_bits(bits << 16));
    // Small integers and halves, exact in bf16.
    let small = |b: &u32| u32::from(half::bf16::from_f64(f64::from(b % 17) / 2.0 - 4.0).to_bits());
    let (ea, eb) = (bits(256, 1), bits(128, 2));
    let (mut a, mut b) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
    let (mut fa, mut fb) = (vec![0; 128], vec![0; 64]);
    for lane in 0..32 {
        for e in 0..8 {
            let row = lane / 4 + if e % 4 < 2 { 0 } else { 8 };
            let k = lane % 4 * 2 + e % 2 + if e < 4 { 0 } else { 8 };
            let x = small(&ea[lane * 8 + e]);
            fa[lane * 4 + e / 2] |= x << (e % 2 * 16);
            a[row][k] = value(x);
        }
        for e in 0..4 {
            let k = lane % 4 * 2 + e % 2 + if e < 2 { 0 } else { 8 };
            let x = small(&eb[lane * 4 + e]);
            fb[lane * 2 + e / 2] |= x << (e % 2 * 16);
            b[k][lane / 4] = value(x);
        }
    }
    mma("conform_mma_bf16", 16, a, b, (fa, fb));
}

#[test]
fn mma_tf32_multiplies_the_upper_bits() {
    let value = |bits: u32| f64::from(f32::from_bits(bits & 0xffff_e000));
    let (ea, eb): (Vec<f32>, Vec<f32>) = (noise(128, 1), noise(64, 2));
    let (mut a, mut b) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
    let (fa, fb): (Vec<u32>, Vec<u32>) =
        (ea.iter().map(|x| x.to_bits()).collect(), eb.iter().map(|x| x.to_bits()).collect());
    for lane in 0..32 {
        for e in 0..4 {
            let (row, k) = (lane / 4 + e % 2 * 8, lane % 4 + e / 2 * 4);
            a[row][k] = value(fa[lane * 4 + e]);
        }
        for e in 0..2 {
            b[lane % 4 + e * 4][lane / 4] = value(fb[lane * 2 + e]);
        }
    }
    mma("conform_mma_tf32", 8, a, b, (fa, fb));
}

#[test]
fn ldmatrix_moves_every_bit() {
    both(|stage| {
        let m = bits(128, 3);
        let element = |matrix: usize, i: usize, j: usize| {
            let at = matrix * 64 + i * 8 + j;
            m[at / 2] >> (at % 2 * 16) & 0xffff
        };
        let (r, dm) = (stage.room::<u32>(512), stage.upload(&m));
        stage.launch("conform_ldmatrix", [1, 1, 1], [32, 1, 1], 0, &[(&r).into(), (&dm).into()]);
        for (i, got) in r.read(stage).into_iter().enumerate() {
            let (lane, form, matrix) = (i / 16, i / 4 % 4, i % 4);
            let (row, column) = (lane / 4, lane % 4 * 2);
            let pair = if form % 2 == 0 {
                [element(matrix, row, column), element(matrix, row, column + 1)]
            } else {
                [element(matrix, column, row), element(matrix, column + 1, row)]
            };
            let want = if form >= 2 && matrix >= 2 { 0 } else { pair[0] | pair[1] << 16 };
            assert_eq!(got, want, "lane {lane}, form {form}, matrix {matrix}");
        }
    });
}

#[test]
fn cp_async_copies_and_fills_with_zeros() {
    both(|stage| {
        let x = bits(256, 4);
        let (y, dx) = (stage.room::<u32>(256), stage.upload(&x));
        stage.launch("conform_cp_async", [1, 1, 1], [32, 1, 1], 0, &[(&y).into(), (&dx).into()]);
        let want: Vec<u32> = (0..256).map(|i| if i / 4 % 2 == 1 { x[i ^ 4] } else { 0 }).collect();
        assert_eq!(y.read(stage), want);
    });
}

#[test]
fn shuffles_and_votes() {
    both(|stage| {
        let x = bits(32, 5);
        let (y, dx) = (stage.room::<u32>(256), stage.upload(&x));
        stage.launch("conform_warp", [1, 1, 1], [32, 1, 1], 0, &[(&y).into(), (&dx).into()]);
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
        let want: Vec<u32> = rows.iter().flat_map(|row| (0..32).map(row)).collect();
        assert_eq!(y.read(stage), want);

        let y = stage.room::<u32>(32);
        stage.launch("conform_half_warp", [1, 1, 1], [32, 1, 1], 0, &[(&y).into(), (&dx).into()]);
        let want: Vec<u32> = (0..32).map(|i: usize| x[i ^ 15]).collect();
        assert_eq!(y.read(stage), want);
    });
}

#[test]
fn atomics_and_counting_barriers() {
    both(|stage| {
        let x = bits(3 * 96, 6);
        let (counts, sums) = (stage.room::<i32>(3), stage.upload(&[0_u64]));
        let (extremes, dx) = (stage.upload(&[0, u32::MAX]), stage.upload(&x));
        let arguments = [(&counts).into(), (&sums).into(), (&extremes).into(), (&dx).into()];
        stage.launch("conform_block", [3, 1, 1], [96, 1, 1], 0, &arguments);
        assert_eq!(sums.read(stage), [x.iter().map(|v| u64::from(*v)).sum()]);
        assert_eq!(extremes.read(stage), [*x.iter().max().unwrap(), *x.iter().min().unwrap()]);
        let want: Vec<i32> =
            x.chunks(96).map(|block| block.iter().filter(|v| *v % 2 == 1).count() as i32).collect();
        assert_eq!(counts.read(stage), want);
    });
}

#[test]
fn grid_barriers_hold_all_blocks() {
    both(|stage| {
        let x = bits(7, 7);
        let (y, between, dx) = (stage.room::<u32>(7), stage.room::<u32>(7), stage.upload(&x));
        let arguments = [(&y).into(), (&between).into(), (&dx).into()];
        stage
            .try_launch("conform_grid", [7, 1, 1], [64, 1, 1], 0, &arguments, true)
            .expect("fits the device");
        let want: Vec<u32> = (0..7).map(|i| x[(i + 1) % 7].wrapping_add(x[i])).collect();
        assert_eq!(y.read(stage), want);
        let arguments = [(&y).into(), (&between).into(), (&dx).into()];
        let refused =
            stage.try_launch("conform_grid", [7000, 1, 1], [64, 1, 1], 0, &arguments, true);
        refused.expect_err("more blocks than the device holds");
    });
}

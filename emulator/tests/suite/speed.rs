//! Prints the speed of kernels on the stand-in driver, without judging it:
//! `cargo test -p selfsup-emulator -- --ignored --nocapture speed`

use crate::stage::{Memory, Stage, Value};

/// CPU time of this thread, on which kernels run, so that other load on the machine does not count.
fn cpu_seconds() -> f64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut t) };
    t.tv_sec as f64 + t.tv_nsec as f64 * 1e-9
}

fn timed(stage: &Stage, run: impl Fn()) -> f64 {
    run();
    stage.wait().expect("runs");
    let start = cpu_seconds();
    for _ in 0..4 {
        run();
        stage.wait().expect("runs");
    }
    (cpu_seconds() - start) / 4.0
}

#[test]
#[ignore = "prints timings"]
fn speed() {
    for checked in [false, true] {
        let stage = Stage::take(checked);
        let n = 1 << 18;
        let (x, y): (Memory<f32>, Memory<f32>) =
            (stage.upload(&vec![1.0; n]), stage.upload(&vec![1.0; n]));
        let size = |n: usize| Value::from(n as i64);
        let s = timed(&stage, || {
            stage.launch(
                "relu_f32",
                [1024, 1, 1],
                [64, 1, 1],
                0,
                &[(&y).into(), (&x).into(), size(n)],
            );
        });
        println!("checked {checked}: relu: {:.1} M threads/s", 65536.0 / s / 1e6);
        let s = timed(&stage, || {
            let arguments = [(&y).into(), (&x).into(), 1024_i64.into(), 64.into(), 64.into()];
            stage.launch("batch_norm_moments_f32", [1, 16, 1], [16, 16, 1], 0, &arguments);
        });
        println!("checked {checked}: moments: {:.1} M elements/s", 65536.0 / s / 1e6);
        let m = 128;
        let int = |n: i32| Value::from(n);
        let (zero, sizes) = (0_u64, [m, m, m, m, 0].map(int));
        let [c, a, b] = [&y, &x, &x].map(Value::from);
        for (kernel, threads, pointers) in [
            ("matmul_nn_bf16_64x64", 128, vec![zero.into(), c.clone(), a.clone(), b.clone()]),
            ("matmul_nn_bf16_128x128", 128, vec![zero.into(), c.clone(), a.clone(), b.clone()]),
            ("matmul_nn_f32", 256, vec![c, a, b]),
        ] {
            let s = timed(&stage, || {
                let arguments = [pointers.clone(), sizes.to_vec()].concat();
                let tiles = if kernel.ends_with("128") { 1 } else { 4 };
                stage.launch(kernel, [tiles, 1, 1], [threads, 1, 1], 0, &arguments);
            });
            let flops = 2.0 * f64::from(m).powi(3);
            println!("checked {checked}: {kernel}: {:.3} GFLOP/s", flops / s / 1e9);
        }
    }
}

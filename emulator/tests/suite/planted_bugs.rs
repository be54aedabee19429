//! Kernels broken on purpose: each must be caught, and its report must name the bug and its location.

use std::io::Write;

use cudarc::driver::sys::{self, CUresult};

use crate::numbers::noise;
use crate::stage::{Memory, Stage, Value};

/// Two buffers of 128 floats, `x` initialised and `y` not, and launches on them.
struct Bench {
    y: Memory<f32>,
    x: Memory<f32>,
    /// Dropped last, so that memory is freed under the lock: a free would invalidate another test's capture.
    stage: Stage,
}

impl Bench {
    fn new(checked: bool, seed: u64) -> Self {
        let stage = Stage::take(checked);
        stage.seed(seed);
        let (y, x) = (stage.room(128), stage.upload(&noise::<f32>(128, 1)));
        Self { y, x, stage }
    }

    fn run(
        &self,
        name: &str,
        blocks: u32,
        threads: u32,
        more: &[Value],
        cooperative: bool,
    ) -> Result<(), String> {
        self.run_with(name, blocks, threads, 0, more, cooperative)
    }

    fn run_with(
        &self,
        name: &str,
        blocks: u32,
        threads: u32,
        shared: u32,
        more: &[Value],
        cooperative: bool,
    ) -> Result<(), String> {
        let mut arguments = vec![Value::from(&self.y)];
        arguments.extend(more.iter().cloned());
        let launched = self.stage.try_launch(
            name,
            [blocks, 1, 1],
            [threads, 1, 1],
            shared,
            &arguments,
            cooperative,
        );
        match launched.and_then(|()| self.stage.wait()) {
            Ok(()) => Ok(()),
            Err(e) => {
                assert_eq!(e.0, CUresult::CUDA_ERROR_LAUNCH_FAILED, "{name}");
                Err(self.stage.report())
            }
        }
    }
}

/// Whether the report contains all of `says`, whatever the seed.
fn expect(name: &str, says: &[&str], run: impl Fn(&Bench) -> Result<(), String>) -> bool {
    (1..=4).all(|seed| {
        let report = run(&Bench::new(true, seed)).err().unwrap_or_default();
        let named = says.iter().all(|part| report.contains(part));
        if !named {
            println!("{name}, seed {seed}: the report is `{report}`, without one of {says:?}");
        }
        named
    })
}

#[test]
fn sound_forms_pass() {
    for checked in [false, true] {
        for seed in 1..=8 {
            let bench = Bench::new(checked, seed);
            let x = [Value::from(&bench.x)];
            bench.run("sound_reverse", 1, 64, &x, false).expect("sound");
            bench.run("sound_syncwarp", 1, 32, &x, false).expect("sound");
            bench.run("sound_copies", 1, 16, &x, false).expect("sound");
            bench.run("sound_grid_barrier", 2, 64, &[], true).expect("sound");
        }
    }
}

#[test]
fn planted_bugs_are_caught() {
    let x = |bench: &Bench| [Value::from(&bench.x)];
    let simple = |name: &'static str, threads: u32, with_x: bool, says: &'static [&'static str]| {
        let run = move |bench: &Bench| {
            let more = if with_x { x(bench).to_vec() } else { Vec::new() };
            bench.run(name, 1, threads, &more, false)
        };
        (name, expect(name, says, run))
    };
    let block = "block (0, 0, 0), thread (";
    let mut caught = vec![
        simple(
            "broken_no_barrier",
            64,
            true,
            &["`broken_no_barrier`, block (0, 0, 0), thread (", "static shared memory"],
        ),
        simple(
            "broken_one_barrier_of_two",
            64,
            true,
            &["`broken_one_barrier_of_two`", "race", "static shared memory"],
        ),
        simple("broken_no_syncwarp", 32, true, &["`broken_no_syncwarp`", "static shared memory"]),
        simple(
            "broken_no_wait",
            16,
            true,
            &["`broken_no_wait`", "static shared memory", "uninitialised"],
        ),
        simple(
            "broken_copy_too_early",
            16,
            true,
            &["`broken_copy_too_early`", "race", "static shared memory"],
        ),
        (
            "broken_reads_too_far",
            expect(
                "broken_reads_too_far",
                &[
                    "block (1, 0, 0), thread (63, 0, 0)",
                    "reads 4 bytes",
                    "0 bytes past the end of 512 bytes",
                ],
                |b| b.run("broken_reads_too_far", 2, 64, &[(&b.x).into(), 128.into()], false),
            ),
        ),
        (
            "broken_writes_too_far",
            expect(
                "broken_writes_too_far",
                &[
                    "block (2, 0, 0), thread (0, 0, 0)",
                    "writes 4 bytes",
                    "0 bytes past the end of 512 bytes",
                ],
                |b| b.run("broken_writes_too_far", 3, 64, &[128.into()], false),
            ),
        ),
        (
            "broken_shared_too_far",
            expect(
                "broken_shared_too_far",
                &[block, "thread (63, 0, 0)", "offset 256 of 256 bytes of dynamic shared memory"],
                |b| b.run_with("broken_shared_too_far", 1, 64, 256, &[], false),
            ),
        ),
        simple(
            "broken_two_warps",
            64,
            false,
            &[
                "`broken_two_warps`",
                "writes 4 bytes",
                "race",
                "of block (0, 0, 0) writes",
                "(broken.cu:",
            ],
        ),
        (
            "broken_two_blocks",
            expect("broken_two_blocks", &["`broken_two_blocks`", "race", "of block ("], |b| {
                b.run("broken_two_blocks", 2, 64, &[], false)
            }),
        ),
        (
            "broken_unwritten",
            expect(
                "broken_unwritten",
                &["a copy to the host reads offset 508 of 512", "never written"],
                |b| {
                    b.run("broken_unwritten", 1, 64, &[128.into()], false)?;
                    let mut host = [0.0_f32; 128];
                    let copied =
                        unsafe { cudarc::driver::result::memcpy_dtoh_sync(&mut host, b.y.at) };
                    copied.map_err(|_| b.stage.report())
                },
            ),
        ),
        simple(
            "broken_uninitialised",
            64,
            false,
            &["thread (63, 0, 0)", "reads 4 bytes", "uninitialised"],
        ),
        simple("broken_misaligned", 64, true, &["reads 16 bytes at offset 4 of 512", "misaligned"]),
        simple("broken_scalar", 64, true, &["`broken_scalar`", "4 bytes at static shared memory"]),
        simple("broken_misaligned_pairs", 8, false, &["writes 16 bytes at offset", "misaligned"]),
        ("broken_argument", argument_of_the_wrong_type_shows()),
        simple(
            "broken_divergent_barrier",
            64,
            false,
            &["`broken_divergent_barrier`", "divergent barrier"],
        ),
        simple("broken_two_barriers", 64, false, &["`broken_two_barriers`", "divergent barrier"]),
        simple(
            "broken_half_shuffle",
            64,
            false,
            &["`broken_half_shuffle`", "warp collective", "never arrive"],
        ),
        simple(
            "broken_two_shuffles",
            64,
            false,
            &["`broken_two_shuffles`", "warp collective", "is in a different one"],
        ),
        simple("broken_trap", 64, false, &["`broken_trap`", "trap"]),
        (
            "use after free",
            expect("use after free", &["`relu_f32`", "freed memory"], |b| {
                let gone = b.stage.upload(&[1.0_f32; 64]);
                let at = gone.at;
                drop(gone);
                b.run("relu_f32", 1, 64, &[at.into(), 64_i64.into()], false)
            }),
        ),
    ];
    caught.extend(crate::misuse::all());
    for (name, _) in caught.iter().filter(|(_, caught)| !caught) {
        println!("not caught: {name}");
    }
    let count = caught.iter().filter(|(_, caught)| *caught).count();
    // Written past the capture of test output, so that CI shows it.
    writeln!(std::io::stdout(), "planted bugs caught: {count} of {}", caught.len())
        .expect("a stdout");
    assert_eq!(count, caught.len());
}

/// Compares the launch's types `(pointer, i32, f32)` with the kernel's, as the device layer does at load.
fn argument_of_the_wrong_type_shows() -> bool {
    let stage = Stage::take(false);
    let function = stage.function("broken_argument");
    let given: [(usize, usize); 3] = [(0, 8), (8, 4), (12, 4)];
    let taken: Vec<(usize, usize)> = (0..)
        .map_while(|i| {
            let (mut offset, mut size) = (0, 0);
            let answer = unsafe { sys::cuFuncGetParamInfo(function, i, &mut offset, &mut size) };
            (answer == CUresult::CUDA_SUCCESS).then_some((offset, size))
        })
        .collect();
    assert_eq!(taken, [(0, 8), (8, 8), (16, 4)]);
    taken != given
}

/// A preferred carve-out is a percentage, or -1 for the driver's own choice, and has no effect on results.
#[test]
fn a_preferred_carve_out_is_kept_and_checked() {
    let stage = Stage::take(false);
    let function = stage.function("broken_argument");
    let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
    let mut kept = 0;
    for (value, accepted) in [(100, true), (0, true), (101, false), (-2, false), (-1, true)] {
        let answer = unsafe { sys::cuFuncSetAttribute(function, which, value) };
        assert_eq!(answer == CUresult::CUDA_SUCCESS, accepted, "{value}: {answer:?}");
        let asked = unsafe { sys::cuFuncGetAttribute(&mut kept, which, function) };
        assert_eq!(asked, CUresult::CUDA_SUCCESS);
        assert_eq!(kept == value, accepted, "{value} and {kept}");
    }
}

/// The plain build shows poison in results, and reports overwritten guards.
#[test]
fn plain_kernels_show_poison_broken_guards_and_faults() {
    {
        let bench = Bench::new(false, 1);
        bench.run("broken_unwritten", 1, 64, &[128.into()], false).expect("runs");
        assert!(bench.y.read(&bench.stage)[127].is_nan());
    }
    {
        let bench = Bench::new(false, 1);
        let report =
            bench.run("broken_writes_too_far", 3, 64, &[128.into()], false).expect_err("guards");
        assert!(
            report.contains("`broken_writes_too_far`: wrote to the guard after 512 bytes"),
            "{report}"
        );
    }
    let bench = Bench::new(false, 1);
    let report =
        bench.run("broken_no_wait", 1, 16, &[(&bench.x).into()], false).expect_err("no wait");
    assert!(report.contains("asynchronous copies that were never waited for"), "{report}");
    assert!(report.contains("`broken_no_wait`, block (0, 0, 0)"), "{report}");
}

#[test]
fn after_a_violation_every_call_returns_its_error() {
    let bench = Bench::new(true, 1);
    bench.run("broken_trap", 1, 64, &[], false).expect_err("traps");
    let answer = unsafe { cudarc::driver::result::malloc_sync(4) };
    assert_eq!(answer.expect_err("sticky").0, CUresult::CUDA_ERROR_LAUNCH_FAILED);
    bench.stage.recover();
    bench.run("sound_reverse", 1, 64, &[(&bench.x).into()], false).expect("recovered");
}

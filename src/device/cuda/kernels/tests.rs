//! Checks of the compiled kernels: registers, local memory, and the instructions of their hot loops.

use super::*;

/// The chips whose machine code is judged: those of every build.
fn is_judged(r: &&Resources) -> bool {
    ["sm_80", "sm_90a"].contains(&r.chip)
}

/// Kernels that may use local memory, each with its reason.
const LOCAL_MEMORY: [(&str, &str); 0] = [];

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn no_kernel_spills_or_uses_local_memory_without_a_reason() {
    println!(
        "{:32} {:7} {:>9} {:>7} {:>6} {:>7}",
        "kernel", "chip", "registers", "shared", "stack", "spills"
    );
    let mut wrong = Vec::new();
    for r in RESOURCES {
        let spills = r.spill_stores + r.spill_loads;
        println!(
            "{:32} {:7} {:9} {:7} {:6} {spills:7}",
            r.kernel, r.chip, r.registers, r.shared, r.stack
        );
        let excused = LOCAL_MEMORY.iter().any(|(kernel, _)| *kernel == r.kernel);
        if spills > 0 || (r.stack > 0 && !excused) {
            wrong.push(r);
        }
    }
    assert!(wrong.is_empty(), "spills or local memory: {wrong:#?}");
    for (kernel, file) in KERNELS.iter().map(|kernel| (kernel.name, &FILES[kernel.file])) {
        let chips = RESOURCES.iter().filter(|r| r.kernel == kernel).count();
        let targets = file.targets.iter().filter(|target| target.starts_with("sm_")).count();
        assert_eq!(chips, targets, "{kernel}: no resources for some chip");
    }
}

/// Kernels whose hot loop has no accesses of 16 bytes to global memory, each with its reason.
const NARROW: [(&str, &str); 1] =
    [("conv2d_bf16_stem", "images have four channels: a tap is copied 8 bytes at a time")];

/// Other kernels with mma.
const SIMILARITIES: [&str; 8] = [
    "info_nce_gradient_2",
    "info_nce_gradient_3",
    "info_nce_sums",
    "knn_similarities",
    "nt_xent_gradient_2",
    "nt_xent_gradient_3",
    "nt_xent_sums",
    "nt_xent_sums_online",
];

fn uses_mma(kernel: &str) -> bool {
    let tiled = kernel.starts_with("conv2d") || kernel.starts_with("matmul");
    kernel.contains("_bf16_") && tiled || SIMILARITIES.contains(&kernel)
}

/// Loops over contiguous elements, in bf16 if the kernel has both types: the width of their loads and stores sets their time.
const STREAMS: [&str; 30] = [
    "adam_step",
    "add_bf16",
    "avg_pool_bf16",
    "batch_norm_apply_bf16",
    "batch_norm_backward_apply_bf16",
    "batch_norm_backward_sums_bf16",
    "batch_norm_moments_bf16",
    "cast_bf16_to_f32",
    "cast_f32_to_bf16",
    "ema",
    "fill_f32",
    "l2_normalize_bf16",
    "lars_norms",
    "lars_step",
    "max_pool_bf16",
    "mean_pool_bf16",
    "mean_pool_backward_bf16",
    "mul_bf16",
    "neg_cosine_bf16",
    "relu_bf16",
    "relu_backward_bf16",
    "sgd_step",
    "sinkhorn_assign_bf16",
    "sinkhorn_columns_bf16",
    "soft_cross_entropy_bf16",
    "softmax_bf16",
    "square_backward_bf16",
    "square_bf16",
    "stream_select_bf16",
    "sum_rows_bf16",
];

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn hot_loops_use_tensor_cores_and_wide_accesses() {
    println!(
        "{:34} {:7} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>7} {:>6} {:>6}",
        "kernel",
        "chip",
        "code",
        "hot loop",
        "mma",
        "ldmatrix",
        "16 bytes",
        "narrower",
        "shared",
        "lanes",
        "MUFU"
    );
    let mut wrong = Vec::new();
    for r in RESOURCES.iter().filter(is_judged) {
        let Mix { whole, hot, .. } = r.mix.expect(
            "the build found no cuobjdump next to nvcc: run scripts/fetch-nvcc and build again",
        );
        println!(
            "{:34} {:7} {:6} {:9} {:9} {:9} {:9} {:9} {:7} {:6} {:6}",
            r.kernel,
            r.chip,
            whole.all,
            hot.all,
            hot.mma,
            hot.ldmatrix,
            hot.global_16,
            hot.global,
            hot.shared,
            hot.lanes,
            hot.special
        );
        let excused = NARROW.iter().any(|(kernel, _)| *kernel == r.kernel);
        let mut demand = |holds: bool, what: &str| {
            if !holds {
                wrong.push(format!("{} on {}: {what}: {hot:?}", r.kernel, r.chip));
            }
        };
        demand(whole.local == 0, "uses local memory");
        if uses_mma(r.kernel) {
            demand(hot.mma > 0, "no mma in the hot loop");
            demand(hot.ldmatrix > 0, "no ldmatrix in the hot loop");
            demand(excused || hot.global_16 > 0, "no copies of 16 bytes in the hot loop");
        } else if STREAMS.contains(&r.kernel) {
            demand(excused || hot.global_16 > 0, "no accesses of 16 bytes in the hot loop");
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for listed in STREAMS.iter().chain(&SIMILARITIES) {
        assert!(RESOURCES.iter().any(|r| r.kernel == *listed), "unknown kernel {listed}");
    }
}

/// Instructions of the main loop of a tile for 64 mma, and of its epilogue for eight results: more than these, and a step of ResNet-50
/// takes longer than `benches/results/rooflines.md` foretells.
#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn tiles_stay_within_their_budgets_of_instructions() {
    // Patches cost more than matrices: their addresses follow taps, and for the weight gradient pixels.
    let budget = |kernel: &str| match kernel {
        "conv2d_bf16_128x128" => 185,
        "conv2d_data_gradient_bf16_128x128" => 195,
        "conv2d_weight_gradient_bf16_128x128" => 215,
        _ => 170,
    };
    /// Rounding, and storing to shared memory, before the loop: four instructions each for eight results.
    const STAGING: usize = 8;
    let mut checked = 0;
    for r in RESOURCES.iter().filter(is_judged).filter(|r| {
        let tile = ["matmul_", "conv2d_"].iter().any(|start| r.kernel.starts_with(start));
        tile && r.kernel.ends_with("bf16_128x128")
    }) {
        let mix = r.mix.expect("checked above");
        assert_eq!(mix.hot.mma, 64, "{}", r.kernel);
        assert!(mix.hot.all <= budget(r.kernel), "{} on {}: {mix:?}", r.kernel, r.chip);
        // Eight results are 16 bytes, or two stores of f32.
        let stores = if r.kernel.contains("weight_gradient") { 2 } else { 1 };
        let of_eight = mix.epilogues.map(|of_loop| {
            assert!(of_loop.stores_16 > 0, "{} on {} has no epilogue", r.kernel, r.chip);
            (stores * of_loop.all).div_ceil(of_loop.stores_16) + STAGING
        });
        println!(
            "{:34} {:7} {:4} instructions, {:?} cycles; epilogue {of_eight:?} for eight results",
            r.kernel, r.chip, mix.hot.all, mix.hot_cycles
        );
        assert!(of_eight[1] <= 64, "{} on {}: {of_eight:?}", r.kernel, r.chip);
        // Neither faster than the tensor cores allow, nor slower than half of that with two resident blocks.
        let of_mma = if r.chip == "sm_80" { 8.0 } else { 6.4 };
        let least = 64.0 * of_mma;
        let of_block = f64::from(mix.hot_cycles[1]) / 2.0;
        assert!(of_block >= 0.99 * least && of_block < 2.0 * least, "{}: {mix:?}", r.kernel);
        checked += 1;
    }
    assert_eq!(checked, 12, "six kernels on two chips");
}

#[test]
fn machine_code_runs_on_later_chips_of_its_generation() {
    let file = |targets| File { name: "a", targets, image: &[] };
    let usual = file(&["sm_90a", "sm_80", "compute_80"]);
    let runs = |file: &File, chips: &[(i32, i32)]| -> Vec<bool> {
        chips.iter().map(|&chip| file.has_code_for(chip)).collect()
    };
    let chips = [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)];
    assert_eq!(runs(&usual, &chips), [true, true, true, false, false, false, false]);
    let more = file(&["sm_90a", "sm_80", "sm_100", "sm_120", "compute_80"]);
    assert_eq!(runs(&more, &chips), [true; 7]);
    assert!(!file(&["sm_86"]).has_code_for((8, 0)));
}

#[test]
fn the_names_of_kernels_are_in_snake_case() {
    let snake = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    for kernel in KERNELS {
        assert!(
            kernel.name.chars().all(snake),
            "`{}` is not a snake_case kernel name",
            kernel.name
        );
    }
}

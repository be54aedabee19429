//! Predicts what a GPU will do with a case, without a GPU.
//!
//! The prediction is a model, not a fit. A GEMM in bf16 costs what its machine code does on the schedulers of the busiest
//! multiprocessor ([`tiles`]), or its traffic at 0.85 of the copy rate, whichever is longer; without machine code, what its tile
//! table estimates (`ops/gemm/tiles.rs`). Tensor-core work outside that table runs at 0.45 of the GEMM rate (what an L2 cache of
//! 5.5 TB/s feeds its panels). Every other kernel costs its own traffic at 0.85 of the copy rate or its operations at 0.6 of the
//! f32 lanes, whichever is longer; a grid smaller than the chip gets its share of both. Each launch costs 2 microseconds. The
//! difference between a measurement and the prediction shows where a kernel is not understood yet.

use super::{Case, Chip, Launched};
use crate::device::cuda::{Mix, RESOURCES, Resources};
use crate::ops::kernels::{Gemm, GemmKind};

/// Shares of the ceilings that plain loops and mma loops are expected to reach, and seconds per launch.
const OF_COPY: f64 = 0.85;
const OF_LANES: f64 = 0.6;
const OF_GEMM: f64 = 0.45;
const LAUNCH: f64 = 2e-6;

/// The plan of one kernel launch.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Its name.
    pub kernel: String,
    /// The tile, such as `128x128x32, 3 stages`; empty if the kernel is not in the GEMM tile table.
    pub tile: String,
    /// Blocks in the grid.
    pub blocks: usize,
    /// Waves: blocks over the number that the chip holds at once.
    pub waves: f64,
    /// Registers per thread and bytes of shared memory per block; `None` in a build without nvcc.
    pub resources: Option<Resources>,
    /// Blocks that a multiprocessor holds at once; 2 in a build without nvcc.
    pub held: usize,
    /// Warps on a multiprocessor, as a share of the 64 that it can hold.
    pub occupancy: f64,
    /// Predicted seconds.
    pub seconds: f64,
}

/// The plan of a case on a chip.
#[derive(Clone, Debug)]
pub struct LaunchPlan {
    /// Seconds at the chip's ceilings.
    pub roofline: f64,
    /// Whether memory, not compute, sets the roofline.
    pub memory: bool,
    /// Predicted seconds of all kernels together.
    pub seconds: f64,
    /// The kernels in the order of their launches.
    pub kernels: Vec<Planned>,
}

/// Predicts a case on a chip. `sm` is the compiled architecture, `sm_90a` or `sm_80`.
pub fn plan(case: &Case, chip: &Chip, sm: &str) -> LaunchPlan {
    let kernels: Vec<Planned> = case.launched.iter().map(|l| planned(l, chip, sm)).collect();
    LaunchPlan {
        roofline: case.work.roofline(chip, case.unit),
        memory: case.work.is_bound_by_memory(chip, case.unit),
        seconds: kernels.iter().map(|kernel| kernel.seconds).sum(),
        kernels,
    }
}

fn planned(launched: &Launched, chip: &Chip, sm: &str) -> Planned {
    // What the launch gives of a tile comes on top of what the assembler has counted.
    let dynamic = launched.gemm.map_or(0, |gemm| gemm.tile().dynamic_shared());
    let resources = RESOURCES.iter().find(|r| r.kernel == launched.kernel && r.chip == sm);
    let resources = resources.map(|r| Resources { shared: r.shared + dynamic, ..*r });
    let held = resources.map_or(2, |r| chip.blocks(launched.threads, r.registers, r.shared).max(1));
    // A loop that fills the chip has at most 8 blocks per multiprocessor.
    let blocks = match launched.blocks {
        0 => 8 * chip.processors,
        blocks => blocks,
    };
    let filled = (blocks as f64 / chip.processors as f64).min(1.0);
    let memory = launched.bytes / (OF_COPY * chip.copy * filled);
    let compute = match &launched.gemm {
        // In f32 nothing runs on tensor cores.
        Some(gemm) if !launched.kernel.contains("f32") => match resources.and_then(|r| r.mix) {
            Some(mix) => tiles(gemm, &mix, held, chip, has_moments(gemm)) / chip.clock,
            // The tile table's estimate is for a chip of 132 multiprocessors.
            None => gemm.cycles(&gemm.tile()) / chip.clock * 132.0 / chip.processors as f64,
        },
        // The mma and the exponentials of different blocks overlap.
        _ => (launched.operations / (OF_LANES * chip.vector * filled))
            .max(launched.mma / (OF_GEMM * chip.gemm * filled)),
    };
    let tile = launched.gemm.map_or(String::new(), |gemm| {
        let tile = gemm.tile();
        let splits =
            if tile.splits > 1 { format!(", {} splits", tile.splits) } else { String::new() };
        format!("{}x{}x{}, {} stages{splits}", tile.m, tile.n, tile.depth, tile.stages)
    });
    Planned {
        kernel: launched.kernel.clone(),
        tile,
        blocks,
        held,
        waves: blocks as f64 / (held * chip.processors) as f64,
        resources,
        occupancy: (held.min(blocks.div_ceil(chip.processors)) * launched.threads.div_ceil(32))
            as f64
            / 64.0,
        seconds: memory.max(compute) + LAUNCH,
    }
}

/// Whether the plan charges a tile the moments that a batch norm wants: forward; gradients that add to nothing are charged none.
fn has_moments(gemm: &Gemm) -> bool {
    matches!(gemm.kind, GemmKind::Nt | GemmKind::Convolution)
}

/// Cycles of the first instructions of a tile until its first copies have arrived.
const FIRST_COPIES: f64 = 800.0;

/// Cycles that a multiprocessor needs for its share of a GEMM's tiles, `held` at a time, by the model of the machine code
/// (`sass/scoreboard.rs` of `cuda-kernels-build`): prologue, main loop and epilogue one after another, each as long as for that many
/// resident blocks in the same phase. In truth blocks drift apart, and one's epilogue runs beside another's main loop; how much that gains is what the rate
/// of a large GEMM at small and at large k will say.
fn tiles(gemm: &Gemm, mix: &Mix, held: usize, chip: &Chip, moments: bool) -> f64 {
    let tile = gemm.tile();
    let held = held.min(mix.hot_cycles.len());
    let which = usize::from(moments);
    // Blocks of the busiest multiprocessor.
    let blocks = (tile.tiles * tile.splits).div_ceil(chip.processors);
    let side_by_side = |blocks: usize| {
        let Some(i) = blocks.checked_sub(1) else { return 0.0 };
        let main_loop = gemm.steps(&tile) * f64::from(mix.hot_cycles[i]);
        // Splits are f32: twice the stores and the shared memory of bf16.
        let bytes_of_result = if tile.splits > 1 { 4.0 } else { 2.0 };
        // For each store of a thread, its 16 bytes or 32 of shared memory are written before.
        let stores = (tile.m * tile.n) as f64 / 128.0 * bytes_of_result / 16.0;
        let staging = blocks as f64 * 16.0;
        let store = match mix.epilogues[which].stores_16 {
            // The small tile's rows have no loop; its code is as long as that of the others.
            0 => staging,
            of_loop => f64::from(mix.epilogue_cycles[which][i]) / of_loop as f64,
        };
        let prologue = (blocks * mix.prologue) as f64 + FIRST_COPIES;
        prologue + main_loop + stores * (staging + store)
    };
    (blocks / held) as f64 * side_by_side(held) + side_by_side(blocks % held)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Extent, cases};
    use crate::tensor::DType;

    /// Prefixes of the names of kernels that no case launches, each with the reason.
    const WITHOUT_CASE: [(&str, &str); 25] = [
        ("augment_channels", "images that are not RGB of 8 bits"),
        ("avg_pool", "shortcuts of ResNet-D"),
        ("batch_norm_inv_std", "evaluation"),
        ("batch_norm_merge", "only behind the moments of a convolution"),
        ("cast", "once a step, a few activations"),
        ("column_sums", "gradients of biases"),
        ("conform_", "checks of the driver"),
        ("conv2d", "tiles of odd sizes"),
        ("cross_entropy", "a few classes a row"),
        ("fill", "a scalar, or as cheap as a memset"),
        ("gather_rows", "a shuffled batch"),
        ("matmul", "tiles of odd sizes"),
        ("mul_", "as fast as addition, which has a case"),
        ("normalize_rows", "prototypes, once a step"),
        ("nt_xent_sums_online", "temperatures below 0.025"),
        ("push_rows", "a queue's new rows"),
        ("relu", "batch norm has its own"),
        ("scale", "scalars"),
        ("scatter_rows", "the gradient of a shuffled batch"),
        ("square", "as fast as addition, which has a case"),
        ("stream_", "selective kernels"),
        ("sum_", "matrices of a loss, small next to its GEMM"),
        ("transpose", "matrices of a loss, small next to its GEMM"),
        ("write_rows", "a queue's new rows"),
        ("split_k_reduce", "bf16: none of the cases reduces splits in it"),
    ];

    /// The table by which a convolution's epilogue computes the moments of the batch norm behind it: for every layer of ResNet-50 it
    /// costs less than the pass over the output that it saves, by a quarter of that at least. If a layer is not, it must be left out.
    #[test]
    #[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
    fn moments_cost_less_than_the_pass_that_they_save() {
        let chip = Chip::known("H200").unwrap();
        let mut count = 0;
        for views in [32, 256] {
            let extent = Extent { views, ..Extent::GPU };
            for case in cases(&extent, DType::Bf16, "conv2d forward") {
                let launched = &case.launched[0];
                let (gemm, name) = (launched.gemm.unwrap(), &launched.kernel);
                let resources = RESOURCES.iter().find(|r| r.kernel == name && r.chip == "sm_90a");
                let resources = resources.unwrap();
                let mix = resources.mix.unwrap();
                let shared = resources.shared + gemm.tile().dynamic_shared();
                let held = chip.blocks(launched.threads, resources.registers, shared);
                let outputs = (gemm.m * gemm.n) as f64;
                let partial = 8.0 * outputs / gemm.tile().m as f64;
                let seconds = |moments: bool| {
                    let bytes = launched.bytes + if moments { partial } else { 0.0 };
                    let cycles = tiles(&gemm, &mix, held, &chip, moments);
                    (bytes / (OF_COPY * chip.copy)).max(cycles / chip.clock)
                };
                let cost = seconds(true) - seconds(false);
                let saved = 2.0 * outputs / (OF_COPY * chip.copy) + LAUNCH;
                let [cost, saved] = [cost, saved].map(|seconds| seconds * 1e6);
                println!("{:48} moments cost {cost:5.1} us and save {saved:5.1}", case.name);
                assert!(cost < 0.75 * saved, "{}: {cost} us to save {saved}", case.name);
                count += 1;
            }
        }
        assert_eq!(count, 2 * 23, "23 distinct layers");
    }

    #[test]
    #[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
    fn every_kernel_has_a_case_and_every_launched_kernel_exists() {
        let mut launched = std::collections::BTreeSet::new();
        for dtype in [DType::Bf16, DType::F32] {
            for case in cases(&Extent::GPU, dtype, "") {
                let chip = Chip::known("H200").unwrap();
                let plan = plan(&case, &chip, "sm_90a");
                assert!(
                    plan.roofline > 0.0 && plan.seconds > plan.roofline,
                    "{}: {plan:?}",
                    case.name
                );
                let bytes: f64 = case.launched.iter().map(|l| l.bytes).sum();
                assert!(
                    bytes >= 0.99 * case.work.bytes,
                    "{}: moves fewer bytes than its work",
                    case.name
                );
                launched.extend(case.launched.into_iter().map(|l| l.kernel));
            }
        }
        for kernel in &launched {
            assert!(RESOURCES.iter().any(|r| r.kernel == *kernel), "unknown kernel {kernel}");
        }
        let excused =
            |kernel: &str| WITHOUT_CASE.iter().any(|(prefix, _)| kernel.starts_with(prefix));
        let missing: Vec<&str> = RESOURCES
            .iter()
            .map(|r| r.kernel)
            .filter(|kernel| !launched.contains(*kernel) && !excused(kernel))
            .collect();
        assert!(missing.is_empty(), "no case launches {missing:?}");
    }
}

//! What a GPU will do with a case, on paper.
//!
//! The prediction is a model, not a fit: a product costs what the tile table estimates (`ops/tiles.rs`: the shared memory that
//! its tiles move, whole waves, the 0.63 of the peak that `mma.sync` reaches on Hopper), or 0.45 of the product rate where it is none of
//! that table (what a cache of 5.5 TB/s feeds its panels); everything else costs its own traffic at
//! 0.85 of a copy, or its operations at 0.6 of the f32 lanes; a grid smaller than the chip gets its share of both; and each
//! launch costs 2 microseconds. What a measurement says beside it is what there is to learn.

use super::{Case, Chip, Launched};
use crate::device::cuda::{RESOURCES, Resources};
use crate::ops::kernels::Gemm;

/// Shares of the ceilings that are expected of plain loops, and seconds of a launch.
const OF_COPY: f64 = 0.85;
const OF_LANES: f64 = 0.6;
const OF_PRODUCT: f64 = 0.45;
const LAUNCH: f64 = 2e-6;

/// A kernel of a case on a chip.
#[derive(Clone, Debug)]
pub struct Planned {
    /// Its name.
    pub kernel: String,
    /// `128x128x32, 3 stages`; empty where it is no product.
    pub tile: String,
    /// Blocks, and how often the chip is filled with them.
    pub blocks: usize,
    /// Waves: blocks over what the chip holds at once.
    pub waves: f64,
    /// Registers of a thread, and bytes of shared memory of a block; none in a build without nvcc.
    pub resources: Option<&'static Resources>,
    /// Warps on a multiprocessor over the 64 that it can hold.
    pub occupancy: f64,
    /// Predicted seconds.
    pub seconds: f64,
}

/// A case on a chip.
#[derive(Clone, Debug)]
pub struct LaunchPlan {
    /// Seconds at the ceilings.
    pub floor: f64,
    /// Whether memory sets the floor.
    pub memory: bool,
    /// Predicted seconds of all kernels.
    pub seconds: f64,
    /// What is launched, in order.
    pub kernels: Vec<Planned>,
}

/// What a chip will do with a case. `sm` is the compiled architecture, `sm_90a` or `sm_80`.
pub fn plan(case: &Case, chip: &Chip, sm: &str) -> LaunchPlan {
    let kernels: Vec<Planned> = case.launched.iter().map(|l| planned(l, chip, sm)).collect();
    LaunchPlan {
        floor: case.work.floor(chip, case.unit),
        memory: case.work.is_bound_by_memory(chip, case.unit),
        seconds: kernels.iter().map(|kernel| kernel.seconds).sum(),
        kernels,
    }
}

fn planned(launched: &Launched, chip: &Chip, sm: &str) -> Planned {
    let resources = RESOURCES.iter().find(|r| r.kernel == launched.kernel && r.chip == sm);
    let held = resources.map_or(2, |r| chip.blocks(launched.threads, r.registers, r.shared).max(1));
    // A loop that fills the chip has 8 blocks a multiprocessor at most.
    let blocks = match launched.blocks {
        0 => 8 * chip.processors,
        blocks => blocks,
    };
    let alone = (blocks as f64 / chip.processors as f64).min(1.0);
    let memory = launched.bytes / (OF_COPY * chip.copy * alone);
    let arithmetic = match &launched.product {
        // In f32 nothing runs on tensor cores.
        Some(product) if !launched.kernel.contains("f32") => {
            cycles(product) / chip.clock * 132.0 / chip.processors as f64
        }
        // Products and exponentials of different blocks overlap.
        _ => (launched.operations / (OF_LANES * chip.vector * alone))
            .max(launched.products / (OF_PRODUCT * chip.product * alone)),
    };
    let tile = launched.product.map_or(String::new(), |product| {
        let tile = product.tile();
        let slices =
            if tile.splits > 1 { format!(", {} splits", tile.splits) } else { String::new() };
        format!("{}x{}x{}, {} stages{slices}", tile.m, tile.n, tile.depth, tile.stages)
    });
    Planned {
        kernel: launched.kernel.clone(),
        tile,
        blocks,
        waves: blocks as f64 / (held * chip.processors) as f64,
        resources,
        occupancy: (held.min(blocks.div_ceil(chip.processors)) * launched.threads.div_ceil(32))
            as f64
            / 64.0,
        seconds: memory.max(arithmetic) + LAUNCH,
    }
}

/// The table's estimate, for a chip of 132 multiprocessors.
fn cycles(product: &Gemm) -> f64 {
    product.cycles(&product.tile())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{Extent, cases};
    use crate::tensor::DType;

    /// Beginnings of the names of kernels that no case launches, each with the reason.
    const WITHOUT_CASE: [(&str, &str); 16] = [
        ("avg_pool", "shortcuts of ResNet-D"),
        ("batch_norm_inv_std", "evaluation"),
        ("cast", "once a step, a few activations"),
        ("column_sums", "gradients of biases"),
        ("conform_", "checks of the driver"),
        ("conv2d", "tiles of odd sizes"),
        ("cross_entropy", "a few classes a row"),
        ("fill", "a scalar, or one memset's worth"),
        ("matmul", "tiles of odd sizes"),
        ("normalize_rows", "prototypes, once a step"),
        ("nt_xent_sums_online", "temperatures below 0.025"),
        ("relu", "batch norm has its own"),
        ("scale", "scalars"),
        ("softmax", "a teacher's logits"),
        ("stream_", "selective kernels"),
        ("split_k_reduce", "bf16: none of the cases reduces splits in it"),
    ];
    /// Moves of rows: a queue's and a shuffled batch's.
    const ROWS: [&str; 4] = ["gather_rows", "scatter_rows", "push_rows", "write_rows"];

    #[test]
    #[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
    fn every_kernel_has_a_case_and_every_case_its_kernels() {
        let mut launched = std::collections::BTreeSet::new();
        for dtype in [DType::Bf16, DType::F32] {
            for case in cases(&Extent::GPU, dtype, "") {
                let chip = Chip::known("H200").unwrap();
                let plan = plan(&case, &chip, "sm_90a");
                assert!(plan.floor > 0.0 && plan.seconds > plan.floor, "{}: {plan:?}", case.name);
                let bytes: f64 = case.launched.iter().map(|l| l.bytes).sum();
                assert!(bytes >= 0.99 * case.work.bytes, "{}: moves less than it must", case.name);
                launched.extend(case.launched.into_iter().map(|l| l.kernel));
            }
        }
        for kernel in &launched {
            assert!(RESOURCES.iter().any(|r| r.kernel == *kernel), "there is no kernel {kernel}");
        }
        let excused = |kernel: &str| {
            let begins = |beginning: &str| kernel.starts_with(beginning);
            WITHOUT_CASE.iter().any(|(beginning, _)| begins(beginning))
                || ROWS.iter().any(|beginning| begins(beginning))
        };
        let unseen: Vec<&str> = RESOURCES
            .iter()
            .map(|r| r.kernel)
            .filter(|kernel| !launched.contains(*kernel) && !excused(kernel))
            .collect();
        assert!(unseen.is_empty(), "no case launches {unseen:?}");
    }
}

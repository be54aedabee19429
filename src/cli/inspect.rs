//! `inspect`: shows a recipe or a run in detail.

use std::path::Path;

use serde::Serialize;
use serde_json::json;

use super::args::Inspect;
use super::{exchanges, say, traffic};
use crate::arena::{Layout, Slot};
use crate::device::{DeviceKind, Precision};
use crate::error::Result;
use crate::recipes::{self, Recipe};
use crate::tape::NodeInfo;
use crate::train::{self, Measured, Need, Scaling, Trained, Waiting};

pub(super) fn inspect(args: &Inspect) -> Result<()> {
    let (recipe, checkpoint) = if recipes::builtin(&args.what).is_none() && is_run(&args.what) {
        let trained = Trained::open(Path::new(&args.what), &args.set)?;
        (trained.recipe, Some(trained.checkpoint))
    } else {
        (Recipe::load(&args.what, &args.set)?, None)
    };
    let method = recipe.build_method()?;
    let layout = method.layout();
    let graph = args.graph.then(|| train::measure(&recipe, train::fewest(&recipe))).transpose()?;
    let memory = args.memory.then(|| needs(&recipe, args.gpu_memory)).transpose()?;
    let traffic = args.traffic.then(|| traffic::traffic(&recipe)).transpose()?;
    let exchanges = exchanges::exchanges(&recipe, args, method.views())?;
    let scaling =
        args.scaling.map(|threads| train::scaling(&recipe, threads.into())).transpose()?;
    if args.json {
        let slots = layout.params().iter().chain(layout.stats()).map(slot_record);
        let nodes = graph.as_ref().map(|graph| {
            json!({
                "images": graph.images,
                "nodes": graph.nodes.iter().map(node_record).collect::<Vec<_>>(),
            })
        });
        let report = json!({
            "recipe": recipe,
            "checkpoint": checkpoint,
            "views": method.views(),
            "learning_rate": peak(&recipe),
            "weights": layout.weights(),
            "slots": slots.collect::<Vec<_>>(),
            "graph": nodes,
            "memory": memory,
            "scaling": scaling,
            "traffic": traffic,
            "exchanges": exchanges,
        });
        return say(&report.to_string());
    }
    say(recipe.to_toml().trim_end())?;
    say("")?;
    if let Some(checkpoint) = checkpoint {
        say(&format!("checkpoint: {}", checkpoint.display()))?;
    }
    say(&format!("views per image: {}", method.views()))?;
    say(&format!(
        "learning rate: {} by the {:?} rule at batch {} = {:.6}",
        recipe.optim.lr,
        recipe.optim.lr_rule,
        recipe.train.batch,
        peak(&recipe),
    ))?;
    print_slots(layout)?;
    graph.iter().try_for_each(print_graph)?;
    memory.iter().try_for_each(|needs| print_memory(needs, &recipe))?;
    scaling.iter().try_for_each(print_scaling)?;
    traffic.iter().try_for_each(traffic::print)?;
    exchanges.iter().try_for_each(exchanges::print)
}

/// Whether a name means a run's folder or a checkpoint rather than a recipe.
fn is_run(name: &str) -> bool {
    let path = Path::new(name);
    path.is_dir() || path.extension().is_some_and(|extension| extension == "safetensors")
}

fn peak(recipe: &Recipe) -> f64 {
    recipe.optim.lr_rule.apply(recipe.optim.lr, recipe.train.batch)
}

fn print_slots(layout: &Layout) -> Result<()> {
    say(&format!("weights: {}", layout.weights()))?;
    let line = |slot: &Slot| {
        format!("  {:44} {:14} {:?}", slot.name, format!("{:?}", slot.kind), &*slot.shape)
    };
    say(&format!("parameters: {}", layout.params().len()))?;
    layout.params().iter().try_for_each(|slot| say(&line(slot)))?;
    say(&format!("running statistics: {}", layout.stats().len()))?;
    layout.stats().iter().try_for_each(|slot| say(&line(slot)))
}

fn print_graph(graph: &Measured) -> Result<()> {
    let bytes: usize = graph.nodes.iter().map(|node| node.bytes).sum();
    let count = graph.nodes.len();
    say(&format!("graph of {} images: {count} nodes, {}", graph.images, size(bytes)))?;
    let line = |node: &NodeInfo| {
        format!("  {:20} {:26} {}", node.name, format!("{:?}", &*node.shape), size(node.bytes))
    };
    graph.nodes.iter().try_for_each(|node| say(&line(node)))
}

/// What the recipe's batch needs, and what it would need with recompute switched the other way.
#[derive(Debug, Serialize)]
struct Needs {
    precision: Precision,
    /// What the recipe says of recompute.
    recompute: bool,
    plain: Need,
    recomputed: Need,
    /// The largest batches that fit the GPU that was asked about.
    #[serde(skip_serializing_if = "Option::is_none")]
    largest: Option<Largest>,
}

#[derive(Debug, Serialize)]
struct Largest {
    gpu: usize,
    plain: usize,
    recomputed: usize,
}

fn needs(recipe: &Recipe, gpu: Option<usize>) -> Result<Needs> {
    let mut recipe = recipe.clone();
    let recompute = recipe.train.recompute;
    let kind = if gpu.is_some() { DeviceKind::Cuda } else { DeviceKind::Cpu };
    let precision = recipe.train.precision_on(kind)?;
    let mut need = |recompute| {
        recipe.train.recompute = recompute;
        train::memory(&recipe, precision)
    };
    let (plain, recomputed) = (need(false)?, need(true)?);
    let groups = recipe.network.norm_groups;
    let largest = gpu.map(|gpu| Largest {
        gpu,
        plain: plain.largest_batch(gpu, groups),
        recomputed: recomputed.largest_batch(gpu, groups),
    });
    Ok(Needs { precision, recompute, plain, recomputed, largest })
}

fn print_memory(needs: &Needs, recipe: &Recipe) -> Result<()> {
    let Needs { precision, .. } = needs;
    let half = if *precision == Precision::F32 { ", half as much in bf16" } else { "" };
    let of = |need: &Need| {
        format!(
            "{} for weights, gradients, momentum and state, {} per image ({} of it saved for the backward pass{half}), {} at batch {}, for which {} are reserved on this processor with freed blocks that no request has the size of",
            size(need.fixed),
            size(need.per_image),
            size(need.saved_per_image),
            size(need.in_all),
            recipe.train.batch,
            size(need.reserved),
        )
    };
    let mark = |is: bool| if needs.recompute == is { " (as the recipe says)" } else { "" };
    say(&format!("memory in {precision}{}: {}", mark(false), of(&needs.plain)))?;
    say(&format!(
        "memory in {precision} with train.recompute=true{}: {}",
        mark(true),
        of(&needs.recomputed)
    ))?;
    let Some(Largest { gpu, plain, recomputed }) = needs.largest else { return Ok(()) };
    say(&format!(
        "largest batch of a GPU with {}, {} of it for context, kernels and buffers and an eighth of the rest for the free list: {plain}, with train.recompute=true {recomputed}; images that lie on the GPU come on top",
        size(gpu),
        size(train::BESIDE_TENSORS),
    ))
}

/// Waits below this share of the threads' time are not listed.
const LISTED: f64 = 0.005;

fn print_scaling(scaling: &Scaling) -> Result<()> {
    let Scaling { images, seconds, efficiency, threads, waits } = scaling;
    say(&format!(
        "a step of {images} images, {seconds:.2} s on one thread, by how it is cut into tasks (caches, memory and the waking of threads not counted):"
    ))?;
    let shares: Vec<String> = efficiency
        .iter()
        .map(|(threads, share)| {
            format!("{threads} threads work {:.0}% of their time", 100.0 * share)
        })
        .collect();
    say(&format!("  {}", shares.join(", ")))?;
    say(&format!("where {threads} threads wait:"))?;
    for Waiting { place, is_serial, share } in waits.iter().filter(|wait| wait.share > LISTED) {
        let why = if *is_serial { "one thread works before it" } else { "few or uneven tasks" };
        say(&format!("  {:5.1}%  {place}: {why}", 100.0 * share))?;
    }
    Ok(())
}

fn slot_record(slot: &Slot) -> serde_json::Value {
    json!({ "name": slot.name, "kind": format!("{:?}", slot.kind), "shape": &*slot.shape })
}

fn node_record(node: &NodeInfo) -> serde_json::Value {
    json!({ "name": node.name, "shape": &*node.shape, "bytes": node.bytes })
}

pub(super) fn size(bytes: usize) -> String {
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..1_048_576 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        10_737_418_240.. => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
        _ => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
    }
}

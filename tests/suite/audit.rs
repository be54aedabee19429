//! bf16 on a CPU and on a GPU, layer by layer: a small ResNet against the f64 reference. Each layer runs on the reference's
//! inputs rounded to bf16 and must meet a tolerance. The test also prints the errors of a network that runs in bf16 throughout:
//! its gradients differ by tens of percent, because ReLUs near zero decide differently, so such runs are judged by what they
//! learn.

use std::collections::BTreeMap;
use std::sync::Arc;

use selfsup::arena::{Layout, SlotKind};
use selfsup::device::{Device, Precision};
use selfsup::nn::{ConvBn, ResNet, ResNetConfig, Stem};
use selfsup::ops::{self, BatchNorm};
use selfsup::tape::{self, Var};
use selfsup::tensor::{Shape, Tensor};

use crate::case::{Build, Case, Input, Route, dot};
use crate::compare::{close, norm, ratio, report};
use crate::driver::gpu;
use crate::network;
use crate::seeded;

/// Seed of weights and images.
const LINE: &str = "audit";
const WIDTH: usize = 8;
const IMAGES: [usize; 3] = [4, 16, 16];

/// A convolution with its batch norm, and the indices of its inputs: 0 is the images, `i` the output of unit `i - 1`.
struct Unit {
    name: String,
    norm: String,
    layer: ConvBn,
    stride: usize,
    pad: usize,
    from: usize,
    residual: Option<usize>,
    relu: bool,
}

/// The units of a ResNet-18 for small images, in order.
fn units(layout: &mut Layout) -> Vec<Unit> {
    let mut units = Vec::new();
    let mut add = |names: [String; 2], [c, k, size, stride]: [usize; 4], from, residual, relu| {
        let [name, norm] = names;
        let layer = ConvBn::new(layout, (&name, &norm), c, k, size, stride, 1.0, 1);
        units.push(Unit { name, norm, layer, stride, pad: size / 2, from, residual, relu });
        units.len()
    };
    let names = |block: &str, i: usize| [format!("{block}conv{i}"), format!("{block}bn{i}")];
    let mut x = add(names("", 1), [3, WIDTH, 3, 1], 0, None, true);
    let mut c = WIDTH;
    for (stage, block) in (0..4).flat_map(|stage| [(stage, 0), (stage, 1)]) {
        let (k, stride) = (WIDTH << stage, if stage > 0 && block == 0 { 2 } else { 1 });
        let block = format!("layer{}.{block}.", stage + 1);
        let projection = [0, 1].map(|i| format!("{block}downsample.{i}"));
        let shortcut = if c == k { x } else { add(projection, [c, k, 1, stride], x, None, false) };
        let inner = add(names(&block, 1), [c, k, 3, stride], x, None, true);
        x = add(names(&block, 2), [k, k, 3, 1], inner, Some(shortcut), true);
        c = k;
    }
    units
}

/// The results of one run of the network.
struct Run {
    /// The images and the output of each unit.
    values: Vec<(Shape, Vec<f64>)>,
    features: Vec<f64>,
    gradients: BTreeMap<String, Vec<f64>>,
}

fn run(units: &[Unit], layout: &Arc<Layout>, device: &Device) -> Run {
    let mut arena = network::seeded_arena(layout, device, LINE);
    let images = network::images(device, LINE, IMAGES);
    let (mut values, mut features) = (Vec::new(), Vec::new());
    let loss = tape::step(&mut arena, |tape| {
        let mut vars = vec![tape.input(&images)];
        for unit in units {
            let residual = unit.residual.map(|i| &vars[i]);
            vars.push(unit.layer.forward(&vars[unit.from], residual, unit.relu));
        }
        let y = ops::mean_pool(vars.last().unwrap());
        values.extend(vars.iter().map(|v| (*v.shape(), v.value().to_f64())));
        features = y.value().to_f64();
        dot(&y, &seeded::unit(seeded::seed(LINE), features.len()))
    });
    loss.unwrap();
    Run { values, features, gradients: network::gradients(&arena) }
}

#[test]
fn the_audited_units_make_up_a_resnet() {
    let (mut spread, mut layout) = (Layout::new(), Layout::new());
    let units = units(&mut spread);
    let want = run(&units, &Arc::new(spread), &Device::reference());
    let config = ResNetConfig {
        depth: 18,
        width: WIDTH,
        stem: Stem::Small,
        zero_init_residual: false,
        norm_groups: 1,
        sk_ratio: 0.0,
        bottleneck: 1,
        project: false,
        same_pool: false,
        channels: 3,
    };
    let backbone = ResNet::new(&mut layout, "", &config);
    let reference = Device::reference();
    let mut arena = network::seeded_arena(&Arc::new(layout), &reference, LINE);
    let images = network::images(&reference, LINE, IMAGES);
    let mut features = Vec::new();
    let loss = tape::step(&mut arena, |tape| {
        let y = backbone.forward(&tape.input(&images));
        features = y.value().to_f64();
        dot(&y, &seeded::unit(seeded::seed(LINE), features.len()))
    });
    loss.unwrap();
    assert_eq!(features, want.features);
    assert_eq!(network::gradients(&arena), want.gradients);
}

impl Unit {
    /// The unit as a separate case, on its inputs in `run`, with or without its ReLU.
    fn case(&self, run: &Run, layout: &Arc<Layout>, relu: bool) -> Case {
        let arena = network::seeded_arena(layout, &Device::reference(), LINE);
        let input = |name, kind, (shape, values): (Shape, Vec<f64>)| Input {
            name,
            shape: shape.to_vec(),
            kind,
            values,
            step: 0.0,
        };
        let slot = |name: &str| {
            let slot = layout.params().iter().find(|slot| slot.name == name).unwrap();
            (slot.shape, arena.slot_values(slot))
        };
        let mut inputs = vec![
            input("x", SlotKind::Matrix, run.values[self.from].clone()),
            input("w", SlotKind::Matrix, slot(&format!("{}.weight", self.name))),
            input("gain", SlotKind::Gain, slot(&format!("{}.weight", self.norm))),
            input("shift", SlotKind::Shift, slot(&format!("{}.bias", self.norm))),
        ];
        if let Some(i) = self.residual {
            inputs.push(input("residual", SlotKind::Matrix, run.values[i].clone()));
        }
        let (stride, pad) = (self.stride, self.pad);
        let build: Build = Box::new(move |_, v| {
            let y = ops::conv2d(&v[0], &v[1], stride, pad);
            let (gain, shift, residual) = (Some(&v[2]), Some(&v[3]), v.get(4));
            let with = BatchNorm { gain, shift, residual, relu, ..BatchNorm::default() };
            ops::batch_norm(&y, with)
        });
        Case { name: self.name.clone(), inputs, loose: 1.0, rounded: false, build }.rounded()
    }
}

/// Blocks the gradient of outputs whose ReLU input lies within `NEAR` of its kink, where rounding decides the sign.
fn off_kinks<'t>(y: Var<'t>, before: &[f64]) -> Var<'t> {
    /// Relative to the root mean square. bf16 rounds to 2^-9, and a unit combines three rounded numbers.
    const NEAR: f64 = 1.0 / 32.0;
    let near = NEAR * norm(before) / (before.len() as f64).sqrt();
    let keep: Vec<bool> = before.iter().map(|z| z.abs() > near).collect();
    let (id, shape) = (y.id(), *y.shape());
    y.tape().record("off kinks", y.value().clone(), &[&y], move |dy, gradients| {
        let kept = |(dy, keep): (f64, &bool)| if *keep { dy } else { 0.0 };
        let dy_kept: Vec<f64> = dy.to_f64().into_iter().zip(&keep).map(kept).collect();
        gradients.add(id, Tensor::from_f64(dy.device(), shape, &dy_kept));
    })
}

/// The relative error of a free-running result.
pub fn drift(got: &[f64], want: &[f64]) -> f64 {
    assert!(got.iter().all(|v| v.is_finite()), "a number is not finite");
    let difference: Vec<f64> = got.iter().zip(want).map(|(g, w)| g - w).collect();
    ratio(norm(&difference), norm(want))
}

#[test]
fn every_layer_on_the_cpu_in_bf16_agrees_with_the_f64_reference_to_bf16_rounding() {
    audit(&Device::cpu(2).unwrap().with_precision(Precision::Bf16).unwrap().poisoned());
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn every_layer_in_bf16_agrees_with_the_f64_reference_to_bf16_rounding() {
    audit(&gpu(Precision::Bf16));
}

fn audit(device: &Device) {
    /// Gradients of a unit could need three times this, where rounding flips its ReLU; in this test no ReLU flips.
    const TOLERANCE: f64 = 1e-2;
    let reference = Device::reference();
    let mut layout = Layout::new();
    let units = units(&mut layout);
    let layout = Arc::new(layout);
    let (want, drifted) = (run(&units, &layout, &reference), run(&units, &layout, device));
    device.check().unwrap();

    println!("relative errors in bf16 of each layer alone | of the free-running network");
    let parts = ["y", "dx", "dw", "dgain", "dshift", "dresidual"].map(|p| format!("{p:>10}"));
    println!("{:22}{} |{:>9}{:>9}{:>12}", "layer", parts.concat(), "y", "dw", "ReLUs other");
    let (mut results, mut depths) = (Vec::new(), vec![0]);
    for (unit, (of_y, right_y)) in units.iter().zip(drifted.values.iter().zip(&want.values).skip(1))
    {
        let before = unit.case(&want, &layout, false).run(&reference, Route::Param).output;
        let case = unit.case(&want, &layout, unit.relu);
        let run_on = |device, route| {
            case.run_with(device, route, &|y| if unit.relu { off_kinks(y, &before) } else { y })
        };
        let (right, got) = (run_on(&reference, Route::Param), run_on(device, Route::Node));
        let mut line = format!("{:22}", unit.name);
        for ((part, got), (_, right)) in got.parts(&case).zip(right.parts(&case)) {
            results.push(close(&format!("{}|{part}", unit.name), got, right, TOLERANCE));
            line += &format!("{:10.1e}", drift(got, right));
        }
        // Errors of layers are independent: they add up as the square root of the number of layers.
        depths.push(1 + depths[unit.from].max(unit.residual.map_or(0, |i| depths[i])));
        let depth = f64::from(*depths.last().unwrap());
        let name = format!("{}|y of the network", unit.name);
        results.push(close(&name, &of_y.1, &right_y.1, TOLERANCE * depth.sqrt()));
        let weights = format!("{}.weight", unit.name);
        let of_dw = drift(&drifted.gradients[&weights], &want.gradients[&weights]);
        let others = of_y.1.iter().zip(&right_y.1).filter(|(a, b)| (**a > 0.0) != (**b > 0.0));
        let others = if unit.relu { others.count() as f64 / of_y.1.len() as f64 } else { 0.0 };
        let of_y = drift(&of_y.1, &right_y.1);
        println!("{line:82} |{of_y:9.1e}{of_dw:9.1e}{:11.2}%", 100.0 * others);
    }
    println!("{:82} |{:9.1e}", "features", drift(&drifted.features, &want.features));
    device.check().unwrap();
    report(&format!("{device}, layer by layer"), results);
}

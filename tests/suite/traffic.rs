//! What `inspect --traffic` says of a step is what its kernels move: as the stand-in driver counts it access by access, and as the
//! arithmetic of ResNet-50 has it.

use selfsup::device::{Device, KernelTraffic, Precision};
use selfsup::recipes::Recipe;
use selfsup::train;

use crate::case::ROUTES;
use crate::cases::{HOST_ONLY, table};
use crate::driver::{StandIn, alone};
use crate::program::{selfsup, text};

/// Not kernels: the driver's own work.
const OF_THE_DRIVER: [&str; 3] = ["copy", "copy from the host", "memset"];

/// A kernel's launches, bytes read and bytes written, as its launch lines say and as the driver counts.
struct Both {
    kernel: &'static str,
    said: [u64; 3],
    counted: [u64; 3],
}

impl Both {
    fn agree(&self) -> bool {
        let Self { kernel, said, counted } = self;
        // The host does not know which indices are equal: fewer rows may be read.
        let repeats = kernel.starts_with("gather_rows") && counted[1] < said[1];
        if repeats { [0, 2].iter().all(|&i| said[i] == counted[i]) } else { said == counted }
    }
}

/// Runs `work` on a stand-in GPU; returns the kernels that do not move what their launch lines say, and the number of all.
fn differences(driver: &StandIn, device: &Device, work: impl FnOnce()) -> (Vec<String>, usize) {
    let ways = ["kernel", "read", "written"];
    let count = |kernel: &str| ways.map(|way| driver.count(&format!("{way}:{kernel}")));
    device.wait();
    driver.reset();
    let ((), said) = device.count_traffic(work);
    device.wait();
    device.check().unwrap_or_else(|e| panic!("{e}\n{}", driver.report()));
    let kernels: Vec<KernelTraffic> =
        said.into_iter().filter(|k| !OF_THE_DRIVER.contains(&k.kernel)).collect();
    let both = |k: &KernelTraffic| Both {
        kernel: k.kernel,
        said: [k.launches, k.read, k.written],
        counted: count(k.kernel),
    };
    let differ = kernels.iter().map(both).filter(|both| !both.agree());
    let said = |Both { kernel, said, counted }| format!("{kernel}: {said:?}, counted {counted:?}");
    (differ.map(said).collect(), kernels.len())
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn every_primitive_moves_what_its_launches_say() {
    alone("traffic::every_primitive_moves_what_its_launches_say", |driver| {
        let (mut wrong, mut kernels) = (Vec::new(), 0);
        for precision in [Precision::F32, Precision::Bf16] {
            let device = Device::cuda(0, precision).unwrap();
            // Both precisions share their launch lines: in f32 one route is enough.
            let routes = if precision == Precision::Bf16 { &ROUTES[..] } else { &ROUTES[..1] };
            for case in table().iter().filter(|case| !HOST_ONLY.contains(&case.primitive())) {
                for &route in routes {
                    let work = || drop(case.run(&device, route));
                    let (differ, count) = differences(driver, &device, work);
                    kernels += count;
                    let named = |what| format!("{} {route:?} {what}", case.name);
                    wrong.extend(differ.into_iter().map(named));
                }
            }
        }
        println!(
            "kernels of primitives that move what is said: {} of {kernels}",
            kernels - wrong.len()
        );
        assert!(wrong.is_empty() && kernels > 1000, "{kernels}: {}", wrong.join("\n"));
    });
}

/// A recipe with small images and a narrow network.
fn small(name: &str) -> Recipe {
    let small = ["network.width=2", "augment.size=8", "train.batch=8", "train.threads=1"];
    Recipe::load(name, &small.map(str::to_owned)).unwrap()
}

/// MoCo v1 is MoCo v2 without its head's hidden layer.
const METHODS: [&str; 7] = [
    "simclr-cifar10-small",
    "simclr-v2-cifar10-small",
    "moco-v2-cifar10-small",
    "supervised-cifar10-small",
    "swav-cifar10-small",
    "byol-cifar10-small",
    "simsiam-cifar10-small",
];

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn every_method_moves_what_its_launches_say() {
    alone("traffic::every_method_moves_what_its_launches_say", |driver| {
        let mut wrong = Vec::new();
        for precision in [Precision::F32, Precision::Bf16] {
            // In f32 the kernels of the losses and of the optimisers are the same.
            let methods = if precision == Precision::Bf16 { &METHODS[..] } else { &METHODS[..1] };
            for &name in methods {
                let recipe = small(name);
                let device = Device::cuda(0, precision).unwrap();
                let work = || drop(train::measure_on(&recipe, 8, &device).unwrap());
                let (differ, count) = differences(driver, &device, work);
                assert!(count > 20, "{name}: {count} kernels");
                wrong.extend(differ.into_iter().map(|both| format!("{name} {precision}: {both}")));
                // The same step on a GPU that does not exist.
                let real = train::traffic_on(&recipe, 8, &device).unwrap();
                let imagined = train::traffic(&recipe, precision).unwrap();
                assert_eq!(real.kernels, imagined.kernels, "{name} in {precision}");
                assert_eq!((imagined.images, imagined.bytes()), (8, real.bytes()));
            }
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    });
}

/// A convolution of ResNet-50 and the batch norm behind it.
struct Layer {
    /// Side of the input, channels, filters, side of a filter, stride.
    sizes: [u64; 5],
    /// The shortcut is added behind the batch norm.
    joins: bool,
    /// Its data gradient is added to another one: of an identity shortcut, or of the block's first convolution.
    adds: bool,
}

/// The layers behind the stem.
fn resnet_50() -> Vec<Layer> {
    let mut layers = Vec::new();
    let mut channels = 64;
    for (stage, (side, blocks)) in [(56, 3), (28, 4), (14, 6), (7, 3)].into_iter().enumerate() {
        let (inner, outer) = (64 << stage, 256 << stage);
        for block in 0..blocks {
            let stride = if block == 0 && stage > 0 { 2 } else { 1 };
            let before = side * stride;
            let layer = |sizes, joins, adds| Layer { sizes, joins, adds };
            layers.push(layer([before, channels, inner, 1, 1], false, block > 0));
            layers.push(layer([before, inner, inner, 3, stride], false, false));
            layers.push(layer([side, inner, outer, 1, 1], true, false));
            if block == 0 {
                layers.push(layer([before, channels, outer, 1, stride], false, true));
            }
            channels = outer;
        }
    }
    assert_eq!(layers.len(), 52);
    layers
}

/// The tensors that each pass over ResNet-50 at 224 pixels reads and writes, two bytes an element, by arithmetic alone; `head` adds
/// less than a thousandth.
#[test]
fn a_step_of_resnet_50_moves_what_arithmetic_says() {
    const VIEWS: u64 = 512;
    let recipe = Recipe::load("simclr-imagenet", &["train.batch=256".to_owned()]).unwrap();
    let moved = train::traffic(&recipe, Precision::Bf16).unwrap();
    assert_eq!((moved.images, moved.views), (256, 512));
    let [mut forward, mut data, mut weights, mut norm] = [0; 4];
    for Layer { sizes: [side, c, k, filter, stride], joins, adds } in resnet_50() {
        let out = (side / stride).pow(2) * k;
        let x = side.pow(2) * c;
        // Every other pixel in both directions, if the filter is smaller than the stride.
        let reached = if filter < stride { x / stride.pow(2) } else { x };
        // With a batch norm's moments: two f32 for every 128 rows.
        forward += reached + out + out / 32;
        // Only what is reached is added to; without that, the rest is zero and written, too.
        data += out + if adds { 2 * reached } else { x };
        weights += reached + out;
        // x, y; dy, x twice, dx; with a shortcut it, its gradient, and y twice.
        norm += out * if joins { 11 } else { 7 };
    }
    let stem = 112 * 112 * 64;
    (forward, weights, norm) = (
        forward + 224 * 224 * 4 + stem + stem / 32,
        weights + 224 * 224 * 4 + stem,
        norm + 7 * stem,
    );
    let sum = |prefixes: &[&str], of: fn(&KernelTraffic) -> u64| -> u64 {
        let starts =
            |k: &&KernelTraffic| prefixes.iter().any(|prefix| k.kernel.starts_with(prefix));
        moved.kernels.iter().filter(starts).map(of).sum()
    };
    let all = |k: &KernelTraffic| k.read + k.written;
    let measured = [
        sum(&["conv2d_bf16", "matmul_nt"], all),
        sum(&["conv2d_data_gradient", "matmul_nn"], all),
        sum(&["conv2d_weight_gradient", "matmul_tn"], |k| k.read),
        sum(&["batch_norm_apply", "batch_norm_backward_sums", "batch_norm_backward_apply"], all),
    ];
    for (measured, elements) in measured.into_iter().zip([forward, data, weights, norm]) {
        let expected = 2 * VIEWS * elements;
        println!(
            "{:.1} MB a view, by arithmetic {:.1}",
            measured as f64 / 512e6,
            expected as f64 / 512e6
        );
        assert!((measured as f64 / expected as f64 - 1.0).abs() < 0.01, "{measured} {expected}");
    }
}

#[test]
fn inspect_prints_what_each_kernel_moves() {
    let folder = tempfile::tempdir().unwrap();
    let words = ["inspect", "demo", "--traffic", "--set", "train.batch=64"];
    let output = selfsup(folder.path(), &words);
    assert!(output.status.success(), "{output:?}");
    let said = text(&output.stdout);
    for part in [
        "a step of 64 images, 128 views, moves in the memory of one GPU in bf16, each byte once a launch:",
        "  batch_norm_backward_apply_bf16 ",
        "MB a view; what caches cannot hold comes on top, and making the views",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let output =
        selfsup(folder.path(), &[&words[..], &["--json", "--set", "train.precision=f32"]].concat());
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let traffic = &report["traffic"];
    let kernels = traffic["kernels"].as_array().unwrap();
    let bytes =
        |k: &serde_json::Value| k["read"].as_u64().unwrap() + k["written"].as_u64().unwrap();
    let all: u64 = kernels.iter().map(bytes).sum();
    assert_eq!(traffic["bytes"].as_u64(), Some(all));
    assert_eq!(traffic["bytes_per_view"].as_u64(), Some(all / 128));
    assert!(kernels.windows(2).all(|pair| bytes(&pair[0]) >= bytes(&pair[1])));
    assert!(kernels.iter().any(|k| k["kernel"] == "batch_norm_apply_f32"), "{kernels:?}");
    // A loss without CUDA kernels.
    let set = ["--set", "method.loss=nt-logistic"];
    let output = selfsup(folder.path(), &[&words[..], &set].concat());
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(said.contains("has no CUDA kernels: a step of it moves nothing on a GPU"), "{said}");
}

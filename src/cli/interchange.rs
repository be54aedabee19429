//! `export` and `embed`: weights and features for other programs, and weights from them.

use std::path::Path;
use std::sync::Arc;

use indicatif::ProgressBar;

use super::args::{Embed, Export};
use super::commands::told_prefix;
use super::output::{self, Kind};
use super::skipped::LeftOut;
use super::{device, on_terminal, say, talk};
use crate::arena::{Arena, Layout};
use crate::data::augment::{Normalise, Policy};
use crate::data::{self, LabelTable, Reading, Source, Subset, Transform};
use crate::device::{Device, Precision};
use crate::error::{Error, Result, printable};
use crate::eval::{self, Embedded};
use crate::nn::{ResNet, ResNetConfig, Stem};
use crate::train::{self, Trained};
use crate::weights::WeightFile;

pub(super) fn export(args: &Export) -> Result<()> {
    let trained = Trained::open(&args.run, &[])?;
    let (name, kind) = if args.onnx {
        ("backbone.onnx", Kind::Onnx)
    } else {
        ("backbone.safetensors", Kind::Weights)
    };
    let out = args.out.clone().unwrap_or_else(|| trained.checkpoint.with_file_name(name));
    output::check(&out, kind)?;
    check_suffix(&out, args.onnx)?;
    let (_, arena) = trained.load(&Device::cpu(0)?)?;
    if args.onnx {
        train::export_onnx(&out, &arena)?;
    } else {
        train::export_backbone(&out, &arena)?;
    }
    talk(&format!("{}: the backbone of {}", out.display(), trained.checkpoint.display()));
    if !args.onnx {
        talk(&in_torchvision(&trained.recipe.network));
    }
    say(&out.display().to_string())
}

/// Refuses a name that promises another format than is written.
fn check_suffix(out: &Path, onnx: bool) -> Result<()> {
    let suffix = out.extension().and_then(|suffix| suffix.to_str()).unwrap_or_default();
    let [promised, written, how] = match (suffix.to_ascii_lowercase().as_str(), onnx) {
        ("pth" | "pt" | "ckpt" | "bin" | "pkl", _) => {
            ["PyTorch's", ".safetensors", "safetensors.torch.load_file reads it"]
        }
        ("onnx", false) => ["ONNX", ".safetensors", "--onnx writes ONNX"],
        ("safetensors", true) => ["safetensors", ".onnx", "without --onnx weights are written"],
        _ => return Ok(()),
    };
    Err(Error::Config(format!(
        "{}: .{suffix} promises {promised} format: name a file that ends in {written} ({how})",
        out.display()
    )))
}

/// Describes how to load a backbone in PyTorch.
fn in_torchvision(network: &ResNetConfig) -> String {
    let channels = network.channels;
    let network = &ResNetConfig { channels: 3, ..*network };
    let large = ResNetConfig { stem: Stem::Image, ..*network };
    let first =
        |taps: &str| format!("model.conv1 = torch.nn.Conv2d({channels}, 64, {taps}, bias=False)");
    match (network.name(), large.name()) {
        (Some(name), _) if channels != 3 => format!(
            "in PyTorch: torchvision's {name} with {}, model.fc = torch.nn.Identity()",
            first("7, 2, 3")
        ),
        (Some(name), _) => format!(
            "in PyTorch: model = torchvision.models.{name}(); model.fc = torch.nn.Identity(); \
             model.load_state_dict(safetensors.torch.load_file(FILE))"
        ),
        (None, Some(name)) => format!(
            "in PyTorch: torchvision's {name} with {}, \
             model.maxpool = model.fc = torch.nn.Identity()",
            first("3, 1, 1")
        ),
        (None, None) => {
            "torchvision has no network of this width; names and layout are torchvision's".into()
        }
    }
}

pub(super) fn embed(args: &Embed) -> Result<()> {
    let list = args.out.with_extension("skipped.txt");
    let files = Embedded::files(&args.out)?;
    files.iter().chain([&list]).try_for_each(|file| output::check(file, Kind::of(file)))?;
    let (folder, network) = match (&args.weights, &*args.paths) {
        (Some(file), [folder]) => (folder, Network::foreign(args, file)?),
        (None, [run, folder]) => (folder, Network::own(args, run)?),
        _ => {
            return Err(Error::config(
                "embed takes a run and a folder of images, or a folder of images with --weights and --arch",
            ));
        }
    };
    let Network { arena, backbone, mut policy, transform, reading } = network;
    let source = images(folder, args, &reading)?;
    policy.size = args.size.map_or(policy.size, |size| size as usize);
    let size = policy.size;
    talk(&format!("{} images at {size} x {size} pixels", source.len()));
    source.notes().iter().for_each(|note| talk(note));
    let bar = on_terminal().then(|| ProgressBar::new(source.len() as u64));
    let done = |count| bar.iter().for_each(|bar| bar.set_position(count as u64));
    let mut all = eval::embed(&arena, &backbone, &*source, &policy, transform, done)?;
    bar.iter().for_each(ProgressBar::finish_and_clear);
    for name in &mut all.names {
        if let Ok(inner) = Path::new(&*name).strip_prefix(printable(folder.as_os_str())) {
            *name = inner.to_string_lossy().into_owned();
        }
    }
    LeftOut::new(list, args.max_skipped).add("source", source.len(), &all.skipped)?;
    let written = all.write(&args.out)?;
    talk(&format!("{} rows of {} features", all.names.len(), all.d));
    written.iter().try_for_each(|path| say(&path.display().to_string()))
}

fn images(folder: &Path, args: &Embed, reading: &Reading) -> Result<Arc<dyn Source>> {
    let table = args.labels.as_deref().map(LabelTable::read).transpose()?;
    let all: Arc<dyn Source> =
        data::open_labelled(folder, args.split, reading, table.as_ref())?.into();
    Ok(if args.limit == 0 { all } else { Arc::new(Subset::spread(all, args.limit)) })
}

/// A backbone with its weights and its input transform.
struct Network {
    arena: Arena,
    backbone: ResNet,
    policy: Policy,
    transform: Transform,
    /// How images are read for it.
    reading: Reading,
}

impl Network {
    /// The backbone of a run, with the transform of the run's own evaluation.
    fn own(args: &Embed, run: &Path) -> Result<Self> {
        let trained = Trained::open(run, &[])?;
        let device = device::open(args.device, &trained.recipe.train)?;
        let (method, arena) = trained.load(&device)?;
        talk(&format!("weights: {}", trained.checkpoint.display()));
        let (backbone, policy) = (method.backbone().clone(), trained.recipe.augment[0].clone());
        let reading = trained.recipe.data.reading();
        Ok(Self { arena, backbone, policy, transform: Transform::Center, reading })
    }

    /// A backbone from a file with torchvision's names, with the transform of torchvision's presets.
    fn foreign(args: &Embed, file: &Path) -> Result<Self> {
        let name = args.arch.as_deref().unwrap_or_default(); // --weights requires it
        let network = ResNetConfig::named(name)?;
        WeightFile::open(file)?; // before a network is made for it
        let device = device::choose(args.device, Some(Precision::F32), 0)?;
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "backbone.", &network);
        let mut arena = Arena::new(&Arc::new(layout), &device, 0);
        train::init_weights(file, &mut arena)?;
        told_prefix(file, arena.layout())?;
        let policy = Policy { normalise: Some(Normalise::imagenet()), ..Policy::crop(224) };
        let (transform, reading) = (Transform::ResizedCenter, Reading::default());
        Ok(Self { arena, backbone, policy, transform, reading })
    }
}

//! Weights with torchvision's names are written and read, and give torchvision's features.

use std::path::Path;
use std::sync::Arc;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use selfsup::arena::Layout;
use selfsup::device::Device;
use selfsup::nn::{ResNet, ResNetConfig};
use selfsup::train;

use crate::compare::report;
use crate::golden::Goldens;
use crate::program::{selfsup, text};
use crate::{network, seeded};

/// Widths and heights, as in `scripts/goldens/interchange.py`.
const IMAGES: [[u32; 2]; 4] = [[75, 61], [97, 130], [64, 64], [50, 41]];

fn write_images(folder: &Path) {
    std::fs::create_dir(folder).unwrap();
    for (i, [width, height]) in IMAGES.into_iter().enumerate() {
        let seed = seeded::seed(&format!("image {i}"));
        let value = |j| (seeded::bits(seed, j) >> 56) as u8;
        let pixels = (0..u64::from(width * height * 3)).map(value).collect();
        let image = image::RgbImage::from_raw(width, height, pixels).unwrap();
        image.save(folder.join(format!("{i}.png"))).unwrap();
    }
}

/// Shape and values of an array of f32 in NumPy's format.
fn read_npy(path: &Path) -> (String, Vec<f64>) {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(bytes[..8], *b"\x93NUMPY\x01\x00");
    let header = 10 + usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    assert_eq!(header % 64, 0);
    let shape = text(&bytes[10..header]).trim_end().to_owned();
    (shape, numbers(&bytes[header..]))
}

fn numbers(bytes: &[u8]) -> Vec<f64> {
    let number = |b: &[u8]| f64::from(f32::from_le_bytes(b.try_into().unwrap()));
    bytes.chunks_exact(4).map(number).collect()
}

#[test]
fn embedded_features_are_torchvisions_through_its_resize_and_crop() {
    let folder = tempfile::tempdir().unwrap();
    write_images(&folder.path().join("images"));
    let goldens = Goldens::open("interchange");
    let mut results = Vec::new();
    for name in ["resnet18", "resnet50"] {
        let mut layout = Layout::new();
        ResNet::new(&mut layout, "backbone.", &ResNetConfig::named(name).unwrap());
        let arena = network::seeded_arena(&Arc::new(layout), &Device::cpu(1).unwrap(), name);
        train::export_backbone(&folder.path().join("weights.safetensors"), &arena).unwrap();
        let embed = |out| {
            let words = ["embed", "--weights", "weights.safetensors", "--arch", name];
            let rest = ["images", "--size", "64", "--device", "cpu", "--out", out];
            let output = selfsup(folder.path(), &[&words[..], &rest].concat());
            assert!(output.status.success(), "{}", text(&output.stderr));
            text(&output.stdout).to_owned()
        };
        assert_eq!(embed("features.npy"), "features.npy\nfeatures.tsv\n");
        let (shape, features) = read_npy(&folder.path().join("features.npy"));
        let d = features.len() / IMAGES.len();
        let start = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': (4, {d}), }}");
        assert_eq!(shape, start);
        results.push(goldens.record(name).check(&features, 1e-4));
        let table = std::fs::read_to_string(folder.path().join("features.tsv")).unwrap();
        let rows: String = (0..IMAGES.len()).map(|i| format!("{i}.png\t-1\t\n")).collect();
        assert_eq!(table, format!("file\tlabel\tclass\n{rows}"));
        if name == "resnet18" {
            under_prefixes(folder.path(), &features);
            assert_eq!(embed("features.safetensors"), "features.safetensors\n");
            let data = std::fs::read(folder.path().join("features.safetensors")).unwrap();
            let file = SafeTensors::deserialize(&data).unwrap();
            let tensor = file.tensor("features").unwrap();
            assert_eq!((tensor.shape(), numbers(tensor.data())), (&[4, d][..], features));
            assert_eq!(
                file.tensor("labels").unwrap().data(),
                [-1_i64; 4].map(i64::to_le_bytes).concat()
            );
            let (_, header) = SafeTensors::read_metadata(&data).unwrap();
            let notes = header.metadata().as_ref().unwrap();
            assert_eq!(notes["names"], "[\"0.png\",\"1.png\",\"2.png\",\"3.png\"]");
        }
    }
    report("features of torchvision's networks", results);
}

/// The same weights under the prefixes of public checkpoints give the same features; the prefix is named.
fn under_prefixes(folder: &Path, features: &[f64]) {
    let data = std::fs::read(folder.join("weights.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&data).unwrap();
    let bias = [0_u8; 4];
    let fc = TensorView::new(Dtype::F32, vec![1], &bias).unwrap();
    for prefix in ["module.encoder_q.", "backbone.", "state_dict.teacher.backbone."] {
        let renamed =
            file.tensors().into_iter().map(|(name, view)| (format!("{prefix}{name}"), view));
        let all = renamed.chain([("module.fc.bias".to_owned(), fc.clone())]);
        safetensors::serialize_to_file(all, None, &folder.join("prefixed.safetensors")).unwrap();
        let words = ["embed", "--weights", "prefixed.safetensors", "--arch", "resnet18", "images"];
        let rest = ["--size", "64", "--device", "cpu", "--out", "prefixed.npy"];
        let output = selfsup(folder, &[&words[..], &rest].concat());
        let said = text(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert_eq!(read_npy(&folder.join("prefixed.npy")).1, features, "{prefix}");
        let named = said.contains(&format!("the prefix `{prefix}` of its names was stripped"));
        assert_eq!(named, prefix != "backbone.", "{said}");
    }
}

#[test]
fn an_exported_file_holds_the_backbone_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let settings = [
        "network.width=2",
        "method.hidden=8",
        "method.embedding=8",
        "augment.size=16",
        "data.limit=16",
        "data.test_limit=8",
        "train.epochs=1",
        "train.batch=8",
    ];
    let settings: Vec<&str> = settings.into_iter().flat_map(|setting| ["--set", setting]).collect();
    let words = ["train", "demo", "--device", "cpu", "--out", "run"];
    let output = selfsup(folder.path(), &[&words[..], &settings].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = selfsup(folder.path(), &["export", "run", "--out", "backbone.safetensors"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), "backbone.safetensors\n");

    let [run, backbone] = ["run/step-00000002.safetensors", "backbone.safetensors"]
        .map(|file| std::fs::read(folder.path().join(file)).unwrap());
    let [run, backbone] = [&run, &backbone].map(|data| SafeTensors::deserialize(data).unwrap());
    let own: Vec<&str> = run.names().into_iter().filter(|n| n.starts_with("backbone.")).collect();
    assert_eq!(backbone.len(), own.len());
    for name in own {
        let exported = backbone.tensor(name.strip_prefix("backbone.").unwrap()).unwrap();
        let tensor = run.tensor(name).unwrap();
        assert_eq!((exported.shape(), exported.data()), (tensor.shape(), tensor.data()), "{name}");
    }

    // It is read back as it was written: a run that starts from it at rate 0 keeps its weights.
    let still = ["--set", "optim.lr=0", "--set", "optim.rule.sgd.weight_decay=0"];
    let init = ["--out", "again", "--set", "train.init=backbone.safetensors"];
    let words = [&["train", "demo", "--device", "cpu"], &init[..], &settings, &still].concat();
    let output = selfsup(folder.path(), &words);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let again = std::fs::read(folder.path().join("again/step-00000002.safetensors")).unwrap();
    let again = SafeTensors::deserialize(&again).unwrap();
    for name in backbone.names().into_iter().filter(|name| !name.contains("running")) {
        let [a, b] = [again.tensor(&format!("backbone.{name}")), backbone.tensor(name)];
        assert_eq!(a.unwrap().data(), b.unwrap().data(), "{name}");
    }
}

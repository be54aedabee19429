//! A table of labels next to a flat folder, played through the program; and the measured channels of a set, written into a recipe.

use std::path::Path;

use serde_json::Value;

use crate::program::{selfsup, text, with_settings};

const SMALL: &[&str] = &[
    "network.width=2",
    "method.hidden=8",
    "method.embedding=8",
    "train.epochs=1",
    "train.batch=16",
    "augment.size=16",
    "data.path=photos",
    "data.labels=labels.csv",
];

/// 48 images of two colours in a flat folder, of which a table labels 44 and holds out 12.
fn write_photos(root: &Path) {
    std::fs::create_dir(root.join("photos")).unwrap();
    let mut table = "image_id,species,subset\n".to_owned();
    for i in 0..48_u32 {
        let colour = if i % 2 == 0 { [200, 60, 40] } else { [40, 60, 200] };
        let pixel = |x: u32, y: u32| {
            image::Rgb(colour.map(|c: u32| (c + (x * 5 + y * 3 + i * 7) % 40) as u8))
        };
        let name = format!("{i:02}.png");
        image::RgbImage::from_fn(24, 24, pixel).save(root.join("photos").join(name)).unwrap();
        if i < 44 {
            let class = if i % 2 == 0 { "\"kea, red\"" } else { "owl" };
            table += &format!("{i:02},{class},{}\n", if i < 32 { "train" } else { "val" });
        }
    }
    std::fs::write(root.join("labels.csv"), table).unwrap();
}

#[track_caller]
fn done(root: &Path, words: &[&str]) -> [String; 2] {
    let output = selfsup(root, words);
    assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap())
}

#[test]
fn a_table_labels_a_flat_folder_in_every_command() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    write_photos(root);
    let train = with_settings(&["train", "demo", "--device", "cpu", "--out", "run"], SMALL);
    let [_, said] = done(root, &train);
    assert!(said.contains("labels.csv: 4 of 48 images in photos have no class there"), "{said}");
    assert!(said.contains("simclr on 32 images") && said.contains("kNN"), "{said}");
    let knn = ["eval", "knn", "run", "--k", "5", "--device", "cpu", "--json"];
    let found: Value = serde_json::from_str(&done(root, &knn)[0]).unwrap();
    assert_eq!(
        (&found["training_images"], &found["held_out"]),
        (&32.into(), &12.into()),
        "{found}"
    );
    let linear =
        ["eval", "linear", "run", "--labels", "25%", "--epochs", "2", "--device", "cpu", "--json"];
    let found: Value = serde_json::from_str(&done(root, &linear)[0]).unwrap();
    assert_eq!(found["training_images"], 8, "{found}");
    let embed =
        ["embed", "run", "photos", "--labels", "labels.csv", "--split", "test", "--out", "f.npy"];
    done(root, &embed);
    let features = std::fs::read_to_string(root.join("f.tsv")).unwrap();
    assert_eq!(features.lines().filter(|line| line.contains("owl")).count(), 6, "{features}");
    assert!(features.contains("32.png") && !features.contains("44.png"), "{features}");
    let [_, said] = done(root, &["pack", "photos", "--labels", "labels.csv", "--out", "packed"]);
    assert!(said.contains("44 images in 2 files"), "{said}");
    let packed = ["data.path=packed", "data.labels="];
    let knn = with_settings(&knn, &packed);
    let refused = selfsup(root, &knn[..knn.len() - 2]);
    assert!(text(&refused.stderr).contains("or set data.labels= to nothing"), "{refused:?}");
    let found: Value = serde_json::from_str(&done(root, &knn)[0]).unwrap();
    assert_eq!(
        (&found["training_images"], &found["held_out"]),
        (&32.into(), &12.into()),
        "{found}"
    );
    // A share of the table's images is planned with its classes, too.
    for labels in ["data.labels=labels.csv", "data.labels=labels.csv 50%"] {
        let plan = ["train", "photos", "--plan", "--device", "cpu", "--set", labels];
        let [plan, _] = done(root, &plan);
        let found = "32 images, in colour, shorter side 24 pixels, 2 classes, 12 images held out";
        assert!(plan.contains(found), "{labels}: {plan}");
    }
}

#[test]
fn measured_channels_are_written_into_a_recipe_that_keeps_its_comments() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    write_photos(root);
    let [line, _] = done(root, &["stats", "photos"]);
    let old = "base = \"simclr-cifar10-small\" # quick\n\n[augment]\nflip = 0.5 # both ways\n";
    std::fs::write(root.join("my.toml"), old).unwrap();
    let [written, _] = done(root, &["stats", "photos", "--write", "my.toml"]);
    assert_eq!(written, line);
    assert_eq!(std::fs::read_to_string(root.join("my.toml")).unwrap(), format!("{old}{line}"));
    let table: toml::Table = line.parse().unwrap();
    let red = table["normalise"]["mean"][0].as_float().unwrap();
    // Half of the images at about 220 of 255 and half at about 60.
    assert!((red - 140.0 / 255.0).abs() < 0.02, "{line}");
    // A recipe of one channel, whose base has the means of three: this is how it comes to fit.
    std::fs::create_dir(root.join("grey")).unwrap();
    let grey = image::GrayImage::from_fn(24, 24, |x, y| image::Luma([(x * y % 200) as u8]));
    grey.save(root.join("grey/0.png")).unwrap();
    let one = "base = \"simclr-cifar10-small\"\n\n[data]\nchannels = 1\n\n[augment]\npixels = \"float\"\n";
    std::fs::write(root.join("grey.toml"), one).unwrap();
    let [line, _] = done(root, &["stats", "grey", "--write", "grey.toml"]);
    let written = std::fs::read_to_string(root.join("grey.toml")).unwrap();
    assert_eq!((&*written, line.matches(',').count()), (&*format!("{one}{line}"), 1), "{line}");
    let built_in = selfsup(root, &["stats", "photos", "--write", "demo"]);
    assert!(text(&built_in.stderr).contains("demo is a built-in recipe"), "{built_in:?}");
}

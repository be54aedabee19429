//! The same command from another place, or over a link, means the same files, or says that it does not.

use std::path::Path;

use selfsup::data::{Split, open};

use super::{check_refusals, hues};
use crate::program::{selfsup, text, with_settings};

fn done(folder: &Path, words: &[&str]) -> [String; 2] {
    let output = selfsup(folder, words);
    assert!(output.status.success(), "{words:?}: {}", text(&output.stderr));
    [&output.stdout, &output.stderr].map(|said| text(said).to_owned())
}

/// Four images in each split, called alike.
fn write_splits(set: &Path) {
    for (split, shade) in [("train", 0), ("test", 100)] {
        std::fs::create_dir_all(set.join(split)).unwrap();
        for i in 0..4_u8 {
            let image = image::RgbImage::from_pixel(8, 8, image::Rgb([shade + 30 * i, 50, 90]));
            image.save(set.join(split).join(format!("{i}.png"))).unwrap();
        }
    }
}

#[test]
fn a_table_means_the_same_images_however_their_folder_is_typed() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    write_splits(&root.join("set"));
    let rows = |split: &str| -> String {
        (0..4)
            .map(|i| format!("{split}/{i}.png,{}\n", if i % 2 == 0 { "a" } else { "b" }))
            .collect()
    };
    std::fs::write(root.join("test.csv"), rows("test")).unwrap();
    // The classes of the test images are exchanged.
    let other = rows("test").replace(",a", ",c").replace(",b", ",a").replace(",c", ",b");
    std::fs::write(root.join("both.csv"), rows("train") + &other).unwrap();
    let places = [
        (root.to_owned(), "set/train"),
        (root.join("set"), "train"),
        (root.join("set/train"), "."),
        (root.join("set/test"), "../train"),
    ];
    let [of_test, of_both] = ["test.csv", "both.csv"].map(|table| root.join(table));
    for (i, (place, typed)) in places.iter().enumerate() {
        let out = root.join(format!("pack-{i}"));
        let pack = |table: &Path| {
            let [out, table] = [&out, table].map(|path| path.to_str().unwrap().to_owned());
            selfsup(place, &["pack", typed, "--raw", "--out", &out, "--labels", &table])
        };
        assert!(text(&pack(&of_test).stderr).contains("no row names an image of"), "{typed}");
        let output = pack(&of_both);
        assert!(output.status.success(), "{typed}: {}", text(&output.stderr));
        let packed = open(&out, Split::Train).unwrap();
        let classes: Vec<Option<u32>> =
            (0..packed.len()).map(|image| packed.label(image)).collect();
        assert_eq!(classes, [0, 1, 0, 1].map(Some), "{typed}");
    }
}

#[test]
fn a_run_is_not_evaluated_on_the_images_of_another_place_unasked() {
    let root = tempfile::tempdir().unwrap();
    let [own, other] = ["own", "other"].map(|name| root.path().join(name));
    for (place, darker) in [(&own, 0), (&other, 20)] {
        hues(&place.join("set"));
        for image in images_in(&place.join("set")) {
            let mut pixels = image::open(&image).unwrap().to_rgb8();
            pixels.iter_mut().for_each(|value| *value = value.saturating_sub(darker));
            pixels.save(&image).unwrap();
        }
    }
    let settings = [
        "network.width=2",
        "method.hidden=8",
        "method.embedding=8",
        "augment.size=16",
        "data.path=set",
        "train.epochs=1",
        "train.batch=8",
    ];
    let train = with_settings(&["train", "demo", "--device", "cpu", "--out", "run"], &settings);
    done(&own, &train);
    let run = own.join("run").display().to_string();
    let eval = |of: &'static str| vec!["eval", of, &run, "--device", "cpu"];
    done(&own, &eval("knn"));
    let refused = "set: the training images have other pixels than those that the run was trained on: name the folder of those with --set \
                   data.path=…, or say that these are meant with --set data.path=set";
    let [knn, linear, finetune] = ["knn", "linear", "finetune"].map(eval);
    let parts = [&linear[..], &["--labels", "50%"]].concat();
    let limited = [&knn[..], &["--set", "data.limit=12"]].concat();
    done(&own, &limited);
    let cases = [&knn, &linear, &finetune, &parts, &limited].map(|words| (&words[..], 2, refused));
    check_refusals(&other, &cases, &[]);
    done(&other, &[&knn[..], &["--set", "data.path=set"]].concat());
    let there = format!("data.path={}", own.join("set").display());
    done(&other, &[&knn[..], &["--set", &there]].concat());
}

/// The files of a folder and the folders in it.
fn images_in(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { images_in(&path) } else { vec![path] }).collect()
}

#[test]
#[cfg(unix)]
fn a_recipe_of_the_user_stays_a_link_with_its_permissions_and_line_ends() {
    use std::os::unix::fs::PermissionsExt;
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    hues(&root.join("set"));
    let recipe = done(root, &["recipes", "simclr-cifar10-small"])[0].replace('\n', "\r\n");
    let real = root.join("real.toml");
    std::fs::write(&real, &recipe).unwrap();
    std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::symlink("real.toml", root.join("link.toml")).unwrap();
    done(root, &["stats", "set", "--write", "link.toml"]);
    assert!(root.join("link.toml").is_symlink());
    let written = std::fs::read_to_string(&real).unwrap();
    assert!(written != recipe && !written.replace("\r\n", "").contains(['\r', '\n']));
    assert_eq!(std::fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o600);
}

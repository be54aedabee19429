//! What the cutting of a step into tasks allows on many threads, by the program's model of a step on one.

use selfsup::recipes::Recipe;
use selfsup::train::scaling;

use crate::program::{selfsup, text};

fn settings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Of networks that are much smaller than published ones the serial parts are larger shares.
#[test]
fn no_part_of_a_step_keeps_sixteen_threads_waiting() {
    for (name, words) in [
        ("simclr-cifar10-small", &["train.batch=128", "train.precision=f32"][..]),
        ("byol-cifar10-small", &["train.batch=128", "train.precision=f32"]),
        ("simclr-imagenet", &["train.batch=6", "augment.size=112", "train.precision=f32"]),
    ] {
        let recipe = Recipe::load(name, &settings(words)).unwrap();
        let found = scaling(&recipe, 16).unwrap();
        let worst = found
            .waits
            .iter()
            .filter(|wait| wait.is_serial)
            .max_by(|a, b| a.share.total_cmp(&b.share));
        let worst = worst.unwrap();
        println!("{name}: {:?}, longest serial part {worst:?}", found.efficiency);
        assert!(worst.share < 0.03, "{name}: {worst:?}");
    }
}

#[test]
fn inspect_tells_where_threads_wait() {
    let folder = tempfile::tempdir().unwrap();
    let small =
        ["inspect", "demo", "--set", "network.width=4", "--set", "train.batch=16", "--scaling"];
    let output = selfsup(folder.path(), &small);
    let said = text(&output.stdout);
    assert!(said.contains("2 threads work ") && said.contains("where 16 threads wait:"), "{said}");
    assert!(said.contains("src/") && said.contains("few or uneven tasks"), "{said}");
    let output = selfsup(folder.path(), &[&small[..], &["4", "--json"]].concat());
    let all: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let scaling = &all["scaling"];
    let work: Vec<f64> = scaling["efficiency"]
        .as_array()
        .unwrap()
        .iter()
        .map(|of| of[1].as_f64().unwrap())
        .collect();
    assert!(work.windows(2).all(|pair| pair[1] <= pair[0] + 1e-9), "{work:?}");
    assert!(work[0] <= 1.0 && scaling["threads"] == 4, "{scaling}");
}

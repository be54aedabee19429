//! The commands that suffer faults, and the images, runs and older results that they start from.

use std::path::Path;

use super::process::run;

/// A command and what it is run on.
pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) words: Vec<String>,
    /// Where the command may replace files that are there, by whole new ones.
    pub(super) replaces: &'static [&'static str],
    /// The file or folder that the command writes.
    pub(super) output: &'static str,
    /// Whether that is a run, which `train --resume` continues once it has a recipe.
    pub(super) is_run: bool,
    /// What somebody removes meanwhile.
    pub(super) removed: &'static [&'static str],
}

/// Two classes of pictures, and one file in each part that is none.
fn pictures(folder: &Path) {
    for (part, count) in [("train", 4), ("test", 2)] {
        for (class, colour) in [("ape", [220, 40, 40]), ("bee", [40, 40, 220])] {
            let folder = folder.join(part).join(class);
            std::fs::create_dir_all(&folder).unwrap();
            for i in 0..count {
                let pixel = |x: u32, y: u32| {
                    image::Rgb(colour.map(|c: u8| c - 30 + ((7 * x + 13 * y + 5 * i) % 60) as u8))
                };
                image::RgbImage::from_fn(12, 12, pixel)
                    .save(folder.join(format!("{i}.png")))
                    .unwrap();
            }
        }
        std::fs::write(folder.join(part).join("bee/9.png"), "no picture").unwrap();
    }
}

/// Two epochs of two steps, with everything that a run can write.
const SETTINGS: [&str; 20] = [
    "data.path=data",
    "data.limit=0",
    "data.test_limit=0",
    "data.max_skipped=1",
    "network.width=2",
    "method.hidden=8",
    "method.embedding=8",
    "augment.size=8",
    "train.epochs=2",
    "train.batch=4",
    "train.threads=1",
    "train.loader_threads=1",
    "train.knn_every=1",
    "train.checkpoint_every=1",
    "train.checkpoint_every_steps=1",
    "train.keep=1",
    "watch.collapsed_std=0",
    "watch.collapsed_rank=0",
    "watch.diverged=0",
    "watch.tensorboard=true",
];

/// What the scenarios start from: images, runs, older results.
pub(super) fn template(root: &Path, scratch: &Path) {
    pictures(&root.join("data"));
    let run = |words: &[String], variables: &[(&str, &str)], code: Option<i32>| {
        let ended = run(root, words, scratch, variables).unwrap();
        assert_eq!(ended.code, code, "{words:?}: {}", ended.said);
    };
    run(&train("run"), &[], Some(0));
    // Killed before the first epoch's checkpoint got its name.
    run(
        &train("half"),
        &[("FAULTS_KIND", "kill"), ("FAULTS_AT", "60"), ("FAULTS_OF", "change")],
        None,
    );
    assert!(root.join("half/step-00000001.safetensors").is_file());
    run(&words("export run"), &[], Some(0));
    let backbone = root.join("run/backbone.safetensors");
    let mut bytes = std::fs::read(&backbone).unwrap();
    let last = bytes.len() - 3;
    bytes[last] ^= 1;
    std::fs::write(&backbone, bytes).unwrap();
    run(
        &words("embed run data --out f.npy --split test --max-skipped 1 --device cpu"),
        &[],
        Some(0),
    );
    let settings = SETTINGS.map(|setting| format!("{setting:?}")).join(", ");
    let study = format!(
        "question = \"Which?\"\nsource = \"here\"\nbase = \"demo\"\ncolumns = [\"knn\", \"loss\"]\nset = [{settings}, \"train.epochs=1\"]\n\
         [[arm]]\nname = \"a\"\n[[arm]]\nname = \"b\"\nafter = \"a\"\nset = [\"watch.report=false\"]\n"
    );
    std::fs::write(root.join("study.toml"), study).unwrap();
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(String::from).collect()
}

fn train(out: &str) -> Vec<String> {
    let mut all = words(&format!("train demo --device cpu --out {out}"));
    all.extend(SETTINGS.iter().flat_map(|setting| ["--set".to_owned(), (*setting).to_owned()]));
    all
}

/// The commands, each with the parts of the template that it needs.
pub(super) fn scenarios() -> Vec<(Scenario, &'static [&'static str])> {
    let of = |name, words, output, replaces| Scenario {
        name,
        words,
        replaces,
        output,
        is_run: false,
        removed: &[],
    };
    let knn = words("eval knn run --k 5 --device cpu");
    let linear = words("eval linear run --epochs 1 --device cpu");
    let finetune = words(
        "eval finetune run --out tuned --device cpu --set train.epochs=1 --set train.batch=4",
    );
    let embed = words("embed run data --out f.npy --max-skipped 1 --device cpu");
    let removed: &[&str] = &[
        "run",
        "run/metrics.jsonl",
        "run/recipe.toml",
        "run/best.safetensors",
        "data",
        "data/test",
    ];
    vec![
        (Scenario { is_run: true, removed, ..of("train", train("run"), "run", &[]) }, &["data"]),
        (
            Scenario {
                is_run: true,
                ..of(
                    "resume",
                    words("train --resume half --device cpu --set train.keep=2"),
                    "half",
                    &["half"],
                )
            },
            &["data", "half"],
        ),
        (of("knn", knn, "run/eval-skipped.txt", &[]), &["data", "run"]),
        (of("linear", linear, "run/eval-skipped.txt", &[]), &["data", "run"]),
        (Scenario { is_run: true, ..of("finetune", finetune, "tuned", &[]) }, &["data", "run"]),
        (of("pack", words("pack data --out packed --max-skipped 1"), "packed", &[]), &["data"]),
        (
            of(
                "export",
                words("export run"),
                "run/backbone.safetensors",
                &["run/backbone.safetensors"],
            ),
            &["run"],
        ),
        (
            Scenario {
                removed: &["data", "run"],
                ..of("embed", embed, "f.npy", &["f.npy", "f.tsv"])
            },
            &["data", "run", "f.npy", "f.tsv"],
        ),
        (
            Scenario {
                removed: &["s", "s/a/seed-0/recipe.toml", "data"],
                ..of("study", words("study study.toml --out s --device cpu"), "s", &[])
            },
            &["data", "study.toml"],
        ),
        (of("report", words("report run"), "run/report.html", &["run/report.html"]), &["run"]),
    ]
}

//! What was changed behind the program's back, or lies where nobody meant it to: it is told, and no figure is of something else.

use std::path::Path;
use std::process::Output;

use serde_json::Value;

use super::{check_refusals, hues, write};
use crate::program::{program, selfsup, text, with_settings};

const SMALL: &[&str] = &[
    "network.width=2",
    "method.hidden=8",
    "method.embedding=8",
    "augment.size=16",
    "data.path=set",
    "train.epochs=4",
    "train.batch=8",
    "train.checkpoint_every_steps=3",
    "train.keep=9",
    "train.knn_every=1",
    "watch.collapsed_std=0",
    "watch.collapsed_rank=0",
];

fn done(output: &Output) -> [&str; 2] {
    assert!(output.status.success(), "{}", text(&output.stderr));
    [text(&output.stdout), text(&output.stderr)]
}

/// Trains four epochs of three steps on three classes of hues, with a checkpoint after each.
fn trained(root: &Path) {
    hues(&root.join("set"));
    done(&selfsup(
        root,
        &with_settings(&["train", "demo", "--device", "cpu", "--out", "run"], SMALL),
    ));
}

/// Takes a run back to the end of its second epoch.
fn back_to_step_6(run: &Path) {
    for step in [9, 12] {
        std::fs::remove_file(run.join(format!("step-{step:08}.safetensors"))).unwrap();
    }
}

#[test]
fn a_checkpoint_is_evaluated_as_its_own_recipe_says() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    trained(root);
    let knn = ["eval", "knn", "run", "--k", "5", "--device", "cpu", "--json"];
    let before = selfsup(root, &knn);
    let before = done(&before)[0];
    let recipe = root.join("run/recipe.toml");
    let written = std::fs::read_to_string(&recipe).unwrap();
    // What does not touch the weights may change: the set has moved.
    std::fs::rename(root.join("set"), root.join("moved")).unwrap();
    std::fs::write(&recipe, written.replace("path = \"set\"", "path = \"moved\"")).unwrap();
    assert_eq!(done(&selfsup(root, &knn))[0], before);
    std::fs::rename(root.join("moved"), root.join("set")).unwrap();
    std::fs::write(&recipe, written.replace("size = 16", "size = 8")).unwrap();
    let refused = "run/recipe.toml: augment.0.size is 8, and was 16 when run/step-00000012.safetensors was written: restore it (settings \
                   for one evaluation are given with --set), or name the checkpoint itself, which has its recipe";
    let embed = ["embed", "run", "set", "--out", "f.npy"];
    check_refusals(root, &[(&knn, 1, refused), (&embed, 1, refused)], &["f.npy"]);
    let alone =
        ["eval", "knn", "run/step-00000012.safetensors", "--k", "5", "--device", "cpu", "--json"];
    let figure = |text: &str| serde_json::from_str::<Value>(text).unwrap()["found"].clone();
    assert_eq!(figure(done(&selfsup(root, &alone))[0]), figure(before));
    std::fs::write(&recipe, &written).unwrap();
    let stats = ["stats", "set", "--write", "run/recipe.toml"];
    let refused = "run/recipe.toml: is the recipe of a run, whose weights were trained with it: copy it to another folder first";
    check_refusals(root, &[(&stats, 1, refused)], &[]);
    assert_eq!(std::fs::read_to_string(&recipe).unwrap(), written);
}

#[test]
fn a_run_does_not_go_on_with_other_held_out_images() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    trained(root);
    back_to_step_6(&root.join("run"));
    let resume = ["train", "--resume", "run", "--device", "cpu"];
    let test = root.join("set/test");
    std::fs::rename(test.join("ape/0.png"), test.join("ape/9.png")).unwrap();
    let refused = |what: &str| {
        format!(
            "set: the held-out images have other {what} than those that the run was started with: restore them, or start another run"
        )
    };
    check_refusals(root, &[(&resume, 2, &refused("names or labels"))], &[]);
    std::fs::rename(test.join("ape/9.png"), test.join("ape/0.png")).unwrap();
    let kept = std::fs::read(test.join("bee/1.png")).unwrap();
    std::fs::copy(test.join("ape/1.png"), test.join("bee/1.png")).unwrap();
    check_refusals(root, &[(&resume, 2, &refused("pixels"))], &[]);
    std::fs::write(test.join("bee/1.png"), kept).unwrap();
    done(&selfsup(root, &resume));
}

#[test]
fn a_report_tells_runs_on_other_images_apart() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    for place in ["here", "there"] {
        std::fs::create_dir(root.join(place)).unwrap();
        hues(&root.join(place).join("set"));
    }
    let image = |name: &str| root.join("there/set/train").join(name);
    std::fs::copy(image("ape/1.png"), image("bee/1.png")).unwrap();
    for place in ["here", "there"] {
        let words = ["train", "demo", "--device", "cpu", "--out", "run"];
        let once = ["train.epochs=1", "train.precision=f32"];
        done(&selfsup(&root.join(place), &with_settings(&with_settings(&words, SMALL), &once)));
    }
    done(&selfsup(root, &["report", "here/run", "there/run", "--out", "both.html"]));
    let page = std::fs::read_to_string(root.join("both.html")).unwrap();
    let values = |key: &str| -> Vec<String> {
        let start = format!("[\"{key}\",\"");
        let found = page.split(&start).skip(1).map(|rest| rest.split('"').next().unwrap().into());
        found.collect()
    };
    assert_eq!(values("computed in"), ["f32", "f32"]);
    let (training, held_out) = (values("training images"), values("held-out images"));
    assert!(training.len() == 2 && training[0] != training[1], "{training:?}");
    assert!(held_out.len() == 2 && held_out[0] == held_out[1], "{held_out:?}");
}

#[test]
fn a_log_that_lost_lines_is_told_and_reported_on() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    trained(root);
    let (run, resume) = (root.join("run"), ["train", "--resume", "run", "--device", "cpu"]);
    back_to_step_6(&run);
    let log = run.join("metrics.jsonl");
    let whole = std::fs::read_to_string(&log).unwrap();
    let mut lines: Vec<&str> = whole.lines().collect();
    // As long as it was: a shorter line would cut the last one off, too.
    let garbage = "#".repeat(lines[1].len());
    lines[1] = &garbage;
    std::fs::write(&log, lines.join("\n") + "\n").unwrap();
    let output = selfsup(root, &["report", "run"]);
    assert!(
        text(&output.stderr).contains("line 2: ")
            && text(&output.stderr).contains("remove this line")
    );
    let output = selfsup(root, &resume);
    let [_, said] = done(&output);
    assert!(
        said.contains("metrics.jsonl: the last ") && said.contains(" and 1 lines are damaged"),
        "{said}"
    );
    done(&selfsup(root, &["report", "run"]));
    // Each epoch has its line, and one that was resumed after its last batch claims no speed.
    let records: Vec<Value> = std::fs::read_to_string(&log)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let speeds: Vec<&Value> =
        records.iter().filter(|r| r["epoch"].is_u64()).map(|r| &r["views_per_second"]).collect();
    assert_eq!(speeds.len(), 4);
    assert!(speeds.iter().all(|speed| speed.is_null() || speed.as_f64() > Some(0.0)), "{speeds:?}");
    back_to_step_6(&run);
    std::fs::write(&log, "").unwrap();
    let output = selfsup(root, &resume);
    assert!(done(&output)[1].contains("bytes that the checkpoint knows are missing"));
}

#[test]
fn sets_that_hold_other_sets_are_asked_about() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    hues(&root.join("archive/Dataset"));
    hues(&root.join("mixed"));
    let idx = [&[0, 0, 8, 3][..], &[0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 7]].concat();
    write(root, "mixed/train-images-idx3-ubyte", &idx);
    hues(&root.join("set"));
    for i in 0..3 {
        std::fs::create_dir_all(root.join("flat")).unwrap();
        std::fs::copy(root.join("set/train/ape/0.png"), root.join(format!("flat/{i}.png")))
            .unwrap();
    }
    write(root, "index.csv", b",img_path,label\n2,0.png,cat\n1,1.png,dog\n0,2.png,cat\n");
    write(root, "bare.csv", b"2,0.png,cat\n1,1.png,dog\n0,2.png,cat\n");
    write(root, "other.csv", b",photo,label\n2,0.png,cat\n1,1.png,dog\n0,2.png,cat\n");
    let train = |set| ["train", "demo", "--device", "cpu", "--out", "run", "--set", set];
    let wrapped = "archive: has the folder Dataset/, which holds splits of its own (train/ and test/): name it as the set \
                   (data.path=archive/Dataset), or, if it is a class, move its images into one folder";
    let beside = "mixed: holds idx files and a folder of images, test/: which is the set? Move one of them away";
    let column = |file, line| {
        format!(
            "{file}: line {line}: the class would be 0.png, which is called like an image: name the columns of files and of classes `file` \
             and `label` in the first row, and leave a column of numbers in front of them out (pandas: index=False)"
        )
    };
    let pack = |table| ["pack", "flat", "--out", "packed", "--labels", table];
    let keys = "data.channels, data.bits, data.range, data.pages, data.axes";
    let unread = |setting: &str| {
        format!(
            "--set {setting}: this command takes {keys}, which say how files are read; a table of classes is given with --labels"
        )
    };
    check_refusals(
        root,
        &[
            (&train("data.path=archive"), 1, wrapped),
            (&["train", "archive", "--plan"], 1, wrapped),
            (&train("data.path=mixed"), 1, beside),
            (&pack("bare.csv"), 1, &column("bare.csv", 1)),
            (&pack("other.csv"), 1, &column("other.csv", 2)),
            (
                &["pack", "flat", "--out", "packed", "--set", "data.labels=a.csv"],
                2,
                &unread("data.labels=a.csv"),
            ),
            (
                &["pack", "flat", "--out", "packed", "--set", "data.limit=2"],
                2,
                &unread("data.limit=2"),
            ),
            (&["stats", "flat", "--set", "data.limit=2"], 2, &unread("data.limit=2")),
            (
                &["train", "flat", "--plan", "--set", "data.path=set"],
                2,
                "--set data.path=set: the folder flat is the set that is looked at and trained on: name the other folder in its place",
            ),
        ],
        &["run", "packed", "runs"],
    );
    // The column is found by its name.
    let output = selfsup(root, &pack("index.csv"));
    assert!(done(&output)[1].contains("3 images in 1 files"), "{}", text(&output.stderr));
}

#[test]
fn names_that_only_look_alike_are_told_or_found() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    hues(&root.join("set"));
    // Decomposed, as macOS writes file names, and composed, as people write lists.
    let (decomposed, composed) = ("e\u{301}", "\u{e9}");
    for (i, class) in ["ape", "bee", "cow"].iter().enumerate() {
        let to = root.join(format!("flat/{decomposed}{i}.png"));
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(root.join(format!("set/train/{class}/0.png")), to).unwrap();
    }
    let table = format!("file,label\n{composed}0.png,1\n{composed}1.png,01\n{composed}2.png,2\n");
    write(root, "labels.csv", table.as_bytes());
    let output = selfsup(root, &["pack", "flat", "--labels", "labels.csv", "--out", "packed"]);
    let [_, said] = done(&output);
    assert!(said.contains("3 images in 1 files"), "{said}");
    let twins = "labels.csv: classes that look alike count as different ones: 01 and 1 (in how the number is written)";
    assert!(said.contains(twins), "{said}");
    std::fs::create_dir_all(root.join("twins/cat")).unwrap();
    std::fs::create_dir_all(root.join("twins/Cat")).unwrap();
    for class in ["cat", "Cat"] {
        std::fs::copy(root.join("set/train/ape/0.png"), root.join(format!("twins/{class}/0.png")))
            .unwrap();
    }
    let output = selfsup(root, &["pack", "twins", "--out", "packed-twins"]);
    assert!(done(&output)[1].contains("Cat and cat (in case)"), "{}", text(&output.stderr));
}

#[test]
fn a_list_of_images_left_out_belongs_to_the_last_call() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    trained(root);
    write(root, "f.skipped.txt", b"precious");
    let embed =
        |out| ["embed", "run", "set", "--out", out, "--max-skipped", "0.5", "--device", "cpu"];
    let foreign = "f.skipped.txt: is there already, and another kind of file: choose another --out";
    check_refusals(root, &[(&embed("f.npy"), 1, foreign)], &["f.npy"]);
    assert_eq!(std::fs::read(root.join("f.skipped.txt")).unwrap(), b"precious");
    let image = root.join("set/train/ape/3.png");
    let kept = std::fs::read(&image).unwrap();
    std::fs::write(&image, "no image").unwrap();
    done(&selfsup(root, &embed("g.npy")));
    assert!(std::fs::read_to_string(root.join("g.skipped.txt")).unwrap().contains("ape/3.png"));
    std::fs::write(&image, kept).unwrap();
    done(&selfsup(root, &embed("g.npy")));
    assert!(!root.join("g.skipped.txt").exists(), "all images are in g.npy");
}

#[test]
fn a_run_says_what_it_did_not_do() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    hues(&root.join("set"));
    hues(&root.join("demo"));
    let words = [
        "train",
        "demo",
        "--device",
        "cpu",
        "--out",
        "my run",
        "--trace",
        "t.json",
        "--trace-steps",
        "20",
    ];
    let output = selfsup(root, &with_settings(&words, SMALL));
    let [_, said] = done(&output);
    assert!(
        said.contains("demo is the built-in recipe; to train on the images of the folder of this name: selfsup train ./demo"),
        "{said}"
    );
    let untraced = "t.json: no trace is written, as this took 12 steps and a trace of 20 needs 22: ask for fewer with --trace-steps";
    assert!(said.contains(untraced) && !root.join("t.json").exists(), "{said}");
    assert!(said.contains("evaluate with: selfsup eval knn 'my run'\n"), "{said}");
    let large = ["train", "demo", "--out", "other", "--set", "seed=9223372036854775808"];
    let refused = "recipe: 9223372036854775808 is too large: the largest whole number is 9223372036854775807 in `seed`";
    check_refusals(root, &[(&large, 2, refused)], &["other"]);
}

#[test]
#[cfg(unix)]
fn a_limit_on_the_size_of_files_is_an_error_and_no_signal() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    hues(&root.join("set"));
    let words = with_settings(&["train", "demo", "--device", "cpu", "--out", "run"], SMALL);
    let mut limited = std::process::Command::new("sh");
    limited.args(["-c", "ulimit -f 60; exec \"$0\" \"$@\""]).arg(program().get_program());
    let output = limited.args(&words).current_dir(root).output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.lines().last().unwrap().contains("make room; files written earlier are complete"),
        "{said}"
    );
    let left = std::fs::read_dir(root.join("run")).unwrap().map(|entry| entry.unwrap().file_name());
    let partial: Vec<_> = left.filter(|name| name.to_string_lossy().contains("partial")).collect();
    assert!(partial.is_empty(), "{partial:?}");
}

#[test]
fn a_study_does_not_take_results_for_those_of_other_images() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    hues(&root.join("set"));
    let study = format!(
        "question = \"which?\"\nsource = \"here\"\nbase = \"demo\"\ncolumns = [\"knn\", \"kn\"]\nset = {SMALL:?}\n[[arm]]\nname = \"日本\"\n"
    );
    write(
        root,
        "study.toml",
        (study + "[[arm]]\nname = \"中国\"\nset = [\"seed=2\"]\n").as_bytes(),
    );
    let words = ["study", "study.toml", "--out", "so", "--device", "cpu"];
    let output = selfsup(root, &words);
    let [_, said] = done(&output);
    assert!(
        said.contains("the column kn is empty: no run of this study has such a number; they have"),
        "{said}"
    );
    let output = selfsup(root, &words);
    assert_eq!(done(&output)[1].matches("done before").count(), 2);
    std::fs::copy(root.join("set/train/ape/1.png"), root.join("set/train/bee/1.png")).unwrap();
    let refused = "so/日本/seed-0/result.json: is the result of other training images: restore them, choose another --out, or remove it";
    check_refusals(root, &[(&words, 1, refused)], &[]);
    std::fs::remove_dir_all(root.join("set")).unwrap();
    hues(&root.join("set"));
    std::fs::copy(root.join("set/test/ape/1.png"), root.join("set/test/bee/1.png")).unwrap();
    check_refusals(root, &[(&words, 1, &refused.replace("training", "held-out"))], &[]);
    // Without the images their results stay what they are.
    std::fs::rename(root.join("set"), root.join("away")).unwrap();
    done(&selfsup(root, &words));
}

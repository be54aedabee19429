//! Mistakes of the command line, of recipes and of the environment.

use std::path::Path;
use std::process::Command;

use selfsup::methods::ALL;
use selfsup::recipes::builtin_names;

use super::{Refused, check_refusals, hues, with_tiny, write};
use crate::program::{selfsup, text};

#[test]
fn mistakes_in_recipes_and_settings_end_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    write(root, "bad.toml", b"seed = ");
    let known = builtin_names().collect::<Vec<_>>().join(", ");
    let no_recipe = format!("no recipe file or built-in recipe no-such; built-in recipes: {known}");
    let methods = ALL.iter().map(|method| method.name).collect::<Vec<_>>().join(", ");
    let unknown_method = format!("unknown method simcrl; known methods: {methods}");
    let no_builtin = format!("unknown recipe nothing; built-in recipes: {known}");
    let cases: &[Refused] = &[
        (&["train", "no-such"], 2, &no_recipe),
        (&["recipes", "nothing"], 2, &no_builtin),
        (
            &["train", "bad.toml"],
            1,
            "bad.toml: not valid TOML: TOML parse error at line 1, column 8; string values must be quoted, expected literal string",
        ),
        (
            &["train", "demo", "--set", "train.epoch=1"],
            2,
            "recipe: unknown field `epoch`, expected one of `epochs`, `batch`, `all_images`, `micro_batches`, `recompute`, `knn_every`, `checkpoint_every`, `checkpoint_every_steps`, `checkpoint_every_minutes`, `keep`, `precision`, `dump_views`, `threads`, `loader_threads`, `init`, `init_classifier`; in `train` (did you mean `epochs`?)",
        ),
        (
            &["train", "demo", "--set", "train.epochs"],
            2,
            "--set takes key.path=value, such as train.epochs=5, not train.epochs",
        ),
        (
            &["train", "demo", "--set", "train.batch=20000"],
            2,
            "a batch of 20000 is larger than the set of 10000 images: lower the batch size",
        ),
        (&["train", "demo", "--set", "method.name=simcrl"], 2, &unknown_method),
        (
            &["train", "demo", "--set", "watch.collapsed_rank_me=nan"],
            2,
            "watch.collapsed_rank_me is NaN; it must be 0 or more",
        ),
        (
            &["train", "simclr-cifar10", "--set", "optim.rule.lars.momentum=nan"],
            2,
            "optim.rule.lars.momentum is NaN; it must be in 0..1",
        ),
        (
            &["train", "demo", "--set", "method.temperature=1e300"],
            2,
            "method.temperature must be in 1e-4..=1e4, not 1e300",
        ),
        (
            &["train", "demo", "--set", "optim.warmup_epochs=1e300"],
            2,
            "optim.warmup_epochs is 1e300; it must be at most 1e6",
        ),
        (
            &["train", "demo", "--set", "train.init="],
            2,
            "train.init is empty: name a file of weights, or leave it out",
        ),
        (
            &["train", "demo", "--set", "optim.warmup_from=1e308"],
            2,
            "optim.warmup_from is 1e308; it must be at most 3.4028234663852886e38",
        ),
        (
            &["train", "demo", "--set", "optim.decay=1"],
            2,
            "recipe: invalid type: unit variant, expected string only; in `optim.decay`: it is one of several choices, given by its name",
        ),
        (
            &["train", "demo", "--set", "optim.rule.adam={}"],
            2,
            "recipe: wanted exactly 1 element, more than 1 element; in `optim.rule`: it is one of several choices: give another one whole, as \
             {name={…}}",
        ),
        (
            &["train", "demo", "--set", "optim.decay={steps={epochs=[1],factor=nan}}"],
            2,
            "optim.decay.steps.factor is NaN; it must be 0 or more",
        ),
        (
            &["train", "demo", "--set", "optim.decay={steps={epochs=[1],factor=10}}"],
            2,
            "optim.decay.steps.factor is 1e1; it must be at most 1e0",
        ),
        (
            &["train", "demo", "--set", "augment.0.normalise={mean=[nan,0,0],std=[1,1,1]}"],
            2,
            "augmentation: normalise.mean = [NaN, 0.0, 0.0] must be numbers",
        ),
        (
            &["train", "demo", "--set", "augment.0.normalise={mean=[0,0,0],std=[1e-30,1,1]}"],
            2,
            "augmentation: normalise.std = [1e-30, 1.0, 1.0] must be positive, between 1e-6 and 1e6",
        ),
        (
            &["tune-lr", "demo", "--device", "cpu", "--set", "optim.lr=0"],
            2,
            "optim.lr is 0, and so are its multiples: give a rate above 0",
        ),
        (
            &["train", "demo", "--set", "augment.repeat=16777216"],
            2,
            "augmentation: repeat = 16777216 must be in 1..=1024",
        ),
    ];
    check_refusals(root, cases, &["runs", "new"]);
    for (words, sentence) in [
        (&["train", "demo", "--device", "gpu"][..], "expected cpu, cuda or cuda:N with N from 0"),
        (&["train", "demo", "--set", "train.precision=fp8"], "unknown variant `fp8`"),
        (&["eval", "knn", "run", "--k", "0"], "0 is not in 1.."),
        (&["pack", "nine", "--out", "x", "--quality", "80"], "not provided"),
        (&["pack", "nine", "--out", "x", "--raw", "--quality", "80"], "cannot be used with"),
        (&["train"], "the following required arguments were not provided"),
        (&["train", "demo", "--resume", "run"], "cannot be used with"),
        (&["fly"], "unrecognized subcommand 'fly'"),
    ] {
        let output = selfsup(root, words);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
        assert!(said.contains(sentence) && output.stdout.is_empty(), "{words:?}: {said}");
    }
}

#[test]
fn a_run_can_be_told_to_carry_on() {
    let folder = tempfile::tempdir().unwrap();
    let wild = ["optim.lr=1e30", "optim.warmup_epochs=0"].map(|setting| ["--set", setting]);
    let train = |more: &[&'static str]| {
        let words = [&["train", "demo", "--device", "cpu"], &wild.concat()[..], more].concat();
        selfsup(folder.path(), &with_tiny(&words))
    };
    let output = train(&["--out", "a"]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap();
    let advice = ": lower optim.lr or lengthen optim.warmup_epochs; watch.carry_on=true continues all the same";
    assert!(last.starts_with("selfsup: the loss became ") && last.ends_with(advice), "{said}");
    let output = train(&["--out", "b", "--set", "watch.carry_on=true"]);
    let said = text(&output.stderr);
    assert!(output.status.success() && said.contains("\nthe loss became "), "{said}");
}

#[test]
fn settings_of_the_environment_and_of_the_shell_are_understood_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    hues(&root.join("2024"));
    let train = |set: &str, home: &Path| {
        let words = with_tiny(&["train", "demo", "--device", "cpu"]);
        let own = ["--set", set, "--out", "run", "--set", "train.epochs=1"];
        let _ = std::fs::remove_dir_all(root.join("run"));
        let output = Command::new(crate::program::path())
            .current_dir(root)
            .env("HOME", home)
            .args([&words[..], &own].concat())
            .output()
            .unwrap();
        (output.status.code(), text(&output.stderr).to_owned())
    };
    for set in ["data.path=2024", "data.path=~/2024"] {
        let (code, said) = train(set, root);
        assert_eq!(code, Some(0), "{set}: {said}");
    }
    let deep = format!("{}=1", vec!["a"; 20_000].join("."));
    for (set, sentence) in [
        (&*deep, "the key has 20000 parts"),
        ("train.batch=8\nepochs = 2", "in `train.batch`"),
        ("data.path=", "data.path is empty: name the folder of the images"),
        ("train.threads=1000000", "train.threads is 1000000; it must be at most 1024"),
        ("train.loader_threads=99999", "train.loader_threads is 99999; it must be at most 1024"),
    ] {
        let (code, said) = train(set, root);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(sentence) && !said.contains("panicked"), "{said}");
    }
    let known = "it must be portable, avx2 or avx512";
    for (variable, value, sentence) in [
        ("SELFSUP_ISA", "avx1024", format!("SELFSUP_ISA is `avx1024`; {known}")),
        ("SELFSUP_ISA", "", format!("SELFSUP_ISA is ``; {known}")),
        (
            "RAYON_NUM_THREADS",
            "99999999",
            "RAYON_NUM_THREADS is 99999999; it must be at most 1024".into(),
        ),
    ] {
        let program = || {
            let mut program = Command::new(crate::program::path());
            program.current_dir(root).env(variable, value);
            program
        };
        for words in [&["devices"][..], &["demo"], &["bench", "conv2d"]] {
            let output = program().args(words).output().unwrap();
            let said = text(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{words:?}: {said}");
            assert!(said.contains(&sentence) && !said.contains("panicked"), "{words:?}: {said}");
        }
    }
}

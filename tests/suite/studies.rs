//! Every built-in study runs all its arms once, at a fraction of their width and for a step or two; what a study leaves alone,
//! refuses, and says about runs without a result.

use std::cell::RefCell;
use std::path::Path;

use selfsup::device::Device;
use selfsup::error::Result;
use selfsup::recipes::{self, Recipe};
use selfsup::train::{EpochReport, StepReport, Study, StudyPlan, Watch};

use crate::recipes::reduce;

struct Silent;

impl Watch for Silent {
    fn step(&mut self, _: &StepReport) {}
    fn epoch(&mut self, _: &EpochReport) {}
    fn note(&mut self, _: &str) {}
}

/// Shrinks a recipe to one step of a narrow network.
fn cheap(recipe: &mut Recipe) {
    reduce(recipe, &Device::reference());
    (recipe.data.limit, recipe.data.test_limit) = (8, 4);
}

#[test]
fn every_study_runs_its_arms_at_reduced_width_and_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut arms = 0;
    for name in recipes::builtin_studies() {
        let study = Study::load(name).unwrap_or_else(|e| panic!("{name}: {e}"));
        // As they are, not as they are shrunk below: a batch fits into the images that an arm has.
        for arm in &study.arms {
            let recipe =
                study.recipe(arm, &[]).unwrap_or_else(|e| panic!("{name}, {}: {e}", arm.name));
            let percent = recipe.data.labels.as_deref().and_then(|labels| labels.strip_suffix('%'));
            let share = percent.map_or(1.0, |percent| percent.parse::<f64>().unwrap() / 100.0);
            let (images, batch) = (recipe.data.limit as f64 * share, recipe.train.batch as f64);
            assert!(images >= batch, "{name}, {}: a batch of {batch} of {images} images", arm.name);
        }
        let (out, told) = (folder.path().join(name), RefCell::new(Vec::new()));
        let plan = StudyPlan {
            out: &out,
            settings: &[],
            seeds: 1,
            device: &|_| Device::cpu(1),
            adjust: &cheap,
            watch: &|_| Box::new(Silent) as Box<dyn Watch>,
            tell: &|line| told.borrow_mut().push(line.to_owned()),
        };
        let outcomes = study.run(&plan).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(outcomes.len(), study.arms.len(), "{name}");
        // A column that no arm has is a misspelt name.
        for column in &study.columns {
            let known = outcomes.iter().any(|outcome| outcome.values.contains_key(column));
            assert!(known, "{name}: no arm has {column}");
        }
        let table = std::fs::read_to_string(out.join("table.md")).unwrap();
        assert_eq!(table.lines().count(), study.arms.len() + 4, "{name}: {table}");
        arms += outcomes.len();
        let again = study.run(&plan).unwrap();
        assert_eq!(study.markdown(&again).trim_end(), table.trim_end(), "{name}");
        let repeated = told.borrow();
        let repeated = repeated.iter().filter(|line| line.ends_with("done before"));
        assert_eq!(repeated.count(), study.arms.len(), "{name}");
    }
    println!("studies: {}, arms: {arms}", recipes::builtin_studies().count());
}

/// An interrupted arm starts again; results of other settings are refused.
#[test]
fn a_study_continues_where_it_stopped_and_not_with_other_settings() {
    let folder = tempfile::tempdir().unwrap();
    let study = Study::load("byol-norm").unwrap();
    let run = |settings: &[String]| {
        let plan = StudyPlan {
            out: folder.path(),
            settings,
            seeds: 1,
            device: &|_| Device::cpu(1),
            adjust: &cheap,
            watch: &|_| Box::new(Silent) as Box<dyn Watch>,
            tell: &|_| {},
        };
        study.run(&plan)
    };
    let first = run(&[]).unwrap();
    let cell = folder.path().join("none-in-the-heads/seed-0");
    std::fs::remove_file(cell.join("result.json")).unwrap();
    let second = run(&[]).unwrap();
    let losses = |outcomes: &[selfsup::train::Outcome]| -> Vec<f64> {
        outcomes.iter().map(|outcome| outcome.values["loss"]).collect()
    };
    assert_eq!(losses(&first), losses(&second));
    let error = run(&["optim.lr=0.125".into()]).unwrap_err().to_string();
    assert!(error.contains("result of other settings"), "{error}");
}

/// A study of one arm, two epochs of one step each.
const SMALL: &str = r#"
    question = "Does it?"
    source = "here"
    base = "demo"
    set = ["watch.report=false"]
    columns = ["knn", "loss"]
    [[arm]]
    name = "a"
"#;

/// Runs a study that is written in TOML.
fn run_in(folder: &Path, study: &str, seeds: u64, tell: &dyn Fn(&str)) -> Result<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), study).unwrap();
    let study = Study::load(file.path().to_str().unwrap())?;
    let plan = StudyPlan {
        out: folder,
        settings: &[],
        seeds,
        device: &|_| Device::cpu(1),
        adjust: &|recipe| {
            cheap(recipe);
            recipe.train.epochs = 2;
        },
        watch: &|_| Box::new(Silent) as Box<dyn Watch>,
        tell,
    };
    study.run(&plan).map(|outcomes| study.markdown(&outcomes))
}

fn error_in(folder: &Path, study: &str) -> String {
    run_in(folder, study, 1, &|_| {}).unwrap_err().to_string()
}

#[test]
fn a_second_study_in_a_folder_is_refused_while_the_first_runs() {
    let folder = tempfile::tempdir().unwrap();
    let second = RefCell::new(String::new());
    // The second study starts while the first one works.
    let first = run_in(folder.path(), SMALL, 2, &|_| {
        *second.borrow_mut() = error_in(folder.path(), SMALL);
    });
    assert!(second.borrow().contains("is in use"), "{}", second.borrow());
    let alone = tempfile::tempdir().unwrap();
    assert_eq!(first.unwrap(), run_in(alone.path(), SMALL, 2, &|_| {}).unwrap());
}

#[test]
fn a_damaged_result_is_an_error_and_files_of_the_user_stay() {
    let folder = tempfile::tempdir().unwrap();
    let table = run_in(folder.path(), SMALL, 1, &|_| {}).unwrap();
    let cell = folder.path().join("a/seed-0");
    let (result, notes) = (cell.join("result.json"), cell.join("notes.txt"));
    let good = std::fs::read(&result).unwrap();
    std::fs::write(&notes, "mine").unwrap();
    for damaged in [[&good[..], b"\xff"].concat(), b"{}".to_vec(), Vec::new()] {
        std::fs::write(&result, damaged).unwrap();
        let error = error_in(folder.path(), SMALL);
        assert!(error.contains("result.json: ") && error.contains("remove it"), "{error}");
    }
    std::fs::remove_file(&result).unwrap();
    let error = error_in(folder.path(), SMALL);
    assert!(error.contains("seed-0: holds notes.txt, which no run of this study wrote"), "{error}");
    assert_eq!(std::fs::read_to_string(&notes).unwrap(), "mine");
    assert!(cell.join("metrics.jsonl").exists());
    std::fs::remove_file(&notes).unwrap();
    assert_eq!(run_in(folder.path(), SMALL, 1, &|_| {}).unwrap(), table);
}

#[test]
fn a_study_leaves_a_folder_of_something_else_alone() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["table.md", "recipe.toml", "a photo.jpg"] {
        let file = folder.path().join(name);
        std::fs::write(&file, "mine").unwrap();
        let error = error_in(folder.path(), SMALL);
        assert!(
            error.contains(&format!("holds {name}, which this study did not write")),
            "{error}"
        );
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        std::fs::remove_file(&file).unwrap();
    }
    run_in(folder.path(), SMALL, 1, &|_| {}).unwrap();
    let error = error_in(folder.path(), &SMALL.replace("Does it?", "Or not?"));
    assert!(error.contains("holds another study"), "{error}");
}

/// A run that continues after NaN ends with a loss of NaN and a kNN accuracy at chance level.
#[test]
fn seeds_that_end_in_nan_are_counted_and_not_averaged() {
    let folder = tempfile::tempdir().unwrap();
    let settings = r#""watch.carry_on=true", "optim.lr=1e38", "optim.warmup_epochs=0""#;
    let study = SMALL.replace(r#""watch.report=false""#, settings);
    let table = run_in(folder.path(), &study, 2, &|_| {}).unwrap();
    assert!(table.contains("2 of 2 seeds: "), "{table}");
    let row = table.lines().last().unwrap();
    assert!(row.starts_with("| a   | -   | -    |"), "{table}");
}

//! Every built-in study runs all its arms, at a fraction of their width and for a step or two, and is not run twice.

use std::cell::RefCell;

use selfsup::device::Device;
use selfsup::recipes::{self, Recipe};
use selfsup::train::{EpochReport, StepReport, Study, StudyPlan, Watch};

use crate::recipes::reduce;

struct Nobody;

impl Watch for Nobody {
    fn step(&mut self, _: &StepReport) {}
    fn epoch(&mut self, _: &EpochReport) {}
    fn note(&mut self, _: &str) {}
}

/// One step of a narrow network.
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
        let (out, told) = (folder.path().join(name), RefCell::new(Vec::new()));
        let plan = StudyPlan {
            out: &out,
            settings: &[],
            seeds: 1,
            device: &|_| Device::cpu(1),
            adjust: &cheap,
            watch: &|_| Box::new(Nobody) as Box<dyn Watch>,
            tell: &|line| told.borrow_mut().push(line.to_owned()),
        };
        let outcomes = study.run(&plan).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(outcomes.len(), study.arms.len(), "{name}");
        // A column that no arm has is a name that nobody measures.
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

/// An arm that was interrupted is begun again, one of other settings refused.
#[test]
fn a_study_goes_on_where_it_was_and_not_with_other_settings() {
    let folder = tempfile::tempdir().unwrap();
    let study = Study::load("byol-norm").unwrap();
    let run = |settings: &[String]| {
        let plan = StudyPlan {
            out: folder.path(),
            settings,
            seeds: 1,
            device: &|_| Device::cpu(1),
            adjust: &cheap,
            watch: &|_| Box::new(Nobody) as Box<dyn Watch>,
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

//! A primitive is complete when it is in every place that checks or measures it. One test derives the list of primitives from
//! the sources and says for each what is missing and where to add it; `docs/adding.md` walks through one.

use std::collections::BTreeSet;
use std::path::Path;

use selfsup::bench::{Extent, cases as bench_cases};
use selfsup::tensor::DType;

use crate::cases::{HOST_ONLY, PRIMITIVES, Row, rows};
use crate::golden::Goldens;
use crate::layers::sources;

/// Operations on a `Var` that are public but have no case of their own, with the reason.
const WITHOUT_CASE: [(&str, &str); 0] = [];

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Public functions under `src/ops` that return a recorded value: `pub fn name<'t>(`.
fn primitives() -> BTreeSet<String> {
    let mut files = Vec::new();
    sources(Path::new("src/ops"), &mut files);
    let mut names = BTreeSet::new();
    for file in files {
        for rest in read(file.to_str().unwrap()).split("\npub fn ").skip(1) {
            if let Some((name, _)) =
                rest.split_once("<'t>(").filter(|(name, _)| !name.contains('('))
            {
                names.insert(name.to_owned());
            }
        }
    }
    names
}

/// The kernels in `kernels/`, by name.
fn kernels() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for file in std::fs::read_dir("kernels").unwrap() {
        let text = read(file.unwrap().path().to_str().unwrap());
        for line in text.lines().filter(|line| line.starts_with("KERNEL")) {
            let name = line.split_once("void ").unwrap().1.split('(').next().unwrap();
            names.insert(name.to_owned());
        }
    }
    names
}

/// What a primitive still needs.
fn missing(name: &str, names: &BTreeSet<String>, kernels: &BTreeSet<String>) -> Vec<String> {
    let mut missing = Vec::new();
    let mut need = |holds: bool, what: &str| {
        if !holds {
            missing.push(format!("{name}: {what}"));
        }
    };
    need(
        PRIMITIVES.iter().any(|(known, _)| *known == name),
        "src/check/cases.rs: an entry in PRIMITIVES that builds the inputs and calls it",
    );
    let own = |row: &Row| row.primitive() == name;
    need(
        rows().iter().filter(|row| own(row)).count() > 1,
        "src/check/cases.txt: rows with sizes of one, primes, and no multiples of the tiles",
    );
    need(
        read("scripts/goldens/primitives.py").contains(&format!("def {name}(row)")),
        "scripts/goldens/primitives.py: a function that computes the same in PyTorch, listed in ALL",
    );
    let goldens = Goldens::open("primitives");
    let golden = |line: &str| goldens.names().any(|n| n.split('|').next() == Some(line));
    need(
        rows().iter().filter(|row| own(row)).all(|row| golden(row.line())),
        "tests/goldens/primitives.safetensors: its rows; run scripts/make-goldens primitives",
    );
    // A kernel belongs to the primitive with the longest name that its own begins with.
    let owner = |kernel: &str| {
        let begins = |name: &&String| {
            let rest = kernel.strip_prefix(name.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('_'))
        };
        names.iter().filter(begins).max_by_key(|name| name.len()).map(String::as_str)
    };
    let has_kernels = kernels.iter().any(|kernel| owner(kernel) == Some(name));
    if !has_kernels || HOST_ONLY.contains(&name) {
        return missing;
    }
    let cases = bench_cases(&Extent::TINY, DType::F32, "");
    let has_case = cases.iter().any(|case| case.name.split([' ', '+']).next() == Some(name));
    let plan = read("src/bench/plan.rs");
    let list = plan.split("const WITHOUT_CASE").nth(1).unwrap().split("];").next().unwrap();
    let excused =
        list.lines().filter_map(|line| line.trim().strip_prefix("(\"")?.split('"').next());
    let excused: Vec<&str> = excused.collect();
    need(
        has_case || excused.iter().any(|prefix| name.starts_with(prefix.trim_end_matches('_'))),
        "src/bench/: a case whose name starts with the primitive's, or a reason in WITHOUT_CASE of src/bench/plan.rs",
    );
    need(
        !has_case
            || name == "conv2d"
            || read("benches/peers/gpu.py").contains(&format!("def {name}(")),
        "benches/peers/gpu.py: a function that runs the same in PyTorch, listed in MAKERS",
    );
    missing
}

#[test]
fn every_primitive_is_complete() {
    let (names, kernels) = (primitives(), kernels());
    for known in ["add", "conv2d", "nt_xent", "sum"] {
        assert!(names.contains(known), "no {known} among {names:?}");
    }
    let excused = |name: &str| WITHOUT_CASE.iter().any(|(known, _)| *known == name);
    let missing: Vec<String> = names
        .iter()
        .filter(|name| !excused(name))
        .flat_map(|name| missing(name, &names, &kernels))
        .collect();
    assert!(missing.is_empty(), "docs/adding.md says how; missing:\n  {}", missing.join("\n  "));
}

/// The test of the test: a primitive that is nowhere is asked for everything.
#[test]
fn an_unknown_primitive_is_asked_for_each_part() {
    let kernels = BTreeSet::from(["unheard_of_f32".to_owned()]);
    let missing = missing("unheard_of", &BTreeSet::from(["unheard_of".into()]), &kernels);
    for part in ["cases.rs", "cases.txt", "primitives.py", "src/bench/"] {
        assert!(missing.iter().any(|line| line.contains(part)), "{part} is not in {missing:?}");
    }
}

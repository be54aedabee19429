//! N ranks equal one: real processes, started by MPICH's `mpiexec` (`scripts/fetch-mpi`), train what one process trains.
//!
//! A test here starts the test binary again in several processes, for the same test; these train all cases and write what came
//! out. The cases are complete runs: six steps on a folder with broken images, and an evaluation.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use selfsup::device::{Device, Group};
use selfsup::methods::State;
use selfsup::optim::{Lars, Rule, Sgd};
use selfsup::recipes::Recipe;
use selfsup::train::{EpochReport, Run, StepReport, Watch};

use crate::compare::{close, norm, report};
use crate::recipes::{reduced, small_recipe, teacher};

/// Marks a process as a rank of a test, and names the folder of the test.
const FOLDER: &str = "SELFSUP_TEST_RANKS";

/// How `mpiexec` starts `ranks` processes of this test binary for one test.
pub fn mpiexec(ranks: usize, name: &str, folder: &Path) -> Command {
    let mut command = Command::new(std::fs::canonicalize(".mpi/bin/mpiexec").unwrap());
    command.args(["-n", &ranks.to_string()]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture"]).env(FOLDER, folder);
    command
}

/// The folder of the test, in a process that is one of its ranks.
pub fn as_rank() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(Into::into)
}

#[track_caller]
pub fn succeed(mut command: Command) {
    let output = command.output().expect("mpiexec starts");
    let said = [&output.stdout[..], &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(output.status.success(), "{command:?}\n{}\n{}", said[0], said[1]);
}

/// A run that several ranks must train as one does.
pub struct Case {
    pub name: &'static str,
    method: &'static str,
    settings: &'static [&'static str],
    rule: fn() -> Rule,
}

fn lars() -> Rule {
    Rule::Lars(Lars::simclr(0.9, 1e-4))
}

fn larc() -> Rule {
    Rule::Lars(Lars { clip: true, ..Lars::larc(0.9, 1e-4) })
}

fn sgd() -> Rule {
    let exclude = selfsup::optim::Exclude::Nothing;
    Rule::Sgd(Sgd { momentum: 0.9, nesterov: false, weight_decay: 1e-4, exclude })
}

const fn case(
    name: &'static str,
    method: &'static str,
    settings: &'static [&'static str],
    rule: fn() -> Rule,
) -> Case {
    Case { name, method, settings, rule }
}

/// Micro-batches that four ranks can share.
const MICRO: [&str; 3] = ["train.micro_batches=2", "train.batch=24", "train.epochs=6"];
/// Two images in each group of batch norm, and larger ones: of two rows batch norm would multiply rounding errors.
const GROUPS: [&str; 3] = ["network.norm_groups=12", "train.batch=24", "train.epochs=6"];

/// Every figure of an evaluation, on one step in an epoch, as validation images are not trained on.
const EVALUATED: [&str; 3] = ["watch.quality=true", "data.validation=0.2", "train.epochs=6"];

pub const CASES: &[Case] = &[
    case("simclr, LARS", "simclr", &EVALUATED, lars),
    case("simclr, SGD, micro-batches", "simclr", &MICRO, sgd),
    case("simclr, logistic loss", "simclr", &["method.loss=nt-logistic"], sgd),
    case(
        "simclr, semi-hard margin",
        "simclr",
        &["method.loss=margin", "method.semi_hard=true"],
        lars,
    ),
    case("simclr, any length", "simclr", &["method.normalise=false"], sgd),
    case("simclr, attract", "simclr", &["method.loss=attract", "method.predictor=8"], sgd),
    case("simclr-v2", "simclr-v2", &["method.memory=0"], lars),
    case(
        "simclr-v2, SGD, micro-batches",
        "simclr-v2",
        &["method.memory=0", MICRO[0], MICRO[1], MICRO[2]],
        sgd,
    ),
    case("simclr-v2, memory", "simclr-v2", &["method.memory=48"], lars),
    case("simclr-v2, memory, SGD", "simclr-v2", &["method.memory=48"], sgd),
    case(
        "moco, groups and shuffle",
        "moco",
        &[GROUPS[0], GROUPS[1], GROUPS[2], "method.queue=48", "method.symmetric=false"],
        sgd,
    ),
    case("moco, symmetric", "moco", &["method.queue=48", "method.symmetric=true"], sgd),
    case(
        "moco, micro-batches",
        "moco",
        &["method.queue=48", "method.symmetric=true", MICRO[0], MICRO[1], MICRO[2]],
        lars,
    ),
    case(
        "moco, end to end",
        "moco",
        &["method.dictionary=end-to-end", "method.symmetric=false"],
        sgd,
    ),
    case(
        "moco, memory bank",
        "moco",
        &["method.dictionary=memory-bank", "method.symmetric=false"],
        sgd,
    ),
    case("swav, queue", "swav", &["method.queue=24"], larc),
    case("swav, micro-batches", "swav", &["method.queue=24", MICRO[0], MICRO[1], MICRO[2]], sgd),
    case("byol, LARS", "byol", &[], lars),
    case("byol, groups", "byol", &GROUPS, sgd),
    case("byol, micro-batches", "byol", &MICRO, sgd),
    case("simsiam", "simsiam", &[], sgd),
    case("simsiam, alternating", "simsiam", &["method.target_every=2"], lars),
    case("simsiam, micro-batches", "simsiam", &MICRO, sgd),
    case("supervised, SGD", "supervised", &["method.label_smoothing=0.1"], sgd),
    case("supervised, LARS", "supervised", &[], lars),
    case("distill", "distill", &[], sgd),
    case("distill, LARS", "distill", &[], lars),
];

impl Case {
    pub fn recipe(&self, folder: &Path) -> Recipe {
        let mut recipe = reduced(small_recipe(self.method), &Device::reference());
        recipe.network.norm_groups = 1;
        if self.method == "distill" {
            let file = folder.join("teacher.safetensors").display().to_string();
            recipe.method.settings["teacher"]
                .as_table_mut()
                .unwrap()
                .insert("file".into(), file.into());
        }
        for policy in &mut recipe.augment {
            policy.size = if self.settings.contains(&GROUPS[0]) { 16 } else { 8 };
        }
        recipe.optim.rule = (self.rule)();
        let common = [
            &*format!("data.path={}", folder.join("images").display()),
            "data.limit=0",
            "data.test_limit=0",
            "data.max_skipped=0.5",
            "train.batch=12",
            "train.epochs=3",
            "train.checkpoint_every_steps=4",
            "watch.report=false",
            "watch.carry_on=true",
        ];
        let settings = common.iter().chain(self.settings).map(|s| s.to_string());
        recipe.with(&settings.collect::<Vec<_>>()).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }
}

/// 27 images to train on, of which two are broken, and 6 to test on, in two classes.
fn write_images(folder: &Path) {
    for (part, count) in [("train", 27_u8), ("test", 6)] {
        for i in 0..count {
            let class = folder.join(part).join(["ape", "bee"][usize::from(i % 2)]);
            std::fs::create_dir_all(&class).unwrap();
            let file = class.join(format!("{i:02}.png"));
            if part == "train" && (i == 5 || i == 18) {
                std::fs::write(file, "no image").unwrap();
                continue;
            }
            let pixel = |x: u32, y: u32| {
                let place = (x * (u32::from(i) + 3) + y * 7) as u8;
                image::Rgb([place.wrapping_mul(17), place.wrapping_add(i.wrapping_mul(40)), i * 9])
            };
            image::RgbImage::from_fn(12, 12, pixel).save(file).unwrap();
        }
    }
}

#[derive(Default)]
struct Quiet;

impl Watch for Quiet {
    fn step(&mut self, _: &StepReport) {}
    fn epoch(&mut self, _: &EpochReport) {}
    fn note(&mut self, _: &str) {}
}

/// What a run left: its weights, statistics and state, and the numbers of its log.
pub type Outcome = BTreeMap<String, Vec<f64>>;

pub fn train(case: &Case, folder: &Path, out: &str, device: &Device, group: &Group) -> Outcome {
    let folder_of_run = folder.join(out);
    let recipe = case.recipe(folder);
    let run = Run::in_group(&recipe, device, Some(&folder_of_run), group);
    let mut run = run.unwrap_or_else(|e| panic!("{}: {e}", case.name));
    assert_eq!(run.schedule().total, 6, "{}", case.name);
    let mut outcome = Outcome::new();
    match run.train(&mut Quiet) {
        Ok(()) => {}
        Err(error) if error.to_string().contains("differ from those of rank 0") => {
            outcome.insert("the ranks' weights differ".into(), Vec::new());
        }
        Err(error) => panic!("{}: {error}", case.name),
    }
    outcome.insert("weights".into(), run.online().values().to_f64());
    outcome.insert("statistics".into(), run.online().statistics().to_f64());
    for (name, part) in run.state() {
        let values = match part {
            State::Network(network) => {
                outcome.insert(format!("{name}, statistics"), network.statistics().to_f64());
                network.values().to_f64()
            }
            State::Rows(rows) => rows.to_f64(),
            State::Count(count) => vec![*count as f64],
        };
        outcome.insert(name.into(), values);
    }
    drop(run);
    if group.leads() {
        log(&folder_of_run, &mut outcome);
        std::fs::remove_dir_all(&folder_of_run).unwrap();
    }
    outcome
}

/// Adds the numbers of a run's log.
fn log(folder: &Path, outcome: &mut Outcome) {
    let mut add = |key: &str, value: &serde_json::Value| {
        if let Some(number) = value.as_f64() {
            outcome.entry(format!("log: {key}")).or_default().push(number);
        }
    };
    let text = std::fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        for key in [
            "loss",
            "embedding_std",
            "effective_rank",
            "uniformity",
            "prototypes_used",
            "knn",
            "validation",
            "accuracy",
        ] {
            add(key, &line[key]);
        }
        for (key, value) in line["monitors"].as_object().into_iter().flatten() {
            add(key, value);
        }
        for (key, value) in line["quality"].as_object().into_iter().flatten() {
            add(&format!("{QUALITY}{key}"), value);
        }
    }
    let skipped = std::fs::read_to_string(folder.join("skipped.txt")).unwrap();
    outcome.insert("skipped".into(), vec![skipped.lines().count() as f64]);
}

fn save(outcomes: &BTreeMap<String, Outcome>, file: &Path) {
    std::fs::write(file, serde_json::to_vec(outcomes).unwrap()).unwrap();
}

fn load(file: &Path) -> BTreeMap<String, Outcome> {
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}

/// The cases for so many ranks. More than two are many for the cores of a test machine: they train one case of each method, or all
/// with `RANKS=all`.
fn cases(ranks: usize) -> Vec<&'static Case> {
    let all = ranks <= 2 || std::env::var_os("RANKS").is_some();
    let mut methods = BTreeSet::new();
    CASES.iter().filter(|case| methods.insert(case.method) || all).collect()
}

fn all(folder: &Path, device: &Device, group: &Group) -> BTreeMap<String, Outcome> {
    let name = |case: &Case| case.name.to_owned();
    let cases = cases(group.size()).into_iter();
    cases.map(|case| (name(case), train(case, folder, "run", device, group))).collect()
}

/// What a rank does: trains all cases, and writes what came out and what crossed the ranks.
fn work(folder: &Path, device: &Device) {
    let group = Group::launched().unwrap();
    let outcomes = all(folder, device, &group);
    if group.leads() {
        save(&outcomes, &folder.join(group.size().to_string()));
        let names: BTreeSet<&str> = group.traffic().iter().map(|traffic| traffic.what).collect();
        std::fs::write(folder.join("crossed"), serde_json::to_vec(&names).unwrap()).unwrap();
    }
    group.leave();
}

/// The images and the teacher.
pub fn prepare() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_images(&folder.path().join("images"));
    let device = Device::cpu(1).unwrap();
    let mut recipe = reduced(small_recipe("distill"), &device);
    recipe.data.path = folder.path().join("images").display().to_string();
    (recipe.data.limit, recipe.data.test_limit, recipe.data.max_skipped) = (0, 0, 0.5);
    teacher(&mut recipe, folder.path(), &device);
    let file = recipe.method.settings["teacher"]["file"].as_str().unwrap().to_owned();
    std::fs::rename(file, folder.path().join("teacher.safetensors")).unwrap();
    folder
}

/// Before the names of figures of an evaluation's features.
const QUALITY: &str = "quality, ";

/// Compares all that two runs left.
fn compared(got: &Outcome, want: &Outcome, tolerance: f64) -> Vec<Result<f64, String>> {
    if !got.keys().eq(want.keys()) {
        return vec![Err(format!("{:?} and not {:?}", got.keys(), want.keys()))];
    }
    let compare = |(name, got): (&String, &Vec<f64>)| {
        // Singular values of zero are square roots of rounding errors, and what is measured of features is measured of f32.
        let rank = name.ends_with("effective_rank");
        let loose = rank || name.starts_with(&format!("log: {QUALITY}"));
        close(name, got, &want[name], if loose { tolerance.max(1e-6) } else { tolerance })
    };
    got.iter().map(compare).collect()
}

/// The largest relative error of two outcomes of training in f64.
const EXACT: f64 = 1e-10;

#[test]
#[cfg_attr(no_mpi, ignore = "needs MPI: run scripts/fetch-mpi")]
fn n_ranks_equal_one_in_f64() {
    let device = Device::reference();
    if let Some(folder) = as_rank() {
        return work(&folder, &device);
    }
    let folder = prepare();
    let one = all(folder.path(), &device, &Group::alone());
    for ranks in [2, 3, 4] {
        succeed(mpiexec(ranks, "ranks::n_ranks_equal_one_in_f64", folder.path()));
        let several = load(&folder.path().join(ranks.to_string()));
        let (mut equal, cases) = (0, cases(ranks));
        for case in &cases {
            let name = format!("{}, {ranks} ranks", case.name);
            report(&name, compared(&several[case.name], &one[case.name], EXACT));
            equal += 1;
        }
        println!("{ranks} ranks equal one: {equal} of {}", cases.len());
    }
    let crossed = std::fs::read(folder.path().join("crossed")).unwrap();
    let crossed: BTreeSet<String> = serde_json::from_slice(&crossed).unwrap();
    let needed = NEEDED.iter().map(|(what, _)| *what);
    let known: BTreeSet<String> = needed.chain(AGREEMENTS).map(str::to_owned).collect();
    assert!(crossed.is_subset(&known), "collectives that no test leaves out: {crossed:?}");
}

/// f32 rounds differently on several ranks: two ranks are as far from f64 as one, within a factor of four. Where rounding flips a ReLU
/// a run of either kind moves away by a thousand times more, so that the middle and the worst of all cases are compared, not each.
#[test]
#[cfg_attr(no_mpi, ignore = "needs MPI: run scripts/fetch-mpi")]
fn two_ranks_are_as_close_to_f64_as_one_in_f32() {
    let device = Device::cpu(1).unwrap();
    if let Some(folder) = as_rank() {
        return work(&folder, &device);
    }
    let folder = prepare();
    let exact = all(folder.path(), &Device::reference(), &Group::alone());
    let one = all(folder.path(), &device, &Group::alone());
    succeed(mpiexec(2, "ranks::two_ranks_are_as_close_to_f64_as_one_in_f32", folder.path()));
    let two = load(&folder.path().join("2"));
    let distances = |outcomes: &BTreeMap<String, Outcome>| {
        let distance = |case: &Case| {
            let (got, want) = (&outcomes[case.name]["weights"], &exact[case.name]["weights"]);
            let apart: Vec<f64> = got.iter().zip(want).map(|(got, want)| got - want).collect();
            norm(&apart) / norm(want)
        };
        let mut all: Vec<f64> = CASES.iter().map(distance).collect();
        all.sort_by(f64::total_cmp);
        [all[all.len() / 2], all[all.len() - 1]]
    };
    let [[middle, worst], [own_middle, own_worst]] = [distances(&two), distances(&one)];
    println!(
        "middle and worst of two ranks {middle:.1e} {worst:.1e}, of one {own_middle:.1e} {own_worst:.1e}"
    );
    assert!(middle <= 4.0 * own_middle, "{middle:.1e}, one rank {own_middle:.1e}");
    assert!(worst <= 4.0 * own_worst, "{worst:.1e}, one rank {own_worst:.1e}");
}

/// Collectives on which the course of a run depends, not its numbers.
const AGREEMENTS: [&str; 10] = [
    "kinds of devices",
    "identities of GPUs",
    "the meeting point of GPUs",
    "whether a rank failed",
    "whether to stop or save",
    "the recipe",
    "the images",
    "checksums of the weights",
    "accuracies",
    "skipped images",
];

/// All other collectives, each with a case that needs it.
const NEEDED: [(&str, &str); 17] = [
    ("answers", "supervised, SGD"),
    ("Sinkhorn's maximum", "swav, queue"),
    ("Sinkhorn's sums", "swav, queue"),
    ("batch norm's gradients", "simclr, LARS"),
    ("batch norm's statistics", "byol, LARS"),
    ("features", "simclr, LARS"),
    ("gradients", "supervised, SGD"),
    ("gradients of rows", "moco, end to end"),
    ("images of keys", "moco, groups and shuffle"),
    ("keys", "simclr-v2, memory"),
    ("losses", "byol, LARS"),
    ("monitors", "simsiam"),
    ("queued rows", "swav, queue"),
    ("rows", "simclr, LARS"),
    ("rows of the bank", "moco, memory bank"),
    ("sums of rows", "simclr-v2"),
    ("running statistics", "moco, groups and shuffle"),
];

/// Each collective is needed: without it, two ranks do not equal one. Among them are faults that libraries shipped: batch norm of
/// each rank's own rows, and negatives gathered without their gradients.
#[test]
#[cfg_attr(no_mpi, ignore = "needs MPI: run scripts/fetch-mpi")]
fn every_collective_left_out_is_caught() {
    let device = Device::reference();
    let case_of = |name: &str| CASES.iter().find(|case| case.name == name).unwrap();
    if let Some(folder) = as_rank() {
        let group = Group::launched().unwrap();
        let wrong = |(what, case): &(&'static str, &str)| {
            group.leave_out(Some(what));
            let outcome = train(case_of(case), &folder, "wrong", &device, &group);
            group.leave_out(None);
            ((*what).to_owned(), outcome)
        };
        let outcomes = NEEDED.iter().map(wrong).collect();
        if group.leads() {
            save(&outcomes, &folder.join("wrong.json"));
        }
        return group.leave();
    }
    let folder = prepare();
    succeed(mpiexec(2, "ranks::every_collective_left_out_is_caught", folder.path()));
    let outcomes = load(&folder.path().join("wrong.json"));
    let mut right = BTreeMap::new();
    for (what, case) in NEEDED {
        let alone = || train(case_of(case), folder.path(), "right", &device, &Group::alone());
        let want: &Outcome = right.entry(case).or_insert_with(alone);
        let complaints = compared(&outcomes[what], want, 1e-6).into_iter().filter_map(Result::err);
        let complaints: Vec<String> = complaints.collect();
        assert!(!complaints.is_empty(), "{case}: without {what} nothing differs");
        println!("without {what}, {case}: {}", complaints[0]);
    }
}

/// The libraries that are tried: MPICH's two interfaces, and Open MPI if the machine has it.
#[test]
#[cfg_attr(no_mpi, ignore = "needs MPI: run scripts/fetch-mpi")]
fn collectives_of_every_element_type_are_right_in_every_interface() {
    const NAME: &str = "ranks::collectives_of_every_element_type_are_right_in_every_interface";
    if as_rank().is_some() {
        return collectives();
    }
    let folder = tempfile::tempdir().unwrap();
    for library in ["libmpi.so.12", "libmpi_abi.so.1"] {
        let library = std::fs::canonicalize(".mpi/lib").unwrap().join(library);
        let mut command = mpiexec(3, NAME, folder.path());
        command.env("SELFSUP_MPI", &library);
        succeed(command);
        println!("tried {}", library.display());
    }
    let Some(mpirun) = ["/usr/bin/mpirun.openmpi", "/usr/lib64/openmpi/bin/mpirun"]
        .into_iter()
        .find(|file| Path::new(file).is_file())
    else {
        return println!("skipped: Open MPI is not installed (openmpi-bin)");
    };
    let mut command = Command::new(mpirun);
    command.args(["--oversubscribe", "-n", "3"]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", NAME, "--nocapture"]).env(FOLDER, folder.path());
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    succeed(command);
    println!("tried Open MPI");
}

fn collectives() {
    use half::bf16;

    let group = Group::launched().unwrap();
    let (rank, size) = (group.rank(), group.size());
    assert_eq!(size, 3);
    let own = |i: usize| (rank + 1) * (i + 1);
    let sum = |i: usize| 6 * (i + 1);
    macro_rules! reduced {
        ($($type:ty, $cast:expr);*) => {
            $(
                let cast = $cast;
                let mut values: Vec<$type> = (0..5).map(|i| cast(own(i))).collect();
                group.all_reduce_sum("test", &mut values);
                assert_eq!(values, (0..5).map(|i| cast(sum(i))).collect::<Vec<$type>>());
                let mut values: Vec<$type> = (0..5).map(|i| cast(own(i))).collect();
                group.all_reduce_max("test", &mut values);
                assert_eq!(values, (0..5).map(|i| cast(3 * (i + 1))).collect::<Vec<$type>>());
                let all = group.all_gather("test", &[cast(own(1)), cast(7)]).unwrap();
                assert_eq!(all, [2, 7, 4, 7, 6, 7].map(cast));
                let mut values = [cast(own(0)), cast(own(1))];
                group.broadcast("test", &mut values);
                assert_eq!(values, [cast(1), cast(2)]);
            )*
        };
    }
    reduced!(
        f32, |v: usize| v as f32; f64, |v: usize| v as f64; i32, |v: usize| v as i32; u64, |v: usize| v as u64;
        bf16, |v: usize| bf16::from_f32(v as f32)
    );
    assert_eq!(group.mean("test", rank as f64), 1.0);
    let lengths: Vec<usize> =
        group.all_gather_bytes("test", &vec![rank as u8; rank]).iter().map(Vec::len).collect();
    assert_eq!(lengths, [0, 1, 2]);
    assert_eq!(group.broadcast_bytes("test", vec![5; 3 * (1 - rank.min(1))]), [5; 3]);
    // More than one call takes.
    let own: Vec<u8> = (0..50_000_000).map(|i: usize| (i * (rank + 3)) as u8).collect();
    let all = group.all_gather("test", &own).unwrap();
    for (other, part) in all.chunks(own.len()).enumerate() {
        for i in [0, 1, 12_345_678, 44_739_241, 44_739_242, own.len() - 1] {
            assert_eq!(part[i], (i * (other + 3)) as u8, "rank {other}, byte {i}");
        }
    }
    let bad = if rank == 1 { Err(selfsup::Error::config("wrong")) } else { Ok(()) };
    match group.together(bad).unwrap_err() {
        selfsup::Error::Config(reason) => assert!(rank == 1 && reason == "wrong"),
        selfsup::Error::Elsewhere(1) => assert_ne!(rank, 1),
        other => panic!("{other}"),
    }
    group.together(Ok(())).unwrap();
    group.check().unwrap();
    group.leave();
}

/// Without MPI the tests of several processes are ignored. `scripts/test` sets the variable: CI fails then.
#[test]
fn mpi_is_there_wherever_it_is_required() {
    let required = std::env::var_os("SELFSUP_REQUIRE_MPI").is_some();
    assert!(
        !(required && cfg!(no_mpi)),
        "there is no .mpi, so the tests of several ranks were ignored; run scripts/fetch-mpi"
    );
}

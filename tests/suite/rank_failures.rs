//! Several ranks of the program that fail, hang or are stopped: one sentence from the rank that knows, all end, and the newest
//! checkpoint resumes.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use selfsup::train;

use crate::driver::{self, StandIn, on_stand_in};
use crate::faults::preload;
use crate::program::{selfsup, text};

/// A run of 24 steps.
const SETTINGS: &[&str] = &[
    "network.width=2",
    "method.hidden=8",
    "method.embedding=8",
    "augment.size=8",
    "data.limit=96",
    "data.test_limit=20",
    "train.epochs=2",
    "train.batch=8",
    "train.checkpoint_every_steps=5",
    "watch.report=false",
];

/// How long a launcher may take to end the other ranks.
const END: Duration = Duration::from_secs(60);

fn words(more: &[&str]) -> Vec<String> {
    let program = crate::program::path();
    let set = SETTINGS.iter().flat_map(|setting| ["--set", setting]);
    let start = [program, "train", "demo", "--device", "cpu"];
    start.into_iter().chain(set).chain(more.iter().copied()).map(str::to_owned).collect()
}

/// `mpiexec` with one program for each rank.
fn mpiexec(folder: &Path, ranks: &[Vec<String>]) -> Command {
    let mut command = Command::new(std::fs::canonicalize(".mpi/bin/mpiexec").unwrap());
    command.current_dir(folder).stdout(Stdio::piped()).stderr(Stdio::piped());
    for (i, words) in ranks.iter().enumerate() {
        command.args((i > 0).then_some(":")).args(["-n", "1"]).args(words);
    }
    command
}

/// Waits for the end of all ranks.
fn end(mut child: Child) -> Output {
    let begin = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if begin.elapsed() > END {
            child.kill().unwrap();
            panic!("the ranks did not end: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

/// The sentences of the program among what a launcher prints.
fn sentences(output: &Output) -> Vec<&str> {
    text(&output.stderr).lines().filter(|line| line.starts_with("selfsup: ")).collect()
}

/// Asserts that the ranks failed with one sentence.
#[track_caller]
fn refused(folder: &Path, ranks: &[Vec<String>], sentence: &str) {
    fails(mpiexec(folder, ranks), sentence);
}

#[track_caller]
fn fails(mut command: Command, sentence: &str) {
    let output = end(command.spawn().unwrap());
    let said = sentences(&output);
    assert!(!output.status.success(), "{output:?}");
    assert!(
        said.len() == 1 && said[0].contains(sentence),
        "{said:?}, expected {sentence}\n{output:?}"
    );
}

#[test]
#[cfg_attr(no_mpi, ignore = "needs MPI: run scripts/fetch-mpi")]
fn ranks_that_cannot_train_together_say_so_once() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let two = |more: &[&str]| [words(more), words(more)];
    let differs = [words(&[]), words(&["--set", "optim.lr=0.5"])];
    refused(folder, &differs, "rank 1 of 2: rank 1 differs from rank 0 in optim.lr: 0.5 here, ");
    let missing = [words(&[]), words(&["--set", "data.path=nowhere"])];
    refused(folder, &missing, "rank 1 of 2: nowhere: ");
    refused(
        folder,
        &two(&["--set", "train.batch=9"]),
        "2 ranks cannot have equal shares of train.batch=9",
    );
    let groups = "network.norm_groups above 1 with all views in one pass";
    refused(folder, &two(&["--set", "network.norm_groups=2"]), groups);
    refused(folder, &two(&["--set", "nonsense=1"]), "rank 0 of 2: ");
    refused(folder, &two(&["--out", "/dev/null/x"]), "rank 0 of 2: /dev/null/x");
    let evaluate = vec![crate::program::path().to_owned(), "recipes".into()];
    refused(folder, &[evaluate.clone(), evaluate], "only `train` runs in several");
    assert!(!folder.join("runs/demo").exists(), "a folder is left");
}

/// The images of two ranks have the same names and classes, and other sizes, or other pixels in files of the same size.
#[test]
#[cfg_attr(no_mpi, ignore = "needs MPI: run scripts/fetch-mpi")]
fn a_rank_with_other_images_of_the_same_names_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let write = |rank: &str, split: &str, pixels: &dyn Fn(u8, usize) -> u8| {
        for i in 0..12_u8 {
            let class =
                folder.path().join(rank).join(split).join(["ape", "bee"][usize::from(i % 2)]);
            std::fs::create_dir_all(&class).unwrap();
            let pixels: Vec<u8> = (0..12 * 12 * 3).map(|place| pixels(i, place)).collect();
            // A bitmap of one size has one length.
            let file = class.join(format!("{i}.bmp"));
            image::save_buffer(file, &pixels, 12, 12, image::ColorType::Rgb8).unwrap();
        }
    };
    let usual = |i: u8, place: usize| (place * (usize::from(i) + 3)) as u8;
    let both = |split: &str, others: &dyn Fn(u8, usize) -> u8| {
        for split in ["train", "test"] {
            ["first", "other"].iter().for_each(|rank| write(rank, split, &usual));
        }
        write("other", split, others);
    };
    let words = |rank: &str| {
        let path = format!("data.path={rank}");
        words(&["--set", &path, "--set", "train.batch=4"])
    };
    let ranks = [words("first"), words("other")];
    both("train", &|i, place| usual(i, place).wrapping_add(1));
    let said = "rank 1 of 2: rank 1 differs from rank 0 in the pixels of training images: ";
    refused(folder.path(), &ranks, said);
    both("test", &|i, place| usual(i, place).wrapping_add(1));
    refused(folder.path(), &ranks, "rank 1 differs from rank 0 in the pixels of held-out images: ");
    both("train", &usual);
    let longer = folder.path().join("other/train/ape/0.bmp");
    let mut bytes = std::fs::read(&longer).unwrap();
    bytes.push(0);
    std::fs::write(&longer, bytes).unwrap();
    refused(folder.path(), &ranks, "rank 1 differs from rank 0 in sizes of the training files: ");
}

/// Waits until a run has logged `lines` lines.
fn wait_for(folder: &Path, lines: usize) {
    let begin = Instant::now();
    let metrics = folder.join("runs/demo/metrics.jsonl");
    while std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < lines {
        assert!(begin.elapsed() < Duration::from_secs(60), "the run did not come to {lines} lines");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The process of each rank under an `mpiexec`, lowest rank first.
fn processes(launcher: &Child) -> Vec<String> {
    let children = |process: &str| -> Vec<String> {
        let list = std::fs::read_to_string(format!("/proc/{process}/task/{process}/children"));
        list.unwrap_or_default().split_whitespace().map(str::to_owned).collect()
    };
    let proxy = children(&launcher.id().to_string());
    proxy.iter().flat_map(|proxy| children(proxy)).collect()
}

fn signal(process: &str, name: &str) {
    assert!(Command::new("kill").args(["-s", name, process]).status().unwrap().success());
}

/// Resumes in one process what two ranks began, to the end.
fn resumes(folder: &Path) {
    let begin = Instant::now();
    let output = loop {
        let output = selfsup(folder, &["train", "--device", "cpu", "--resume", "runs/demo"]);
        // A launcher may end a moment before its ranks do.
        if !text(&output.stderr).contains(" is in use: ") || begin.elapsed() > END {
            break output;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stderr).contains("going on after step "), "{output:?}");
    let newest = train::newest(&folder.join("runs/demo")).unwrap();
    assert!(newest.ends_with("step-00000024.safetensors"), "{newest:?}");
}

#[test]
#[cfg_attr(no_mpi, ignore = "needs MPI: run scripts/fetch-mpi")]
fn a_signal_to_one_rank_stops_all_with_a_checkpoint_and_another_number_of_ranks_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let launcher = mpiexec(folder, &[words(&[]), words(&[])]).spawn().unwrap();
    wait_for(folder, 7);
    signal(&processes(&launcher)[1], "TERM");
    let output = end(launcher);
    let said = sentences(&output);
    assert!(said.len() == 1 && said[0].starts_with("selfsup: stopped at step "), "{output:?}");
    assert!(said[0].ends_with("continue with: selfsup train --resume runs/demo"), "{said:?}");
    // Three ranks cannot share a batch of eight; four can, and read nothing but what rank 0 tells them.
    let resume = |folder: &str| -> Vec<String> {
        let words = [crate::program::path(), "train", "--device", "cpu", "--resume", folder];
        words.map(str::to_owned).to_vec()
    };
    let three = [resume("runs/demo"), resume("runs/demo"), resume("runs/demo")];
    refused(folder, &three, "3 ranks cannot have equal shares of train.batch=8");
    let four = ["runs/demo", "elsewhere", "elsewhere", "elsewhere"].map(resume);
    let output = end(mpiexec(folder, &four).spawn().unwrap());
    assert!(output.status.success(), "{output:?}");
    assert!(text(&output.stderr).contains("going on after step "), "{output:?}");
    let newest = train::newest(&folder.join("runs/demo")).unwrap();
    assert!(newest.ends_with("step-00000024.safetensors"), "{newest:?}");
    assert!(!folder.join("elsewhere").exists());
}

/// The ranks share an evaluation: one that is asked to stop in it takes all with it.
#[test]
#[cfg_attr(no_mpi, ignore = "needs MPI: run scripts/fetch-mpi")]
fn a_signal_to_one_rank_in_an_evaluation_stops_all() {
    let folder = tempfile::tempdir().unwrap();
    let many = ["data.limit=4096", "data.test_limit=4096", "train.batch=64", "train.epochs=1"];
    let more: Vec<&str> = many.iter().flat_map(|setting| ["--set", setting]).collect();
    let ranks = [words(&more), words(&more)];
    let launcher = mpiexec(folder.path(), &ranks).spawn().unwrap();
    // The checkpoint that is written before the evaluation, after the last step.
    let saved = folder.path().join("runs/demo/step-00000064.safetensors");
    let begin = Instant::now();
    while !saved.exists() {
        assert!(begin.elapsed() < END, "the run came to no evaluation");
        std::thread::sleep(Duration::from_millis(2));
    }
    signal(&processes(&launcher)[1], "TERM");
    let output = end(launcher);
    let said = sentences(&output);
    let start = "selfsup: stopped at step 64 of 64; continue with: ";
    assert!(said.len() == 1 && said[0].starts_with(start), "{output:?}");
    assert!(!text(&output.stdout).contains("kNN"), "{output:?}");
}

#[test]
#[cfg_attr(no_mpi, ignore = "needs MPI: run scripts/fetch-mpi")]
fn a_killed_rank_ends_all_and_the_newest_checkpoint_resumes() {
    let folder = tempfile::tempdir().unwrap();
    let launcher = mpiexec(folder.path(), &[words(&[]), words(&[])]).spawn().unwrap();
    wait_for(folder.path(), 7);
    signal(&processes(&launcher)[1], "KILL");
    assert!(!end(launcher).status.success());
    resumes(folder.path());
}

#[test]
#[cfg_attr(no_mpi, ignore = "needs MPI: run scripts/fetch-mpi")]
fn a_rank_that_hangs_is_noticed_by_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = mpiexec(folder.path(), &[words(&[]), words(&[])]);
    let launcher = command.env("SELFSUP_RANK_TIMEOUT", "2").spawn().unwrap();
    wait_for(folder.path(), 7);
    let hung = processes(&launcher)[1].clone();
    signal(&hung, "STOP");
    let output = end(launcher);
    let said = sentences(&output);
    let start = "selfsup: rank 0 has waited ";
    assert!(
        said.len() == 1 && said[0].starts_with(start) && said[0].contains(" in step "),
        "{output:?}"
    );
    resumes(folder.path());
}

/// The disk of rank 0 is full from the middle of a log on, and from the middle of a checkpoint on.
#[test]
#[cfg_attr(no_mpi, ignore = "needs MPI: run scripts/fetch-mpi")]
fn a_full_disk_ends_all_with_one_sentence_and_the_newest_checkpoint_resumes() {
    let run = |folder: &Path, variables: &[String]| {
        std::fs::create_dir(folder.join("runs")).unwrap(); // the library looks for it at its start
        let preload = format!("LD_PRELOAD={}", preload().display());
        let with = ["env".into(), preload, "FAULTS_FOLDER=runs".into()];
        let first = with.iter().chain(variables).cloned().chain(words(&[])).collect();
        end(mpiexec(folder, &[first, words(&[])]).spawn().unwrap())
    };
    let whole = tempfile::tempdir().unwrap();
    let trace = whole.path().join("trace");
    let output = run(whole.path(), &[format!("FAULTS_TRACE={}", trace.display())]);
    assert!(output.status.success(), "{output:?}");
    let trace = std::fs::read_to_string(trace).unwrap();
    let changes: Vec<&str> = trace.lines().filter(|line| line.starts_with("change\t")).collect();
    // The last call of each kind: several checkpoints are there by then.
    for (file, written) in [("metrics.jsonl", "metrics.jsonl"), ("step-", "step-00000020")] {
        let is_write = |line: &&str| line.contains("\twrite\t") && line.contains(written);
        let at = changes.iter().rposition(is_write).expect("it is written") + 1;
        let folder = tempfile::tempdir().unwrap();
        let output = run(folder.path(), &["FAULTS_KIND=full".into(), format!("FAULTS_AT={at}")]);
        let said = sentences(&output);
        assert!(!output.status.success(), "{output:?}");
        let told = |said: &str| said.contains("rank 0 of 2: ") && said.contains("No space left");
        assert!(said.len() == 1 && told(said[0]) && said[0].contains(file), "{said:?}\n{output:?}");
        resumes(folder.path());
    }
}

/// Two ranks of the program, on stand-ins for GPUs.
fn on_gpus(folder: &Path) -> Command {
    let own: Vec<String> = words(&[])
        .into_iter()
        .map(|word| if word == "cpu" { "cuda".into() } else { word })
        .collect();
    let mut command = mpiexec(folder, &[own.clone(), own]);
    driver::with_driver(&mut command).env("SELFSUP_NCCL", StandIn::path());
    command
}

#[test]
#[cfg_attr(
    any(no_mpi, no_kernels),
    ignore = "needs MPI and CUDA kernels: run scripts/fetch-mpi and scripts/fetch-nvcc"
)]
fn ranks_on_gpus_that_cannot_train_together_say_so_once() {
    on_stand_in("rank_failures::ranks_on_gpus_that_cannot_train_together_say_so_once", || {
        let folder = tempfile::tempdir().unwrap();
        let mut shared = on_gpus(folder.path());
        shared.env("SELFSUP_STAND_IN_SHARED", "1");
        fails(shared, "ranks 0 and 1 have the same GPU: there are more ranks than GPUs");
        let mut missing = on_gpus(folder.path());
        missing.env("SELFSUP_NCCL", "/nowhere/libnccl.so.2");
        fails(missing, "rank 0 of 2: no NCCL can be opened, which several GPUs need: ");
        let mut other = on_gpus(folder.path());
        other.env("SELFSUP_NCCL", "libc.so.6");
        fails(other, "(lacks ncclGetVersion: it is no NCCL, or one older than 2.14)");
    });
}

#[test]
#[cfg_attr(
    any(no_mpi, no_kernels),
    ignore = "needs MPI and CUDA kernels: run scripts/fetch-mpi and scripts/fetch-nvcc"
)]
fn a_rank_that_hangs_in_the_middle_of_a_step_on_gpus_is_named() {
    on_stand_in(
        "rank_failures::a_rank_that_hangs_in_the_middle_of_a_step_on_gpus_is_named",
        || {
            let folder = tempfile::tempdir().unwrap();
            let mut command = on_gpus(folder.path());
            command.env("SELFSUP_RANK_TIMEOUT", "2").env("SELFSUP_STAND_IN_NCCL_SECONDS", "1");
            let launcher = command.spawn().unwrap();
            wait_for(folder.path(), 7);
            signal(&processes(&launcher)[1], "STOP");
            let output = end(launcher);
            let said = sentences(&output);
            // It depends on the moment whether the other rank waits in a collective of the step or between two steps.
            let in_step = |said: &str| {
                said.contains("rank 0 of 2: ")
                    && said.contains(" failed in step ")
                    && said.contains("rank 1 has not come within 1 s")
            };
            let between =
                |said: &str| said.contains("rank 0 has waited ") && said.contains(" in step ");
            assert!(said.len() == 1 && (in_step(said[0]) || between(said[0])), "{output:?}");
            resumes(folder.path());
        },
    );
}

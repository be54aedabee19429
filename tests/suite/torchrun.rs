//! Processes under torchrun's variables, which are no MPI job: all that they exchange crosses NCCL, here stand-ins for it and for the
//! driver.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::compare::{close, report};
use crate::driver::{self, StandIn, on_stand_in};
use crate::ranks_on_gpus::{CASES, logged_losses};

/// Longer than any of these runs takes.
const END: Duration = Duration::from_secs(120);

/// Ranks, and what stands for the launcher's store, which holds the port of its variables.
struct Job {
    ranks: Vec<Child>,
    _store: TcpListener,
}

/// Starts the program twice as `torchrun` does, with the words of each rank. `adjust` changes the environment of a rank.
fn torchrun(words: [&[&str]; 2], folder: &Path, adjust: impl Fn(&mut Command)) -> Job {
    let (store, port) = loop {
        let store = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = store.local_addr().unwrap().port();
        // Where the ranks will meet.
        if TcpListener::bind(("127.0.0.1", port.wrapping_add(1))).is_ok() {
            break (store, port);
        }
    };
    let rank = |(rank, words): (&str, &[&str])| {
        let mut command = Command::new(crate::program::path());
        command.args(words).current_dir(folder).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.envs([
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("WORLD_SIZE", "2"),
            ("LOCAL_WORLD_SIZE", "2"),
        ]);
        command.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port.to_string())]);
        command.envs([("TORCHELASTIC_RUN_ID", "none"), ("TORCHELASTIC_USE_AGENT_STORE", "True")]);
        driver::with_driver(&mut command).env("SELFSUP_NCCL", StandIn::path());
        command.env("SELFSUP_RANK_TIMEOUT", "60");
        adjust(&mut command);
        command.spawn().unwrap()
    };
    Job { ranks: [("0", words[0]), ("1", words[1])].map(rank).into(), _store: store }
}

impl Job {
    fn end(self) -> Vec<Output> {
        let begin = Instant::now();
        let end = |mut rank: Child| {
            while rank.try_wait().unwrap().is_none() {
                if begin.elapsed() > END {
                    rank.kill().unwrap();
                    panic!("a rank did not end: {:?}", rank.wait_with_output());
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            rank.wait_with_output().unwrap()
        };
        self.ranks.into_iter().map(end).collect()
    }
}

#[track_caller]
fn succeed(outputs: &[Output]) {
    assert!(outputs.iter().all(|output| output.status.success()), "{outputs:?}");
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn two_gpus_under_torchrun_train_as_one_stop_and_resume() {
    on_stand_in("torchrun::two_gpus_under_torchrun_train_as_one_stop_and_resume", || {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path();
        // With running statistics of groups and a queue.
        let mut recipe = CASES.iter().find(|case| case.method == "moco").unwrap().recipe(folder);
        recipe.train.epochs = 6; // long enough for a signal to come in time on a busy machine
        std::fs::write(folder.join("recipe.toml"), recipe.to_toml()).unwrap();
        let train = |out: &'static str| ["train", "recipe.toml", "--device", "cuda", "--out", out];
        let mut one = Command::new(crate::program::path());
        let one = driver::with_driver(one.args(train("one")).current_dir(folder)).output().unwrap();
        succeed(&[one]);

        let job = torchrun([&train("two"); 2], folder, |_| {});
        let begin = Instant::now();
        while logged_losses(&folder.join("two")).len() < 2 {
            assert!(begin.elapsed() < END, "the ranks did not come to two steps: {:?}", job.end());
            std::thread::sleep(Duration::from_millis(2));
        }
        let second = job.ranks[1].id().to_string();
        assert!(Command::new("kill").args(["-s", "TERM", &second]).status().unwrap().success());
        let stopped = job.end();
        let before = logged_losses(&folder.join("two")).len();
        assert!(said(&stopped[0]).contains("--resume"), "{stopped:?}");
        assert!(before < 18, "the run was over before the signal came");
        let resume = ["train", "--resume", "two", "--device", "cuda"];
        succeed(&torchrun([&resume; 2], folder, |_| {}).end());

        let [one, two] = ["one", "two"].map(|out| logged_losses(&folder.join(out)));
        assert!(one.len() >= 18, "{one:?}");
        report("moco on two GPUs under torchrun, resumed", vec![close("losses", &two, &one, 1e-4)]);
    });
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn ranks_of_torchrun_that_cannot_meet_say_why() {
    on_stand_in("torchrun::ranks_of_torchrun_that_cannot_meet_say_why", || {
        let folder = tempfile::tempdir().unwrap();
        let fails = |adjust: &dyn Fn(&mut Command), words: &[&str], sentence: &str| {
            let outputs = torchrun([words; 2], folder.path(), adjust).end();
            assert!(outputs.iter().all(|output| !output.status.success()), "{outputs:?}");
            let said = said(&outputs[0]);
            assert!(said.contains(sentence), "{said}, expected {sentence}");
        };
        let train = ["train", "simclr-cifar10-small", "--set", "data.path=fashion-scattered"];
        let alone = "torchrun started 2 processes: ";
        // Cargo's library path leads to the stand-in, too.
        let no_gpu = |rank: &mut Command| {
            rank.env_remove("LD_PRELOAD")
                .env_remove("LD_LIBRARY_PATH")
                .env("CUDA_VISIBLE_DEVICES", "");
        };
        fails(
            &|rank| _ = rank.env_remove("MASTER_PORT"),
            &train,
            &format!("{alone}set NCCL_COMM_ID=HOST:PORT, the same for all"),
        );
        fails(&no_gpu, &train, &format!("{alone}they agree over NCCL and need a GPU each"));
        fails(
            &|rank| _ = rank.env("SELFSUP_NCCL", "/nowhere/libnccl.so.2"),
            &train,
            "no NCCL can be opened, which several GPUs need: ",
        );
        fails(&|_| {}, &["eval", "knn", "runs/demo"], "only `train` runs in several");
    });
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_rank_of_torchrun_with_other_settings_is_named_and_ends_all() {
    on_stand_in("torchrun::a_rank_of_torchrun_with_other_settings_is_named_and_ends_all", || {
        let folder = tempfile::tempdir().unwrap();
        let recipe = CASES[0].recipe(folder.path());
        let mut other = recipe.clone();
        other.optim.lr *= 2.0;
        for (name, recipe) in [("0.toml", &recipe), ("1.toml", &other)] {
            std::fs::write(folder.path().join(name), recipe.to_toml()).unwrap();
        }
        let train = |recipe: &'static str| ["train", recipe, "--device", "cuda", "--out", "run"];
        let outputs = torchrun([&train("0.toml"), &train("1.toml")], folder.path(), |_| {}).end();
        assert!(outputs.iter().all(|output| !output.status.success()), "{outputs:?}");
        let said = said(&outputs[1]);
        assert!(said.contains("rank 1 differs from rank 0 in optim.lr"), "{said}");
    });
}

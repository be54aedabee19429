//! What `inspect --ranks` counts is what ranks exchange, and its model charges more for more machines.

use std::collections::BTreeMap;

use selfsup::device::{Device, Group};
use selfsup::recipes::Recipe;
use selfsup::train::{self, Cluster, Exchange};

use crate::program::{selfsup, text};
use crate::ranks::{CASES, Case, as_rank, mpiexec, prepare, succeed, train};

/// Cases of which every step exchanges the same.
const COUNTED: [&str; 6] = [
    "simclr, LARS",
    "simclr, SGD, micro-batches",
    "simclr-v2, memory",
    "moco, groups and shuffle",
    "byol, LARS",
    "supervised, SGD",
];

/// Steps of a case.
const STEPS: u64 = 6;

/// Calls and bytes by what was exchanged, of each case.
type Counts = BTreeMap<String, BTreeMap<String, [u64; 2]>>;

/// Trains on two real ranks, and compares what one counted with what is foretold of a step.
#[test]
#[cfg_attr(no_mpi, ignore = "needs MPI: run scripts/fetch-mpi")]
fn two_ranks_exchange_what_is_counted_before() {
    let counted = || CASES.iter().filter(|case| COUNTED.contains(&case.name));
    if let Some(folder) = as_rank() {
        let (group, device) = (Group::launched().unwrap(), Device::cpu(1).unwrap());
        let count = |case: &Case| {
            group.traffic(); // of the case before
            train(case, &folder, "counted", &device, &group);
            let traffic = group.traffic().into_iter();
            let counts = traffic.map(|t| (t.what.to_owned(), [t.calls, t.bytes])).collect();
            (case.name.to_owned(), counts)
        };
        let counts: Counts = counted().map(count).collect();
        if group.leads() {
            std::fs::write(folder.join("counts"), serde_json::to_vec(&counts).unwrap()).unwrap();
        }
        return group.leave();
    }
    let folder = prepare();
    succeed(mpiexec(2, "exchanges::two_ranks_exchange_what_is_counted_before", folder.path()));
    let counts = std::fs::read(folder.path().join("counts")).unwrap();
    let counts: Counts = serde_json::from_slice(&counts).unwrap();
    assert_eq!(counts.len(), COUNTED.len());
    for case in counted() {
        let recipe = case.recipe(folder.path()).with(&["train.precision=f32".into()]).unwrap();
        let foretold = train::exchanges(&recipe, 2).unwrap();
        assert!(foretold.len() >= 3, "{foretold:?}");
        for Exchange { what, calls, bytes, .. } in foretold {
            let real = counts[case.name][what];
            assert_eq!(real, [STEPS * calls, STEPS * bytes], "{}: {what}", case.name);
        }
    }
}

/// The networks of the papers, narrow and on small images: neither changes what is counted.
#[test]
fn a_resnet_50_exchanges_for_each_batch_norm_in_each_direction() {
    let small = ["network.width=4", "augment.size=32", "train.batch=512", "train.threads=1"];
    let settings: Vec<String> = small.iter().map(|setting| setting.to_string()).collect();
    let recipe = Recipe::load("simclr-imagenet", &settings).unwrap();
    let calls = |what: &str| {
        let all = train::exchanges(&recipe, 8).unwrap();
        all.iter().find(|exchange| exchange.what == what).map_or(0, |exchange| exchange.calls)
    };
    // 53 of the backbone, and those of the head.
    let head =
        recipe.method.settings.get("head_layers").map_or(2, |n| n.as_integer().unwrap() as u64);
    assert_eq!(calls("batch norm's statistics"), 53 + head);
    assert_eq!(calls("batch norm's gradients"), 53 + head);
    assert_eq!([calls("gradients"), calls("rows"), calls("sums of rows")], [1, 1, 1]);
}

#[test]
fn exchanges_cost_more_between_machines_than_within_one() {
    let cluster =
        |machines, per_machine| Cluster { machines, per_machine, network: 47e9, inside: 360e9 };
    let norm = Exchange { what: "statistics", gathers: true, calls: 1, bytes: 4096 };
    let gradients = Exchange { what: "gradients", gathers: false, calls: 1, bytes: 100_000_000 };
    for exchange in [norm, gradients] {
        let seconds = [cluster(1, 1), cluster(1, 8), cluster(8, 8), cluster(64, 8)]
            .map(|cluster| cluster.seconds(&exchange));
        assert!(seconds[0] == 0.0 && seconds.is_sorted(), "{}: {seconds:?}", exchange.what);
    }
    // A ring moves its bytes nearly twice, here through 360 GB/s; a small exchange takes its latencies.
    let seconds = cluster(1, 8).seconds(&gradients_of(360_000_000));
    assert!((seconds / 1.75e-3 - 1.0).abs() < 0.02, "{seconds}");
    let seconds = cluster(8, 8).seconds(&gradients_of(8));
    assert!((seconds / 45.1e-6 - 1.0).abs() < 0.01, "{seconds}");
}

fn gradients_of(bytes: u64) -> Exchange {
    Exchange { what: "gradients", gathers: false, calls: 1, bytes }
}

#[test]
fn inspect_prints_what_a_step_exchanges() {
    let folder = tempfile::tempdir().unwrap();
    let small = ["network.width=2", "augment.size=8", "method.hidden=8", "train.batch=64"];
    let inspect = |more: &[&str]| {
        let set = small.iter().flat_map(|setting| ["--set", setting]);
        let words: Vec<&str> = ["inspect", "demo"].into_iter().chain(set).collect();
        selfsup(folder.path(), &[&words[..], more].concat())
    };
    let output = inspect(&["--ranks", "2x4", "--network", "25GB/s", "--speed", "100"]);
    assert!(output.status.success(), "{output:?}");
    let said = text(&output.stdout);
    for part in [
        "exchanges of a step on 8 ranks, 2 machines of 4 GPUs, 8 images each:",
        "batch norm's statistics ",
        "with batch norm over the ranks of each machine only: ",
        "of a rank's speed alone (160.00 ms a step) there remains ",
    ] {
        assert!(said.contains(part), "{part}:\n{said}");
    }
    let output = inspect(&["--ranks", "1x5"]);
    let said = text(&output.stderr);
    assert!(said.contains("5 ranks cannot have equal shares of train.batch=64"), "{said}");
    let output = inspect(&["--ranks", "8"]);
    assert!(text(&output.stderr).contains("machines and GPUs of each, such as 8x8"), "{output:?}");
}

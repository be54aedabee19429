//! The judge on ten kernels: four that are right, in ordinary styles, and six with a planted fault each.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use cuda_on_host::host::Host;
use cuda_on_host::judge::{Aspect, Fate, Judge, Operand, Options, Verdict};

/// Kernel, and what its verdict says; nothing for a right one.
const KERNELS: [(&str, Option<(Aspect, &str)>); 10] = [
    ("row_sum", None),
    ("matmul", None),
    ("reverse", None),
    ("relu", None),
    ("race", Some((Aspect::Safe, "race: thread"))),
    ("stale", Some((Aspect::Right, "should be"))),
    ("unwritten", Some((Aspect::Right, "element [64] of `y` was never written"))),
    ("odd", Some((Aspect::Right, "should be"))),
    ("misaligned", Some((Aspect::Safe, "misaligned, not a multiple of 16 (misaligned.cu:7)"))),
    ("no_wait", Some((Aspect::Safe, "uninitialised"))),
];

fn primitive(
    name: &str,
    of: &[Operand],
    with: &BTreeMap<String, f64>,
) -> Result<Vec<Vec<f64>>, String> {
    let x = &of[0];
    let result = match name {
        "copy" => x.values.clone(),
        "relu" => x.values.iter().map(|v| v.max(0.0)).collect(),
        "sum" => {
            assert_eq!(with["axis"], 1.0);
            x.values.chunks(x.shape[1]).map(|row| row.iter().sum()).collect()
        }
        "matmul" => {
            let ([m, k], [_, n], w) =
                ([x.shape[0], x.shape[1]], [0, of[1].shape[1]], &of[1].values);
            let product =
                |i: usize, j: usize| (0..k).map(|l| x.values[i * k + l] * w[l * n + j]).sum();
            (0..m * n).map(|at| product(at / n, at % n)).collect()
        }
        _ => return Err("is not known".into()),
    };
    Ok(vec![result])
}

fn host() -> Host {
    let cache = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    Host::new(&cache).unwrap_or_else(|why| panic!("{why}"))
}

fn kernel(name: &str) -> (PathBuf, PathBuf) {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = own.join(if name == "row_sum" { "src/judge/example" } else { "tests/kernels" });
    (folder.join(format!("{name}.cu")), folder.join(format!("{name}.toml")))
}

fn judged(host: &Host, name: &str) -> Verdict {
    let (source, case) = kernel(name);
    let judge = Judge::new(host, &source, &case).unwrap_or_else(|why| panic!("{why}"));
    judge.run(&Options::default(), &primitive).unwrap_or_else(|why| panic!("{why}"))
}

/// Whether the verdict is the expected one, for the expected reason alone.
fn rightly(name: &str, verdict: &Verdict, expected: Option<(Aspect, &str)>) -> bool {
    let right = match expected {
        None => {
            verdict.findings.is_empty()
                && verdict.launches >= 10
                && verdict.error <= verdict.tolerance
        }
        Some((aspect, says)) => {
            let named = |aspect: Aspect| {
                verdict.findings.iter().any(|f| f.aspect == aspect && f.what.contains(says))
            };
            named(aspect)
        }
    };
    if !right {
        println!("{name} is judged wrongly: {verdict:#?}");
    }
    right
}

#[test]
fn ten_kernels_are_judged_rightly() {
    let host = host();
    let judge = |(name, expected): &(&str, Option<(Aspect, &str)>)| {
        rightly(name, &judged(&host, name), *expected)
    };
    // Two at a time: most of it is g++.
    let (first, second) = KERNELS.split_at(5);
    let count = std::thread::scope(|scope| {
        let other = scope.spawn(|| second.iter().filter(|kernel| judge(kernel)).count());
        first.iter().filter(|kernel| judge(kernel)).count() + other.join().expect("no panic")
    });
    // Written past the capture of test output, so that CI shows it.
    writeln!(std::io::stdout(), "judged rightly: {count} of {}", KERNELS.len()).expect("a stdout");
    assert_eq!(count, KERNELS.len());
}

#[test]
fn a_fault_that_few_schedules_show_replays_from_its_seed() {
    let host = host();
    let (source, case) = kernel("race");
    let judge = Judge::new(&host, &source, &case).unwrap();
    let at = |seed: u64| {
        let only = Options { seed: Some(seed), ..Options::default() };
        judge.run(&only, &primitive).unwrap().findings.first().map(|finding| finding.what.clone())
    };
    let found = judge.run(&Options::default(), &primitive).unwrap();
    let finding = found.findings.first().expect("a race");
    assert!(finding.times < found.launches, "every schedule shows it: {finding:?}");
    assert_eq!(at(finding.seed).as_deref(), Some(finding.what.as_str()));
    assert!((1..=10).any(|seed| at(seed).is_none()), "every schedule shows it");
}

#[test]
fn mutants_that_a_case_does_not_notice_are_found() {
    let host = host();
    let (source, case) = kernel("row_sum");
    let fates =
        Judge::new(&host, &source, &case).unwrap().mutate(&Options::default(), &primitive).unwrap();
    let barrier = fates
        .iter()
        .find(|(mutant, _)| mutant.what.contains("a barrier dropped"))
        .expect("one barrier");
    assert!(
        matches!(&barrier.1, Fate::Killed(what) if what.contains("partial") || what.contains("shared memory")),
        "{barrier:?}"
    );
    let counted: Vec<_> = fates.iter().filter(|(_, fate)| *fate != Fate::DoesNotCompile).collect();
    let survivors: Vec<_> = counted.iter().filter(|(_, fate)| *fate == Fate::Survived).collect();
    assert!(counted.len() >= 8 && survivors.len() <= 1, "{survivors:#?} of {}", counted.len());
}

#[test]
fn what_the_host_does_not_know_is_named() {
    let host = host();
    let folder = tempfile::tempdir().unwrap();
    let (source, case) = (folder.path().join("k.cu"), folder.path().join("k.toml"));
    std::fs::write(&case, std::fs::read_to_string(kernel("relu").1).unwrap()).unwrap();
    let text = std::fs::read_to_string(kernel("relu").0).unwrap();
    std::fs::write(
        &source,
        text.replace("{ map(y,", "{\n    asm volatile(\"wgmma.fence.sync.aligned;\");\n    map(y,"),
    )
    .unwrap();
    let judge = Judge::new(&host, &source, &case).unwrap();
    let unknown = judge.unknown();
    assert_eq!(unknown.len(), 1);
    assert!(
        unknown[0].what.contains("inline PTX `wgmma.fence.sync.aligned`") && unknown[0].line == 12,
        "{unknown:?}"
    );
    let said = judge.run(&Options::default(), &primitive).unwrap_err();
    assert!(said.contains("k.cu:12: the host does not know inline PTX"), "{said}");
}

#[test]
fn a_kernel_that_hangs_or_crashes_is_a_finding() {
    let host = host();
    let folder = tempfile::tempdir().unwrap();
    let (source, case) = (folder.path().join("k.cu"), folder.path().join("k.toml"));
    std::fs::write(&case, std::fs::read_to_string(kernel("relu").1).unwrap()).unwrap();
    for (body, says) in [
        ("for (volatile int i = 0; n; i = 0) {}", "does not end within 1 s"),
        ("volatile int zero = 0; y[0] = 7 / zero;", "ends the process (signal: 8"),
    ] {
        std::fs::write(
            &source,
            format!("__global__ void relu(float* y, const float* x, size_t n) {{ {body} }}\n"),
        )
        .unwrap();
        let judge = Judge::new(&host, &source, &case).unwrap();
        let brief = Options {
            patience: std::time::Duration::from_secs(1),
            first: true,
            ..Options::default()
        };
        let verdict = judge.run(&brief, &primitive).unwrap();
        assert!(
            !verdict.is(Aspect::Safe) && verdict.findings[0].what.contains(says),
            "{verdict:?}"
        );
    }
}

#[test]
fn a_case_that_does_not_fit_is_refused_in_one_sentence() {
    let host = host();
    let folder = tempfile::tempdir().unwrap();
    let case = folder.path().join("k.toml");
    let (source, given) = kernel("relu");
    let given = std::fs::read_to_string(given).unwrap();
    for (from, to, says) in [
        ("name = \"x\"", "name = \"z\"", "no argument `z`; its arguments are y, x, n"),
        ("value = \"n\"", "shape = [\"n\"]", "`n` is a scalar: give it a `value`"),
        ("output = true", "", "no argument is an output"),
        ("sizes = { n = 1000 }", "sizes = { n = 0 }", "the size `n` is 0"),
        ("primitive = \"relu\"", "", "one of `primitive`, `kernel` and `expected`"),
        ("block = 256", "blocks = 256", "unknown field `blocks`"),
        ("[launch]", "kernel = \"gelu\"\n[launch]", "has no kernel `gelu`; it has relu"),
        (
            "shape = [\"n\"]\noutput = true",
            "shape = [\"n\"]\ndtype = \"f64\"\noutput = true",
            "`y` has the dtype f64",
        ),
    ] {
        assert!(given.contains(from), "{from}");
        std::fs::write(&case, given.replacen(from, to, 1)).unwrap();
        let said = Judge::new(&host, &source, &case).err().unwrap_or_default();
        assert!(said.contains(says) && !said.contains('\n'), "{to}: {said}");
    }
    for (from, to, says) in [
        ("block = 256", "block = 2048", "a block of 2048 threads"),
        ("grid = 3", "grid = \"m\"", "there is no size `m`"),
        ("primitive = \"relu\"", "primitive = \"gelu\"", "the primitive `gelu`: is not known"),
    ] {
        std::fs::write(&case, given.replacen(from, to, 1)).unwrap();
        let judge = Judge::new(&host, &source, &case).unwrap();
        let said = judge.run(&Options::default(), &primitive).err().unwrap_or_default();
        assert!(said.contains(says), "{to}: {said}");
    }
}

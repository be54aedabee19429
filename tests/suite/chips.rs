//! Chips that the program has no machine code for: the driver compiles the kernels, and the user is told.

use std::process::Output;

use crate::driver::{on_stand_in, with_driver};
use crate::program::program;

/// Runs the program on a GPU of a compute capability.
fn on(capability: &str, words: &[&str], fail: &str) -> Output {
    let mut program = program();
    with_driver(&mut program)
        .env("SELFSUP_STAND_IN_CAPABILITY", capability)
        .env("SELFSUP_STAND_IN_FAIL", fail)
        .args(words)
        .output()
        .expect("the program starts")
}

/// A generation that no build has machine code for.
const LATER: &str = "15.0";
const FAILED: &str = "cuModuleLoadData:1:209";

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn a_slow_first_use_of_a_chip_is_announced() {
    on_stand_in("chips::a_slow_first_use_of_a_chip_is_announced", || {
        let listed = |capability| {
            let output = on(capability, &["devices"], "cuNothing:1:1");
            String::from_utf8(output.stdout).unwrap()
        };
        let note = "the driver compiles the kernels for it";
        assert!(listed(LATER).contains(&format!("compute capability {LATER}; {note}")));
        for known in ["8.0", "8.9", "9.0"] {
            assert!(!listed(known).contains(note), "{known}");
        }
        // Before they are loaded, which is what takes long.
        let said = |capability| {
            let output = on(capability, &["check", "--quick", "--device", "cuda"], FAILED);
            assert_eq!(output.status.code(), Some(1));
            String::from_utf8(output.stderr).unwrap()
        };
        let sentence = "the driver compiles the kernels for compute capability 15.0 at their first use, which takes about 20 s\n";
        let later = said(LATER);
        let at = later.find(sentence).unwrap_or_else(|| panic!("{later}"));
        assert!(later.find("the driver does not load").is_some_and(|error| error > at), "{later}");
        assert!(!said("9.0").contains("the driver compiles"));
    });
}

#[test]
#[cfg_attr(no_kernels, ignore = "needs CUDA kernels: run scripts/fetch-nvcc")]
fn ptx_that_is_newer_than_the_driver_is_an_error_that_says_what_to_do() {
    let name = "chips::ptx_that_is_newer_than_the_driver_is_an_error_that_says_what_to_do";
    on_stand_in(name, || {
        let words = ["check", "--quick", "--device", "cuda"];
        let output = on(LATER, &words, "cuModuleLoadData:1:222");
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        for part in [
            "has to compile the kernels for compute capability 15.0 and does not know the PTX",
            "install a newer driver, or build the program with SELFSUP_CHIPS=sm_150",
        ] {
            assert!(said.contains(part), "no {part:?} in {said}");
        }
    });
}

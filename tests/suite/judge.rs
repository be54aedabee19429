//! `selfsup judge` as a user runs it; what it judges is tested in `cuda-on-host`.

use std::process::Output;

use serde_json::Value;

use crate::program::{program, text};

fn judge(words: &[&str]) -> Output {
    let mut command = program();
    // Engines are compiled once for all tests; next to the tests, where a bundle can write, too.
    let cache = std::env::current_exe().unwrap().with_file_name("judge-cache");
    command.arg("judge").args(words).env("XDG_CACHE_HOME", cache);
    command.output().expect("the program starts")
}

#[test]
fn the_example_is_right_and_safe() {
    let output = judge(&["--example", "--schedules", "3"]);
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}{}", text(&output.stderr));
    for part in [
        "---- row_sum.cu",
        "[reference]",
        "right: yes: ",
        "safe: yes: ",
        "fast, on paper (H200): 5 blocks",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
}

#[test]
fn a_wrong_kernel_fails_with_what_to_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (kernel, case) = (at("twice.cu"), at("twice.toml"));
    // Two threads write the same element where the size is odd.
    std::fs::write(
        &kernel,
        "__global__ void twice(float* y, const float* x, int n) {\n    int i = threadIdx.x;\n    \
         y[min(i, n - 1)] = 2.0f * x[min(i, n - 1)];\n}\n",
    )
    .unwrap();
    std::fs::write(
        &case,
        "sizes = { n = 64 }\n[launch]\ngrid = 1\nblock = \"ceil(n, 2) * 2\"\n\
         [[argument]]\nname = \"y\"\nshape = [\"n\"]\noutput = true\n\
         [[argument]]\nname = \"x\"\nshape = [\"n\"]\n[[argument]]\nname = \"n\"\nvalue = \"n\"\n\
         [reference]\nprimitive = \"scale\"\nwith = { by = 2 }\n",
    )
    .unwrap();
    let output = judge(&[&kernel, "--json"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let row: Value = serde_json::from_str(text(&output.stdout).trim()).unwrap();
    assert_eq!((row["right"].as_bool(), row["safe"].as_bool()), (Some(true), Some(false)), "{row}");
    let finding = &row["findings"][0];
    let what = finding["what"].as_str().unwrap();
    assert!(what.contains("race") && what.contains("(twice.cu:3)"), "{what}");
    let again = judge(&[&kernel, "--at", "n=1", "--seed", "1"]);
    let said = text(&again.stdout);
    assert!(said.contains("safe: NO") && said.contains("--at n=1 --seed 1"), "{said}");
    assert!(
        text(&again.stderr).contains("`twice` is neither right nor safe"),
        "{}",
        text(&again.stderr)
    );
    // An even size alone shows nothing.
    assert!(judge(&[&kernel, "--at", "n=8"]).status.success());

    let refused = |words: &[&str], code: i32, says: &str| {
        let output = judge(words);
        assert_eq!(output.status.code(), Some(code), "{words:?}");
        let said = text(&output.stderr);
        assert!(said.contains(says), "{says} is not in {said}");
    };
    refused(&[&kernel, "--at", "m=1"], 2, "`m` is no size of the case; its sizes are n");
    refused(&[&kernel, "--case", &at("none.toml")], 2, "none.toml: ");
    let lines = std::fs::read_to_string(&case).unwrap();
    std::fs::write(&case, lines.replace("\"scale\"", "\"gelu\"")).unwrap();
    refused(&[&kernel], 1, "the primitive `gelu`: is not known; known are copy, add");
}

#[test]
fn without_a_compiler_a_sentence_says_so() {
    let output =
        program().args(["judge", "--example"]).env("CXX", "no-such-compiler").output().unwrap();
    let said = text(&output.stderr);
    assert!(
        output.status.code() == Some(1) && said.contains("`no-such-compiler` does not start"),
        "{said}"
    );
}

//! The program in a process of its own, with the library preloaded that does the faults.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::program::program;

/// A process that has not ended by then is stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// The library to preload.
pub fn preload() -> &'static Path {
    static BUILT: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let build = || {
        let folder = tempfile::tempdir().unwrap();
        let [source, library] = ["preload.c", "preload.so"].map(|name| folder.path().join(name));
        std::fs::write(&source, include_str!("preload.c")).unwrap();
        let output = Command::new("cc")
            .args(["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-o"])
            .args([&library, &source])
            .output()
            .expect("cc, which Rust links with, is installed");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{said}");
        (folder, library)
    };
    &BUILT.get_or_init(build).1
}

/// How a process ended.
pub(super) struct Ended {
    pub(super) code: Option<i32>,
    pub(super) said: String,
    pub(super) printed: String,
    /// How long it took to end after a signal, if it got one.
    pub(super) after_signal: Option<Duration>,
}

/// Runs the program in a folder with the library preloaded. A process that stalls gets a signal.
pub(super) fn run(
    folder: &Path,
    words: &[String],
    scratch: &Path,
    variables: &[(&str, &str)],
) -> Result<Ended, String> {
    let file = |name: &str| File::create(scratch.join(name)).unwrap();
    let hold = scratch.join("hold");
    let mut child = program()
        .current_dir(folder)
        .args(words)
        .env("LD_PRELOAD", preload())
        .env("FAULTS_FOLDER", folder)
        .env("FAULTS_HOLD", &hold)
        .envs(variables.iter().copied())
        .env("RAYON_NUM_THREADS", "1")
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::null())
        .stdout(file("stdout"))
        .stderr(file("stderr"))
        .spawn()
        .unwrap();
    let (start, mut signalled) = (Instant::now(), None);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if signalled.is_none() && hold.with_extension("at").exists() {
            let id = child.id().to_string();
            assert!(Command::new("kill").args(["-s", "TERM", &id]).status().unwrap().success());
            signalled = Some(Instant::now());
        }
        if start.elapsed() > PATIENCE {
            child.kill().unwrap();
            child.wait().unwrap();
            return Err("does not end".into());
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let text = |name: &str| {
        String::from_utf8_lossy(&std::fs::read(scratch.join(name)).unwrap()).into_owned()
    };
    Ok(Ended {
        code: status.code(),
        said: text("stderr"),
        printed: text("stdout"),
        after_signal: signalled.map(|at| at.elapsed()),
    })
}

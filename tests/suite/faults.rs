//! A fault at every step of every command: the process is killed, the power is cut, the disk is full, nothing may be written, a file
//! or a folder vanishes, a read fails or never returns, a signal comes.
//!
//! The program runs with `faults/preload.c` preloaded, which counts its file-system calls and does a fault at one of them. After each
//! fault the test asks whether
//!
//! - every file of the user is there unchanged, and no half-written file has the name of a whole one;
//! - the program said in one sentence which file was in the way, and did not panic;
//! - `--resume`, or the same command again, ends in the same bits as if nothing had happened.
//!
//! The suite runs one fault of each sort at a sample of the places in the code that call the system; `FAULTS=all` runs every fault at
//! every call (most of an hour), `FAULTS="train full"` those of that command and sort.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::program::program;

/// Sorts of faults at a call that changes a file or folder.
const CHANGES: [&str; 10] =
    ["kill", "half", "cut", "full", "denied", "EIO", "ENOSPC", "EINTR", "short", "stop"];
/// Sorts of faults at a call that reads.
const READS: [&str; 6] = ["EIO", "EACCES", "short", "stop", "gone", "stall"];

/// Command, sort and place of faults that were not survived once: tried each time, at the first and the last such call.
const LOST_ONCE: [(&str, &str, &str); 3] = [
    ("train", "stop", "list run"),
    ("resume", "stop", "list half"),
    ("resume", "EACCES", "list half"),
];

/// A process that has not ended by then is stuck.
const PATIENCE: Duration = Duration::from_secs(60);
/// A signal ends a run within this time.
const TO_STOP: Duration = Duration::from_secs(2);

type Files = BTreeMap<String, Vec<u8>>;

/// The library to preload.
pub fn preload() -> &'static Path {
    static BUILT: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let build = || {
        let folder = tempfile::tempdir().unwrap();
        let [source, library] = ["preload.c", "preload.so"].map(|name| folder.path().join(name));
        std::fs::write(&source, include_str!("faults/preload.c")).unwrap();
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

/// A command and what it is run on.
struct Scenario {
    name: &'static str,
    words: Vec<String>,
    /// Where the command may replace files that are there, by whole new ones.
    replaces: &'static [&'static str],
    /// The file or folder that the command writes.
    output: &'static str,
    /// Whether that is a run, which `train --resume` continues once it has a recipe.
    is_run: bool,
    /// What somebody removes meanwhile.
    removed: &'static [&'static str],
}

/// A call as the trace has it.
#[derive(Clone, Debug)]
struct Call {
    changes: bool,
    name: String,
    path: String,
    /// Its number among the calls of its sort, from 1.
    number: usize,
}

impl Call {
    /// The place in the code that makes the call, as far as what it does to which kind of file tells.
    fn site(&self) -> String {
        let mut path = self.path.replace(|c: char| c.is_ascii_digit(), "#");
        while path.contains("##") {
            path = path.replace("##", "#");
        }
        format!("{} {path}", self.name)
    }

    /// What all commands that write or read such a file have in common.
    fn code(&self) -> String {
        let site = self.site();
        format!("{} {} {}", self.changes, self.name, site.rsplit(['/', ' ']).next().unwrap())
    }

    /// The name of the file that the call is about; a temporary name stands for the one that it will get, and the beginning for a
    /// name with the time in it.
    fn file(&self) -> &str {
        let name = self.path.rsplit('/').next().unwrap();
        let inner = name.strip_prefix('.').and_then(|name| name.strip_suffix(".partial"));
        let name = inner.and_then(|name| name.rsplit_once('.')).map_or(name, |(name, _)| name);
        if name.starts_with("events.out") { "events.out" } else { name }
    }

    /// Whether a fault of this sort can happen to the call.
    fn can(&self, sort: &str) -> bool {
        let transfers = matches!(&*self.name, "write" | "read");
        match sort {
            "half" | "short" => transfers,
            "EINTR" => transfers || matches!(&*self.name, "create" | "open" | "sync"),
            "EACCES" => matches!(&*self.name, "open" | "list" | "stat"),
            "ENOSPC" => matches!(&*self.name, "create" | "mkdir" | "link" | "rename" | "sync"),
            "gone" => self.path.starts_with("data/") && self.name != "read",
            "stall" => self.path.starts_with("data/") && self.name != "entry",
            _ => true,
        }
    }
}

/// A fault at a call.
struct Fault<'a> {
    of: &'a Prepared,
    sort: &'static str,
    call: Call,
    /// What is removed or gone.
    path: &'static str,
}

impl Fault<'_> {
    fn name(&self) -> String {
        let Call { changes, number, .. } = &self.call;
        let sort = format!("{} {}", self.sort, self.path);
        let kind = if *changes { "change" } else { "read" };
        format!(
            "{} {} at {kind} {number}, {}",
            self.of.scenario.name,
            sort.trim(),
            self.call.site()
        )
    }
}

/// A scenario, the folder it starts from, and what an undisturbed run of it does.
struct Prepared {
    scenario: Scenario,
    before: Files,
    calls: Vec<Call>,
    printed: String,
    /// The essence of what it writes.
    after: Files,
    /// All files then.
    end: Files,
}

/// How a process ended.
struct Ended {
    code: Option<i32>,
    said: String,
    printed: String,
    /// How long it took to end after a signal, if it got one.
    after_signal: Option<Duration>,
}

/// Runs the program in a folder with the library preloaded. A process that stalls gets a signal.
fn run(
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

/// The files below a folder.
fn files(folder: &Path) -> Files {
    let mut all = Files::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned();
                all.insert(name, std::fs::read(path).unwrap());
            }
        }
    }
    all
}

fn restore(folder: &Path, files: &Files, below: &str) {
    for (name, bytes) in files.iter().filter(|(name, _)| is_below(name, below)) {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

fn is_below(name: &str, folder: &str) -> bool {
    folder.is_empty()
        || name.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The bytes of the header of a safetensors file, with the length before it.
fn header(bytes: &[u8]) -> Option<usize> {
    let length = u64::from_le_bytes(*bytes.first_chunk()?) as usize;
    bytes.get(8..8 + length).map(|_| 8 + length)
}

/// What has to be the same of a file at the end of two runs: all but times and what follows from them. `None` if that is nothing.
fn essence(name: &str, bytes: &[u8]) -> Option<Vec<u8>> {
    let file = name.rsplit('/').next().unwrap();
    let without = |line: &[u8], keys: &[&str]| -> Vec<u8> {
        let mut line: serde_json::Value = serde_json::from_slice(line).unwrap_or_default();
        for key in keys {
            line.as_object_mut().map(|line| line.remove(*key));
            line.get_mut("values")
                .and_then(|v| v.as_object_mut())
                .map(|values| values.remove(*key));
        }
        format!("{line}\n").into_bytes()
    };
    match file {
        ".lock" | "report.html" => Some(Vec::new()),
        "metrics.jsonl" => {
            let lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
            let keys = ["views_per_second", "waiting", "seconds"];
            Some(lines.flat_map(|line| without(line, &keys)).collect())
        }
        "result.json" => {
            Some(without(bytes, &["seconds", "memory_mib", "views_per_second", "waiting"]))
        }
        _ if file.starts_with("events.out.tfevents.") => None,
        _ if file.starts_with("step-") || file == "best.safetensors" => {
            Some(bytes[header(bytes).unwrap_or(0)..].to_vec())
        }
        _ => Some(bytes.to_vec()),
    }
}

fn essences(files: &Files, below: &str) -> Files {
    let own = files.iter().filter(|(name, _)| is_below(name, below));
    own.filter_map(|(name, bytes)| Some((name.clone(), essence(name, bytes)?))).collect()
}

/// Whether a file with the name of a whole one is a whole one. Logs grow by lines and are cut off where the last checkpoint says.
fn is_whole(name: &str, bytes: &[u8], end: &Files) -> bool {
    let file = name.rsplit('/').next().unwrap();
    let text = || std::str::from_utf8(bytes).unwrap_or_default();
    match file.rsplit_once('.').map_or("", |(_, extension)| extension) {
        "partial" | "lock" | "jsonl" | "selfsup" => true,
        "safetensors" => header(bytes).is_some_and(|from| {
            let header: serde_json::Value =
                serde_json::from_slice(&bytes[8..from]).unwrap_or_default();
            let ends = header.as_object().into_iter().flatten();
            let ends = ends.filter_map(|(_, tensor)| tensor["data_offsets"][1].as_u64());
            ends.max() == Some((bytes.len() - from) as u64)
        }),
        "html" => text().trim_end().ends_with("</html>"),
        "json" => serde_json::from_slice::<serde_json::Value>(bytes).is_ok(),
        "toml" => text().contains("[method]") || text().contains("[[arm]]"),
        "md" | "csv" | "txt" => text().ends_with('\n'),
        _ => end.get(name).is_some_and(|end| end == bytes),
    }
}

/// Does a fault and everything that the user does then.
fn survive(fault: &Fault<'_>) -> Result<(), String> {
    let Fault { of: Prepared { scenario, before, after, printed, .. }, sort, call, path } = fault;
    let [folder, scratch] = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let (folder, scratch) = (folder.path(), scratch.path());
    restore(folder, before, "");
    let number = call.number.to_string();
    let at = [
        ("FAULTS_KIND", *sort),
        ("FAULTS_AT", &*number),
        ("FAULTS_OF", if call.changes { "change" } else { "read" }),
        ("FAULTS_PATH", path),
    ];
    let ended = run(folder, &scenario.words, scratch, &at)?;
    let then = files(folder);
    check_files(fault, &then, ended.code)?;
    check_message(fault, &ended)?;
    let mut result = essences(&then, scenario.output);
    let mut after = after.clone();
    result.retain(|name, _| !name.ends_with(".partial") || !lets_be(sort));
    if *sort == "remove" {
        // What was removed after its last use stays away; pictures of images that are gone are empty.
        let pictures = is_below(path, "data");
        let stays = |name: &str| name != *path && !(pictures && name.ends_with("gallery.json"));
        result.retain(|name, _| stays(name));
        after.retain(|name, _| stays(name));
    }
    if ended.code == Some(0) && same(&result, &after, &ended.said).is_ok() {
        let same = ended.printed == *printed;
        return if same { Ok(()) } else { Err(format!("it prints {:?}", ended.printed)) };
    }
    if ended.code == Some(0) && !["remove", "gone"].contains(sort) {
        return same(&result, &after, &ended.said);
    }
    if *sort == "remove" {
        restore(folder, before, path);
    }
    let _ = std::fs::remove_file(scratch.join("hold.at"));
    let resumes = scenario.is_run
        && scenario.name != "resume"
        && folder.join(scenario.output).join("recipe.toml").is_file();
    let resume = ["train", "--device", "cpu", "--resume", scenario.output].map(String::from);
    let words = if resumes { &resume[..] } else { &scenario.words };
    let mut again = run(folder, words, scratch, &[])?;
    if scenario.name == "pack" && again.code == Some(1) {
        // What is left of a pack is named; a complete one is not packed again.
        if again.said.contains("packed: is not empty") {
            return same(&result, &after, "");
        }
        if again.said.contains("is left of a pack that was stopped") {
            std::fs::remove_dir_all(folder.join(scenario.output)).unwrap();
            again = run(folder, words, scratch, &[])?;
        }
    }
    let Ended { code, said, .. } = &again;
    if *code != Some(0) {
        return Err(format!(
            "`{} {}` then ends with {code:?}: {said}(before: {})",
            words[0], words[1], ended.said
        ));
    }
    if !resumes && again.printed != *printed {
        return Err(format!("again, it prints {:?}", again.printed));
    }
    let mut result = essences(&files(folder), scenario.output);
    result.retain(|name, _| after.contains_key(name) || *sort != "remove");
    same(&result, &after, said)
}

/// Whether a fault may keep the program from removing a temporary file.
fn lets_be(sort: &str) -> bool {
    matches!(sort, "denied" | "EIO")
}

/// What the user had is there, and what looks whole is whole.
fn check_files(fault: &Fault<'_>, then: &Files, code: Option<i32>) -> Result<(), String> {
    let Fault { of: Prepared { scenario, before, end, .. }, sort, path, .. } = fault;
    let may_be_replaced = |name: &str| scenario.replaces.iter().any(|own| is_below(name, own));
    for (name, bytes) in before {
        let removed = *sort == "remove" && is_below(name, path);
        // Old checkpoints go; rows go before their table is replaced.
        let may_go = may_be_replaced(name) && matches!(scenario.name, "resume" | "embed");
        match then.get(name) {
            None if removed || may_go => {}
            None => return Err(format!("{name} is gone")),
            Some(then) if then == bytes || may_be_replaced(name) => {}
            Some(_) => return Err(format!("{name} has changed")),
        }
    }
    let new = then.iter().filter(|(name, bytes)| before.get(*name) != Some(bytes));
    for (name, bytes) in new {
        if !is_whole(name, bytes, end) {
            return Err(format!("{name} is half-written, {} bytes", bytes.len()));
        }
        if name.ends_with(".partial") && code.is_some() && !lets_be(sort) {
            return Err(format!("{name} is left over"));
        }
    }
    if scenario.name == "embed" && !["f.npy", "f.tsv"].iter().any(|name| !then.contains_key(*name))
    {
        let new = ["f.npy", "f.tsv"].map(|name| before.get(name) != then.get(name));
        if new[0] != new[1] {
            return Err(format!("rows and their table do not belong together (new: {new:?})"));
        }
    }
    Ok(())
}

/// The program ended as the fault lets it, and said so in a sentence.
fn check_message(fault: &Fault<'_>, ended: &Ended) -> Result<(), String> {
    let Fault { of, sort, call, .. } = fault;
    let Ended { code, said, after_signal, .. } = ended;
    if said.contains("panicked") {
        return Err(format!("it panics: {said}"));
    }
    if let Some(time) = after_signal.filter(|time| *time > TO_STOP) {
        return Err(format!("it ends {time:?} after the signal"));
    }
    let signal = matches!(*sort, "kill" | "half" | "cut" | "stop" | "stall");
    let harmless = matches!(*sort, "EINTR" | "short");
    let sentences: Vec<&str> = said.lines().filter(|line| line.starts_with("selfsup: ")).collect();
    match code {
        Some(0) if matches!(*sort, "kill" | "half" | "cut") => Err("it goes on".into()),
        Some(0) => Ok(()),
        None if signal => Ok(()),
        Some(1 | 2) if !harmless => {
            let [sentence] = sentences[..] else { return Err(format!("it says {said}")) };
            if said.lines().last() != Some(sentence) {
                return Err(format!("its sentence is not the last: {said}"));
            }
            let lasts = matches!(*sort, "full" | "denied" | "gone" | "remove");
            let named = match *sort {
                "stop" | "stall" => sentence.contains("stopped"),
                _ if lasts => of.calls.iter().any(|call| sentence.contains(call.file())),
                _ => sentence.contains(call.file()),
            };
            if named {
                Ok(())
            } else {
                Err(format!("it does not name {}: {sentence}", call.file()))
            }
        }
        _ => Err(format!("it ends with {code:?}: {said}")),
    }
}

/// Compares results. Pictures and pages that a note says are missing may be missing: they are made from the rest.
fn same(got: &Files, want: &Files, said: &str) -> Result<(), String> {
    let noted = |name: &str| {
        name.ends_with("report.html") && said.contains("the report could not be written")
            || name.ends_with("gallery.json") && said.contains("the pictures could not be drawn")
            || name.ends_with("eval-skipped.txt") && said.contains("the list could not be written")
    };
    let names: BTreeSet<&String> = got.keys().chain(want.keys()).collect();
    for name in names.into_iter().filter(|name| !noted(name)) {
        match (got.get(name), want.get(name)) {
            (None, _) => return Err(format!("the result lacks {name}")),
            (_, None) => return Err(format!("the result has {name}")),
            (Some(got), Some(want)) if got != want => {
                let [got, want] = [got, want]
                    .map(|bytes| String::from_utf8_lossy(&bytes[..bytes.len().min(2000)]));
                let place = if name.ends_with("jsonl") {
                    format!(": {got} is not {want}")
                } else {
                    String::new()
                };
                return Err(format!("the result differs in {name}{place}"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Two classes of pictures, and one file in each part that is none.
fn pictures(folder: &Path) {
    for (part, count) in [("train", 4), ("test", 2)] {
        for (class, colour) in [("ape", [220, 40, 40]), ("bee", [40, 40, 220])] {
            let folder = folder.join(part).join(class);
            std::fs::create_dir_all(&folder).unwrap();
            for i in 0..count {
                let pixel = |x: u32, y: u32| {
                    image::Rgb(colour.map(|c: u8| c - 30 + ((7 * x + 13 * y + 5 * i) % 60) as u8))
                };
                image::RgbImage::from_fn(12, 12, pixel)
                    .save(folder.join(format!("{i}.png")))
                    .unwrap();
            }
        }
        std::fs::write(folder.join(part).join("bee/9.png"), "no picture").unwrap();
    }
}

/// Two epochs of two steps, with everything that a run can write.
const SETTINGS: [&str; 20] = [
    "data.path=data",
    "data.limit=0",
    "data.test_limit=0",
    "data.max_skipped=1",
    "network.width=2",
    "method.hidden=8",
    "method.embedding=8",
    "augment.size=8",
    "train.epochs=2",
    "train.batch=4",
    "train.threads=1",
    "train.loader_threads=1",
    "train.knn_every=1",
    "train.checkpoint_every=1",
    "train.checkpoint_every_steps=1",
    "train.keep=1",
    "watch.collapsed_std=0",
    "watch.collapsed_rank=0",
    "watch.diverged=0",
    "watch.tensorboard=true",
];

/// What the scenarios start from: images, runs, older results.
fn template(root: &Path, scratch: &Path) {
    pictures(&root.join("data"));
    let run = |words: &[String], variables: &[(&str, &str)], code: Option<i32>| {
        let ended = run(root, words, scratch, variables).unwrap();
        assert_eq!(ended.code, code, "{words:?}: {}", ended.said);
    };
    run(&train("run"), &[], Some(0));
    // Killed before the first epoch's checkpoint got its name.
    run(
        &train("half"),
        &[("FAULTS_KIND", "kill"), ("FAULTS_AT", "60"), ("FAULTS_OF", "change")],
        None,
    );
    assert!(root.join("half/step-00000001.safetensors").is_file());
    run(&words("export run"), &[], Some(0));
    let backbone = root.join("run/backbone.safetensors");
    let mut bytes = std::fs::read(&backbone).unwrap();
    let last = bytes.len() - 3;
    bytes[last] ^= 1;
    std::fs::write(&backbone, bytes).unwrap();
    run(
        &words("embed run data --out f.npy --split test --max-skipped 1 --device cpu"),
        &[],
        Some(0),
    );
    let settings = SETTINGS.map(|setting| format!("{setting:?}")).join(", ");
    let study = format!(
        "question = \"Which?\"\nsource = \"here\"\nbase = \"demo\"\ncolumns = [\"knn\", \"loss\"]\nset = [{settings}, \"train.epochs=1\"]\n\
         [[arm]]\nname = \"a\"\n[[arm]]\nname = \"b\"\nafter = \"a\"\nset = [\"watch.report=false\"]\n"
    );
    std::fs::write(root.join("study.toml"), study).unwrap();
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(String::from).collect()
}

fn train(out: &str) -> Vec<String> {
    let mut all = words(&format!("train demo --device cpu --out {out}"));
    all.extend(SETTINGS.iter().flat_map(|setting| ["--set".to_owned(), (*setting).to_owned()]));
    all
}

/// The commands, each with the parts of the template that it needs.
fn scenarios() -> Vec<(Scenario, &'static [&'static str])> {
    let of = |name, words, output, replaces| Scenario {
        name,
        words,
        replaces,
        output,
        is_run: false,
        removed: &[],
    };
    let knn = words("eval knn run --k 5 --device cpu");
    let linear = words("eval linear run --epochs 1 --device cpu");
    let finetune = words(
        "eval finetune run --out tuned --device cpu --set train.epochs=1 --set train.batch=4",
    );
    let embed = words("embed run data --out f.npy --max-skipped 1 --device cpu");
    let removed: &[&str] = &[
        "run",
        "run/metrics.jsonl",
        "run/recipe.toml",
        "run/best.safetensors",
        "data",
        "data/test",
    ];
    vec![
        (Scenario { is_run: true, removed, ..of("train", train("run"), "run", &[]) }, &["data"]),
        (
            Scenario {
                is_run: true,
                ..of(
                    "resume",
                    words("train --resume half --device cpu --set train.keep=2"),
                    "half",
                    &["half"],
                )
            },
            &["data", "half"],
        ),
        (of("knn", knn, "run/eval-skipped.txt", &[]), &["data", "run"]),
        (of("linear", linear, "run/eval-skipped.txt", &[]), &["data", "run"]),
        (Scenario { is_run: true, ..of("finetune", finetune, "tuned", &[]) }, &["data", "run"]),
        (of("pack", words("pack data --out packed --max-skipped 1"), "packed", &[]), &["data"]),
        (
            of(
                "export",
                words("export run"),
                "run/backbone.safetensors",
                &["run/backbone.safetensors"],
            ),
            &["run"],
        ),
        (
            Scenario {
                removed: &["data", "run"],
                ..of("embed", embed, "f.npy", &["f.npy", "f.tsv"])
            },
            &["data", "run", "f.npy", "f.tsv"],
        ),
        (
            Scenario {
                removed: &["s", "s/a/seed-0/recipe.toml", "data"],
                ..of("study", words("study study.toml --out s --device cpu"), "s", &[])
            },
            &["data", "study.toml"],
        ),
        (of("report", words("report run"), "run/report.html", &["run/report.html"]), &["run"]),
    ]
}

/// Runs a scenario undisturbed.
fn prepare(scenario: Scenario, needs: &[&str], all: &Files, root: &Path) -> Prepared {
    let before: Files = all
        .iter()
        .filter(|(name, _)| needs.iter().any(|need| is_below(name, need)))
        .map(|(name, bytes)| (name.clone(), bytes.clone()))
        .collect();
    let [folder, scratch] = ["folder", "scratch"].map(|name| root.join(scenario.name).join(name));
    [&folder, &scratch].iter().for_each(|folder| std::fs::create_dir_all(folder).unwrap());
    restore(&folder, &before, "");
    let trace = scratch.join("trace");
    let ended =
        run(&folder, &scenario.words, &scratch, &[("FAULTS_TRACE", trace.to_str().unwrap())])
            .unwrap();
    assert_eq!(ended.code, Some(0), "{}: {}", scenario.name, ended.said);
    let (mut calls, mut counts) = (Vec::new(), [0, 0]);
    for line in std::fs::read_to_string(trace).unwrap().lines() {
        let [sort, name, path] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
        let changes = sort == "change";
        counts[usize::from(changes)] += 1;
        let number = counts[usize::from(changes)];
        calls.push(Call { changes, name: name.into(), path: path.into(), number });
    }
    let end = files(&folder);
    let after = essences(&end, scenario.output);
    Prepared { scenario, before, calls, printed: ended.printed, after, end }
}

/// The faults of a scenario: all, or a sample in which each place has some, and each sort is at some places.
fn faults<'a>(
    of: &'a Prepared,
    whole: bool,
    seen: &mut BTreeSet<String>,
    turn: &mut usize,
) -> Vec<Fault<'a>> {
    let mut places: BTreeMap<(bool, String), Vec<&Call>> = BTreeMap::new();
    of.calls
        .iter()
        .for_each(|call| places.entry((call.changes, call.site())).or_default().push(call));
    let mut all = Vec::new();
    let fault = |sort, path, call: &Call| Fault { of, sort, call: call.clone(), path };
    for ((changes, _), calls) in &places {
        let removes = of.scenario.removed.iter().filter(|_| *changes).map(|path| ("remove", *path));
        let sorts = if *changes { &CHANGES[..] } else { &READS[..] };
        let sorts = sorts
            .iter()
            .filter(|sort| calls[0].can(sort))
            .map(|sort| (*sort, if *sort == "gone" { "data" } else { "" }));
        let sorts: Vec<_> = sorts.chain(removes).collect();
        if whole {
            all.extend(
                calls
                    .iter()
                    .flat_map(|call| sorts.iter().map(|(sort, path)| fault(*sort, *path, call))),
            );
            continue;
        }
        let site = calls[0].site();
        let lost =
            LOST_ONCE.iter().filter(|(name, _, at)| *name == of.scenario.name && *at == site);
        for (_, sort, _) in lost {
            all.extend([calls[0], calls[calls.len() - 1]].map(|call| fault(sort, "", call)));
        }
        *turn += 1;
        // Most commands write and read most kinds of files with the same code.
        if !seen.insert(calls[0].code()) && !turn.is_multiple_of(5) {
            continue;
        }
        // By turns, at calls that are spread over those of the place.
        for (sort, path) in
            (0..1 + usize::from(*changes)).map(|i| sorts[(*turn + 5 * i) % sorts.len()])
        {
            all.push(fault(sort, path, calls[*turn * 7 % calls.len()]));
        }
    }
    all
}

#[test]
fn faults_cost_neither_files_nor_runs_nor_bits() {
    let root = tempfile::tempdir().unwrap();
    let [start, scratch] = ["start", "scratch"].map(|name| root.path().join(name));
    [&start, &scratch].iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
    template(&start, &scratch);
    let start = files(&start);
    let wanted = std::env::var("FAULTS").ok();
    let prepared: Vec<Prepared> = scenarios()
        .into_iter()
        .map(|(scenario, needs)| prepare(scenario, needs, &start, root.path()))
        .collect();
    let (mut seen, mut turn) = (BTreeSet::new(), 0);
    let mut all: Vec<Fault<'_>> =
        prepared.iter().flat_map(|of| faults(of, wanted.is_some(), &mut seen, &mut turn)).collect();
    if let Some(words) = wanted.as_deref().filter(|words| *words != "all") {
        all.retain(|fault| fault.name().contains(words));
    }
    let (next, lost) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(fault) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(why) = survive(fault) {
                lost.lock().unwrap().push(format!("{}: {why}", fault.name()));
            }
        }
    };
    std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(work))));
    let lost = lost.into_inner().unwrap();
    println!("faults survived: {} of {}", all.len() - lost.len(), all.len());
    assert!(lost.is_empty() && !all.is_empty(), "{} lost:\n{}", lost.len(), lost.join("\n"));
}

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

#[path = "faults/call.rs"]
mod call;
#[path = "faults/files.rs"]
mod files;
#[path = "faults/process.rs"]
mod process;
#[path = "faults/scenarios.rs"]
mod scenarios;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use call::{CHANGES, Call, READS};
use files::{Files, essences, files, is_below, is_whole, restore, same};
pub use process::preload;
use process::{Ended, run};
use scenarios::{Scenario, scenarios, template};

/// Command, sort and place of faults that were not survived once: tried each time, at the first and the last such call.
const LOST_ONCE: [(&str, &str, &str); 3] = [
    ("train", "stop", "list run"),
    ("resume", "stop", "list half"),
    ("resume", "EACCES", "list half"),
];

/// A signal ends a run within this time.
const TO_STOP: Duration = Duration::from_secs(2);

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

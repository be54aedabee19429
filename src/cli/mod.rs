//! The command line: results go to stdout, everything else to stderr. Exit codes: 0 success, 1 failure, 2 wrong usage.

mod against;
mod args;
mod bench;
mod check;
mod commands;
mod device;
mod eval;
mod exchanges;
mod inspect;
mod interchange;
mod judge;
mod nvcc;
mod output;
mod own;
mod pack;
mod primitives;
mod progress;
mod ranks;
mod recipes;
mod signals;
mod skipped;
mod stats;
mod study;
mod traffic;
mod tune;

use std::borrow::Cow;
use std::ffi::OsString;
use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;

use crate::cpu::Isa;
use crate::device::{Launch, check_default_threads};
use crate::error::{Error, Result};
use crate::recipes::MOST_THREADS;
use args::{Args, Command, Eval};

/// Runs the program: parses the command line and runs the command.
pub fn main() -> ExitCode {
    #[cfg(unix)]
    if let Some(meeting) = Launch::detect().and_then(|launch| launch.meeting()) {
        return ranks::again_with(&meeting);
    }
    main_with(std::env::args_os()).into()
}

/// Runs the program with these words, the program's name first, and returns its exit code: for programs that carry this one, as
/// the Python package does. Signals are handled as in the program.
pub fn main_with(words: impl IntoIterator<Item = OsString>) -> u8 {
    signals::let_writes_fail();
    let args = match Args::try_parse_from(words) {
        Ok(args) => args,
        Err(error) => return told(&error),
    };
    let launch = Launch::detect();
    SILENT.store(launch.as_ref().is_some_and(|launch| launch.rank > 0), Ordering::Relaxed);
    if let Err(error) = in_one_process(&args.command, launch.as_ref()) {
        talk(&format!("selfsup: {error}"));
        return 2;
    }
    let checked = check_instruction_set()
        .and_then(|()| check_default_threads(MOST_THREADS).map_err(Error::Config));
    match checked.and_then(|()| run(args.command)) {
        Ok(()) => ranks::leave(),
        // The reader of stdout has closed it: `selfsup recipes demo | head -1`.
        Err(Error::Io { source, .. }) if source.kind() == ErrorKind::BrokenPipe => 0,
        Err(error) => {
            let code = if matches!(error, Error::Config(_)) { 2 } else { 1 };
            match launch {
                Some(launch) => ranks::fail(&error, &launch, code),
                None => talk(&format!("selfsup: {error}")),
            }
            code
        }
    }
}

/// Prints a help text, or what is wrong with the words; returns the exit code.
fn told(error: &clap::Error) -> u8 {
    let printed = error.print().and_then(|()| std::io::stdout().flush());
    match printed {
        Err(reason) if reason.kind() != ErrorKind::BrokenPipe => {
            talk(&format!("selfsup: standard output: {reason}"));
            1
        }
        _ => u8::try_from(error.exit_code()).unwrap_or(2),
    }
}

/// Refuses a command that several processes would each do.
fn in_one_process(command: &Command, launch: Option<&Launch>) -> Result<()> {
    match (command, launch) {
        (Command::Train(_) | Command::Devices { .. }, _) | (_, None) => Ok(()),
        (_, Some(launch)) => Err(Error::Config(format!(
            "{} started {} processes, and only `train` runs in several: start this command without it",
            launch.by, launch.size
        ))),
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Demo(demo) => commands::demo(&demo),
        Command::Train(train) => commands::train(&train),
        Command::Eval { what } => match what {
            Eval::Knn(knn) => eval::knn(&knn),
            Eval::Linear(linear) => eval::linear(&linear),
            Eval::Finetune(finetune) => eval::finetune(&finetune),
        },
        Command::Export(export) => interchange::export(&export),
        Command::Embed(embed) => interchange::embed(&embed),
        Command::Pack(args) => pack::pack(&args),
        Command::Inspect(inspect) => inspect::inspect(&inspect),
        Command::Recipes { name } => recipes::recipes(name.as_deref()),
        Command::Report { runs, out } => commands::report(&runs, out),
        Command::Diagnose { runs, json } => commands::diagnose(&runs, json),
        Command::Stats(args) => stats::stats(&args),
        Command::Study(study) => study::study(&study),
        Command::TuneLr(args) => tune::tune_lr(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Judge(args) => judge::judge(&args),
        Command::Check(args) => check::check(&args),
        Command::Devices { json } => commands::devices(json),
    }
}

/// Refuses a wrong `SELFSUP_ISA` with a sentence, before the first convolution panics over it.
fn check_instruction_set() -> Result<()> {
    let Some(name) = std::env::var_os("SELFSUP_ISA") else { return Ok(()) };
    let isa = match name.to_str() {
        Some("portable") => Isa::Portable,
        Some("avx2") => Isa::Avx2,
        Some("avx512") => Isa::Avx512,
        _ => {
            let name = name.display();
            return Err(Error::Config(format!(
                "SELFSUP_ISA is `{name}`; it must be portable, avx2 or avx512"
            )));
        }
    };
    if isa.is_available() {
        return Ok(());
    }
    let name = name.display();
    Err(Error::Config(format!("SELFSUP_ISA is `{name}`, which this machine lacks: unset it")))
}

/// Escapes control characters, which a terminal would obey: names of files may hold them.
fn printable(line: &str) -> Cow<'_, str> {
    let obeyed = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if !line.contains(obeyed) {
        return line.into();
    }
    let escape = |c: char| if obeyed(c) { c.escape_default().to_string() } else { c.into() };
    line.chars().map(escape).collect::<String>().into()
}

/// Whether this process leaves the terminal to another: it is a rank other than 0.
static SILENT: AtomicBool = AtomicBool::new(false);

fn silent() -> bool {
    SILENT.load(Ordering::Relaxed)
}

/// Prints a line on stderr.
fn talk(line: &str) {
    if silent() {
        return;
    }
    let _ = writeln!(std::io::stderr(), "{}", printable(line)); // there is no one left to tell
}

/// Prints a line of results on stdout.
fn say(line: &str) -> Result<()> {
    if silent() {
        return Ok(());
    }
    writeln!(std::io::stdout(), "{}", printable(line)).map_err(Error::io("standard output"))
}

fn on_terminal() -> bool {
    !silent() && std::io::stderr().is_terminal()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_in_file_names_do_not_reach_the_terminal() {
        assert_eq!(printable("a\tb\nc é"), "a\tb\nc é");
        assert_eq!(printable("x\u{1b}[2J\r\u{9b}y"), "x\\u{1b}[2J\\r\\u{9b}y");
    }
}

//! How several processes of the program end: together, and with one sentence.

#[cfg(unix)]
use std::process::{Command, ExitCode};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{SILENT, silent, talk};
use crate::device::{Group, Launch};
use crate::error::Error;

/// How long a rank waits for another one, which knows more, to end the job.
const GRACE: Duration = Duration::from_millis(500);

/// Replaces this process by the same program with the address where the ranks' NCCL meets: NCCL reads it from the environment, which
/// a running program cannot safely change.
#[cfg(unix)]
pub(super) fn again_with(meeting: &str) -> ExitCode {
    use std::os::unix::process::CommandExt;
    let failed = std::env::current_exe().map(|program| {
        Command::new(program).args(std::env::args_os().skip(1)).env("NCCL_COMM_ID", meeting).exec()
    });
    let (Ok(reason) | Err(reason)) = failed;
    talk(&format!("selfsup: starting again with NCCL_COMM_ID={meeting} failed ({reason}): set it"));
    1.into()
}

/// Ends a command that succeeded.
pub(super) fn leave() -> u8 {
    // Initialised by the command, or never: `devices` needs no other rank.
    if let Some(group) = Group::opened() {
        group.leave();
    }
    0
}

/// Reports a failure, unless another rank does, and ends all ranks.
pub(super) fn fail(error: &Error, launch: &Launch, code: u8) {
    let group = Group::opened();
    match (error, &group) {
        (Error::Elsewhere(_), _) => std::thread::sleep(GRACE),
        // All ranks end so, with the same sentence.
        (Error::Stopped(_) | Error::Diverged(_) | Error::Collapsed(_), Some(group)) => {
            talk(&format!("selfsup: {error}"));
            return group.leave();
        }
        _ => {
            // Without a group all ranks fail alike, one by one: once the first has ended, the launcher ends the others.
            if silent() && group.is_none() {
                std::thread::sleep(GRACE);
            }
            SILENT.store(false, Ordering::Relaxed);
            talk(&format!("selfsup: rank {} of {}: {error}", launch.rank, launch.size));
        }
    }
    if let Some(group) = group {
        group.abort(code);
    }
}

//! How long a rank waits for the others.
//!
//! A process that exits is noticed by the launcher, which ends the others. One that hangs (a dead disk, a stopped machine) is
//! not: the others would wait in a collective for ever. A rank therefore looks how long it has waited; past the limit it says in
//! which phase, and ends, upon which the launcher ends the rest.

use std::io::Write;
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use super::lock;

/// The variable with the limit in seconds.
const VARIABLE: &str = "SELFSUP_RANK_TIMEOUT";
const LIMIT: Duration = Duration::from_secs(600);

/// How long a rank looks again and again: a step makes a hundred exchanges, most of which take a few microseconds.
const BUSY: Duration = Duration::from_micros(50);
/// How long it then gives way to others that are ready to run, before it sleeps.
const YIELDING: Duration = Duration::from_micros(200);
const SLEEP: Duration = Duration::from_micros(50);

/// The limit, and what the rank is doing.
pub struct Patience {
    rank: usize,
    limit: Duration,
    phase: Mutex<String>,
    /// What is exchanged.
    what: Mutex<&'static str>,
}

impl Default for Patience {
    /// Waits for as long as a rank does unless told otherwise.
    fn default() -> Self {
        Self { rank: 0, limit: LIMIT, phase: Mutex::default(), what: Mutex::new("nothing") }
    }
}

impl Patience {
    /// With the limit of the environment.
    pub(super) fn new() -> Result<Self, String> {
        let limit = match std::env::var(VARIABLE) {
            Err(_) => LIMIT,
            Ok(text) => {
                let seconds = text.parse::<f64>().ok();
                let limit = seconds.and_then(|s| Duration::try_from_secs_f64(s).ok());
                limit.filter(|limit| !limit.is_zero()).ok_or_else(|| {
                    format!("{VARIABLE} is `{text}`; it must be a number of seconds above 0")
                })?
            }
        };
        Ok(Self { limit, ..Self::default() })
    }

    pub(super) fn of_rank(self, rank: usize) -> Self {
        Self { rank, ..self }
    }

    /// Names what the rank is doing.
    pub(super) fn enter(&self, phase: &str) {
        phase.clone_into(&mut lock(&self.phase));
    }

    /// Names what the rank exchanges next.
    pub(super) fn exchange(&self, what: &'static str) {
        *lock(&self.what) = what;
    }

    /// Pauses between two looks, after so long a wait; returns a sentence once it has taken too long.
    pub(super) fn pause(&self, waited: Duration) -> Option<String> {
        if waited < BUSY {
            std::hint::spin_loop();
        } else if waited < YIELDING {
            std::thread::yield_now();
        } else {
            std::thread::sleep(SLEEP);
        }
        if waited <= self.limit {
            return None;
        }
        let what = lock(&self.what);
        Some(self.sentence(waited, &what))
    }

    fn sentence(&self, waited: Duration, what: &str) -> String {
        let phase = lock(&self.phase);
        let phase = if phase.is_empty() { "at the start" } else { &**phase };
        format!(
            "rank {} has waited {:.0} s for the other ranks {phase} (to exchange {what}): a rank hangs; resume from the newest \
             checkpoint ({VARIABLE} sets the limit in seconds)",
            self.rank,
            waited.as_secs_f64()
        )
    }

    /// What the rank is doing, with a space before it.
    pub(super) fn phase(&self) -> String {
        let phase = lock(&self.phase);
        if phase.is_empty() { String::new() } else { format!(" {phase}") }
    }
}

/// Ends the process unless it is dropped within the limit: around a call of a library that waits for the other ranks by itself.
pub(super) struct Guard(#[allow(dead_code)] Sender<()>);

impl Guard {
    pub(super) fn new(patience: &Patience, what: &str) -> Self {
        let (limit, sentence) = (patience.limit, patience.sentence(patience.limit, what));
        let (end, ended) = channel();
        std::thread::spawn(move || {
            if ended.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
                let _ = writeln!(std::io::stderr(), "selfsup: {sentence}");
                std::process::exit(1); // the launcher ends the others
            }
        });
        Self(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_complains_only_past_its_limit() {
        let patience =
            Patience { limit: Duration::from_secs(5), ..Patience::new().unwrap() }.of_rank(2);
        patience.enter("in step 3");
        patience.exchange("gradients");
        let [soon, late] = [Duration::from_secs(4), Duration::from_secs(60)];
        assert_eq!(patience.pause(soon), None);
        let sentence = patience.pause(late).unwrap();
        let start = "rank 2 has waited 60 s for the other ranks in step 3 (to exchange gradients)";
        assert!(sentence.starts_with(start), "{sentence}");
    }
}

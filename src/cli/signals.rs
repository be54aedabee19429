//! Ctrl-C, SIGTERM and a closed terminal request a stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use signal_hook::consts::TERM_SIGNALS;
use signal_hook::flag;

use crate::error::{Error, Result};

/// Returns a flag that the first signal sets. While it is set, a signal ends the program at once, as one ends a program without
/// handlers: who started the program sees the signal, not an exit code without a sentence.
pub(super) fn stop() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for &signal in TERM_SIGNALS.iter().chain(HANG_UP) {
        // The order matters: the first signal must find the flag unset.
        flag::register_conditional_default(signal, stop.clone())
            .and_then(|_| flag::register(signal, stop.clone()))
            .map_err(Error::io("signal handler"))?;
    }
    Ok(stop)
}

/// Lets a write beyond the largest file that the process may have (`ulimit -f`) fail with an error, as one on a full disk does, in
/// place of ending the program.
pub(super) fn let_writes_fail() {
    #[cfg(unix)]
    // Without the handler the signal ends the program, which is no worse than before.
    let _ = flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
}

/// How long an evaluation may take to notice that it is to stop.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Ends the program if an evaluation does not stop when asked to: a read from a dead network mount may never return. The run
/// wrote a checkpoint before it.
pub(super) fn end_stuck_evaluation(
    stop: Arc<AtomicBool>,
    evaluating: Arc<Mutex<Option<String>>>,
    ended: Arc<AtomicBool>,
) {
    let watch = move || {
        let mut asked = None;
        while !ended.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(50));
            let evaluating = evaluating.lock().unwrap_or_else(PoisonError::into_inner);
            match &*evaluating {
                Some(sentence) if stop.load(Ordering::Relaxed) => {
                    if asked.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
                        super::talk(&format!("selfsup: {sentence}"));
                        std::process::exit(1);
                    }
                }
                _ => asked = None,
            }
        }
    };
    // Without a thread to be had, a stuck evaluation ends with the second signal.
    let _ = std::thread::Builder::new().spawn(watch);
}

#[cfg(unix)]
const HANG_UP: &[i32] = &[signal_hook::consts::SIGHUP];
#[cfg(not(unix))]
const HANG_UP: &[i32] = &[];

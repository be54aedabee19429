//! Ctrl-C, SIGTERM and a closed terminal request a stop.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::TERM_SIGNALS;
use signal_hook::flag;

use crate::error::{Error, Result};

/// Returns a flag that the first signal sets. The second signal ends the program at once.
pub(super) fn stop() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    for &signal in TERM_SIGNALS.iter().chain(HANG_UP) {
        // The order matters: the first signal must find the flag unset.
        flag::register_conditional_shutdown(signal, 1, stop.clone())
            .and_then(|_| flag::register(signal, stop.clone()))
            .map_err(Error::io("signal handler"))?;
    }
    Ok(stop)
}

#[cfg(unix)]
const HANG_UP: &[i32] = &[signal_hook::consts::SIGHUP];
#[cfg(not(unix))]
const HANG_UP: &[i32] = &[];

//! Which GPU models a version of the program has proved itself on: a file in the user's cache folder.

use std::path::PathBuf;

use crate::device::{Device, gpu_model};
use crate::files;

/// The file, one line for each program version, GPU model and driver; `None` without a home folder.
fn file() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|path| !path.is_empty());
    let cache = folder("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(folder("HOME")?).join(".cache")))?;
    Some(cache.join("selfsup").join("checked-gpus.txt"))
}

fn line(device: &Device) -> String {
    format!("selfsup {}, {}", env!("CARGO_PKG_VERSION"), gpu_model(device))
}

/// Whether this version of the program has passed the short self-test on this GPU model with this driver.
pub(super) fn is_remembered(device: &Device) -> bool {
    let known = file().and_then(|file| std::fs::read_to_string(file).ok()).unwrap_or_default();
    let line = line(device);
    known.lines().any(|known| known == line)
}

/// Remembers that it has. A folder that cannot be written is no error: the test runs again next time.
pub(super) fn remember(device: &Device) {
    let Some(file) = file() else { return };
    let known = std::fs::read_to_string(&file).unwrap_or_default();
    let text = format!("{known}{}\n", line(device));
    if let Some(folder) = file.parent()
        && std::fs::create_dir_all(folder).is_ok()
    {
        let _ = files::write_file(&file, text.as_bytes());
    }
}

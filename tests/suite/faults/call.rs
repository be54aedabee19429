//! Calls of the system as a trace has them, and which faults can happen at one.

/// Sorts of faults at a call that changes a file or folder.
pub(super) const CHANGES: [&str; 10] =
    ["kill", "half", "cut", "full", "denied", "EIO", "ENOSPC", "EINTR", "short", "stop"];

/// Sorts of faults at a call that reads.
pub(super) const READS: [&str; 6] = ["EIO", "EACCES", "short", "stop", "gone", "stall"];

/// A call as the trace has it.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) changes: bool,
    pub(super) name: String,
    pub(super) path: String,
    /// Its number among the calls of its sort, from 1.
    pub(super) number: usize,
}

impl Call {
    /// The place in the code that makes the call, as far as what it does to which kind of file tells.
    pub(super) fn site(&self) -> String {
        let mut path = self.path.replace(|c: char| c.is_ascii_digit(), "#");
        while path.contains("##") {
            path = path.replace("##", "#");
        }
        format!("{} {path}", self.name)
    }

    /// What all commands that write or read such a file have in common.
    pub(super) fn code(&self) -> String {
        let site = self.site();
        format!("{} {} {}", self.changes, self.name, site.rsplit(['/', ' ']).next().unwrap())
    }

    /// The name of the file that the call is about; a temporary name stands for the one that it will get, and the beginning for a
    /// name with the time in it.
    pub(super) fn file(&self) -> &str {
        let name = self.path.rsplit('/').next().unwrap();
        let inner = name.strip_prefix('.').and_then(|name| name.strip_suffix(".partial"));
        let name = inner.and_then(|name| name.rsplit_once('.')).map_or(name, |(name, _)| name);
        if name.starts_with("events.out") { "events.out" } else { name }
    }

    /// Whether a fault of this sort can happen to the call.
    pub(super) fn can(&self, sort: &str) -> bool {
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

//! Device and pinned memory: one reserved range of addresses, in which every allocation lies between guards.
//!
//! New memory and freed memory are filled with 0xff, which is NaN in every float format and -1 in every integer: what
//! nobody wrote, or what is gone, shows in the first sum. Freed memory is not handed out again for a while.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::engine::{self, State};

/// Bytes before and behind each allocation that nobody may touch.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xa5;
pub(crate) const POISON: u8 = 0xff;

/// Bytes of freed memory that are kept from being used again.
const QUARANTINE: usize = 256 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Device,
    /// Host memory that the device can reach.
    Pinned,
}

#[derive(Clone, Copy, Debug)]
struct Allocation {
    size: usize,
    kind: Kind,
    live: bool,
}

pub(crate) struct Memory {
    base: usize,
    /// Bytes of the range that were ever used.
    used: usize,
    reserved: usize,
    /// What the device has, bytes.
    pub total: usize,
    /// Of it, allocated.
    pub taken: usize,
    all: BTreeMap<usize, Allocation>,
    quarantine: VecDeque<usize>,
    quarantined: usize,
    /// Freed ranges that may be used again, by size with guards.
    free: HashMap<usize, Vec<usize>>,
}

/// Bytes that an allocation takes of the range.
fn span(size: usize) -> usize {
    size.next_multiple_of(256) + 2 * GUARD
}

fn fill(at: usize, size: usize, byte: u8) {
    unsafe { std::ptr::write_bytes(at as *mut u8, byte, size) }
}

impl Memory {
    /// A device with `total` bytes.
    pub fn new(total: usize) -> Self {
        let reserved = total * 2 + (4 << 30);
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                reserved,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert!(
            base != libc::MAP_FAILED,
            "stand-in driver: the system reserves no {reserved} bytes"
        );
        engine::watch(base as usize, reserved);
        Self {
            base: base as usize,
            used: 0,
            reserved,
            total,
            taken: 0,
            all: BTreeMap::new(),
            quarantine: VecDeque::new(),
            quarantined: 0,
            free: HashMap::new(),
        }
    }

    /// New memory, 256-byte aligned, or none if the device has no more.
    pub fn allocate(&mut self, size: usize, kind: Kind) -> Option<usize> {
        if kind == Kind::Device && self.taken + size > self.total {
            return None;
        }
        let span = span(size);
        let at = match self.free.get_mut(&span).and_then(Vec::pop) {
            Some(at) => at,
            None if self.used + span <= self.reserved => {
                self.used += span;
                self.base + self.used - span + GUARD
            }
            None => return None,
        };
        fill(at - GUARD, GUARD, GUARD_BYTE);
        fill(at, size, POISON);
        fill(at + size, span - GUARD - size, GUARD_BYTE);
        // What the host writes to pinned memory is not seen.
        engine::mark(
            at,
            size,
            if kind == Kind::Device { State::Unwritten } else { State::Written },
        );
        if kind == Kind::Device {
            self.taken += size;
        }
        self.all.insert(at, Allocation { size, kind, live: true });
        Some(at)
    }

    /// Whether an allocation of this kind starts at `at`.
    pub fn is_live(&self, at: usize, kind: Kind) -> bool {
        self.all.get(&at).is_some_and(|a| a.live && a.kind == kind)
    }

    /// Frees what starts at `at`, which is live.
    pub fn release(&mut self, at: usize) {
        let allocation = self.all.get_mut(&at).expect("checked by the caller");
        allocation.live = false;
        let Allocation { size, kind, .. } = *allocation;
        if kind == Kind::Device {
            self.taken -= size;
        }
        fill(at, size, POISON);
        engine::mark(at, size, State::Closed);
        self.quarantine.push_back(at);
        self.quarantined += size;
        while self.quarantined > QUARANTINE && self.quarantine.len() > 1 {
            let old = self.quarantine.pop_front().expect("more than one");
            let size = self.all.remove(&old).expect("kept until now").size;
            self.quarantined -= size;
            self.free.entry(span(size)).or_default().push(old);
        }
    }

    /// The allocation that `at` lies in or next to.
    fn nearest(&self, at: usize) -> Option<(usize, Allocation)> {
        let before = self.all.range(..=at).next_back().map(|(a, b)| (*a, *b));
        let after = self.all.range(at..).next().map(|(a, b)| (*a, *b));
        match (before, after) {
            (Some((start, a)), _) if at < start + span(a.size) - GUARD => before,
            (_, Some((start, _))) if at + GUARD >= start => after,
            _ => before.or(after),
        }
    }

    /// Whether an address is in the range of device and pinned memory.
    pub fn holds(&self, at: usize) -> bool {
        (self.base..self.base + self.reserved).contains(&at)
    }

    pub fn is_pinned(&self, at: usize) -> bool {
        self.holds(at) && self.nearest(at).is_some_and(|(_, a)| a.kind == Kind::Pinned)
    }

    /// What is wrong with touching these bytes, if anything is.
    pub fn fault(&self, at: usize, size: usize) -> Option<String> {
        let inside = self
            .nearest(at)
            .is_some_and(|(start, a)| a.live && at >= start && at + size <= start + a.size);
        (!inside).then(|| format!("{size} bytes at {}", self.describe(at)))
    }

    /// Where an address lies, in words.
    pub fn describe(&self, at: usize) -> String {
        match self.nearest(at) {
            Some((start, a)) if self.holds(at) => {
                let state = match (a.live, a.kind) {
                    (true, Kind::Device) => "device memory",
                    (true, Kind::Pinned) => "pinned memory",
                    (false, _) => "memory that was freed",
                };
                let size = a.size;
                if at < start {
                    format!("{} bytes before {size} bytes of {state}", start - at)
                } else if at >= start + size {
                    format!("{} bytes past the end of {size} bytes of {state}", at - start - size)
                } else {
                    format!("offset {} of {size} bytes of {state}", at - start)
                }
            }
            _ => format!("address {at:#x}"),
        }
    }

    /// The first allocation whose guards somebody wrote to; they are mended.
    pub fn broken_guard(&mut self) -> Option<String> {
        let intact = |from: usize, size: usize| {
            let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, size) };
            bytes.iter().all(|b| *b == GUARD_BYTE)
        };
        for (&at, a) in self.all.iter().filter(|(_, a)| a.live) {
            let behind = span(a.size) - GUARD - a.size;
            let before = !intact(at - GUARD, GUARD);
            if before || !intact(at + a.size, behind) {
                fill(at - GUARD, GUARD, GUARD_BYTE);
                fill(at + a.size, behind, GUARD_BYTE);
                let side = if before { "before" } else { "behind" };
                return Some(format!("somebody wrote {side} {} bytes of device memory", a.size));
            }
        }
        None
    }

    /// All live memory counts as written: kernels that were not watched may have written it.
    pub fn mark_all_written(&self) {
        for (&at, a) in self.all.iter().filter(|(_, a)| a.live) {
            engine::mark(at, a.size, State::Written);
        }
    }

    /// Live allocations of the device.
    pub fn live(&self) -> usize {
        self.all.values().filter(|a| a.live && a.kind == Kind::Device).count()
    }
}

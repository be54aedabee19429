//! Device and pinned memory: one reserved address range, in which every allocation lies between guards.
//!
//! New and freed memory is filled with 0xff, which is NaN in every float format and -1 in every integer: unwritten or freed
//! values show in the first sum. Freed memory is quarantined before it is reused.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::engine::{self, State};

/// Inaccessible bytes before and after each allocation.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xa5;
pub(crate) const POISON: u8 = 0xff;

/// Device memory is handed out in pages. An allocation of more than half a page takes whole ones; smaller ones share pages, in
/// units. So it is with drivers on Linux; no manual says it. That a page stays taken until its last allocation goes is not modelled.
const PAGE: usize = 2 << 20;
const UNIT: usize = 512;

/// Bytes of freed memory that are withheld from reuse.
const QUARANTINE: usize = 256 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Device,
    /// Host memory that the device can access.
    Pinned,
}

#[derive(Clone, Copy, Debug)]
struct Allocation {
    size: usize,
    kind: Kind,
    live: bool,
    /// The context that it was made in, and that one's device.
    context: usize,
    device: usize,
}

/// What is taken of a device's memory.
#[derive(Clone, Copy)]
struct Taken {
    /// Whether its context exists.
    context: bool,
    /// Pages of allocations that have their own, in bytes.
    whole_pages: usize,
    /// Units of allocations that share pages, in bytes.
    units: usize,
}

pub(crate) struct Memory {
    base: usize,
    /// Bytes of the range that have ever been used.
    used: usize,
    reserved: usize,
    /// Size of a device's memory, in bytes.
    pub total: usize,
    /// Bytes that a context takes.
    context: usize,
    taken: Vec<Taken>,
    all: BTreeMap<usize, Allocation>,
    quarantine: VecDeque<usize>,
    quarantined: usize,
    /// Freed ranges that may be reused, by size including guards.
    free: HashMap<usize, Vec<usize>>,
}

/// Bytes of the range that an allocation occupies, including guards.
fn span(size: usize) -> usize {
    size.next_multiple_of(256) + 2 * GUARD
}

fn fill(at: usize, size: usize, byte: u8) {
    unsafe { std::ptr::write_bytes(at as *mut u8, byte, size) }
}

impl Memory {
    /// Devices with `total` bytes each, of which a context takes `context`.
    pub fn new(total: usize, context: usize) -> Self {
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
            "stand-in driver: cannot reserve {reserved} bytes of address space"
        );
        engine::set_device_range(base as usize, reserved);
        Self {
            base: base as usize,
            used: 0,
            reserved,
            total,
            context,
            taken: Vec::new(),
            all: BTreeMap::new(),
            quarantine: VecDeque::new(),
            quarantined: 0,
            free: HashMap::new(),
        }
    }

    fn taken(&mut self, device: usize) -> &mut Taken {
        if device >= self.taken.len() {
            self.taken.resize(device + 1, Taken { context: false, whole_pages: 0, units: 0 });
        }
        &mut self.taken[device]
    }

    /// Bytes that are taken of a device's memory.
    fn bytes_taken(&mut self, device: usize) -> usize {
        let Taken { context, whole_pages, units } = *self.taken(device);
        let context = if context { self.context } else { 0 };
        context + whole_pages + units.next_multiple_of(PAGE)
    }

    /// Free memory of a device, in bytes.
    pub fn free_bytes(&mut self, device: usize) -> usize {
        self.total.saturating_sub(self.bytes_taken(device))
    }

    /// Counts an allocation, or that one is gone.
    fn count(&mut self, device: usize, size: usize, comes: bool) {
        let taken = self.taken(device);
        let (sum, bytes) = if size > PAGE / 2 {
            (&mut taken.whole_pages, size.next_multiple_of(PAGE))
        } else {
            (&mut taken.units, size.next_multiple_of(UNIT))
        };
        *sum = if comes { *sum + bytes } else { *sum - bytes };
    }

    /// Takes memory for a device's context; false if there is too little.
    pub fn begin_context(&mut self, device: usize) -> bool {
        let fits = self.context <= self.free_bytes(device);
        self.taken(device).context = fits;
        fits
    }

    /// Frees a device's context and everything that was allocated in it.
    pub fn end_context(&mut self, device: usize, context: usize) {
        let of_it =
            |(at, a): (&usize, &Allocation)| (a.live && a.context == context).then_some(*at);
        let all: Vec<usize> = self.all.iter().filter_map(of_it).collect();
        all.into_iter().for_each(|at| self.release(at));
        self.taken(device).context = false;
    }

    /// Allocates memory in a context of a device, 256-byte aligned; `None` if the device is out of memory.
    pub fn allocate(
        &mut self,
        size: usize,
        kind: Kind,
        (context, device): (usize, usize),
    ) -> Option<usize> {
        let allocation = Allocation { size, kind, live: true, context, device };
        if kind == Kind::Pinned {
            return self.place(allocation);
        }
        // Sizes beyond the device are not rounded: that may overflow.
        if size > self.total {
            return None;
        }
        self.count(device, size, true);
        let fits = self.bytes_taken(device) <= self.total;
        let at = if fits { self.place(allocation) } else { None };
        if at.is_none() {
            self.count(device, size, false);
        }
        at
    }

    /// Finds a range for an allocation, and fills and marks it.
    fn place(&mut self, allocation: Allocation) -> Option<usize> {
        let Allocation { size, kind, .. } = allocation;
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
        // The host's writes to pinned memory are not tracked.
        engine::mark(
            at,
            size,
            if kind == Kind::Device { State::Unwritten } else { State::Written },
        );
        self.all.insert(at, allocation);
        Some(at)
    }

    /// Whether an allocation of this kind starts at `at`.
    pub fn is_live(&self, at: usize, kind: Kind) -> bool {
        self.all.get(&at).is_some_and(|a| a.live && a.kind == kind)
    }

    /// Frees the live allocation at `at`.
    pub fn release(&mut self, at: usize) {
        let allocation = self.all.get_mut(&at).expect("checked by the caller");
        allocation.live = false;
        let Allocation { size, kind, device, .. } = *allocation;
        if kind == Kind::Device {
            self.count(device, size, false);
        }
        fill(at, size, POISON);
        engine::mark(at, size, State::Inaccessible);
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

    /// Describes what is wrong with an access to these bytes; `None` if it is valid.
    pub fn fault(&self, at: usize, size: usize) -> Option<String> {
        let inside = self
            .nearest(at)
            .is_some_and(|(start, a)| a.live && at >= start && at + size <= start + a.size);
        (!inside).then(|| format!("{size} bytes at {}", self.describe(at)))
    }

    /// Describes an address relative to the nearest allocation.
    pub fn describe(&self, at: usize) -> String {
        match self.nearest(at) {
            Some((start, a)) if self.holds(at) => {
                let state = match (a.live, a.kind) {
                    (true, Kind::Device) => "device memory",
                    (true, Kind::Pinned) => "pinned memory",
                    (false, _) => "freed memory",
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

    /// Reports the first allocation with an overwritten guard, and restores the guard.
    pub fn overwritten_guard(&mut self) -> Option<String> {
        let intact = |from: usize, size: usize| {
            let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, size) };
            bytes.iter().all(|b| *b == GUARD_BYTE)
        };
        for (&at, a) in self.all.iter().filter(|(_, a)| a.live) {
            let after = span(a.size) - GUARD - a.size;
            let before = !intact(at - GUARD, GUARD);
            if before || !intact(at + a.size, after) {
                fill(at - GUARD, GUARD, GUARD_BYTE);
                fill(at + a.size, after, GUARD_BYTE);
                let side = if before { "before" } else { "after" };
                return Some(format!(
                    "wrote to the guard {side} {} bytes of device memory",
                    a.size
                ));
            }
        }
        None
    }

    /// Marks all live memory as written: plain kernels, whose accesses are not tracked, may have written it.
    pub fn mark_all_written(&self) {
        for (&at, a) in self.all.iter().filter(|(_, a)| a.live) {
            engine::mark(at, a.size, State::Written);
        }
    }

    /// Bytes of live allocations on a device, as they were asked for.
    pub fn asked_for(&self, device: usize) -> usize {
        let of_it = |a: &&Allocation| a.live && a.kind == Kind::Device && a.device == device;
        self.all.values().filter(of_it).map(|a| a.size).sum()
    }

    /// The context and the device that a live allocation belongs to.
    pub fn owner(&self, at: usize) -> Option<(Kind, usize, usize)> {
        let (start, a) = self.nearest(at)?;
        (a.live && (start..start + a.size).contains(&at)).then_some((a.kind, a.context, a.device))
    }

    /// The number of live device allocations.
    pub fn live(&self) -> usize {
        self.all.values().filter(|a| a.live && a.kind == Kind::Device).count()
    }
}

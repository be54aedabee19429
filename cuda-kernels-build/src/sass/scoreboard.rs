//! A model of the time that a loop of machine code takes on one scheduler of a multiprocessor.
//!
//! Warps issue in order, one instruction a cycle between them, each as soon as the stall count and the scoreboards that the
//! assembler wrote into the code allow and its unit is free. It is for loops of tiles: one warp of each resident block on every
//! scheduler, all schedulers alike, so that each has a quarter of the shared memory.
//!
//! What it assumes, each with the measurement on a GPU that settles it:
//!
//! - an HMMA of 16 x 8 x 16 occupies a scheduler's tensor core for 6.4 cycles on sm_90, 8 on sm_80: a large GEMM's rate over the
//!   peak that the data sheet gives;
//! - shared memory moves 128 bytes a cycle for four schedulers, `cp.async` included, without bank conflicts: 3x3 convolutions of
//!   64 channels, whose tiles it bounds, against those of 128;
//! - latencies: `ldmatrix` 33 cycles, other loads from shared memory 29, a `cp.async` 800 from its issue to its group's end, a
//!   shuffle 24: the same convolution at two and at four resident blocks;
//! - an instruction of the integer and of the comparison kind takes two issue slots of its unit, and all others one: 1x1
//!   convolutions of 64 channels to 256, which are mostly epilogue, with moments and without;
//! - branches within the loop are taken as if they were not there: the body runs from end to end in every iteration;
//! - code comes from the instruction cache, and global memory never holds up a store: the copy rate beside the same epilogue.

/// What the assembler wrote into an instruction about its schedule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Control {
    /// Cycles before the warp's next instruction.
    pub stall: u8,
    /// The scoreboard that the result's arrival releases, and the one that reading the operands releases; 7 for none.
    pub releases: [u8; 2],
    /// The scoreboards that must be released before it issues, as bits.
    pub waits: u8,
}

impl Control {
    /// From the upper half of an instruction of Volta or later.
    pub fn of(upper: u64) -> Self {
        let field = |at: u32, bits: u32| (upper >> at & ((1 << bits) - 1)) as u8;
        Self { stall: field(41, 4), releases: [field(46, 3), field(49, 3)], waits: field(52, 6) }
    }
}

impl Default for Control {
    fn default() -> Self {
        Self { stall: 1, releases: [7, 7], waits: 0 }
    }
}

/// An instruction of a loop.
#[derive(Clone, Copy, Debug, Default)]
pub struct Step<'a> {
    /// Its name and modifiers.
    pub opcode: &'a str,
    /// Whether its predicate is not always false.
    pub executed: bool,
    /// Whether it has no predicate.
    pub executed_always: bool,
    /// Of a wait for copies: groups that may stay in flight.
    pub in_flight: usize,
    /// Its schedule.
    pub control: Control,
}

/// The units that instructions occupy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Tensor,
    Shared,
    Integer,
    Other,
}

/// An instruction as the model sees it: unit, cycles that it occupies it, and cycles until its result.
#[derive(Clone, Copy, Debug)]
struct Cost(Unit, f64, f64);

/// Cycles until a `cp.async` has arrived.
const COPY: f64 = 800.0;
/// Schedulers of a multiprocessor.
const SCHEDULERS: f64 = 4.0;

fn cost(step: &Step<'_>, chip: &str) -> Cost {
    let opcode = step.opcode;
    if !step.executed {
        return Cost(Unit::Other, 1.0, 0.0);
    }
    let name = opcode.split('.').next().unwrap_or_default();
    let wide = |full: f64| match () {
        // Four 8 x 8 matrices of `ldmatrix`, `M88` or transposed `MT88`, are 16 bytes of a lane as well.
        () if opcode.contains(".128") || opcode.ends_with("88.4") => full,
        () if opcode.contains(".64") || opcode.ends_with("88.2") => full / 2.0,
        () => full / 4.0,
    };
    // 32 lanes of 16 bytes are four cycles of the shared memory, of which a scheduler has one in four.
    let shared = |latency: f64| Cost(Unit::Shared, wide(4.0) * SCHEDULERS, latency);
    match name {
        "HMMA" => Cost(Unit::Tensor, if chip.starts_with("sm_9") { 6.4 } else { 8.0 }, 33.0),
        "LDSM" => shared(33.0),
        "LDS" | "STS" => shared(29.0),
        "LDGSTS" | "STG" | "LDG" => shared(20.0),
        "SHFL" => Cost(Unit::Shared, 2.0 * SCHEDULERS, 24.0),
        "S2R" | "LDC" | "R2UR" => Cost(Unit::Other, 1.0, 24.0),
        "BAR" => Cost(Unit::Other, 1.0, 20.0),
        "LOP3" | "IADD3" | "ISETP" | "SEL" | "LEA" | "SHF" | "PRMT" | "VIADD" | "PLOP3"
        | "F2FP" | "FSETP" | "FMNMX" | "IMNMX" | "VIMNMX" => Cost(Unit::Integer, 2.0, 6.0),
        "IMAD" => Cost(Unit::Other, 2.0, 6.0),
        _ => Cost(Unit::Other, 1.0, 6.0),
    }
}

/// A warp in the middle of the loop.
struct Warp {
    at: usize,
    iterations: usize,
    ready: f64,
    /// When each scoreboard is released.
    released: [f64; 8],
    /// When each group of its copies has arrived, the newest last; and the copies of the group that is open.
    groups: Vec<f64>,
    open: f64,
}

/// Cycles that one scheduler needs for an iteration of `body` by each of its `warps` warps.
pub fn cycles(body: &[Step<'_>], warps: usize, chip: &str) -> f64 {
    const WARM: usize = 4;
    const MEASURED: usize = 12;
    let costs: Vec<Cost> = body.iter().map(|step| cost(step, chip)).collect();
    let warp = |_| Warp {
        at: 0,
        iterations: 0,
        ready: 0.0,
        released: [0.0; 8],
        groups: vec![0.0; 4],
        open: 0.0,
    };
    let mut warps: Vec<Warp> = (0..warps).map(warp).collect();
    let (mut now, mut free) = (0.0_f64, [0.0_f64; 4]);
    let mut started = None;
    loop {
        let done = warps.iter().map(|warp| warp.iterations).min().unwrap_or(0);
        match started {
            None if done >= WARM => started = Some((now, done)),
            Some((start, first)) if done >= WARM + MEASURED => {
                return (now - start) / (done - first) as f64;
            }
            _ => {}
        }
        // The warp that can issue first; of several, the one that is behind.
        let earliest = |warp: &Warp| {
            let Cost(unit, occupied, _) = costs[warp.at];
            let Step { opcode, in_flight, control, .. } = body[warp.at];
            let boards = (0..6).filter(|board| control.waits >> board & 1 == 1);
            let released = boards.map(|board| warp.released[board]).fold(warp.ready, f64::max);
            // Requests to the shared memory queue up, a few at a time; other units take one when they are free.
            let queue = if unit == Unit::Shared { 4.0 * occupied } else { 0.0 };
            let mut at = released.max(free[unit as usize] - queue);
            if opcode.starts_with("DEPBAR") {
                let arrived = warp.groups.iter().rev().nth(in_flight).copied().unwrap_or(0.0);
                at = at.max(arrived);
            }
            at.max(now)
        };
        let next = (0..warps.len()).min_by(|&a, &b| {
            let order = earliest(&warps[a]).total_cmp(&earliest(&warps[b]));
            order.then(warps[a].iterations.cmp(&warps[b].iterations))
        });
        let Some(next) = next else { return 0.0 };
        let at = earliest(&warps[next]);
        let warp = &mut warps[next];
        let Step { opcode, control, .. } = body[warp.at];
        let Cost(unit, occupied, latency) = costs[warp.at];
        let starts = free[unit as usize].max(at);
        free[unit as usize] = starts + occupied;
        match opcode.split('.').next() {
            Some("LDGSTS") => warp.open = starts + COPY,
            Some("LDGDEPBAR") => warp.groups.push(warp.open),
            _ => {}
        }
        let [result, operands] = control.releases.map(usize::from);
        warp.released[result] = warp.released[result].max(starts + occupied + latency);
        warp.released[operands] = warp.released[operands].max(starts + occupied);
        warp.ready = at + f64::from(control.stall.max(1));
        warp.at += 1;
        if warp.at == body.len() {
            (warp.at, warp.iterations) = (0, warp.iterations + 1);
        }
        now = at + 1.0;
    }
}

//! Counts the instructions of a kernel's machine code, from `cuobjdump -sass`.
//!
//! Counts are of the entire kernel and of its hot loop. A loop is a branch back to an earlier address. Candidates are the
//! innermost loops with mma instructions or, if the kernel has no mma, with accesses to global memory; the hot loop is the one
//! with the most of them. A kernel with mma also has epilogues, loops that copy from shared to global memory in stores of 16 bytes
//! alone: those with the fewest and with the most instructions to a store count. `sass/scoreboard.rs` says how long all of these take.

mod scoreboard;

use scoreboard::{Control, Step};

/// Instructions of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// All instructions.
    pub all: usize,
    /// Tensor core instructions: HMMA, IMMA, HGMMA.
    pub mma: usize,
    /// LDSM: `ldmatrix`.
    pub ldmatrix: usize,
    /// Accesses to global memory of 16 bytes: LDG, STG, LDGSTS (`cp.async`), and generic LD, ST.
    pub global_16: usize,
    /// Those of them that are stores.
    pub stores_16: usize,
    /// Smaller accesses to global memory.
    pub global: usize,
    /// Accesses to shared memory: LDS, STS.
    pub shared: usize,
    /// Accesses to local memory: LDL, STL.
    pub local: usize,
    /// FMA, additions and multiplications of the f32, f64 and f16 pipelines.
    pub lanes: usize,
    /// Special functions, MUFU: exponentials, roots, reciprocals.
    pub special: usize,
}

impl Counts {
    fn add(&mut self, opcode: &str) {
        let mut parts = opcode.split('.');
        let name = parts.next().unwrap_or_default();
        let is_16_bytes = opcode.split('.').any(|part| part == "128");
        self.all += 1;
        if is_16_bytes && matches!(name, "STG" | "ST") {
            self.stores_16 += 1;
        }
        let counter = match name {
            "HMMA" | "IMMA" | "HGMMA" | "BMMA" => &mut self.mma,
            "LDSM" => &mut self.ldmatrix,
            "LDG" | "STG" | "LDGSTS" | "LD" | "ST" if is_16_bytes => &mut self.global_16,
            "LDG" | "STG" | "LDGSTS" | "LD" | "ST" | "ATOM" | "ATOMG" | "RED" | "REDG" => {
                &mut self.global
            }
            "LDS" | "STS" | "ATOMS" => &mut self.shared,
            "LDL" | "STL" => &mut self.local,
            "FFMA" | "FADD" | "FMUL" | "DFMA" | "DADD" | "DMUL" | "HFMA2" => &mut self.lanes,
            "MUFU" => &mut self.special,
            _ => return,
        };
        *counter += 1;
    }

    fn numbers(&self) -> [usize; 10] {
        let Self {
            all,
            mma,
            ldmatrix,
            global_16,
            stores_16,
            global,
            shared,
            local,
            lanes,
            special,
        } = *self;
        [all, mma, ldmatrix, global_16, stores_16, global, shared, local, lanes, special]
    }

    fn from_numbers(numbers: [usize; 10]) -> Self {
        let [all, mma, ldmatrix, global_16, stores_16, global, shared, local, lanes, special] =
            numbers;
        Self { all, mma, ldmatrix, global_16, stores_16, global, shared, local, lanes, special }
    }

    /// The rank of a loop: 2 with mma, 1 with accesses to global memory, else 0.
    fn rank(&self) -> u8 {
        match self {
            Self { mma: 1.., .. } => 2,
            Self { global_16: 1.., .. } | Self { global: 1.., .. } => 1,
            _ => 0,
        }
    }
}

/// The most resident blocks that the model is run for.
pub const MOST_BLOCKS: usize = 4;

/// Instructions of a loop, and the cycles that a multiprocessor needs for an iteration of every warp of 1 to [`MOST_BLOCKS`] resident
/// blocks of 128 threads; zeros in a kernel without mma.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loop {
    /// Its instructions.
    pub counts: Counts,
    /// Cycles, by resident blocks less one.
    pub cycles: [u32; MOST_BLOCKS],
}

/// The counts of a kernel on a chip.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Code {
    /// The kernel, by its name in the machine code.
    pub kernel: String,
    /// `sm_90a`
    pub chip: String,
    /// Of the entire kernel.
    pub whole: Counts,
    /// Of the hot loop; equal to `whole` if the kernel has no loop.
    pub hot: Loop,
    /// Of the shortest and of the longest epilogue, if it has any.
    pub epilogues: [Loop; 2],
    /// Instructions from the last unconditional exit before the hot loop to the loop.
    pub prologue: usize,
}

/// Writes what [`from_lines`] reads: a line for each kernel and chip.
pub(crate) fn to_lines(all: &[Code]) -> String {
    let of_loop = |of: &Loop| {
        let cycles = of.cycles.map(|cycles| cycles as usize);
        of.counts.numbers().into_iter().chain(cycles).collect::<Vec<_>>()
    };
    let line = |code: &Code| {
        let loops = [&code.hot, &code.epilogues[0], &code.epilogues[1]].map(of_loop).concat();
        let numbers = code.whole.numbers().into_iter().chain(loops).chain([code.prologue]);
        let numbers: Vec<String> = numbers.map(|number| number.to_string()).collect();
        format!("{} {} {}\n", code.kernel, code.chip, numbers.join(" "))
    };
    all.iter().map(line).collect()
}

/// `None` if the text is not what [`to_lines`] writes.
pub(crate) fn from_lines(text: &str) -> Option<Vec<Code>> {
    fn counts(numbers: &mut impl Iterator<Item = usize>) -> Option<Counts> {
        let found: Vec<usize> = numbers.take(10).collect();
        Some(Counts::from_numbers(found.try_into().ok()?))
    }
    fn of_loop(numbers: &mut impl Iterator<Item = usize>) -> Option<Loop> {
        let counts = counts(numbers)?;
        let cycles: Vec<u32> =
            numbers.take(MOST_BLOCKS).map(u32::try_from).collect::<Result<_, _>>().ok()?;
        Some(Loop { counts, cycles: cycles.try_into().ok()? })
    }
    let code = |line: &str| {
        let mut words = line.split(' ');
        let (kernel, chip) = (words.next()?.to_owned(), words.next()?.to_owned());
        let numbers: Vec<usize> = words.map(str::parse).collect::<Result<_, _>>().ok()?;
        let numbers = &mut numbers.into_iter();
        let (whole, hot) = (counts(numbers)?, of_loop(numbers)?);
        let epilogues = [of_loop(numbers)?, of_loop(numbers)?];
        let prologue = numbers.next()?;
        numbers.next().is_none().then_some(Code { kernel, chip, whole, hot, epilogues, prologue })
    };
    text.lines().map(code).collect()
}

/// An instruction: its address, its opcode, the target if it is a branch, and its step in the model.
struct Instruction<'a> {
    at: u64,
    opcode: &'a str,
    to: Option<u64>,
    step: Step<'a>,
}

/// Parses all kernels of a disassembly.
pub fn parse(text: &str) -> Vec<Code> {
    let (mut found, mut chip, mut kernel) = (Vec::new(), String::new(), None);
    let mut lines: Vec<Instruction<'_>> = Vec::new();
    let mut finish = |kernel: Option<String>, chip: &str, lines: &mut Vec<_>| {
        if let Some(kernel) = kernel {
            found.push(code(kernel, chip, lines));
        }
        lines.clear();
    };
    for line in text.lines() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix("Function : ") {
            finish(kernel.replace(name.to_owned()), &chip, &mut lines);
        } else if let Some(name) = line.strip_prefix("arch = ") {
            finish(kernel.take(), &chip, &mut lines);
            name.clone_into(&mut chip);
        } else if let (Some(upper), Some(last)) = (upper_half(line), lines.last_mut()) {
            last.step.control = Control::of(upper);
        } else {
            lines.extend(instruction(line));
        }
    }
    finish(kernel, &chip, &mut lines);
    found
}

/// The second line of an instruction: `/* 0x000fe20000000800 */`.
fn upper_half(line: &str) -> Option<u64> {
    let digits = line.strip_prefix("/* 0x")?.strip_suffix("*/")?;
    u64::from_str_radix(digits.trim_end(), 16).ok()
}

/// Parses the address, the opcode and, for a branch, the target: `/*0a10*/  @!P0 BRA 0x9f0 ;  /* … */`.
fn instruction(line: &str) -> Option<Instruction<'_>> {
    let (address, rest) = line.strip_prefix("/*")?.split_once("*/")?;
    let at = u64::from_str_radix(address, 16).ok()?;
    let mut words = rest.split_whitespace().filter(|word| !word.starts_with('@'));
    let opcode = words.next().filter(|word| word.starts_with(|c: char| c.is_ascii_uppercase()))?;
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let to = if opcode.starts_with("BRA") { words.find_map(hex) } else { None };
    let opcode = opcode.trim_end_matches(';');
    // `DEPBAR.LE SB0, 0x1 ;` waits for all groups of copies but the newest.
    let in_flight = match opcode {
        "DEPBAR.LE" => words.find_map(hex).unwrap_or(0) as usize,
        _ => 0,
    };
    let predicate = rest.split_whitespace().next().filter(|word| word.starts_with('@'));
    let step = Step {
        opcode,
        executed: predicate != Some("@!PT"), // never
        executed_always: predicate.is_none(),
        in_flight,
        control: Control::default(),
    };
    Some(Instruction { at, opcode, to, step })
}

fn code(kernel: String, chip: &str, lines: &[Instruction<'_>]) -> Code {
    let within =
        |(from, to): (u64, u64)| lines.iter().filter(move |line| (from..=to).contains(&line.at));
    let count = |range: (u64, u64)| {
        let mut counts = Counts::default();
        within(range).for_each(|line| counts.add(line.opcode));
        counts
    };
    // The endless loop that pads the end of a kernel, a branch to itself, does not count.
    let back = |line: &Instruction<'_>| line.to.filter(|&to| to < line.at).map(|to| (to, line.at));
    let loops: Vec<((u64, u64), Counts)> =
        lines.iter().filter_map(back).map(|range| (range, count(range))).collect();
    let inside = |a: &(u64, u64), b: &(u64, u64)| a != b && b.0 <= a.0 && a.1 <= b.1;
    let rank = loops.iter().map(|(_, counts)| counts.rank()).max().unwrap_or(0);
    // Innermost among the loops of the same rank: a main loop stays one although it contains the loop that advances the tap.
    let candidates: Vec<_> = loops.iter().filter(|(_, counts)| counts.rank() == rank).collect();
    let innermost = candidates
        .iter()
        .filter(|(outer, _)| !candidates.iter().any(|(inner, _)| inside(inner, outer)));
    // Of two main loops with as many mma, the shorter is the one for aligned shapes: the other has the narrow copies of ragged ones.
    let hot = innermost.max_by_key(|(_, counts)| {
        let shortest = if counts.mma > 0 { usize::MAX - counts.all } else { 0 };
        let memory = 4 * counts.global_16 + counts.global;
        (counts.mma, shortest, memory, counts.shared, counts.all)
    });
    let whole = count((0, u64::MAX));
    let timed = |&(range, counts): &((u64, u64), Counts)| {
        let body: Vec<Step<'_>> = within(range).map(|line| line.step).collect();
        let cycles =
            std::array::from_fn(|warps| scoreboard::cycles(&body, warps + 1, chip).round() as u32);
        Loop { counts, cycles }
    };
    let Some(&hot) = hot.filter(|(_, counts)| counts.mma > 0) else {
        let counts = hot.map_or(whole, |(_, counts)| *counts);
        let hot = Loop { counts, ..Loop::default() };
        return Code { kernel, chip: chip.to_owned(), whole, hot, ..Code::default() };
    };
    let stores_16_alone = |(range, counts): &&((u64, u64), Counts)| {
        let stores = within(*range).filter(|line| line.opcode.starts_with("STG")).count();
        counts.mma == 0 && counts.shared > 0 && counts.stores_16 > 0 && counts.stores_16 == stores
    };
    let to_a_store = |(_, counts): &&((u64, u64), Counts)| counts.all * 1000 / counts.stores_16;
    let stores = || loops.iter().filter(stores_16_alone);
    let epilogues = [stores().min_by_key(to_a_store), stores().max_by_key(to_a_store)];
    let epilogues = epilogues.map(|found| found.map_or(Loop::default(), timed));
    let before: Vec<_> = lines.iter().take_while(|line| line.at < hot.0.0).collect();
    // A path of its own, such as that of ragged sizes, ends in an exit.
    let exit = before.iter().rposition(|line| line.opcode == "EXIT" && line.step.executed_always);
    let prologue = before.len() - exit.map_or(0, |exit| exit + 1);
    Code { kernel, chip: chip.to_owned(), whole, hot: timed(hot), epilogues, prologue }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loop in a loop, as `cuobjdump` prints it.
    const LISTING: &str = "
arch = sm_90a
\t\tFunction : twice
        /*0000*/                   LDC R1, c[0x0][0x28] ;                      /* 0x00000a00ff017b82 */
                                                                               /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;            /* 0x1 */
        /*0020*/               @P0 LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ; /* 0x1 */
        /*0030*/                   LDSM.16.M88.4 R8, [R7] ;                    /* 0x1 */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;       /* 0x1 */
        /*0050*/              @!P1 BRA 0x20 ;                                  /* 0x1 */
        /*0060*/                   STL [R1], R4 ;                              /* 0x1 */
        /*0070*/               @P2 BRA 0x10 ;                                  /* 0x1 */
        /*0080*/                   EXIT ;                                      /* 0x1 */
        /*0090*/                   BRA 0x90;                                   /* 0x1 */
\t\tFunction : none
        /*0000*/                   STG.E desc[UR4][R2.64], R0 ;                /* 0x1 */
";

    #[test]
    fn the_hot_loop_is_the_innermost_with_the_most_mma() {
        let found = parse(LISTING);
        assert_eq!(found.len(), 2);
        let (twice, none) = (&found[0], &found[1]);
        assert_eq!((&*twice.kernel, &*twice.chip), ("twice", "sm_90a"));
        let hot = Counts { all: 4, mma: 1, ldmatrix: 1, global_16: 1, ..Counts::default() };
        assert_eq!(twice.hot.counts, hot);
        assert_eq!((twice.whole.all, twice.whole.global_16, twice.whole.local), (10, 2, 1));
        assert_eq!((none.whole.global, none.whole.global_16, none.hot.counts), (1, 0, none.whole));
    }

    /// A warp alone waits for its loads; two of them fill each other's gaps until the tensor core is the limit.
    #[test]
    fn the_model_hides_latency_with_more_warps() {
        const BODY: &str = "
arch = sm_90a
\t\tFunction : loop
        /*0000*/                   LDSM.16.M88.4 R8, [R7] ;                    /* 0x1 */
                                                                               /* 0x000e220000000200 */
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;       /* 0x1 */
                                                                               /* 0x001fe2000004180c */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;       /* 0x1 */
                                                                               /* 0x000fe2000004180c */
        /*0030*/              @!P1 BRA 0x0 ;                                   /* 0x1 */
                                                                               /* 0x000fe2000383ffff */
";
        let cycles = parse(BODY)[0].hot.cycles;
        // Alone: the request's 16 cycles, 33 until its answer, and two mma of 6.4.
        assert!((50..70).contains(&cycles[0]), "{cycles:?}");
        // Four: the shared memory, 16 cycles for each, is the limit.
        assert!((64..75).contains(&cycles[3]), "{cycles:?}");
    }

    #[test]
    fn what_is_kept_in_lines_is_read_back() {
        let mut found = parse(LISTING);
        found[1].epilogues[1] = Loop { counts: found[0].whole, cycles: [1, 2, 3, 4] };
        found[1].prologue = 7;
        assert_eq!(from_lines(&to_lines(&found)), Some(found.clone()));
        let lines = to_lines(&found);
        assert_eq!(from_lines(&lines[..lines.len() - 3]), None);
        assert_eq!(from_lines(&lines.replace(" 7\n", " 7 8\n")), None);
        assert_eq!(from_lines("Mix { whole: 1 }"), None);
    }
}

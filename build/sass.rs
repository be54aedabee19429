//! Counts the instructions of a kernel's machine code, from `cuobjdump -sass`.
//!
//! Counts are of the entire kernel and of its hot loop. A loop is a branch back to an earlier address. Candidates are the
//! innermost loops with mma instructions or, if the kernel has no mma, with accesses to global memory; the hot loop is the one
//! with the most of them.

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

    /// The rank of a loop: 2 with mma, 1 with accesses to global memory, else 0.
    fn rank(&self) -> u8 {
        match self {
            Self { mma: 1.., .. } => 2,
            Self { global_16: 1.., .. } | Self { global: 1.., .. } => 1,
            _ => 0,
        }
    }
}

/// The counts of a kernel on a chip.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Code {
    pub kernel: String,
    /// `sm_90a`
    pub chip: String,
    /// Of the entire kernel.
    pub whole: Counts,
    /// Of the hot loop; equal to `whole` if the kernel has no loop.
    pub hot: Counts,
}

/// Parses all kernels of a disassembly.
pub fn parse(text: &str) -> Vec<Code> {
    let (mut found, mut chip, mut kernel) = (Vec::new(), String::new(), None);
    let mut lines: Vec<(u64, &str, Option<u64>)> = Vec::new();
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
        } else {
            lines.extend(instruction(line));
        }
    }
    finish(kernel, &chip, &mut lines);
    found
}

/// Parses the address, the opcode and, for a branch, the target: `/*0a10*/  @!P0 BRA 0x9f0 ;  /* … */`.
fn instruction(line: &str) -> Option<(u64, &str, Option<u64>)> {
    let (address, rest) = line.strip_prefix("/*")?.split_once("*/")?;
    let address = u64::from_str_radix(address, 16).ok()?;
    let mut words = rest.split_whitespace().filter(|word| !word.starts_with('@'));
    let opcode = words.next().filter(|word| word.starts_with(|c: char| c.is_ascii_uppercase()))?;
    let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
    let to = if opcode.starts_with("BRA") { words.find_map(hex) } else { None };
    Some((address, opcode.trim_end_matches(';'), to))
}

fn code(kernel: String, chip: &str, lines: &[(u64, &str, Option<u64>)]) -> Code {
    let count = |from: u64, to: u64| {
        let mut counts = Counts::default();
        let those = lines.iter().filter(|(at, ..)| (from..=to).contains(at));
        those.for_each(|(_, opcode, _)| counts.add(opcode));
        counts
    };
    // The endless loop that pads the end of a kernel, a branch to itself, does not count.
    let back =
        |&(at, _, to): &(u64, &str, Option<u64>)| to.filter(|&to| to < at).map(|to| (to, at));
    let loops: Vec<(u64, u64)> = lines.iter().filter_map(back).collect();
    let inside = |a: &(u64, u64), b: &(u64, u64)| a != b && b.0 <= a.0 && a.1 <= b.1;
    let loops: Vec<((u64, u64), Counts)> =
        loops.into_iter().map(|(from, to)| ((from, to), count(from, to))).collect();
    let rank = loops.iter().map(|(_, counts)| counts.rank()).max().unwrap_or(0);
    // Innermost among the loops of the same rank: a main loop stays one although it contains the loop that advances the tap.
    let candidates: Vec<_> = loops.iter().filter(|(_, counts)| counts.rank() == rank).collect();
    let innermost = candidates
        .iter()
        .filter(|(outer, _)| !candidates.iter().any(|(inner, _)| inside(inner, outer)));
    // Of two main loops with as many mma, the shorter is the one for aligned shapes: the other has the narrow copies of ragged ones.
    let hot = innermost.map(|(_, counts)| *counts).max_by_key(|counts| {
        let shortest = if counts.mma > 0 { usize::MAX - counts.all } else { 0 };
        let memory = 4 * counts.global_16 + counts.global;
        (counts.mma, shortest, memory, counts.shared, counts.all)
    });
    let whole = count(0, u64::MAX);
    Code { kernel, chip: chip.to_owned(), whole, hot: hot.unwrap_or(whole) }
}

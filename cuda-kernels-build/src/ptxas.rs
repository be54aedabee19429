//! What `ptxas -v` prints about kernels: registers, shared and local memory.

/// The resources that a kernel uses on a chip.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// The kernel, by its name in the machine code.
    pub kernel: String,
    /// The chip: `sm_80`, `sm_90a`.
    pub chip: String,
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes of static shared memory of a block.
    pub shared: usize,
    /// Bytes of local memory of a thread.
    pub stack: usize,
    /// Bytes of registers written to local memory.
    pub spill_stores: usize,
    /// Bytes of registers read back.
    pub spill_loads: usize,
}

/// Returns the resources of every kernel on every chip, in the order of the lines.
pub fn parse(printed: &str) -> Vec<Resources> {
    // "Compiling entry function 'name' for 'sm_80'", "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads",
    // "Used 10 registers, used 1 barriers, 1024 bytes smem"
    let before = |line: &str, what: &str| -> usize {
        let number = line.split(what).next().filter(|_| line.contains(what));
        number.and_then(|n| n.trim_end().rsplit([' ', ',']).next()?.parse().ok()).unwrap_or(0)
    };
    let mut found = Vec::new();
    let mut open: Option<Resources> = None;
    for line in printed.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let mut quoted = rest.split('\'');
            open = quoted.next().zip(quoted.nth(1)).map(|(kernel, chip)| Resources {
                kernel: kernel.to_owned(),
                chip: chip.to_owned(),
                ..Resources::default()
            });
        } else if let Some(of) = &mut open
            && line.contains("bytes stack frame")
        {
            of.stack = before(line, "bytes stack frame");
            of.spill_stores = before(line, "bytes spill stores");
            of.spill_loads = before(line, "bytes spill loads");
        } else if line.contains("Used ")
            && let Some(mut of) = open.take()
        {
            of.registers = before(line, "registers");
            of.shared = before(line, "bytes smem");
            found.push(of);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_on_every_chip_has_its_numbers() {
        let printed = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'scale' for 'sm_80'
ptxas info    : Function properties for scale
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem, 384 bytes cmem[0]
ptxas info    : Compile time = 3.1 ms
ptxas info    : Compiling entry function 'none' for 'sm_90a'
ptxas info    : Function properties for helper
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 4 registers
";
        let found = parse(printed);
        let scale = Resources {
            kernel: "scale".into(),
            chip: "sm_80".into(),
            registers: 32,
            shared: 1024,
            stack: 8,
            spill_stores: 12,
            spill_loads: 16,
        };
        let none = Resources {
            kernel: "none".into(),
            chip: "sm_90a".into(),
            registers: 4,
            ..Resources::default()
        };
        assert_eq!(found, [scale, none]);
        assert_eq!(parse("nothing of the kind"), []);
    }
}

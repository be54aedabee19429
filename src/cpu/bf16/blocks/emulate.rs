//! The six tile instructions in software, for tests on processors without tiles: a handler of the signal that an unknown
//! instruction raises decodes it, does what Intel's manual says, and goes on behind it. So the tests run the assembly itself.

use std::cell::UnsafeCell;
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t, ucontext_t};

type Tile = [[u8; 64]; 16];

struct State {
    configured: bool,
    tiles: [Tile; 8],
}

thread_local! {
    // Constant and without a destructor: a plain variable, which a signal handler may access.
    static STATE: UnsafeCell<State> =
        const { UnsafeCell::new(State { configured: false, tiles: [[[0; 64]; 16]; 8] }) };
}

/// Installs the handler if the processor has what the kernels use beside tiles. Returns whether it has.
pub fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        if !is_x86_feature_detected!("avx2") || !is_x86_feature_detected!("fma") {
            return false;
        }
        // SAFETY: a zeroed `sigaction` is a valid one; the handler has the signature that the flag asks for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_unknown as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()) == 0
        }
    })
}

extern "C" fn on_unknown(_: c_int, _: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the context of the interrupted thread, whose instruction pointer is at the instruction; the
    // instruction itself vouches for the memory that it names.
    unsafe {
        let registers = &mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs;
        let at = registers[libc::REG_RIP as usize] as *const u8;
        let done = STATE.with(|state| execute(&mut *state.get(), at, registers));
        match done {
            Some(length) => registers[libc::REG_RIP as usize] += length as i64,
            // Not ours: the instruction is run again, and ends the process.
            None => {
                libc::signal(libc::SIGILL, libc::SIG_DFL);
            }
        }
    }
}

/// The general registers by their number in an instruction.
const NUMBERED: [c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// An instruction's operand in memory.
struct Memory {
    base: usize,
    /// The scaled index: the stride of tile loads and stores.
    index: usize,
    /// Bytes of the operand's encoding.
    length: usize,
}

/// # Safety
/// `at` is a complete instruction.
unsafe fn memory(at: *const u8, [x, b]: [bool; 2], registers: &[i64; 23]) -> Memory {
    let register = |number: u8, high: bool| {
        registers[NUMBERED[usize::from(number & 7) + 8 * usize::from(high)] as usize] as usize
    };
    // SAFETY: the caller vouches for the instruction.
    unsafe {
        let (mode, rm) = (*at >> 6, *at & 7);
        let (mut base, mut index, mut length) = (0, 0, 1);
        let sib = *at.add(1);
        if rm == 4 {
            length = 2;
            if sib >> 3 & 7 != 4 || x {
                index = register(sib >> 3, x) << (sib >> 6);
            }
            assert!(mode != 0 || sib & 7 != 5, "an address without a base");
            base = register(sib, b);
        } else {
            assert!(mode != 0 || rm != 5, "an address relative to the instruction");
            base += register(rm, b);
        }
        match mode {
            1 => {
                base = base.wrapping_add_signed((*at.add(length) as i8).into());
                length += 1;
            }
            2 => {
                let displacement = at.add(length).cast::<i32>().read_unaligned();
                base = base.wrapping_add_signed(displacement as isize);
                length += 4;
            }
            _ => {}
        }
        Memory { base, index, length }
    }
}

/// Executes the instruction at `at` and returns its length, or nothing if it is none of tiles.
///
/// # Safety
/// `at` is a complete instruction, and the memory that it names may be accessed as it says.
unsafe fn execute(state: &mut State, at: *const u8, registers: &[i64; 23]) -> Option<usize> {
    // SAFETY: the caller vouches for the instruction and its memory.
    unsafe {
        let byte = |i: usize| *at.add(i);
        // The three-byte prefix, of the map 0F 38, without a wide operand, 128 bits long.
        if byte(0) != 0xc4 || byte(1) & 0x1f != 2 || byte(2) & 0x84 != 0 {
            return None;
        }
        let high = [byte(1) & 0x40 == 0, byte(1) & 0x20 == 0];
        let (prefix, opcode, operands) = (byte(2) & 3, byte(3), byte(4));
        let (tile, in_memory) = (usize::from(operands >> 3 & 7), operands >> 6 != 3);
        let (none, f3, f2) = (0, 2, 3);
        if (opcode, prefix) == (0x49, none) {
            let ends = operands == 0xc0;
            *state = State { configured: !ends, tiles: [[[0; 64]; 16]; 8] };
            if ends {
                return Some(5);
            }
            let memory = memory(at.add(4), high, registers);
            let config = memory.base as *const u8;
            // Palette 1, eight tiles of 16 rows of 64 bytes, nothing else.
            let expected = |i: usize| match i {
                0 => 1,
                16..32 if i.is_multiple_of(2) => 64,
                48..56 => 16,
                _ => 0,
            };
            assert!((0..64).all(|i| *config.add(i) == expected(i)), "another configuration");
            return Some(4 + memory.length);
        }
        assert!(state.configured, "tiles are used before they are configured");
        match (opcode, prefix) {
            (0x49, p) if p == f2 && !in_memory => {
                state.tiles[tile] = [[0; 64]; 16];
                Some(5)
            }
            (0x4b, p) if in_memory && (p == f2 || p == f3) => {
                let memory = memory(at.add(4), high, registers);
                for (i, row) in state.tiles[tile].iter_mut().enumerate() {
                    let in_memory = (memory.base + i * memory.index) as *mut [u8; 64];
                    if p == f2 {
                        *row = in_memory.read();
                    } else {
                        in_memory.write(*row);
                    }
                }
                Some(4 + memory.length)
            }
            (0x5c, p) if p == f3 && !in_memory => {
                let (a, b) = (usize::from(operands & 7), usize::from(!byte(2) >> 3 & 7));
                let (a, b) = (state.tiles[a], state.tiles[b]);
                multiply(&mut state.tiles[tile], &a, &b);
                Some(5)
            }
            _ => None,
        }
    }
}

/// Numbers below 2^-126 are read and written as zero.
fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0.0 } else { x }
}

/// `tdpbf16ps`: even and odd terms are summed apart, then added, then added to `c`. A product of two bf16 is exact in f32, so
/// that multiplying and adding is the fused operation.
#[target_feature(enable = "avx2,fma")]
fn multiply(c: &mut Tile, a: &Tile, b: &Tile) {
    let float = |row: &[u8; 64], i: usize| {
        flushed(f32::from_bits(u32::from(u16::from_le_bytes([row[2 * i], row[2 * i + 1]])) << 16))
    };
    let wide = |row: &[u8; 64]| -> [f32; 32] { std::array::from_fn(|i| float(row, i)) };
    let (a, b) = (a.each_ref().map(wide), b.each_ref().map(wide));
    for (c, a) in c.iter_mut().zip(&a) {
        let mut sums = [0.0_f32; 32];
        for (k, b) in b.iter().enumerate() {
            for (j, sum) in sums.iter_mut().enumerate() {
                *sum = flushed(*sum + a[2 * k + j % 2] * b[j]);
            }
        }
        for (j, pair) in sums.chunks_exact(2).enumerate() {
            let before: [u8; 4] = c[4 * j..][..4].try_into().expect("four bytes");
            let sum = flushed(f32::from_le_bytes(before) + flushed(pair[0] + pair[1]));
            c[4 * j..][..4].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

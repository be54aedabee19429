//! The program's kernels: their generated launch functions, and the check that these match what the driver loaded.
//!
//! The build (`cuda-kernels-build`) reads each `KERNEL void name(arguments)` line and writes a function of that name whose arguments
//! have the kernel's types: [`In`] for pointers that are read, [`Out`] for those that are written.

use std::ffi::{CString, c_int};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUfunction, CUmodule, CUresult};

pub use cuda_kernels_build::sass::Counts;

use super::driver::words;
use super::ledger;
use super::pointers::{Argument, argument};
use super::{Gpu, In, Out};
use crate::error::{Error, Result};

/// A kernel file.
pub(crate) struct File {
    pub(super) name: &'static str,
    /// What it is compiled for, in nvcc's words.
    targets: &'static [&'static str],
    /// nvcc's output; empty if nvcc was missing at build time.
    pub(super) image: &'static [u8],
}

impl File {
    /// Whether it is written for compute capability 9.0 and compiled for nothing else.
    fn is_hopper_only(&self) -> bool {
        self.targets == ["sm_90a"]
    }

    /// Whether it has machine code for a chip: that of an older chip of its generation runs, too, unless it is for that one alone.
    fn has_code_for(&self, (major, minor): (i32, i32)) -> bool {
        let runs = |target: &&str| {
            let chip = target.strip_prefix("sm_")?;
            match chip.strip_suffix('a') {
                Some(alone) => (alone.parse() == Ok(10 * major + minor)).then_some(()),
                None => {
                    let number: i32 = chip.parse().ok()?;
                    (number / 10 == major && number % 10 <= minor).then_some(())
                }
            }
        };
        self.targets.iter().any(|target| runs(target).is_some())
    }
}

/// The chips that the kernels have machine code for, in nvcc's words, the oldest first.
pub(super) fn chips() -> Vec<&'static str> {
    let all = FILES.iter().flat_map(|file| file.targets);
    let mut chips: Vec<&str> = all.copied().filter(|target| target.starts_with("sm_")).collect();
    chips.sort_unstable_by_key(|chip| (chip.len(), *chip));
    chips.dedup();
    chips
}

/// Whether the driver has to compile kernels for a chip when they are loaded.
pub(super) fn are_compiled_for(capability: (i32, i32)) -> bool {
    let missing = |file: &File| !file.is_hopper_only() && !file.has_code_for(capability);
    COMPILER.is_some() && FILES.iter().any(missing)
}

/// An entry point.
pub(crate) struct Kernel {
    pub(super) name: &'static str,
    /// Its index in [`FILES`].
    pub(super) file: usize,
    /// Bytes of each argument.
    pub(super) sizes: &'static [usize],
}

/// The resources that a kernel uses, as printed by the assembler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// The kernel.
    pub kernel: &'static str,
    /// The chip: `sm_80`, `sm_90a`.
    pub chip: &'static str,
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
    /// Its instruction mix; `None` if the build had no disassembler.
    pub mix: Option<Mix>,
}

/// The instruction mix of a kernel's machine code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// The entire kernel.
    pub whole: Counts,
    /// The hot loop: the innermost loop with the most mma instructions or, without mma, with the most accesses to global
    /// memory; the entire kernel if it has no loop.
    pub hot: Counts,
    /// Cycles that a multiprocessor needs, by a model of its schedulers (`sass/scoreboard.rs` of `cuda-kernels-build`), for an
    /// iteration of the hot loop by every warp of one to four resident blocks of 128 threads; zeros without mma.
    pub hot_cycles: [u32; 4],
    /// Of the loops of a kernel with mma that copy results from shared to global memory 16 bytes at a time, those with the fewest and
    /// with the most instructions to a store; zeros if it has none.
    pub epilogues: [Counts; 2],
    /// The same cycles for these loops.
    pub epilogue_cycles: [[u32; 4]; 2],
    /// Instructions before the hot loop.
    pub prologue: usize,
}

/// A launch configuration: GPU, grid and block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch<'d> {
    gpu: &'d Gpu,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
}

impl<'d> Launch<'d> {
    /// `grid` blocks of `block` threads.
    ///
    /// # Panics
    /// If the grid is larger than a GPU supports.
    #[track_caller]
    pub(crate) fn new(gpu: &'d Gpu, grid: [usize; 3], block: [usize; 3]) -> Self {
        assert!(
            grid[0] < 1 << 31 && grid[1] < 1 << 16 && grid[2] < 1 << 16,
            "a grid of {grid:?} blocks is larger than a GPU supports"
        );
        let [grid, block] = [grid, block].map(|sizes| sizes.map(|size| size as u32));
        Self { gpu, grid, block, shared: 0 }
    }

    /// The same with `bytes` of dynamic shared memory for each block.
    pub(crate) fn with_shared(self, bytes: usize) -> Self {
        Self { shared: bytes as u32, ..self }
    }

    /// A one-dimensional launch for a grid-stride loop over `n` elements, `each` of them per thread and iteration, with at
    /// most as many blocks as fill the GPU.
    pub(crate) fn over(gpu: &'d Gpu, n: usize, each: usize) -> Self {
        const THREADS: usize = 256;
        let blocks = n.div_ceil(THREADS * each).min(8 * gpu.multiprocessors());
        Self::new(gpu, [blocks, 1, 1], [THREADS, 1, 1])
    }

    /// Queues kernel number `index`. Does nothing for an empty grid.
    ///
    /// # Safety
    /// The arguments have the kernel's types, and the kernel stays within the memory behind its pointers.
    unsafe fn run(&self, index: usize, arguments: &[Argument]) {
        if self.grid.contains(&0) {
            return;
        }
        let kernel = &KERNELS[index];
        self.gpu.note(kernel.name, || ledger::moved(arguments));
        self.gpu.attempt(
            || {
                format!(
                    "launch of {}, {:?} blocks of {:?} threads{}",
                    kernel.name,
                    self.grid,
                    self.block,
                    match self.shared {
                        0 => String::new(),
                        bytes => format!(" with {bytes} bytes of dynamic shared memory"),
                    }
                )
            },
            |gpu| {
                gpu.send_numbers()?;
                let function = gpu
                    .function(index)
                    .ok_or(DriverError(CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU))?;
                if self.shared > STATIC_SHARED {
                    gpu.allow_shared(index, function, self.shared)?;
                }
                let ([x, y, z], [bx, by, bz]) = (self.grid, self.block);
                let mut arguments: Vec<_> = arguments.iter().map(|argument| argument.at).collect();
                let stream = gpu.stream();
                crate::device::trace::kernel(kernel.name, || {
                    // SAFETY: the caller vouches for the arguments; the function belongs to the current context.
                    unsafe {
                        result::launch_kernel(
                            function,
                            (x, y, z),
                            (bx, by, bz),
                            self.shared,
                            stream,
                            &mut arguments,
                        )
                    }
                })?;
                gpu.wait_if_synchronous()
            },
        );
    }
}

/// Alignment for a fatbin, whose header the driver reads as integers.
#[repr(C, align(16))]
struct Aligned<T>(T);

#[allow(clippy::too_many_arguments, dead_code)] // the functions mirror the kernels' signatures
mod generated {
    #[allow(unused_imports)] // without nvcc there are no images
    use super::{Aligned, Counts, File, In, Kernel, Launch, Mix, Out, Resources, argument};
    include!(concat!(env!("OUT_DIR"), "/kernels.rs"));
}
pub(crate) use generated::*;

/// The loaded kernels: one function for each of [`KERNELS`], `None` for kernels of another chip.
pub(super) struct Loaded {
    pub(super) modules: Vec<CUmodule>,
    pub(super) functions: Vec<Option<CUfunction>>,
}

/// Loads every kernel into the current context and compares its arguments with those of its launch function.
///
/// # Errors
/// If the program has no kernels, the driver refuses them, or they are not what this program was built with.
pub(super) fn load(capability: (i32, i32)) -> Result<Loaded> {
    if COMPILER.is_none() {
        return Err(Error::Device(
            "this program was built without CUDA kernels, because nvcc was missing: run scripts/fetch-nvcc and build again".into(),
        ));
    }
    let mut loaded = Loaded { modules: Vec::new(), functions: vec![None; KERNELS.len()] };
    for (index, file) in FILES.iter().enumerate() {
        if file.is_hopper_only() && capability != (9, 0) {
            continue;
        }
        let refused = |e| refusal(file, capability, e);
        // SAFETY: the image is a complete fatbin, whose header holds its length.
        let module =
            unsafe { result::module::load_data(file.image.as_ptr().cast()) }.map_err(refused)?;
        loaded.modules.push(module);
        for (kernel, function) in KERNELS.iter().zip(&mut loaded.functions) {
            if kernel.file == index {
                let name = CString::new(kernel.name).expect("a kernel's name holds no zero");
                // SAFETY: the module is loaded, and stays loaded until the context is released.
                let found =
                    unsafe { result::module::get_function(module, name) }.map_err(refused)?;
                check_arguments(kernel, found)?;
                prefer_shared_memory(found).map_err(refused)?;
                *function = Some(found);
            }
        }
    }
    Ok(loaded)
}

/// The shared memory that a block has without asking the driver.
const STATIC_SHARED: u32 = 48 << 10;

/// Lets a kernel have that much dynamic shared memory, and the multiprocessors as much of it as they can.
pub(super) fn allow_shared(
    function: CUfunction,
    bytes: u32,
) -> std::result::Result<(), DriverError> {
    use sys::CUfunction_attribute as Attribute;
    // SAFETY: changes two numbers of a loaded function; the driver refuses more than the GPU has.
    unsafe {
        let most = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        sys::cuFuncSetAttribute(function, most, bytes as c_int).result()?;
        let carve_out = Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        sys::cuFuncSetAttribute(function, carve_out, 100).result()
    }
}

/// Why a driver does not load a file, and what to do about it.
fn refusal(file: &File, (major, minor): (i32, i32), e: DriverError) -> Error {
    let (name, why) = (file.name, words(e));
    Error::Device(match e.0 {
        CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => format!(
            "the driver has to compile the kernels for compute capability {major}.{minor} and does not know the PTX that nvcc wrote ({}): install a newer driver, or build the program with SELFSUP_CHIPS=sm_{major}{minor}",
            COMPILER.unwrap_or_default()
        ),
        _ => format!(
            "the driver does not load kernels/{name}.cu for compute capability {major}.{minor}: {why}"
        ),
    })
}

/// Asks for all of a multiprocessor's shared memory rather than cache for kernels whose blocks hold much of it, those of the
/// products: left to itself, a driver may choose a carve-out in which fewer blocks fit side by side.
fn prefer_shared_memory(function: CUfunction) -> std::result::Result<(), DriverError> {
    use sys::CUfunction_attribute as Attribute;
    /// Bytes from which the number of resident blocks depends on the carve-out.
    const MUCH: c_int = 16 << 10;
    let mut held = 0;
    // SAFETY: writes one number about a loaded function.
    unsafe {
        let which = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        sys::cuFuncGetAttribute(&mut held, which, function).result()?;
        if held >= MUCH {
            let which = Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
            sys::cuFuncSetAttribute(function, which, 100).result()?;
        }
    }
    Ok(())
}

/// Compares number, offsets and sizes of a loaded kernel's arguments with those that its launch function passes.
fn check_arguments(kernel: &Kernel, function: CUfunction) -> Result<()> {
    let ask = |index| {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: writes two numbers; an index beyond the last argument is an error, not a read out of bounds.
        let known = unsafe { sys::cuFuncGetParamInfo(function, index, &mut offset, &mut size) };
        (known == CUresult::CUDA_SUCCESS).then_some((offset, size))
    };
    let mut end = 0_usize;
    let mut expected = Vec::new();
    for &size in kernel.sizes {
        let offset = end.next_multiple_of(size);
        expected.push((offset, size));
        end = offset + size;
    }
    let loaded: Vec<(usize, usize)> = (0..expected.len() + 1).map_while(ask).collect();
    if loaded != expected {
        return Err(Error::Device(format!(
            "kernel {}: the driver loaded arguments at (offset, size) {loaded:?}, and this program passes {expected:?}",
            kernel.name
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;

//! Modules, functions and launches. A kernel is found if the image has it for the device, and by its name among those compiled for
//! the host.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;

use super::calls;
use super::device::{MULTIPROCESSORS, REGISTERS, SHARED_PER_BLOCK, capability, shared_opt_in};
use crate::driver::{CallResult, Code, Driver, Function, Module};
use crate::engine::{self, Dim3, Kernel};
use crate::image::{self, FATBIN};
use crate::work::{Launch, Work};

fn load(driver: &mut Driver, module: *mut usize, image: *const u8) -> CallResult {
    let context = driver.in_context()?;
    if image.is_null() {
        return Err(Code::INVALID_VALUE);
    }
    let start = unsafe { std::slice::from_raw_parts(image, 4) };
    // A fatbin, its wrapper, an ELF file, or PTX.
    let known = [FATBIN, [0xb1, 0x43, 0x62, 0x46], *b"\x7fELF", *b"//\n/", *b".ver"];
    if !known.iter().any(|k| k == start) {
        return Err(Code::INVALID_IMAGE);
    }
    let kernels =
        if *start == FATBIN { unsafe { image::kernels(image, capability())? } } else { None };
    let handle = driver.handle();
    driver.modules.insert(handle, Module { context, kernels });
    unsafe { *module = handle };
    Ok(())
}

/// Unloads a module; its functions go with it.
fn unload(driver: &mut Driver, module: usize) -> CallResult {
    driver.in_context()?;
    driver.modules.remove(&module).ok_or(Code::INVALID_HANDLE)?;
    driver.functions.retain(|_, function| function.module != module);
    Ok(())
}

fn find(driver: &mut Driver, to: *mut usize, module: usize, name: *const c_char) -> CallResult {
    driver.in_context()?;
    let Module { context, kernels } = driver.modules.get(&module).ok_or(Code::INVALID_HANDLE)?;
    let context = *context;
    let name = unsafe { CStr::from_ptr(name) }.to_str().map_err(|_| Code::NOT_FOUND)?;
    if kernels.as_ref().is_some_and(|kernels| !kernels.contains(name)) {
        return Err(Code::NOT_FOUND);
    }
    let kernel = engine::kernels().get(name).ok_or(Code::NOT_FOUND)?;
    let same = |f: &Function| f.module == module && std::ptr::eq(f.kernel, kernel);
    let known = driver.functions.iter().find(|(_, function)| same(function)).map(|(at, _)| *at);
    let handle = known.unwrap_or_else(|| {
        let handle = driver.handle();
        let function =
            Function { kernel, context, module, allowed: SHARED_PER_BLOCK, carve_out: -1 };
        driver.functions.insert(handle, function);
        handle
    });
    unsafe { *to = handle };
    Ok(())
}

fn function(driver: &Driver, handle: usize) -> CallResult<Function> {
    driver.functions.get(&handle).copied().ok_or(Code::INVALID_HANDLE)
}

fn parameter(
    driver: &Driver,
    handle: usize,
    i: usize,
    offset: *mut usize,
    size: *mut usize,
) -> CallResult {
    let parameter =
        function(driver, handle)?.kernel.parameters().get(i).copied().ok_or(Code::INVALID_VALUE)?;
    unsafe {
        *offset = parameter.offset;
        if !size.is_null() {
            *size = parameter.size;
        }
    }
    Ok(())
}

/// Registers of a thread of a kernel.
fn registers(driver: &Driver, kernel: &Kernel) -> u32 {
    driver.registers.get(kernel.name).copied().unwrap_or(32)
}

/// Registers that a block of `threads` threads takes: warps take them, in units of 256.
fn registers_of_block(driver: &Driver, kernel: &Kernel, threads: u64) -> u64 {
    threads.div_ceil(32) * (32 * u64::from(registers(driver, kernel))).next_multiple_of(256)
}

/// The most threads of a block of a kernel.
fn most_threads(driver: &Driver, kernel: &Kernel) -> u64 {
    let warps = u64::from(REGISTERS) / registers_of_block(driver, kernel, 32);
    u64::from(kernel.bounds()).min(32 * warps)
}

/// How many blocks of `threads` threads one multiprocessor holds.
fn blocks_per_multiprocessor(driver: &Driver, kernel: &Kernel, threads: u64, dynamic: u64) -> u64 {
    if threads == 0 || threads > most_threads(driver, kernel) {
        return 0;
    }
    let shared = kernel.static_shared() as u64 + dynamic + 1024;
    let by_registers = u64::from(REGISTERS) / registers_of_block(driver, kernel, threads);
    let by_shared = u64::from(shared_opt_in() + 1024) / shared;
    (2048 / threads).min(by_shared).min(by_registers).min(32)
}

fn launch(
    driver: &mut Driver,
    handle: usize,
    (grid, block, shared): (Dim3, Dim3, c_uint),
    stream: usize,
    parameters: *mut *mut c_void,
    cooperative: bool,
) -> CallResult {
    let current = driver.in_context()?;
    let Function { kernel, context, allowed, .. } = function(driver, handle)?;
    // A launch takes a function and a stream of the current context.
    if context != current || driver.streams[&driver.stream_id(stream)?].context != current {
        return Err(Code::INVALID_HANDLE);
    }
    let empty = grid.count() == 0 || block.count() == 0;
    let too_large =
        block.x > 1024 || block.y > 1024 || block.z > 64 || grid.y > 65535 || grid.z > 65535;
    if empty || too_large || block.count() > 1024 || shared > allowed {
        return Err(Code::INVALID_VALUE);
    }
    if block.count() > most_threads(driver, kernel) {
        return Err(Code::OUT_OF_RESOURCES);
    }
    let at_once = blocks_per_multiprocessor(driver, kernel, block.count(), u64::from(shared))
        * u64::from(MULTIPROCESSORS);
    if cooperative && grid.count() > at_once {
        return Err(Code::COOPERATIVE_TOO_LARGE);
    }
    let copy = |(i, p): (usize, &engine::Parameter)| unsafe {
        let from = *parameters.add(i);
        std::slice::from_raw_parts(from as *const u8, p.size).to_vec()
    };
    let arguments = Arc::new(kernel.parameters().iter().enumerate().map(copy).collect());
    let device = driver.device_of(context)?;
    let size = (grid, block, shared);
    driver.push(stream, Work::Launch(Launch { kernel, device, size, arguments, cooperative }))
}

/// `CUlaunchConfig`.
#[repr(C)]
pub struct Config {
    grid: Dim3,
    block: Dim3,
    shared: c_uint,
    stream: usize,
    attributes: *const Attribute,
    count: c_uint,
}

/// `CUlaunchAttribute`: a number and a union of 64 bytes.
#[repr(C, align(8))]
pub struct Attribute {
    id: c_uint,
    padding: [u8; 4],
    value: [u32; 16],
}

calls! {
    fn cuModuleLoadData(driver, module: *mut usize, image: *const u8) { load(driver, module, image)? }

    fn cuModuleLoadDataEx(
        driver, module: *mut usize, image: *const u8, _count: c_uint, _options: *mut c_uint, _values: *mut *mut c_void,
    ) {
        load(driver, module, image)?;
    }

    fn cuModuleLoadFatBinary(driver, module: *mut usize, image: *const u8) { load(driver, module, image)? }

    fn cuLibraryLoadData(
        driver, library: *mut usize, image: *const u8, _options: *mut c_uint, _values: *mut *mut c_void,
        _count: c_uint, _library_options: *mut c_uint, _library_values: *mut *mut c_void, _library_count: c_uint,
    ) {
        load(driver, library, image)?;
    }

    fn cuModuleUnload(driver, module: usize) { unload(driver, module)? }

    fn cuLibraryUnload(driver, library: usize) { unload(driver, library)? }

    fn cuModuleGetFunction(driver, to: *mut usize, module: usize, name: *const c_char) {
        find(driver, to, module, name)?;
    }

    fn cuLibraryGetKernel(driver, to: *mut usize, library: usize, name: *const c_char) {
        find(driver, to, library, name)?;
    }

    fn cuKernelGetFunction(driver, to: *mut usize, kernel: usize) {
        function(driver, kernel)?;
        *to = kernel;
    }

    fn cuFuncGetParamInfo(driver, handle: usize, i: usize, offset: *mut usize, size: *mut usize) {
        parameter(driver, handle, i, offset, size)?;
    }

    fn cuKernelGetParamInfo(driver, handle: usize, i: usize, offset: *mut usize, size: *mut usize) {
        parameter(driver, handle, i, offset, size)?;
    }

    fn cuFuncGetAttribute(driver, value: *mut c_int, which: c_uint, handle: usize) {
        driver.in_context()?;
        let Function { kernel, allowed, carve_out, .. } = function(driver, handle)?;
        *value = match which {
            0 => most_threads(driver, kernel) as c_int,
            1 => kernel.static_shared() as c_int,
            4 => registers(driver, kernel) as c_int,
            5 | 6 => 80, // as if compiled for sm_80
            8 => allowed as c_int,
            9 => carve_out,
            _ => 0,
        };
    }

    fn cuFuncSetAttribute(driver, handle: usize, which: c_uint, value: c_int) {
        driver.in_context()?;
        let static_shared = function(driver, handle)?.kernel.static_shared();
        let function = driver.functions.get_mut(&handle).expect("looked up above");
        let valid = match which {
            8 => value >= 0 && value as usize + static_shared <= shared_opt_in() as usize,
            // The preferred carve-out: percent of the shared memory, or -1 for the driver's own choice.
            9 => (-1..=100).contains(&value),
            _ => true,
        };
        match which {
            _ if !valid => return Err(Code::INVALID_VALUE),
            8 => function.allowed = (value as u32).max(SHARED_PER_BLOCK),
            9 => function.carve_out = value,
            _ => {}
        }
    }

    fn cuFuncSetCacheConfig(driver, handle: usize, _config: c_uint) {
        driver.in_context()?;
        function(driver, handle)?;
    }

    fn cuFuncLoad(driver, handle: usize) { function(driver, handle)?; }

    fn cuLaunchKernel(
        driver, handle: usize, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint,
        shared: c_uint, stream: usize, parameters: *mut *mut c_void, extra: *mut *mut c_void,
    ) {
        if !extra.is_null() { return Err(Code::NOT_SUPPORTED) }
        let size = (Dim3 { x: gx, y: gy, z: gz }, Dim3 { x: bx, y: by, z: bz }, shared);
        launch(driver, handle, size, stream, parameters, false)?;
    }

    fn cuLaunchCooperativeKernel(
        driver, handle: usize, gx: c_uint, gy: c_uint, gz: c_uint, bx: c_uint, by: c_uint, bz: c_uint,
        shared: c_uint, stream: usize, parameters: *mut *mut c_void,
    ) {
        let size = (Dim3 { x: gx, y: gy, z: gz }, Dim3 { x: bx, y: by, z: bz }, shared);
        launch(driver, handle, size, stream, parameters, true)?;
    }

    fn cuLaunchKernelEx(
        driver, config: *const Config, handle: usize, parameters: *mut *mut c_void, extra: *mut *mut c_void,
    ) {
        if !extra.is_null() { return Err(Code::NOT_SUPPORTED) }
        let c = &*config;
        let mut cooperative = false;
        for i in 0..c.count as usize {
            let attribute = &*c.attributes.add(i);
            match attribute.id {
                2 => cooperative = attribute.value[0] != 0,
                // A cluster of one block has no effect; larger clusters are not implemented.
                4 if attribute.value[..3] == [1, 1, 1] => {}
                4 => return Err(Code::NOT_SUPPORTED),
                _ => {}
            }
        }
        launch(driver, handle, (c.grid, c.block, c.shared), c.stream, parameters, cooperative)?;
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        driver, blocks: *mut c_int, handle: usize, threads: c_int, dynamic: usize,
    ) {
        driver.in_context()?;
        let kernel = function(driver, handle)?.kernel;
        *blocks = blocks_per_multiprocessor(driver, kernel, threads as u64, dynamic as u64) as c_int;
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        driver, blocks: *mut c_int, handle: usize, threads: c_int, dynamic: usize, _flags: c_uint,
    ) {
        driver.in_context()?;
        let kernel = function(driver, handle)?.kernel;
        *blocks = blocks_per_multiprocessor(driver, kernel, threads as u64, dynamic as u64) as c_int;
    }
}

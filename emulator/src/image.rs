//! Fatbins: which of its parts a device takes, and which kernels that part has.
//!
//! A fatbin is a header and parts, each with a header of its own: machine code of one architecture in an ELF file, or PTX, which a
//! driver compiles if it knows the version. nvcc compresses PTX, and its kernels are then taken to be those of the machine code beside it.

use std::collections::HashSet;

use crate::driver::{CallResult, Code};

pub(crate) const FATBIN: [u8; 4] = [0x50, 0xed, 0x55, 0xba];

/// The newest PTX that CUDA 13.0 knows.
const PTX: (u8, u8) = (9, 0);

const PTX_PART: u16 = 1;
const ELF_PART: u16 = 2;
/// In a part's options: for its architecture alone, as sm_90a is.
const ARCHITECTURE_ALONE: u32 = 1 << 20;

/// A part of a fatbin.
struct Part<'a> {
    kind: u16,
    /// 90 for 9.0.
    architecture: u32,
    alone: bool,
    ptx: (u8, u8),
    bytes: &'a [u8],
}

/// A number at a byte offset; `None` beyond the end.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    number(bytes, at).map(u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    number(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<usize> {
    number(bytes, at).and_then(|n| usize::try_from(u64::from_le_bytes(n)).ok())
}

/// The kernels that a device of this capability finds in a fatbin; `None` if it has no parts, and says nothing.
///
/// # Errors
/// `INVALID_IMAGE` if it cannot be read, `NO_BINARY` if no part is for the device, `UNSUPPORTED_PTX` if only PTX that is too new.
pub(crate) unsafe fn kernels(
    image: *const u8,
    capability: (i32, i32),
) -> CallResult<Option<HashSet<String>>> {
    let header = unsafe { std::slice::from_raw_parts(image, 16) };
    let start = u16_at(header, 6).map_or(0, usize::from);
    let size = u64_at(header, 8).unwrap_or(0);
    if size == 0 {
        return Ok(None);
    }
    if start < 16 {
        return Err(Code::INVALID_IMAGE);
    }
    let parts = parts(unsafe { std::slice::from_raw_parts(image.add(start), size) });
    let parts = parts.ok_or(Code::INVALID_IMAGE)?;
    let device = (capability.0 * 10 + capability.1) as u32;
    let runs = |part: &&Part<'_>| {
        let same = part.architecture / 10 == device / 10 && part.architecture <= device;
        part.kind == ELF_PART && if part.alone { part.architecture == device } else { same }
    };
    let best = parts.iter().filter(runs).max_by_key(|part| (part.architecture, part.alone));
    if let Some(part) = best {
        return elf_kernels(part.bytes).map(Some).ok_or(Code::INVALID_IMAGE);
    }
    let compiles = |part: &&Part<'_>| {
        let older = part.architecture <= device;
        part.kind == PTX_PART && if part.alone { part.architecture == device } else { older }
    };
    let newest = parts.iter().filter(compiles).max_by_key(|part| part.architecture);
    let part = newest.ok_or(Code::NO_BINARY)?;
    if part.ptx > PTX {
        return Err(Code::UNSUPPORTED_PTX);
    }
    if let Ok(text) = std::str::from_utf8(part.bytes) {
        return Ok(Some(ptx_kernels(text)));
    }
    let beside = parts.iter().filter(|part| part.kind == ELF_PART);
    Ok(Some(beside.filter_map(|part| elf_kernels(part.bytes)).flatten().collect()))
}

fn parts(mut rest: &[u8]) -> Option<Vec<Part<'_>>> {
    let mut parts = Vec::new();
    while !rest.is_empty() {
        let (header, size) = (u32_at(rest, 4)? as usize, u64_at(rest, 8)?);
        let end = header.checked_add(size)?;
        let ptx = (u16_at(rest, 26)? as u8, u16_at(rest, 24)? as u8);
        parts.push(Part {
            kind: u16_at(rest, 0)?,
            architecture: u32_at(rest, 28)?,
            alone: u32_at(rest, 40)? & ARCHITECTURE_ALONE != 0,
            ptx,
            bytes: rest.get(header..end)?,
        });
        rest = &rest[end..];
    }
    Some(parts)
}

/// The kernels of machine code: each has a section of its own.
fn elf_kernels(elf: &[u8]) -> Option<HashSet<String>> {
    let table = u64_at(elf, 0x28)?;
    let (entry, count) = (usize::from(u16_at(elf, 0x3a)?), usize::from(u16_at(elf, 0x3c)?));
    let section = |i: usize| elf.get(table.checked_add(i * entry)?..);
    let names = section(usize::from(u16_at(elf, 0x3e)?))?;
    let names = elf.get(u64_at(names, 24)?..)?.get(..u64_at(names, 32)?)?;
    let mut kernels = HashSet::new();
    for i in 0..count {
        let name = names.get(u32_at(section(i)?, 0)? as usize..)?;
        let name = std::str::from_utf8(name.split(|byte| *byte == 0).next()?).ok()?;
        kernels.extend(name.strip_prefix(".text.").map(String::from));
    }
    Some(kernels)
}

fn ptx_kernels(text: &str) -> HashSet<String> {
    let name = |rest: &str| {
        let end = |c: char| !(c.is_alphanumeric() || c == '_' || c == '$');
        rest.trim_start().split(end).next().unwrap_or_default().to_owned()
    };
    text.split(".entry").skip(1).map(name).collect()
}

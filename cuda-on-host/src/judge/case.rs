//! A case: how a kernel is launched, on what, and what it should compute; a TOML file.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::expression::{Sizes, evaluate};
use crate::source::{Argument, Element, Signature};

/// A number or an expression.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Expression {
    /// A whole number.
    Whole(i64),
    /// A number, for scalars of floating-point type.
    Number(f64),
    /// Over the named sizes.
    Text(String),
}

impl Expression {
    /// Its value as a whole number.
    ///
    /// # Errors
    /// A sentence.
    pub fn whole(&self, sizes: &Sizes) -> Result<i64, String> {
        match self {
            Self::Whole(value) => Ok(*value),
            Self::Number(value) => Err(format!("{value} is no whole number")),
            Self::Text(text) => evaluate(text, sizes),
        }
    }

    fn number(&self, sizes: &Sizes) -> Result<f64, String> {
        match self {
            Self::Number(value) => Ok(*value),
            _ => self.whole(sizes).map(|value| value as f64),
        }
    }
}

/// One expression or up to three.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub enum Triple {
    /// In x.
    One(Expression),
    /// In x, y and z.
    Some(Vec<Expression>),
}

impl Triple {
    fn values(&self, what: &str, sizes: &Sizes) -> Result<[u32; 3], String> {
        let all = match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Some(all) => all,
        };
        if all.is_empty() || all.len() > 3 {
            return Err(format!("{what} has one to three sizes, not {}", all.len()));
        }
        let mut values = [1; 3];
        for (value, expression) in values.iter_mut().zip(all) {
            let size = expression.whole(sizes)?;
            *value = u32::try_from(size)
                .ok()
                .filter(|&size| size > 0 && size <= 1 << 20)
                .ok_or_else(|| format!("{what} has a size of {size}; it must be 1 to 1048576"))?;
        }
        Ok(values)
    }
}

/// How a kernel is launched.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaunchCase {
    /// Blocks.
    pub grid: Triple,
    /// Threads of a block.
    pub block: Triple,
    /// Bytes of dynamic shared memory.
    pub shared: Option<Expression>,
    /// Whether all blocks run together.
    #[serde(default)]
    pub cooperative: bool,
}

impl LaunchCase {
    /// The launch at these sizes.
    ///
    /// # Errors
    /// A sentence.
    pub fn at(&self, sizes: &Sizes, seed: u64) -> Result<crate::device::Launch, String> {
        let [grid, block] = [(&self.grid, "grid"), (&self.block, "block")]
            .map(|(triple, what)| triple.values(what, sizes));
        let (grid, block) = (grid?, block?);
        let threads: u64 = block.iter().map(|&size| u64::from(size)).product();
        if threads > 1024 {
            return Err(format!("a block of {threads} threads; CUDA allows 1024"));
        }
        let blocks: u64 = grid.iter().map(|&size| u64::from(size)).product();
        if blocks * threads > 1 << 26 {
            return Err(format!(
                "{blocks} blocks of {threads} threads are too many to run here: take a smaller size"
            ));
        }
        let shared = self.shared.as_ref().map_or(Ok(0), |shared| shared.whole(sizes))?;
        let shared = u32::try_from(shared).ok().filter(|&shared| shared <= 227 << 10);
        let shared = shared.ok_or("dynamic shared memory must be 0 to 232448 bytes")?;
        Ok(crate::device::Launch { grid, block, shared, cooperative: self.cooperative, seed })
    }
}

/// An argument of the kernel.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArgumentCase {
    /// Its name in the signature.
    pub name: String,
    /// The shape of a tensor.
    pub shape: Option<Vec<Expression>>,
    /// A scalar's value.
    pub value: Option<Expression>,
    /// The type of the elements, which must be the signature's.
    pub dtype: Option<String>,
    /// `uniform` (-1 to 1), `normal`, `zeros`, `ones`, `integers(from, to)`, or a `.npy` or safetensors file.
    pub values: Option<String>,
    /// Whether the kernel writes it: then it starts poisoned, unless it has `values`.
    #[serde(default)]
    pub output: bool,
}

/// What the outputs should be: exactly one of the first three.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReferenceCase {
    /// An operation that the caller of the judge knows.
    pub primitive: Option<String>,
    /// Another kernel with the same arguments.
    pub kernel: Option<String>,
    /// A `.npy` or safetensors file; the inputs then come from files, too.
    pub expected: Option<PathBuf>,
    /// The operands of the primitive; by default the tensors that are no outputs, in order.
    pub of: Option<Vec<String>>,
    /// Numbers that the primitive takes: `stride`, `pad`, `axis`.
    #[serde(default)]
    pub with: std::collections::BTreeMap<String, f64>,
    /// The source of `kernel`; by default the same file.
    pub file: Option<PathBuf>,
    /// Launch of `kernel`; by default the same.
    pub launch: Option<LaunchCase>,
    /// The largest error, as a share of the largest magnitude.
    pub tolerance: Option<f64>,
}

/// A case, as its file has it.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// The kernel; may be left out if the source has one.
    pub kernel: Option<String>,
    /// The named sizes.
    #[serde(default)]
    pub sizes: Sizes,
    /// Sizes that must be a multiple of a number.
    #[serde(default)]
    pub multiple: Sizes,
    /// Sizes that only take the given value.
    #[serde(default)]
    pub fixed: Vec<String>,
    /// Further values of some sizes.
    #[serde(default)]
    pub also: Vec<Sizes>,
    /// The kernel's tile, around which sizes are tried.
    #[serde(default = "tile")]
    pub tile: i64,
    /// Grid, block, shared memory.
    pub launch: LaunchCase,
    /// The arguments, in any order.
    pub argument: Vec<ArgumentCase>,
    /// What the outputs should be.
    pub reference: ReferenceCase,
}

fn tile() -> i64 {
    32
}

/// Largest values of a size that the judge tries by itself.
const PRIMES: [i64; 6] = [2, 7, 31, 61, 127, 251];

impl Case {
    /// Reads a case.
    ///
    /// # Errors
    /// A sentence that names the key and the line.
    pub fn parse(text: &str) -> Result<Self, String> {
        let case: Self =
            toml::from_str(text).map_err(|e| e.to_string().trim_end().replace('\n', " "))?;
        for name in
            case.multiple.keys().chain(&case.fixed).chain(case.also.iter().flat_map(Sizes::keys))
        {
            if !case.sizes.contains_key(name) {
                return Err(format!("`{name}` is none of the sizes"));
            }
        }
        for (name, &size) in
            case.sizes.iter().chain(&case.multiple).chain(case.also.iter().flatten())
        {
            if !(1..=1 << 24).contains(&size) {
                return Err(format!("the size `{name}` is {size}; it must be 1 to 16777216"));
            }
        }
        let ways = [
            case.reference.primitive.is_some(),
            case.reference.kernel.is_some(),
            case.reference.expected.is_some(),
        ];
        if ways.iter().filter(|&&way| way).count() != 1 {
            return Err("the reference is one of `primitive`, `kernel` and `expected`".into());
        }
        if !case.argument.iter().any(|argument| argument.output) {
            return Err("no argument is an output: there is nothing to judge".into());
        }
        Ok(case)
    }

    /// The sizes to judge at, the given one first: all at 1, each at a prime, one off the tile on both sides, and those of `also`.
    pub fn all_sizes(&self) -> Vec<Sizes> {
        let mut all = vec![self.sizes.clone()];
        if self.reference.expected.is_some() {
            return all; // files hold one size
        }
        let free = |name: &String| !self.fixed.contains(name);
        let names: Vec<&String> = self.sizes.keys().filter(|name| free(name)).collect();
        let mut add = |changes: &Sizes| {
            let mut sizes = self.sizes.clone();
            for (name, &value) in changes {
                let step = self.multiple.get(name).copied().unwrap_or(1);
                sizes.insert(name.clone(), (value + step - 1) / step * step);
            }
            if !all.contains(&sizes) {
                all.push(sizes);
            }
        };
        for sizes in &self.also {
            add(sizes);
        }
        add(&names.iter().map(|name| ((*name).clone(), 1)).collect());
        for name in names {
            let given = self.sizes[name];
            let prime = PRIMES.iter().rev().find(|&&prime| prime <= given).copied().unwrap_or(1);
            for value in [1, prime, self.tile - 1, self.tile + 1] {
                if value > 0 && value <= 4 * given.max(self.tile) {
                    add(&Sizes::from([(name.clone(), value)]));
                }
            }
        }
        all
    }

    /// The arguments in the order of the signature.
    ///
    /// # Errors
    /// A sentence, if they do not fit.
    pub fn bind(&self, signature: &Signature) -> Result<Vec<Bound<'_>>, String> {
        let Signature { name: kernel, arguments, .. } = signature;
        for given in &self.argument {
            if !arguments.iter().any(|argument| argument.name == given.name) {
                let known: Vec<&str> =
                    arguments.iter().map(|argument| argument.name.as_str()).collect();
                return Err(format!(
                    "`{kernel}` has no argument `{}`; its arguments are {}",
                    given.name,
                    known.join(", ")
                ));
            }
        }
        arguments.iter().map(|argument| self.bind_one(kernel, argument)).collect()
    }

    fn bind_one(&self, kernel: &str, argument: &Argument) -> Result<Bound<'_>, String> {
        let name = &argument.name;
        let mut given = self.argument.iter().filter(|given| given.name == *name);
        let (Some(of), None) = (given.next(), given.next()) else {
            return Err(format!("the case must describe the argument `{name}` of `{kernel}` once"));
        };
        if let Some(dtype) = &of.dtype
            && dtype_of(dtype) != Some(argument.element)
        {
            return Err(format!("`{name}` has the dtype {dtype}, and the signature another"));
        }
        match (argument.pointer, &of.shape, &of.value) {
            (true, Some(_), None) | (false, None, Some(_)) => {}
            (true, ..) => {
                return Err(format!("`{name}` is a pointer: give it a `shape` and no `value`"));
            }
            (false, ..) => {
                return Err(format!("`{name}` is a scalar: give it a `value` and no `shape`"));
            }
        }
        if of.output && (argument.constant || !argument.pointer) {
            return Err(format!("`{name}` is no output: the kernel cannot write it"));
        }
        Ok(Bound { argument: argument.clone(), of })
    }
}

/// An argument with its description.
#[derive(Clone, Debug)]
pub struct Bound<'c> {
    /// From the signature.
    pub argument: Argument,
    /// From the case.
    pub of: &'c ArgumentCase,
}

impl Bound<'_> {
    /// The shape of a tensor.
    ///
    /// # Errors
    /// A sentence.
    pub fn shape(&self, sizes: &Sizes) -> Result<Vec<usize>, String> {
        let shape = self.of.shape.iter().flatten().map(|size| {
            let size = size.whole(sizes)?;
            usize::try_from(size)
                .map_err(|_| format!("`{}` has a side of {size}", self.argument.name))
        });
        let shape = shape.collect::<Result<Vec<_>, _>>()?;
        let count = shape.iter().try_fold(1_usize, |all, &side| all.checked_mul(side));
        match count {
            Some(count) if count <= 1 << 27 => Ok(shape),
            _ => Err(format!("`{}` has more than 134217728 elements", self.argument.name)),
        }
    }

    /// The bytes of a scalar.
    ///
    /// # Errors
    /// A sentence.
    pub fn scalar(&self, sizes: &Sizes) -> Result<Vec<u8>, String> {
        let expression = self.of.value.as_ref().ok_or("a scalar without a value")?;
        let element = self.argument.element;
        if element.is_float() {
            return Ok(encode(&[expression.number(sizes)?], element));
        }
        let value = expression.whole(sizes)?;
        let bits = 8 * element.size() as u32;
        let range = match element {
            Element::Unsigned(_) => 0..=(1_i128 << bits) - 1,
            _ => -(1_i128 << (bits - 1))..=(1_i128 << (bits - 1)) - 1,
        };
        if !range.contains(&i128::from(value)) {
            return Err(format!(
                "`{}` is {value}, which its type does not hold",
                self.argument.name
            ));
        }
        Ok(value.to_le_bytes()[..element.size()].to_vec())
    }
}

fn dtype_of(name: &str) -> Option<Element> {
    Some(match name {
        "f32" => Element::F32,
        "f64" => Element::F64,
        "bf16" => Element::Bf16,
        "i8" => Element::Int(1),
        "i16" => Element::Int(2),
        "i32" => Element::Int(4),
        "i64" => Element::Int(8),
        "u8" => Element::Unsigned(1),
        "u16" => Element::Unsigned(2),
        "u32" => Element::Unsigned(4),
        "u64" => Element::Unsigned(8),
        _ => return None,
    })
}

/// Values as elements of a type, each rounded once.
pub fn encode(values: &[f64], element: Element) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(values.len() * element.size());
    for &value in values {
        match element {
            Element::F32 => bytes.extend((value as f32).to_le_bytes()),
            Element::F64 => bytes.extend(value.to_le_bytes()),
            Element::Bf16 => {
                let bits = (value as f32).to_bits();
                let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
                bytes.extend((rounded as u16).to_le_bytes());
            }
            Element::Int(size) => bytes.extend(&(value as i64).to_le_bytes()[..size]),
            Element::Unsigned(size) => bytes.extend(&(value as u64).to_le_bytes()[..size]),
        }
    }
    bytes
}

/// Elements as values.
pub fn decode(bytes: &[u8], element: Element) -> Vec<f64> {
    let value = |chunk: &[u8]| {
        let mut wide = [0; 8];
        wide[..chunk.len()].copy_from_slice(chunk);
        let bits = u64::from_le_bytes(wide);
        match element {
            Element::F32 => f64::from(f32::from_bits(bits as u32)),
            Element::F64 => f64::from_bits(bits),
            Element::Bf16 => f64::from(f32::from_bits((bits as u32) << 16)),
            Element::Unsigned(_) => bits as f64,
            Element::Int(size) => {
                let unused = 64 - 8 * size as u32;
                ((bits << unused) as i64 >> unused) as f64
            }
        }
    };
    bytes.chunks_exact(element.size()).map(value).collect()
}

/// Reads the values of a `.npy` or safetensors file; a safetensors file has one tensor, or one of this name.
///
/// # Errors
/// A sentence that names the file.
pub fn read_values(path: &Path, name: &str) -> Result<(Vec<usize>, Vec<f64>), String> {
    let bytes = std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let read = if path.extension().is_some_and(|e| e == "npy") {
        npy(&bytes)
    } else {
        from_safetensors(&bytes, name)
    };
    read.map_err(|why| format!("{}: {why}", path.display()))
}

fn from_safetensors(bytes: &[u8], name: &str) -> Result<(Vec<usize>, Vec<f64>), String> {
    let all = safetensors::SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let tensor = match all.tensor(name) {
        Ok(tensor) => tensor,
        Err(_) if all.len() == 1 => all.iter().next().ok_or("it is empty")?.1,
        Err(_) => return Err(format!("it has several tensors, and none is named `{name}`")),
    };
    let dtype = format!("{:?}", tensor.dtype()).to_lowercase();
    let element = dtype_of(&dtype).ok_or_else(|| format!("the type {dtype} is not supported"))?;
    Ok((tensor.shape().to_vec(), decode(tensor.data(), element)))
}

fn npy(bytes: &[u8]) -> Result<(Vec<usize>, Vec<f64>), String> {
    let broken = || "it is no .npy file in C order".to_owned();
    if !bytes.starts_with(b"\x93NUMPY") || bytes.len() < 12 {
        return Err(broken());
    }
    let (length, from) = match bytes[6] {
        1 => (usize::from(u16::from_le_bytes([bytes[8], bytes[9]])), 10),
        _ => (u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]) as usize, 12),
    };
    let header = bytes.get(from..from + length).ok_or_else(broken)?;
    let header = std::str::from_utf8(header).map_err(|_| broken())?;
    let after = |key: &str| {
        header.split_once(key).map(|(_, rest)| rest.trim_start_matches(['\'', ':', ' ']))
    };
    let dtype = after("'descr'").and_then(|rest| rest.split('\'').next()).ok_or_else(broken)?;
    let element = match dtype {
        "<f4" => Element::F32,
        "<f8" => Element::F64,
        "<i4" => Element::Int(4),
        "<i8" => Element::Int(8),
        "<u4" => Element::Unsigned(4),
        "|u1" => Element::Unsigned(1),
        other => return Err(format!("the type {other} is not supported")),
    };
    if !after("'fortran_order'").is_some_and(|rest| rest.starts_with("False")) {
        return Err(broken());
    }
    let shape =
        after("'shape'").and_then(|rest| rest.split(['(', ')']).nth(1)).ok_or_else(broken)?;
    let shape = shape.split(',').map(str::trim).filter(|side| !side.is_empty());
    let shape =
        shape.map(|side| side.parse().map_err(|_| broken())).collect::<Result<Vec<usize>, _>>()?;
    let count = shape
        .iter()
        .try_fold(element.size(), |all, &side| all.checked_mul(side))
        .ok_or_else(broken)?;
    let data = bytes.get(from + length..).filter(|data| data.len() == count).ok_or_else(broken)?;
    Ok((shape, decode(data, element)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn elements_survive_encoding() {
        for element in [Element::F32, Element::F64, Element::Bf16, Element::Int(2), Element::Int(8)]
        {
            let values = [0.0, -1.0, 3.0, 96.0];
            assert_eq!(decode(&encode(&values, element), element), values, "{element:?}");
        }
        assert_eq!(decode(&encode(&[1.0 + 1.0 / 256.0], Element::Bf16), Element::Bf16), [1.0]);
        assert!(decode(&encode(&[f64::NAN], Element::Bf16), Element::Bf16)[0].is_nan());
    }

    #[test]
    fn npy_files_are_read_and_damaged_ones_refused() {
        let mut file = b"\x93NUMPY\x01\x00".to_vec();
        let header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1), }\n";
        file.extend((header.len() as u16).to_le_bytes());
        file.extend(header.as_bytes());
        file.extend([1.5_f32, -2.0].iter().flat_map(|v| v.to_le_bytes()));
        assert_eq!(npy(&file), Ok((vec![2, 1], vec![1.5, -2.0])));
        for length in 0..file.len() {
            assert!(npy(&file[..length]).is_err(), "{length}");
        }
    }
}

//! Goldens: PyTorch's results in f64, and the error of its f32 against them. `scripts/make-goldens` writes them.
//!
//! A tensor is a record of f64: `[count, PyTorch f32's relative error, L2 norm, largest magnitude, four projections,
//! entries…]`. Tensors of up to 64 entries store all of them, larger ones 32 seeded entries. A projection is the dot product
//! with seeded numbers.

use std::collections::BTreeMap;

use safetensors::{Dtype, SafeTensors};

use crate::compare::{close, largest, norm, ratio};
use crate::seeded;

const HEAD: usize = 8;
/// Length of a row of a table: the hash of a name, and a record with up to eight entries.
const ROW: usize = 1 + HEAD + 8;

/// A file of goldens.
#[derive(Debug)]
pub struct Goldens {
    tensors: BTreeMap<String, Vec<f64>>,
}

impl Goldens {
    /// `tests/goldens/{name}.safetensors`.
    pub fn open(name: &str) -> Self {
        let path = format!("tests/goldens/{name}.safetensors");
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let decode = |data: &[u8]| -> Vec<f64> {
            data.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let tensors = file.iter().map(|(name, view)| {
            assert_eq!(view.dtype(), Dtype::F64, "{name}");
            (name.to_owned(), decode(view.data()))
        });
        Self { tensors: tensors.collect() }
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Plain numbers.
    #[track_caller]
    pub fn numbers(&self, name: &str) -> &[f64] {
        let missing = || panic!("no golden `{name}`: run scripts/make-goldens");
        self.tensors.get(name).unwrap_or_else(missing)
    }

    /// The record of a tensor.
    #[track_caller]
    pub fn record(&self, name: &str) -> Record<'_> {
        Record { name: name.to_owned(), values: self.numbers(name) }
    }

    /// Compares several tensors with the records of one table, sorted by name. `got` must hold exactly these tensors.
    ///
    /// `tolerance` gives the tolerance of each record.
    #[track_caller]
    pub fn check_table(
        &self,
        name: &str,
        got: &BTreeMap<String, Vec<f64>>,
        tolerance: impl Fn(&Record<'_>) -> f64,
    ) -> Vec<Result<f64, String>> {
        let rows = self.numbers(name).chunks_exact(ROW);
        if rows.len() != got.len() {
            return vec![Err(format!("{name}: {} tensors, expected {}", got.len(), rows.len()))];
        }
        let check = |((slot, got), row): ((&String, &Vec<f64>), &[f64])| {
            if row[0] != (seeded::seed(slot) >> 11) as f64 {
                return Err(format!("{name}: {slot} is not the tensor expected here"));
            }
            let record = Record { name: format!("{name}|{slot}"), values: &row[1..] };
            record.check(got, tolerance(&record))
        };
        got.iter().zip(rows).map(check).collect()
    }
}

/// The golden record of one tensor.
#[derive(Clone, Debug)]
pub struct Record<'a> {
    name: String,
    values: &'a [f64],
}

impl Record<'_> {
    /// `max(least, 4 x PyTorch f32's own error)`.
    pub fn tolerance(&self, least: f64) -> f64 {
        assert!(self.values[1].is_finite(), "{}: PyTorch's error is {}", self.name, self.values[1]);
        least.max(4.0 * self.values[1])
    }

    /// The stored entries of the tensor.
    pub fn entries(&self) -> &[f64] {
        &self.values[HEAD..]
    }

    /// Compares a tensor. Returns its relative error, or a message that says what is wrong.
    pub fn check(&self, got: &[f64], tolerance: f64) -> Result<f64, String> {
        let [count, _, want_norm, want_max] = self.values[..4].try_into().unwrap();
        let name = &self.name;
        if got.len() != count as usize {
            return Err(format!("{name}: {} numbers, expected {count}", got.len()));
        }
        let kept = &self.values[HEAD..];
        if got.len() <= kept.len() {
            return close(name, got, &kept[..got.len()], tolerance);
        }
        if let Some(i) = got.iter().position(|v| !v.is_finite()) {
            return Err(format!("{name}: got {} at {i} of {}", got[i], got.len()));
        }
        let norm_error = ratio((norm(got) - want_norm).abs(), want_norm);
        // The projection of an error is the error times about sqrt(1/3), the standard deviation of the seeded numbers.
        let projected = projections(got);
        let squares = projected.iter().zip(&self.values[4..HEAD]).map(|(g, w)| (g - w).powi(2));
        let projection_error = ratio((squares.sum::<f64>() * 3.0 / 4.0).sqrt(), want_norm);
        let at = seeded::indices(seeded::seed("entries"), kept.len(), got.len());
        let off: Vec<f64> = at.iter().zip(kept).map(|(&i, want)| got[i] - want).collect();
        let entry_error = ratio(largest(&off), want_max);
        if norm_error <= tolerance
            && projection_error <= 2.0 * tolerance
            && entry_error <= 16.0 * tolerance
        {
            return Ok(norm_error.max(projection_error));
        }
        Err(format!(
            "{name}: tolerance {tolerance:.2e}; error of the norm {norm_error:.2e}, of projections \
             {projection_error:.2e}, of the worst entry {entry_error:.2e}; norm {}, expected {want_norm}",
            norm(got)
        ))
    }
}

fn projections(values: &[f64]) -> [f64; 4] {
    std::array::from_fn(|j| {
        let weights = seeded::unit(seeded::seed(&format!("projection {j}")), values.len());
        values.iter().zip(weights).map(|(v, w)| v * w).sum()
    })
}

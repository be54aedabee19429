//! Features of any images, with or without labels, written to a file for use elsewhere.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::arena::Arena;
use crate::data::augment::Policy;
use crate::data::{Skipped, Source, Transform};
use crate::error::{Error, Result};
use crate::eval::features::some_readable;
use crate::eval::rows::Images;
use crate::files::write_pair;
use crate::nn::ResNet;
use crate::tape::evaluate;
use crate::tensor::Tensor;
use crate::weights::{EXPORT, Entry, FEATURES, write_weights};

/// Images per forward pass.
const BATCH: usize = 64;

/// Features of images, one row per image, with names and labels.
#[derive(Clone, Debug)]
pub struct Embedded {
    /// `[n, d]`, row-major.
    pub values: Vec<f32>,
    /// Length of a row.
    pub d: usize,
    /// The source's name of each image.
    pub names: Vec<String>,
    /// The class of each image; -1 for an image without a label.
    pub labels: Vec<i32>,
    /// Names of the classes.
    pub classes: Vec<String>,
    /// Images that could not be read and have no row.
    pub skipped: Vec<Skipped>,
}

/// Computes the features of all images of `source` with `backbone` and the arena's weights, in evaluation mode.
///
/// Batch norm uses its running statistics. Each image is the centre crop by `transform`, resampled and normalised by `policy`.
/// `progress` is called with the number of images done.
///
/// # Errors
/// If no image can be read, features are NaN or infinite, or the device fails.
pub fn embed(
    arena: &Arena,
    backbone: &ResNet,
    source: &dyn Source,
    policy: &Policy,
    transform: Transform,
    mut progress: impl FnMut(usize),
) -> Result<Embedded> {
    let mut all = Embedded {
        values: Vec::with_capacity(source.len() * backbone.features()),
        d: backbone.features(),
        names: Vec::with_capacity(source.len()),
        labels: Vec::with_capacity(source.len()),
        classes: source.classes().to_vec(),
        skipped: Vec::new(),
    };
    let (range, by, device) = (0..source.len(), transform, arena.device());
    let images = Images { source, range, batch: BATCH, by, policy, device };
    let forward = |images: &Tensor| evaluate(arena, |tape| backbone.forward(&tape.input(images)));
    images.rows(("features", all.d), forward, |rows| {
        all.values.extend(rows.values);
        all.names.extend(rows.indices.iter().map(|&index| source.name(index as usize)));
        all.labels.extend(rows.labels);
        all.skipped.extend(rows.skipped);
        progress(all.names.len() + all.skipped.len());
        Ok(())
    })?;
    some_readable(all.names.len(), &all.skipped)?;
    Ok(all)
}

/// The formats of [`Embedded::write`].
enum Format {
    Npy,
    Safetensors,
}

impl Format {
    fn of(path: &Path) -> Result<Self> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("npy") => Ok(Self::Npy),
            Some("safetensors") => Ok(Self::Safetensors),
            _ => Err(Error::Config(format!(
                "{}: the file's name must end in .npy or .safetensors",
                path.display()
            ))),
        }
    }
}

impl Embedded {
    /// Returns the files that [`Embedded::write`] would write, to check them before the work.
    ///
    /// # Errors
    /// If the extension is unknown.
    pub fn files(path: &Path) -> Result<Vec<PathBuf>> {
        let table = path.with_extension("tsv");
        Ok(match Format::of(path)? {
            Format::Npy => vec![path.to_path_buf(), table],
            Format::Safetensors => vec![path.to_path_buf()],
        })
    }

    /// Writes the rows in the format that the file's extension names, atomically, and returns the files written.
    ///
    /// `.npy` comes with a table of file, label and class (`.tsv`) in the order of the rows. `.safetensors` holds the tensors
    /// `features [n, d]` and `labels [n]`, and `names` and `classes` as JSON lists in the header.
    ///
    /// # Errors
    /// If the extension is another one, or the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<Vec<PathBuf>> {
        let shape = [self.names.len(), self.d];
        match Format::of(path)? {
            Format::Npy => {
                let table = path.with_extension("tsv");
                let rows = npy(shape, &self.values);
                write_pair((&table, self.table().as_bytes()), (path, &rows))?;
                Ok(vec![path.to_path_buf(), table])
            }
            Format::Safetensors => {
                let values = || self.values.iter().map(|&v| f64::from(v)).collect();
                let entries = [
                    Entry::floats("features".into(), shape.to_vec(), values),
                    Entry::labels("labels".into(), &self.labels),
                ];
                let list = |of: &[String]| serde_json::to_string(of).expect("a list of strings");
                let notes = HashMap::from([
                    ("names".into(), list(&self.names)),
                    ("classes".into(), list(&self.classes)),
                    (EXPORT.into(), FEATURES.into()),
                ]);
                write_weights(path, &entries, notes, || Ok(()))?;
                Ok(vec![path.to_path_buf()])
            }
        }
    }

    fn table(&self) -> String {
        let mut table = String::from("file\tlabel\tclass\n");
        for (name, &label) in self.names.iter().zip(&self.labels) {
            let class = usize::try_from(label).ok().and_then(|label| self.classes.get(label));
            let class = class.map_or("", String::as_str);
            table += &format!("{}\t{label}\t{}\n", escaped(name), escaped(class));
        }
        table
    }
}

/// A name as one field of a table: tabs, line feeds and other control characters are escaped.
fn escaped(name: &str) -> String {
    let escape = |c: char| if c.is_control() { c.escape_default().to_string() } else { c.into() };
    name.chars().map(escape).collect()
}

/// Encodes `[n, d]` values in NumPy's format, version 1.0 (numpy.lib.format).
fn npy([n, d]: [usize; 2], values: &[f32]) -> Vec<u8> {
    let mut header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({n}, {d}), }}");
    // Magic, version, header length and header together are a multiple of 64 bytes; the header ends with a line feed.
    let total = (10 + header.len() + 1).next_multiple_of(64);
    header += &" ".repeat(total - 10 - header.len() - 1);
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_image_whatever_its_name() {
        let embedded = Embedded {
            values: vec![0.0; 2],
            d: 1,
            names: vec!["a\tb\nc.png".into(), "é.png".into()],
            labels: vec![0, -1],
            classes: vec!["x\ry".into()],
            skipped: Vec::new(),
        };
        let expected = "file\tlabel\tclass\na\\tb\\nc.png\t0\tx\\ry\né.png\t-1\t\n";
        assert_eq!(embedded.table(), expected);
    }
}

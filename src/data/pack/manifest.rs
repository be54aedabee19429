//! The manifest of a pack: which splits it has. It is written last, so a pack that was stopped has none.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::find;

/// The file's name.
pub const MANIFEST: &str = "pack.json";

/// The most bytes of a manifest; a longer one is not ours.
const LONGEST: u64 = 1 << 20;

/// The splits of a pack.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// By name: `train`, `test`, `val` or `valid`.
    pub splits: BTreeMap<String, SplitInfo>,
    /// The values that became 0 and the largest sample when the images were packed, if they were stretched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<[f64; 2]>,
}

/// One split.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitInfo {
    /// How many files it has.
    pub files: u32,
    /// How many images, in all of them.
    pub images: u64,
}

impl Manifest {
    /// Reads the manifest of a folder; `None` if it has none.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(MANIFEST);
        let Some(found) = find(&path)?.filter(Metadata::is_file) else { return Ok(None) };
        let length = found.len();
        if length > LONGEST {
            return Err(Error::format(
                path,
                format!("has {length} bytes, more than a manifest can have"),
            ));
        }
        let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
        let manifest = serde_json::from_slice(&bytes).map_err(|e| {
            Error::format(&path, format!("is not the manifest of a pack ({e}): {}", super::REMEDY))
        })?;
        Ok(Some(manifest))
    }

    /// The bytes of the file, the same for the same splits.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("names and numbers are JSON");
        bytes.push(b'\n');
        bytes
    }
}

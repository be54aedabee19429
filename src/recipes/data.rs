//! The images of a recipe: where they lie, how files are read, which of them are used.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::data::{Axes, Format, LabelTable, Pages, Reading, table_and_part};
use crate::error::{Error, Result};
use crate::settings;

/// The images of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSettings {
    /// A folder, or `fashion-scattered` for the built-in images.
    pub path: String,
    /// Channels of the images; see [`Reading`]. The network has as many inputs.
    #[serde(default = "three", skip_serializing_if = "is_three")]
    pub channels: usize,
    /// Bits of a sample, 8 or 16.
    #[serde(default = "eight", skip_serializing_if = "is_eight")]
    pub bits: usize,
    /// The values that become 0 and the largest sample of 16 bits; files of floats need it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub range: Option<[f64; 2]>,
    /// What the pages of a TIFF file are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<Pages>,
    /// The axes of NumPy arrays, which are read only with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub axes: Option<Axes>,
    /// Use this many training images, spread over the set; 0 for all.
    #[serde(default)]
    pub limit: usize,
    /// Use this many held-out images, spread over the set; 0 for all.
    #[serde(default)]
    pub test_limit: usize,
    /// Train on a labelled part of the images only: `10%` of each class, or a file that lists images (see
    /// [`labelled`](crate::data::labelled)); or the classes of image files, from a table whose name ends in `.csv` or `.tsv` (see
    /// [`LabelTable`]), of which a share may follow: `labels.csv 10%`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<String>,
    /// The largest share of unreadable images, in `0..=1`, that a command leaves out; with more it stops.
    #[serde(default = "one_percent", skip_serializing_if = "is_one_percent")]
    pub max_skipped: f64,
    /// The share of each class's training images, in `0..1`, that is not trained on but chooses `best.safetensors`. With 0 the
    /// held-out images choose it.
    #[serde(default, skip_serializing_if = "is_zero_share")]
    pub validation: f64,
    /// The most memory of a GPU that the decoded training images may take, such as `20GB`; `0` for none. A larger set is uploaded
    /// batch by batch. If absent, half of what is free at the start. Does not change results.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu_memory: Option<String>,
}

impl DataSettings {
    /// The bytes of [`gpu_memory`](DataSettings::gpu_memory), if it is set.
    ///
    /// # Errors
    /// If it is not a size.
    pub(crate) fn gpu_bytes(&self) -> Result<Option<usize>> {
        let wrong = |reason| Error::Config(format!("data.gpu_memory: {reason}"));
        self.gpu_memory.as_deref().map(settings::bytes).transpose().map_err(wrong)
    }

    /// All images of a folder, read in some way.
    pub(crate) fn all_of(path: &str, reading: &Reading) -> Self {
        let Reading { format: Format { channels, bits }, range, pages, axes } = *reading;
        let (limit, test_limit, labels) = (0, 0, None);
        let (max_skipped, validation, path) = (MAX_SKIPPED, 0.0, path.to_owned());
        Self {
            path,
            channels,
            bits,
            range,
            pages,
            axes,
            limit,
            test_limit,
            labels,
            max_skipped,
            validation,
            gpu_memory: None,
        }
    }

    /// The file of the table of classes that `labels` names, if it does, and the part of the images that it asks for, if it does.
    fn split_labels(&self) -> (Option<&str>, Option<&str>) {
        self.labels.as_deref().map_or((None, None), table_and_part)
    }

    /// The table of classes that `labels` names, if it does, and the part of the images that it asks for, if it does.
    ///
    /// # Errors
    /// If the table cannot be read.
    pub fn label_table(&self) -> Result<(Option<LabelTable>, Option<&str>)> {
        let (file, part) = self.split_labels();
        Ok((file.map(|file| LabelTable::read(Path::new(file))).transpose()?, part))
    }

    /// Narrows the images to a share or a list, with the classes of the table that it has, if it has one.
    pub(crate) fn set_labels(&mut self, which: &str) {
        let table = self.split_labels().0.filter(|_| which.trim_end().ends_with('%'));
        self.labels = Some(table.map_or(which.to_owned(), |table| format!("{table} {which}")));
    }

    /// How its files are read.
    pub fn reading(&self) -> Reading {
        let &Self { channels, bits, range, pages, axes, .. } = self;
        Reading { format: Format { channels, bits }, range, pages, axes }
    }
}

/// The default of [`DataSettings::max_skipped`].
pub(crate) const MAX_SKIPPED: f64 = 0.01;

fn one_percent() -> f64 {
    MAX_SKIPPED
}

fn is_one_percent(value: &f64) -> bool {
    *value == MAX_SKIPPED
}

fn three() -> usize {
    3
}

fn is_three(value: &usize) -> bool {
    *value == 3
}

fn eight() -> usize {
    8
}

fn is_eight(value: &usize) -> bool {
    *value == 8
}

fn is_zero_share(value: &f64) -> bool {
    *value == 0.0
}

//! The images of a run, as its recipe names them.

use std::path::Path;
use std::sync::Arc;

use crate::data::{self, Source, Split, Subset};
use crate::error::{Error, Result};
use crate::recipes::DataSettings;

/// The images of a run.
#[derive(Clone)]
pub struct Images {
    /// The training part.
    pub train: Arc<dyn Source>,
    /// The held-out part; `None` if the set has no such part or no labels.
    pub test: Option<Arc<dyn Source>>,
}

impl Images {
    /// Opens the images that a recipe names.
    ///
    /// # Errors
    /// If the path does not hold a data set, or a part of it is damaged.
    pub fn open(settings: &DataSettings) -> Result<Self> {
        let open = |split, limit: usize| -> Result<Arc<dyn Source>> {
            let all: Arc<dyn Source> = if settings.path == "fashion-scattered" {
                Arc::new(data::fashion_scattered(split))
            } else {
                data::open(Path::new(&settings.path), split)?.into()
            };
            Ok(if limit == 0 { all } else { Arc::new(Subset::spread(all, limit)) })
        };
        let mut train = open(Split::Train, settings.limit)?;
        if let Some(which) = &settings.labels {
            let labelled = data::labelled(&*train, which)?;
            train = Arc::new(Subset::new(train, labelled));
        }
        if train.classes().is_empty() {
            return Ok(Self { train, test: None });
        }
        let test = match open(Split::Test, settings.test_limit) {
            Ok(test) => Some(test),
            // A set without a held-out part can be trained on; one with a damaged file cannot.
            Err(Error::Format { path, .. }) if path == Path::new(&settings.path) => None,
            Err(error) => return Err(error),
        };
        Ok(Self { train, test })
    }

    /// Returns sentences on the images that a user should read: what is not read, and classes without training images.
    pub fn notes(&self) -> impl Iterator<Item = &String> {
        self.train.notes().iter().chain(self.test.iter().flat_map(|test| test.notes()))
    }

    /// Returns the held-out images, for a command that needs them.
    ///
    /// # Errors
    /// If there are none.
    pub fn held_out(&self) -> Result<&Arc<dyn Source>> {
        self.test.as_ref().ok_or_else(|| {
            Error::config(
                "evaluation needs labelled held-out images: class folders in test/ or val/",
            )
        })
    }
}

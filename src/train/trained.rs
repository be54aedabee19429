//! A trained network by path: a run's folder, or one checkpoint.

use std::path::{Path, PathBuf};

use crate::arena::Arena;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::files::is_file;
use crate::methods::Method;
use crate::recipes::Recipe;
use crate::train;

/// A run's recipe and one of its checkpoints.
pub struct Trained {
    /// The recipe, with what the caller changed.
    pub recipe: Recipe,
    /// The checkpoint's file.
    pub checkpoint: PathBuf,
}

impl Trained {
    /// Opens a folder's newest checkpoint, or the given checkpoint, with `key.path=value` settings on top of its recipe.
    ///
    /// # Errors
    /// If there is neither, or a setting is unknown or out of range.
    pub fn open(path: &Path, settings: &[String]) -> Result<Self> {
        if is_file(path)? {
            let recipe = train::recipe_in(path, settings)?;
            return Ok(Self { recipe, checkpoint: path.to_path_buf() });
        }
        let file = path.join("recipe.toml");
        if !is_file(&file)? {
            return Err(Error::Config(format!(
                "{}: neither a run's folder (it has no recipe.toml) nor a checkpoint",
                path.display()
            )));
        }
        let checkpoint = train::newest(path)?;
        let recipe = train::recipe_of(&file, &checkpoint, settings)?;
        Ok(Self { recipe, checkpoint })
    }

    /// Builds the method and loads its weights onto a device.
    ///
    /// # Errors
    /// If the checkpoint cannot be read or does not fit the recipe.
    pub fn load(&self, device: &Device) -> Result<(Box<dyn Method>, Arena)> {
        let method = self.recipe.build_method()?;
        let mut arena = Arena::new(method.layout(), device, self.recipe.seed);
        train::load_weights(&self.checkpoint, &mut arena)?;
        Ok((method, arena))
    }
}

//! Whether the predictions of a trained classifier mean to another run what they meant where it was trained.

use std::path::Path;

use crate::data::augment::Normalise;
use crate::error::{Error, Result};
use crate::recipes::Recipe;
use crate::train::checkpoint;
use crate::train::resume::{PROGRESS_NOTE, RECIPE_NOTE, progress_in};
use crate::weights::WeightFile;

/// What a checkpoint's classes are and what stands in their place among `classes`, in words, if they are others or in another order.
/// A file that does not name them, or images without classes, are not compared.
pub(super) fn other_classes(file: &WeightFile, classes: &[String]) -> Result<Option<[String; 2]>> {
    if file.note(PROGRESS_NOTE).is_none() || classes.is_empty() {
        return Ok(None);
    }
    let then = progress_in(file)?.classes;
    if then.is_empty() || then == classes {
        return Ok(None);
    }
    Ok(Some(match then.iter().zip(classes).position(|(then, now)| then != now) {
        Some(at) => [format!("class {at} {:?}", then[at]), format!("{:?}", classes[at])],
        None => [format!("{} classes", then.len()), classes.len().to_string()],
    }))
}

/// Fails if a teacher's checkpoint was trained on other classes than the student's images have, or on pixels that were normalised
/// otherwise than the student's, which it sees. A file that does not say so, or images without classes, are not compared.
pub(super) fn check(teacher: &Path, recipe: &Recipe, classes: &[String]) -> Result<()> {
    let file = checkpoint::open(teacher)?;
    let (Some(_), Some(own)) = (file.note(PROGRESS_NOTE), file.note(RECIPE_NOTE)) else {
        return Ok(());
    };
    let refused = |reason: String| Err(Error::format(teacher, reason));
    if let Some([of, now]) = other_classes(&file, classes)? {
        return refused(format!(
            "the teacher was trained with {of}, which is {now} here: a student learns its classes in their order, so train it on images \
             of the same classes or of none"
        ));
    }
    let own = Recipe::parse(own, &teacher.display().to_string(), &[])?;
    let [then, now] = [&own, recipe].map(|recipe| recipe.augment[0].normalise.as_ref());
    if then != now {
        let [then, now] = [then, now].map(|normalise| match normalise {
            Some(Normalise { mean, std }) => format!("mean {mean:?} and std {std:?}"),
            None => "nothing".into(),
        });
        return refused(format!(
            "the teacher was trained on pixels normalised by {then}, and sees the student's, which are normalised by {now}: set \
             augment.0.normalise as it was"
        ));
    }
    Ok(())
}

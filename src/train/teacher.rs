//! Whether a teacher's predictions mean to a student what they meant where the teacher was trained.

use std::path::Path;

use crate::data::augment::Normalise;
use crate::error::{Error, Result};
use crate::recipes::Recipe;
use crate::train::checkpoint;
use crate::train::resume::{PROGRESS_NOTE, RECIPE_NOTE, progress_in};

/// Fails if a teacher's checkpoint was trained on other classes than the student's images have, or on pixels that were normalised
/// otherwise than the student's, which it sees. A file that does not say so, or images without classes, are not compared.
pub(super) fn check(teacher: &Path, recipe: &Recipe, classes: &[String]) -> Result<()> {
    let file = checkpoint::open(teacher)?;
    let (Some(_), Some(own)) = (file.note(PROGRESS_NOTE), file.note(RECIPE_NOTE)) else {
        return Ok(());
    };
    let refused = |reason: String| Err(Error::format(teacher, reason));
    let then = progress_in(&file)?.classes;
    if !then.is_empty() && !classes.is_empty() && then != classes {
        let (of, now) = match then.iter().zip(classes).position(|(then, now)| then != now) {
            Some(at) => (format!("class {at} {:?}", then[at]), format!("{:?}", classes[at])),
            None => (format!("{} classes", then.len()), classes.len().to_string()),
        };
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

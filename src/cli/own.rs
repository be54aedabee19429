//! `train FOLDER`: plans a run on somebody's own images, and prints the plan.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::args::Train;
use super::{device, say, talk};
use crate::device::{Device, Group};
use crate::error::{Error, Result, as_word};
use crate::recipes::Recipe;
use crate::train::{self, Plan, Wishes};

/// A planned run, ready to be trained.
pub(super) struct Planned {
    pub(super) recipe: Recipe,
    pub(super) device: Device,
    pub(super) out: PathBuf,
    /// Seconds that it should take.
    pub(super) seconds: f64,
}

/// Plans a run on the images of a folder and prints the plan. `None` if that is all that is wanted.
pub(super) fn planned(folder: &str, args: &Train, group: &Group) -> Result<Option<Planned>> {
    if group.size() > 1 {
        return Err(Error::Config(format!(
            "a folder is planned for one process: run `selfsup train {} --plan` alone, and train a recipe with several",
            as_word(Path::new(folder))
        )));
    }
    let path = Path::new(folder);
    let out = match &args.out {
        Some(out) => out.clone(),
        None => PathBuf::from("runs").join(name_of(path)?),
    };
    train::check_outside(path, &out)?;
    if !args.plan {
        train::check_free(&out)?;
    }
    // Precision and threads of the device may be among the settings.
    let settings = Recipe::load("demo", &only_train(&args.set))?.train;
    let device = device::open_to_train(args.device, &settings)?;
    let wishes =
        Wishes { method: args.method.as_deref(), budget: args.budget, settings: &args.set };
    let plan = train::plan(path, wishes, &device, &talk)?;
    if args.plan {
        lines(folder, &plan, &out).iter().try_for_each(|line| say(line))?;
        say(&format!("train: selfsup train {}{}", as_word(path), given(args)))?;
        return Ok(None);
    }
    lines(folder, &plan, &out).iter().for_each(|line| talk(line));
    let Plan { recipe, seconds, .. } = plan;
    Ok(Some(Planned { recipe, device, out, seconds }))
}

/// The settings of `train.` among all.
fn only_train(settings: &[String]) -> Vec<String> {
    let is_device =
        |s: &&String| s.starts_with("train.precision") || s.starts_with("train.threads");
    settings.iter().filter(is_device).cloned().collect()
}

/// The name of a folder, also of `.` and `..`.
fn name_of(folder: &Path) -> Result<PathBuf> {
    let full = folder.canonicalize().map_err(Error::io(folder))?;
    Ok(full.file_name().map_or_else(|| "images".into(), PathBuf::from))
}

/// The options of a command, without those of the plan.
fn given(args: &Train) -> String {
    let mut words = String::new();
    if let Some(method) = &args.method {
        words += &format!(" --method {method}");
    }
    if let Some(budget) = args.budget {
        words += &format!(" --budget {}s", budget.as_secs_f64());
    }
    if let Some(device) = args.device {
        words += &format!(" --device {device}");
    }
    for setting in &args.set {
        words += &format!(" --set {}", as_word(Path::new(setting)));
    }
    if let Some(out) = &args.out {
        words += &format!(" --out {}", as_word(out));
    }
    words
}

/// The plan in lines.
fn lines(folder: &str, plan: &Plan, out: &Path) -> Vec<String> {
    let Plan { survey, recipe, pace, .. } = plan;
    let mut lines = vec![format!("{folder}: {}", found(plan))];
    if !survey.broken.is_empty() {
        let first = &survey.broken[0].reason;
        lines.push(format!(
            "  {} of {} images cannot be read and are left out; the first: {first}",
            survey.broken.len(),
            survey.looked_at
        ));
    }
    if survey.copies > 0 {
        lines.push(format!(
            "  {} images have exactly the pixels of another one: remove them, or they count twice",
            survey.copies
        ));
    }
    lines.extend(plan.notes.iter().map(|note| format!("  {note}")));
    lines.push("settings:".into());
    lines.extend(
        plan.choices
            .iter()
            .map(|choice| format!("  {} {}: {}", choice.what, choice.value, choice.why)),
    );
    lines.push(format!(
        "plan: {} steps in {} epochs, about {} ({:.0} ms a step, measured on {} of them); {} of memory; up to {} on disk in {}",
        plan.steps,
        recipe.train.epochs,
        time(plan.seconds),
        1000.0 * pace.step,
        pace.steps,
        size(plan.memory),
        size(plan.disk),
        out.display()
    ));
    lines
}

/// What was found in the folder, in a line.
fn found(plan: &Plan) -> String {
    let survey = &plan.survey;
    let [least, median, most] = survey.sides;
    let readable = survey.looked_at - survey.broken.len();
    let reading = plan.recipe.data.reading();
    let colour = match survey.grey {
        _ if !reading.is_rgb() => reading.format.to_string(),
        0 => "in colour".to_owned(),
        grey if grey == readable => "without colour".into(),
        grey => format!("{:.0}% of them without colour", 100.0 * grey as f64 / readable as f64),
    };
    let labels = match (plan.classes, plan.held_out) {
        (0, _) => "no labels".to_owned(),
        (classes, 0) => format!("{classes} classes, none held out"),
        (classes, held_out) => format!("{classes} classes, {held_out} images held out"),
    };
    let side = if least == most {
        format!("{least}")
    } else {
        format!("{least} to {most}, most about {median}")
    };
    let looked = match survey.looked_at == survey.images {
        true => String::new(),
        false => format!(" ({} of them looked at)", survey.looked_at),
    };
    format!("{} images{looked}, {colour}, shorter side {side} pixels, {labels}", survey.images)
}

/// A time that a person reads.
pub(super) fn time(seconds: f64) -> String {
    match seconds {
        ..100.0 => format!("{seconds:.0} s"),
        ..6000.0 => format!("{:.0} minutes", seconds / 60.0),
        _ => format!("{:.1} hours", seconds / 3600.0),
    }
}

fn size(bytes: usize) -> String {
    match bytes >> 20 {
        0..10_000 => format!("{:.0} MiB", bytes as f64 / f64::from(1 << 20)),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

/// Parses a time: `90s`, `30m`, `2h`, `1h30m`.
pub(super) fn budget(text: &str) -> Result<Duration, String> {
    let wrong = || "expected a time above 0 such as 90s, 30m, 2h or 1h30m".to_owned();
    let (mut seconds, mut number) = (0.0, String::new());
    for c in text.chars() {
        let unit = match c {
            '0'..='9' | '.' => {
                number.push(c);
                continue;
            }
            's' => 1.0,
            'm' => 60.0,
            'h' => 3600.0,
            'd' => 86_400.0,
            _ => return Err(wrong()),
        };
        seconds += unit * number.parse::<f64>().map_err(|_| wrong())?;
        number.clear();
    }
    let all = Duration::try_from_secs_f64(seconds).map_err(|_| wrong())?;
    if number.is_empty() && all > Duration::ZERO { Ok(all) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_and_written() {
        for (text, seconds) in
            [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1d", 86_400)]
        {
            assert_eq!(budget(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(budget("0.5m"), Ok(Duration::from_secs(30)));
        for wrong in ["", "2", "h", "2x", "0s", "1h2", "-1h", "1e9d", "99999999999999999999999d"] {
            assert!(budget(wrong).is_err(), "{wrong}");
        }
        assert_eq!([20.0, 180.0, 9000.0].map(time), ["20 s", "3 minutes", "2.5 hours"]);
    }
}

//! Says in sentences how a run went, from its log: each with the figure that it rests on, and none of them needs labels.
//!
//! A sentence is only said where it cannot be wrong by much: that the embeddings lie below any healthy run's spread, or that the loss is
//! no number. What else is measured without labels ([`Quality`](crate::eval::Quality)) is shown as curves: where a curve becomes an
//! alarm has not been measured yet.

use serde::Serialize;
use serde_json::Value;

/// One sentence about a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// Its kind: `collapsed`, `rate_high`.
    pub kind: Kind,
    /// Whether something should be changed.
    pub alarm: bool,
    /// The sentence, with its figure.
    pub sentence: String,
}

/// What a sentence says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Neither collapsed nor diverged.
    Sound,
    /// All embeddings are nearly one.
    Collapsed,
    /// The learning rate is too high, or the loss diverged.
    RateHigh,
    /// The loss still falls.
    Improving,
    /// The loss falls no more.
    Flat,
}

/// Embeddings below this deviation, in units of `1 / sqrt(d)`, have collapsed or are about to: healthy runs stay above it.
const COLLAPSING: f64 = 0.3;

/// What a run's log says, as far as the sentences need it.
#[derive(Clone, Debug, Default)]
pub struct History<'a> {
    /// Step, loss and learning rate; NaN where a value is missing.
    pub steps: &'a [[f64; 3]],
    /// The records of the epochs.
    pub epochs: &'a [Value],
    /// Why the run stopped, if it did.
    pub stopped: Option<&'a str>,
}

impl History<'_> {
    fn all<'a>(&'a self, key: &'a [&'a str]) -> impl DoubleEndedIterator<Item = f64> + 'a {
        let value = move |epoch: &Value| key.iter().fold(epoch, |value, key| &value[*key]).as_f64();
        self.epochs.iter().filter_map(value)
    }

    /// The last measured value.
    fn last(&self, key: &[&str]) -> Option<f64> {
        self.all(key).next_back()
    }

    /// The mean loss over a part of the run, in shares of its steps.
    fn loss(&self, from: f64, to: f64) -> f64 {
        let count = self.steps.len() as f64;
        let part = &self.steps[(from * count) as usize..(to * count) as usize];
        part.iter().map(|row| row[1]).sum::<f64>() / part.len() as f64
    }
}

/// Returns what a run's log shows: alarms first, then whether it is worth going on. Empty before the first epoch's end.
pub fn diagnose(run: &History<'_>) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut alarm = |kind, sentence: String| found.push(Finding { kind, alarm: true, sentence });
    collapse(run, &mut alarm);
    rate(run, &mut alarm);
    if found.is_empty() && !run.epochs.is_empty() {
        found.extend(sound(run));
    }
    if found.iter().all(|finding| !finding.alarm) {
        found.extend(trend(run));
    }
    found
}

fn collapse(run: &History<'_>, alarm: &mut dyn FnMut(Kind, String)) {
    let std = run.last(&["embedding_std"]);
    if let Some(std) = std.filter(|&std| std < COLLAPSING) {
        alarm(
            Kind::Collapsed,
            format!(
                "collapsing: the embeddings of all images are nearly one, their deviation is {std:.3} of 1/sqrt(d), where about 1 is healthy; \
                 lower optim.lr or lengthen optim.warmup_epochs, and check that nothing was taken away that prevents collapse"
            ),
        );
    }
}

fn rate(run: &History<'_>, alarm: &mut dyn FnMut(Kind, String)) {
    let not_finite = run.steps.iter().filter(|row| !row[1].is_finite()).count();
    let diverged = run.stopped.is_some_and(|why| why.contains("diverged"));
    if not_finite > 0 || diverged {
        let seen = match not_finite {
            0 => {
                format!("the loss went from {:.3} to {:.3}", run.loss(0.0, 0.1), run.loss(0.9, 1.0))
            }
            count => format!("the loss of {count} steps is not a number"),
        };
        alarm(
            Kind::RateHigh,
            format!("learning rate too high: {seen}; try a tenth of optim.lr, or selfsup tune-lr"),
        );
    }
}

fn sound(run: &History<'_>) -> Option<Finding> {
    let std = run.last(&["embedding_std"])?;
    let mut sentence = format!(
        "neither collapsed nor diverged: the embeddings are spread (deviation {std:.2} of 1/sqrt(d)"
    );
    if let Some(rank) = run.last(&["quality", "rank_me"]) {
        sentence += &format!(", RankMe {rank:.1}");
    }
    if let Some(matched) = run.last(&["quality", "matched"]) {
        sentence += &format!(", {:.0}% of views matched", 100.0 * matched);
    }
    Some(Finding { kind: Kind::Sound, alarm: false, sentence: sentence + ")" })
}

/// Whether the loss still falls: what it lost in the run's last fifth, as a share of all it lost.
fn trend(run: &History<'_>) -> Option<Finding> {
    if run.steps.len() < 50 {
        return None;
    }
    let (first, before, last) = (run.loss(0.0, 0.1), run.loss(0.6, 0.8), run.loss(0.8, 1.0));
    let share = (before - last) / (first - last);
    if !share.is_finite() || first <= last {
        return None;
    }
    let (kind, rest) = match share > 0.05 {
        true => (Kind::Improving, "the loss still falls"),
        false => (Kind::Flat, "the loss is flat"),
    };
    let sentence = format!(
        "{rest}: the last fifth of the run brought {:.0}% of its fall",
        100.0 * share.max(0.0)
    );
    Some(Finding { kind, alarm: false, sentence })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn epoch(changed: &[(&str, Value)]) -> Value {
        let mut epoch = json!({
            "embedding_std": 0.9, "effective_rank": 40.0, "knn": 0.4, "chance": 0.1, "prototypes_used": null,
            "monitors": { "update_ratio": 0.01 },
            "quality": { "rank_me": 30.0, "matched": 0.5, "matched_by_colour": 0.1, "matched_by_pixels": 0.2 },
        });
        for (key, value) in changed {
            let pointer = format!("/{}", key.replace('.', "/"));
            *epoch.pointer_mut(&pointer).unwrap() = value.clone();
        }
        epoch
    }

    fn kinds(epoch: &Value, steps: &[[f64; 3]]) -> Vec<Kind> {
        let epochs = [epoch.clone(), epoch.clone()];
        let history = History { steps, epochs: &epochs, stopped: None };
        diagnose(&history).into_iter().map(|finding| finding.kind).collect()
    }

    #[test]
    fn each_figure_has_its_sentence() {
        assert_eq!(kinds(&epoch(&[]), &[]), [Kind::Sound]);
        assert_eq!(kinds(&epoch(&[("embedding_std", json!(0.2))]), &[]), [Kind::Collapsed]);
        assert!(diagnose(&History::default()).is_empty());
    }

    #[test]
    fn a_loss_says_whether_it_is_worth_going_on() {
        let falling: Vec<[f64; 3]> =
            (0..100).map(|i| [f64::from(i), 10.0 - 0.05 * f64::from(i), 0.1]).collect();
        let flat: Vec<[f64; 3]> =
            (0..100).map(|i| [f64::from(i), 10.0 / f64::from(1 + i * i), 0.1]).collect();
        assert_eq!(kinds(&epoch(&[]), &falling), [Kind::Sound, Kind::Improving]);
        assert_eq!(kinds(&epoch(&[]), &flat), [Kind::Sound, Kind::Flat]);
        let mut broken = flat;
        broken[70][1] = f64::NAN;
        assert_eq!(kinds(&epoch(&[]), &broken), [Kind::RateHigh]);
    }
}

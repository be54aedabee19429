//! Says in sentences how a run went, from its log: each with the figure that it rests on, and none of them needs labels.
//!
//! `scripts/diagnoses` measures how often the sentences are right, on healthy runs and on planted failures. What is measured without
//! labels ([`Quality`](crate::eval::Quality)) and separates neither is shown as curves only.

use serde::Serialize;
use serde_json::Value;

/// One sentence about a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// Its kind, such as `collapsed`.
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
    /// Views of one image are found by their pixels alone: nothing needs to be learnt.
    AugmentationWeak,
    /// Views of one image are not found: the augmentation leaves nothing in common, or the images have nothing.
    NothingToMatch,
    /// The loss still falls.
    Improving,
    /// The loss falls no more.
    Flat,
}

/// Embeddings below this deviation, in units of `1 / sqrt(d)`, are nearly one: healthy runs were measured above 0.19 (MoCo v1), runs
/// without what prevents collapse below 0.09.
const NARROW: f64 = 0.15;

/// Embeddings below this effective rank and this deviation are on the way there: healthy runs of a low rank have a deviation above 0.7, and
/// those of a low deviation a rank above 14.
const FEW: [f64; 2] = [7.0, 0.5];

/// Features of a lower RankMe use hardly more than a line: healthy runs were measured above 8.
const FLAT: f64 = 4.0;

/// Images that the shares of views and the rank were measured on, and features of the network: with fewer, ranks are low and views are
/// matched in healthy runs, too.
const JUDGED: [usize; 2] = [128, 64];

/// Above this share of views found by pixels alone, nothing needs to be learnt.
const EASY: f64 = 0.9;

/// Below these shares of views matched, by features and by pixels, there is nothing to match: a pair among 256 images is 0.004. By
/// pixels, healthy runs were measured above 0.046, noise and crops of a hundredth of an image below 0.02.
const HARD: [f64; 2] = [0.03, 0.03];

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

    /// The last of the features' measures, if they were measured on enough images and features to be judged.
    fn quality(&self, name: &str) -> Option<f64> {
        let compared =
            &self.epochs.iter().rfind(|epoch| !epoch["quality"].is_null())?["quality"]["compared"];
        let [images, features] = [0, 1].map(|i| compared[i].as_u64().unwrap_or(0) as usize);
        is_judged([images, features]).then(|| self.last(&["quality", name]))?
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
    if found.is_empty() {
        // The views of a collapsed run are not matched, whatever the augmentation.
        views(run, &mut |kind, sentence| found.push(Finding { kind, alarm: true, sentence }));
    }
    if found.is_empty() && !run.epochs.is_empty() {
        found.extend(sound(run));
    }
    if found.iter().all(|finding| !finding.alarm) {
        found.extend(trend(run));
    }
    if found.is_empty() && !run.epochs.is_empty() {
        let sentence =
            "nothing is measured that shows a fault: the run has no embeddings, or too few steps"
                .into();
        found.push(Finding { kind: Kind::Sound, alarm: false, sentence });
    }
    found
}

/// Whether measures of the features of so many images, and so many features, say anything.
pub(super) fn is_judged(compared: [usize; 2]) -> bool {
    compared.iter().zip(JUDGED).all(|(&count, enough)| count >= enough)
}

/// Describes the collapse that embeddings of this spread and features of this RankMe show, if they show one.
pub(super) fn collapsed(std: f64, rank: f64, rank_me: Option<f64>) -> Option<String> {
    if std < NARROW {
        return Some(format!(
            "the embeddings of all images are nearly one, their deviation is {std:.3} of 1/sqrt(d), where about 1 is healthy"
        ));
    }
    if rank < FEW[0] && std < FEW[1] {
        return Some(format!(
            "the embeddings use {rank:.1} directions and their deviation is {std:.2} of 1/sqrt(d)"
        ));
    }
    let rank_me = rank_me.filter(|&rank| rank < FLAT)?;
    Some(format!("the features use {rank_me:.1} directions (RankMe)"))
}

fn collapse(run: &History<'_>, alarm: &mut dyn FnMut(Kind, String)) {
    let spread = run.last(&["embedding_std"]).zip(run.last(&["effective_rank"]));
    let rank_me = run.quality("rank_me");
    let seen = spread.and_then(|(std, rank)| collapsed(std, rank, rank_me));
    // The run's own sentence, up to its advice.
    let own = || run.stopped.filter(|why| why.contains("collapsed"))?.split(';').next();
    if let Some(seen) = seen.or_else(|| own().map(str::to_owned)) {
        alarm(
            Kind::Collapsed,
            format!(
                "collapsing: {seen}; lower optim.lr or lengthen optim.warmup_epochs (selfsup tune-lr finds a rate), \
                 and check that nothing was taken away that prevents collapse"
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

/// Whether the views of an image can be told from those of others, and by what.
fn views(run: &History<'_>, alarm: &mut dyn FnMut(Kind, String)) {
    let shares = (run.quality("matched"), run.quality("matched_by_pixels"));
    let (Some(matched), Some(by_pixels)) = shares else {
        return;
    };
    let percent = |share: f64| format!("{:.0}%", 100.0 * share);
    if by_pixels > EASY {
        let sentence = format!(
            "augmentation too weak: {} of the views are found by their pixels alone, so nothing needs to be learnt; \
             crop smaller areas and jitter colours more",
            percent(by_pixels)
        );
        alarm(Kind::AugmentationWeak, sentence);
    } else if matched < HARD[0] && by_pixels < HARD[1] {
        let sentence = format!(
            "nothing to match: {} of the views are nearest to a view of their own image, by their pixels {}, so views of one image have too \
             little in common; augment less, and look at the images",
            percent(matched),
            percent(by_pixels)
        );
        alarm(Kind::NothingToMatch, sentence);
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
            "quality": { "compared": [256, 64], "rank_me": 30.0, "matched": 0.5, "matched_by_colour": 0.1, "matched_by_pixels": 0.2 },
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
        assert_eq!(kinds(&epoch(&[("embedding_std", json!(0.1))]), &[]), [Kind::Collapsed]);
        // Embeddings of MoCo v1 and of SimCLR v2 in healthy runs, and of runs on their way to a point, a line and a few directions.
        for (std, rank, rank_me, kind) in [
            (0.20, 34.0, 30.0, Kind::Sound),
            (0.77, 6.5, 20.0, Kind::Sound),
            (0.08, 33.0, 13.0, Kind::Collapsed),
            (0.41, 4.9, 13.7, Kind::Collapsed),
            (0.56, 8.2, 1.9, Kind::Collapsed),
        ] {
            let changed = [
                ("embedding_std", json!(std)),
                ("effective_rank", json!(rank)),
                ("quality.rank_me", json!(rank_me)),
            ];
            assert_eq!(kinds(&epoch(&changed), &[]), [kind], "{std} {rank} {rank_me}");
        }
        // Shares matched by features and by pixels.
        for (shares, kind) in [
            ([0.99, 0.99], Kind::AugmentationWeak),
            ([0.01, 0.02], Kind::NothingToMatch),
            ([0.01, 0.07], Kind::Sound), // BYOL at its beginning
            ([0.016, 0.047], Kind::Sound),
        ] {
            let [matched, by_pixels] = shares.map(|share| json!(share));
            let mut changed =
                vec![("quality.matched", matched), ("quality.matched_by_pixels", by_pixels)];
            assert_eq!(kinds(&epoch(&changed), &[]), [kind]);
            changed.push(("embedding_std", json!(0.1)));
            assert_eq!(kinds(&epoch(&changed), &[]), [Kind::Collapsed]); // which explains it
        }
        assert_eq!(kinds(&epoch(&[("quality", Value::Null)]), &[]), [Kind::Sound]);
        // Of ten images, or of a network of 16 features, neither rank nor matches say anything.
        for compared in [json!([10, 64]), json!([256, 16]), Value::Null] {
            let easy = ("quality.matched_by_pixels", json!(0.99));
            let flat = ("quality.rank_me", json!(1.2));
            assert_eq!(
                kinds(&epoch(&[easy, flat, ("quality.compared", compared)]), &[]),
                [Kind::Sound]
            );
        }
        assert!(diagnose(&History::default()).is_empty());
        // A supervised run has no embeddings.
        assert_eq!(kinds(&epoch(&[("embedding_std", Value::Null)]), &[]), [Kind::Sound]);
    }

    #[test]
    fn a_run_that_was_stopped_says_why() {
        let stopped = |why| {
            let epochs = [epoch(&[])];
            let history = History { steps: &[], epochs: &epochs, stopped: Some(why) };
            diagnose(&history).into_iter().map(|finding| finding.kind).collect::<Vec<_>>()
        };
        assert_eq!(
            stopped("the embeddings collapsed in epoch 1: they use 1.20 directions"),
            [Kind::Collapsed]
        );
        assert_eq!(stopped("Ctrl-C"), [Kind::Sound]);
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

//! A learning-rate range probe: short runs of one recipe at several rates, judged by what their features are worth, not by the loss. A
//! loss falls fast while embeddings collapse, too.

use crate::device::Device;
use crate::error::{Error, Result};
use crate::eval::{Quality, Spread};
use crate::recipes::Recipe;
use crate::train::diagnosis::{collapsed, is_judged};
use crate::train::{EpochReport, Run, StepReport, Watch};

/// Rates that are tried, as multiples of the recipe's.
pub const FACTORS: [f64; 7] = [0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0];

/// The most training and held-out images of a probe.
const IMAGES: [usize; 2] = [4096, 1000];

/// A rate is as good as the best if its figure reaches this share of it: then the largest of them learns fastest.
const AS_GOOD: f64 = 0.97;

/// A short run at one rate.
#[derive(Clone, Debug)]
pub struct Tried {
    /// `optim.lr`.
    pub lr: f64,
    /// Mean loss of the last epoch.
    pub loss: f64,
    /// kNN accuracy on the images of `data.validation`, without these on held-out ones, in `0..=1`, if there are labels.
    pub knn: Option<f64>,
    /// Spread of the last embeddings.
    pub spread: Option<Spread>,
    /// What the features are worth without labels.
    pub quality: Option<Quality>,
    /// What went wrong, if something did.
    pub failed: Option<String>,
}

/// The recommended rate, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Advice {
    /// `optim.lr`; `None` if no rate trains.
    pub lr: Option<f64>,
    /// The reason.
    pub why: String,
}

impl Tried {
    fn is_sound(&self) -> bool {
        let judged = self.quality.as_ref().filter(|quality| is_judged(quality.compared));
        let rank_me = judged.map(|quality| quality.rank_me);
        let collapsed = |spread: Spread| collapsed(spread.std, spread.effective_rank, rank_me);
        self.failed.is_none() && self.spread.and_then(collapsed).is_none()
    }

    /// What rates are compared by: accuracy, or else LiDAR.
    pub fn figure(&self) -> Option<f64> {
        self.knn.or_else(|| Some(self.quality.as_ref()?.lidar)).filter(|figure| figure.is_finite())
    }
}

/// Trains about `steps` steps of a recipe at each of [`FACTORS`] times its rate, each a complete short run with warm-up and decay, and
/// calls `tell` after each.
///
/// # Errors
/// If the recipe's rate is 0, if recipe, data and device do not fit together, or the data cannot be read. A rate that diverges or collapses is a result.
pub fn tune(
    recipe: &Recipe,
    device: &Device,
    steps: u64,
    tell: &mut dyn FnMut(&Tried),
) -> Result<Vec<Tried>> {
    if recipe.optim.lr == 0.0 {
        return Err(Error::config("optim.lr is 0, and so are its multiples: give a rate above 0"));
    }
    let mut short = recipe.clone();
    let at_most = |limit: &mut usize, most: usize| {
        *limit = if *limit == 0 { most } else { (*limit).min(most) };
    };
    at_most(&mut short.data.limit, IMAGES[0].max(2 * recipe.train.batch));
    at_most(&mut short.data.test_limit, IMAGES[1]);
    short.train.knn_every = 0;
    let images = crate::train::Images::open(&short.data)?.train.len();
    let per_epoch = (images / short.train.batch).max(1) as u64;
    short.train.epochs = steps.div_ceil(per_epoch).max(1) as u32;
    short.optim.warmup_epochs = f64::from(short.train.epochs) / 10.0;
    FACTORS
        .iter()
        .map(|factor| {
            let mut recipe = short.clone();
            recipe.optim.lr = rounded(factor * recipe.optim.lr);
            let tried = one(&recipe, device)?;
            tell(&tried);
            Ok(tried)
        })
        .collect()
}

/// Two digits: a rate is not known better.
fn rounded(lr: f64) -> f64 {
    format!("{lr:.1e}").parse().unwrap_or(lr)
}

fn one(recipe: &Recipe, device: &Device) -> Result<Tried> {
    let mut run = Run::new(recipe, device, None)?;
    let mut last = Last::default();
    let failed = match run.train(&mut last) {
        Ok(()) => None,
        Err(Error::Diverged(_)) => Some("diverged".to_owned()),
        Err(Error::Collapsed(_)) => Some("collapsed".into()),
        Err(error) => return Err(error),
    };
    let Last { loss, report } = last;
    let report = report.as_ref();
    Ok(Tried {
        lr: recipe.optim.lr,
        loss: report.map_or(loss, |report| report.loss),
        knn: report.and_then(|report| report.validation.or(report.knn)),
        spread: report.and_then(|report| report.spread),
        quality: report.and_then(|report| report.quality.clone()),
        failed,
    })
}

/// Keeps the last report.
#[derive(Default)]
struct Last {
    loss: f64,
    report: Option<EpochReport>,
}

impl Watch for Last {
    fn step(&mut self, report: &StepReport) {
        self.loss = report.loss;
    }

    fn epoch(&mut self, report: &EpochReport) {
        self.report = Some(report.clone());
    }

    fn note(&mut self, _: &str) {}
}

/// Recommends a rate: the largest whose figure is about the best, among those whose embeddings are spread.
pub fn advise(tried: &[Tried]) -> Advice {
    let sound: Vec<&Tried> = tried.iter().filter(|tried| tried.is_sound()).collect();
    let best = sound.iter().filter_map(|tried| tried.figure()).reduce(f64::max);
    let chosen = best.and_then(|best| {
        let good = |tried: &&&Tried| tried.figure().is_some_and(|figure| figure >= AS_GOOD * best);
        sound.iter().rfind(good)
    });
    let Some(chosen) = chosen else {
        return Advice {
            lr: None,
            why: "at none of these rates are the embeddings spread: the cause is not the rate; look at the method's settings and the augmentation".into(),
        };
    };
    let by = match (chosen.knn, &chosen.quality) {
        (Some(knn), _) => format!("kNN {:.1}%", 100.0 * knn),
        (None, Some(quality)) => format!("LiDAR {:.1}", quality.lidar),
        (None, None) => "nothing measured".into(),
    };
    let spread =
        chosen.spread.map_or(String::new(), |s| format!(", embeddings spread at {:.2}", s.std));
    let mut why = format!("the largest rate whose features are about the best ({by}{spread})");
    let lowest_loss = tried
        .iter()
        .filter(|tried| tried.failed.is_none())
        .min_by(|a, b| a.loss.total_cmp(&b.loss));
    if let Some(lowest) = lowest_loss.filter(|lowest| lowest.lr != chosen.lr) {
        why += &format!(
            "; the lowest loss, {:.3} at {}, is not the best here",
            lowest.loss, lowest.lr
        );
    }
    let edges = [tried.first(), tried.last()];
    if edges.into_iter().flatten().any(|edge| edge.lr == chosen.lr) {
        why += "; it is at the edge of what was tried: set optim.lr to it and try again";
    }
    Advice { lr: Some(chosen.lr), why }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tried(lr: f64, loss: f64, knn: f64, std: f64) -> Tried {
        let spread = Some(Spread { std, effective_rank: 20.0, uniformity: -2.0 });
        Tried { lr, loss, knn: Some(knn), spread, quality: None, failed: None }
    }

    #[test]
    fn a_rate_is_recommended_by_features_and_not_by_the_loss() {
        let mut all = vec![
            tried(0.01, 5.0, 0.30, 0.9),
            tried(0.03, 4.5, 0.40, 0.9),
            tried(0.1, 4.0, 0.395, 0.9),
            tried(0.3, 1.0, 0.45, 0.1), // collapsing: the lowest loss, and a figure that is luck
            Tried { failed: Some("diverged".into()), ..tried(1.0, 9.0, 0.5, 0.9) },
        ];
        let advice = advise(&all);
        assert_eq!(advice.lr, Some(0.1));
        assert!(
            advice.why.contains("the lowest loss, 1.000 at 0.3, is not the best here"),
            "{advice:?}"
        );
        assert!(!advice.why.contains("edge"));
        all.truncate(3);
        assert!(advise(&all).why.contains("edge"));
        all.iter_mut().for_each(|tried| tried.spread.as_mut().unwrap().std = 0.0);
        assert_eq!(advise(&all).lr, None);
        assert_eq!(rounded(0.4 * 0.3), 0.12);
    }
}

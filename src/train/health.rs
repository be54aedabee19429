//! Recognises runs whose numbers went wrong: collapsed embeddings and diverged losses.

use crate::eval::Spread;
use crate::recipes::WatchSettings;

/// Describes the collapse that an epoch's embeddings or assignments show, if they show one.
pub(super) fn collapse(
    watch: &WatchSettings,
    spread: Option<Spread>,
    prototypes_used: Option<f64>,
) -> Option<String> {
    if let Some(Spread { std, effective_rank, .. }) = spread {
        if std < watch.collapsed_std {
            return Some(format!(
                "their deviation is {std:.4} of 1/sqrt(d), where a healthy run has about 1"
            ));
        }
        if effective_rank < watch.collapsed_rank {
            return Some(format!(
                "they use {effective_rank:.2} directions, so all lie on one line"
            ));
        }
    }
    let used = prototypes_used.filter(|&used| used < watch.collapsed_prototypes)?;
    Some(format!("images are assigned to {used:.2} prototypes, so all to one"))
}

/// Describes the divergence that an epoch's mean loss shows next to the run's first loss, if it shows one. `chance` is the loss of
/// embeddings that know nothing ([`Method::chance_loss`](crate::methods::Method::chance_loss)), which a healthy run may come near.
pub(super) fn divergence(
    watch: &WatchSettings,
    first: Option<f64>,
    chance: f64,
    loss: f64,
) -> Option<String> {
    let first = first.filter(|first| first.is_finite() && watch.diverged > 0.0)?;
    let limit = watch.diverged * first.abs().max(chance).max(1.0);
    (loss > limit)
        .then(|| format!("its mean loss is {loss:.3}, after {first:.3} in the first step"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_come_from_the_recipe() {
        let watch = WatchSettings::default();
        let spread = |std, effective_rank| Some(Spread { std, effective_rank, uniformity: 0.0 });
        assert_eq!(collapse(&watch, spread(0.3, 2.0), Some(9.0)), None);
        assert!(collapse(&watch, spread(0.04, 2.0), None).unwrap().contains("deviation is 0.0400"));
        assert!(collapse(&watch, spread(0.9, 1.2), None).unwrap().contains("1.20 directions"));
        assert!(collapse(&watch, None, Some(1.4)).unwrap().contains("1.40 prototypes"));
        assert!(divergence(&watch, Some(4.0), 0.0, 41.0).unwrap().contains("41.000, after 4.000"));
        // Losses below 1 in size, negative ones included, are compared with 1.
        assert!(divergence(&watch, Some(-0.9), 0.0, 9.9).is_none());
        assert!(divergence(&watch, Some(-0.9), 0.0, 10.1).is_some());
        // MoCo's first loss is small, as all keys are random, and comes near that of chance before it falls.
        assert!(divergence(&watch, Some(0.8), 15.2, 12.5).is_none());
        assert!(divergence(&watch, Some(0.8), 15.2, 153.0).is_some());
        let never = WatchSettings { diverged: 0.0, collapsed_std: 0.0, ..watch };
        assert_eq!(divergence(&never, Some(4.0), 0.0, 1e9), None);
        assert_eq!(collapse(&never, spread(0.0, 2.0), None), None);
    }
}

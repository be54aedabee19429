//! What no recipe may say: settings that are out of range or do not fit one another.

use super::{Recipe, Source};
use crate::data::Policy;
use crate::error::{Error, Result};
use crate::optim::Decay;

/// The most threads that are accepted: more than any machine's cores, fewer than an operating system refuses.
pub(crate) const MOST_THREADS: usize = 1024;

/// The most epochs of warm-up: more are a slip of the keyboard.
const MOST_EPOCHS: f64 = 1e6;

impl Recipe {
    pub(super) fn check(&self) -> Result<()> {
        self.source.as_ref().map_or(Ok(()), Source::check)?;
        self.network.check()?;
        let positive = |value: f64, key: &str| {
            if value.is_finite() && value >= 0.0 {
                Ok(())
            } else {
                Err(Error::config(format!("{key} is {value}; it must be 0 or more")))
            }
        };
        if self.train.init.as_deref().is_some_and(|file| file.trim().is_empty()) {
            let reason = "train.init is empty: name a file of weights, or leave it out";
            return Err(Error::config(reason));
        }
        self.data.gpu_bytes()?;
        let limited = |value: f64, most: f64, key: &str| match value > most {
            true => Err(Error::config(format!("{key} is {value:e}; it must be at most {most:e}"))),
            false => positive(value, key),
        };
        limited(self.optim.lr, f64::from(f32::MAX), "optim.lr")?;
        limited(self.optim.warmup_epochs, MOST_EPOCHS, "optim.warmup_epochs")?;
        self.optim.rule.check()?;
        let most = f64::from(f32::MAX);
        limited(self.optim.warmup_from.unwrap_or(0.0), most, "optim.warmup_from")?;
        limited(self.optim.end_lr, most, "optim.end_lr")?;
        if let Decay::Steps { factor, .. } = self.optim.decay {
            limited(factor, 1.0, "optim.decay.steps.factor")?;
        }
        positive(self.train.checkpoint_every_minutes, "train.checkpoint_every_minutes")?;
        for (share, key) in
            [(self.data.max_skipped, "data.max_skipped"), (self.data.validation, "data.validation")]
        {
            if !(0.0..=1.0).contains(&share) {
                return Err(Error::Config(format!(
                    "{key} is {share}; it must be a share between 0 and 1"
                )));
            }
        }
        positive(self.watch.collapsed_std, "watch.collapsed_std")?;
        positive(self.watch.collapsed_rank, "watch.collapsed_rank")?;
        positive(self.watch.collapsed_rank_me, "watch.collapsed_rank_me")?;
        positive(self.watch.collapsed_prototypes, "watch.collapsed_prototypes")?;
        positive(self.watch.diverged, "watch.diverged")?;
        let most = [
            (self.train.threads, "train.threads"),
            (self.train.loader_threads, "train.loader_threads"),
        ];
        for (value, key) in most {
            if value > MOST_THREADS {
                return Err(Error::config(format!(
                    "{key} is {value}; it must be at most {MOST_THREADS}"
                )));
            }
        }
        for (value, key) in [
            (self.train.epochs as usize, "train.epochs"),
            (self.train.keep, "train.keep"),
            (self.augment.len(), "the number of [[augment]] tables"),
        ] {
            if value == 0 {
                return Err(Error::config(format!("{key} must be at least 1")));
            }
        }
        if self.train.batch < 2 {
            return Err(Error::config(
                "train.batch must be at least 2: a single image has nothing to be compared with",
            ));
        }
        let (groups, parts) = (self.network.norm_groups, self.train.micro_batches.max(1));
        if !(self.train.batch / parts).is_multiple_of(groups) {
            return Err(Error::Config(format!(
                "network.norm_groups is {groups}, which does not divide the {} images that batch norm sees: change train.batch",
                self.train.batch / parts
            )));
        }
        let reading = self.data.reading();
        reading.check()?;
        self.augment.iter().try_for_each(Policy::check)?;
        self.augment.iter().try_for_each(|policy| policy.check_for(reading.format))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(settings: &[&str]) -> String {
        let settings: Vec<String> = settings.iter().map(|s| s.to_string()).collect();
        Recipe::load("demo", &settings).unwrap_err().to_string()
    }

    #[test]
    fn mistakes_name_the_key_and_the_nearest_one() {
        assert!(message(&["train.epoch=3"]).contains("(did you mean `epochs`?)"));
        assert!(message(&["train.epochs=many"]).contains("invalid type: string \"many\""));
        assert!(message(&["train.epochs"]).contains("--set takes key.path=value"));
        assert!(message(&["train.batch=1"]).contains("train.batch must be at least 2"));
        assert!(message(&["network.norm_groups=3"]).contains("network.norm_groups is 3"));
        assert!(message(&["network.depth=20"]).contains("network.depth is 20"));
        let missing = Recipe::load("simclr-cifar", &[]).unwrap_err().to_string();
        assert!(missing.contains("no recipe file or built-in recipe simclr-cifar;"), "{missing}");
        let recipe = Recipe::load("demo", &["method.temprature=1".into()]).unwrap();
        let error = recipe.build_method().err().unwrap().to_string();
        assert!(error.contains("(did you mean `temperature`?)"), "{error}");
    }

    #[test]
    fn a_deep_key_an_absurd_count_and_a_wrong_share_are_refused_by_name() {
        let deep = format!("{}=1", vec!["a"; 100_000].join("."));
        let error = message(&[&deep]);
        assert!(error.contains("the key has 100000 parts"), "{error}");
        assert!(error.len() < 200, "{} characters", error.len());
        for key in ["train.threads", "train.loader_threads"] {
            let expected = format!("{key} is 1000000; it must be at most 1024");
            assert_eq!(message(&[&format!("{key}=1000000")]), expected);
        }
        assert!(message(&["data.max_skipped=2"]).starts_with("data.max_skipped is 2; it must be"));
    }
}

//! Shows a run's progress: a bar on a terminal, plain lines otherwise.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::train::{EpochReport, StepReport, Watch};

/// The shortest time between two plain lines.
const PLAIN_EVERY: Duration = Duration::from_secs(10);

pub(super) struct Progress {
    bar: Option<ProgressBar>,
    last: Instant,
}

impl Progress {
    pub(super) fn new(total: u64) -> Self {
        let style = "{elapsed_precise} [{bar:30}] {pos}/{len} steps, {eta} left, {msg}";
        let bar = super::on_terminal().then(|| {
            let style = ProgressStyle::with_template(style).expect("the template is well formed");
            ProgressBar::new(total).with_style(style.progress_chars("=> "))
        });
        Self { bar, last: Instant::now() }
    }

    fn line(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(super::printable(line)),
            None => super::talk(line),
        }
    }
}

impl Watch for Progress {
    fn step(&mut self, report: &StepReport) {
        let StepReport { step, total, loss, lr, views_per_second } = *report;
        let message = format!("loss {loss:.3}, lr {lr:.4}, {views_per_second:.0} views/s");
        match &self.bar {
            Some(bar) => {
                bar.set_position(step);
                bar.set_message(message);
            }
            None if self.last.elapsed() >= PLAIN_EVERY => {
                super::talk(&format!("step {step}/{total}: {message}"));
                self.last = Instant::now();
            }
            None => {}
        }
    }

    fn epoch(&mut self, report: &EpochReport) {
        let EpochReport { epoch, epochs, loss, views_per_second, .. } = *report;
        let mut line = format!("epoch {epoch}/{epochs}: loss {loss:.3}");
        if views_per_second.is_finite() {
            line += &format!(", {views_per_second:.0} views/s");
        }
        if let Some(spread) = report.spread {
            line += &format!(
                ", embedding std {:.2}/sqrt(d), effective rank {:.1}",
                spread.std, spread.effective_rank
            );
        }
        if let Some(quality) = &report.quality {
            line += &format!(", RankMe {:.1}, LiDAR {:.1}", quality.rank_me, quality.lidar);
        }
        if let Some(knn) = report.knn {
            line += &format!(", kNN {:.1}%", 100.0 * knn);
        }
        if let Some(validation) = report.validation {
            line += &format!(", validation kNN {:.1}%", 100.0 * validation);
        }
        if let Some(accuracy) = report.accuracy {
            line += &format!(", top-1 {:.1}%", 100.0 * accuracy);
        }
        self.line(&line);
        if let Some(bar) = self.bar.as_ref().filter(|_| epoch == epochs) {
            bar.finish_and_clear(); // the printed lines stay; results follow
        }
    }

    fn note(&mut self, sentence: &str) {
        self.line(sentence);
    }
}

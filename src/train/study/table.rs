//! The tables of a study: a row for each arm in Markdown, one for each run as comma-separated values.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::{Arm, Outcome, Study};

impl Study {
    /// A sentence for each column that no run has a number for.
    pub(super) fn unmeasured(&self, outcomes: &[Outcome]) -> Vec<String> {
        let completed: Vec<_> = outcomes.iter().filter(|o| o.stopped.is_none()).collect();
        let known: BTreeSet<&str> = completed
            .iter()
            .flat_map(|outcome| outcome.values.keys().map(String::as_str))
            .collect();
        let missing = |column: &&String| !completed.is_empty() && !known.contains(column.as_str());
        let all = known.iter().copied().collect::<Vec<_>>().join(", ");
        let sentence = |column: &String| {
            format!(
                "the column {column} is empty: no run of this study has such a number; they have {all}"
            )
        };
        self.columns.iter().filter(missing).map(sentence).collect()
    }

    /// The rows of the arms: the name, a cell for each column, and what became of seeds without a usable result.
    ///
    /// A cell is over the seeds that completed: the numbers of a run that stopped are not comparable with them.
    fn rows(&self, outcomes: &[Outcome]) -> Vec<Vec<String>> {
        let row = |arm: &Arm| {
            let own: Vec<&Outcome> = outcomes.iter().filter(|o| o.arm == arm.name).collect();
            let completed: Vec<&&Outcome> = own.iter().filter(|o| o.stopped.is_none()).collect();
            let cell = |column: &String| {
                let values: Vec<f64> =
                    completed.iter().filter_map(|o| o.values.get(column).copied()).collect();
                let cell = mean_and_deviation(column, &values);
                match values.len() {
                    0 => cell,
                    n if n == completed.len() => cell,
                    n => format!("{cell} ({n} of {})", completed.len()),
                }
            };
            let mut cells = vec![arm.name.clone()];
            cells.extend(self.columns.iter().map(cell));
            cells.push(stops(&own));
            (!own.is_empty()).then_some(cells)
        };
        self.arms.iter().filter_map(row).collect()
    }

    fn header(&self) -> Vec<String> {
        let mut header = vec!["arm".to_owned()];
        header.extend(self.columns.iter().map(|column| column.replace('_', " ")));
        header.push("stopped".into());
        header
    }

    /// Returns the table in Markdown with aligned columns, under the question and its source.
    pub fn markdown(&self, outcomes: &[Outcome]) -> String {
        // A bar would end the cell.
        let cell = |cell: String| cell.replace('|', "\\|");
        let lines = std::iter::once(self.header()).chain(self.rows(outcomes));
        let mut lines: Vec<Vec<String>> =
            lines.map(|line| line.into_iter().map(cell).collect()).collect();
        let width = |column: usize| {
            lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
        lines.insert(1, widths.iter().map(|&width| "-".repeat(width)).collect());
        let mut text = format!("{} ({})\n\n", self.question, self.source);
        for line in lines {
            let cells = line.iter().zip(&widths).map(|(cell, &width)| format!(" {cell:<width$} |"));
            let _ = writeln!(text, "|{}", cells.collect::<String>()); // a String does not fail
        }
        text
    }

    pub(super) fn csv(&self, outcomes: &[Outcome]) -> String {
        // RFC 4180: quotes are doubled.
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        let mut text = format!("arm,seed,{},stopped\n", self.columns.join(","));
        for outcome in outcomes {
            let Outcome { arm, seed, stopped, values, .. } = outcome;
            let value =
                |column| values.get(column).map_or(String::new(), |value| format!("{value}"));
            let cells = self.columns.iter().map(value).collect::<Vec<_>>().join(",");
            let stopped = stopped.as_deref().unwrap_or_default();
            let (arm, stopped) = (quoted(arm), quoted(stopped));
            let _ = writeln!(text, "{arm},{seed},{cells},{stopped}"); // a String does not fail
        }
        text
    }
}

/// Says how many of an arm's runs stopped, and why; empty if none did.
fn stops(own: &[&Outcome]) -> String {
    let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
    for reason in own.iter().filter_map(|outcome| outcome.stopped.as_deref()) {
        *reasons.entry(reason).or_default() += 1;
    }
    let all = own.len();
    let part = |(reason, count): (&str, usize)| match all {
        1 => reason.to_owned(),
        _ => format!("{count} of {all} seeds: {reason}"),
    };
    reasons.into_iter().map(part).collect::<Vec<_>>().join("; ")
}

/// Formats the mean: shares in percent, small numbers to three decimals; for several values with their standard deviation.
fn mean_and_deviation(column: &str, values: &[f64]) -> String {
    let Some(n) = (!values.is_empty()).then_some(values.len() as f64) else { return "-".into() };
    let mean = values.iter().sum::<f64>() / n;
    let percent = matches!(column, "knn" | "accuracy");
    let show = |value: f64| match value.abs() {
        _ if percent => format!("{:.1}", 100.0 * value),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    };
    if values.len() < 2 {
        return show(mean);
    }
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    format!("{} ± {}", show(mean), show(variance.sqrt()))
}

#[cfg(test)]
mod tests {
    use super::super::outcome::tests::outcome;
    use super::super::tests::TWO;
    use super::*;

    #[test]
    fn means_are_over_the_seeds_that_completed_and_the_others_are_counted() {
        let study: Study = toml::from_str(TWO).unwrap();
        study.check("two").unwrap();
        let nan = Some("the loss is NaN or infinite");
        let outcomes = [
            outcome("a", 1, 0.5, None),
            outcome("a", 2, 0.1, nan),
            outcome("a", 3, 0.6, None),
            outcome("a", 4, 0.1, nan),
            outcome("b, longer", 1, 0.1, Some("the embeddings collapsed in epoch 2")),
        ];
        let table = study.markdown(&outcomes);
        let row = "| a         | 55.0 ± 7.1 | -    | 2 of 4 seeds: the loss is NaN or infinite |";
        assert!(table.contains(row), "{table}");
        assert!(table.contains("| b, longer | -          | -    | the embeddings coll"), "{table}");
        // The numbers of each run are in the other table.
        let csv = study.csv(&outcomes);
        assert!(csv.contains("\n\"b, longer\",1,0.1,,\"the embeddings"), "{csv}");
    }

    #[test]
    fn names_cannot_shift_the_columns_of_a_table() {
        let name = "5\", a|b";
        let text = TWO.replace("name = \"a\"", "name = '5\", a|b'").replace("after = \"a\"", "");
        let study: Study = toml::from_str(&text).unwrap();
        study.check("two").unwrap();
        let outcomes = [outcome(name, 1, 0.5, None)];
        let table = study.markdown(&outcomes);
        assert!(table.contains("| 5\", a\\|b | 50.0 | -    |         |"), "{table}");
        let csv = study.csv(&outcomes);
        assert!(csv.contains("\n\"5\"\", a|b\",1,0.5,,\"\"\n"), "{csv}");
        let row = csv::ReaderBuilder::new().from_reader(csv.as_bytes()).records().next();
        assert_eq!(&row.unwrap().unwrap()[0], name);
    }

    #[test]
    fn a_column_that_no_run_measured_is_named() {
        let study: Study = toml::from_str(TWO).unwrap();
        let said = study.unmeasured(&[outcome("a", 1, 0.5, None)]);
        assert_eq!(
            said,
            ["the column loss is empty: no run of this study has such a number; they have knn"]
        );
        assert!(study.unmeasured(&[outcome("a", 1, 0.5, Some("collapsed"))]).is_empty());
    }

    #[test]
    fn a_mean_over_some_of_the_seeds_says_so() {
        let study: Study = toml::from_str(TWO).unwrap();
        let mut outcomes = [1, 2, 3].map(|seed| outcome("a", seed, 0.5, None));
        outcomes[1].values.clear();
        let table = study.markdown(&outcomes);
        assert!(table.contains("| 50.0 ± 0.0 (2 of 3) |"), "{table}");
    }
}

//! `selfsup bench --against`: beside reference libraries, or beside an earlier result.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::bench::{BenchArgs, Table, microseconds, name_of};
use super::{say, talk};
use crate::bench::{Bench, Beside, Case, Distance, Peers};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::DType;

/// What a run compares with.
pub(super) enum Against {
    Libraries(Peers, Limit),
    Earlier(Vec<Earlier>, Limit),
}

/// The lowest ratio that passes.
#[derive(Clone, Copy)]
pub(super) struct Limit(Option<f64>);

/// The cases of an earlier run.
pub(super) struct Earlier {
    file: PathBuf,
    rows: Vec<Value>,
}

/// A ratio of speeds and its relative noise.
struct Row<'c> {
    case: &'c Case,
    ratio: f64,
    noise: f64,
}

impl Against {
    /// Opens what `--against` names, if anything.
    pub(super) fn open(
        names: &[String],
        fail_below: Option<f64>,
        device: &Device,
    ) -> Result<Option<Self>> {
        if let Some(limit) = fail_below
            && !(limit > 0.0 && limit.is_finite())
        {
            return Err(Error::Config(format!("--fail-below {limit}: must be above 0")));
        }
        let limit = Limit(fail_below);
        let is_file = |name: &str| !name.contains('=') && name.ends_with(".json");
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        match names.iter().filter(|name| is_file(name)).count() {
            _ if names.is_empty() => Ok(None),
            0 => Ok(Some(Self::Libraries(Peers::open(&names, device)?, limit))),
            count if count == names.len() => {
                let earlier = names.iter().map(|name| Earlier::read(Path::new(name)));
                Ok(Some(Self::Earlier(earlier.collect::<Result<_>>()?, limit)))
            }
            _ => Err(Error::config(
                "--against: compare with libraries or with earlier results, not with both at once",
            )),
        }
    }

    pub(super) fn run(
        &self,
        args: &BenchArgs,
        bench: &mut Bench,
        device: &Device,
        cases: &[Case],
        budget: Duration,
    ) -> Result<()> {
        match self {
            Self::Libraries(peers, limit) => {
                limit.check(libraries(args, bench, peers, cases, budget)?)
            }
            Self::Earlier(earlier, limit) => {
                let dtype = name_of(DType::of_activations(device));
                let mut rows = Vec::new();
                for earlier in earlier {
                    rows.extend(earlier.compare(args, bench, device, cases, dtype)?);
                }
                limit.check(rows)
            }
        }
    }
}

fn libraries<'c>(
    args: &BenchArgs,
    bench: &Bench,
    peers: &Peers,
    cases: &'c [Case],
    budget: Duration,
) -> Result<Vec<Row<'c>>> {
    let names: Vec<&str> = peers.names().collect();
    talk(&format!(
        "beside {}: the least times of three turns each, the median of the turns' ratios (above 1: faster than the peer), errors \
         against f64 as shares of the largest magnitude and of the L2 norm",
        names.join(" and ")
    ));
    let mut table = Table::new(
        args.markdown,
        &[
            "case",
            "peer",
            "ours us",
            "peer us",
            "ratio",
            "+-",
            "share of roofline",
            "error",
            "peer's error",
        ],
    );
    let mut rows = Vec::new();
    let mut logs: Vec<(&str, Vec<f64>)> = names.iter().map(|name| (*name, Vec::new())).collect();
    for case in cases {
        for (compared, (_, logs)) in peers.compare(case, budget)?.into_iter().zip(&mut logs) {
            let peer = compared.peer;
            let beside = match compared.outcome {
                Ok(beside) => beside,
                Err(lack) if args.json => {
                    say(&json!({ "case": case.name, "peer": peer, "lacks": lack }).to_string())?;
                    continue;
                }
                Err(lack) => {
                    let [a, b, c, d, e, f] = [const { String::new() }; 6];
                    table.row([case.name.clone(), lack, a, b, c, d, e, f, String::new()])?;
                    continue;
                }
            };
            let Beside { ours, theirs, ratio, noise, errors } = beside;
            logs.push(ratio.ln());
            rows.push(Row { case, ratio, noise });
            let share = bench.share(&case.work, case.unit, ours);
            if args.json {
                let [own, their] = errors.map(|e| json!({ "max": e.max, "l2": e.l2 }));
                say(&json!({
                    "case": case.name, "count": case.count, "peer": peer, "ours": ours, "theirs": theirs,
                    "ratio": ratio, "noise": noise, "share": share, "error": own, "peer_error": their,
                })
                .to_string())?;
                continue;
            }
            let [own, their] = errors.map(shown);
            table.row([
                case.name.clone(),
                peer,
                microseconds(ours),
                microseconds(theirs),
                format!("{ratio:.2}"),
                format!("{noise:.2}"),
                format!("{share:.2}"),
                own,
                their,
            ])?;
        }
    }
    table.end()?;
    for (name, logs) in logs.iter().filter(|(_, logs)| !logs.is_empty()) {
        let mean = (logs.iter().sum::<f64>() / logs.len() as f64).exp();
        let worst = logs.iter().copied().fold(f64::MAX, f64::min).exp();
        let line = format!(
            "{name}: speed ratio over {} cases (geometric mean, worst): {mean:.2} {worst:.2}",
            logs.len()
        );
        if args.json { talk(&line) } else { say(&format!("\n{line}"))? }
    }
    Ok(rows)
}

fn shown(error: Distance) -> String {
    format!("{:.1e} {:.1e}", error.max, error.l2)
}

impl Earlier {
    fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).map_err(Error::io(file))?;
        let mut rows = Vec::new();
        for (i, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            let row: Option<Value> = serde_json::from_str(line).ok();
            let whole = |row: &Value| {
                let times = row["hot"]
                    .as_array()
                    .map_or(0, |hot| hot.iter().filter(|t| t.is_f64()).count());
                row["case"].is_string() && row["dtype"].is_string() && times == 3
            };
            rows.push(row.filter(whole).ok_or_else(|| {
                Error::format(
                    file,
                    format!(
                        "line {} is no result of `selfsup bench --json` without --against",
                        i + 1
                    ),
                )
            })?);
        }
        Ok(Self { file: file.to_owned(), rows })
    }

    /// Measures every case that the file has, too.
    fn compare<'c>(
        &self,
        args: &BenchArgs,
        bench: &mut Bench,
        device: &Device,
        cases: &'c [Case],
        dtype: &str,
    ) -> Result<Vec<Row<'c>>> {
        let from = |row: &Value| row["device"].as_str().unwrap_or("an unnamed device").to_owned();
        let then: std::collections::BTreeSet<String> = self.rows.iter().map(from).collect();
        let then = then.into_iter().collect::<Vec<_>>().join("; ");
        talk(&format!(
            "beside {}, measured on {then}: the ratio of medians with warm caches (above 1: faster now), and the noise of both",
            self.file.display()
        ));
        let mut table = Table::new(
            args.markdown,
            &["case", "now us", "then us", "ratio", "+-", "share of roofline"],
        );
        let mut rows = Vec::new();
        for case in cases {
            let same = |row: &&Value| row["case"] == *case.name && row["dtype"] == *dtype;
            let Some(row) = self.rows.iter().find(same) else {
                if !args.json {
                    let [a, b, c, d] = [const { String::new() }; 4];
                    table.row([case.name.clone(), "not in the file".into(), a, b, c, d])?;
                }
                continue;
            };
            let [low, then, high] = [0, 1, 2].map(|i| row["hot"][i].as_f64().unwrap_or(f64::NAN));
            let now = bench.measure(case.prepare(device))?.hot;
            let ratio = then / now.median;
            // Half of each side's spread, added: the two runs are independent.
            let noise = ((high - low) / then + (now.high - now.low) / now.median) / 2.0;
            let share = bench.share(&case.work, case.unit, now.median);
            rows.push(Row { case, ratio, noise });
            if args.json {
                say(&json!({
                    "case": case.name, "against": self.file, "now": now.median, "then": then, "ratio": ratio,
                    "noise": noise, "share": share,
                })
                .to_string())?;
                continue;
            }
            table.row([
                case.name.clone(),
                microseconds(now.median),
                microseconds(then),
                format!("{ratio:.2}"),
                format!("{noise:.2}"),
                format!("{share:.2}"),
            ])?;
        }
        table.end()?;
        if rows.is_empty() {
            return Err(Error::format(
                &self.file,
                format!(
                    "has none of these cases in {dtype}: it was measured with another filter, size or precision"
                ),
            ));
        }
        Ok(rows)
    }
}

impl Limit {
    /// Fails if a case is slower than the limit even where its noise is counted in its favour.
    fn check(self, rows: Vec<Row<'_>>) -> Result<()> {
        let Some(limit) = self.0 else { return Ok(()) };
        let slow: Vec<String> = rows
            .iter()
            .filter(|row| row.ratio * (1.0 + row.noise) < limit || row.ratio.is_nan())
            .map(|row| format!("{} ({:.2})", row.case.name, row.ratio))
            .collect();
        if slow.is_empty() {
            return Ok(());
        }
        Err(Error::Device(format!(
            "{} of {} cases are below {limit}: {}",
            slow.len(),
            rows.len(),
            slow.join(", ")
        )))
    }
}

//! The report of a self-test: a table and one verdict, to read and to paste into a bug report.

use std::time::Instant;

use serde_json::json;

use crate::bench;
use crate::device::{Device, DeviceKind};

/// The result of one part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Right, with a figure.
    Right(String),
    /// Wrong, with sentences that say what is.
    Wrong(Vec<String>),
    /// Does not apply to this device, with the reason.
    NotHere(String),
}

impl Verdict {
    /// Right with this figure if nothing is wrong.
    pub(super) fn of(figure: String, wrong: Vec<String>) -> Self {
        if wrong.is_empty() { Self::Right(figure) } else { Self::Wrong(wrong) }
    }
}

/// One part of a self-test.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its name.
    pub name: String,
    /// Its result.
    pub verdict: Verdict,
    /// Seconds that it took.
    pub seconds: f64,
}

/// More complaints of a part are counted and not printed: a broken instruction makes thousands.
const MOST: usize = 10;

impl Part {
    fn complaints(&self) -> &[String] {
        match &self.verdict {
            Verdict::Wrong(all) => all,
            _ => &[],
        }
    }

    /// Its row of the table, and what is wrong on lines of their own.
    pub fn text(&self) -> String {
        let (result, figure) = match &self.verdict {
            Verdict::Right(figure) => ("ok", figure.clone()),
            Verdict::Wrong(all) => ("WRONG", format!("{} complaints", all.len())),
            Verdict::NotHere(reason) => ("-", reason.clone()),
        };
        let mut text = format!("{:26} {result:6} {:6.1} s  {figure}", self.name, self.seconds);
        if let Verdict::Wrong(all) = &self.verdict {
            all.iter().take(MOST).for_each(|complaint| text += &format!("\n    {complaint}"));
            if all.len() > MOST {
                text += &format!("\n    and {} more", all.len() - MOST);
            }
        }
        text
    }
}

/// Program, device, processor and driver, one line each.
pub fn about(device: &Device) -> Vec<String> {
    let (os, processor) = (std::env::consts::OS, std::env::consts::ARCH);
    let mut lines =
        vec![format!("program: selfsup {}, {os} {processor}", env!("CARGO_PKG_VERSION"))];
    lines.push(format!("processor: {}", bench::name_of(device.host())));
    lines.extend(crate::device::gpus());
    if device.kind() == DeviceKind::Cuda {
        lines.push(format!("checked: cuda:{}", device.gpu().ordinal()));
    }
    lines
}

/// What a self-test found.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Program, device and driver, one line each.
    pub about: Vec<String>,
    /// The parts in the order in which they ran.
    pub parts: Vec<Part>,
}

impl Report {
    pub(super) fn new(device: &Device) -> Self {
        Self { about: about(device), parts: Vec::new() }
    }

    pub(super) fn run(
        &mut self,
        name: &str,
        told: &mut dyn FnMut(&Part),
        part: impl FnOnce() -> Verdict,
    ) {
        let start = Instant::now();
        let verdict = part();
        let seconds = start.elapsed().as_secs_f64();
        self.parts.push(Part { name: name.to_owned(), verdict, seconds });
        told(&self.parts[self.parts.len() - 1]);
    }

    /// Whether nothing is wrong.
    pub fn passed(&self) -> bool {
        self.complaints().next().is_none()
    }

    /// Everything that is wrong, part after part.
    pub fn complaints(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().flat_map(Part::complaints).map(String::as_str)
    }

    /// The last line: whether the device can be trusted.
    pub fn verdict(&self) -> String {
        let seconds: f64 = self.parts.iter().map(|part| part.seconds).sum();
        let ran = self.parts.iter().filter(|p| !matches!(p.verdict, Verdict::NotHere(_))).count();
        match self.complaints().count() {
            0 => format!("verdict: right, in all {ran} parts that apply, in {seconds:.0} s"),
            wrong => format!(
                "verdict: WRONG, {wrong} complaints: do not train on this device; please report the text above"
            ),
        }
    }

    /// The complete report.
    pub fn text(&self) -> String {
        let parts = self.parts.iter().map(Part::text);
        let lines: Vec<String> =
            self.about.iter().cloned().chain(parts).chain([self.verdict()]).collect();
        lines.join("\n")
    }

    /// The report as JSON.
    pub fn to_json(&self) -> serde_json::Value {
        let part = |part: &Part| {
            let (result, figure, wrong) = match &part.verdict {
                Verdict::Right(figure) => ("right", figure.as_str(), &[][..]),
                Verdict::Wrong(all) => ("wrong", "", &all[..]),
                Verdict::NotHere(reason) => ("not here", reason.as_str(), &[][..]),
            };
            json!({ "name": part.name, "result": result, "figure": figure, "wrong": wrong, "seconds": part.seconds })
        };
        json!({
            "about": self.about,
            "parts": self.parts.iter().map(part).collect::<Vec<_>>(),
            "passed": self.passed(),
        })
    }
}

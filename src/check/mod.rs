//! The self-test of a device: does it compute what it should, and how fast does it copy and multiply?
//!
//! [`full`] runs every instruction that kernels rely on, every primitive at ordinary and odd sizes in both precisions against
//! its f64 reference, captured steps against launched ones, and each of ten steps of training against the processor's; `selfsup check`
//! prints its [`Report`]. [`quick`] takes seconds: training runs it by itself on the first use of a GPU model by a version of the
//! program, and remembers it.
//!
//! The rows of the case table (`cases.txt`) are those of the test suite, and so are their tolerances.

pub mod case;
pub mod cases;
pub mod compare;
mod remembered;
mod report;
pub mod seeded;
mod steps;

use std::collections::BTreeSet;

use crate::bench;
use crate::device::{Device, DeviceKind, Precision};
use crate::error::{Error, Result};
use case::{Case, Route};
use compare::close;
use remembered::{is_remembered, remember};
pub use report::{Part, Report, Verdict, about};

/// What a device is given to prove.
type Given<'a> = &'a mut dyn FnMut(&Part);

/// Relative error allowed in f32, and in bf16 on inputs that it holds exactly.
const TOLERANCES: [(Precision, f64); 2] = [(Precision::F32, 1e-5), (Precision::Bf16, 1e-2)];

/// Results whose terms cancel, with four times the error that PyTorch's own f32 has there. `tests/goldens` says so; the suite
/// compares.
pub const WIDER: [(&str, f64); 4] = [
    ("batch_norm rows=100 c=16 groups=1 with=gain+shift offset=100|dgain", 5.1e-5),
    ("batch_norm rows=100 c=16 groups=1 with=gain+shift offset=100|y", 5.1e-5),
    ("batch_norm rows=2 c=1 groups=1 with=gain+shift loose=2|dx", 3e-3),
    ("batch_norm rows=2 c=17 groups=1 with=gain+shift loose=2|dx", 1.4e-4),
];

/// Runs the complete self-test of the device that `open` opens in each precision. `told` gets each part as it ends.
///
/// # Errors
/// If the device cannot be opened; what it computes wrongly is in the report.
pub fn full(open: impl Fn(Precision) -> Result<Device>, told: Given<'_>) -> Result<Report> {
    let devices = [open(Precision::F32)?, open(Precision::Bf16)?];
    let mut report = Report::new(&devices[0]);
    report.run("instructions", told, || instructions(&devices[0]));
    for (device, (precision, tolerance)) in devices.iter().zip(TOLERANCES) {
        let cases = || cases::table().into_iter().chain(cases::LARGE.map(cases::case));
        report.run(&format!("primitives in {precision}"), told, || {
            primitives(device, cases(), &[Route::Param, Route::Node, Route::Twice], tolerance)
        });
    }
    for device in &devices {
        let name = format!("captured steps in {}", device.precision());
        report.run(&name, told, || steps::captured(device, &steps::METHODS));
    }
    for device in &devices {
        let name = format!("ten steps in {}", device.precision());
        report.run(&name, told, || steps::ten(device));
    }
    for device in &devices {
        let name = format!("speed in {}", device.precision());
        report.run(&name, told, || speed(device));
    }
    Ok(report)
}

/// Runs the short form on an open device, in its precision: the instructions, one size of every primitive, and captured steps of
/// one method.
pub fn quick(device: &Device, told: Given<'_>) -> Report {
    let mut report = Report::new(device);
    let tolerance = TOLERANCES.iter().find(|(precision, _)| *precision == device.precision());
    let tolerance = tolerance.map_or(1e-5, |(_, tolerance)| *tolerance);
    report.run("instructions", told, || instructions(device));
    report.run(&format!("primitives in {}", device.precision()), told, || {
        let mut seen = BTreeSet::new();
        // The first row of a primitive is an ordinary size.
        let first =
            cases::table().into_iter().filter(|case| seen.insert(case.primitive().to_owned()));
        primitives(device, first, &[Route::Node], tolerance)
    });
    let name = format!("captured steps in {}", device.precision());
    report.run(&name, told, || steps::captured(device, &steps::METHODS[..1]));
    report
}

/// Runs the short form on a GPU whose model this version of the program has not used yet, with this driver; on other devices
/// nothing. Returns its report if it ran.
///
/// # Errors
/// If the GPU computes something wrong: training on it would be worthless.
pub fn on_first_use(device: &Device, told: Given<'_>) -> Result<Option<Report>> {
    if device.kind() != DeviceKind::Cuda || is_remembered(device) {
        return Ok(None);
    }
    let report = quick(device, told);
    if !report.passed() {
        return Err(Error::Device(format!(
            "{device} fails this program's self-test, so that training on it would be worthless: {}; `selfsup check --device cuda:{}` prints all of it, to paste into a bug report; SELFSUP_CHECK=skip trains all the same",
            report.complaints().next().unwrap_or_default(),
            device.gpu().ordinal(),
        )));
    }
    remember(device);
    Ok(Some(report))
}

fn instructions(device: &Device) -> Verdict {
    let results = device.conformance_results();
    if results.is_empty() {
        return Verdict::NotHere("only a GPU has kernels".into());
    }
    let (count, mut wrong) = (results.len(), Vec::new());
    for (name, error) in results {
        wrong.extend(error.map(|error| format!("{name}: {error}")));
    }
    Verdict::of(format!("{count} of {count} as documented"), wrong)
}

/// Runs cases on the device and on the f64 reference device.
fn primitives(
    device: &Device,
    cases: impl Iterator<Item = Case>,
    routes: &[Route],
    tolerance: f64,
) -> Verdict {
    let (reference, in_bf16) = (Device::reference(), device.precision() == Precision::Bf16);
    let on_gpu = device.kind() == DeviceKind::Cuda;
    let (mut sizes, mut names, mut wrong) = (0, BTreeSet::new(), Vec::new());
    let mut worst = (0.0, String::new());
    for case in cases {
        if on_gpu && cases::HOST_ONLY.contains(&case.primitive()) {
            continue;
        }
        let case = if in_bf16 { case.rounded() } else { case };
        let want = case.run(&reference, Route::Param);
        for &route in routes {
            let got = match case.try_run(device, route) {
                Ok(got) => got,
                // Whatever follows would fail too.
                Err(e) => return Verdict::of(String::new(), vec![format!("{case:?}: {e}")]),
            };
            for ((part, got), (_, want)) in got.parts(&case).zip(want.parts(&case)) {
                let part = format!("{}|{part}", case.name);
                let wider = WIDER.iter().find(|(name, _)| *name == part).filter(|_| !in_bf16);
                let loose = if in_bf16 { 1.0 } else { case.loose };
                let allowed = loose * wider.map_or(tolerance, |(_, wider)| *wider);
                match close(&part, got, want, allowed) {
                    Ok(error) if error / allowed > worst.0 => worst = (error / allowed, part),
                    Ok(_) => {}
                    Err(complaint) => wrong.push(complaint),
                }
            }
        }
        sizes += 1;
        names.insert(case.primitive().to_owned());
    }
    let (count, share) = (names.len(), 100.0 * worst.0);
    let figure = format!(
        "{count} primitives at {sizes} sizes; the worst error is {share:.0}% of what is allowed"
    );
    Verdict::of(figure, wrong)
}

fn speed(device: &Device) -> Verdict {
    if device.kind() != DeviceKind::Cuda {
        return Verdict::NotHere("`selfsup bench` measures a processor".into());
    }
    let ceilings = match bench::ceilings(device) {
        Ok(ceilings) => ceilings,
        Err(e) => return Verdict::of(String::new(), vec![e.to_string()]),
    };
    let known = bench::Chip::known(device.gpu().name());
    let share = |rate: f64, of: fn(&bench::Chip) -> f64| {
        known.as_ref().map_or(String::new(), |chip| format!(" ({:.0}%)", 100.0 * rate / of(chip)))
    };
    let of_gemm = match device.precision() {
        Precision::Bf16 => share(ceilings.gemm, |chip| chip.gemm),
        Precision::F32 => share(ceilings.gemm, |chip| chip.vector),
    };
    let (copied, side) = (ceilings.copied >> 20, ceilings.side);
    let mut figure = format!(
        "copy {:.1} GB/s{} of {copied} MiB, product {:.2} TFLOP/s{of_gemm} of side {side}",
        ceilings.copy / 1e9,
        share(ceilings.copy, |chip| chip.copy),
        ceilings.gemm / 1e12,
    );
    if known.is_some() {
        figure += "; in brackets: of the ceiling";
    }
    Verdict::of(figure, Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops;

    /// A primitive that is wrong on the processor alone.
    fn broken() -> Case {
        let case = cases::case("relu n=7 c=13");
        let build: case::Build = Box::new(|tape, v| {
            let off = if tape.device().kind() == DeviceKind::Cpu { 1.0001 } else { 1.0 };
            ops::scale(&ops::relu(&v[0]), off)
        });
        Case { build, ..case }
    }

    #[test]
    fn a_wrong_primitive_is_named_and_decides_the_verdict() {
        let device = Device::cpu(1).unwrap();
        let right = || ["relu n=7 c=13", "add n=7 c=13"].into_iter().map(cases::case);
        let Verdict::Right(figure) = primitives(&device, right(), &[Route::Node], 1e-5) else {
            panic!("refused a right primitive")
        };
        assert!(figure.starts_with("2 primitives at 2 sizes"), "{figure}");
        let mut report = Report::new(&device);
        report.run("primitives", &mut |_| {}, || {
            primitives(&device, right().chain([broken()]), &[Route::Node], 1e-5)
        });
        assert!(!report.passed());
        let complaints: Vec<&str> = report.complaints().collect();
        assert_eq!(complaints.len(), 2, "{complaints:?}"); // y and dx
        assert!(complaints[0].starts_with("relu n=7 c=13|y"), "{complaints:?}");
        assert!(report.text().contains("verdict: WRONG"), "{}", report.text());
    }
}

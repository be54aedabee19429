//! `selfsup check`, and the short self-test before a GPU is first trained on.

use super::args::Check;
use super::device::{self, Name};
use super::{say, talk};
use crate::check::{self, Part};
use crate::device::{Device, DeviceKind};
use crate::error::{Error, Result};

pub(super) fn check(args: &Check) -> Result<()> {
    let device = device::choose(args.device, None, 0)?;
    let ordinal = match args.device {
        Some(Name::CudaNumber(ordinal)) => ordinal,
        _ => 0,
    };
    if !args.json {
        check::about(&device).iter().try_for_each(|line| say(line))?;
    }
    let mut told = |part: &Part| {
        if !args.json {
            let _ = say(&part.text()); // a closed output is noticed at the verdict
        }
    };
    let report = if args.quick {
        check::quick(&device, &mut told)
    } else {
        let open = |precision| match device.kind() {
            DeviceKind::Cuda => Device::cuda(ordinal, precision),
            _ => device.with_precision(precision),
        };
        check::full(open, &mut told)?
    };
    say(&if args.json { report.to_json().to_string() } else { report.verdict() })?;
    if report.passed() {
        return Ok(());
    }
    Err(Error::Device(format!("{device} does not compute what it should")))
}

/// Runs the short self-test on a GPU model that this version of the program has not used yet.
pub(super) fn before_training(device: &Device) -> Result<()> {
    if std::env::var_os("SELFSUP_CHECK").is_some_and(|value| value == "skip") {
        return Ok(());
    }
    let report = check::on_first_use(device, &mut |_| {})?;
    report.iter().for_each(|report| {
        let seconds: f64 = report.parts.iter().map(|part| part.seconds).sum();
        talk(&format!(
            "first use of this GPU model: the short self-test found nothing wrong, in {seconds:.1} s; `selfsup check` runs all of it"
        ));
    });
    Ok(())
}

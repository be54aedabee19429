//! `--device`: the device that a command uses.

use std::str::FromStr;

use super::talk;
use crate::device::{Bf16Path, Device, DeviceKind, Launch, Precision, compiles_first};
use crate::error::{Error, Result};
use crate::recipes::{MOST_THREADS, TrainSettings};
use crate::train::Paused;

/// A device by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Name {
    Cpu,
    /// The first GPU, or that of a rank.
    Cuda,
    CudaNumber(usize),
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda => f.write_str("cuda"),
            Self::CudaNumber(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = match text.split_once(':') {
            None if text == "cpu" => return Ok(Self::Cpu),
            None if text == "cuda" => return Ok(Self::Cuda),
            Some(("cuda", number)) => number.parse().ok(),
            _ => None,
        };
        number
            .map(Self::CudaNumber)
            .ok_or_else(|| "expected cpu, cuda or cuda:N with N from 0".into())
    }
}

/// What a device is opened for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Training,
    Other,
}

/// Opens the device of that name with a recipe's precision and threads, to train on it.
pub(super) fn open_to_train(name: Option<Name>, settings: &TrainSettings) -> Result<Device> {
    choose_for(Work::Training, name, settings.precision, settings.threads)
}

/// Opens the device of that name to go on with a run, in the precision in which it was trained.
pub(super) fn open_to_resume(name: Option<Name>, paused: &Paused) -> Result<Device> {
    // A checkpoint without a precision is of a version that trained on every processor in f32.
    let work = if paused.starts_again() { Work::Training } else { Work::Other };
    choose_for(work, name, paused.precision(), paused.recipe().train.threads)
}

/// Opens the device of that name with a recipe's precision and threads, for anything but training.
pub(super) fn open(name: Option<Name>, settings: &TrainSettings) -> Result<Device> {
    choose(name, settings.precision, settings.threads)
}

/// Opens the device of that name; without a name, a GPU if there is one, else the CPU. Without a precision it gets the one that is
/// usual on it. Prints which.
pub(super) fn choose(
    name: Option<Name>,
    precision: Option<Precision>,
    threads: usize,
) -> Result<Device> {
    choose_for(Work::Other, name, precision, threads)
}

fn choose_for(
    work: Work,
    name: Option<Name>,
    precision: Option<Precision>,
    threads: usize,
) -> Result<Device> {
    if threads > MOST_THREADS {
        return Err(Error::Config(format!(
            "{threads} compute threads are asked for; the most is {MOST_THREADS}"
        )));
    }
    let launch = Launch::detect();
    let threads = match &launch {
        Some(launch) if threads == 0 => launch.threads(),
        _ => threads,
    };
    let on = |kind| match (precision, work) {
        (Some(precision), _) => Ok(precision),
        (None, Work::Training) => Precision::of_training(kind, launch.is_some()),
        (None, Work::Other) => Ok(Precision::usual(kind)),
    };
    let cpu = || {
        // This thread does nothing but drive the device.
        Device::cpu_with_this_thread(threads)?.with_precision(on(DeviceKind::Cpu)?)
    };
    let tell = |ordinal| compiles_first(ordinal).iter().for_each(|sentence| talk(sentence));
    let gpu = |ordinal| {
        tell(ordinal);
        Device::cuda(ordinal, on(DeviceKind::Cuda)?)
    };
    let first = || match &launch {
        Some(launch) => {
            tell(0); // GPUs of a machine are of one model, or nearly always
            Device::cuda_of_rank(launch, on(DeviceKind::Cuda)?)
        }
        None => gpu(0),
    };
    let (device, why) = match name {
        Some(Name::CudaNumber(number)) if launch.is_some() => {
            return Err(Error::Config(format!(
                "cuda:{number} is one GPU, and there are several ranks: --device cuda gives each the GPU of its number on its machine"
            )));
        }
        Some(Name::Cpu) => (cpu()?, String::new()),
        Some(Name::Cuda) => (first()?, String::new()),
        Some(Name::CudaNumber(number)) => (gpu(number)?, String::new()),
        None => match first() {
            Ok(gpu) => (gpu, "; choose the processor with --device cpu".into()),
            Err(_) if launch.is_some() => (cpu()?, " for each rank".into()),
            Err(reason) => (cpu()?, format!("; {reason}")),
        },
    };
    talk(&format!("device: {device}{}{why}", how(&device, precision)));
    Ok(device)
}

/// How a CPU multiplies bf16 matrices, and what follows from it; `asked` is the precision that was asked for.
fn how(device: &Device, asked: Option<Precision>) -> &'static str {
    if device.kind() != DeviceKind::Cpu || device.precision() == Precision::F32 {
        return "";
    }
    match Bf16Path::current() {
        Bf16Path::Avx512 if asked.is_none() => " by AVX512-BF16 (train.precision=f32 for f32)",
        Bf16Path::Avx512 => " by AVX512-BF16",
        Bf16Path::Amx if asked.is_none() => " by AMX tiles (train.precision=f32 for f32)",
        Bf16Path::Amx => " by AMX tiles",
        Bf16Path::Portable => " without instructions for it: slower than train.precision=f32",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        assert_eq!("cpu".parse(), Ok(Name::Cpu));
        assert_eq!("cuda".parse(), Ok(Name::Cuda));
        assert_eq!("cuda:3".parse(), Ok(Name::CudaNumber(3)));
        for name in ["cpu", "cuda", "cuda:3"] {
            assert_eq!(name.parse::<Name>().unwrap().to_string(), name);
        }
        for wrong in ["gpu", "cuda:", "cuda:-1", "cpu:0", ""] {
            assert!(wrong.parse::<Name>().is_err(), "{wrong}");
        }
    }
}

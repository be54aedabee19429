//! All rows of the case table: the CPU compared with the reference device, the reference device with PyTorch, gradients with finite
//! differences, one thread with several.

use std::collections::BTreeSet;

use selfsup::device::{Device, Precision};

use crate::case::{Case, ROUTES, Route};
use crate::cases::{case, table};
use crate::compare::{close, largest, report};
use crate::golden::Goldens;
use crate::seeded;

/// Relative error allowed in f32 where PyTorch's own f32 is not worse than a quarter of it.
const TOLERANCE: f64 = 1e-5;

#[test]
fn the_cpu_agrees_with_the_f64_reference() {
    let (cpu, reference) = (Device::cpu(2).unwrap().poisoned(), Device::reference().poisoned());
    let goldens = Goldens::open("primitives");
    let mut results = Vec::new();
    for case in table() {
        let want = case.run(&reference, Route::Param);
        for route in ROUTES {
            let got = case.run(&cpu, route);
            for ((part, got), (_, want)) in got.parts(&case).zip(want.parts(&case)) {
                let name = format!("{}|{part}", case.name);
                let tolerance = case.loose * goldens.record(&name).tolerance(TOLERANCE);
                results.push(close(&format!("{name} {route:?}"), got, want, tolerance));
            }
        }
    }
    report("CPU against reference", results);
}

/// On inputs that bf16 holds exactly; each operation then rounds its result once.
#[test]
fn the_cpu_agrees_with_the_f64_reference_in_bf16() {
    let (cpu, reference) = (in_bf16(2), Device::reference());
    let mut results = Vec::new();
    for case in table().into_iter().map(Case::rounded) {
        let want = case.run(&reference, Route::Param);
        for route in ROUTES {
            let got = case.run(&cpu, route);
            for ((part, got), (_, want)) in got.parts(&case).zip(want.parts(&case)) {
                results.push(close(&format!("{}|{part} {route:?}", case.name), got, want, 1e-2));
            }
        }
    }
    report("CPU in bf16 against reference", results);
}

fn in_bf16(threads: usize) -> Device {
    Device::cpu(threads).unwrap().with_precision(Precision::Bf16).unwrap().poisoned()
}

#[test]
fn the_reference_agrees_with_pytorch_in_f64() {
    let reference = Device::reference().poisoned();
    let goldens = Goldens::open("primitives");
    let mut results = Vec::new();
    for case in table() {
        for route in ROUTES {
            let got = case.run(&reference, route);
            for (part, got) in got.parts(&case) {
                let record = goldens.record(&format!("{}|{part}", case.name));
                // A gradient that cancels to almost nothing keeps the rounding of what cancelled.
                let tolerance = record.tolerance(0.0).mul_add(1e-7, 1e-10);
                results.push(record.check(got, tolerance));
            }
        }
    }
    report("reference against PyTorch f64", results);
}

#[test]
fn the_cpu_agrees_with_pytorch_in_f64() {
    let cpu = Device::cpu(2).unwrap().poisoned();
    let goldens = Goldens::open("primitives");
    let mut results = Vec::new();
    for case in table() {
        let got = case.run(&cpu, Route::Param);
        for (part, got) in got.parts(&case) {
            let record = goldens.record(&format!("{}|{part}", case.name));
            results.push(record.check(got, case.loose * record.tolerance(TOLERANCE)));
        }
    }
    report("CPU against PyTorch f64", results);
}

#[test]
fn every_case_has_a_golden_and_every_golden_a_case() {
    let goldens = Goldens::open("primitives");
    let got: BTreeSet<&str> = goldens.names().filter_map(|n| Some(n.split_once('|')?.0)).collect();
    let table = table();
    let want: BTreeSet<&str> = table.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(got, want, "run scripts/make-goldens");
    assert_eq!(want.len(), table.len(), "a row of the table stands there twice");
}

#[test]
fn gradients_agree_with_finite_differences() {
    let reference = Device::reference().poisoned();
    let mut results = Vec::new();
    for case in table() {
        results.extend(differences(&case, &reference));
    }
    report("gradients against differences", results);
}

/// Coordinates of an input that are moved: all of up to this many.
const ALL: usize = 48;
/// Seeded coordinates of a larger input.
const SOME: usize = 24;

fn differences(case: &Case, device: &Device) -> Vec<Result<f64, String>> {
    let outcome = case.run(device, Route::Param);
    let (mut arena, params) = case.arena(device);
    let mut results = Vec::new();
    for (slot, (input, gradient)) in case.inputs.iter().zip(&outcome.gradients).enumerate() {
        if input.step == 0.0 {
            continue;
        }
        let count = input.values.len();
        let seed = seeded::seed(&format!("{}|moved", case.name));
        let moved =
            if count <= ALL { (0..count).collect() } else { seeded::indices(seed, SOME, count) };
        // Rounding of the loss, divided by the step, limits what a difference can tell.
        let rounding = 16.0 * f64::EPSILON * outcome.loss.abs().max(1.0) / input.step;
        let allowed = 1e-6 * largest(gradient) + rounding;
        for i in moved {
            let mut values = input.values.clone();
            let mut loss_at = |value: f64| {
                values[i] = value;
                crate::case::write_slot(&mut arena, slot, &values);
                case.loss(&mut arena, &params)
            };
            let (ahead, behind) =
                (loss_at(input.values[i] + input.step), loss_at(input.values[i] - input.step));
            let want = (ahead - behind) / (2.0 * input.step);
            let (got, error) = (gradient[i], (gradient[i] - want).abs());
            results.push(if error <= allowed {
                Ok(crate::compare::ratio(error, largest(gradient)))
            } else {
                let name = format!("{} d{}[{i}]", case.name, input.name);
                Err(format!("{name}: got {got}, differences say {want}, allowed {allowed:.1e}"))
            });
        }
        crate::case::write_slot(&mut arena, slot, &input.values);
    }
    results
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let in_f32 = [1, 2, 3].map(|threads| Device::cpu(threads).unwrap().poisoned());
    for devices in [in_f32, [1, 2, 3].map(in_bf16)] {
        for case in table() {
            let [one, two, three] = devices.each_ref().map(|device| case.run(device, Route::Param));
            assert!(one.output.iter().all(|v| v.is_finite()), "{case:?}");
            assert_eq!(one, two, "{case:?}: one thread and two of {}", devices[0]);
            assert_eq!(one, three, "{case:?}: one thread and three of {}", devices[0]);
        }
    }
}

/// A number divided by its magnitude is 1 or -1: too plain for a relative error.
#[test]
fn rows_of_one_number_have_no_gradient() {
    let case = case("l2_normalize n=5 d=1 scale=1");
    for device in [Device::cpu(2).unwrap().poisoned(), Device::reference().poisoned()] {
        let got = case.run(&device, Route::Node);
        assert!(got.output.iter().all(|y| (y.abs() - 1.0).abs() < 1e-6), "{:?}", got.output);
        assert!(got.gradients[0].iter().all(|dx| dx.abs() < 1e-5), "{:?}", got.gradients);
    }
}

/// One row is its own mean: what is left is the shift, and no gradient flows to the row.
#[test]
fn a_batch_norm_of_one_row_gives_the_shift() {
    let case = case("batch_norm rows=3 c=5 groups=3 with=gain+shift");
    for device in [Device::cpu(2).unwrap().poisoned(), Device::reference().poisoned()] {
        let got = case.run(&device, Route::Node);
        let shifts = case.inputs[2].values.iter().cycle();
        for (got, want) in got.output.iter().zip(shifts) {
            assert!((got - want).abs() < 1e-4, "got {got}, expected {want}");
        }
        let largest = largest(&got.gradients[0]);
        assert!(largest < 1e-3, "dx up to {largest}, of terms of about 300");
    }
}

#[test]
fn empty_batches_work() {
    let lines = [
        "conv2d n=0 h=5 w=5 c=3 k=4 r=3 s=3 stride=1 pad=1",
        "linear n=0 d=5 k=3 bias=1",
        "batch_norm rows=0 c=3 groups=1 with=gain+shift+relu",
        "relu n=0 c=3",
        "add n=0 c=3",
        "mul n=0 c=3",
        "scale n=0 c=3 factor=2",
        "square n=0 c=3",
        "sum shape=0x3 axis=1",
        "mean shape=0x3 axis=1",
        "transpose n=0 d=3",
        "max_pool n=0 h=5 w=5 c=3 size=3 stride=2 pad=1",
        "mean_pool n=0 h=5 w=5 c=3",
        "l2_normalize n=0 d=3 scale=1",
    ];
    for line in lines {
        let case = case(line);
        let cpu = Device::cpu(2).unwrap().poisoned();
        for device in [cpu, in_bf16(2), Device::reference().poisoned()] {
            let got = case.run(&device, Route::Node);
            assert_eq!(got.output, [0.0; 0], "{line}");
            // Weights have gradients all the same, and they are zero.
            let zero = got.gradients.iter().flatten().all(|dx| *dx == 0.0);
            assert!(zero, "{line} on {device}: {:?}", got.gradients);
        }
    }
}

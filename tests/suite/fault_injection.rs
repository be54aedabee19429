//! Tests the tests: the checks must catch wrong numbers that are injected on purpose.

use selfsup::device::Device;
use selfsup::ops;
use selfsup::tape::{self, Var};
use selfsup::tensor::Tensor;

use crate::case::{Outcome, Route};
use crate::cases::case;
use crate::compare::close;
use crate::golden::Goldens;

const EXPECTED: [f64; 4] = [1.0, -2.0, 0.5, 3.0];

#[track_caller]
fn assert_caught(got: &[f64], words: &str) {
    let complaint =
        close("it", got, &EXPECTED, 1e-5).expect_err("the checker passed a wrong number");
    assert!(complaint.contains(words), "got `{complaint}`, expected `{words}`");
}

#[test]
fn the_checker_passes_right_numbers() {
    assert_eq!(close("it", &EXPECTED, &EXPECTED, 1e-5), Ok(0.0));
    let near = EXPECTED.map(|v| v * (1.0 + 5e-6));
    assert!(close("it", &near, &EXPECTED, 1e-5).is_ok());
}

#[test]
fn the_checker_fails_on_nan_and_on_infinity() {
    for wrong in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        assert_caught(&[1.0, wrong, 0.5, 3.0], "at 1 of 4");
        assert!(close("it", &EXPECTED, &[1.0, wrong, 0.5, 3.0], 1e9).is_err(), "expected {wrong}");
    }
    assert!(close("it", &[f64::NAN; 4], &[f64::NAN; 4], 1e9).is_err());
}

#[test]
fn the_checker_fails_on_an_error_of_a_thousandth() {
    assert_caught(&EXPECTED.map(|v| v * 1.001), "relative error 1.00e-3");
}

#[test]
fn the_checker_fails_on_one_wrong_element_among_many() {
    let want = vec![1.0; 1_000_000];
    let mut got = want.clone();
    got[777] += 3e-4;
    // In L2 this is 3e-7: only the largest difference shows it.
    let complaint = close("it", &got, &want, 1e-5).expect_err("the checker passed it");
    assert!(complaint.contains("worst at 777"), "{complaint}");
}

#[test]
fn the_checker_fails_on_another_length_and_on_a_number_in_place_of_zero() {
    assert_caught(&EXPECTED[..3], "3 numbers, expected 4");
    assert!(close("it", &[1e-30], &[0.0], 1e-5).is_err());
    assert!(close("it", &[0.0], &[0.0], 1e-5).is_ok());
}

const LINEAR: &str = "linear n=7 d=13 k=11 bias=1";

/// The complaints of the case table's checks about `got` as the result of `LINEAR`: by goldens, and by the reference.
fn complaints(got: &Outcome) -> Vec<String> {
    let case = case(LINEAR);
    let goldens = Goldens::open("primitives");
    let want = case.run(&Device::reference(), Route::Param);
    let pairs = got.parts(&case).zip(want.parts(&case));
    let both = pairs.flat_map(|((part, got), (_, want))| {
        let golden = goldens.record(&format!("{LINEAR}|{part}"));
        let tolerance = golden.tolerance(1e-5);
        [golden.check(got, tolerance), close(&part, got, want, tolerance)]
    });
    both.filter_map(Result::err).collect()
}

/// A faulty operation: copies `x` except its last `skip` elements, and has a gradient `factor` times too large.
fn faulty<'t>(x: &Var<'t>, skip: usize, factor: f64) -> Var<'t> {
    let mut y = x.value().empty_like();
    let written = y.len() - skip;
    y.data_mut::<f32>()[..written].copy_from_slice(&x.value().data::<f32>()[..written]);
    let id = x.id();
    x.tape().record("faulty", y, &[x], move |dy, gradients| {
        let dx: Vec<f64> = dy.to_f64().iter().map(|v| v * factor).collect();
        gradients.add(id, Tensor::from_f64(dy.device(), *dy.shape(), &dx));
    })
}

fn run_faulty(skip: usize, factor: f64) -> Outcome {
    let device = Device::cpu(2).unwrap().poisoned();
    case(LINEAR).run_with(&device, Route::Param, &|y| faulty(&y, skip, factor))
}

#[test]
fn an_operation_without_a_fault_passes() {
    assert_eq!(complaints(&run_faulty(0, 1.0)), [""; 0]);
}

#[test]
fn an_unwritten_output_is_caught_on_a_poisoned_device() {
    let complaints = complaints(&run_faulty(1, 1.0));
    assert!(complaints.iter().any(|c| c.contains("NaN at 76 of 77")), "{complaints:?}");
}

#[test]
fn a_gradient_that_is_off_by_a_thousandth_is_caught() {
    let complaints = complaints(&run_faulty(0, 1.001));
    // Three gradients, by golden and by reference.
    assert_eq!(complaints.len(), 6, "{complaints:?}");
}

#[test]
fn a_golden_stored_as_a_digest_catches_an_evenly_spread_error() {
    let line = "nt_xent rows=130 d=31 t=0.5";
    let case = case(line);
    let goldens = Goldens::open("primitives");
    let golden = goldens.record(&format!("{line}|dz"));
    let right = case.run(&Device::reference(), Route::Param).gradients.remove(0);
    assert!(golden.check(&right, 1e-10).is_ok());
    // Every other element a little larger, the rest a little smaller: the norm stays.
    let spread = |(i, v): (usize, &f64)| v * if i % 2 == 0 { 1.001 } else { 0.999 };
    let wrong: Vec<f64> = right.iter().enumerate().map(spread).collect();
    assert!(golden.check(&wrong, 1e-5).is_err());
}

/// Shipped bug: the paper's mean in place of the reference code's loss, which is twice as large.
#[test]
fn half_of_a_loss_is_caught() {
    let line = "nt_xent rows=6 d=3 t=0.1";
    let goldens = Goldens::open("primitives");
    let halved = case(line).run_with(&Device::reference(), Route::Param, &|y| ops::scale(&y, 0.5));
    let golden = goldens.record(&format!("{line}|y"));
    assert!(golden.check(&halved.output, 1e-2).is_err(), "{halved:?}");
}

/// NT-Xent as a cross-entropy over the full similarity matrix, with or without a mask on its diagonal.
fn nt_xent_by_matrix(line: &str, mask: bool) -> Vec<f64> {
    let case = case(line);
    let rows = case.inputs[0].shape[0];
    let labels: Vec<i32> = (0..rows).map(|i| ((i + rows / 2) % rows) as i32).collect();
    let mut diagonal = vec![0.0; rows * rows];
    diagonal.iter_mut().step_by(rows + 1).for_each(|v| *v = if mask { -1e9 } else { 0.0 });
    let (mut arena, params) = case.arena(&Device::reference());
    let loss = tape::step(&mut arena, |tape| {
        let z = tape.param(params[0]);
        let logits = ops::scale(&ops::linear(&z, &z, None), 1.0 / 0.1);
        let masks = Tensor::from_f64(tape.device(), [rows, rows], &diagonal);
        let labels = Tensor::from_slice(tape.device(), [rows], &labels);
        ops::cross_entropy(&ops::add(&logits, &tape.input(&masks)), &labels)
    });
    vec![loss.unwrap().scalar()]
}

#[test]
fn a_similarity_matrix_with_its_diagonal_is_caught() {
    let line = "nt_xent rows=6 d=3 t=0.1";
    let goldens = Goldens::open("primitives");
    let golden = goldens.record(&format!("{line}|y"));
    let right = golden.check(&nt_xent_by_matrix(line, true), 1e-10);
    assert!(right.is_ok(), "{right:?}");
    assert!(golden.check(&nt_xent_by_matrix(line, false), 1e-2).is_err());
}

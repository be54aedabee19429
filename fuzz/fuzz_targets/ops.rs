#![no_main]

#[allow(dead_code)]
#[path = "../../tests/suite/shape_fuzz.rs"]
mod shape_fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| shape_fuzz::ops(bytes));

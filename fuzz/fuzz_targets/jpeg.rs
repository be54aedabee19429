#![no_main]

#[allow(dead_code)]
#[path = "../../tests/suite/parser_fuzz.rs"]
mod parser_fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| parser_fuzz::jpeg(bytes));

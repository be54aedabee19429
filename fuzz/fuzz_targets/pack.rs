#![no_main]

#[allow(dead_code)]
#[path = "../../tests/suite/outside.rs"]
mod outside;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| outside::pack(bytes));

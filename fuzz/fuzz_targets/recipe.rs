#![no_main]

#[path = "../../tests/suite/outside.rs"]
mod outside;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| outside::recipe(bytes));

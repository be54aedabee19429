#![no_main]

use std::panic;

#[allow(dead_code)]
#[path = "../../tests/suite/parser_fuzz.rs"]
mod parser_fuzz;

// cargo-fuzz builds with debug assertions, and zune-jpeg violates some of its own on corrupt files. Release builds have none, and
// `decode` turns a panic into an error: only panics from elsewhere are findings.
fn ignore_decoder_panics() {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !info.location().is_some_and(|location| location.file().contains("zune-jpeg")) {
            hook(info);
        }
    }));
}

libfuzzer_sys::fuzz_target!(init: ignore_decoder_panics(), |bytes: &[u8]| parser_fuzz::image(bytes));

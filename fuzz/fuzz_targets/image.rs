#![no_main]

use std::panic;

#[allow(dead_code)]
#[path = "../../tests/suite/outside.rs"]
mod outside;

// cargo-fuzz builds with debug assertions, of which zune-jpeg breaks some on damaged files. They are off in releases, and `decode`
// answers a panic: only other panics are findings.
fn let_decoders_assert() {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |what| {
        if !what.location().is_some_and(|place| place.file().contains("zune-jpeg")) {
            hook(what);
        }
    }));
}

libfuzzer_sys::fuzz_target!(init: let_decoders_assert(), |bytes: &[u8]| outside::image(bytes));

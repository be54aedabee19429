#![no_main]

#[allow(dead_code)]
#[path = "../../tests/suite/kernel_fuzz.rs"]
mod kernel_fuzz;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    kernel_fuzz::kernels(bytes);
});

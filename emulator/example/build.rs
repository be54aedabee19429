//! Compiles kernels/ and writes a module of launch functions, which src/main.rs includes.

use cuda_kernels_build::{Build, Error};

fn main() -> Result<(), Error> {
    // Registers in local memory are a mistake in a kernel as small as this: the build refuses them.
    Build::new("kernels").no_local_memory([]).emit()?;
    Ok(())
}

//! A cudarc program with one kernel, which its build script compiles. It knows nothing of the stand-in driver, except that `saxpy PATH`
//! opens a driver first.

use std::error::Error;

use cudarc::driver::{CudaContext, LaunchConfig};

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

fn main() -> Result<(), Box<dyn Error>> {
    // cudarc then finds this library instead of the system's libcuda.so. It stays open to the end.
    let _driver = std::env::args().nth(1).map(|path| {
        // SAFETY: loading a driver runs its initialisers, which is what the caller asks for.
        unsafe { libloading::Library::new(path) }.expect("a driver")
    });
    let context = CudaContext::new(0)?;
    let kernels = kernels::Kernels::load(&context)?;
    let stream = context.default_stream();

    let (n, a) = (1000_u32, 0.5_f32);
    let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let x = stream.clone_htod(&x)?;
    let mut y = stream.alloc_zeros::<f32>(n as usize)?;
    // SAFETY: the kernel reads and writes `n` elements.
    unsafe { kernels.saxpy(&stream, LaunchConfig::for_num_elems(n), &mut y, &x, a, n) }?;
    let y = stream.clone_dtoh(&y)?;
    assert!(y.iter().zip(0..).all(|(y, i)| *y == 0.5 * i as f32));
    println!("saxpy of {n}: right");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::kernels::RESOURCES;

    #[test]
    #[cfg_attr(no_kernels, ignore = "needs nvcc")]
    fn saxpy_leaves_room_for_full_occupancy() {
        assert!(!RESOURCES.is_empty());
        for of in RESOURCES {
            assert!(of.registers <= 32, "{of:?}");
        }
    }
}

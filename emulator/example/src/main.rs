//! A cudarc program with one kernel. It knows nothing of the stand-in driver, except that `saxpy PATH` opens a driver first.

use cudarc::driver::{CudaContext, DriverError, LaunchConfig, PushKernelArg};
use cudarc::nvrtc::Ptx;

fn main() -> Result<(), DriverError> {
    // cudarc then finds this library instead of the system's libcuda.so. It stays open to the end.
    let _driver = std::env::args().nth(1).map(|path| {
        // SAFETY: loading a driver runs its initialisers, which is what the caller asks for.
        unsafe { libloading::Library::new(path) }.expect("a driver")
    });
    let context = CudaContext::new(0)?;
    let stream = context.default_stream();
    let kernel = context.load_module(Ptx::from_src(include_str!("../saxpy.ptx")))?;
    let kernel = kernel.load_function("saxpy")?;

    let (n, a) = (1000_u32, 0.5_f32);
    let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
    let x = stream.clone_htod(&x)?;
    let mut y = stream.alloc_zeros::<f32>(n as usize)?;
    let mut launch = stream.launch_builder(&kernel);
    launch.arg(&mut y).arg(&x).arg(&a).arg(&n);
    // SAFETY: the kernel takes these arguments and reads and writes `n` elements.
    unsafe { launch.launch(LaunchConfig::for_num_elems(n)) }?;
    let y = stream.clone_dtoh(&y)?;
    assert!(y.iter().zip(0..).all(|(y, i)| *y == 0.5 * i as f32));
    println!("saxpy of {n}: right");
    Ok(())
}

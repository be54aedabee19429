//! Programs that use the driver wrongly in a way that a kinder driver would let pass: each must fail here.

use cudarc::driver::result;
use cudarc::driver::sys::CUresult;

use crate::stage::Stage;

/// The misuses with their names, and whether each was caught.
pub fn all() -> Vec<(&'static str, bool)> {
    vec![("memory counted as it was asked for", memory_counted_as_it_was_asked_for())]
}

/// A program that divides free memory by the size of its blocks expects more of them than there are.
fn memory_counted_as_it_was_asked_for() -> bool {
    const BLOCK: usize = 3 << 20;
    let stage = Stage::take(false);
    let (free, total) = result::mem_get_info().expect("information");
    stage.memory(total - free + 12 * BLOCK);
    let (free, _) = result::mem_get_info().expect("information");
    let blocks: Vec<_> =
        (0..free / BLOCK).map(|_| unsafe { result::malloc_sync(BLOCK) }.map_err(|e| e.0)).collect();
    for at in blocks.iter().flatten() {
        unsafe { result::free_sync(*at) }.expect("freed");
    }
    stage.memory(total);
    assert_eq!(blocks.len(), 12);
    blocks.contains(&Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY))
}

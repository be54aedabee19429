//! Tensors in another library's GPU memory, and the engine's in another library's hands, without copies and without waiting: each
//! side's stream waits for the other's, on the GPU.

use super::{DType, Shape, Tensor};
use crate::device::{Device, DeviceKind, Foreign, ForeignStream, Memory};
use crate::error::{Error, Result};

/// A tensor's elements in another library's hands. Dropping it returns them: work that the engine queues from then on waits for what
/// the other library's stream holds then, and the memory may be used again.
#[derive(Debug)]
pub struct Lent {
    /// Taken by `drop` alone.
    tensor: Option<Tensor>,
    stream: ForeignStream,
}

impl Tensor {
    /// A tensor in another library's memory on a GPU, contiguous and row-major. Nothing is copied.
    ///
    /// Work that the device queues from now on waits for what `foreign.stream` holds now. When the last tensor that shares the memory
    /// is dropped, the stream is made to wait for what the device has queued until then, and `foreign.owner` is dropped. The other
    /// library therefore may write to the memory, or free it in the order of its stream, as soon as the owner is gone.
    ///
    /// ```no_run
    /// use selfsup::device::{Device, Foreign, ForeignStream, Group, Precision};
    /// use selfsup::tensor::{DType, Tensor};
    /// # struct Theirs; impl Theirs { fn address(&self) -> u64 { 0 } fn stream(&self) -> usize { 0 } }
    /// # fn other_library() -> Theirs { Theirs }
    /// let device = Device::cuda(0, Precision::F32)?;
    /// let theirs = other_library(); // owns 8 x 128 floats on GPU 0
    /// let address = theirs.address();
    /// // SAFETY: the handle is that of a living stream, and `theirs` keeps the floats, which nobody writes meanwhile.
    /// let x = unsafe {
    ///     let stream = ForeignStream::from_handle(theirs.stream());
    ///     let foreign = Foreign { address, stream, owner: Box::new(theirs) };
    ///     Tensor::adopt(&device, DType::F32, [8, 128], foreign)?
    /// };
    /// let assignments = selfsup::ops::sinkhorn(&x, 0.05, 3, &Group::alone());
    /// # let _ = assignments;
    /// # Ok::<(), selfsup::Error>(())
    /// ```
    ///
    /// # Errors
    /// If the device is no GPU or has failed, the address is not in its memory or not a multiple of an element's size, or a CUDA graph
    /// is being captured. The owner is dropped then.
    ///
    /// # Safety
    /// Until the owner is dropped, the elements lie at the address; after what the stream holds now, nobody else writes to them, nor
    /// reads them while the engine writes through this tensor. A captured step that uses the tensor is not replayed after that.
    #[track_caller]
    pub unsafe fn adopt(
        device: &Device,
        dtype: DType,
        shape: impl Into<Shape>,
        foreign: Foreign,
    ) -> Result<Self> {
        let (shape, address) = (shape.into(), foreign.address);
        if device.kind() != DeviceKind::Cuda {
            return Err(Error::Device(format!("memory of a GPU cannot be a tensor on {device}")));
        }
        if !address.is_multiple_of(dtype.size() as u64) {
            return Err(Error::Device(format!(
                "address {address:#x} is no multiple of the {} bytes of {dtype:?}",
                dtype.size()
            )));
        }
        device.gpu().expect_own(address)?;
        device.wait_for(foreign.stream)?;
        let memory = Memory::foreign(device, shape.elements() * dtype.size(), foreign);
        Ok(Self { memory: memory.into(), offset: 0, shape, dtype })
    }

    /// Lends the elements to another library: `stream` is made to wait for what the device has queued so far. The tensor can be read
    /// meanwhile, unless the other library writes; it cannot be written.
    ///
    /// # Errors
    /// If the tensor is on no GPU, the device has failed, or a CUDA graph is being captured.
    pub fn lend(&self, stream: ForeignStream) -> Result<Lent> {
        if self.device().kind() != DeviceKind::Cuda {
            return Err(Error::Device(format!(
                "a tensor on {} has no stream to order: read it where it is",
                self.device()
            )));
        }
        self.device().let_wait(stream)?;
        Ok(Lent { tensor: Some(self.clone()), stream })
    }
}

impl Lent {
    /// The address of the first element on the GPU.
    pub fn address(&self) -> u64 {
        self.tensor().address()
    }

    /// The tensor.
    pub fn tensor(&self) -> &Tensor {
        self.tensor.as_ref().expect("taken by `drop` alone")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let Some(tensor) = self.tensor.take() else { return };
        if !tensor.device().gpu().take_back_from(self.stream) {
            std::mem::forget(tensor); // a graph may use it for as long as the program runs
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_gpus_exchange_memory() {
        let x = Tensor::zeros(&Device::reference(), [2]);
        let refused = x.lend(ForeignStream::LEGACY).unwrap_err().to_string();
        assert!(refused.contains("f64 reference has no stream"), "{refused}");
        let foreign = Foreign { address: 64, stream: ForeignStream::LEGACY, owner: Box::new(()) };
        // SAFETY: it is refused before the address is used.
        let refused = unsafe { Tensor::adopt(&Device::reference(), DType::F64, [2], foreign) };
        assert!(refused.unwrap_err().to_string().contains("cannot be a tensor on f64 reference"));
    }
}

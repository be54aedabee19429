//! Numbers of host memory over NCCL, where no MPI is: under torchrun.
//!
//! Each rank has a stream of its own for them on its GPU. Before an exchange the work of its compute stream is waited for, so that
//! collectives of two connections are never under way at the same time: NCCL allows that only if all ranks begin them in one order.

use std::sync::Mutex;

use super::mpi::Op;
use super::nccl::{Communicator, Kind, Nccl, Reduction};
use super::patience::{Guard, Patience};
use super::{Launch, lock};
use crate::device::{Device, Memory, Precision};

/// The variable that says where rank 0's NCCL listens; NCCL reads it, too.
pub(super) const MEETING: &str = "NCCL_COMM_ID";

/// The connection of all ranks' GPUs.
pub(super) struct OverGpus {
    device: Device,
    /// Until the rank leaves.
    communicator: Mutex<Option<Communicator>>,
}

impl OverGpus {
    /// Connects this rank's GPU with those of the others, which all call this.
    pub(super) fn open(launch: &Launch, patience: &Patience) -> Result<Self, String> {
        if std::env::var_os(MEETING).is_none_or(|address| address.is_empty()) {
            return Err(format!(
                "set {MEETING}=HOST:PORT, the same for all: rank 0's machine and a port that is free on it"
            ));
        }
        // Its precision is of no account: nothing is computed on it.
        let device = Device::cuda_of_rank(launch, Precision::F32);
        let device = device.map_err(|e| {
            format!(
                "they agree over NCCL and need a GPU each ({e}): on processors start them with mpirun or srun"
            )
        })?;
        let id = Nccl::get()?.unique_id()?;
        // It waits for the other ranks in the library.
        let guard = Guard::new(patience, "the GPUs' first meeting");
        let communicator = Communicator::new(&device, id, launch.rank, launch.size);
        drop(guard);
        let communicator = communicator.map_err(|reason| {
            format!("connecting {device} with the other ranks' GPUs failed ({reason})")
        })?;
        Ok(Self { device, communicator: Mutex::new(Some(communicator)) })
    }

    /// Replaces elements of the kind by their sum or maximum over all ranks.
    pub(super) fn reduce<T: bytemuck::Pod>(
        &self,
        values: &mut [T],
        kind: Kind,
        op: Op,
        patience: &Patience,
    ) -> Result<(), String> {
        let (count, bytes) = (values.len(), bytemuck::cast_slice_mut(values));
        let reduction = match op {
            Op::Sum => Reduction::Sum,
            Op::Max => Reduction::Max,
        };
        let memory = self.upload(bytes);
        // SAFETY: the memory holds the values.
        self.exchange(patience, |communicator| unsafe {
            communicator.all_reduce(memory.address(), count, kind, reduction)
        })?;
        self.download(&memory, bytes)
    }

    /// Gathers the bytes of every rank, `own.len()` of each, into `all`, in rank order.
    pub(super) fn gather(
        &self,
        own: &[u8],
        all: &mut [u8],
        patience: &Patience,
    ) -> Result<(), String> {
        let (from, to) = (self.upload(own), Memory::new(&self.device, all.len()));
        // SAFETY: there are as many bytes at `from`, and at `to` those of all ranks.
        self.exchange(patience, |communicator| unsafe {
            communicator.all_gather(from.address(), to.address(), own.len(), Kind::U8)
        })?;
        self.download(&to, all)
    }

    /// Replaces the bytes by those of rank 0.
    pub(super) fn broadcast(&self, bytes: &mut [u8], patience: &Patience) -> Result<(), String> {
        let memory = self.upload(bytes);
        // SAFETY: the memory holds the bytes.
        self.exchange(patience, |communicator| unsafe {
            communicator.broadcast(memory.address(), bytes.len())
        })?;
        self.download(&memory, bytes)
    }

    /// Waits until all ranks have called.
    pub(super) fn barrier(&self, patience: &Patience) -> Result<(), String> {
        self.reduce(&mut [0_i32], Kind::I32, Op::Max, patience)
    }

    /// Ends the connection in order.
    pub(super) fn leave(&self) {
        drop(lock(&self.communicator).take());
    }

    /// Ends queued exchanges, so that the process can end.
    pub(super) fn abort(&self) {
        if let Some(communicator) = &*lock(&self.communicator) {
            communicator.abort();
        }
    }

    fn upload(&self, bytes: &[u8]) -> Memory {
        let mut memory = Memory::new(&self.device, bytes.len());
        memory.write(0, bytes);
        memory
    }

    fn download(&self, memory: &Memory, bytes: &mut [u8]) -> Result<(), String> {
        memory.read(0, bytes);
        self.device.check().map_err(|e| e.to_string())
    }

    /// Queues a collective and waits for it.
    fn exchange(
        &self,
        patience: &Patience,
        collective: impl FnOnce(&Communicator) -> Result<(), String>,
    ) -> Result<(), String> {
        let communicator = lock(&self.communicator);
        let communicator = communicator.as_ref().ok_or("the rank has left")?;
        collective(communicator)?;
        communicator.settle(patience)
    }
}

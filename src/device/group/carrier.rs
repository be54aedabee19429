//! What carries numbers of host memory from rank to rank.

use super::Reduce;
use super::mpi::{Mpi, Op};
use super::over_gpus::OverGpus;
use super::patience::Patience;

/// The library that does, opened.
pub(super) enum Carrier {
    /// Nothing, in an imagined group.
    None,
    Mpi(Mpi),
    Gpus(OverGpus),
}

impl Carrier {
    pub(super) fn reduce<T: Reduce>(
        &self,
        values: &mut [T],
        op: Op,
        patience: &Patience,
    ) -> Result<(), String> {
        match self {
            Carrier::None => Ok(()),
            Carrier::Mpi(mpi) => T::reduce(mpi, values, op, patience),
            Carrier::Gpus(gpus) => gpus.reduce(values, T::KIND, op, patience),
        }
    }

    pub(super) fn gather(
        &self,
        own: &[u8],
        all: &mut [u8],
        size: usize,
        patience: &Patience,
    ) -> Result<(), String> {
        match self {
            Carrier::None => Ok(()),
            Carrier::Mpi(mpi) => mpi.gather(own, all, size, patience),
            Carrier::Gpus(gpus) => gpus.gather(own, all, patience),
        }
    }

    pub(super) fn broadcast(&self, bytes: &mut [u8], patience: &Patience) -> Result<(), String> {
        match self {
            Carrier::None => Ok(()),
            Carrier::Mpi(mpi) => mpi.broadcast(bytes, patience),
            Carrier::Gpus(gpus) => gpus.broadcast(bytes, patience),
        }
    }

    pub(super) fn barrier(&self, patience: &Patience) -> Result<(), String> {
        match self {
            Carrier::None => Ok(()),
            Carrier::Mpi(mpi) => mpi.barrier(patience),
            Carrier::Gpus(gpus) => gpus.barrier(patience),
        }
    }
}

//! Collectives between the GPUs of a group: queued on their compute streams, inside captured steps too.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use super::nccl::{Communicator, Nccl, Reduction, UniqueId};
use super::patience::Guard;
use super::{Calls, Exchange, Group, Reduce, World, lock};
use crate::device::cuda::{In, Out};
use crate::device::{Device, DeviceKind};
use crate::error::{Error, Result};

impl Group {
    /// Connects this rank's GPU with those of the other ranks, which all call this. Collectives on tensors need it. Does nothing in
    /// a group of one, or on other devices.
    ///
    /// # Errors
    /// On all ranks if on one: if the ranks compute on different kinds of devices, two of them have the same GPU, or NCCL is missing
    /// or fails.
    pub fn join(&self, device: &Device) -> Result<()> {
        let Some(world) = &self.0 else { return Ok(()) };
        let kinds =
            self.all_gather("kinds of devices", &[device.kind() as u64]).unwrap_or_default();
        self.check()?;
        let other = kinds.iter().position(|kind| *kind != kinds[0]);
        self.refuse(other.map(|other| {
            Error::Config(format!(
                "rank 0 and rank {other} compute on different kinds of devices: give all ranks the same --device"
            ))
        }))?;
        let joined = lock(&world.gpu).as_ref().is_some_and(|joined| joined.is_of(device));
        if device.kind() != DeviceKind::Cuda || joined {
            return Ok(());
        }
        let own = self.together(device.gpu().uuid())?;
        let gpus = self.all_gather("identities of GPUs", &own).unwrap_or_default();
        self.check()?;
        let gpus: Vec<&[u8]> = gpus.chunks(16).collect();
        let first_of = |gpu: &&[u8]| gpus.iter().position(|other| other == gpu).unwrap_or(0);
        let shared = gpus.iter().enumerate().find(|(rank, gpu)| first_of(gpu) != *rank);
        self.refuse(shared.map(|(rank, gpu)| {
            let other = first_of(gpu);
            Error::Device(format!(
                "ranks {other} and {rank} have the same GPU: there are more ranks than GPUs, start one for each"
            ))
        }))?;
        let nccl = self.together(Nccl::get().map_err(Error::Device))?;
        let own = if self.leads() { nccl.unique_id() } else { Ok(UniqueId([0; 128])) };
        let mut id = self.together(own.map_err(Error::Device))?;
        self.broadcast("the meeting point of GPUs", &mut id.0);
        self.check()?;
        // It waits for the other ranks in the library.
        let guard = Guard::new(&world.patience, "the GPUs' first meeting");
        let made = Communicator::new(device, id, self.rank(), self.size());
        drop(guard);
        let made = made.map_err(|reason| {
            Error::Device(format!(
                "{device}: connecting it with the other ranks' GPUs failed ({reason})"
            ))
        });
        *lock(&world.gpu) = Some(Arc::new(self.together(made)?));
        Ok(())
    }

    /// Fails on all ranks, which all know of the same fault; rank 0 reports it.
    fn refuse(&self, fault: Option<Error>) -> Result<()> {
        match fault {
            None => Ok(()),
            Some(fault) if self.leads() => Err(fault),
            Some(_) => Err(Error::Elsewhere(0)),
        }
    }

    /// The connection of the GPUs, for captured work to hold: it must not end before that.
    pub(crate) fn communicator(&self) -> Option<Arc<Communicator>> {
        lock(&self.0.as_ref()?.gpu).clone()
    }

    /// Queues the replacement of `count` values on a GPU by their reduction over the ranks.
    pub(crate) fn all_reduce_on_gpu<T: Reduce>(
        &self,
        what: &'static str,
        gpu: &Device,
        values: Out<'_, T>,
        count: usize,
        reduction: Reduction,
    ) {
        self.queue(Exchange::of(what, count * size_of::<T>()), gpu, |communicator| {
            // SAFETY: the caller has exclusive access to the values.
            unsafe { communicator.all_reduce(values.address(), count, T::KIND, reduction) }
        });
    }

    /// Queues the gathering of `count` values on a GPU from every rank, in rank order.
    pub(crate) fn all_gather_on_gpu<T: Reduce>(
        &self,
        what: &'static str,
        gpu: &Device,
        own: In<'_, T>,
        all: Out<'_, T>,
        count: usize,
    ) {
        let bytes = count * size_of::<T>();
        if self.leaves_out(what) {
            // SAFETY: `all` has room for the values of all ranks, and is not where `own` are.
            let repeat = |rank: usize| unsafe {
                gpu.gpu().copy(all.address() + (rank * bytes) as u64, own.address(), bytes);
            };
            return (0..self.size()).for_each(repeat);
        }
        self.queue(Exchange { what, gathers: true, bytes }, gpu, |communicator| {
            // SAFETY: as above.
            unsafe { communicator.all_gather(own.address(), all.address(), count, T::KIND) }
        });
    }

    fn queue(
        &self,
        exchange: Exchange,
        gpu: &Device,
        collective: impl FnOnce(&Communicator) -> Result<(), String>,
    ) {
        let Some(world) = &self.0 else { return };
        let mut calls = lock(&world.calls);
        let what = exchange.what;
        if calls.failure.is_some() || calls.left_out == Some(what) {
            return;
        }
        let communicator = lock(&world.gpu).clone();
        let communicator = communicator
            .filter(|joined| joined.is_of(gpu))
            .unwrap_or_else(|| panic!("{what}: {gpu} has not joined the group"));
        if let Err(reason) = collective(&communicator) {
            calls.failure = Some(world.failed(what, &reason));
        }
        calls.count(exchange, Duration::ZERO); // it runs later
    }

    /// Looks what became of the collectives that were queued on this rank's GPU. One that has failed lets the stream go on with
    /// whatever lies in its buffers.
    ///
    /// # Errors
    /// If a collective has failed.
    pub(crate) fn check_gpu(&self) -> Result<()> {
        let Some(world) = &self.0 else { return Ok(()) };
        let Some(communicator) = self.communicator() else { return Ok(()) };
        if let Some(reason) = communicator.failure() {
            communicator.abort();
            let failure = world.failed("between GPUs", &reason);
            let mut calls = lock(&world.calls);
            calls.failure.get_or_insert(failure);
        }
        self.check()
    }

    /// Pauses between two looks whether a GPU has finished, after so long a wait, in which the other ranks' GPUs may keep it.
    ///
    /// # Errors
    /// If a collective has failed.
    pub(crate) fn pause_for_gpu(&self, waited: Duration) -> Result<()> {
        self.check_gpu()?;
        let Some(world) = &self.0 else { return Ok(()) };
        let Some(communicator) = self.communicator() else { return Ok(()) };
        world.patience.exchange("the GPUs' parts of a step");
        if let Some(sentence) = world.patience.pause(waited) {
            let _ = writeln!(std::io::stderr(), "selfsup: {sentence}");
            communicator.abort();
            self.abort(1);
        }
        Ok(())
    }
}

impl World {
    pub(super) fn failed(&self, what: &str, reason: &str) -> String {
        format!(
            "rank {} of {}: exchanging {what} failed{} ({reason}); resume from the newest checkpoint",
            self.launch.rank,
            self.launch.size,
            self.patience.phase()
        )
    }
}

impl Calls {
    pub(super) fn count(&mut self, exchange: Exchange, time: Duration) {
        let Exchange { what, gathers, bytes } = exchange;
        let bytes = bytes as u64;
        match self.traffic.iter_mut().find(|traffic| traffic.what == what) {
            Some(known) => {
                known.calls += 1;
                known.bytes += bytes;
                known.time += time;
            }
            None => self.traffic.push(super::Traffic { what, gathers, calls: 1, bytes, time }),
        }
    }
}

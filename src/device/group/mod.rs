//! Training in several processes.
//!
//! A launcher (`mpirun`, `srun`, `torchrun`) starts the same program several times. Each process has a rank and its share of
//! every batch; everything that sums over the batch (batch statistics, gathered negatives, Sinkhorn's sums, gradients) goes
//! through a [`Group`], so that N processes compute what one would, up to rounding. The collectives are MPI's, opened at run
//! time when a launcher's variables name more than one process; between GPUs, which [join](Group::join) the group, they are
//! NCCL's. Under `torchrun`, which starts no MPI job, all are NCCL's.
//!
//! Losses and gradients are *means* over the ranks: an operation that is a mean over its own rows needs no change, and only
//! those that couple rows gather.
//!
//! Like a GPU's operations, collectives return no error. The first failure is kept, later calls do nothing, and
//! [`Group::check`], which every step calls, reports it.

mod carrier;
mod gpu;
mod launch;
mod mpi;
mod nccl;
mod over_gpus;
mod patience;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use half::bf16;

use crate::error::{Error, Result};
use carrier::Carrier;
pub use launch::Launch;
use mpi::{Kind, Mpi, Op};
pub(crate) use nccl::{Communicator, Reduction};
use over_gpus::OverGpus;
use patience::Patience;

/// Types whose sums and maxima a [`Group`] computes.
pub trait Reduce: bytemuck::Pod + sealed::Reduce {}

mod sealed {
    use super::{Mpi, Op, Patience, nccl};

    pub trait Reduce: Sized {
        /// The type's number in NCCL.
        const KIND: nccl::Kind;

        fn reduce(
            mpi: &Mpi,
            values: &mut [Self],
            op: Op,
            patience: &Patience,
        ) -> Result<(), String>;
    }
}

macro_rules! reduce {
    ($($type:ty: $kind:ident),*) => {
        $(
            impl Reduce for $type {}
            impl sealed::Reduce for $type {
                const KIND: nccl::Kind = nccl::Kind::$kind;

                fn reduce(mpi: &Mpi, values: &mut [Self], op: Op, patience: &Patience) -> Result<(), String> {
                    // SAFETY: the kind is that of the type.
                    unsafe { mpi.reduce(values, Kind::$kind, op, patience) }
                }
            }
        )*
    };
}
reduce!(f32: F32, f64: F64, i32: I32, u64: U64);

impl Reduce for bf16 {}
impl sealed::Reduce for bf16 {
    const KIND: nccl::Kind = nccl::Kind::Bf16;

    /// MPI has no bf16: reduced in f32 and rounded once.
    fn reduce(mpi: &Mpi, values: &mut [Self], op: Op, patience: &Patience) -> Result<(), String> {
        let mut wide: Vec<f32> = values.iter().map(|v| v.to_f32()).collect();
        f32::reduce(mpi, &mut wide, op, patience)?;
        values.iter_mut().zip(wide).for_each(|(v, wide)| *v = bf16::from_f32(wide));
        Ok(())
    }
}

/// The processes that share one batch.
#[derive(Clone, Debug, Default)]
pub struct Group(Option<Arc<World>>);

/// All processes that a launcher started together.
struct World {
    carrier: Carrier,
    launch: Launch,
    /// The connection of this rank's GPU, once it has joined.
    gpu: Mutex<Option<Arc<Communicator>>>,
    /// Held during a call: MPI takes one at a time.
    calls: Mutex<Calls>,
    patience: Patience,
}

/// What became of the collectives so far.
#[derive(Default)]
struct Calls {
    /// The first failure.
    failure: Option<String>,
    traffic: Vec<Traffic>,
    /// The collective that tests leave out.
    left_out: Option<&'static str>,
}

/// The collectives of one name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traffic {
    /// What crossed the ranks.
    pub what: &'static str,
    /// Whether it was gathered; otherwise it was reduced or broadcast.
    pub gathers: bool,
    /// Number of calls.
    pub calls: u64,
    /// Bytes of this rank's values.
    pub bytes: u64,
    /// Time in the calls, waiting for other ranks included.
    pub time: Duration,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {}", self.launch.rank, self.launch.size)
    }
}

/// The group that this process was launched in: MPI is initialised once.
static LAUNCHED: OnceLock<Result<Group, String>> = OnceLock::new();

impl Group {
    /// A group of one process.
    pub fn alone() -> Self {
        Self::default()
    }

    /// This process as the first of `ranks` that do not exist: exchanges are counted ([`Group::traffic`]) and find what this rank has
    /// in all others, too. For the host's devices.
    pub fn imagined(ranks: usize) -> Self {
        Self::of(Carrier::None, Launch::imagined(ranks), Patience::default())
    }

    /// The processes that a launcher started together with this one; a group of one if it was started alone. The first call
    /// opens and initialises MPI, or under `torchrun` NCCL.
    ///
    /// # Errors
    /// If a launcher started several processes and they cannot find each other: no MPI library, or one that belongs to another
    /// launcher; under `torchrun` no GPU for each, no NCCL, or no address in `NCCL_COMM_ID`.
    pub fn launched() -> Result<Self> {
        LAUNCHED.get_or_init(Self::open).clone().map_err(Error::Device)
    }

    /// The group that [`Group::launched`] returned, if it was called and succeeded.
    pub fn opened() -> Option<Self> {
        LAUNCHED.get()?.clone().ok()
    }

    fn open() -> Result<Self, String> {
        let Some(launch) = Launch::detect() else { return Ok(Self::alone()) };
        let patience = Patience::new()?;
        if launch.by == launch::TORCHRUN {
            let patience = patience.of_rank(launch.rank);
            let gpus = OverGpus::open(&launch, &patience)
                .map_err(|e| format!("torchrun started {} processes: {e}", launch.size))?;
            return Ok(Self::of(Carrier::Gpus(gpus), launch, patience));
        }
        let mut mpi = Mpi::open(launch.abi)
            .map_err(|e| format!("{} started {} processes, but {e}", launch.by, launch.size))?;
        let [rank, size] = mpi.init()?;
        if size != launch.size {
            return Err(format!(
                "{} started {} processes, and {} ({}) counts {size}: launcher and library belong to different MPIs; start with the \
                 library's own mpirun, or set SELFSUP_MPI to the launcher's library",
                launch.by,
                launch.size,
                mpi.version(),
                mpi.path.display()
            ));
        }
        mpi.agree_on_cores(launch.shares_cores(), &patience)?;
        let launch = Launch { rank, ..launch };
        Ok(Self::of(Carrier::Mpi(mpi), launch, patience.of_rank(rank)))
    }

    fn of(carrier: Carrier, launch: Launch, patience: Patience) -> Self {
        let (gpu, calls) = (Mutex::default(), Mutex::default());
        Self(Some(Arc::new(World { carrier, launch, gpu, calls, patience })))
    }

    /// The rank of this process, in `0..size`.
    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |world| world.launch.rank)
    }

    /// The number of processes.
    pub fn size(&self) -> usize {
        self.0.as_ref().map_or(1, |world| world.launch.size)
    }

    /// Whether this process is the one that writes files and speaks to the user.
    pub fn leads(&self) -> bool {
        self.rank() == 0
    }

    /// How the processes were started; `None` for a group of one.
    pub fn launch(&self) -> Option<&Launch> {
        self.0.as_ref().map(|world| &world.launch)
    }

    /// Replaces `values` by their sum over the ranks; every rank has as many. `what` names them in messages, here and below.
    pub fn all_reduce_sum<T: Reduce>(&self, what: &'static str, values: &mut [T]) {
        self.call(Exchange::of(what, size_of_val(values)), |carrier, patience| {
            carrier.reduce(values, Op::Sum, patience)
        });
    }

    /// Replaces `values` by their maximum over the ranks.
    pub fn all_reduce_max<T: Reduce>(&self, what: &'static str, values: &mut [T]) {
        self.call(Exchange::of(what, size_of_val(values)), |carrier, patience| {
            carrier.reduce(values, Op::Max, patience)
        });
    }

    /// Returns the mean of a number over the ranks.
    pub fn mean(&self, what: &'static str, value: f64) -> f64 {
        let mut sum = [value];
        self.all_reduce_sum(what, &mut sum);
        if self.leaves_out(what) { value } else { sum[0] / self.size() as f64 }
    }

    /// Gathers the values of every rank, in rank order; every rank has as many. Returns `None` in a group of one, where `own`
    /// are all the values.
    pub fn all_gather<T: bytemuck::Pod>(&self, what: &'static str, own: &[T]) -> Option<Vec<T>> {
        let size = self.0.as_ref()?.launch.size;
        if self.leaves_out(what) {
            return Some(own.repeat(size));
        }
        let mut all = own.repeat(size);
        let (from, to) = (bytemuck::cast_slice(own), bytemuck::cast_slice_mut(&mut all));
        let exchange = Exchange { what, gathers: true, bytes: size_of_val(own) };
        self.call(exchange, |carrier, patience| carrier.gather(from, to, size, patience));
        Some(all)
    }

    /// Gathers bytes of any length from every rank, in rank order.
    pub fn all_gather_bytes(&self, what: &'static str, own: &[u8]) -> Vec<Vec<u8>> {
        let Some(lengths) = self.all_gather(what, &[own.len() as u64]) else {
            return vec![own.to_vec()];
        };
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut padded = own.to_vec();
        padded.resize(longest, 0);
        let all = self.all_gather(what, &padded).unwrap_or_default();
        let part =
            |(rank, &length): (usize, &u64)| all[rank * longest..][..length as usize].to_vec();
        lengths.iter().enumerate().map(part).collect()
    }

    /// Gathers the values of every rank, in rank order; each may have another number.
    pub fn all_gather_rows<T: bytemuck::Pod>(&self, what: &'static str, own: Vec<T>) -> Vec<T> {
        let Some(lengths) = self.all_gather(what, &[own.len() as u64]) else { return own };
        let longest = lengths.iter().copied().max().unwrap_or(0) as usize;
        let mut padded = own;
        padded.resize(longest, T::zeroed());
        let mut all = self.all_gather(what, &padded).unwrap_or_default();
        let mut end = 0;
        for (rank, &length) in lengths.iter().enumerate() {
            all.copy_within(rank * longest..rank * longest + length as usize, end);
            end += length as usize;
        }
        all.truncate(end);
        all
    }

    /// This rank's share of `count` things that lie in order: a part of equal length, or one longer, in rank order.
    pub fn share(&self, count: usize) -> Range<usize> {
        let from = |rank: usize| (rank as u128 * count as u128 / self.size() as u128) as usize;
        from(self.rank())..from(self.rank() + 1)
    }

    /// Replaces `values` by those of rank 0; every rank has as many.
    pub fn broadcast<T: bytemuck::Pod>(&self, what: &'static str, values: &mut [T]) {
        let bytes = bytemuck::cast_slice_mut(values);
        let exchange = Exchange::of(what, bytes.len());
        self.call(exchange, |carrier, patience| carrier.broadcast(bytes, patience));
    }

    /// Returns rank 0's bytes, of any length.
    pub fn broadcast_bytes(&self, what: &'static str, own: Vec<u8>) -> Vec<u8> {
        let mut length = [own.len() as u64];
        self.broadcast(what, &mut length);
        let mut bytes = own;
        bytes.resize(length[0] as usize, 0);
        self.broadcast(what, &mut bytes);
        bytes
    }

    /// Waits until every rank has come here.
    pub fn barrier(&self, what: &'static str) {
        self.call(Exchange::of(what, 0), Carrier::barrier);
    }

    /// Reports the first failure of a collective, after which all later ones have done nothing.
    ///
    /// # Errors
    /// If one failed.
    pub fn check(&self) -> Result<()> {
        let Some(world) = &self.0 else { return Ok(()) };
        match &lock(&world.calls).failure {
            None => Ok(()),
            Some(failure) => Err(Error::Device(failure.clone())),
        }
    }

    /// Returns `own` if every rank's is good; otherwise an error on every rank. Of the ranks that failed, the first gets its own
    /// error and all others [`Error::Elsewhere`], so that a fault is reported once. What ends a run in order ([`Error::Stopped`],
    /// [`Error::Diverged`]) all ranks get alike.
    ///
    /// # Errors
    /// If a rank failed, or a collective did.
    pub fn together<T>(&self, own: Result<T>) -> Result<T> {
        const WHAT: &str = "whether a rank failed";
        let kind: u64 = match &own {
            Ok(_) => 0,
            Err(Error::Stopped(_)) => 1,
            Err(Error::Diverged(_)) => 2,
            Err(_) => 3,
        };
        let kinds = self.all_gather(WHAT, &[kind]).unwrap_or_default();
        self.check()?;
        let Some(first) = kinds.iter().position(|&kind| kind > 0) else { return own };
        if kinds[first] == 3 {
            return if first == self.rank() { own } else { Err(Error::Elsewhere(first)) };
        }
        let reason = match &own {
            Err(Error::Stopped(reason) | Error::Diverged(reason)) => reason.as_bytes(),
            _ => &[],
        };
        let reasons = self.all_gather_bytes(WHAT, reason);
        self.check()?;
        let reason = String::from_utf8_lossy(&reasons[first]).into_owned();
        Err(if kinds[first] == 1 { Error::Stopped(reason) } else { Error::Diverged(reason) })
    }

    /// The collectives since the start or the last call, by name.
    pub fn traffic(&self) -> Vec<Traffic> {
        let Some(world) = &self.0 else { return Vec::new() };
        std::mem::take(&mut lock(&world.calls).traffic)
    }

    /// Leaves out the collectives of this name from now on, on all ranks: reductions leave each rank its own values, and gathers
    /// repeat them. For tests, to which a collective that changes nothing is one that is not tested.
    #[doc(hidden)]
    pub fn leave_out(&self, what: Option<&'static str>) {
        if let Some(world) = &self.0 {
            lock(&world.calls).left_out = what;
        }
    }

    fn leaves_out(&self, what: &str) -> bool {
        self.0.as_ref().is_some_and(|world| lock(&world.calls).left_out == Some(what))
    }

    /// Names what the ranks are doing, for the sentence of a rank that waits for another in vain.
    pub fn enter(&self, phase: &str) {
        if let Some(world) = &self.0 {
            world.patience.enter(phase);
        }
    }

    /// Leaves in order, once every rank does. No collective may follow. Runs on a GPU must have been dropped: their captured steps
    /// exchange numbers.
    pub fn leave(&self) {
        if let Some(world) = &self.0 {
            drop(lock(&world.gpu).take());
            match &world.carrier {
                Carrier::None => {}
                Carrier::Mpi(mpi) => mpi.finalize(),
                Carrier::Gpus(gpus) => gpus.leave(),
            }
        }
    }

    /// Ends all ranks at once, after a failure of this one.
    pub fn abort(&self, code: u8) {
        if let Some(world) = &self.0 {
            if let Some(communicator) = self.communicator() {
                communicator.abort();
            }
            match &world.carrier {
                Carrier::None => {}
                Carrier::Mpi(mpi) => mpi.abort(code.into()),
                Carrier::Gpus(gpus) => {
                    gpus.abort();
                    std::process::exit(code.into()); // the launcher ends the others
                }
            }
        }
    }

    fn call(
        &self,
        exchange: Exchange,
        collective: impl FnOnce(&Carrier, &Patience) -> Result<(), String>,
    ) {
        let Some(world) = &self.0 else { return };
        let mut calls = lock(&world.calls);
        if calls.failure.is_some() || calls.left_out == Some(exchange.what) {
            return;
        }
        let begin = Instant::now();
        world.patience.exchange(exchange.what);
        // Over GPUs after the work of the compute stream, with its own collectives.
        let settled = match (&world.carrier, self.communicator()) {
            (Carrier::Gpus(_), Some(joined)) => joined.settle(&world.patience),
            _ => Ok(()),
        };
        if let Err(reason) = settled.and_then(|()| collective(&world.carrier, &world.patience)) {
            calls.failure = Some(world.failed(exchange.what, &reason));
        }
        calls.count(exchange, begin.elapsed());
    }
}

/// One collective.
#[derive(Clone, Copy)]
struct Exchange {
    what: &'static str,
    gathers: bool,
    /// Of this rank's values.
    bytes: usize,
}

impl Exchange {
    /// A reduction or a broadcast.
    fn of(what: &'static str, bytes: usize) -> Self {
        Self { what, gathers: false, bytes }
    }
}

/// Describes the machine's MPI and NCCL libraries, or says what is missing.
pub fn mpi() -> Vec<String> {
    mpi::describe().into_iter().chain([nccl::describe()]).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

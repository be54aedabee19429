//! What a launcher says about its processes, in environment variables.

use super::mpi::Abi;
use super::over_gpus::MEETING;

/// The variables of one launcher.
struct Launcher {
    name: &'static str,
    size: &'static str,
    rank: &'static str,
    /// Rank among the processes of the machine, and their number.
    local: [&'static str; 2],
    /// A variable that must exist as well, for launchers whose other variables are too common to mean anything.
    mark: Option<&'static str>,
    /// The MPI library that the launcher belongs to, if it belongs to one.
    abi: Option<Abi>,
}

/// In this order, because `mpirun` and `mpiexec` inside a Slurm allocation also pass on Slurm's variables, which then count the
/// machines. Slurm sets those of a step only for processes that `srun` started, not for the batch script.
const LAUNCHERS: &[Launcher] = &[
    Launcher {
        name: "mpirun (Open MPI)",
        size: "OMPI_COMM_WORLD_SIZE",
        rank: "OMPI_COMM_WORLD_RANK",
        local: ["OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"],
        mark: None,
        abi: Some(Abi::OpenMpi),
    },
    Launcher {
        name: "mpiexec (Hydra)",
        size: "PMI_SIZE",
        rank: "PMI_RANK",
        local: ["MPI_LOCALRANKID", "MPI_LOCALNRANKS"],
        mark: None,
        abi: Some(Abi::Mpich),
    },
    Launcher {
        name: "srun",
        size: "SLURM_STEP_NUM_TASKS",
        rank: "SLURM_PROCID",
        local: ["SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"],
        mark: None,
        abi: None,
    },
    Launcher {
        name: TORCHRUN,
        size: "WORLD_SIZE",
        rank: "RANK",
        local: ["LOCAL_RANK", "LOCAL_WORLD_SIZE"],
        mark: Some("TORCHELASTIC_RUN_ID"),
        abi: None,
    },
];

/// The launcher whose processes are no MPI job: they meet at the address of its variables.
pub(super) const TORCHRUN: &str = "torchrun";

/// How a launcher started this process and others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The launcher.
    pub by: &'static str,
    /// The number of processes, at least 2.
    pub size: usize,
    /// The rank of this process, in `0..size`.
    pub rank: usize,
    /// The rank among the processes of this machine, if the launcher says so.
    pub local_rank: Option<usize>,
    /// The number of processes on this machine, if the launcher says so.
    pub on_machine: Option<usize>,
    pub(super) abi: Option<Abi>,
}

impl Launch {
    /// Returns how this process was started; `None` if it was started alone.
    pub fn detect() -> Option<Self> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    /// Where the ranks' NCCL meets, as `NCCL_COMM_ID` says it, if the launcher starts no MPI job and that variable is not set. The
    /// processes of `torchrun` have an address, but the port may be the one of its own store; the next one is then taken.
    pub(crate) fn meeting(&self) -> Option<String> {
        Self::meeting_from(self.by, |name| std::env::var(name).ok())
    }

    fn meeting_from(by: &str, variable: impl Fn(&str) -> Option<String>) -> Option<String> {
        if by != TORCHRUN || variable(MEETING).is_some_and(|address| !address.is_empty()) {
            return None;
        }
        let host = variable("MASTER_ADDR")?;
        let port: u16 = variable("MASTER_PORT")?.trim().parse().ok()?;
        let store = variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|used| used == "True");
        let port = if store { port.checked_add(1).unwrap_or(port - 1) } else { port };
        // A numeric address of IPv6 has colons of its own.
        Some(if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") })
    }

    /// Processes that do not exist.
    pub(super) fn imagined(size: usize) -> Self {
        Self { by: "nothing", size, rank: 0, local_rank: None, on_machine: None, abi: None }
    }

    /// Threads of a rank for which the user gave no number: the cores that the launcher bound it to, or else its share of the
    /// machine's.
    pub fn threads(&self) -> usize {
        let allowed = std::thread::available_parallelism().map_or(1, usize::from);
        if allowed < cores() { allowed } else { (allowed / self.on_machine.unwrap_or(1)).max(1) }
    }

    /// The number of this rank's GPU on a machine with `count`: that of its rank among those of the machine, or the only one, as a
    /// launcher may show each rank no other. Fails if there are too few; that several ranks share the only one is for
    /// [`Group::join`](super::Group::join) to find.
    pub(crate) fn gpu(&self, count: usize) -> Result<usize, String> {
        match self.local_rank.unwrap_or(self.rank) {
            _ if count == 1 => Ok(0),
            local if local < count => Ok(local),
            local => Err(format!(
                "there are more ranks than GPUs: this is rank {} of {}, number {local} on its machine, which has {count} GPUs; start one \
                 rank for each",
                self.rank, self.size
            )),
        }
    }

    /// Whether there are more ranks on this machine than cores.
    pub(super) fn shares_cores(&self) -> bool {
        self.on_machine.is_some_and(|ranks| ranks > cores())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let number = |name: &str| variable(name)?.trim().parse::<usize>().ok();
        let launcher = LAUNCHERS.iter().find(|launcher| {
            let marked = launcher.mark.is_none_or(|mark| variable(mark).is_some());
            marked && number(launcher.size).is_some() && number(launcher.rank).is_some()
        })?;
        let (size, rank) = (number(launcher.size)?, number(launcher.rank)?);
        (size > 1).then(|| Self {
            by: launcher.name,
            size,
            rank,
            local_rank: number(launcher.local[0]),
            on_machine: number(launcher.local[1]).filter(|&count| count > 0),
            abi: launcher.abi,
        })
    }
}

/// Cores of the machine.
fn cores() -> usize {
    #[cfg(unix)]
    // SAFETY: asks the system for a number.
    return usize::try_from(unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) }).unwrap_or(1);
    #[cfg(not(unix))]
    std::thread::available_parallelism().map_or(1, usize::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(variables: &[(&str, &str)]) -> Option<Launch> {
        let found = |name: &str| variables.iter().find(|(known, _)| *known == name);
        Launch::from_variables(|name| found(name).map(|(_, value)| (*value).into()))
    }

    #[test]
    fn launchers_are_told_apart_by_their_variables() {
        let slurm = [("SLURM_STEP_NUM_TASKS", "4"), ("SLURM_PROCID", "3")];
        let hydra = [("PMI_SIZE", "2"), ("PMI_RANK", "1"), ("MPI_LOCALNRANKS", "2")];
        let open = [("OMPI_COMM_WORLD_SIZE", "8"), ("OMPI_COMM_WORLD_RANK", "5")];
        let seen = |variables: &[(&str, &str)]| {
            detect(variables).map(|launch| (launch.by, launch.rank, launch.size, launch.on_machine))
        };
        assert_eq!(seen(&slurm), Some(("srun", 3, 4, None)));
        assert_eq!(seen(&hydra), Some(("mpiexec (Hydra)", 1, 2, Some(2))));
        assert_eq!(seen(&open), Some(("mpirun (Open MPI)", 5, 8, None)));
        // Inside an allocation Slurm's variables are those of the launcher's own helpers.
        assert_eq!(seen(&[slurm.as_slice(), &hydra].concat()).unwrap().0, "mpiexec (Hydra)");
        // Too common to mean a launcher by themselves.
        let torch = [("WORLD_SIZE", "2"), ("RANK", "0")];
        assert_eq!(seen(&torch), None);
        let marked = [torch.as_slice(), &[("TORCHELASTIC_RUN_ID", "none")]].concat();
        assert_eq!(seen(&marked), Some(("torchrun", 0, 2, None)));
    }

    #[test]
    fn ranks_of_torchrun_meet_beside_its_store() {
        let meeting = |by: &str, variables: &[(&str, &str)]| {
            let found = |name: &str| variables.iter().find(|(known, _)| *known == name);
            Launch::meeting_from(by, |name| found(name).map(|(_, value)| (*value).into()))
        };
        let address = [("MASTER_ADDR", "node7"), ("MASTER_PORT", "29500")];
        let stored = [address.as_slice(), &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert_eq!(meeting(TORCHRUN, &address).as_deref(), Some("node7:29500"));
        assert_eq!(meeting(TORCHRUN, &stored).as_deref(), Some("node7:29501"));
        let given = [stored.as_slice(), &[("NCCL_COMM_ID", "node7:4000")]].concat();
        assert_eq!(meeting(TORCHRUN, &given), None);
        assert_eq!(meeting("srun", &stored), None);
        let numeric = [("MASTER_ADDR", "fe80::1"), ("MASTER_PORT", "65535")];
        let numeric = [numeric.as_slice(), &stored[2..]].concat();
        assert_eq!(meeting(TORCHRUN, &numeric).as_deref(), Some("[fe80::1]:65534"));
        assert_eq!(meeting(TORCHRUN, &[("MASTER_ADDR", "node7"), ("MASTER_PORT", "many")]), None);
    }

    #[test]
    fn a_rank_takes_the_gpu_of_its_number_on_the_machine() {
        let launch = |local: &str| {
            let variables = [("RANK", "9"), ("LOCAL_RANK", local), ("TORCHELASTIC_RUN_ID", "none")];
            detect(&[variables.as_slice(), &[("WORLD_SIZE", "16")]].concat()).unwrap()
        };
        assert_eq!(launch("1").gpu(8), Ok(1));
        assert_eq!(launch("1").gpu(1), Ok(0));
        let few = launch("5").gpu(4).unwrap_err();
        assert!(
            few.starts_with("there are more ranks than GPUs: this is rank 9 of 16, number 5"),
            "{few}"
        );
    }

    #[test]
    fn one_process_is_alone_under_any_launcher() {
        assert_eq!(detect(&[]), None);
        assert_eq!(detect(&[("PMI_SIZE", "1"), ("PMI_RANK", "0")]), None);
        assert_eq!(detect(&[("PMI_SIZE", "many"), ("PMI_RANK", "0")]), None);
    }
}

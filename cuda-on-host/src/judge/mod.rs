//! Whether a kernel is right and safe, and whether its case would notice if it were not.
//!
//! **Right**: the error against the reference at every size, with new random inputs at every launch, poisoned outputs and guard
//! bytes; NaN passes nothing. **Safe**: no race, no uninitialised, out-of-bounds or misaligned access, no divergent barrier, over
//! many seeded schedules. **Tested**: which mutants of the kernel the case does not notice.

mod case;
mod expression;
mod mutants;
mod random;
mod runner;

/// A kernel and its case, to start from.
pub mod example {
    /// The source: sums of rows, by shuffles.
    pub const KERNEL: &str = include_str!("example/row_sum.cu");
    /// Its case.
    pub const CASE: &str = include_str!("example/row_sum.toml");
}

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

pub use case::{ArgumentCase, Bound, Case, Expression, LaunchCase, ReferenceCase, Triple};
pub use case::{decode, encode, read_values};
pub use expression::{Sizes, evaluate};
pub use mutants::{Mutant, mutants};
use runner::Runner;

use crate::device::Device;
use crate::host::{Build, Host};
use crate::source::{Element, Signature, Unknown, for_the_host, kernels};

/// An operand of a primitive.
#[derive(Clone, Debug)]
pub struct Operand {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, as the kernel gets them.
    pub values: Vec<f64>,
}

/// Computes an operation in f64: name, operands, and numbers such as `stride`. The results are in the order of the outputs.
pub type Primitives<'p> =
    &'p (dyn Fn(&str, &[Operand], &BTreeMap<String, f64>) -> Result<Vec<Vec<f64>>, String> + Sync);

/// How much is tried.
#[derive(Clone, Debug)]
pub struct Options {
    /// Schedules at the given sizes; others get two.
    pub schedules: u64,
    /// Only these sizes, if given.
    pub at: Option<Sizes>,
    /// Only the schedule of this seed, if given.
    pub seed: Option<u64>,
    /// How long a launch may take.
    pub patience: Duration,
    /// Whether the first finding ends it.
    pub first: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            schedules: 10,
            at: None,
            seed: None,
            patience: Duration::from_secs(60),
            first: false,
        }
    }
}

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aspect {
    /// The results.
    Right,
    /// How it gets them.
    Safe,
}

/// A fault of the kernel.
#[derive(Clone, Debug)]
pub struct Finding {
    /// Whether the kernel is wrong or unsafe.
    pub aspect: Aspect,
    /// What happened, with kernel, block, thread and line where known.
    pub what: String,
    /// The sizes at which it happened.
    pub sizes: Sizes,
    /// The seed of the schedule and the inputs.
    pub seed: u64,
    /// How often it happened.
    pub times: usize,
}

/// What the launch at the given sizes takes, for an estimate of its speed.
#[derive(Clone, Copy, Debug, Default)]
pub struct Footprint {
    /// Blocks of the launch.
    pub blocks: u64,
    /// Threads of a block.
    pub threads: u64,
    /// Bytes of dynamic shared memory of a block.
    pub shared: u64,
    /// Bytes of all tensors, each once.
    pub bytes: f64,
}

/// The result for one kernel.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Launches made.
    pub launches: usize,
    /// Launches whose results were compared: a launch that breaks a rule has none.
    pub compared: usize,
    /// Sizes tried.
    pub sizes: usize,
    /// The largest error of all launches, as a share of the largest magnitude.
    pub error: f64,
    /// The largest error that passes.
    pub tolerance: f64,
    /// Faults, the first of each kind.
    pub findings: Vec<Finding>,
    /// What one launch takes.
    pub footprint: Footprint,
}

impl Verdict {
    /// Whether no finding is about this; a kernel that never came to an end is not right.
    pub fn is(&self, aspect: Aspect) -> bool {
        let known = aspect == Aspect::Safe || self.compared > 0;
        known && self.findings.iter().all(|finding| finding.aspect != aspect)
    }

    fn found(&mut self, aspect: Aspect, what: String, sizes: &Sizes, seed: u64) {
        let key = |what: &str| kind(what);
        match self.findings.iter_mut().find(|f| f.aspect == aspect && key(&f.what) == key(&what)) {
            Some(known) => known.times += 1,
            None => {
                self.findings.push(Finding { aspect, what, sizes: sizes.clone(), seed, times: 1 })
            }
        }
    }
}

/// The kind of a fault: its word and its line.
fn kind(what: &str) -> (String, String) {
    const WORDS: [&str; 9] = [
        "race",
        "uninitialised",
        "out of bounds",
        "misaligned",
        "divergent",
        "collective",
        "never written",
        "past the end",
        "should be",
    ];
    let word = WORDS.iter().find(|word| what.contains(**word)).copied().unwrap_or(what);
    let line = what.rsplit_once('(').map_or("", |(_, rest)| rest);
    (word.to_owned(), if word == "should be" { String::new() } else { line.to_owned() })
}

/// What became of a mutant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The case notices it.
    Killed(String),
    /// It does not.
    Survived,
    /// It is no program.
    DoesNotCompile,
}

/// A kernel with its case.
#[derive(Debug)]
pub struct Judge<'h> {
    host: &'h Host,
    path: PathBuf,
    source: String,
    signature: Signature,
    case: Case,
    /// The folder of the case, for its files.
    folder: PathBuf,
}

impl<'h> Judge<'h> {
    /// Reads a kernel and its case.
    ///
    /// # Errors
    /// A sentence that names the file, if it cannot be read or the two do not fit.
    pub fn new(host: &'h Host, source: &Path, case: &Path) -> Result<Self, String> {
        let read =
            |path: &Path| fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()));
        let (text, description) = (read(source)?, read(case)?);
        let in_case = |why: String| format!("{}: {why}", case.display());
        let parsed = Case::parse(&description).map_err(in_case)?;
        let signature = pick(&text, parsed.kernel.as_deref(), source)?;
        parsed.bind(&signature).map_err(in_case)?;
        let folder = case.parent().unwrap_or(Path::new("")).to_owned();
        Ok(Self { host, path: source.to_owned(), source: text, signature, case: parsed, folder })
    }

    /// The kernel's name.
    pub fn kernel(&self) -> &str {
        &self.signature.name
    }

    /// Checks that sizes to judge at are those of the case.
    ///
    /// # Errors
    /// A sentence that names the first one that is not.
    pub fn check_sizes(&self, at: &Sizes) -> Result<(), String> {
        match at.keys().find(|name| !self.case.sizes.contains_key(*name)) {
            None => Ok(()),
            Some(name) => {
                let known: Vec<&str> = self.case.sizes.keys().map(String::as_str).collect();
                Err(format!("`{name}` is no size of the case; its sizes are {}", known.join(", ")))
            }
        }
    }

    /// What the host does not know of the source: with any of it the kernel cannot run.
    pub fn unknown(&self) -> Vec<Unknown> {
        for_the_host(&self.source).unknown
    }

    /// What the launch at the given sizes takes.
    ///
    /// # Errors
    /// A sentence, if the case does not fit.
    pub fn footprint(&self) -> Result<Footprint, String> {
        let sizes = &self.case.sizes;
        let launch = self.case.launch.at(sizes, 0)?;
        let product = |sizes: [u32; 3]| sizes.iter().map(|&size| u64::from(size)).product();
        let mut bytes = 0.0;
        for bound in self.case.bind(&self.signature)?.iter().filter(|bound| bound.argument.pointer)
        {
            bytes += (bound.shape(sizes)?.iter().product::<usize>() * bound.argument.element.size())
                as f64;
        }
        Ok(Footprint {
            blocks: product(launch.grid),
            threads: product(launch.block),
            shared: u64::from(launch.shared),
            bytes,
        })
    }

    /// Judges the kernel.
    ///
    /// # Errors
    /// A sentence, if it does not compile for the host, or the case or the reference fails.
    pub fn run(&self, options: &Options, primitives: Primitives<'_>) -> Result<Verdict, String> {
        self.run_source(&self.source, options, primitives)
    }

    fn run_source(
        &self,
        source: &str,
        options: &Options,
        primitives: Primitives<'_>,
    ) -> Result<Verdict, String> {
        let folder = self.host.new_folder()?;
        let outcome = self.run_in(&folder, source, options, primitives);
        let _ = fs::remove_dir_all(&folder); // what stays there is a few files of a cache
        outcome
    }

    fn run_in(
        &self,
        folder: &Path,
        source: &str,
        options: &Options,
        primitives: Primitives<'_>,
    ) -> Result<Verdict, String> {
        let library = folder.join("kernel.so");
        self.compile(&self.path, source, &library)?;
        let reference = &self.case.reference;
        let other = match (&reference.kernel, &reference.file) {
            (Some(name), file) => {
                let path = file.as_ref().map_or(self.path.clone(), |file| self.folder.join(file));
                let text =
                    fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))?;
                let signature = pick(&text, Some(name), &path)?;
                if signature.arguments != self.signature.arguments {
                    return Err(format!(
                        "the reference `{name}` takes other arguments than `{}`",
                        self.kernel()
                    ));
                }
                // In a library of its own, so that a mutant of the kernel leaves its helpers alone.
                let library = folder.join("reference.so");
                self.compile(&path, &text, &library)?;
                Some(Device::new(self.host, &library, options.patience)?)
            }
            (None, Some(_)) => return Err("`file` names the source of a reference `kernel`".into()),
            (None, None) => None,
        };
        let mut runner = Runner {
            judge: self,
            primitives,
            library,
            patience: options.patience,
            device: None,
            other,
            bound: self.case.bind(&self.signature)?,
            verdict: Verdict {
                tolerance: self.tolerance(),
                footprint: self.footprint()?,
                ..Verdict::default()
            },
        };
        let all = match &options.at {
            None => self.case.all_sizes(),
            Some(at) => vec![
                self.case
                    .sizes
                    .iter()
                    .map(|(name, &size)| (name.clone(), *at.get(name).unwrap_or(&size)))
                    .collect(),
            ],
        };
        for (i, sizes) in all.iter().enumerate() {
            runner.verdict.sizes += 1;
            let schedules = if i == 0 { options.schedules } else { options.schedules.min(2) };
            let seeds = match options.seed {
                Some(seed) => seed..=seed,
                None => 1..=schedules,
            };
            for seed in seeds {
                runner.launch(sizes, seed)?;
                if options.first && !runner.verdict.findings.is_empty() {
                    return Ok(runner.verdict);
                }
            }
        }
        Ok(runner.verdict)
    }

    fn compile(&self, path: &Path, source: &str, library: &Path) -> Result<(), String> {
        let signatures =
            kernels(source).map_err(|u| format!("{}:{}: {}", path.display(), u.line, u.what))?;
        let rewritten = for_the_host(source);
        if let Some(unknown) = rewritten.unknown.first() {
            return Err(format!(
                "{}:{}: the host does not know {}",
                path.display(),
                unknown.line,
                unknown.what
            ));
        }
        let checked = Build { checked: true, foreign: true };
        self.host
            .compile(path, &rewritten.text, &signatures, checked, library)
            .map_err(|why| format!("{} does not compile for the host: {why}", path.display()))
    }

    /// The largest error that passes: the case's, or by the least exact type of an output.
    fn tolerance(&self) -> f64 {
        let by_type = |element: Element| match element {
            Element::F64 => 1e-12,
            Element::F32 => 2e-5,
            Element::Bf16 => 1e-2,
            Element::Int(_) | Element::Unsigned(_) => 0.0,
        };
        let outputs = self.case.argument.iter().filter(|argument| argument.output);
        let elements = outputs.filter_map(|output| {
            self.signature
                .arguments
                .iter()
                .find(|argument| argument.name == output.name)
                .map(|a| a.element)
        });
        let default = elements.map(by_type).fold(0.0, f64::max);
        self.case.reference.tolerance.unwrap_or(default)
    }

    /// Judges every mutant of the source by a shorter run that ends at the first finding.
    ///
    /// # Errors
    /// As [`Judge::run`], and if the kernel itself is not right and safe.
    pub fn mutate(
        &self,
        options: &Options,
        primitives: Primitives<'_>,
    ) -> Result<Vec<(Mutant, Fate)>, String> {
        let brief = Options {
            schedules: options.schedules.min(4),
            first: true,
            patience: Duration::from_secs(10),
            ..options.clone()
        };
        let own = self.run(&brief, primitives)?;
        if let Some(finding) = own.findings.first() {
            return Err(format!(
                "the kernel itself is not right and safe, so its mutants say nothing: {}",
                finding.what
            ));
        }
        let all = mutants(&self.source);
        let (next, fates) = (AtomicUsize::new(0), Mutex::new(vec![Ok(Fate::Survived); all.len()]));
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    while let Some((i, mutant)) = Some(next.fetch_add(1, Ordering::Relaxed))
                        .and_then(|i| all.get(i).map(|mutant| (i, mutant)))
                    {
                        let fate = match self.run_source(&mutant.text, &brief, primitives) {
                            Ok(verdict) => Ok(verdict
                                .findings
                                .into_iter()
                                .next()
                                .map_or(Fate::Survived, |f| Fate::Killed(f.what))),
                            Err(why) if why.contains("does not compile") => {
                                Ok(Fate::DoesNotCompile)
                            }
                            Err(why) => Err(why),
                        };
                        if let Ok(mut fates) = fates.lock() {
                            fates[i] = fate;
                        }
                    }
                });
            }
        });
        let fates = fates.into_inner().map_err(|_| "a thread that ran mutants has panicked")?;
        let fates = fates.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(all.into_iter().zip(fates).collect())
    }
}

/// The kernel of this name, or the only one.
fn pick(source: &str, name: Option<&str>, path: &Path) -> Result<Signature, String> {
    let all = kernels(source).map_err(|u| format!("{}:{}: {}", path.display(), u.line, u.what))?;
    let names = all.iter().map(|signature| signature.name.as_str()).collect::<Vec<_>>().join(", ");
    match name {
        Some(name) => {
            let found = all.iter().find(|signature| signature.name == name).cloned();
            found
                .ok_or_else(|| format!("{} has no kernel `{name}`; it has {names}", path.display()))
        }
        None if all.len() == 1 => Ok(all[0].clone()),
        None if all.is_empty() => Err(format!("{} has no kernel", path.display())),
        None => Err(format!(
            "{} has several kernels: name one as `kernel` in the case ({names})",
            path.display()
        )),
    }
}

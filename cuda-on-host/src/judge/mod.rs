//! Whether a kernel is right and safe, and whether its case would notice if it were not.
//!
//! **Right**: the error against the reference at every size, with new random inputs at every launch, poisoned outputs and guard
//! bytes; NaN passes nothing. **Safe**: no race, no uninitialised, out-of-bounds or misaligned access, no divergent barrier, over
//! many seeded schedules. **Tested**: which mutants of the kernel the case does not notice.

mod case;
mod expression;
mod mutants;
mod random;

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
use random::Random;

use crate::device::{Device, Failure, Tensor, Value, said};
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

/// Launches at sizes, one after another.
struct Runner<'j, 'p> {
    judge: &'j Judge<'j>,
    primitives: Primitives<'p>,
    library: PathBuf,
    patience: Duration,
    /// Started again after a kernel has ended its process.
    device: Option<Device>,
    /// Holds the reference kernel.
    other: Option<Device>,
    bound: Vec<Bound<'j>>,
    verdict: Verdict,
}

impl Runner<'_, '_> {
    /// Launches once with new inputs.
    fn launch(&mut self, sizes: &Sizes, seed: u64) -> Result<(), String> {
        self.verdict.launches += 1;
        let launch = self.judge.case.launch.at(sizes, seed)?;
        let mut random = Random::new(seed ^ (self.verdict.launches as u64) << 32);
        let mut inputs = Vec::new();
        for bound in &self.bound {
            inputs.push(self.values(bound, sizes, &mut random)?);
        }
        let mut device = match self.device.take() {
            Some(device) => device,
            None => Device::new(self.judge.host, &self.library, self.patience)?,
        };
        let (tensors, arguments) = self.upload(&mut device, &inputs, sizes).map_err(said)?;
        let name = self.judge.kernel();
        match device.launch(name, &launch, &arguments) {
            Ok(()) => {}
            Err(Failure::Refused(why)) => {
                return Err(format!("`{name}` cannot be launched: {why}"));
            }
            Err(Failure::Violation(what)) => {
                self.verdict.found(Aspect::Safe, what, sizes, seed);
                self.device = Some(device);
                return Ok(());
            }
            // A fault that the process did not survive: the next launch starts another.
            Err(Failure::Died(what)) => {
                self.verdict.found(Aspect::Safe, format!("kernel `{name}` {what}"), sizes, seed);
                return Ok(());
            }
        }
        self.check_results(&mut device, &tensors, &inputs, sizes, seed)?;
        self.device = Some(device);
        Ok(())
    }

    /// What an argument holds before the launch; `None` if that is nothing.
    fn values(
        &self,
        bound: &Bound<'_>,
        sizes: &Sizes,
        random: &mut Random,
    ) -> Result<Option<Vec<f64>>, String> {
        let of = bound.of;
        if !bound.argument.pointer || (of.output && of.values.is_none()) {
            return Ok(None);
        }
        let shape = bound.shape(sizes)?;
        let count = shape.iter().product();
        let how = of.values.as_deref().unwrap_or(if bound.argument.element.is_float() {
            "uniform"
        } else {
            "integers(0, 100)"
        });
        let values = match how {
            "uniform" => (0..count).map(|_| random.uniform()).collect(),
            "normal" => (0..count).map(|_| random.normal()).collect(),
            "zeros" => vec![0.0; count],
            "ones" => vec![1.0; count],
            _ if how.starts_with("integers(") => {
                let list = how["integers(".len()..]
                    .strip_suffix(')')
                    .and_then(|list| list.split_once(','));
                let (from, to) =
                    list.ok_or_else(|| format!("`{how}`: it is `integers(from, to)`"))?;
                let (from, to) = (evaluate(from, sizes)?, evaluate(to, sizes)?);
                if from >= to {
                    return Err(format!("`{how}`: there is no number from {from} to below {to}"));
                }
                (0..count)
                    .map(|_| (from + random.below((to - from) as u64) as i64) as f64)
                    .collect()
            }
            _ if how.ends_with(".npy") || how.ends_with(".safetensors") => {
                let path = self.judge.folder.join(how);
                let (found, values) = read_values(&path, &bound.argument.name)?;
                if found != shape {
                    return Err(format!(
                        "{} has the shape {found:?}, and `{}` {shape:?}",
                        path.display(),
                        bound.argument.name
                    ));
                }
                values
            }
            _ => {
                return Err(format!(
                    "`{how}`: values are uniform, normal, zeros, ones, integers(from, to), or a .npy or .safetensors file"
                ));
            }
        };
        // As the kernel sees them: rounded to its type.
        Ok(Some(decode(&encode(&values, bound.argument.element), bound.argument.element)))
    }

    /// Allocates and fills the arguments.
    #[allow(clippy::type_complexity)]
    fn upload(
        &self,
        device: &mut Device,
        inputs: &[Option<Vec<f64>>],
        sizes: &Sizes,
    ) -> Result<(Vec<Option<Tensor>>, Vec<Value>), Failure> {
        device.reset()?;
        let (mut tensors, mut arguments) = (Vec::new(), Vec::new());
        for (bound, input) in self.bound.iter().zip(inputs) {
            let element = bound.argument.element;
            if !bound.argument.pointer {
                let bytes = bound.scalar(sizes).map_err(Failure::Refused)?;
                arguments.push(Value::Bytes(bytes));
                tensors.push(None);
                continue;
            }
            let shape = bound.shape(sizes).map_err(Failure::Refused)?;
            let size = shape.iter().product::<usize>() * element.size();
            let tensor = device.allocate(&bound.argument.name, size)?;
            if let Some(values) = input {
                device.write(tensor, &encode(values, element))?;
            }
            tensors.push(Some(tensor));
            arguments.push(Value::Pointer(tensor));
        }
        Ok((tensors, arguments))
    }

    fn check_results(
        &mut self,
        device: &mut Device,
        tensors: &[Option<Tensor>],
        inputs: &[Option<Vec<f64>>],
        sizes: &Sizes,
        seed: u64,
    ) -> Result<(), String> {
        self.verdict.compared += 1;
        let mut outputs = Vec::new();
        for ((bound, tensor), input) in self.bound.iter().zip(tensors).zip(inputs) {
            let Some(tensor) = tensor else { continue };
            let name = &bound.argument.name;
            let (bytes, unwritten) = device.read(*tensor).map_err(said)?;
            if !bound.of.output {
                let before = input.as_ref().map(|values| encode(values, bound.argument.element));
                if before.is_some_and(|before| before != bytes) {
                    let what = format!(
                        "kernel `{}` writes `{name}`, which is no output",
                        self.judge.kernel()
                    );
                    self.verdict.found(Aspect::Safe, what, sizes, seed);
                }
                continue;
            }
            let shape = bound.shape(sizes)?;
            if let Some(at) = unwritten {
                let element = place(at / bound.argument.element.size(), &shape);
                let what = format!("element {element} of `{name}` was never written");
                self.verdict.found(Aspect::Right, what, sizes, seed);
                return Ok(());
            }
            outputs.push((name.clone(), shape, decode(&bytes, bound.argument.element)));
        }
        let exact = self.exact(inputs, sizes)?;
        if exact.len() != outputs.len() {
            return Err(format!(
                "the reference has {} results, and the case {} outputs",
                exact.len(),
                outputs.len()
            ));
        }
        for ((name, shape, found), exact) in outputs.iter().zip(&exact) {
            if found.len() != exact.len() {
                return Err(format!(
                    "the reference of `{name}` has {} elements, and its shape {}",
                    exact.len(),
                    found.len()
                ));
            }
            self.compare(name, shape, found, exact, sizes, seed)?;
        }
        Ok(())
    }

    fn compare(
        &mut self,
        name: &str,
        shape: &[usize],
        found: &[f64],
        exact: &[f64],
        sizes: &Sizes,
        seed: u64,
    ) -> Result<(), String> {
        if exact.iter().any(|value| !value.is_finite()) {
            return Err(format!("the reference of `{name}` is not finite: it cannot judge"));
        }
        let magnitude = exact.iter().fold(0.0_f64, |all, value| all.max(value.abs()));
        let scale = if magnitude > 0.0 { magnitude } else { 1.0 };
        let (mut worst, mut at) = (0.0, 0);
        for (i, (a, b)) in found.iter().zip(exact).enumerate() {
            let error = (a - b).abs() / scale;
            let error = if error.is_nan() { f64::INFINITY } else { error };
            if error > worst {
                (worst, at) = (error, i);
            }
        }
        self.verdict.error = self.verdict.error.max(worst);
        if worst > self.verdict.tolerance {
            let (is, should) = (found[at], exact[at]);
            let element = place(at, shape);
            let error = if worst.is_finite() {
                format!("{worst:.1e} of the largest magnitude")
            } else {
                "not a number".into()
            };
            let what = format!(
                "element {element} of `{name}` is {is} and should be {should} ({error}; {:.0e} passes)",
                self.verdict.tolerance
            );
            self.verdict.found(Aspect::Right, what, sizes, seed);
        }
        Ok(())
    }

    /// The results of the reference.
    fn exact(
        &mut self,
        inputs: &[Option<Vec<f64>>],
        sizes: &Sizes,
    ) -> Result<Vec<Vec<f64>>, String> {
        let reference = &self.judge.case.reference;
        if let Some(mut other) = self.other.take() {
            let name = reference.kernel.as_deref().unwrap_or_default();
            let failed = |why: String| format!("the reference `{name}` fails: {why}");
            let launch =
                reference.launch.as_ref().unwrap_or(&self.judge.case.launch).at(sizes, 1)?;
            let (tensors, arguments) =
                self.upload(&mut other, inputs, sizes).map_err(|f| failed(said(f)))?;
            other.launch(name, &launch, &arguments).map_err(|f| failed(said(f)))?;
            let mut results = Vec::new();
            for (bound, tensor) in self.bound.iter().zip(tensors) {
                if let (true, Some(tensor)) = (bound.of.output, tensor) {
                    let (bytes, unwritten) = other.read(tensor).map_err(|f| failed(said(f)))?;
                    if unwritten.is_some() {
                        return Err(failed(format!(
                            "it leaves a part of `{}` unwritten",
                            bound.argument.name
                        )));
                    }
                    results.push(decode(&bytes, bound.argument.element));
                }
            }
            self.other = Some(other);
            return Ok(results);
        }
        if let Some(path) = &reference.expected {
            let outputs = self.bound.iter().filter(|bound| bound.of.output);
            return outputs
                .map(|bound| {
                    read_values(&self.judge.folder.join(path), &bound.argument.name)
                        .map(|(_, values)| values)
                })
                .collect();
        }
        let mut operands = Vec::new();
        for (bound, input) in self.bound.iter().zip(inputs) {
            let Some(values) = input else { continue };
            let wanted = match &reference.of {
                Some(names) => names.contains(&bound.argument.name),
                None => !bound.of.output,
            };
            if wanted {
                operands.push((
                    bound.argument.name.clone(),
                    Operand { shape: bound.shape(sizes)?, values: values.clone() },
                ));
            }
        }
        if let Some(names) = &reference.of {
            let place = |name: &String| names.iter().position(|known| known == name);
            operands.sort_by_key(|(name, _)| place(name));
            if operands.len() != names.len() {
                return Err("`of` names an argument that is no tensor with values".into());
            }
        }
        let operands: Vec<Operand> = operands.into_iter().map(|(_, operand)| operand).collect();
        let name = reference.primitive.as_deref().unwrap_or_default();
        (self.primitives)(name, &operands, &reference.with)
            .map_err(|why| format!("the primitive `{name}`: {why}"))
    }
}

/// An element's position in a shape.
fn place(mut at: usize, shape: &[usize]) -> String {
    let mut all = Vec::new();
    for &side in shape.iter().rev() {
        all.push((at % side.max(1)).to_string());
        at /= side.max(1);
    }
    all.reverse();
    format!("[{}]", all.join(", "))
}

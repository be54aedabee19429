//! Compiles a folder of kernels.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fs, thread};

use cuda_signatures::Words;

use crate::cache;
use crate::error::{Error, Result};
use crate::kernel::{self, Kernel};
use crate::nvcc::{self, Nvcc, run};
use crate::ptxas::{self, Resources};
use crate::sass::{self, Code};

/// SASS for every 8.x chip, and PTX from which the driver compiles for later chips.
const TARGET: &str = "arch=compute_80,code=[sm_80,compute_80]";

/// What launch functions are written for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Launches {
    /// A module `kernels` that is complete, over the crate `cudarc`: a struct `Kernels` that loads all files into a context and has
    /// a method for each kernel.
    #[default]
    Cudarc,
    /// Free functions over types of the module that includes the generated file, for programs that launch in their own way. That
    /// module has in scope: the structs `File`, `Kernel`, `Resources`, `Mix` and [`Counts`](crate::sass::Counts) with the fields that
    /// the tables name, a tuple struct `Aligned` for images, the pointers `In<'_, T>` and `Out<'_, T>`, a function `argument`
    /// that returns the address of a value as an untyped pointer, and `Launch<'_>` with
    /// `unsafe fn run(&self, kernel: usize, arguments: &[A])`, `A` being what `argument` returns.
    Own,
}

/// A folder of kernels, and how it is compiled.
#[derive(Clone, Debug)]
pub struct Build {
    pub(crate) folder: PathBuf,
    pub(crate) include: Vec<PathBuf>,
    pub(crate) launches: Launches,
    pub(crate) hint: String,
    pub(crate) required: bool,
    flags: Vec<String>,
    targets: Vec<String>,
    own_targets: Vec<(String, Vec<String>)>,
    words: Words,
    oldest: (u32, u32),
    local_memory: Option<Vec<(String, String)>>,
}

/// What a build made.
#[derive(Clone, Debug)]
pub struct Kernels {
    /// The compiler, as it names itself; `None` without nvcc.
    pub compiler: Option<String>,
    /// The files of the folder, by name.
    pub files: Vec<File>,
    /// What a user should see: compiler warnings, missing tools.
    pub warnings: Vec<String>,
}

/// A kernel file.
#[derive(Clone, Debug)]
pub struct File {
    /// The file name without folder and extension.
    pub name: String,
    /// Its path.
    pub path: PathBuf,
    /// What it is compiled for, in nvcc's words: `sm_80` for machine code, `compute_80` for PTX.
    pub targets: Vec<String>,
    /// Its kernels, in order.
    pub kernels: Vec<Kernel>,
    /// nvcc's output; `None` without nvcc.
    pub fatbin: Option<PathBuf>,
    /// What its kernels use on each chip.
    pub resources: Vec<Resources>,
    /// The instructions of its kernels on each chip; empty without a disassembler.
    pub code: Vec<Code>,
    /// As after `-gencode=`.
    gencode: Vec<String>,
}

impl Build {
    /// Every file of the folder that ends in `.cu`, for compute capability 8.0 and later, with `-O3 -lineinfo`.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            include: Vec::new(),
            launches: Launches::default(),
            hint: "set NVCC to its path, put it on the PATH, or build once with NVCC=fetch, which installs it into .cuda/".into(),
            required: false,
            flags: ["-O3", "-lineinfo"].map(String::from).to_vec(),
            targets: vec![TARGET.into()],
            own_targets: Vec::new(),
            words: Words::default(),
            oldest: (12, 0),
            local_memory: None,
        }
    }

    /// What is compiled for, each as after nvcc's `-gencode=`, in place of the default.
    pub fn targets<'a>(mut self, targets: impl IntoIterator<Item = &'a str>) -> Self {
        self.targets = targets.into_iter().map(String::from).collect();
        self
    }

    /// Files whose names, without `.cu`, end so are compiled for these targets alone: for kernels with instructions that one chip has.
    pub fn targets_of<'a>(mut self, end: &str, targets: impl IntoIterator<Item = &'a str>) -> Self {
        self.own_targets.push((end.into(), targets.into_iter().map(String::from).collect()));
        self
    }

    /// nvcc's flags, in place of the default.
    pub fn flags<'a>(mut self, flags: impl IntoIterator<Item = &'a str>) -> Self {
        self.flags = flags.into_iter().map(String::from).collect();
        self
    }

    /// A folder of headers besides that of the kernels.
    pub fn include(mut self, folder: impl Into<PathBuf>) -> Self {
        self.include.push(folder.into());
        self
    }

    /// Macros that stand for `__global__` and `__launch_bounds__` in the sources, whose signatures are read without a preprocessor.
    pub fn macros(mut self, kernel: &str, bounds: &str) -> Self {
        self.words = self.words.also(kernel, bounds);
        self
    }

    /// What launch functions are written for.
    pub fn launches(mut self, launches: Launches) -> Self {
        self.launches = launches;
        self
    }

    /// What the warning about a missing nvcc asks for.
    pub fn hint(mut self, hint: &str) -> Self {
        self.hint = hint.into();
        self
    }

    /// Refuses to build without nvcc.
    pub fn required(mut self) -> Self {
        self.required = true;
        self
    }

    /// The oldest release of nvcc that compiles the kernels, 12.0 if nothing is said.
    pub fn at_least(mut self, major: u32, minor: u32) -> Self {
        self.oldest = (major, minor);
        self
    }

    /// Refuses kernels that spill registers or keep anything else in local memory, except those that are named here with a reason.
    pub fn no_local_memory<'a>(
        mut self,
        except: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Self {
        let except = except.into_iter().map(|(kernel, reason)| (kernel.into(), reason.into()));
        self.local_memory = Some(except.collect());
        self
    }

    /// Reads the sources and, if there is an nvcc, compiles them with as many processes as `jobs`. Compiled files are kept in the
    /// folder `cache`, which several builds may share and anyone may delete. [`Build::emit`] calls this in a build script.
    ///
    /// # Errors
    /// Sentences, for a kernel that launch functions do not support, two kernels of one name, an nvcc that is too old, and what nvcc
    /// says about a kernel that does not compile.
    pub fn compile(&self, nvcc: Option<&Path>, cache: &Path, jobs: usize) -> Result<Kernels> {
        let mut kernels = Kernels { compiler: None, files: self.sources()?, warnings: Vec::new() };
        let Some(path) = nvcc else { return Ok(kernels) };
        let nvcc = Nvcc::at(path)?;
        let ((major, minor), (oldest, of_oldest)) = (nvcc.release, self.oldest);
        if nvcc.release < self.oldest {
            return Err(Error::new(format!(
                "nvcc {major}.{minor} is too old: these kernels need {oldest}.{of_oldest} or later; it is {}",
                nvcc.path.display()
            )));
        }
        if nvcc.cuobjdump().is_none() {
            let folder = nvcc.path.parent().unwrap_or(Path::new("")).display();
            kernels.warnings.push(format!(
                "found no cuobjdump next to nvcc in {folder}: machine code is not read (NVIDIA's package nvidia-cuda-cuobjdump has it)"
            ));
        }
        fs::create_dir_all(cache).map_err(|e| Error::new(format!("{}: {e}", cache.display())))?;
        let (next, files) = (AtomicUsize::new(0), &kernels.files);
        let work = || {
            let mut done = Vec::new();
            while let Some((i, file)) = Some(next.fetch_add(1, Ordering::Relaxed))
                .and_then(|i| files.get(i).map(|file| (i, file)))
            {
                done.push((i, self.compile_one(&nvcc, file, cache)));
            }
            done
        };
        let done: BTreeMap<usize, Result<Compiled>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(work)).collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.flat_map(|done| done.expect("work does not panic")).collect()
        });
        self.take(&mut kernels, done)?;
        kernels.compiler = Some(nvcc.version);
        self.check_local_memory(&kernels)?;
        Ok(kernels)
    }

    /// Reads the folder.
    fn sources(&self) -> Result<Vec<File>> {
        let folder = self.folder.display();
        let entries = fs::read_dir(&self.folder)
            .map_err(|e| Error::new(format!("the folder of kernels, {folder}: {e}")))?;
        let paths = entries.map(|entry| entry.map(|entry| entry.path()));
        let paths: std::result::Result<Vec<PathBuf>, _> = paths.collect();
        let mut paths = paths.map_err(|e| Error::new(format!("{folder}: {e}")))?;
        paths.retain(|path| path.extension().is_some_and(|end| end == "cu"));
        paths.sort();
        if paths.is_empty() {
            return Err(Error::new(format!("{folder} holds no file that ends in .cu")));
        }
        let files = paths.into_iter().map(|path| self.source(path));
        let files = files.collect::<Result<Vec<File>>>()?;
        let mut places = BTreeMap::new();
        for (path, kernel) in files.iter().flat_map(|f| f.kernels.iter().map(|k| (&f.path, k))) {
            let place = format!("{}:{}", path.display(), kernel.line);
            if let Some(other) = places.insert(&kernel.name, place.clone()) {
                let name = &kernel.name;
                return Err(Error::new(format!(
                    "{place}: another kernel is named {name}, in {other}"
                )));
            }
        }
        Ok(files)
    }

    fn source(&self, path: PathBuf) -> Result<File> {
        let text = nvcc::read(&path)?;
        let kernels = kernel::read(&text, &self.words)
            .map_err(|e| Error::new(format!("{}:{}: {}", path.display(), e.line, e.what)))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let own = self.own_targets.iter().find(|(end, _)| name.ends_with(end));
        let gencode = own.map_or(&self.targets, |(_, targets)| targets).clone();
        let targets = gencode.iter().flat_map(|target| codes(target)).map(String::from).collect();
        let (fatbin, resources, code) = (None, Vec::new(), Vec::new());
        Ok(File { name, path, targets, kernels, fatbin, resources, code, gencode })
    }

    fn compile_one(&self, nvcc: &Nvcc, file: &File, cache: &Path) -> Result<Compiled> {
        let mut command = Command::new(&nvcc.path);
        command.arg("-fatbin").args(&self.flags).args(["-Xptxas", "-v"]);
        let folders: Vec<PathBuf> =
            [&self.folder].into_iter().chain(&self.include).cloned().collect();
        command.args(folders.iter().map(|folder| format!("-I{}", folder.display())));
        command.args(file.gencode.iter().map(|target| format!("-gencode={target}")));
        command.arg(&file.path);
        let start = format!("{}\n{:?}\n", nvcc.version, command.get_args().collect::<Vec<_>>());
        let content = cache::content(&file.path, &folders, start);
        let stem = cache.join(format!("{}-{:032x}", file.name, cache::hash(content.as_bytes())));
        let (fatbin, log) = (stem.with_extension("fatbin"), stem.with_extension("log"));
        let printed = match (fatbin.is_file(), fs::read_to_string(&log)) {
            (true, Ok(printed)) => printed,
            _ => {
                // Written under a unique name first: another build may be writing the same file.
                let unfinished = stem.with_extension(format!("{}.new", std::process::id()));
                let printed = run(command.arg("-o").arg(&unfinished)).map_err(|e| {
                    Error::new(format!("{} does not compile:\n{e}", file.path.display()))
                })?;
                nvcc::write(&log, &printed.1)?;
                fs::rename(&unfinished, &fatbin)
                    .map_err(|e| Error::new(format!("{}: {e}", fatbin.display())))?;
                printed.1
            }
        };
        let resources = ptxas::parse(&printed);
        check_names(file, &resources)?;
        let warnings = printed.lines().filter(|line| line.contains("warning"));
        let warnings = warnings.map(|line| format!("{}: {line}", file.path.display())).collect();
        let code = machine_code(nvcc, &fatbin)?;
        Ok(Compiled { fatbin, resources, code, warnings })
    }

    /// Adds what was compiled to the files; all errors are reported together.
    fn take(&self, kernels: &mut Kernels, done: BTreeMap<usize, Result<Compiled>>) -> Result<()> {
        let mut failed = Vec::new();
        for (i, compiled) in done {
            match compiled {
                Ok(compiled) => {
                    let file = &mut kernels.files[i];
                    file.fatbin = Some(compiled.fatbin);
                    file.resources = compiled.resources;
                    file.code = compiled.code;
                    kernels.warnings.extend(compiled.warnings);
                }
                Err(error) => failed.push(error.to_string()),
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(Error::new(failed.join("\n"))) }
    }

    fn check_local_memory(&self, kernels: &Kernels) -> Result<()> {
        let Some(except) = &self.local_memory else { return Ok(()) };
        let mut wrong = Vec::new();
        for (file, of) in kernels.files.iter().flat_map(|f| f.resources.iter().map(move |r| (f, r)))
        {
            let excused = except.iter().any(|(kernel, _)| *kernel == of.kernel);
            let spilled = of.spill_stores + of.spill_loads;
            if !excused && of.stack + spilled > 0 {
                wrong.push(format!(
                    "{}: {} on {} has {} bytes of local memory to a thread, and {spilled} bytes of spills",
                    file.path.display(),
                    of.kernel,
                    of.chip,
                    of.stack
                ));
            }
        }
        if wrong.is_empty() { Ok(()) } else { Err(Error::new(wrong.join("\n"))) }
    }
}

/// A compiled file.
struct Compiled {
    fatbin: PathBuf,
    resources: Vec<Resources>,
    code: Vec<Code>,
    warnings: Vec<String>,
}

/// What a `-gencode` makes: `sm_80` and `compute_80` of `arch=compute_80,code=[sm_80,compute_80]`.
fn codes(gencode: &str) -> impl Iterator<Item = &str> {
    let list = gencode.split_once("code=").map_or(gencode, |(_, list)| list);
    let list = list.trim_start_matches('[').trim_end_matches(']');
    list.split(',').map(str::trim).filter(|code| !code.is_empty())
}

/// A kernel without C linkage has another name in the machine code, and would not be found there when the program runs.
fn check_names(file: &File, resources: &[Resources]) -> Result<()> {
    // Of files for PTX alone the assembler says nothing.
    let missing = |kernel: &&Kernel| !resources.iter().any(|of| of.kernel == kernel.name);
    match file.kernels.iter().find(missing).filter(|_| !resources.is_empty()) {
        None => Ok(()),
        Some(Kernel { name, line, .. }) => Err(Error::new(format!(
            "{}:{line}: nvcc made no kernel named {name}: declare it extern \"C\", outside of what #if leaves out",
            file.path.display()
        ))),
    }
}

/// The instructions of a fatbin's kernels; empty without a disassembler. Kept next to the fatbin: a disassembly takes seconds.
fn machine_code(nvcc: &Nvcc, fatbin: &Path) -> Result<Vec<Code>> {
    let model = [&include_bytes!("sass.rs")[..], include_bytes!("sass/scoreboard.rs")].concat();
    let cached = fatbin.with_extension(format!("{:x}.mix", cache::hash(&model)));
    if nvcc.cuobjdump().is_none() {
        return Ok(Vec::new());
    }
    if let Some(code) = fs::read_to_string(&cached).ok().and_then(|text| sass::from_lines(&text)) {
        return Ok(code);
    }
    let code = sass::parse(&nvcc.disassemble(fatbin)?.unwrap_or_default());
    nvcc::write(&cached, &sass::to_lines(&code))?;
    Ok(code)
}

//! Builds of folders of kernels: with a script in nvcc's place, which says what a test wants, and with nvcc itself where there is one.
#![cfg(unix)]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use cuda_kernels_build::{Build, Kernels, Launches, Result, nvcc};

const VERSION: &str = "nvcc: NVIDIA (R) Cuda compiler driver
Cuda compilation tools, release 13.0, V13.0.88
Build cuda_13.0.r13.0/compiler.36424714_0
";
const SCALE: &str = "#include \"own.cuh\"
extern \"C\" __global__ void scale(float* y, const float* x, float by, unsigned n) {
    unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = by * x[i];
}
";
const SAYS: &str = "ptxas info    : Compiling entry function 'scale' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, 384 bytes cmem[0]
";

/// A folder with kernels, tools and a cache.
struct Project(tempfile::TempDir);

impl Project {
    fn new() -> Self {
        let project = Self(tempfile::tempdir().unwrap());
        for folder in ["kernels", "tools"] {
            fs::create_dir(project.path(folder)).unwrap();
        }
        // Links: a script that was just written cannot always be started at once.
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
        symlink(scripts.join("nvcc"), project.path("tools/nvcc")).unwrap();
        project.write("tools/version", VERSION).write("tools/says", SAYS);
        project.write("kernels/own.cuh", "").write("kernels/scale.cu", SCALE);
        project
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> &Self {
        fs::write(self.path(name), text).unwrap();
        self
    }

    fn build(&self) -> Build {
        Build::new(self.path("kernels"))
    }

    fn compile(&self, build: Build) -> Result<Kernels> {
        build.compile(Some(&self.path("tools/nvcc")), &self.path("cache"), 2)
    }

    fn runs(&self, of: &str) -> usize {
        fs::read_to_string(self.path("tools").join(of)).unwrap_or_default().lines().count()
    }

    /// What the build of the folder as it is says.
    #[track_caller]
    fn fails_with(&self, build: Build, parts: &[&str]) {
        let error = self.compile(build).unwrap_err();
        assert_eq!(error.to_string(), format!("{error:?}"));
        for part in parts {
            assert!(error.to_string().contains(part), "{error}\nis without: {part}");
        }
    }
}

#[test]
fn a_file_is_compiled_again_only_if_what_it_is_made_of_changed() {
    let project = Project::new();
    project.write("kernels/other.cu", "// nothing in it\n");
    let first = project.compile(project.build()).unwrap();
    assert_eq!(project.runs("runs"), 2);
    let again = project.compile(project.build()).unwrap();
    assert_eq!(project.runs("runs"), 2);
    assert_eq!(first.rust(Launches::Own), again.rust(Launches::Own));
    project.write("kernels/own.cuh", "// changed\n");
    project.compile(project.build()).unwrap();
    assert_eq!(project.runs("runs"), 3, "only what includes the header");
    project.compile(project.build().flags(["-O1"])).unwrap();
    assert_eq!(project.runs("runs"), 5);
    project.write("tools/version", &VERSION.replace("36424714", "36424715"));
    project.compile(project.build()).unwrap();
    assert_eq!(project.runs("runs"), 7);
}

#[test]
fn the_table_has_what_the_assembler_and_the_disassembler_say() {
    let project = Project::new();
    let without = project.compile(project.build()).unwrap();
    assert!(without.warnings.iter().any(|w| w.contains("found no cuobjdump")), "{without:?}");
    assert!(without.rust(Launches::Own).contains("spill_loads: 0, mix: None }"));
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    symlink(scripts.join("cuobjdump"), project.path("tools/cuobjdump")).unwrap();
    for _ in 0..2 {
        let kernels = project.compile(project.build()).unwrap();
        assert_eq!(kernels.warnings, [""; 0]);
        let code = kernels.rust(Launches::Own);
        for part in [
            "COMPILER: Option<&str> = Some(\"Build cuda_13.0.r13.0/compiler.36424714_0\")",
            "name: \"scale\", targets: &[\"sm_80\", \"compute_80\"], image: &Aligned(*include_bytes!(",
            "Kernel { name: \"scale\", file: 0, sizes: &[8, 8, 4, 4] }",
            "chip: \"sm_80\", registers: 10, shared: 0, stack: 0,",
            "mix: Some(Mix { whole: Counts { all: 2, mma: 0, ldmatrix: 0, global_16: 1,",
            "pub(crate) unsafe fn scale(launch: Launch<'_>, y: Out<'_, f32>, x: In<'_, f32>, by: f32, n: u32)",
        ] {
            assert!(code.contains(part), "{code}\nis without: {part}");
        }
    }
    assert_eq!((project.runs("runs"), project.runs("disassembled")), (1, 1));
}

#[test]
fn without_nvcc_there_are_the_same_functions_and_no_kernels() {
    let project = Project::new();
    let kernels = project.build().compile(None, &project.path("cache"), 1).unwrap();
    for launches in [Launches::Own, Launches::Cudarc] {
        let code = kernels.rust(launches);
        assert!(code.contains("COMPILER: Option<&str> = None;"), "{code}");
        assert!(code.contains("image: &[] }") && code.contains("unsafe fn scale("), "{code}");
    }
    assert!(!project.path("cache").exists());
}

#[test]
fn what_is_wrong_with_nvcc_is_said() {
    let project = Project::new();
    project.write("tools/version", &VERSION.replace("13.0", "11.8"));
    let sentence = "nvcc 11.8 is too old: these kernels need 12.0 or later; it is";
    project.fails_with(project.build(), &[sentence, "tools/nvcc"]);
    project.compile(project.build().at_least(11, 8)).unwrap();
    project.write("tools/version", "gcc 12.2\n");
    project.fails_with(project.build(), &["is not nvcc: `--version` names no release: gcc 12.2"]);
    fs::remove_file(project.path("tools/nvcc")).unwrap();
    project.fails_with(project.build(), &["cannot run", "tools/nvcc"]);
}

#[test]
fn what_is_wrong_with_kernels_is_said_with_file_and_line() {
    let project = Project::new();
    project.write("kernels/again.cu", SCALE);
    let sentence = "scale.cu:2: another kernel is named scale, in ";
    project.fails_with(project.build(), &[sentence, "again.cu:2"]);
    project.write("kernels/again.cu", "\n\n__global__ void f(long n) {}");
    let sentence = "again.cu:3: `f`: `long n` is not a supported argument type";
    project.fails_with(project.build(), &[sentence]);
    // The script says nothing about it, as nvcc about a kernel of C++ linkage.
    project.write("kernels/again.cu", "\n__global__ void f(int n) {}");
    let sentence = "again.cu:2: nvcc made no kernel named f: declare it extern \"C\"";
    project.fails_with(project.build(), &[sentence]);
    project.write("kernels/again.cu", "mistake").write("kernels/third.cu", "mistake");
    project.fails_with(
        project.build(),
        &[
            "again.cu does not compile:\n",
            "again.cu(1): error: identifier \"mistake\" is undefined",
            "third.cu does not compile:\n",
        ],
    );
    for name in ["again", "third", "scale"] {
        fs::remove_file(project.path(&format!("kernels/{name}.cu"))).unwrap();
    }
    project.fails_with(project.build(), &["kernels holds no file that ends in .cu"]);
    project.fails_with(Build::new("/no/kernels"), &["the folder of kernels, /no/kernels: "]);
}

#[test]
fn local_memory_is_refused_where_it_is_not_wanted() {
    let project = Project::new();
    project.write("tools/says", &SAYS.replace("0 bytes spill loads", "8 bytes spill loads"));
    project.compile(project.build()).unwrap();
    let sentence =
        "scale.cu: scale on sm_80 has 0 bytes of local memory to a thread, and 8 bytes of spills";
    project.fails_with(project.build().no_local_memory([("other", "a reason")]), &[sentence]);
    project.compile(project.build().no_local_memory([("scale", "a reason")])).unwrap();
}

#[test]
fn files_of_a_name_have_targets_of_their_own() {
    let project = Project::new();
    let says = SAYS.replace("scale", "fast") + SAYS;
    project
        .write("kernels/fast_sm90.cu", &SCALE.replace("scale", "fast"))
        .write("tools/says", &says);
    let hopper = "arch=compute_90a,code=sm_90a";
    let build = project.build().targets([hopper, "arch=compute_80,code=compute_80"]);
    let kernels = project.compile(build.targets_of("_sm90", [hopper])).unwrap();
    let targets: Vec<_> = kernels.files.iter().map(|f| (&*f.name, f.targets.join(" "))).collect();
    assert_eq!(targets, [("fast_sm90", "sm_90a".into()), ("scale", "sm_90a compute_80".into())]);
}

#[test]
fn nvcc_compiles_a_kernel_and_its_registers_are_known() {
    let Some(nvcc) = nvcc::find(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap() else {
        println!("skipped: nvcc was not found");
        return;
    };
    let project = Project::new();
    let build = project.build().no_local_memory([]);
    let kernels = build.compile(Some(&nvcc), &project.path("cache"), 2).unwrap();
    let file = &kernels.files[0];
    assert_eq!(&fs::read(file.fatbin.as_ref().unwrap()).unwrap()[..4], [0x50, 0xed, 0x55, 0xba]);
    let [of] = &file.resources[..] else { panic!("{:?}", file.resources) };
    assert_eq!((&*of.kernel, &*of.chip, of.stack), ("scale", "sm_80", 0));
    assert!((4..32).contains(&of.registers), "{of:?}");
    if let [code] = &file.code[..] {
        // One load, one store.
        assert_eq!((code.whole.global, code.whole.mma), (2, 0), "{code:?}");
    } else {
        assert!(kernels.warnings.iter().any(|w| w.contains("cuobjdump")), "{:?}", kernels.warnings);
    }
    project.write("kernels/scale.cu", "extern \"C\" __global__ void scale(int* y) { *y = none; }");
    let error = build.compile(Some(&nvcc), &project.path("cache"), 2).unwrap_err().to_string();
    assert!(error.contains("identifier \"none\" is undefined"), "{error}");
    project.write("kernels/scale.cu", "__global__ void scale(int* y) { *y = 1; }");
    let error = build.compile(Some(&nvcc), &project.path("cache"), 2).unwrap_err().to_string();
    assert!(
        error.contains("scale.cu:1: nvcc made no kernel named scale: declare it extern"),
        "{error}"
    );
}

//! The compiler: where it is, which release it is, and how to get one.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

use crate::error::{Error, Result};

/// Environment variables that decide which nvcc is found.
pub const VARIABLES: [&str; 4] = ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH"];

/// A pinned nvcc from NVIDIA's Python wheels.
const FETCH: &str = include_str!("../fetch-nvcc");

/// Where nvcc is in `.cuda/`: as NVIDIA's wheels have it, and as an ordinary toolkit has it.
const FETCHED: [&str; 2] = [".cuda/nvidia/cu13/bin", ".cuda/bin"];

/// Returns the nvcc that builds in the folder `root` use. It is searched for in `$NVCC`, `$CUDA_HOME/bin`, `$CUDA_PATH/bin`, `PATH`,
/// `/usr/local/cuda/bin`, and in `.cuda/` of `root` and of the folders above it. `NVCC=none` finds none on purpose; `NVCC=fetch`
/// takes the one in `.cuda/`, and installs it there first if there is none ([`fetch`]).
///
/// # Errors
/// If `$NVCC` is something else than a file, or fetching fails.
pub fn find(root: &Path) -> Result<Option<PathBuf>> {
    find_by(|name| env::var_os(name), root)
}

fn find_by(variable: impl Fn(&str) -> Option<OsString>, root: &Path) -> Result<Option<PathBuf>> {
    let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
    let file = |folder: PathBuf| {
        let nvcc = folder.join(format!("nvcc{}", env::consts::EXE_SUFFIX));
        nvcc.is_file().then(|| nvcc.canonicalize().unwrap_or(nvcc))
    };
    let fetched = || {
        let above = root.ancestors().flat_map(|above| FETCHED.map(|within| above.join(within)));
        above.into_iter().find_map(file)
    };
    if let Some(nvcc) = variable("NVCC") {
        let nvcc = PathBuf::from(nvcc);
        return match nvcc.to_str() {
            Some("none") => Ok(None),
            Some("fetch") => match fetched() {
                Some(nvcc) => Ok(Some(nvcc)),
                None => fetch(root).map(Some),
            },
            _ if nvcc.is_file() => Ok(Some(nvcc)),
            _ => Err(Error::new(format!(
                "NVCC: no file {}; it is the path of nvcc, or `none`, or `fetch`",
                nvcc.display()
            ))),
        };
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable);
    let homes = homes.map(|home| Path::new(&home).join("bin"));
    let path = variable("PATH").unwrap_or_default();
    let installed = homes.chain(env::split_paths(&path)).chain(["/usr/local/cuda/bin".into()]);
    Ok(installed.into_iter().find_map(file).or_else(fetched))
}

/// Installs a pinned nvcc into `.cuda/` of `root` and returns its path: about 300 MB from NVIDIA's Python wheels, by python3 with pip.
///
/// # Errors
/// If it cannot be installed, with what pip says.
pub fn fetch(root: &Path) -> Result<PathBuf> {
    let failed = |why: String| Error::new(format!("nvcc could not be fetched: {why}"));
    let mut shell = Command::new("bash");
    shell.arg("-s").arg("--").arg(root).stdin(Stdio::piped());
    shell.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut started = shell.spawn().map_err(|e| failed(format!("bash does not start: {e}")))?;
    let mut script = started.stdin.take().expect("it is a pipe");
    script.write_all(FETCH.as_bytes()).map_err(|e| failed(e.to_string()))?;
    drop(script);
    let output = started.wait_with_output().map_err(|e| failed(e.to_string()))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let nvcc = FETCHED.map(|within| root.join(within).join("nvcc"));
    let nvcc = nvcc.into_iter().find(|nvcc| output.status.success() && nvcc.is_file());
    nvcc.and_then(|nvcc| nvcc.canonicalize().ok()).ok_or_else(|| failed(said.trim().to_owned()))
}

/// An nvcc that was asked for its version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nvcc {
    /// Its path.
    pub path: PathBuf,
    /// The last line of what `--version` prints, which names the build.
    pub version: String,
    /// Major and minor release.
    pub release: (u32, u32),
}

impl Nvcc {
    /// # Errors
    /// If it does not run, or is none.
    pub fn at(path: &Path) -> Result<Self> {
        let printed = run(Command::new(path).arg("--version"))?.0;
        let release = release(&printed).ok_or_else(|| {
            let path = path.display();
            Error::new(format!("{path} is not nvcc: `--version` names no release: {printed}"))
        })?;
        let version = printed.lines().last().unwrap_or_default().trim().to_owned();
        Ok(Self { path: path.to_owned(), version, release })
    }

    /// The disassembler next to it, if there is one.
    pub fn cuobjdump(&self) -> Option<PathBuf> {
        let tool = self.path.with_file_name(format!("cuobjdump{}", env::consts::EXE_SUFFIX));
        tool.is_file().then_some(tool)
    }

    /// The disassembly of a fatbin or cubin; `None` without a disassembler.
    ///
    /// # Errors
    /// If the disassembler fails.
    pub fn disassemble(&self, compiled: &Path) -> Result<Option<String>> {
        let Some(tool) = self.cuobjdump() else { return Ok(None) };
        // It searches for nvdisasm there.
        let folder = self.path.parent().map(Path::to_owned);
        let path = env::var_os("PATH").unwrap_or_default();
        let path = env::join_paths(folder.into_iter().chain(env::split_paths(&path)))
            .map_err(|e| Error::new(format!("{}: {e}", self.path.display())))?;
        run(Command::new(tool).arg("-sass").arg(compiled).env("PATH", path))
            .map(|(out, _)| Some(out))
    }
}

/// The release in `Cuda compilation tools, release 13.0, V13.0.88`.
fn release(printed: &str) -> Option<(u32, u32)> {
    let (_, rest) = printed.split_once("release ")?;
    let (major, rest) = rest.split_once('.')?;
    let minor: String = rest.chars().take_while(char::is_ascii_digit).collect();
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Runs a command that must succeed; returns its standard output and standard error.
pub(crate) fn run(command: &mut Command) -> Result<(String, String)> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| Error::new(format!("cannot run {program}: {e}")))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let printed = (text(&output.stdout), text(&output.stderr));
    if output.status.success() {
        return Ok(printed);
    }
    Err(Error::new(format!("{}{}it was called as {command:?}", printed.0, printed.1)))
}

/// Reads a file; the error names it.
pub(crate) fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|e| Error::new(format!("{}: {e}", path.display())))
}

/// Writes a file; the error names it.
pub(crate) fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| Error::new(format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_release_is_read_from_the_version() {
        let printed = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88\nBuild x\n";
        assert_eq!(release(printed), Some((13, 0)));
        assert_eq!(release("release 12.10"), Some((12, 10)));
        assert_eq!(release("gcc 12.2"), None);
    }

    #[test]
    fn variables_come_before_the_path_and_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let make = |within: &str| {
            let nvcc = root.join(within).join(format!("nvcc{}", env::consts::EXE_SUFFIX));
            fs::create_dir_all(nvcc.parent().unwrap()).unwrap();
            fs::write(&nvcc, "").unwrap();
            nvcc
        };
        let below = root.join("member");
        let find = |set: &[(&str, OsString)]| {
            let variable =
                |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, value)| value.clone());
            find_by(variable, &below)
        };
        if !Path::new("/usr/local/cuda/bin/nvcc").is_file() {
            assert_eq!(find(&[]).unwrap(), None);
        }
        let fetched = make(".cuda/nvidia/cu13/bin");
        assert_eq!(find(&[("NVCC", "fetch".into())]).unwrap(), Some(fetched.clone()));
        let on_path = make("tools");
        let path = ("PATH", root.join("tools").into_os_string());
        assert_eq!(find(std::slice::from_ref(&path)).unwrap(), Some(on_path));
        let home = make("home/bin");
        let home_is = ("CUDA_HOME", root.join("home").into_os_string());
        assert_eq!(find(&[path, home_is.clone()]).unwrap(), Some(home));
        let own = ("NVCC", fetched.clone().into_os_string());
        assert_eq!(find(&[home_is.clone(), own]).unwrap(), Some(fetched));
        assert_eq!(find(&[home_is, ("NVCC", "none".into())]).unwrap(), None);
        let wrong = find(&[("NVCC", "/no/such/file".into())]).unwrap_err().to_string();
        assert!(wrong.starts_with("NVCC: no file /no/such/file"), "{wrong}");
    }
}

//! Reference libraries that benchmarks compare with, opened at run time: oneDNN, and a BLAS through its C interface.
//!
//! A [`Peer`] turns a description of an operation into a [`Job`]: it reads the caller's slices where they lie and owns its
//! results. An operation that the library lacks is a [`Lack`], not an error.

mod blas;
mod onednn;

use std::path::{Path, PathBuf};

use libloading::Library;

use crate::device::loader_says;
use crate::error::{Error, Result};

/// A library.
#[derive(Debug)]
pub(crate) enum Peer {
    OneDnn(Box<onednn::OneDnn>),
    Blas(blas::Blas),
}

/// Why a library has no such operation.
pub(crate) type Lack = String;

/// An operation of a library, ready to run over the caller's buffers.
pub(crate) trait Job {
    /// Runs it once, to the end.
    fn run(&mut self);

    /// The results of the last run, in the layouts of this program.
    fn outputs(&self) -> Vec<Vec<f32>>;
}

/// A boxed job over the caller's slices.
pub(crate) type Prepared<'a> = std::result::Result<Box<dyn Job + 'a>, Lack>;

/// A direction of a convolution: `y` from `x` and `w`, `dx` from `dy` and `w`, `dw` from `x` and `dy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Forward,
    DataGradient,
    WeightGradient,
}

/// The sizes of a convolution, channels last: `x [n, h, w, c]`, filters `[k, r, s, c]`, `y [n, p, q, k]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Convolution {
    pub x: [usize; 4],
    pub filters: [usize; 4],
    pub y: [usize; 4],
    pub stride: usize,
    pub pad: usize,
}

/// `c [m, n] = op(a) op(b)` of row-major matrices, where `op` transposes if asked to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub transpose_a: bool,
    pub transpose_b: bool,
}

/// A pooling of windows of `size`, or of the whole image if it is 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pooling {
    pub x: [usize; 4],
    pub y: [usize; 4],
    pub size: [usize; 2],
    pub stride: usize,
    pub pad: usize,
    pub max: bool,
}

impl Peer {
    /// Opens `NAME` or `NAME=PATH`, of the libraries `onednn` and `blas`, for this many threads and calls from this thread.
    ///
    /// # Errors
    /// If the name is unknown, or the library is missing, cannot be opened, is too old or lacks a function.
    pub fn open(named: &str, threads: usize) -> Result<Self> {
        let (name, path) = match named.split_once('=') {
            Some((name, path)) => (name, Some(Path::new(path))),
            None => (named, None),
        };
        match name {
            "onednn" => Ok(Self::OneDnn(Box::new(onednn::OneDnn::open(path, threads)?))),
            "blas" => Ok(Self::Blas(blas::Blas::open(path, threads)?)),
            _ => Err(Error::Config(format!(
                "--against {named}: the reference libraries are `onednn` and `blas`, each with `=PATH` or without; an \
                 earlier result is a file that ends in .json"
            ))),
        }
    }

    /// The library and its version.
    pub fn name(&self) -> &str {
        match self {
            Self::OneDnn(library) => library.name(),
            Self::Blas(library) => library.name(),
        }
    }
}

/// A library of one of these names: in `.peers`, where `scripts/fetch-peers` puts them, or where the system looks; or the one
/// at `path`.
fn find(what: &str, names: &[&str], path: Option<&Path>) -> Result<(Library, PathBuf)> {
    if let Some(path) = path {
        if !path.is_file() {
            return Err(Error::Device(format!("{what}: there is no file {}", path.display())));
        }
        // A name without a slash would be looked up in the system's folders.
        let path = std::path::absolute(path).map_err(Error::io(path))?;
        return match open(&path) {
            Ok(library) => Ok((library, path)),
            Err(reason) => Err(Error::Device(format!("{what} cannot be opened: {reason}"))),
        };
    }
    let fetched = names.iter().map(|name| Path::new(".peers").join(name));
    let fetched = fetched.filter(|path| path.is_file()).filter_map(|p| std::path::absolute(p).ok());
    let mut reason = None;
    for path in fetched.chain(names.iter().map(PathBuf::from)) {
        match open(&path) {
            Ok(library) => return Ok((library, path)),
            // That a name is not known is no news; that a file which is there does not open is.
            Err(why) if path.is_absolute() => reason = Some(why),
            Err(_) => {}
        }
    }
    Err(Error::Device(match reason {
        Some(reason) => format!("{what} cannot be opened: {reason}"),
        None => format!(
            "{what} was not found (looked for {} in .peers and where the system has its libraries): run \
             scripts/fetch-peers, or name the file, as in `--against NAME=PATH`",
            names.join(", ")
        ),
    }))
}

fn open(path: &Path) -> std::result::Result<Library, String> {
    // SAFETY: the initialisers of these libraries only detect the processor; a file that is something else is the user's
    // choice, as with `LD_PRELOAD`.
    unsafe { Library::new(path) }.map_err(|e| loader_says(&e))
}

/// Declares a table of C functions and a constructor that looks them up by name.
macro_rules! table {
    ($(#[$about:meta])* $table:ident { $($field:ident: $name:literal ($($arg:ty),* $(,)?) $(-> $result:ty)?;)* }) => {
        $(#[$about])*
        struct $table { $($field: unsafe extern "C" fn($($arg),*) $(-> $result)?,)* }

        impl $table {
            /// Returns the name of the first function that the library lacks.
            fn of(library: &libloading::Library) -> std::result::Result<Self, &'static str> {
                Ok(Self { $($field: {
                    // SAFETY: the function has this type in the versions that this table is for.
                    let found = unsafe {
                        library.get::<unsafe extern "C" fn($($arg),*) $(-> $result)?>($name)
                    };
                    *found.map_err(|_| $name)?
                },)* })
            }
        }
    };
}
use table;

#[cfg(test)]
mod tests {
    use super::*;

    fn said(named: &str) -> String {
        Peer::open(named, 1).expect_err("no library").to_string()
    }

    /// Compiles C to a shared object.
    fn library(folder: &Path, name: &str, text: &str) -> PathBuf {
        let (source, file) = (folder.join("library.c"), folder.join(name));
        std::fs::write(&source, text).unwrap();
        let built = std::process::Command::new("gcc")
            .args(["-shared", "-fPIC", "-o"])
            .args([&file, &source])
            .status();
        assert!(built.expect("gcc, which cargo links with").success());
        file
    }

    #[test]
    fn a_library_that_cannot_serve_is_refused_in_one_sentence() {
        let folder = tempfile::tempdir().unwrap();
        let at = |file: &Path| format!("onednn={}", file.display());
        assert!(said("cublas").contains("the reference libraries are `onednn` and `blas`"));
        let missing = folder.path().join("libdnnl.so");
        assert!(
            said(&at(&missing)).contains("oneDNN: there is no file /"),
            "{}",
            said(&at(&missing))
        );
        let text = folder.path().join("text.so");
        std::fs::write(&text, "no library").unwrap();
        assert!(said(&at(&text)).contains("oneDNN cannot be opened: "), "{}", said(&at(&text)));
        let other = library(folder.path(), "other.so", "int other;");
        assert!(said(&at(&other)).contains("lacks `dnnl_version`"), "{}", said(&at(&other)));
        let blas = format!("blas={}", other.display());
        assert!(said(&blas).contains("lacks `cblas_sgemm`"), "{}", said(&blas));
        let version = |major: i32| {
            format!(
                "static const int v[8] = {{{major}, 7, 1}}; const int* dnnl_version(void) {{ return v; }}"
            )
        };
        let old = library(folder.path(), "old.so", &version(1));
        assert!(said(&at(&old)).contains("oneDNN 1.7.1; this program speaks to 2 and 3"));
        let cut = library(folder.path(), "cut.so", &version(3));
        assert!(said(&at(&cut)).contains("oneDNN 3.7.1, but lacks `dnnl_"), "{}", said(&at(&cut)));
    }
}

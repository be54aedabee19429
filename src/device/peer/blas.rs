//! A BLAS through its C interface: products of matrices.

use std::ffi::{CStr, c_char, c_int};
use std::path::Path;

use libloading::Library;

use super::{Convolution, Direction, Job, Operand, Peer, Prepared, Product};
use crate::error::{Error, Result};

const NAMES: [&str; 7] = [
    "libopenblas.so.0",
    "libopenblas.so",
    "libscipy_openblas.so",
    "libscipy_openblas64_.so",
    "libmkl_rt.so.2",
    "libblis.so.4",
    "libcblas.so.3",
];
const ROW_MAJOR: c_int = 101;
const PLAIN: c_int = 111;
const TRANSPOSED: c_int = 112;

type Gemm<I> = unsafe extern "C" fn(
    c_int,
    c_int,
    c_int,
    I,
    I,
    I,
    f32,
    *const f32,
    I,
    *const f32,
    I,
    f32,
    *mut f32,
    I,
);

/// `cblas_sgemm` by the width of its sizes.
#[derive(Clone, Copy, Debug)]
enum Sgemm {
    Short(Gemm<i32>),
    Long(Gemm<i64>),
}

/// An open BLAS.
#[derive(Debug)]
pub(crate) struct Blas {
    gemm: Sgemm,
    name: String,
    /// Holds the function.
    _library: Library,
}

impl Blas {
    pub(super) fn open(path: Option<&Path>, threads: usize) -> Result<Self> {
        let (library, path) = super::find("a BLAS", &NAMES, path)?;
        // OpenBLAS as SciPy's wheels and distributions name it, and MKL: a suffix tells 64-bit sizes.
        let short = ["cblas_sgemm", "scipy_cblas_sgemm"];
        let long = ["scipy_cblas_sgemm64_", "cblas_sgemm64_", "cblas_sgemm_64"];
        // SAFETY: the C interface of BLAS fixes these types.
        let gemm = unsafe {
            let short = short.iter().find_map(|name| library.get::<Gemm<i32>>(*name).ok());
            let long = long.iter().find_map(|name| library.get::<Gemm<i64>>(*name).ok());
            match (short, long) {
                (Some(short), _) => Sgemm::Short(*short),
                (None, Some(long)) => Sgemm::Long(*long),
                (None, None) => {
                    return Err(Error::Device(format!(
                        "{} lacks `cblas_sgemm`: it is no BLAS, or one without the C interface",
                        path.display()
                    )));
                }
            }
        };
        let prefixes = ["", "scipy_"].into_iter().flat_map(|p| ["", "64_"].map(|s| (p, s)));
        let mut name = "BLAS".to_owned();
        type Threads = unsafe extern "C" fn(c_int);
        for (prefix, suffix) in prefixes {
            let named = |function: &str| format!("{prefix}{function}{suffix}");
            // SAFETY: OpenBLAS declares `char* openblas_get_config(void)` and `void openblas_set_num_threads(int)`.
            unsafe {
                type Config = unsafe extern "C" fn() -> *const c_char;
                if let Ok(config) = library.get::<Config>(named("openblas_get_config")) {
                    // "OpenBLAS 0.3.34 DYNAMIC_ARCH …"
                    let config = CStr::from_ptr(config()).to_string_lossy();
                    name = config.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
                }
                if let Ok(set) = library.get::<Threads>(named("openblas_set_num_threads")) {
                    set(threads as c_int);
                }
            }
        }
        // SAFETY: MKL declares `void MKL_Set_Num_Threads(int)`.
        let set = unsafe { library.get::<Threads>("MKL_Set_Num_Threads") };
        if let Ok(set) = set {
            name = "MKL".into();
            // SAFETY: as above.
            unsafe { set(threads as c_int) };
        }
        Ok(Self { gemm, name, _library: library })
    }
}

impl Peer for Blas {
    fn name(&self) -> &str {
        &self.name
    }

    /// # Panics
    /// If the slices do not have the product's sizes.
    fn product<'a>(&'a self, p: &Product, a: Operand<'a>, b: Operand<'a>) -> Prepared<'a> {
        let (a, b) = (a.host(), b.host());
        assert_eq!([a.len(), b.len()], [p.m * p.k, p.k * p.n], "{p:?}");
        Ok(Box::new(Multiplication { blas: self, p: *p, a, b, c: vec![0.0; p.m * p.n] }))
    }

    /// A convolution of 1x1 filters and stride 1 is a product.
    fn convolution<'a>(
        &'a self,
        d: &Convolution,
        direction: Direction,
        a: Operand<'a>,
        b: Operand<'a>,
    ) -> Prepared<'a> {
        match d.as_product(direction) {
            Some((product, false)) => self.product(&product, a, b),
            Some((product, true)) => self.product(&product, b, a),
            None => self.lacks("convolution but products"),
        }
    }
}

struct Multiplication<'a> {
    blas: &'a Blas,
    p: Product,
    a: &'a [f32],
    b: &'a [f32],
    c: Vec<f32>,
}

impl Job for Multiplication<'_> {
    fn run(&mut self) {
        let Product { m, n, k, transpose_a, transpose_b } = self.p;
        let way = |transposed: bool| if transposed { TRANSPOSED } else { PLAIN };
        let (lda, ldb) = (if transpose_a { m } else { k }, if transpose_b { k } else { n });
        let (a, b, c) = (self.a.as_ptr(), self.b.as_ptr(), self.c.as_mut_ptr());
        let [ta, tb] = [way(transpose_a), way(transpose_b)];
        macro_rules! call {
            ($gemm:expr, $int:ty) => {
                // SAFETY: `product` has checked that the slices hold matrices of these sizes.
                unsafe {
                    let [m, n, k, lda, ldb] = [m, n, k, lda, ldb].map(|size| size as $int);
                    $gemm(ROW_MAJOR, ta, tb, m, n, k, 1.0, a, lda, b, ldb, 0.0, c, n)
                }
            };
        }
        match self.blas.gemm {
            Sgemm::Short(gemm) => call!(gemm, i32),
            Sgemm::Long(gemm) => call!(gemm, i64),
        }
    }

    fn outputs(&self) -> Vec<Vec<f32>> {
        vec![self.c.clone()]
    }
}

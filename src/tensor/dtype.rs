//! Types of elements, and shapes.

use std::fmt;

use half::bf16;

use crate::cpu::bf16::{rounded, widened};
use crate::device::{Device, DeviceKind, Precision, elements};

/// The type of a tensor's elements, known at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// 16-bit float with the exponents of 32 bits: activations and working copies of weights of a device in bf16.
    Bf16,
    /// 32-bit float.
    F32,
    /// 64-bit float; the reference device only.
    F64,
    /// 32-bit signed integer: labels and indices.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::Bf16 => 2,
            DType::F32 | DType::I32 => 4,
            DType::F64 => 8,
        }
    }

    /// The float type of a device's weights, statistics, losses and sums.
    pub fn of(device: &Device) -> Self {
        match device.kind() {
            DeviceKind::Cpu | DeviceKind::Cuda => DType::F32,
            DeviceKind::Reference => DType::F64,
        }
    }

    /// The float type of a device's activations, images and working copies of filters and matrices.
    pub fn of_activations(device: &Device) -> Self {
        match device.precision() {
            Precision::Bf16 => DType::Bf16,
            Precision::F32 => Self::of(device),
        }
    }
}

/// Only types whose size is that of their dtype are elements.
mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for i32 {}
}

/// A Rust type that a tensor can hold.
pub trait Element: bytemuck::Pod + Send + Sync + fmt::Debug + sealed::Sealed {
    /// Its dtype.
    const DTYPE: DType;
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for f64 {
    const DTYPE: DType = DType::F64;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}

/// A float type, for generic loops that compute in f64.
pub(crate) trait Float: Element {
    fn widen(self) -> f64;
    fn narrow(value: f64) -> Self;
}

impl Float for bf16 {
    fn widen(self) -> f64 {
        f64::from(self.load())
    }
    fn narrow(value: f64) -> Self {
        Self::store(value as f32)
    }
}

impl Float for f32 {
    fn widen(self) -> f64 {
        f64::from(self)
    }
    fn narrow(value: f64) -> Self {
        value as f32
    }
}

impl Float for f64 {
    fn widen(self) -> f64 {
        self
    }
    fn narrow(value: f64) -> Self {
        value
    }
}

/// The type of a CPU's activations, f32 or bf16, for generic loops that compute in f32.
pub(crate) trait Activation: Float {
    fn load(self) -> f32;
    fn store(value: f32) -> Self;
}

impl Activation for bf16 {
    #[inline(always)]
    fn load(self) -> f32 {
        widened(self.to_bits())
    }
    #[inline(always)]
    fn store(value: f32) -> Self {
        Self::from_bits(rounded(value))
    }
}

impl Activation for f32 {
    #[inline(always)]
    fn load(self) -> f32 {
        self
    }
    #[inline(always)]
    fn store(value: f32) -> Self {
        value
    }
}

/// Evaluates an expression with `$t` the type of a CPU's activations of this dtype:
/// `by_activation!(x.dtype(), T => forward(y.data_mut::<T>(), x.data()))`.
macro_rules! by_activation {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::DType::Bf16 => {
                type $t = half::bf16;
                $body
            }
            $crate::tensor::DType::F32 => {
                type $t = f32;
                $body
            }
            other => panic!("a CPU does not compute in {other:?}"),
        }
    };
}

pub(crate) use by_activation;

/// Up to four sizes, outermost first; a shape without sizes is that of a scalar. Its number of elements fits into memory:
/// making a larger shape panics.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    pub(super) dims: [usize; 4],
    rank: usize,
}

impl Shape {
    /// The product of the sizes: 1 for a scalar.
    pub fn elements(&self) -> usize {
        self.iter().product() // does not overflow: every shape was checked when it was made
    }
}

impl std::ops::Deref for Shape {
    type Target = [usize];
    fn deref(&self) -> &[usize] {
        &self.dims[..self.rank]
    }
}

impl From<&[usize]> for Shape {
    #[track_caller]
    fn from(sizes: &[usize]) -> Self {
        assert!(sizes.len() <= 4, "shape {sizes:?} has more than four sizes");
        assert!(
            elements(sizes).is_some(),
            "shape {sizes:?} has more elements than memory can hold"
        );
        let mut dims = [1; 4];
        dims[..sizes.len()].copy_from_slice(sizes);
        Self { dims, rank: sizes.len() }
    }
}

impl<const N: usize> From<[usize; N]> for Shape {
    #[track_caller]
    fn from(sizes: [usize; N]) -> Self {
        sizes.as_slice().into()
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

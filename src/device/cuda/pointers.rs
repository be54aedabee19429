//! The arguments of a launch: pointers that know how many bytes lie behind them, and numbers.

use std::ffi::c_void;
use std::marker::PhantomData;

/// A device pointer that a kernel reads `T` from; may be null where the kernel allows it.
#[derive(Debug)]
#[repr(C)] // the driver reads an argument at the address of the first field
pub(crate) struct In<'a, T> {
    address: u64,
    /// Bytes behind the address that the kernel reads.
    read: u64,
    of: PhantomData<&'a [T]>,
}

/// A device pointer that a kernel writes `T` to.
#[derive(Debug)]
#[repr(C)] // as above
pub(crate) struct Out<'a, T> {
    address: u64,
    /// Bytes behind the address that the kernel writes.
    written: u64,
    /// Bytes that it also reads, because it adds to them or works in place.
    read: u64,
    of: PhantomData<&'a mut [T]>,
}

impl<T> Clone for In<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for In<'_, T> {}

impl<T> In<'_, T> {
    /// A pointer to `bytes` bytes.
    pub(crate) fn new(address: u64, bytes: usize) -> Self {
        Self { address, read: bytes as u64, of: PhantomData }
    }

    /// A null pointer, for an optional argument.
    pub(crate) fn null() -> Self {
        Self::new(0, 0)
    }

    pub(crate) fn address(self) -> u64 {
        self.address
    }

    /// The number of values behind it.
    pub(crate) fn count(self) -> usize {
        self.read as usize / size_of::<T>()
    }

    /// Whether the address is aligned for 16-byte accesses.
    pub(crate) fn is_aligned_16(self) -> bool {
        self.address.is_multiple_of(16)
    }

    /// The same pointer, for a kernel that reads only so many bytes of what lies behind it.
    pub(crate) fn reading(self, bytes: usize) -> Self {
        Self { read: bytes as u64, ..self }
    }
}

impl<'a> In<'a, i32> {
    /// The same address as bytes, which are not a tensor type.
    pub(crate) fn bytes(self) -> In<'a, u8> {
        In { address: self.address, read: self.read, of: PhantomData }
    }
}

impl<'a> Out<'a, i32> {
    /// The same address as bytes, which are not a tensor type.
    pub(crate) fn bytes(self) -> Out<'a, u8> {
        let Self { address, written, read, .. } = self;
        Out { address, written, read, of: PhantomData }
    }
}

impl<'a, T> Out<'a, T> {
    /// A pointer to `bytes` bytes, which the kernel overwrites.
    pub(crate) fn new(address: u64, bytes: usize) -> Self {
        Self { address, written: bytes as u64, read: 0, of: PhantomData }
    }

    /// A null pointer, for an optional argument.
    pub(crate) fn null() -> Self {
        Self::new(0, 0)
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// The same address to read, for kernels that work in place.
    pub(crate) fn also_in(&self) -> In<'a, T> {
        In { address: self.address, read: self.written, of: PhantomData }
    }

    /// The pointer without its borrow, for a launch that writes two gradients, which can only be borrowed one at a time.
    pub(crate) fn unbound<'b>(self) -> Out<'b, T> {
        let Self { address, written, read, .. } = self;
        Out { address, written, read, of: PhantomData }
    }

    /// The same pointer, for a kernel that also reads what it overwrites if `updates`.
    pub(crate) fn updating(self, updates: bool) -> Self {
        Self { read: if updates { self.written } else { 0 }, ..self }
    }

    /// The same pointer, for a kernel that also reads so many bytes behind it.
    pub(crate) fn reading(self, bytes: usize) -> Self {
        Self { read: bytes as u64, ..self }
    }

    /// The same pointer, for a kernel that writes only so many bytes of what lies behind it.
    pub(crate) fn writing(self, bytes: usize) -> Self {
        Self { written: bytes as u64, ..self }
    }
}

/// An argument in the form that a launch takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Argument {
    /// Where its value lies.
    pub(super) at: *mut c_void,
    pub(super) moves: Moves,
}

/// What a kernel moves through one of its arguments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Moves {
    /// The address that it points to; 0 if it is no pointer.
    pub(super) address: u64,
    /// Bytes behind the address that the kernel reads.
    pub(super) read: u64,
    /// Bytes behind the address that it writes.
    pub(super) written: u64,
}

/// A value that may be the argument of a kernel.
pub(super) trait Value {
    /// What a kernel moves through it.
    fn moves(&self) -> Moves;
}

impl<T> Value for In<'_, T> {
    fn moves(&self) -> Moves {
        Moves { address: self.address, read: self.read, written: 0 }
    }
}

impl<T> Value for Out<'_, T> {
    fn moves(&self) -> Moves {
        Moves { address: self.address, read: self.read, written: self.written }
    }
}

macro_rules! numbers {
    ($($number:ty),*) => {
        $(impl Value for $number {
            fn moves(&self) -> Moves {
                Moves::default()
            }
        })*
    };
}
numbers!(i32, i64, u32, u64, f32, f64);

/// The argument that has this value.
pub(super) fn argument<T: Value>(value: &T) -> Argument {
    Argument { at: std::ptr::from_ref(value).cast_mut().cast(), moves: value.moves() }
}

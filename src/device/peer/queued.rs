//! Jobs of libraries that queue work on a GPU's stream.

use std::ffi::{CStr, c_char, c_int, c_void};

use half::bf16;

use super::{Job, Lack, Prepared};
use crate::device::{Device, Memory, Precision};

/// What a call returns; 0 is success.
pub(super) type Status = c_int;

/// A library's function that says what a status means.
#[derive(Clone, Copy, Debug)]
pub(super) struct Words(unsafe extern "C" fn(Status) -> *const c_char);

impl Words {
    /// # Safety
    /// The function takes any status and returns a text that lives for ever, and its library stays open while this is used.
    pub(super) unsafe fn new(function: unsafe extern "C" fn(Status) -> *const c_char) -> Self {
        Self(function)
    }

    pub(super) fn of(self, status: Status) -> String {
        // SAFETY: as `new` was promised.
        unsafe { CStr::from_ptr((self.0)(status)) }.to_string_lossy().into_owned()
    }
}

/// A description that a library has made.
struct Description {
    handle: *mut c_void,
    destroy: unsafe extern "C" fn(*mut c_void) -> Status,
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: `Queued::describe` is given the handle with the function that destroys it, and nothing else holds it.
        unsafe { (self.destroy)(self.handle) };
    }
}

/// A result on the GPU.
struct Floats {
    memory: Memory,
    precision: Precision,
    len: usize,
}

impl Floats {
    fn to_vec(&self) -> Vec<f32> {
        match self.precision {
            Precision::F32 => {
                let mut values = vec![0.0_f32; self.len];
                self.memory.read(0, bytemuck::cast_slice_mut(&mut values));
                values
            }
            Precision::Bf16 => {
                let mut values = vec![bf16::ZERO; self.len];
                self.memory.read(0, bytemuck::cast_slice_mut(&mut values));
                values.into_iter().map(bf16::to_f32).collect()
            }
        }
    }
}

/// Calls that queue work one after another, with what they need.
pub(super) struct Queued<'a> {
    device: &'a Device,
    library: &'a str,
    words: Words,
    steps: Vec<Box<dyn Fn() -> Status + 'a>>,
    results: Vec<Floats>,
    scratch: Vec<Memory>,
    descriptions: Vec<Description>,
}

impl<'a> Queued<'a> {
    pub(super) fn new(device: &'a Device, library: &'a str, words: Words) -> Self {
        let (steps, results, scratch, descriptions) = Default::default();
        Self { device, library, words, steps, results, scratch, descriptions }
    }

    /// Makes a description; `destroy` must be the library's function for what `make` makes.
    pub(super) fn describe(
        &mut self,
        what: &str,
        destroy: unsafe extern "C" fn(*mut c_void) -> Status,
        make: impl FnOnce(*mut *mut c_void) -> Status,
    ) -> Result<*mut c_void, Lack> {
        let mut handle = std::ptr::null_mut();
        self.check(what, make(&mut handle))?;
        self.descriptions.push(Description { handle, destroy });
        Ok(handle)
    }

    pub(super) fn check(&self, what: &str, status: Status) -> Result<(), Lack> {
        match status {
            0 => Ok(()),
            status => Err(format!("{} refuses a {what}: {}", self.library, self.words.of(status))),
        }
    }

    /// The address of a result of `len` floats.
    pub(super) fn result(&mut self, len: usize, precision: Precision) -> *mut c_void {
        let memory = Memory::new(self.device, len * size_of(precision));
        let address = pointer(memory.address());
        self.results.push(Floats { memory, precision, len });
        address
    }

    /// The address of memory that the caller does not see.
    pub(super) fn scratch(&mut self, bytes: usize) -> *mut c_void {
        let memory = Memory::new(self.device, bytes);
        let address = pointer(memory.address());
        self.scratch.push(memory);
        address
    }

    /// The address of `len` f32 numbers of one value.
    pub(super) fn constants(&mut self, len: usize, value: f32) -> *mut c_void {
        let mut memory = Memory::new(self.device, 4 * len);
        memory.write(0, bytemuck::cast_slice(&vec![value; len]));
        let address = pointer(memory.address());
        self.scratch.push(memory);
        address
    }

    /// Appends a call that queues work on the stream.
    pub(super) fn step(&mut self, call: impl Fn() -> Status + 'a) {
        self.steps.push(Box::new(call));
    }

    /// The job, if the library takes its calls: it is run once.
    pub(super) fn prepared(self, what: &str) -> Prepared<'a> {
        for step in &self.steps {
            self.check(what, self.call(step))?;
        }
        Ok(Box::new(self))
    }

    fn call(&self, step: &dyn Fn() -> Status) -> Status {
        // A GPU that has failed does nothing more, and says so when it is asked.
        let mut status = 0;
        self.device.gpu().on_stream(|_| status = step());
        status
    }
}

impl Job for Queued<'_> {
    fn run(&mut self) {
        for step in &self.steps {
            let status = self.call(step);
            assert_eq!(
                status,
                0,
                "{} fails while it runs: {}",
                self.library,
                self.words.of(status)
            );
        }
    }

    fn outputs(&self) -> Vec<Vec<f32>> {
        self.results.iter().map(Floats::to_vec).collect()
    }
}

pub(super) fn size_of(precision: Precision) -> usize {
    if precision == Precision::Bf16 { 2 } else { 4 }
}

/// A GPU's address as C passes it.
pub(super) fn pointer(address: u64) -> *mut c_void {
    std::ptr::without_provenance_mut(address as usize)
}

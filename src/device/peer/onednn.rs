//! oneDNN through its C interface, versions 2 and 3.
//!
//! The two differ in how operations and layouts are described: in version 2 by structures of the caller's, which are here
//! buffers larger than any of them; in version 3 by handles. Layouts are this program's, channels last. Filters are in the
//! layout that the library prefers, and the reordering between it and ours is part of each run, as in a training step, where
//! filters change every time.

mod operations;

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::path::Path;
use std::ptr::{null, null_mut};

use libloading::Library;

use super::{Job, Lack, table};
use crate::error::{Error, Result};

const NAMES: [&str; 3] = ["libdnnl.so.3", "libdnnl.so.2", "libdnnl.so"];

type Handle = *mut c_void;
/// `dnnl_dims_t`
type Dims = [i64; 12];
type Sizes = *const Dims;
type Status = c_int;

// From dnnl_types.h; equal in both versions unless noted.
const UNIMPLEMENTED: Status = 3;
const CPU: c_int = 1;
const IN_ORDER: c_uint = 1;
const F32: c_int = 3;
const TAG_ANY: c_int = 1;
const TRAINING: c_int = 64;
const BACKWARD_DATA: c_int = 160;
const CONVOLUTION_DIRECT: c_int = 1;
const POOLING_MAX: c_int = 0x1ff;
const POOLING_MEAN: c_int = 0x3ff;
const SOFTMAX_ACCURATE: c_int = 0x30000;
const BINARY_ADD: c_int = 0x1fff0;
/// In version 2 and in version 3.
const FUSE_RELU: [c_uint; 2] = [4, 8];
/// Version 3 only.
const FUSE_ADD_RELU: c_uint = 16;
const WEIGHTS_LAYOUT: c_int = 131;
const DIFF_WEIGHTS_LAYOUT: c_int = 132;
const WORKSPACE_LAYOUT: c_int = 135;
const SRC: c_int = 1;
const SRC_1: c_int = 2;
const DST: c_int = 17;
const WEIGHTS: c_int = 33;
const MEAN: c_int = 49;
const VARIANCE: c_int = 50;
const WORKSPACE: c_int = 64;
const DIFF_SRC: c_int = 129;
const DIFF_SRC_1: c_int = 130;
const DIFF_DST: c_int = 145;
const DIFF_WEIGHTS: c_int = 161;

#[repr(C)]
struct Version {
    major: c_int,
    minor: c_int,
    patch: c_int,
    hash: *const c_char,
    runtimes: [c_uint; 2],
}

/// `dnnl_exec_arg_t`
#[repr(C)]
struct Argument {
    index: c_int,
    memory: Handle,
}

table! {
    /// Functions that both versions have.
    #[derive(Clone, Copy, Debug)]
    Common {
        engine_create: "dnnl_engine_create" (*mut Handle, c_int, usize) -> Status;
        engine_destroy: "dnnl_engine_destroy" (Handle) -> Status;
        stream_create: "dnnl_stream_create" (*mut Handle, Handle, c_uint) -> Status;
        stream_destroy: "dnnl_stream_destroy" (Handle) -> Status;
        stream_wait: "dnnl_stream_wait" (Handle) -> Status;
        memory_create: "dnnl_memory_create" (*mut Handle, *const c_void, Handle, *mut c_void) -> Status;
        memory_destroy: "dnnl_memory_destroy" (Handle) -> Status;
        description_destroy: "dnnl_primitive_desc_destroy" (Handle) -> Status;
        layout_of: "dnnl_primitive_desc_query_md" (Handle, c_int, c_int) -> *const c_void;
        layout_size: "dnnl_memory_desc_get_size" (*const c_void) -> usize;
        layouts_equal: "dnnl_memory_desc_equal" (*const c_void, *const c_void) -> c_int;
        reorder: "dnnl_reorder_primitive_desc_create"
            (*mut Handle, *const c_void, Handle, *const c_void, Handle, *const c_void) -> Status;
        primitive_create: "dnnl_primitive_create" (*mut Handle, Handle) -> Status;
        primitive_destroy: "dnnl_primitive_destroy" (Handle) -> Status;
        execute: "dnnl_primitive_execute" (Handle, Handle, c_int, *const Argument) -> Status;
    }
}

table! {
    /// Functions of version 2; the first argument is the structure that they fill in.
    #[derive(Clone, Copy, Debug)]
    Two {
        layout: "dnnl_memory_desc_init_by_strides" (*mut c_void, c_int, Sizes, c_int, Sizes) -> Status;
        layout_any: "dnnl_memory_desc_init_by_tag" (*mut c_void, c_int, Sizes, c_int, c_int) -> Status;
        describe: "dnnl_primitive_desc_create"
            (*mut Handle, *const c_void, *const c_void, Handle, Handle) -> Status;
        conv_forward: "dnnl_convolution_forward_desc_init"
            (*mut c_void, c_int, c_int, *const c_void, *const c_void, *const c_void, *const c_void, Sizes, Sizes, Sizes)
            -> Status;
        conv_data: "dnnl_convolution_backward_data_desc_init"
            (*mut c_void, c_int, *const c_void, *const c_void, *const c_void, Sizes, Sizes, Sizes) -> Status;
        conv_weights: "dnnl_convolution_backward_weights_desc_init"
            (*mut c_void, c_int, *const c_void, *const c_void, *const c_void, *const c_void, Sizes, Sizes, Sizes) -> Status;
        norm_forward: "dnnl_batch_normalization_forward_desc_init"
            (*mut c_void, c_int, *const c_void, f32, c_uint) -> Status;
        norm_backward: "dnnl_batch_normalization_backward_desc_init"
            (*mut c_void, c_int, *const c_void, *const c_void, f32, c_uint) -> Status;
        pool_forward: "dnnl_pooling_forward_desc_init"
            (*mut c_void, c_int, c_int, *const c_void, *const c_void, Sizes, Sizes, Sizes, Sizes) -> Status;
        pool_backward: "dnnl_pooling_backward_desc_init"
            (*mut c_void, c_int, *const c_void, *const c_void, Sizes, Sizes, Sizes, Sizes) -> Status;
        matmul: "dnnl_matmul_desc_init"
            (*mut c_void, *const c_void, *const c_void, *const c_void, *const c_void) -> Status;
        softmax: "dnnl_softmax_forward_desc_init" (*mut c_void, c_int, *const c_void, c_int) -> Status;
        binary: "dnnl_binary_desc_init"
            (*mut c_void, c_int, *const c_void, *const c_void, *const c_void) -> Status;
    }
}

table! {
    /// Functions of version 3; the first argument is the handle that they make.
    #[derive(Clone, Copy, Debug)]
    Three {
        layout: "dnnl_memory_desc_create_with_strides" (*mut Handle, c_int, Sizes, c_int, Sizes) -> Status;
        layout_any: "dnnl_memory_desc_create_with_tag" (*mut Handle, c_int, Sizes, c_int, c_int) -> Status;
        layout_destroy: "dnnl_memory_desc_destroy" (Handle) -> Status;
        conv_forward: "dnnl_convolution_forward_primitive_desc_create"
            (*mut Handle, Handle, c_int, c_int, *const c_void, *const c_void, *const c_void, *const c_void, Sizes, Sizes,
             Sizes, Sizes, *const c_void) -> Status;
        conv_data: "dnnl_convolution_backward_data_primitive_desc_create"
            (*mut Handle, Handle, c_int, *const c_void, *const c_void, *const c_void, Sizes, Sizes, Sizes, Sizes, Handle,
             *const c_void) -> Status;
        conv_weights: "dnnl_convolution_backward_weights_primitive_desc_create"
            (*mut Handle, Handle, c_int, *const c_void, *const c_void, *const c_void, *const c_void, Sizes, Sizes, Sizes,
             Sizes, Handle, *const c_void) -> Status;
        norm_forward: "dnnl_batch_normalization_forward_primitive_desc_create"
            (*mut Handle, Handle, c_int, *const c_void, *const c_void, f32, c_uint, *const c_void) -> Status;
        norm_backward: "dnnl_batch_normalization_backward_primitive_desc_create"
            (*mut Handle, Handle, c_int, *const c_void, *const c_void, *const c_void, f32, c_uint, Handle, *const c_void)
            -> Status;
        pool_forward: "dnnl_pooling_forward_primitive_desc_create"
            (*mut Handle, Handle, c_int, c_int, *const c_void, *const c_void, Sizes, Sizes, Sizes, Sizes, Sizes,
             *const c_void) -> Status;
        pool_backward: "dnnl_pooling_backward_primitive_desc_create"
            (*mut Handle, Handle, c_int, *const c_void, *const c_void, Sizes, Sizes, Sizes, Sizes, Sizes, Handle,
             *const c_void) -> Status;
        matmul: "dnnl_matmul_primitive_desc_create"
            (*mut Handle, Handle, *const c_void, *const c_void, *const c_void, *const c_void, *const c_void) -> Status;
        softmax: "dnnl_softmax_forward_primitive_desc_create"
            (*mut Handle, Handle, c_int, c_int, *const c_void, *const c_void, c_int, *const c_void) -> Status;
        binary: "dnnl_binary_primitive_desc_create"
            (*mut Handle, Handle, c_int, *const c_void, *const c_void, *const c_void, *const c_void) -> Status;
    }
}

#[derive(Clone, Copy, Debug)]
enum Interface {
    Two(Two),
    Three(Three),
}

/// An open oneDNN with an engine and a stream on the processor.
#[derive(Debug)]
pub(crate) struct OneDnn {
    common: Common,
    interface: Interface,
    engine: Handle,
    stream: Handle,
    name: String,
    /// Holds the functions; dropped last.
    _library: Library,
}

impl OneDnn {
    pub(super) fn open(path: Option<&Path>, threads: usize) -> Result<Self> {
        let (library, path) = super::find("oneDNN", &NAMES, path)?;
        let lacks = |it: &str, function| {
            Error::Device(format!("{} is {it} lacks `{function}`", path.display()))
        };
        // SAFETY: the function has this type in all versions.
        let version = unsafe {
            let version = library.get::<unsafe extern "C" fn() -> *const Version>("dnnl_version");
            let version = version.map_err(|_| lacks("no oneDNN: it", "dnnl_version"))?;
            let version = version();
            [(*version).major, (*version).minor, (*version).patch]
        };
        let text = format!("oneDNN {}.{}.{}", version[0], version[1], version[2]);
        let but = format!("{text}, but");
        let interface = match version[0] {
            2 => Two::of(&library).map(Interface::Two),
            3 => Three::of(&library).map(Interface::Three),
            _ => {
                return Err(Error::Device(format!(
                    "{} is {text}; this program speaks to 2 and 3",
                    path.display()
                )));
            }
        };
        let interface = interface.map_err(|function| lacks(&but, function))?;
        let common = Common::of(&library).map_err(|function| lacks(&but, function))?;
        // SAFETY: OpenMP declares `void omp_set_num_threads(int)`, and it counts for the calling thread. Builds with other
        // threads have no such function among their dependencies, and use all processors.
        let set = unsafe { library.get::<unsafe extern "C" fn(c_int)>("omp_set_num_threads") };
        if let Ok(set) = set {
            // SAFETY: as above.
            unsafe { set(threads as c_int) };
        }
        let (mut engine, mut stream) = (null_mut(), null_mut());
        // SAFETY: both arguments are handles to fill in.
        let made = unsafe {
            (common.engine_create)(&mut engine, CPU, 0) == 0
                && (common.stream_create)(&mut stream, engine, IN_ORDER) == 0
        };
        if !made {
            return Err(Error::Device(format!("{text} cannot use the processor")));
        }
        Ok(Self { common, interface, engine, stream, name: text, _library: library })
    }
}

impl Drop for OneDnn {
    fn drop(&mut self) {
        // SAFETY: both were created by `open`, and jobs, which use them, borrow this struct.
        unsafe {
            (self.common.stream_destroy)(self.stream);
            (self.common.engine_destroy)(self.engine);
        }
    }
}

/// A layout of a tensor.
enum Layout<'a> {
    /// Version 2: a `dnnl_memory_desc_t`, of some 700 bytes.
    Structure(Box<[u64; 512]>),
    /// Version 3.
    Handle(&'a OneDnn, Handle),
    /// Part of a description, which lives as long as the job.
    Queried(*const c_void),
}

impl Layout<'_> {
    fn at(&self) -> *const c_void {
        match self {
            Layout::Structure(structure) => structure.as_ptr().cast(),
            Layout::Handle(_, handle) => *handle,
            Layout::Queried(at) => *at,
        }
    }
}

impl Drop for Layout<'_> {
    fn drop(&mut self) {
        if let Layout::Handle(library, handle) = self
            && let Interface::Three(calls) = &library.interface
        {
            // SAFETY: created by `layout`; memories and descriptions have copies of their own.
            unsafe { (calls.layout_destroy)(*handle) };
        }
    }
}

fn dims<const N: usize>(sizes: [usize; N]) -> Dims {
    std::array::from_fn(|i| sizes.get(i).map_or(0, |&size| size as i64))
}

/// The extents in the library's order, channels second, and the strides of our order, channels last.
fn channels_last([n, h, w, c]: [usize; 4]) -> ([usize; 4], [usize; 4]) {
    ([n, c, h, w], [h * w * c, 1, w * c, c])
}

/// A primitive with its arguments.
struct Step {
    primitive: Handle,
    arguments: Vec<Argument>,
}

/// Primitives that run one after another over the slices of `'a`.
struct Sequence<'a> {
    library: &'a OneDnn,
    steps: Vec<Step>,
    descriptions: Vec<Handle>,
    /// Buffers that the job owns: results, and what passes from step to step. Never resized: memories point into them.
    buffers: Vec<Vec<f32>>,
    /// The buffers that are results.
    results: Vec<usize>,
    inputs: PhantomData<&'a [f32]>,
}

impl Drop for Sequence<'_> {
    fn drop(&mut self) {
        let common = &self.library.common;
        // SAFETY: the job created these handles and nothing else holds them.
        unsafe {
            for step in &self.steps {
                (common.primitive_destroy)(step.primitive);
                for argument in &step.arguments {
                    (common.memory_destroy)(argument.memory);
                }
            }
            for &description in &self.descriptions {
                (common.description_destroy)(description);
            }
        }
    }
}

/// Where a step's argument lies.
#[derive(Clone, Copy)]
enum Place<'a> {
    Input(&'a [f32]),
    Buffer(usize),
}

impl<'a> Sequence<'a> {
    fn new(library: &'a OneDnn) -> Self {
        let (steps, descriptions, buffers) = (Vec::new(), Vec::new(), Vec::new());
        Self { library, steps, descriptions, buffers, results: Vec::new(), inputs: PhantomData }
    }

    fn check(&self, what: &str, status: Status) -> std::result::Result<(), Lack> {
        match status {
            0 => Ok(()),
            UNIMPLEMENTED => Err(format!("{} has no {what}", self.library.name)),
            status => Err(format!("{} refuses a {what} (status {status})", self.library.name)),
        }
    }

    /// The layout with these extents and strides, or the library's choice without strides.
    fn layout<const N: usize>(
        &self,
        sizes: [usize; N],
        strides: Option<[usize; N]>,
    ) -> std::result::Result<Layout<'a>, Lack> {
        let (sizes, strides) = (dims(sizes), strides.map(dims));
        let (layout, status);
        // SAFETY: sizes and strides have the length of a `dnnl_dims_t`; the structure is larger than a `dnnl_memory_desc_t`.
        unsafe {
            match &self.library.interface {
                Interface::Two(calls) => {
                    let mut structure = Box::new([0_u64; 512]);
                    let at = structure.as_mut_ptr().cast();
                    status = match &strides {
                        Some(strides) => (calls.layout)(at, N as c_int, &sizes, F32, strides),
                        None => (calls.layout_any)(at, N as c_int, &sizes, F32, TAG_ANY),
                    };
                    layout = Layout::Structure(structure);
                }
                Interface::Three(calls) => {
                    let mut handle = null_mut();
                    status = match &strides {
                        Some(strides) => {
                            (calls.layout)(&mut handle, N as c_int, &sizes, F32, strides)
                        }
                        None => (calls.layout_any)(&mut handle, N as c_int, &sizes, F32, TAG_ANY),
                    };
                    self.check("layout", status)?;
                    layout = Layout::Handle(self.library, handle);
                }
            }
        }
        self.check("layout", status)?;
        Ok(layout)
    }

    fn last(&self, sizes: [usize; 4]) -> std::result::Result<Layout<'a>, Lack> {
        let (sizes, strides) = channels_last(sizes);
        self.layout(sizes, Some(strides))
    }

    /// Describes a primitive: `two` fills in a structure and `three` makes a handle.
    fn describe(
        &mut self,
        what: &str,
        hint: Handle,
        two: impl FnOnce(&Two, *mut c_void) -> Status,
        three: impl FnOnce(&Three, &mut Handle, Handle) -> Status,
    ) -> std::result::Result<Handle, Lack> {
        let (mut handle, engine) = (null_mut(), self.library.engine);
        let status = match &self.library.interface {
            Interface::Two(calls) => {
                // Larger than any operation's structure, which holds up to six layouts.
                let mut structure = vec![0_u64; 8192];
                match two(calls, structure.as_mut_ptr().cast()) {
                    // SAFETY: `two` has filled in the structure; `hint` is null or a description of the forward pass.
                    0 => unsafe {
                        (calls.describe)(
                            &mut handle,
                            structure.as_ptr().cast(),
                            null(),
                            engine,
                            hint,
                        )
                    },
                    status => status,
                }
            }
            Interface::Three(calls) => three(calls, &mut handle, engine),
        };
        self.check(what, status)?;
        self.descriptions.push(handle);
        Ok(handle)
    }

    /// A layout that the library chose.
    fn chosen(&self, description: Handle, which: c_int) -> Layout<'a> {
        // SAFETY: the description lives as long as the job.
        Layout::Queried(unsafe { (self.library.common.layout_of)(description, which, 0) })
    }

    /// A new buffer for a layout.
    fn buffer(&mut self, layout: &Layout<'_>) -> usize {
        // SAFETY: the layout is valid.
        let bytes = unsafe { (self.library.common.layout_size)(layout.at()) };
        self.buffers.push(vec![0.0; bytes.div_ceil(4)]);
        self.buffers.len() - 1
    }

    fn result(&mut self, layout: &Layout<'_>) -> Place<'a> {
        let buffer = self.buffer(layout);
        self.results.push(buffer);
        Place::Buffer(buffer)
    }

    /// Appends the primitive of a description.
    fn step(
        &mut self,
        description: Handle,
        arguments: &[(c_int, &Layout<'_>, Place<'a>)],
    ) -> std::result::Result<(), Lack> {
        let (common, engine) = (self.library.common, self.library.engine);
        let mut primitive = null_mut();
        // SAFETY: the description is one that `describe` or `reorder` returned.
        let status = unsafe { (common.primitive_create)(&mut primitive, description) };
        self.check("primitive", status)?;
        self.steps.push(Step { primitive, arguments: Vec::new() });
        for &(index, layout, place) in arguments {
            // SAFETY: the layout is valid.
            let bytes = unsafe { (common.layout_size)(layout.at()) };
            let (at, len) = match place {
                // The library does not write to what it only reads.
                Place::Input(slice) => (slice.as_ptr().cast_mut(), slice.len()),
                Place::Buffer(i) => (self.buffers[i].as_mut_ptr(), self.buffers[i].len()),
            };
            assert!(bytes <= 4 * len, "a buffer of {} bytes for {bytes}", 4 * len);
            let mut memory = null_mut();
            // SAFETY: the buffer has the layout's size and lives as long as the job.
            let status =
                unsafe { (common.memory_create)(&mut memory, layout.at(), engine, at.cast()) };
            self.check("memory", status)?;
            self.steps.last_mut().expect("pushed above").arguments.push(Argument { index, memory });
        }
        Ok(())
    }

    /// Appends a reordering between two layouts.
    fn reorder(
        &mut self,
        (from, at): (&Layout<'_>, Place<'a>),
        (to, result): (&Layout<'_>, Place<'a>),
    ) -> std::result::Result<(), Lack> {
        let engine = self.library.engine;
        let mut description = null_mut();
        // SAFETY: both layouts are valid.
        let status = unsafe {
            (self.library.common.reorder)(
                &mut description,
                from.at(),
                engine,
                to.at(),
                engine,
                null(),
            )
        };
        self.check("reordering", status)?;
        self.descriptions.push(description);
        self.step(description, &[(SRC, from, at), (DST, to, result)])
    }

    fn equal(&self, a: &Layout<'_>, b: &Layout<'_>) -> bool {
        // SAFETY: both layouts are valid.
        unsafe { (self.library.common.layouts_equal)(a.at(), b.at()) != 0 }
    }

    /// The workspace that a forward pass leaves to the backward pass, if it needs one.
    fn workspace(&mut self, description: Handle) -> Option<(Layout<'a>, Place<'a>)> {
        let layout = self.chosen(description, WORKSPACE_LAYOUT);
        // SAFETY: the library returns null or a valid layout.
        let used =
            !layout.at().is_null() && unsafe { (self.library.common.layout_size)(layout.at()) } > 0;
        used.then(|| {
            let buffer = self.buffer(&layout);
            (layout, Place::Buffer(buffer))
        })
    }
}

impl Job for Sequence<'_> {
    fn run(&mut self) {
        let common = &self.library.common;
        for step in &self.steps {
            let count = step.arguments.len() as c_int;
            // SAFETY: every argument's memory is valid, and the buffers behind them live as long as `self`.
            let status = unsafe {
                (common.execute)(
                    step.primitive,
                    self.library.stream,
                    count,
                    step.arguments.as_ptr(),
                )
            };
            assert_eq!(status, 0, "{} fails while it runs", self.library.name);
        }
        // SAFETY: the stream is valid.
        unsafe { (common.stream_wait)(self.library.stream) };
    }

    fn outputs(&self) -> Vec<Vec<f32>> {
        self.results.iter().map(|&i| self.buffers[i].clone()).collect()
    }
}

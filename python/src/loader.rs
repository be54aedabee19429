//! Batches of views, and the views of one image.

use std::cell::RefCell;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use rayon::prelude::*;
use selfsup::Error;
use selfsup::data::augment::Scratch;
use selfsup::data::{self, Batch, Image, Policy};
use selfsup::device::{Device, Philox, Precision, Purpose, as_guest};
use selfsup::tensor::Tensor;

use crate::arrays::Shared;
use crate::device::{Wanted, gpu_number};
use crate::dlpack::GpuArray;
use crate::error::{Error as Raised, raised, released};
use crate::images::Array;
use crate::reading::ReadingKeys;
use crate::recipe::policies;
use crate::source::Source;

/// Epochs that a loader can go to; it counts on in 32 bits from there.
const EPOCHS: u32 = 1 << 31;

/// How the views of a batch lie in memory.
#[derive(Clone, Copy)]
struct Layout {
    /// Channels of a view.
    channels: usize,
    /// Values per pixel of the engine's views; those behind the channels are zero.
    padded: usize,
    /// `[n, c, s, s]` instead of `[n, s, s, c]`.
    channels_first: bool,
    /// Bytes instead of f32.
    bytes: bool,
    /// Without gaps, which takes a copy of f32.
    contiguous: bool,
}

/// The device on which views are made, and its number where it is a GPU.
#[derive(Clone)]
struct Place {
    device: Device,
    gpu: Option<usize>,
}

impl Place {
    /// Opens the device of this name.
    fn open(name: Option<&str>, threads: usize) -> selfsup::Result<Self> {
        let name = Some(name.unwrap_or("cpu").to_string());
        let gpu = name.as_deref().and_then(gpu_number);
        let precision = Some(Precision::F32);
        let device = Wanted { name, precision, threads, ..Wanted::default() }.open()?;
        Ok(Self { device, gpu })
    }

    /// Runs `f`, on a GPU as a guest in a thread that other libraries' calls of CUDA share.
    fn run<R>(&self, f: impl FnOnce() -> R) -> R {
        if self.gpu.is_some() { as_guest(f) } else { f() }
    }
}

/// The engine's loader.
#[pyclass(frozen, module = "selfsup._native")]
pub struct Loader {
    loader: Mutex<Option<data::Loader>>,
    /// Taken by `drop` alone.
    place: Option<Place>,
    /// For each size the views that have it, as the engine groups them.
    groups: Vec<(usize, Vec<usize>)>,
    views: usize,
    batch: usize,
    layout: Layout,
    /// The process that made it: its threads exist nowhere else.
    process: u32,
}

#[pymethods]
impl Loader {
    #[new]
    #[pyo3(signature = (source, policies, *, batch, seed, threads, channels_first, bytes, contiguous, device, gpu_memory))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments")]
    fn new(
        py: Python<'_>,
        source: &Source,
        policies: &Bound<'_, PyAny>,
        batch: usize,
        seed: u64,
        threads: usize,
        channels_first: bool,
        bytes: bool,
        contiguous: bool,
        device: Option<&str>,
        gpu_memory: Option<usize>,
    ) -> PyResult<Self> {
        let on_gpu = device.is_some_and(|name| gpu_number(name).is_some());
        if on_gpu && (bytes || contiguous) {
            return Err(PyValueError::new_err(
                "on a GPU views are float32 in the engine's layout: leave dtype and contiguous as they are",
            ));
        }
        let policies = self::policies(policies)?;
        if bytes && policies.iter().any(|policy| policy.normalise.is_some()) {
            return Err(PyValueError::new_err(
                "normalised views are no bytes: use dtype=\"float32\", or normalise=False",
            ));
        }
        let format = source.0.format();
        if bytes && format.bits != 8 {
            return Err(PyValueError::new_err(format!(
                "views of images of {} bits are no bytes: use dtype=\"float32\"",
                format.bits
            )));
        }
        let (channels, padded) = (format.channels, format.device_channels());
        let layout = Layout { channels, padded, channels_first, bytes, contiguous };
        let mut groups: Vec<(usize, Vec<usize>)> = Vec::new();
        for (view, policy) in policies.iter().enumerate() {
            match groups.iter_mut().find(|(size, _)| *size == policy.size) {
                Some((_, views)) => views.push(view),
                None => groups.push((policy.size, vec![view])),
            }
        }
        let (views, source) = (policies.len(), source.0.clone());
        let (loader, place) = released(py, || {
            as_guest(|| {
                let place = Place::open(device, threads)?;
                let device = &place.device;
                let mut loader = data::Loader::new(source, policies, batch, seed, threads, device)?;
                if let Some(bytes) = gpu_memory {
                    loader = loader.keep_at_most(bytes);
                }
                // Each wait ends soon, so that signals are seen.
                loader.stop_when(Arc::new(AtomicBool::new(true)));
                Ok((loader, place))
            })
        })?;
        Ok(Self {
            loader: Mutex::new(Some(loader)),
            place: Some(place),
            groups,
            views,
            batch,
            layout,
            process: std::process::id(),
        })
    }

    /// Batches per epoch.
    fn batches_per_epoch(&self, py: Python<'_>) -> PyResult<usize> {
        self.with(py, |loader| Ok(loader.batches_per_epoch()))
    }

    /// Makes a batch of an epoch the next one.
    fn seek(&self, py: Python<'_>, epoch: u64, position: usize) -> PyResult<()> {
        let number = u32::try_from(epoch).ok().filter(|&epoch| epoch < EPOCHS);
        let Some(epoch) = number else {
            return Err(PyValueError::new_err(format!("epoch {epoch}: epochs are below {EPOCHS}")));
        };
        let length = self.batches_per_epoch(py)?;
        if position >= length {
            return Err(PyValueError::new_err(format!(
                "batch {position} of an epoch of {length} batches"
            )));
        }
        self.with(py, |loader| {
            loader.seek(epoch, position);
            Ok(())
        })
    }

    /// The views in their order, classes, indices, epoch and position of the next batch.
    #[expect(clippy::type_complexity, reason = "a tuple for Python")]
    fn next<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Vec<Bound<'py, PyAny>>, Vec<i64>, Vec<i64>, u32, usize)> {
        let batch = loop {
            // A `Stopped` says that nothing is ready yet.
            let next = self.with(py, |loader| match loader.next_batch() {
                Err(Error::Stopped(_)) => Ok(None),
                batch => batch.map(Some),
            })?;
            self.device().check().map_err(|e| raised(&e))?;
            // A signal's exception would lose a batch that is there.
            match next {
                Some(batch) => break batch,
                None => py.check_signals()?,
            }
        };
        let Batch { epoch, position, indices, labels, crops } = batch;
        let mut views: Vec<Option<Bound<'py, PyAny>>> = vec![None; self.views];
        for (crops, (size, of_size)) in crops.into_iter().zip(&self.groups) {
            for (array, view) in
                self.arrays(py, crops, *size, of_size.len())?.into_iter().zip(of_size)
            {
                views[*view] = Some(array);
            }
        }
        let views = views.into_iter().flatten().collect();
        let labels = labels.into_iter().map(i64::from).collect();
        Ok((views, labels, indices.into_iter().map(i64::from).collect(), epoch, position))
    }

    /// Index and reason of each image that could not be read so far.
    fn skipped(&self, py: Python<'_>) -> PyResult<Vec<(u32, String)>> {
        self.with(py, |loader| {
            Ok(loader
                .skipped()
                .into_iter()
                .map(|skipped| (skipped.index, skipped.reason))
                .collect())
        })
    }
}

impl Loader {
    /// Works with the engine's loader.
    fn with<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&mut data::Loader) -> selfsup::Result<T> + Send,
    ) -> PyResult<T> {
        if self.process != std::process::id() {
            return Err(Raised::new_err(
                "this Loader was made before the process was forked, and its threads are in the other process: make a Loader in \
                 each process, or start processes with the method \"spawn\"",
            ));
        }
        released(py, || {
            let mut loader = self.loader.lock().unwrap_or_else(PoisonError::into_inner);
            self.place().run(|| work(loader.as_mut().expect("it is taken by `drop` alone")))
        })
    }

    fn place(&self) -> &Place {
        self.place.as_ref().expect("it is taken by `drop` alone")
    }

    fn device(&self) -> &Device {
        &self.place().device
    }

    /// The arrays of the `views` of one size, each `[batch, …]`, whose crops are `[views * batch, size, size, padded]`.
    fn arrays<'py>(
        &self,
        py: Python<'py>,
        crops: Tensor,
        size: usize,
        views: usize,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let Layout { channels, padded, channels_first, bytes, contiguous } = self.layout;
        let (n, area) = (self.batch, size * size);
        let shape =
            if channels_first { [n, channels, size, size] } else { [n, size, size, channels] };
        if !bytes && !contiguous {
            let row = size * padded;
            let strides = match channels_first {
                true => [size * row, 1, row, padded],
                false => [size * row, row, padded, 1],
            };
            if let Some(gpu) = self.place().gpu {
                let view = |i| {
                    let rows = crops.rows(i * n, n);
                    Ok(Bound::new(py, GpuArray::strided(rows, gpu, &shape, &strides))?.into_any())
                };
                return (0..views).map(view).collect();
            }
            let shared = Shared::tensor(py, crops)?;
            let view = |i| shared.array(i * n * area * padded, &shape, &strides).into_any();
            return Ok((0..views).map(view).collect());
        }
        let strides = match channels_first {
            true => [channels * area, area, size, 1],
            false => [channels * area, size * channels, channels, 1],
        };
        let at = |i| i * n * area * channels;
        if bytes {
            let packed = released(py, || {
                // 8-bit pixels were divided by 255: this gives them back exactly.
                Ok(self.packed(&crops, area, |value| (value * 255.0).round() as u8))
            })?;
            let shared = Shared::bytes(py, packed)?;
            return Ok((0..views)
                .map(|i| shared.array(at(i), &shape, &strides).into_any())
                .collect());
        }
        let packed = released(py, || Ok(self.packed(&crops, area, |value| value)))?;
        let shared = Shared::floats(py, packed)?;
        Ok((0..views).map(|i| shared.array(at(i), &shape, &strides).into_any()).collect())
    }

    /// Crops of `area` pixels each without what pads their pixels.
    fn packed<T: Copy + Default + Send>(
        &self,
        crops: &Tensor,
        area: usize,
        convert: impl Fn(f32) -> T + Sync,
    ) -> Box<[T]> {
        let Layout { channels, padded, channels_first, .. } = self.layout;
        let crops = crops.data::<f32>();
        let mut packed = vec![T::default(); crops.len() / padded * channels].into_boxed_slice();
        self.device().run(|| {
            let images =
                packed.par_chunks_mut(area * channels).zip(crops.par_chunks(area * padded));
            images.for_each(|(to, from)| {
                if channels_first {
                    for (channel, to) in to.chunks_exact_mut(area).enumerate() {
                        let pixels = from.chunks_exact(padded);
                        to.iter_mut()
                            .zip(pixels)
                            .for_each(|(to, pixel)| *to = convert(pixel[channel]));
                    }
                } else if channels == 3 {
                    let pixels = from.as_chunks::<4>().0;
                    for (to, &[r, g, b, _]) in to.as_chunks_mut::<3>().0.iter_mut().zip(pixels) {
                        *to = [r, g, b].map(&convert);
                    }
                } else {
                    let pixels = from.chunks_exact(padded);
                    for (to, pixel) in to.chunks_exact_mut(channels).zip(pixels) {
                        to.iter_mut().zip(pixel).for_each(|(to, &value)| *to = convert(value));
                    }
                }
            });
        });
        packed
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        let loader = self.loader.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let held = (loader, self.place.take());
        let on_gpu = held.1.as_ref().is_some_and(|place| place.gpu.is_some());
        match self.process == std::process::id() {
            true if on_gpu => as_guest(|| drop(held)),
            true => drop(held),
            // Its threads are in another process: to wait for them here would be in vain. Nor are contexts of GPUs here.
            false => std::mem::forget(held),
        }
    }
}

/// The views of one image, for programs that load images themselves. It has no threads.
#[pyclass(frozen, module = "selfsup._native")]
pub struct Augmentation {
    policies: Vec<Policy>,
    reading: ReadingKeys,
}

thread_local! {
    static SCRATCH: RefCell<(Image, Scratch)> = RefCell::default();
}

#[pymethods]
impl Augmentation {
    #[new]
    fn new(policies: &Bound<'_, PyAny>, reading: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        Ok(Self { policies: self::policies(policies)?, reading: ReadingKeys::of(reading)? })
    }

    /// The views of an image `[h, w, c]` of u8, u16 or f32, contiguous, drawn from the random stream of a seed.
    fn apply<'py>(
        &self,
        py: Python<'py>,
        image: &Bound<'py, PyAny>,
        seed: u64,
        channels_first: bool,
    ) -> PyResult<Vec<Bound<'py, PyAny>>> {
        let array = Array::of(image)?;
        let reading = self.reading.for_format(array.format()).map_err(|e| raised(&e))?;
        let (channels, padded) = (reading.format.channels, reading.format.device_channels());
        let fits = |policy: &Policy| policy.check_for(reading.format);
        self.policies.iter().try_for_each(fits).map_err(|e| raised(&e))?;
        let views = released(py, || {
            SCRATCH.with_borrow_mut(|(image, scratch)| {
                if let Err(reason) = array.read(&reading, image) {
                    return Ok(Err(reason));
                }
                let view = |(index, policy): (usize, &Policy)| {
                    let mut rng = Philox::new(seed, Purpose::Augmentation, 0, index as u32);
                    let params = policy.draw(&mut rng, image.width, image.height);
                    let mut out = vec![0.0; policy.size * policy.size * padded];
                    policy.apply(&params, image, &mut out, scratch);
                    out.into_boxed_slice()
                };
                Ok(Ok(self.policies.iter().enumerate().map(view).collect::<Vec<_>>()))
            })
        })?;
        let refused = |reason| PyValueError::new_err(format!("the image {reason}"));
        let array = |(policy, values): (&Policy, Box<[f32]>)| {
            let s = policy.size;
            let (shape, strides) = match channels_first {
                true => ([channels, s, s], [1, s * padded, padded]),
                false => ([s, s, channels], [s * padded, padded, 1]),
            };
            Ok(Shared::floats(py, values)?.array(0, &shape, &strides).into_any())
        };
        self.policies.iter().zip(views.map_err(refused)?).map(array).collect()
    }
}

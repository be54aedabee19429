//! What a run has learnt: features, neighbours, linear probes, weights.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use numpy::{PyArrayDyn, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pythonize::pythonize;
use selfsup::arena::{Arena, Layout};
use selfsup::data::augment::Normalise;
use selfsup::data::{Policy, Reading, Subset, Transform};
use selfsup::device::{Device, Precision};
use selfsup::eval::{self, Features, Frozen, Knn, Protocol};
use selfsup::nn::{ResNet, ResNetConfig};
use selfsup::train::{self, Images, Trained};
use selfsup::{Error, Result};

use crate::arrays::Shared;
use crate::device::Wanted;
use crate::error::released;
use crate::reading::ReadingKeys;
use crate::source::{Given, Source, Sources, sources};

/// Images between two looks at signals.
const AT_ONCE: usize = 256;

/// A backbone with its weights and its input transform.
struct Network {
    arena: Arena,
    backbone: ResNet,
    policy: Policy,
    transform: Transform,
    /// How its images are read.
    reading: Reading,
}

impl Network {
    /// The backbone of a run, with the transform of the run's own evaluation.
    fn own(path: &Path, device: Option<String>) -> Result<Self> {
        let trained = Trained::open(path, &[])?;
        let device = of_recipe(&trained, device)?;
        let (method, arena) = trained.load(&device)?;
        let (backbone, policy) = (method.backbone().clone(), trained.recipe.augment[0].clone());
        let (transform, reading) = (Transform::Center, trained.recipe.data.reading());
        Ok(Self { arena, backbone, policy, transform, reading })
    }

    /// A backbone from a file with torchvision's names, with the transform of torchvision's presets.
    fn foreign(file: &Path, arch: &str, device: Option<String>) -> Result<Self> {
        let network = ResNetConfig::named(arch)?;
        let precision = Some(Precision::F32);
        let device = Wanted { name: device, precision, ..Wanted::default() }.open()?;
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "backbone.", &network);
        let mut arena = Arena::new(&Arc::new(layout), &device, 0);
        train::init_weights(file, &mut arena)?;
        let policy = Policy { normalise: Some(Normalise::imagenet()), ..Policy::crop(224) };
        let (transform, reading) = (Transform::ResizedCenter, Reading::default());
        Ok(Self { arena, backbone, policy, transform, reading })
    }
}

/// The device for a run's network.
fn of_recipe(trained: &Trained, name: Option<String>) -> Result<Device> {
    let train = &trained.recipe.train;
    let (precision, threads) = (train.precision, train.threads);
    Wanted { name, precision, threads, ..Wanted::default() }.open()
}

/// A backbone with its weights, for features.
#[pyclass(frozen, module = "selfsup._native")]
pub struct Encoder(Mutex<Network>);

#[pymethods]
impl Encoder {
    /// The backbone of a run's folder or checkpoint; or one of the network `arch` from weights with torchvision's names.
    #[new]
    #[pyo3(signature = (path, arch, device))]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        arch: Option<String>,
        device: Option<String>,
    ) -> PyResult<Self> {
        let network = released(py, || match arch {
            Some(arch) => Network::foreign(&path, &arch, device),
            None => Network::own(&path, device),
        })?;
        Ok(Self(Mutex::new(network)))
    }

    /// How its images are read, as keys of a recipe's `data`.
    #[getter]
    fn reading<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let network = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(pythonize(py, &ReadingKeys::in_full(&network.reading))?)
    }

    /// The features `[n, d]` of a set. `on_images` is called with the number of images done.
    #[pyo3(signature = (source, size, on_images))]
    fn embed<'py>(
        &self,
        py: Python<'py>,
        source: &Source,
        size: Option<usize>,
        on_images: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let source = &source.0;
        let (mut values, mut width) = (Vec::new(), 0);
        for from in (0..source.len()).step_by(AT_ONCE) {
            let to = (from + AT_ONCE).min(source.len());
            let part = released(py, || {
                let network = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                let Network { arena, backbone, policy, transform, .. } = &*network;
                let policy = Policy { size: size.unwrap_or(policy.size), ..policy.clone() };
                policy.check()?;
                let part = Subset::new(source.clone(), (from as u32..to as u32).collect());
                eval::embed(arena, backbone, &part, &policy, *transform, |_| ())
            })?;
            // A row that is missing would shift all that follow.
            if let Some(image) = part.skipped.first() {
                return Err(crate::error::Error::new_err(image.reason.clone()));
            }
            width = part.d;
            values.extend(part.values);
            on_images.call1((to,))?;
            py.check_signals()?;
        }
        let rows = source.len();
        Ok(Shared::floats(py, values.into_boxed_slice())?.whole(&[rows, width]))
    }
}

/// The accuracy of each kind of features of a run on its held-out images: raw pixels, the untrained network, the trained one.
#[pyfunction]
#[pyo3(signature = (run, settings, given, k, temperature, device))]
pub fn run_knn(
    py: Python<'_>,
    run: PathBuf,
    settings: Vec<String>,
    given: Option<Given<'_>>,
    k: usize,
    temperature: f64,
    device: Option<String>,
) -> PyResult<Vec<(&'static str, f64)>> {
    let (knn, given) = (checked_knn(k, temperature)?, given.map(sources));
    released(py, || {
        let trained = Trained::open(&run, &settings)?;
        let device = of_recipe(&trained, device)?;
        let images = images_of(&trained, given)?;
        let (bank, queries) = (&*images.train, &**images.held_out()?);
        let size = trained.recipe.augment[0].size;
        let pixels = [bank, queries].map(|source| eval::pixel_features(source, size, &device));
        let [bank_pixels, query_pixels] = pixels;
        let (bank_pixels, query_pixels) = (bank_pixels?, query_pixels?);
        unread(&trained, [&bank_pixels, &query_pixels])?;
        let of_pixels = eval::knn_accuracy(&bank_pixels, &query_pixels, knn, &device)?;
        let (method, weights) = trained.load(&device)?;
        let random = Arena::new(method.layout(), &device, trained.recipe.seed);
        let mut found = vec![("raw pixels", of_pixels)];
        for (name, arena) in [("random init", &random), ("trained", &weights)] {
            let (backbone, policy) = (method.backbone(), &trained.recipe.augment[0]);
            let features = |source| eval::backbone_features(arena, backbone, source, policy);
            found.push((
                name,
                eval::knn_accuracy(&features(bank)?, &features(queries)?, knn, &device)?,
            ));
        }
        Ok(found)
    })
}

/// The images of a run, or those given in their place.
fn images_of(trained: &Trained, given: Option<Sources>) -> Result<Images> {
    match given {
        Some((train, held_out)) => Images::given(&trained.recipe.data, train, held_out),
        None => Images::open(&trained.recipe.data),
    }
}

/// Refuses sets of which more images cannot be read than the recipe allows.
fn unread(trained: &Trained, sets: [&Features; 2]) -> Result<()> {
    let most = trained.recipe.data.max_skipped;
    for set in sets {
        let (read, broken) = (set.labels.len(), set.skipped.len());
        if let Some(first) = set.skipped.first()
            && broken as f64 > most * (read + broken) as f64
        {
            return Err(Error::Unreadable(format!(
                "{broken} of {} images cannot be read, more than data.max_skipped={most} allows; the first: {}",
                read + broken,
                first.reason
            )));
        }
    }
    Ok(())
}

/// The accuracy of a linear classifier on features of a run, by a protocol: of the untrained network, and of the trained one.
#[pyfunction]
#[pyo3(signature = (run, settings, given, protocol, epochs, sweep, labels, device))]
#[expect(clippy::too_many_arguments, reason = "keyword arguments of Python")]
pub fn run_linear(
    py: Python<'_>,
    run: PathBuf,
    settings: Vec<String>,
    given: Option<Given<'_>>,
    protocol: &str,
    epochs: Option<u32>,
    sweep: bool,
    labels: Option<String>,
    device: Option<String>,
) -> PyResult<Vec<(&'static str, f64)>> {
    let given = given.map(sources);
    released(py, || {
        let mut protocol = Protocol::named(protocol)?;
        if let Some(epochs) = epochs {
            protocol = protocol.over(epochs);
        }
        let mut trained = Trained::open(&run, &settings)?;
        trained.recipe.data.labels = labels.or(trained.recipe.data.labels.take());
        let device = of_recipe(&trained, device)?;
        let images = images_of(&trained, given)?;
        let (method, weights) = trained.load(&device)?;
        let random = Arena::new(method.layout(), &device, trained.recipe.seed);
        let rates: &[f64] = if sweep { &eval::RATES } else { &[] };
        let mut found = Vec::new();
        for (name, arena) in [("random init", &random), ("trained", &weights)] {
            let policy = &trained.recipe.augment[0];
            let frozen = Frozen { arena, backbone: method.backbone(), policy };
            let (train, test, seed) = (&images.train, &**images.held_out()?, trained.recipe.seed);
            let probed = eval::linear_accuracy(frozen, train, test, &protocol, rates, seed)?;
            found.push((name, probed.accuracy));
        }
        Ok(found)
    })
}

fn checked_knn(k: usize, temperature: f64) -> PyResult<Knn> {
    if k == 0 || !(temperature.is_finite() && temperature > 0.0) {
        return Err(PyValueError::new_err(format!(
            "k is {k} and the temperature {temperature}: both must be above 0"
        )));
    }
    Ok(Knn { k, temperature })
}

/// The accuracy of a weighted vote of neighbours, from features of any origin.
#[pyfunction]
pub fn knn(
    py: Python<'_>,
    bank: (PyReadonlyArray2<'_, f32>, Vec<u32>),
    queries: (PyReadonlyArray2<'_, f32>, Vec<u32>),
    k: usize,
    temperature: f64,
) -> PyResult<f64> {
    let (knn, [bank, queries]) = (checked_knn(k, temperature)?, pair(bank, queries)?);
    released(py, || eval::knn_accuracy(&bank, &queries, knn, &Device::cpu(0)?))
}

/// The accuracy of a linear classifier trained on a few rows of each class, from features of any origin.
#[pyfunction]
pub fn few_label_probe(
    py: Python<'_>,
    bank: (PyReadonlyArray2<'_, f32>, Vec<u32>),
    queries: (PyReadonlyArray2<'_, f32>, Vec<u32>),
    per_class: usize,
    seed: u64,
) -> PyResult<f64> {
    if per_class == 0 {
        return Err(PyValueError::new_err("per_class must be above 0"));
    }
    let [bank, queries] = pair(bank, queries)?;
    released(py, || eval::few_label_accuracy(&bank, &queries, per_class, seed, &Device::cpu(0)?))
}

type Labelled<'py> = (PyReadonlyArray2<'py, f32>, Vec<u32>);

/// Two sets of features of one width, neither of them empty.
fn pair(bank: Labelled<'_>, queries: Labelled<'_>) -> PyResult<[Features; 2]> {
    let features = |(rows, labels): Labelled<'_>| {
        let &[n, d] = rows.shape() else { unreachable!("a PyArray2") };
        if n != labels.len() || n == 0 || d == 0 {
            let count = labels.len();
            return Err(PyValueError::new_err(format!("features [{n}, {d}] with {count} labels")));
        }
        Ok(Features { values: rows.as_slice()?.to_vec(), labels, ..Features::none(d) })
    };
    let both = [features(bank)?, features(queries)?];
    if both[0].d != both[1].d {
        return Err(PyValueError::new_err(format!(
            "features of {} and of {} values cannot be compared",
            both[0].d, both[1].d
        )));
    }
    Ok(both)
}

/// Writes a run's backbone with torchvision's names, or as an ONNX model.
#[pyfunction]
pub fn export(py: Python<'_>, run: PathBuf, out: PathBuf, onnx: bool) -> PyResult<()> {
    released(py, || {
        let (_, arena) = Trained::open(&run, &[])?.load(&Device::cpu(1)?)?;
        if onnx { train::export_onnx(&out, &arena) } else { train::export_backbone(&out, &arena) }
    })
}

/// Writes the report of runs as one page.
#[pyfunction]
pub fn report(py: Python<'_>, runs: Vec<PathBuf>, out: Option<PathBuf>) -> PyResult<String> {
    released(py, || {
        if let Some(out) = &out {
            train::write_report(&runs, out)?;
        }
        train::report(&runs)
    })
}

//! The images of a run, as its recipe names them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use crate::data::{self, Format, Image, Skipped, Source, Split, Subset};
use crate::device::{Device, Philox, Purpose};
use crate::error::{Error, Result};
use crate::recipes::DataSettings;

/// Images of each split that are read before the first step.
const TRIED: usize = 32;

/// Unreadable images among [`TRIED`] of a larger split that may be chance.
const CHANCE: f64 = 7.0;

/// `data.path` of a run whose images a program [gave](Images::given).
pub const GIVEN: &str = "(given)";

/// The images of a run.
#[derive(Clone)]
pub struct Images {
    /// The images to train on.
    pub train: Arc<dyn Source>,
    /// The share of the training split that chooses the best checkpoint and is not trained on; `None` unless `data.validation`
    /// is set.
    pub validation: Option<Arc<dyn Source>>,
    /// The held-out split; `None` if the set has no such split or no labels.
    pub test: Option<Arc<dyn Source>>,
    /// Says why there is no held-out split, or why a figure on it says nothing, if there is a reason.
    about_test: Option<String>,
}

/// Images of a split whose pixels are compared.
const COMPARED: usize = 64;

/// Checksums of the names and labels of a set's images, in their order, and of the pixels of some: the seed says which, spread over the
/// set. Of a name the file's counts, not the folders': a set may lie elsewhere, or in a pack.
pub(super) fn checksums(source: &dyn Source, seed: u64, device: &Device) -> Result<[u32; 2]> {
    let count = source.len();
    let names = (0..count).fold(0, |crc, i| {
        let name = source.name(i);
        let file = name.rsplit(['/', '\\']).next().unwrap_or_default();
        crc32c::crc32c_append(crc, format!("{file}\n{:?}\n", source.label(i)).as_bytes())
    });
    let pixels = |part: usize| {
        let [from, to] = [part, part + 1].map(|part| part * count / COMPARED.min(count));
        let mut rng = Philox::new(seed, Purpose::Order, u32::MAX, part as u32);
        let (index, mut image) = (from + rng.below((to - from) as u32) as usize, Image::default());
        match source.read(index, &mut image) {
            Ok(()) => Ok(crc32c::crc32c_append(image.width as u32, &image.pixels)),
            Err(error) => Skipped::new(index, error).map(|_| 0),
        }
    };
    let pixels = || (0..COMPARED.min(count)).into_par_iter().map(pixels).collect();
    let pixels: Vec<u32> = device.host().run(|| -> Result<_> { pixels() })?;
    Ok([names, crc32c::crc32c(bytemuck::cast_slice(&pixels))])
}

impl Images {
    /// Opens the images that a recipe names.
    ///
    /// # Errors
    /// If the path does not hold a data set, or a split of it is damaged.
    pub fn open(settings: &DataSettings) -> Result<Self> {
        if settings.path == GIVEN {
            return Err(Error::config(
                "the images of this run were given by the program that trained it, and lie nowhere: give them again (in Python data=, \
                 where the run is trained, resumed or evaluated), or name a folder that holds them with data.path=FOLDER",
            ));
        }
        let (table, part) = settings.label_table()?;
        let open = |split, limit: usize| -> Result<Arc<dyn Source>> {
            let all: Arc<dyn Source> = if settings.path == "fashion-scattered" {
                if table.is_some() {
                    return Err(Error::config(
                        "fashion-scattered has labels of its own: leave the table in data.labels out",
                    ));
                }
                if !settings.reading().is_rgb() {
                    return Err(Error::config(
                        "fashion-scattered has 3 channels of 8 bits: leave data.channels and data.bits out",
                    ));
                }
                Arc::new(data::fashion_scattered(split))
            } else {
                let (path, reading) = (Path::new(&settings.path), settings.reading());
                data::open_labelled(path, split, &reading, table.as_ref())?.into()
            };
            Ok(limited(all, limit))
        };
        let mut images = Self::to_train_on(open(Split::Train, settings.limit)?, part, settings)?;
        if images.train.classes().is_empty() {
            return Ok(images);
        }
        match open(Split::Test, settings.test_limit) {
            Ok(test) => images.hold_out(test, &settings.path),
            // A set without a held-out split can be trained on; one with a damaged file cannot.
            Err(Error::Format { path, .. }) if path == Path::new(&settings.path) => {}
            Err(error) => return Err(error),
        }
        Ok(images)
    }

    /// Takes images that a program has in place of those at the recipe's path, which is [`GIVEN`] then: `limit`, `test_limit`, a share in
    /// `labels`, and `validation` select among them.
    ///
    /// # Errors
    /// If they have other channels or bits than the recipe reads, `labels` names a table, or `validation` finds no labels.
    pub fn given(
        settings: &DataSettings,
        train: Arc<dyn Source>,
        held_out: Option<Arc<dyn Source>>,
    ) -> Result<Self> {
        let (table, part) = settings.label_table()?;
        if table.is_some() {
            return Err(Error::config(
                "data.labels names a table of the classes of image files, and the images are given: give their labels with them",
            ));
        }
        let wanted = settings.reading().format;
        for format in held_out.iter().chain([&train]).map(|images| images.format()) {
            if format != wanted {
                let Format { channels, bits } = format;
                return Err(Error::Config(format!(
                    "the images given have {format}, and the recipe reads {wanted}: set data.channels={channels} and data.bits={bits}"
                )));
            }
        }
        let mut images = Self::to_train_on(limited(train, settings.limit), part, settings)?;
        if let Some(held_out) = held_out.filter(|_| !images.train.classes().is_empty()) {
            images.hold_out(limited(held_out, settings.test_limit), &settings.path);
        }
        Ok(images)
    }

    /// A part of the training images, without those that validate.
    fn to_train_on(
        mut train: Arc<dyn Source>,
        part: Option<&str>,
        settings: &DataSettings,
    ) -> Result<Self> {
        if let Some(which) = part {
            let labelled = data::labelled(&*train, which)?;
            train = Arc::new(Subset::new(train, labelled));
        }
        let (train, validation) = split_off(train, settings.validation)?;
        Ok(Self { train, validation, test: None, about_test: None })
    }

    /// Takes the held-out images, if their labels can be compared with answers.
    fn hold_out(&mut self, test: Arc<dyn Source>, path: &str) {
        if !test.is_empty() && test.label(0).is_none() {
            self.about_test = Some(format!(
                "{path}: the images of the test split have no labels, so nothing is evaluated on them: sort them into class folders"
            ));
            return;
        }
        if let [class] = test.classes() {
            self.about_test = Some(format!(
                "{path}: all images have the class {class}, so every answer is right: figures say nothing about the features"
            ));
        }
        self.test = Some(test);
    }

    /// Reads some images of every split, so that a run finds images that cannot be read before its first step, not at its first
    /// evaluation.
    ///
    /// # Errors
    /// If reading fails, or a larger share of a split than `data.max_skipped` cannot be read.
    pub(super) fn check_readable(&self, settings: &DataSettings) -> Result<()> {
        check_readable(&*self.train, "training", settings)?;
        let validation = self.validation.iter().map(|split| (split, "validation"));
        let mut others = validation.chain(self.test.iter().map(|split| (split, "held-out")));
        others.try_for_each(|(split, name)| check_readable(&**split, name, settings))
    }

    /// Returns sentences on the images that a user should read: what is not read, and classes without training images.
    pub fn notes(&self) -> impl Iterator<Item = &String> {
        let test = self.test.iter().flat_map(|test| test.notes());
        self.train.notes().iter().chain(test).chain(&self.about_test)
    }

    /// Returns the held-out images, for a command that needs them.
    ///
    /// # Errors
    /// If there are none.
    pub fn held_out(&self) -> Result<&Arc<dyn Source>> {
        self.test.as_ref().ok_or_else(|| {
            Error::config(
                "evaluation needs labelled held-out images: class folders in test/ or val/, or data.path=SET for a set that has them",
            )
        })
    }
}

/// Training images, and the validation images split off them, if any.
type TrainAndValidation = (Arc<dyn Source>, Option<Arc<dyn Source>>);

/// At most `limit` images of a set, spread over it; all if it is 0.
fn limited(all: Arc<dyn Source>, limit: usize) -> Arc<dyn Source> {
    if limit == 0 { all } else { Arc::new(Subset::spread(all, limit)) }
}

/// Splits a share of each class off the training images, spread evenly over the order of the class.
fn split_off(train: Arc<dyn Source>, share: f64) -> Result<TrainAndValidation> {
    if share == 0.0 {
        return Ok((train, None));
    }
    let mut seen: HashMap<u32, usize> = HashMap::new();
    let (mut kept, mut aside) = (Vec::new(), Vec::new());
    for index in 0..train.len() {
        let Some(class) = train.label(index) else {
            return Err(Error::config(
                "data.validation needs labelled training images: class folders in train/",
            ));
        };
        let count = seen.entry(class).or_default();
        let chosen = |count: usize| (count as f64 * share).floor();
        let aside_now = chosen(*count + 1) > chosen(*count);
        *count += 1;
        if aside_now { &mut aside } else { &mut kept }.push(index as u32);
    }
    if kept.is_empty() || aside.is_empty() {
        return Err(Error::config(format!(
            "data.validation = {share} leaves {} training and {} validation images",
            kept.len(),
            aside.len()
        )));
    }
    Ok((Arc::new(Subset::new(train.clone(), kept)), Some(Arc::new(Subset::new(train, aside)))))
}

/// Reads a few images of a split, or all if there are few.
///
/// # Errors
/// If reading itself fails, or more images are unreadable than `data.max_skipped` allows: of a split read in full, or of a
/// larger one by more than chance.
fn check_readable(source: &dyn Source, split: &str, settings: &DataSettings) -> Result<()> {
    let (length, tried) = (source.len(), source.len().min(TRIED));
    if length == 0 {
        return Err(Error::Unreadable(format!("{}: has no {split} images", settings.path)));
    }
    let mut image = Image::default();
    let mut unreadable = Vec::new();
    for index in (0..tried).map(|i| i * length / tried) {
        match source.read(index, &mut image) {
            Ok(()) => {}
            Err(error @ Error::Io { .. }) => return Err(error), // the disk or the network, not the image
            Err(error) => unreadable.push(error),
        }
    }
    let allowed = settings.max_skipped * tried as f64;
    let chance = if tried < length { CHANCE } else { 0.0 };
    let (count, limit) = (unreadable.len(), settings.max_skipped);
    let Some(first) = unreadable.first() else { return Ok(()) };
    if count == tried {
        let all = if tried < length {
            format!("none of {tried} {split} images tried")
        } else {
            format!("none of its {length} {split} images")
        };
        let reason = format!("{}: {all} can be read; the first: {first}", settings.path);
        return Err(Error::Unreadable(reason));
    }
    if count as f64 > allowed + chance {
        let reason = format!(
            "{}: {count} of {tried} {split} images tried cannot be read, more than data.max_skipped={limit} allows; the first: {first}",
            settings.path
        );
        return Err(Error::Unreadable(reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Reading;
    use crate::recipes::Recipe;

    /// Writes `count` image files, of which the first `broken` cannot be decoded.
    fn split(folder: &Path, count: usize, broken: usize) {
        std::fs::create_dir_all(folder).unwrap();
        for i in 0..count {
            let path = folder.join(format!("{i:03}.png"));
            if i < broken {
                std::fs::write(path, "broken").unwrap();
            } else {
                image::RgbImage::from_pixel(4, 4, image::Rgb([i as u8; 3])).save(path).unwrap();
            }
        }
    }

    fn open(root: &Path, settings: &[&str]) -> Result<Images> {
        let path = format!("data.path={}", root.display());
        let settings: Vec<String> =
            settings.iter().map(|s| s.to_string()).chain([path, "data.limit=0".into()]).collect();
        let settings = Recipe::load("demo", &settings).unwrap().data;
        let images = Images::open(&settings)?;
        images.check_readable(&settings).map(|()| images)
    }

    #[test]
    fn parts_with_unreadable_images_are_refused_before_the_first_step() {
        for (counts, broken, complaint) in [
            ([10, 10], [10, 0], Some("none of its 10 training images can be read")),
            ([10, 10], [0, 10], Some("none of its 10 held-out images can be read")),
            ([200, 10], [200, 0], Some("none of 32 training images tried can be read")),
            ([10, 32], [0, 24], Some("24 of 32 held-out images tried cannot be read")),
            ([10, 200], [0, 100], Some("16 of 32 held-out images tried cannot be read")),
            ([200, 10], [2, 0], None),
        ] {
            let root = tempfile::tempdir().unwrap();
            for ((name, count), broken) in ["train", "test"].into_iter().zip(counts).zip(broken) {
                split(&root.path().join(name).join("cat"), count, broken);
            }
            match (open(root.path(), &[]), complaint) {
                (Ok(_), None) => {}
                (Err(error), Some(complaint)) => {
                    assert!(error.to_string().contains(complaint), "{error}");
                }
                (other, _) => panic!("{counts:?} {broken:?}: {:?}", other.err()),
            }
            if complaint.is_some_and(|complaint| !complaint.starts_with("none")) {
                assert!(open(root.path(), &["data.max_skipped=1"]).is_ok());
            }
        }
    }

    #[test]
    fn images_that_are_given_are_selected_as_those_of_a_set_are() {
        let settings: Vec<String> = ["limit=50", "test_limit=30", "labels=50%", "validation=0.2"]
            .map(|s| format!("data.{s}"))
            .into();
        let settings = Recipe::load("demo", &settings).unwrap().data;
        let [train, test] = [Split::Train, Split::Test]
            .map(|split| Arc::new(data::fashion_scattered(split)) as Arc<dyn Source>);
        let opened = Images::open(&settings).unwrap();
        let given = Images::given(&settings, train.clone(), Some(test.clone())).unwrap();
        let names = |images: &Images| {
            let parts = [Some(&images.train), images.validation.as_ref(), images.test.as_ref()];
            let names =
                |part: &Arc<dyn Source>| (0..part.len()).map(|i| part.name(i)).collect::<Vec<_>>();
            parts.map(|part| part.map(names).unwrap())
        };
        assert_eq!(names(&given), names(&opened));

        let reading =
            |channels, bits| Reading { format: Format { channels, bits }, ..Reading::default() };
        let refused = |settings: &DataSettings| {
            Images::given(settings, train.clone(), Some(test.clone())).err().unwrap().to_string()
        };
        let said = refused(&DataSettings::all_of(GIVEN, &reading(1, 16)));
        assert!(said.ends_with("set data.channels=3 and data.bits=8"), "{said}");
        let said = refused(&DataSettings { labels: Some("labels.csv".into()), ..settings });
        assert!(said.contains("labels.csv"), "{said}");
        let said =
            Images::open(&DataSettings::all_of(GIVEN, &reading(3, 8))).err().unwrap().to_string();
        assert!(said.contains("given by the program that trained it"), "{said}");
    }

    #[test]
    fn a_flat_test_part_is_left_out_with_a_sentence() {
        let root = tempfile::tempdir().unwrap();
        split(&root.path().join("train/cat"), 3, 0);
        split(&root.path().join("val"), 3, 0);
        let images = open(root.path(), &[]).unwrap();
        assert!(images.test.is_none() && images.held_out().is_err());
        assert!(images.notes().any(|note| note.contains("have no labels")));
    }

    #[test]
    fn figures_on_one_class_are_said_to_be_worthless() {
        let root = tempfile::tempdir().unwrap();
        split(&root.path().join("train/cat"), 3, 0);
        split(&root.path().join("test/cat"), 3, 0);
        let told =
            |images: &Images| images.notes().any(|note| note.contains("every answer is right"));
        assert!(told(&open(root.path(), &[]).unwrap()));
        split(&root.path().join("train/dog"), 3, 0);
        assert!(!told(&open(root.path(), &[]).unwrap()));
    }

    #[test]
    fn a_share_of_each_class_is_left_out_of_training_for_validation() {
        let root = tempfile::tempdir().unwrap();
        split(&root.path().join("train/cat"), 10, 0);
        split(&root.path().join("train/dog"), 5, 0);
        let images = open(root.path(), &["data.validation=0.2"]).unwrap();
        let validation = images.validation.unwrap();
        let names = |source: &dyn Source| -> Vec<String> {
            let end = |i| source.name(i)[root.path().display().to_string().len()..].to_owned();
            (0..source.len()).map(end).collect()
        };
        assert_eq!(
            names(&*validation),
            ["/train/cat/004.png", "/train/cat/009.png", "/train/dog/004.png"]
        );
        assert_eq!(images.train.len(), 12);
        assert!(names(&*images.train).iter().all(|name| !names(&*validation).contains(name)));
        assert!(open(root.path(), &["data.validation=0.01"]).is_err());
        assert!(open(&root.path().join("train/cat"), &["data.validation=0.2"]).is_err());
    }
}

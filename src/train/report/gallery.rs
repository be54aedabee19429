//! The pictures of a run's report: augmented views, a map of held-out images, nearest neighbours, and a confusion matrix.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use base64::Engine;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::names::relative;
use crate::data::augment::Scratch;
use crate::data::{Format, Image, Policy, Source, center};
use crate::device::{Device, Philox, Purpose};
use crate::error::{Error, Result};
use crate::eval::{self, Answer, Features};
use crate::files::write_file;
use crate::recipes::Recipe;

/// The name of the pictures in a run's folder.
const GALLERY: &str = "gallery.json";

/// The most images on the map; the page holds a small picture of each.
const MAPPED: usize = 1000;
/// The most images whose neighbours are shown, and the number of neighbours.
const QUERIES: usize = 10;
pub(in crate::train) const NEIGHBOURS: usize = 8;
/// The most images whose views are shown, and the most views of each.
const VIEWED: usize = 6;
const VIEWS: usize = 8;
/// The largest side in pixels of a picture on the map, and of a neighbour or view.
const SMALL: usize = 40;
const LARGE: usize = 72;
/// The start of a sheet's data URL.
const JPEG: &str = "data:image/jpeg;base64,";

/// The result of kNN: the bank, the held-out images as queries, and the answers.
pub(in crate::train) struct Found<'a> {
    pub(in crate::train) bank: (&'a dyn Source, &'a Features),
    pub(in crate::train) queries: (&'a dyn Source, &'a Features),
    pub(in crate::train) answers: &'a [Answer],
}

/// The contents of `gallery.json`.
#[derive(Serialize, Deserialize)]
struct Gallery {
    epoch: u32,
    classes: Vec<String>,
    map: Map,
    strips: Strips,
    /// How often each class was taken for each: `[truth, answer, times]` if that is not 0.
    confusion: Vec<[u32; 3]>,
    views: Views,
}

#[derive(Serialize, Deserialize)]
struct Map {
    /// Coordinates, label and name of each image. A coordinate that is NaN is null.
    points: Vec<(Option<f32>, Option<f32>, u32, String)>,
    sheet: Sheet,
}

#[derive(Serialize, Deserialize)]
struct Strips {
    rows: Vec<Strip>,
    sheet: Sheet,
}

/// A held-out image and its nearest neighbours.
#[derive(Serialize, Deserialize)]
struct Strip {
    name: String,
    label: u32,
    answer: u32,
    /// Cosine, label and name of each neighbour, nearest first.
    near: Vec<(f32, u32, String)>,
}

#[derive(Serialize, Deserialize)]
struct Views {
    shown: usize,
    views: usize,
    sheet: Sheet,
}

/// Small pictures in one JPEG.
#[derive(Serialize, Deserialize)]
struct Sheet {
    side: usize,
    columns: usize,
    /// A data URL.
    data: String,
}

/// Writes the pictures after `epoch` epochs into a run's folder.
///
/// # Errors
/// If an image can no longer be read or the file cannot be written.
pub(in crate::train) fn write(
    folder: &Path,
    recipe: &Recipe,
    views: usize,
    epoch: u32,
    found: &Found<'_>,
    device: &Device,
) -> Result<()> {
    let Found { queries: (source, features), answers, .. } = found;
    let size = recipe.augment[0].size;
    let data = recipe.data.path.as_str();
    let gallery = Gallery {
        epoch,
        classes: source.classes().to_vec(),
        map: map(*source, features, SMALL.min(size), data, device)?,
        strips: strips(found, LARGE.min(size), data)?,
        confusion: confusion(features, answers),
        views: views_of(found.bank.0, recipe, views, LARGE.min(size))?,
    };
    let text = serde_json::to_string(&gallery).expect("a gallery is plain data");
    write_file(&folder.join(GALLERY), text.as_bytes())
}

/// Reads the pictures in a run's folder; null if it has none.
///
/// # Errors
/// If the file cannot be read or its contents are not what [`write`] writes.
pub(super) fn read(folder: &Path) -> Result<Value> {
    let file = folder.join(GALLERY);
    let text = match super::open(&file).and_then(std::io::read_to_string) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Value::Null),
        Err(error) => return Err(Error::io(&file)(error)),
    };
    let wrong = |what: &str| {
        let remedy = "delete it to get a report without pictures";
        Error::format(&file, format!("does not hold a run's pictures ({what}): {remedy}"))
    };
    let mut gallery: Gallery =
        serde_json::from_str(&text).map_err(|error| wrong(&error.to_string()))?;
    gallery.check().map_err(wrong)?;
    // Runs of earlier versions hold absolute names.
    for name in gallery.names() {
        *name = relative(name, "");
    }
    Ok(serde_json::to_value(gallery).expect("a gallery is plain data"))
}

impl Gallery {
    /// Refuses what the page would misread: sheets that are not pictures, labels without a class.
    fn check(&self) -> std::result::Result<(), &'static str> {
        let sheets = [&self.map.sheet, &self.strips.sheet, &self.views.sheet];
        if !sheets.iter().all(|sheet| sheet.is_picture()) {
            return Err("a sheet is not a JPEG in base64");
        }
        // The page makes an element for each.
        let longest = self.strips.rows.iter().map(|row| row.near.len()).max();
        if self.views.shown >= self.views.sheet.columns
            || longest >= Some(self.strips.sheet.columns)
        {
            return Err("a row has more pictures than its sheet has columns");
        }
        let confused = self.confusion.iter().flat_map(|&[truth, answer, _]| [truth, answer]);
        let mapped = self.map.points.iter().map(|point| point.2);
        let near = self.strips.rows.iter().flat_map(|row| row.near.iter().map(|near| near.1));
        let asked = self.strips.rows.iter().flat_map(|row| [row.label, row.answer]);
        let mut labels = confused.chain(mapped).chain(near).chain(asked);
        match labels.all(|label| (label as usize) < self.classes.len()) {
            true => Ok(()),
            false => Err("a label has no class"),
        }
    }

    /// The names of all images.
    fn names(&mut self) -> impl Iterator<Item = &mut String> {
        let mapped = self.map.points.iter_mut().map(|point| &mut point.3);
        let strips = self.strips.rows.iter_mut().flat_map(|row| {
            std::iter::once(&mut row.name).chain(row.near.iter_mut().map(|near| &mut near.2))
        });
        mapped.chain(strips)
    }
}

impl Sheet {
    fn is_picture(&self) -> bool {
        let base64 = |c: u8| c.is_ascii_alphanumeric() || b"+/=".contains(&c);
        self.side > 0
            && self.columns > 0
            && self.data.strip_prefix(JPEG).is_some_and(|data| data.bytes().all(base64))
    }
}

/// Maps images spread evenly over the held-out ones.
fn map(
    source: &dyn Source,
    features: &Features,
    side: usize,
    data: &str,
    device: &Device,
) -> Result<Map> {
    let (all, d) = (features.labels.len(), features.d);
    let count = all.min(MAPPED);
    let rows: Vec<usize> = (0..count).map(|i| i * all / count).collect();
    let chosen: Vec<f32> =
        rows.iter().flat_map(|row| &features.values[row * d..][..d]).copied().collect();
    let images = features.images();
    let mut sheet = SheetWriter::new(side, 40, count);
    let mut points = Vec::with_capacity(count);
    for ([x, y], &row) in eval::map(&chosen, d, device).into_iter().zip(&rows) {
        let index = images[row] as usize;
        sheet.add_center(source, index)?;
        let place = |v: f32| v.is_finite().then_some(v);
        points.push((
            place(x),
            place(y),
            features.labels[row],
            relative(&source.name(index), data),
        ));
    }
    Ok(Map { points, sheet: sheet.finish()? })
}

/// Shows some held-out images, each with its nearest neighbours in the bank.
fn strips(found: &Found<'_>, side: usize, data: &str) -> Result<Strips> {
    let (bank, bank_features) = found.bank;
    let (source, features) = found.queries;
    let (bank_images, images) = (bank_features.images(), features.images());
    let count = images.len().min(QUERIES);
    let mut sheet = SheetWriter::new(side, 1 + NEIGHBOURS, count * (1 + NEIGHBOURS));
    let mut rows = Vec::with_capacity(count);
    // The middle of each of `count` equal parts: folders are sorted by class, so the ends would show only two classes.
    for row in (0..count).map(|i| (2 * i + 1) * images.len() / (2 * count)) {
        let (answer, index) = (&found.answers[row], images[row] as usize);
        sheet.add_center(source, index)?;
        let mut near = Vec::with_capacity(NEIGHBOURS);
        for &(cosine, row) in &answer.nearest {
            let index = bank_images[row as usize] as usize;
            sheet.add_center(bank, index)?;
            near.push((
                cosine,
                bank_features.labels[row as usize],
                relative(&bank.name(index), data),
            ));
        }
        sheet.end_row();
        rows.push(Strip {
            name: relative(&source.name(index), data),
            label: features.labels[row],
            answer: answer.class,
            near,
        });
    }
    Ok(Strips { rows, sheet: sheet.finish()? })
}

/// Counts how often each class was taken for each.
fn confusion(features: &Features, answers: &[Answer]) -> Vec<[u32; 3]> {
    let mut times = BTreeMap::new();
    for (&truth, answer) in features.labels.iter().zip(answers) {
        *times.entry((truth, answer.class)).or_insert(0) += 1;
    }
    times.into_iter().map(|((truth, answer), times)| [truth, answer, times]).collect()
}

/// Shows some training images, each followed by the views that the first epoch trains on.
fn views_of(source: &dyn Source, recipe: &Recipe, views: usize, side: usize) -> Result<Views> {
    let policies = recipe.policies(views)?;
    let shown = views.min(VIEWS);
    let count = source.len().min(VIEWED);
    let mut sheet = SheetWriter::new(side, 1 + shown, count * (1 + shown));
    let (mut image, mut scratch) = (Image::default(), Scratch::default());
    for index in (0..count).map(|i| (2 * i + 1) * source.len() / (2 * count)) {
        if source.read(index, &mut image).is_err() {
            continue; // the loader reports images that it skips
        }
        sheet.add(&image, &Policy::crop(side));
        for (view, policy) in policies.iter().take(shown).enumerate() {
            // The same stream as in the loader.
            let stream = (index * views + view) as u32;
            let mut rng = Philox::new(recipe.seed, Purpose::Augmentation, 0, stream);
            let params = policy.draw(&mut rng, image.width, image.height);
            let policy = Policy { normalise: None, ..policy.clone() };
            let padded = image.format.device_channels();
            let mut out = vec![0.0; policy.size * policy.size * padded];
            policy.apply(&params, &image, &mut out, &mut scratch);
            sheet.add(&rgb(&out, policy.size, image.format), &Policy::crop(side));
        }
        sheet.end_row();
    }
    Ok(Views { shown, views, sheet: sheet.finish()? })
}

/// Converts values in `[0, 1]` of images of a format to an RGB image: of one or two channels the first in grey, of more the first
/// three.
fn rgb(values: &[f32], size: usize, format: Format) -> Image {
    let byte = |v: f32| (255.0 * v).round().clamp(0.0, 255.0) as u8;
    let places = if format.channels < 3 { [0; 3] } else { [0, 1, 2] };
    let pixels = values.chunks_exact(format.device_channels());
    let pixels = pixels.flat_map(|pixel| places.map(|at| byte(pixel[at]))).collect();
    Image { width: size, height: size, format: Format::RGB, pixels }
}

/// Draws small pictures side by side into one JPEG.
struct SheetWriter {
    side: usize,
    columns: usize,
    /// The complete sheet, row-major, three bytes per pixel.
    pixels: Vec<u8>,
    /// The position of the next picture.
    next: usize,
    policy: Policy,
    scratch: Scratch,
    image: Image,
}

impl SheetWriter {
    fn new(side: usize, columns: usize, count: usize) -> Self {
        let rows = count.div_ceil(columns).max(1);
        Self {
            side,
            columns,
            pixels: vec![0; rows * columns * side * side * 3],
            next: 0,
            policy: Policy::crop(side),
            scratch: Scratch::default(),
            image: Image::default(),
        }
    }

    /// Adds the center crop of a source's image.
    fn add_center(&mut self, source: &dyn Source, index: usize) -> Result<()> {
        let mut image = std::mem::take(&mut self.image);
        source.read(index, &mut image)?;
        let policy = self.policy.clone();
        self.add(&image, &policy);
        self.image = image;
        Ok(())
    }

    fn add(&mut self, image: &Image, policy: &Policy) {
        let side = self.side;
        let mut values = vec![0.0; side * side * image.format.device_channels()];
        center(image, policy, &mut values, &mut self.scratch);
        let small = rgb(&values, side, image.format);
        let (row, column) = (self.next / self.columns, self.next % self.columns);
        let width = self.columns * side;
        for (y, line) in small.pixels.chunks_exact(side * 3).enumerate() {
            let at = ((row * side + y) * width + column * side) * 3;
            self.pixels[at..at + side * 3].copy_from_slice(line);
        }
        self.next += 1;
    }

    fn end_row(&mut self) {
        self.next = self.next.next_multiple_of(self.columns);
    }

    fn finish(self) -> Result<Sheet> {
        let width = self.columns * self.side;
        let height = self.pixels.len() / (3 * width);
        let mut bytes = Vec::new();
        jpeg_encoder::Encoder::new(&mut bytes, 82)
            .encode(&self.pixels, width as u16, height as u16, jpeg_encoder::ColorType::Rgb)
            .map_err(|error| {
                Error::Config(format!("a sheet of pictures of {width} x {height} pixels: {error}"))
            })?;
        let data = base64::engine::general_purpose::STANDARD.encode(bytes);
        Ok(Sheet { side: self.side, columns: self.columns, data: format!("{JPEG}{data}") })
    }
}

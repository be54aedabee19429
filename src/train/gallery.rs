//! The pictures of a run's report: augmented views, a map of held-out images, neighbours, and what is taken for what.

use std::collections::BTreeMap;
use std::path::Path;

use base64::Engine;
use serde_json::{Value, json};

use crate::data::augment::Scratch;
use crate::data::{Image, Policy, Source, center};
use crate::device::{Device, Philox, Purpose};
use crate::error::{Error, Result};
use crate::eval::{self, Answer, Features};
use crate::recipes::Recipe;
use crate::weights::write_whole;

/// Its name in a run's folder.
pub(super) const GALLERY: &str = "gallery.json";

/// Images on the map: a page holds a small picture of each.
const MAPPED: usize = 1000;
/// Images whose neighbours are shown, and how many of each.
const QUERIES: usize = 10;
pub(super) const NEIGHBOURS: usize = 8;
/// Images whose views are shown, and the most views of each.
const VIEWED: usize = 6;
const VIEWS: usize = 8;
/// Side of a small picture in pixels, at most; of one in a strip or of a view.
const SMALL: usize = 40;
const LARGE: usize = 72;

/// What kNN found: the bank and the held-out images it was asked about, and its answers.
pub(super) struct Found<'a> {
    pub(super) bank: (&'a dyn Source, &'a Features),
    pub(super) queries: (&'a dyn Source, &'a Features),
    pub(super) answers: &'a [Answer],
}

/// Writes the pictures after `epoch` epochs into a run's folder.
///
/// # Errors
/// When an image cannot be read any more or the file cannot be written.
pub(super) fn write(
    folder: &Path,
    recipe: &Recipe,
    views: usize,
    epoch: u32,
    found: &Found<'_>,
    device: &Device,
) -> Result<()> {
    let Found { queries: (source, features), answers, .. } = found;
    let size = recipe.augment[0].size;
    let gallery = json!({
        "epoch": epoch,
        "classes": source.classes(),
        "map": map(*source, features, SMALL.min(size), device)?,
        "strips": strips(found, LARGE.min(size))?,
        "confusion": confusion(features, answers),
        "views": views_of(found.bank.0, recipe, views, LARGE.min(size))?,
    });
    write_whole(&folder.join(GALLERY), gallery.to_string().as_bytes())
}

/// The pictures in a run's folder; `Null` where there are none.
pub(super) fn read(folder: &Path) -> Result<Value> {
    let file = folder.join(GALLERY);
    if !file.exists() {
        return Ok(Value::Null);
    }
    let text = std::fs::read_to_string(&file).map_err(Error::io(&file))?;
    serde_json::from_str(&text).map_err(|error| Error::format(&file, error.to_string()))
}

/// Places, labels and names of images spread over the held-out ones, and a sheet of them.
fn map(source: &dyn Source, features: &Features, side: usize, device: &Device) -> Result<Value> {
    let (all, d) = (features.labels.len(), features.d);
    let count = all.min(MAPPED);
    let rows: Vec<usize> = (0..count).map(|i| i * all / count).collect();
    let chosen: Vec<f32> =
        rows.iter().flat_map(|row| &features.values[row * d..][..d]).copied().collect();
    let images = features.images();
    let mut sheet = Sheet::new(side, 40, count);
    let mut points = Vec::with_capacity(count);
    for ([x, y], &row) in eval::map(&chosen, d, device).into_iter().zip(&rows) {
        let index = images[row] as usize;
        sheet.add_centre(source, index)?;
        points.push(json!([x, y, features.labels[row], source.name(index)]));
    }
    Ok(json!({ "points": points, "sheet": sheet.value()? }))
}

/// Some held-out images, each with its nearest in the bank.
fn strips(found: &Found<'_>, side: usize) -> Result<Value> {
    let (bank, bank_features) = found.bank;
    let (source, features) = found.queries;
    let (bank_images, images) = (bank_features.images(), features.images());
    let count = images.len().min(QUERIES);
    let mut sheet = Sheet::new(side, 1 + NEIGHBOURS, count * (1 + NEIGHBOURS));
    let mut strips = Vec::with_capacity(count);
    // From the middle of each part: a folder's first image is of the first class, its last of the last.
    for row in (0..count).map(|i| (2 * i + 1) * images.len() / (2 * count)) {
        let (answer, index) = (&found.answers[row], images[row] as usize);
        sheet.add_centre(source, index)?;
        let mut near = Vec::with_capacity(NEIGHBOURS);
        for &(cosine, row) in &answer.nearest {
            let index = bank_images[row as usize] as usize;
            sheet.add_centre(bank, index)?;
            near.push(json!([cosine, bank_features.labels[row as usize], bank.name(index)]));
        }
        sheet.end_row();
        strips.push(json!({
            "name": source.name(index),
            "label": features.labels[row],
            "answer": answer.class,
            "near": near,
        }));
    }
    Ok(json!({ "rows": strips, "sheet": sheet.value()? }))
}

/// How often each class was taken for each: `[truth, answer, times]` where that is not 0.
fn confusion(features: &Features, answers: &[Answer]) -> Vec<[u32; 3]> {
    let mut times = BTreeMap::new();
    for (&truth, answer) in features.labels.iter().zip(answers) {
        *times.entry((truth, answer.class)).or_insert(0) += 1;
    }
    times.into_iter().map(|((truth, answer), times)| [truth, answer, times]).collect()
}

/// Some training images, each before the views that the first epoch shows of it.
fn views_of(source: &dyn Source, recipe: &Recipe, views: usize, side: usize) -> Result<Value> {
    let policies = recipe.policies(views)?;
    let shown = views.min(VIEWS);
    let count = source.len().min(VIEWED);
    let mut sheet = Sheet::new(side, 1 + shown, count * (1 + shown));
    let (mut image, mut scratch) = (Image::default(), Scratch::default());
    for index in (0..count).map(|i| (2 * i + 1) * source.len() / (2 * count)) {
        if source.read(index, &mut image).is_err() {
            continue; // broken ones are named where they are skipped
        }
        sheet.add(&image, &Policy::crop(side));
        for (view, policy) in policies.iter().take(shown).enumerate() {
            // As the loader draws them.
            let stream = (index * views + view) as u32;
            let mut rng = Philox::new(recipe.seed, Purpose::Augmentation, 0, stream);
            let params = policy.draw(&mut rng, image.width, image.height);
            let policy = Policy { normalise: None, ..policy.clone() };
            let mut out = vec![0.0; policy.size * policy.size * 4];
            policy.apply(&params, &image, &mut out, &mut scratch);
            sheet.add(&rgb(&out, policy.size), &Policy::crop(side));
        }
        sheet.end_row();
    }
    Ok(json!({ "shown": shown, "views": views, "sheet": sheet.value()? }))
}

/// An image of values in `[0, 1]`, four a pixel.
fn rgb(values: &[f32], size: usize) -> Image {
    let byte = |v: &f32| (255.0 * v).round().clamp(0.0, 255.0) as u8;
    let pixels = values.chunks_exact(4).flat_map(|pixel| pixel[..3].iter().map(byte)).collect();
    Image { width: size, height: size, pixels }
}

/// Small pictures side by side in one JPEG.
struct Sheet {
    side: usize,
    columns: usize,
    /// Of the whole sheet, row-major, three bytes a pixel.
    pixels: Vec<u8>,
    /// The next picture's place.
    next: usize,
    policy: Policy,
    scratch: Scratch,
    image: Image,
}

impl Sheet {
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

    /// The centre of a source's image.
    fn add_centre(&mut self, source: &dyn Source, index: usize) -> Result<()> {
        let mut image = std::mem::take(&mut self.image);
        source.read(index, &mut image)?;
        let policy = self.policy.clone();
        self.add(&image, &policy);
        self.image = image;
        Ok(())
    }

    fn add(&mut self, image: &Image, policy: &Policy) {
        let side = self.side;
        let mut values = vec![0.0; side * side * 4];
        center(image, policy, &mut values, &mut self.scratch);
        let small = rgb(&values, side);
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

    fn value(&self) -> Result<Value> {
        let width = self.columns * self.side;
        let height = self.pixels.len() / (3 * width);
        let mut bytes = Vec::new();
        jpeg_encoder::Encoder::new(&mut bytes, 82)
            .encode(&self.pixels, width as u16, height as u16, jpeg_encoder::ColorType::Rgb)
            .map_err(|error| Error::Config(format!("a sheet of {width} x {height}: {error}")))?;
        let data = base64::engine::general_purpose::STANDARD.encode(bytes);
        Ok(json!({
            "side": self.side,
            "columns": self.columns,
            "data": format!("data:image/jpeg;base64,{data}"),
        }))
    }
}

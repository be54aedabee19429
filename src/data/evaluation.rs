//! Images in order under the evaluation's transform. Floor 5.

use std::ops::Range;

use rayon::prelude::*;

use super::augment::{Normalise, Scratch, center};
use super::loader::{Batch, Skipped};
use super::rows::{rows_of, to_operate_on};
use super::source::{Image, Source};
use crate::device::Device;
use crate::tensor::Tensor;

/// Images `range` of a source under [`center`], in order, as one tensor `[n, size, size, 4]` of a batch of epoch
/// 0; and the images that are left out because they could not be read. Runs on the device's threads.
///
/// # Panics
/// When the range does not lie in the source.
pub fn center_batch(
    source: &dyn Source,
    range: Range<usize>,
    size: usize,
    normalise: Option<&Normalise>,
    device: &Device,
) -> (Batch, Vec<Skipped>) {
    transformed_batch(center, source, range, size, normalise, device)
}

/// What comes between an image and a network when nothing is drawn: [`center`] or
/// [`resized_center`](super::resized_center).
pub type Transform = fn(&Image, usize, Option<&Normalise>, &mut [f32], &mut Scratch);

/// [`center_batch`] under another transform.
///
/// # Panics
/// When the range does not lie in the source.
pub fn transformed_batch(
    see: Transform,
    source: &dyn Source,
    range: Range<usize>,
    size: usize,
    normalise: Option<&Normalise>,
    device: &Device,
) -> (Batch, Vec<Skipped>) {
    let wanted: Vec<usize> = range.collect();
    let (mut indices, mut skipped) = (wanted, Vec::new());
    loop {
        let (images, read) = transform(see, source, &indices, size, normalise, device);
        if read.iter().all(Result::is_ok) {
            let labels =
                indices.iter().map(|&i| source.label(i).map_or(-1, |l| l as i32)).collect();
            let indices = indices.iter().map(|&i| i as u32).collect();
            return (
                Batch { epoch: 0, position: 0, indices, labels, crops: vec![images] },
                skipped,
            );
        }
        // Rare: again without the broken ones.
        let mut readable = Vec::new();
        for (index, read) in indices.into_iter().zip(read) {
            match read {
                Ok(()) => readable.push(index),
                Err(reason) => skipped.push(Skipped { index: index as u32, reason }),
            }
        }
        indices = readable;
    }
}

/// All images at `indices`; rows of broken ones are left as they are.
fn transform(
    see: Transform,
    source: &dyn Source,
    indices: &[usize],
    size: usize,
    normalise: Option<&Normalise>,
    device: &Device,
) -> (Tensor, Vec<Result<(), String>>) {
    let mut images = Tensor::floats(device.host(), [indices.len(), size, size, 4]);
    let rows = rows_of(&mut images, size * size * 4);
    let read = device.run(|| {
        rows.into_par_iter()
            .zip(indices)
            .map_init(
                <(Image, Scratch, Vec<f32>)>::default,
                |(image, scratch, buffer), (row, &index)| {
                    source.read(index, image).map_err(|e| e.to_string())?;
                    row.fill(buffer, |out| see(image, size, normalise, out, scratch));
                    Ok(())
                },
            )
            .collect()
    });
    (to_operate_on(images, device), read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Folder, Split, fashion_scattered};

    #[test]
    fn images_come_in_order_the_same_on_both_devices() {
        let set = fashion_scattered(Split::Test);
        let (cpu, none) = center_batch(&set, 5..12, 32, None, &Device::cpu(2).unwrap().poisoned());
        let (reference, _) = center_batch(&set, 5..12, 32, None, &Device::reference().poisoned());
        assert_eq!((cpu.indices, none.len()), ((5..12).collect(), 0));
        assert_eq!(cpu.crops[0].to_f64(), reference.crops[0].to_f64());
        assert_eq!(cpu.labels[0], set.label(5).unwrap() as i32);
        let mut image = Image::default();
        set.read(6, &mut image).unwrap();
        let expected: Vec<f32> = image.pixels.iter().map(|&v| f32::from(v) / 255.0).collect();
        let second = &cpu.crops[0].data::<f32>()[32 * 32 * 4..][..32 * 32 * 4];
        assert!(second.chunks_exact(4).map(|p| &p[..3]).eq(expected.chunks_exact(3)));
    }

    #[test]
    fn broken_images_are_left_out_and_named() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.png", "c.png"] {
            image::RgbImage::from_pixel(4, 4, image::Rgb([9; 3]))
                .save(folder.path().join(name))
                .unwrap();
        }
        std::fs::write(folder.path().join("b.png"), "").unwrap();
        let set = Folder::open(folder.path()).unwrap();
        let (batch, skipped) = center_batch(&set, 0..3, 4, None, &Device::reference());
        assert_eq!(
            (batch.indices, batch.labels, **batch.crops[0].shape() == [2, 4, 4, 4]),
            (vec![0, 2], vec![-1, -1], true)
        );
        assert_eq!((skipped.len(), skipped[0].index), (1, 1));
        assert!(skipped[0].reason.ends_with("b.png: is empty (0 bytes)"), "{}", skipped[0].reason);
    }
}

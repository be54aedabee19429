//! Images in order under the evaluation's transform.

mod gpu;

use std::ops::Range;

use rayon::prelude::*;

use gpu::Wanted;

use super::augment::{Policy, Scratch, Transform, transform};
use super::batch::{Batch, Skipped};
use super::rows::rows_of;
use super::source::{Image, Source};
use crate::device::{Device, DeviceKind};
use crate::error::Result;
use crate::tensor::Tensor;

/// Returns the images `range` of a source under [`Transform::Center`], in order, as one tensor `[n, size, size, channels]` of a batch
/// of epoch 0, with the policy's size, resampling, pixels and normalisation; and the broken images, which are left out. Images
/// are read on the device's threads; a GPU makes the same views itself.
///
/// # Errors
/// If an image cannot be read for another reason than that it is broken.
///
/// # Panics
/// If the range exceeds the source.
pub fn center_batch(
    source: &dyn Source,
    range: Range<usize>,
    policy: &Policy,
    device: &Device,
) -> Result<(Batch, Vec<Skipped>)> {
    transformed_batch(Transform::Center, source, range, policy, device)
}

/// As [`center_batch`], under another transform.
///
/// # Errors
/// If an image cannot be read for another reason than that it is broken.
///
/// # Panics
/// If the range exceeds the source.
pub fn transformed_batch(
    by: Transform,
    source: &dyn Source,
    range: Range<usize>,
    policy: &Policy,
    device: &Device,
) -> Result<(Batch, Vec<Skipped>)> {
    let (mut made, all) = (None, range.len());
    each_batch(by, source, (range, all.max(1)), policy, device, &mut |batch, skipped| {
        made = Some((batch, skipped));
        Ok(())
    })?;
    Ok(made.expect("all images are one batch"))
}

/// Hands the images `range` of a source to `take`, so many at a time and in order, as [`transformed_batch`] returns them. For a
/// GPU the next images are read while it computes, and are copied beside its other work; images that lie there
/// ([`Source::on_gpu`]) are not read.
///
/// # Errors
/// If an image cannot be read for another reason than that it is broken, or `take` fails.
///
/// # Panics
/// If the range exceeds the source.
pub(crate) fn each_batch(
    by: Transform,
    source: &dyn Source,
    (range, batch): (Range<usize>, usize),
    policy: &Policy,
    device: &Device,
    take: &mut dyn FnMut(Batch, Vec<Skipped>) -> Result<()>,
) -> Result<()> {
    if device.kind() == DeviceKind::Cuda {
        return Wanted { by, source, policy, device }.each(range, batch, take);
    }
    let mut from = range.start;
    loop {
        let to = (from + batch).min(range.end);
        let (batch, skipped) = batch_on_host(by, source, from..to, policy, device)?;
        take(batch, skipped)?;
        if to == range.end {
            return Ok(());
        }
        from = to;
    }
}

/// A batch of the images in `range`.
fn batch_on_host(
    by: Transform,
    source: &dyn Source,
    range: Range<usize>,
    policy: &Policy,
    device: &Device,
) -> Result<(Batch, Vec<Skipped>)> {
    let (mut indices, mut skipped): (Vec<usize>, Vec<_>) = (range.collect(), Vec::new());
    loop {
        let (images, read) = transform_on_host(by, source, &indices, policy, device);
        if read.iter().all(Result::is_ok) {
            let labels =
                indices.iter().map(|&i| source.label(i).map_or(-1, |l| l as i32)).collect();
            let indices = indices.iter().map(|&i| i as u32).collect();
            let batch = Batch { epoch: 0, position: 0, indices, labels, crops: vec![images] };
            return Ok((batch, skipped));
        }
        // Rare, so everything is made again without the broken images.
        let mut readable = Vec::new();
        for (index, read) in indices.into_iter().zip(read) {
            match read {
                Ok(()) => readable.push(index),
                Err(error) => skipped.push(Skipped::new(index, error)?),
            }
        }
        indices = readable;
    }
}

/// Makes the views on the host; the rows of broken images stay unspecified.
fn transform_on_host(
    by: Transform,
    source: &dyn Source,
    indices: &[usize],
    policy: &Policy,
    device: &Device,
) -> (Tensor, Vec<Result<()>>) {
    let (size, channels) = (policy.size, source.format().device_channels());
    let mut images = Tensor::floats(device, [indices.len(), size, size, channels]);
    let rows = rows_of(&mut images, size * size * channels);
    let read = device.run(|| {
        rows.into_par_iter()
            .zip(indices)
            .map_init(
                <(Image, Scratch, Vec<f32>)>::default,
                |(image, scratch, buffer), (row, &index)| {
                    source.read(index, image)?;
                    row.fill(buffer, |out| transform(by, image, policy, out, scratch));
                    Ok(())
                },
            )
            .collect()
    });
    (images, read)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Folder, Split, fashion_scattered};
    use crate::error::Error;

    #[test]
    fn images_come_in_order_the_same_on_both_devices() {
        let set = fashion_scattered(Split::Test);
        let policy = Policy::crop(32);
        let (cpu, none) =
            center_batch(&set, 5..12, &policy, &Device::cpu(2).unwrap().poisoned()).unwrap();
        let (reference, _) =
            center_batch(&set, 5..12, &policy, &Device::reference().poisoned()).unwrap();
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
        let (batch, skipped) =
            center_batch(&set, 0..3, &Policy::crop(4), &Device::reference()).unwrap();
        assert_eq!(
            (batch.indices, batch.labels, **batch.crops[0].shape() == [2, 4, 4, 4]),
            (vec![0, 2], vec![-1, -1], true)
        );
        assert_eq!((skipped.len(), skipped[0].index), (1, 1));
        assert!(skipped[0].reason.ends_with("b.png: is empty (0 bytes)"), "{}", skipped[0].reason);
        let set = Folder::open(folder.path()).unwrap();
        std::fs::remove_file(folder.path().join("c.png")).unwrap();
        let error = center_batch(&set, 0..3, &Policy::crop(4), &Device::reference()).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{error}");
    }
}

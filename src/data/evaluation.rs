//! Images in order under the evaluation's transform.

use std::ops::Range;

use rayon::prelude::*;

use super::augment::{
    GpuAugmenter, MOST_SHRINKING, Made, Policy, Scratch, Transform, View, taps, transform,
};
use super::batch::{Batch, Skipped};
use super::rows::rows_of;
use super::source::{Format, Image, Source};
use crate::device::cuda::Table;
use crate::device::{Device, DeviceKind};
use crate::error::{Error, Result};
use crate::tensor::{DType, Tensor};

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
    let wanted: Vec<usize> = range.collect();
    let (mut indices, mut skipped) = (wanted, Vec::new());
    loop {
        let make =
            if device.kind() == DeviceKind::Cuda { transform_on_gpu } else { transform_on_host };
        let (images, read) = make(by, source, &indices, policy, device);
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

/// Makes the views on a GPU; makes none if an image is broken.
fn transform_on_gpu(
    by: Transform,
    source: &dyn Source,
    indices: &[usize],
    policy: &Policy,
    device: &Device,
) -> (Tensor, Vec<Result<()>>) {
    let (size, format) = (policy.size, source.format());
    let shape = [indices.len(), size, size, format.device_channels()];
    let mut out = Tensor::empty(device, DType::of_activations(device), shape);
    let read = |&index: &usize| {
        let mut image = Image::default();
        source.read(index, &mut image)?;
        let view = View::middle(by, [image.width, image.height], policy, 0)
            .filter(|view| view.shrinks_by() <= MOST_SHRINKING)
            .ok_or_else(|| {
                let reason = format!(
                    "has too many pixels for a GPU ({} x {}): make it smaller",
                    image.width, image.height
                );
                Error::format(source.name(index), reason)
            })?;
        Ok((image, view))
    };
    let images: Vec<Result<_>> = device.run(|| indices.par_iter().map(read).collect());
    let readable = images.iter().flatten();
    let bytes = readable.map(|(image, _)| image.pixels.len()).sum::<usize>();
    if images.iter().any(Result::is_err) || bytes == 0 {
        return (out, images.into_iter().map(|image| image.map(drop)).collect());
    }
    // Rounded up to few distinct sizes, because the pool keeps freed memory by size.
    let mut pixels = Table::room(device, bytes.next_power_of_two());
    let (mut all, mut views) = (Vec::with_capacity(bytes), Vec::new());
    for (image, view) in images.iter().flatten() {
        views.push(*view);
        views.last_mut().expect("pushed just now").pixels = all.len() as i64;
        all.extend_from_slice(&image.pixels);
    }
    pixels.write_at(0, &all);
    let gaussian = vec![0.0; views.len() * taps(size)];
    let needed = format != Format::RGB;
    let made = Made::of(views.iter().map(|view| (view, policy, None)), format, needed);
    GpuAugmenter::new(device, views.len(), size).make_any(&made, &gaussian, &pixels, &mut out);
    (out, images.into_iter().map(|_| Ok(())).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Folder, Split, fashion_scattered};

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

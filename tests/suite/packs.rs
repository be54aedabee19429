//! Packed images: the same as those of the folder, to the bit, and never trusted.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use selfsup::data::{self, Image, Loader, PackSettings, Policy, Source, Split, Stored, pack};
use selfsup::device::Device;

const FILES: Stored = Stored::Files { quality: 95 };

fn write(path: &Path, bytes: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, bytes).unwrap();
}

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(Path::new("tests/fixtures").join(name)).unwrap()
}

/// Writes a PNG file of the given size. Different seeds give different images.
fn png(path: &Path, width: u32, height: u32, seed: u32) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let pixel = |x, y| image::Rgb([x * 7 + seed, y * 11 + seed * 3, x * y + seed].map(|v| v as u8));
    image::RgbImage::from_fn(width, height, pixel).save(path).unwrap();
}

/// Two classes to train on, of JPEG and PNG files, and one image held out.
fn prepare(root: &Path) {
    for (name, to) in [("grey.jpg", "cat/g.jpg"), ("colour.jpg", "dog/c.JPG")] {
        write(&root.join("train").join(to), &fixture(name));
    }
    for i in 0..9 {
        let class = if i % 2 == 0 { "cat" } else { "dog" };
        png(&root.join(format!("train/{class}/{i}.png")), 20 + i, 31 - i, i);
    }
    png(&root.join("val/dog/x.png"), 8, 8, 1);
}

fn settings(stored: Stored, file_bytes: u64) -> PackSettings {
    PackSettings { reading: Default::default(), labels: None, size: None, stored, file_bytes }
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let name = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    entries.map(|path| (name(&path), std::fs::read(&path).unwrap())).collect()
}

/// What can be read of a set; what is wrong with the other images.
fn images(set: &dyn Source) -> Vec<Result<Image, String>> {
    let read = |i| {
        let mut image = Image::default();
        set.read(i, &mut image).map(|()| image).map_err(|e| e.to_string())
    };
    (0..set.len()).map(read).collect()
}

/// Images, labels and crops of a batch.
type Seen = (Vec<u32>, Vec<i32>, Vec<f64>);

/// The batches of two epochs, and what was skipped.
fn batches(set: Box<dyn Source>) -> (Vec<Seen>, Vec<String>) {
    let device = Device::cpu(1).unwrap();
    let policies = vec![Policy::crop(8); 2];
    let mut loader = Loader::new(Arc::from(set), policies, 3, 5, 2, &device).unwrap();
    let mut made = Vec::new();
    for _ in 0..2 * loader.batches_per_epoch() {
        let batch = loader.next_batch().unwrap();
        made.push((batch.indices, batch.labels, batch.crops[0].to_f64()));
    }
    (made, loader.skipped().into_iter().map(|skipped| skipped.reason).collect())
}

#[test]
fn a_pack_gives_the_batches_of_its_folder_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    for (stored, file_bytes) in [(FILES, 1 << 20), (FILES, 200), (Stored::Raw, 3000)] {
        let (to, again) = (root.join("packed"), root.join("again"));
        let settings = settings(stored, file_bytes);
        let packed = pack(root, &to, &settings, |done, total| assert!(done <= total)).unwrap();
        pack(root, &again, &settings, |_, _| ()).unwrap();
        let written = files(&to);
        assert!(written == files(&again), "the same files to the byte");
        let packs = written.iter().filter(|(name, _)| *name != "pack.json");
        let bytes: usize = packs.map(|(_, bytes)| bytes.len()).sum();
        assert_eq!((packed.images, packed.bytes), (12, bytes as u64));
        assert!(packed.skipped.is_empty() && packed.files.len() + 1 == written.len());
        assert_eq!(written.len() == 3, file_bytes == 1 << 20);
        for split in [Split::Train, Split::Test] {
            let [ours, theirs] = [&*to, root].map(|path| data::open(path, split).unwrap());
            assert_eq!(ours.classes(), theirs.classes());
            assert!(images(&*ours) == images(&*theirs));
            for i in 0..theirs.len() {
                assert_eq!(ours.label(i), theirs.label(i));
                assert_eq!(ours.size(i).unwrap(), theirs.size(i).unwrap());
                let [ours, theirs] = [&ours, &theirs].map(|set| set.name(i));
                let tail = |name: &str| name.rsplitn(3, '/').take(2).collect::<Vec<_>>().join("/");
                assert_eq!(tail(&ours), tail(&theirs));
            }
        }
        let [ours, theirs] = [&*to, root].map(|path| data::open(path, Split::Train).unwrap());
        assert!(batches(ours) == batches(theirs));
        [to, again].iter().for_each(|path| std::fs::remove_dir_all(path).unwrap());
    }
    pack(&root.join("train/cat"), &root.join("flat"), &settings(FILES, 9), |_, _| ()).unwrap();
    let flat = data::open(&root.join("flat"), Split::Train).unwrap();
    assert_eq!((flat.len(), flat.label(0), flat.classes().len()), (6, None, 0));
}

#[test]
fn images_are_made_smaller_and_never_larger() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    png(&root.join("from/a.png"), 50, 20, 1);
    png(&root.join("from/b.png"), 10, 40, 1);
    for (stored, name) in [(FILES, "files"), (Stored::Raw, "raw")] {
        let settings = PackSettings { size: Some(16), ..settings(stored, 1 << 20) };
        pack(&root.join("from"), &root.join(name), &settings, |_, _| ()).unwrap();
        let set = data::open(&root.join(name), Split::Train).unwrap();
        assert_eq!([0, 1].map(|i| set.size(i).unwrap()), [[40, 16], [10, 40]]);
        let whole = data::open(&root.join("from"), Split::Train).unwrap();
        assert!(images(&*set)[1] == images(&*whole)[1]);
    }
    let [jpeg, raw] = ["files", "raw"].map(|name| {
        let set = data::open(&root.join(name), Split::Train).unwrap();
        images(&*set)[0].clone().unwrap().pixels
    });
    let apart: u64 = jpeg.iter().zip(&raw).map(|(a, &b)| u64::from(a.abs_diff(b))).sum();
    assert!(apart > 0 && apart < 4 * raw.len() as u64, "{apart} levels in {} values", raw.len());
}

#[test]
fn broken_images_are_left_out_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    write(&root.join("train/cat/0.jpg"), b"GIF89a");
    write(&root.join("train/dog/z.jpg"), b"");
    let packed = pack(root, &root.join("packed"), &settings(FILES, 1000), |_, _| ()).unwrap();
    let named: Vec<_> = packed.skipped.iter().map(|s| (s.index, s.reason.clone())).collect();
    let path = |name: &str| root.join("train").join(name).display().to_string();
    let expected = [
        (0, path("cat/0.jpg") + ": is no JPEG, PNG, WebP, BMP or TIFF file"),
        (12, path("dog/z.jpg") + ": is empty (0 bytes)"),
    ];
    assert_eq!(named, expected);
    let set = data::open(&root.join("packed"), Split::Train).unwrap();
    assert!(set.len() == 11 && images(&*set).iter().all(Result::is_ok));
    write(&root.join("none/a.jpg"), b"GIF89a");
    let refused = pack(&root.join("none"), &root.join("new"), &settings(FILES, 9), |_, _| ());
    let said = refused.unwrap_err().to_string();
    assert!(said.contains("none of its 1 images can be read; the first: "), "{said}");
    assert!(!root.join("new").exists());
}

/// Two images; every prefix of their file, and every byte of it changed.
#[test]
fn a_damaged_file_is_refused_or_has_a_broken_image() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    let sources = ["from/cat/a.png", "from/dog/b.png"].map(|name| root.join(name));
    png(&sources[0], 3, 2, 1);
    png(&sources[1], 2, 3, 9);
    let lengths = sources.map(|path| path.metadata().unwrap().len() as usize);
    for (stored, records) in [(FILES, lengths.iter().sum()), (Stored::Raw, 36)] {
        let to = root.join(format!("of-{records}"));
        pack(&root.join("from"), &to, &settings(stored, 1 << 20), |_, _| ()).unwrap();
        let file = to.join("train-00000.pack");
        let whole = std::fs::read(&file).unwrap();
        let good = images(&*data::open(&to, Split::Train).unwrap());
        for length in 0..whole.len() {
            std::fs::write(&file, &whole[..length]).unwrap();
            let said = data::open(&to, Split::Train).err().unwrap().to_string();
            assert!(
                said.starts_with(&format!(
                    "{}: is a truncated or corrupt pack file",
                    file.display()
                )),
                "{said}"
            );
            assert!(said.ends_with(": copy the set again, or pack the images again"), "{said}");
        }
        let mut broken = 0;
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            std::fs::write(&file, &bytes).unwrap();
            let Ok(set) = data::open(&to, Split::Train) else { continue };
            let got = images(&*set);
            let wrong: Vec<_> = got.iter().filter_map(|image| image.as_ref().err()).collect();
            assert_eq!(wrong.len(), 1, "byte {at}: {wrong:?}");
            assert!(wrong[0].contains(": does not have the checksum that the index names"));
            assert!(got.iter().zip(&good).all(|(a, b)| a.is_err() || a == b));
            broken += 1;
        }
        assert_eq!(broken, records, "all other bytes are the header's or the index's");
        // Cut short under a reader.
        std::fs::write(&file, &whole).unwrap();
        let set = data::open(&to, Split::Train).unwrap();
        std::fs::write(&file, &whole[..70]).unwrap();
        assert!(images(&*set).iter().all(Result::is_err));
    }
}

#[test]
fn a_broken_image_in_a_pack_is_skipped_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    pack(root, &root.join("packed"), &settings(Stored::Raw, 1 << 20), |_, _| ()).unwrap();
    let file = root.join("packed/train-00000.pack");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[64] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let (_, skipped) = batches(data::open(&root.join("packed"), Split::Train).unwrap());
    let expected = format!(
        "{}/cat/0.png: does not have the checksum that the index names: copy the set again, or pack the images again",
        file.display()
    );
    assert_eq!(skipped, [expected]);
}

#[test]
fn files_that_are_missing_or_of_another_set_are_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    let to = root.join("packed");
    pack(root, &to, &settings(FILES, 200), |_, _| ()).unwrap();
    let count = files(&to).len() - 2;
    assert!(count > 3);
    let name = |number: usize| format!("train-{number:05}.pack");
    let remedy = "copy the set again, or pack the images again";
    for number in 0..count {
        let (path, away) = (to.join(name(number)), root.join("away"));
        std::fs::rename(&path, &away).unwrap();
        let said = data::open(&to, Split::Train).err().unwrap().to_string();
        assert_eq!(said, format!("{}: is missing: {remedy}", path.display()));
        std::fs::rename(&away, &path).unwrap();
    }
    for (from, over) in [(0, 1), (2, 1), (count - 1, count)] {
        let path = to.join(name(over));
        let kept = std::fs::read(&path);
        std::fs::copy(to.join(name(from)), &path).unwrap();
        let said = data::open(&to, Split::Train).err().unwrap().to_string();
        let expected =
            format!("{}: does not belong to the files before it: {remedy}", path.display());
        assert_eq!(said, expected);
        match kept {
            Ok(bytes) => std::fs::write(&path, bytes).unwrap(),
            Err(_) => std::fs::remove_file(&path).unwrap(),
        }
    }
    let held_out = to.join("val-00000.pack");
    std::fs::remove_file(&held_out).unwrap();
    let said = data::open(&to, Split::Test).err().unwrap().to_string();
    assert_eq!(said, format!("{}: is missing: {remedy}", held_out.display()));
    let other = root.join("other");
    pack(&root.join("train"), &other, &settings(FILES, 1 << 20), |_, _| ()).unwrap();
    let said = data::open(&other, Split::Test).err().unwrap().to_string();
    let expected = "has packed images, but no test-00000.pack or val-00000.pack or valid-00000.pack or validation-00000.pack: the test split is missing";
    assert_eq!(said, format!("{}: {expected}", other.display()));
}

/// Killed between two files, between two parts, or before the manifest.
#[test]
fn a_pack_that_was_stopped_is_not_taken_for_a_complete_one() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    let to = root.join("packed");
    pack(root, &to, &settings(FILES, 1 << 20), |_, _| ()).unwrap();
    let written = files(&to);
    assert_eq!(
        written.keys().collect::<Vec<_>>(),
        ["pack.json", "train-00000.pack", "val-00000.pack"]
    );
    for left in [vec!["train-00000.pack"], vec!["train-00000.pack", "val-00000.pack"]] {
        let stopped = root.join(format!("stopped-{}", left.len()));
        left.iter().for_each(|name| write(&stopped.join(name), &written[*name]));
        for split in [Split::Train, Split::Test] {
            let said = data::open(&stopped, split).err().unwrap().to_string();
            let missing = said.contains("the test split is missing") && left.len() == 1;
            assert!(
                said.contains("holds a pack that was stopped before it was complete") || missing,
                "{said}"
            );
        }
        let again = pack(root, &stopped, &settings(FILES, 1 << 20), |_, _| ());
        let said = again.unwrap_err().to_string();
        assert!(
            said.contains("what is left of a pack that was stopped (train-00000.pack"),
            "{said}"
        );
    }
    let partial = root.join("partial");
    write(&partial.join(".train-00000.pack.partial"), b"");
    let said = data::open(&partial, Split::Train).err().unwrap().to_string();
    assert!(said.contains("(.train-00000.pack.partial and 0 more)"), "{said}");
    let again = pack(root, &partial, &settings(FILES, 1 << 20), |_, _| ());
    let said = again.unwrap_err().to_string();
    assert!(said.contains("left of a pack that was stopped (.train-00000.pack.partial)"), "{said}");
    // A pack of the format before the manifest is complete without one.
    let older = root.join("older");
    for name in ["train-00000.pack", "val-00000.pack"] {
        let mut bytes = written[name].clone();
        bytes[8] = 1;
        let mut crc = flate2::Crc::new();
        crc.update(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.sum().to_le_bytes());
        write(&older.join(name), &bytes);
    }
    assert_eq!(data::open(&older, Split::Test).unwrap().len(), 1);
}

#[test]
fn a_part_without_a_class_keeps_the_numbers_of_the_training_part() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for name in ["train/ape", "train/bee", "train/cow", "val/aaa", "val/bee", "val/cow/2024"] {
        png(&root.join(format!("set/{name}/1.png")), 3, 3, 1);
    }
    let to = root.join("packed");
    let packed = pack(&root.join("set"), &to, &settings(FILES, 1 << 20), |_, _| ()).unwrap();
    assert!(
        packed.notes[0].contains("class aaa has no training images: 1 images count as never right")
    );
    // Parts that were packed apart have lists of their own.
    let apart = root.join("apart");
    for part in ["train", "val"] {
        pack(&root.join("set").join(part), &root.join(part), &settings(FILES, 1 << 20), |_, _| ())
            .unwrap();
        let mut bytes = std::fs::read(root.join(part).join("train-00000.pack")).unwrap();
        bytes[8] = 1;
        let mut crc = flate2::Crc::new();
        crc.update(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.sum().to_le_bytes());
        write(&apart.join(format!("{part}-00000.pack")), &bytes);
    }
    for path in [&to, &apart] {
        let test = data::open(path, Split::Test).unwrap();
        let labels: Vec<_> = (0..test.len()).map(|i| test.label(i).unwrap()).collect();
        assert_eq!(labels, [3, 1, 2]);
        assert_eq!(test.classes(), ["ape", "bee", "cow", "aaa"]);
        assert!(
            test.notes()[0]
                .ends_with("class aaa has no training images: 1 images count as never right")
        );
        assert!(test.name(2).ends_with("val-00000.pack/cow/2024/1.png"), "{}", test.name(2));
    }
}

/// Two processes that pack into one folder would mix their files.
#[test]
#[cfg(target_os = "linux")]
fn a_folder_in_use_by_another_pack_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    let to = root.join("packed");
    let mut refused = None;
    pack(root, &to, &settings(FILES, 200), |_, _| {
        if refused.is_none() {
            refused = Some(pack(root, &to, &settings(FILES, 200), |_, _| ()).unwrap_err());
        }
    })
    .unwrap();
    let said = refused.unwrap().to_string();
    assert!(said.contains("another process packs into it"), "{said}");
    data::open(&to, Split::Train).unwrap();
    // The lock went with the pack.
    let said = pack(root, &to, &settings(FILES, 200), |_, _| ()).unwrap_err().to_string();
    assert!(said.contains("is not empty"), "{said}");
}

#[test]
fn an_io_error_while_packing_is_an_error_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    let mut removed = false;
    // Listed and then gone, as on a network mount.
    let refused = pack(root, &root.join("packed"), &settings(FILES, 200), |_, _| {
        if !removed {
            std::fs::remove_file(root.join("val/dog/x.png")).unwrap();
            removed = true;
        }
    });
    let said = refused.unwrap_err();
    assert!(matches!(&said, selfsup::Error::Io { path, .. } if path.ends_with("x.png")), "{said}");
    assert!(!root.join("packed").exists());
}

/// A colour profile of 6 GB in a file of 6 MB, in a process that may have 4 GB.
#[test]
#[cfg(target_os = "linux")]
fn a_colour_profile_takes_no_more_memory_than_the_limit() {
    use std::io::Write;
    const ZEROS: usize = 16 << 20;
    const TIMES: usize = 384;
    // The same block of zeros again and again is one deflate stream: a full flush ends at a whole byte.
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(&vec![0; ZEROS]).unwrap();
    encoder.flush().unwrap();
    let block = encoder.get_ref().clone();
    let mut profile = vec![0x78, 0x01];
    profile.extend(block.repeat(TIMES));
    profile.extend([3, 0]);
    let sum = (ZEROS * TIMES) as u64 % 65_521;
    profile.extend((((sum as u32) << 16) | 1).to_be_bytes());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("set/0.png");
    png(&path, 3, 3, 1);
    let plain = std::fs::read(&path).unwrap();
    let chunk = [&b"iCCPname\0\0"[..], &profile].concat();
    let mut crc = flate2::Crc::new();
    crc.update(&chunk);
    let length = (chunk.len() as u32 - 4).to_be_bytes();
    // Behind the header chunk, which ends at byte 33.
    let bytes = [&plain[..33], &length, &chunk, &crc.sum().to_be_bytes(), &plain[33..]].concat();
    std::fs::write(&path, bytes).unwrap();
    let program = crate::program::path();
    let command = format!("ulimit -v 4194304; exec {program} pack set --out packed --raw");
    let run = std::process::Command::new("sh")
        .args(["-c", &command])
        .env("RAYON_NUM_THREADS", "2")
        .current_dir(folder.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success() && said.contains("1 images in 1 files"), "{said}");
}

/// An index that announces more than the file can hold, in a file without blocks that is as long as it says.
#[test]
#[cfg(target_os = "linux")]
fn an_index_that_lies_about_its_length_is_refused_before_memory_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepare(root);
    let to = root.join("packed");
    pack(root, &to, &settings(FILES, 1 << 20), |_, _| ()).unwrap();
    let path = to.join("train-00000.pack");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = u64::from_le_bytes(bytes[40..48].try_into().unwrap());
    let length = 1u64 << 40;
    bytes[48..56].copy_from_slice(&(length - at).to_le_bytes());
    let mut crc = flate2::Crc::new();
    crc.update(&bytes[..60]);
    bytes[60..64].copy_from_slice(&crc.sum().to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    if std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length).is_err() {
        return; // a file system without sparse files
    }
    let said = data::open(&to, Split::Train).err().unwrap().to_string();
    assert!(said.contains("for 11 images: copy the set again"), "{said}");
}

//! Writes folders at random, and keeps what was written.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};

use selfsup::device::{Philox, Purpose};

/// A class: its folder's name, how it is printed, and what names that a person may take for it have in common.
pub struct Class {
    pub folder: &'static [u8],
    pub printed: &'static str,
    pub alike: &'static str,
}

const fn class(folder: &'static [u8], printed: &'static str, alike: &'static str) -> Class {
    Class { folder, printed, alike }
}

pub const CLASSES: [Class; 20] = [
    class(b"ape", "ape", "ape"),
    class(b"bee", "bee", "bee"),
    class(b"Bee", "Bee", "bee"),
    class(b"dog", "dog", "dog"),
    class(b"DOG", "DOG", "dog"),
    class(b"2024", "2024", "2024"),
    class(b"007", "007", "007"),
    class(b"a b", "a b", "a b"),
    class(b"a b ", "a b ", "a b"),
    class(b"\xc3\xa9t\xc3\xa9", "\u{e9}t\u{e9}", "ete"),
    class(b"e\xcc\x81te\xcc\x81", "e\u{301}te\u{301}", "ete"),
    class(b"t\tab", "t\\tab", "t\tab"),
    class(b"line\nfeed", "line\\nfeed", "line\nfeed"),
    class(b"esc\x1b[2J", "esc\\u{1b}[2J", "esc"),
    class(b"z\xfe", "z\\xfe", "z1"),
    class(b"z\xff", "z\\xff", "z2"),
    class(b"back\\slash", "back\\\\slash", "back"),
    class(b"x-ray", "x-ray", "x-ray"),
    class(b"runs", "runs", "runs"),
    class(b"test.png", "test.png", "test.png"),
];

/// A colour for each class; no two point the same way.
pub const COLOURS: [[u8; 3]; 20] = [
    [255, 0, 0],
    [0, 255, 0],
    [0, 0, 255],
    [255, 255, 0],
    [255, 0, 255],
    [0, 255, 255],
    [255, 255, 255],
    [255, 120, 0],
    [255, 0, 120],
    [120, 255, 0],
    [0, 255, 120],
    [120, 0, 255],
    [0, 120, 255],
    [255, 120, 120],
    [120, 255, 120],
    [120, 120, 255],
    [255, 255, 120],
    [255, 120, 255],
    [120, 255, 255],
    [255, 60, 180],
];

const IMAGES: [&str; 8] = ["png", "jpg", "JPG", "jpeg", "jfif", "jpe", "PNG", "Jpeg"];
const FOREIGN: [&str; 7] = ["svg", "psd", "gif", "PPM", "heic", "avif", "Jxl"];
const NESTED: [&[u8]; 9] =
    [b"2024", b"a", b"a-b", b"a b", b"z", b"folder.jpg", b"\xc3\xa4", b"a\xcc\x88", b"\xf0"];
/// How names of files begin.
const STEMS: [&[u8]; 14] = [
    b"",
    b"",
    b"b",
    b"B",
    b"-",
    b" lead",
    b"\xc3\xbc",
    b"u\xcc\x88",
    b"tab\t",
    b"line\n",
    b"\x1b[31m",
    b"\xff",
    b"back\\",
    b"a.b,\"c\"'",
];

/// The images of a folder and of those below it, sorted by torchvision's key, the folder's path and the file's name; each
/// with its colour if it can be decoded.
pub type Images = BTreeMap<(Vec<u8>, Vec<u8>), Option<[u8; 3]>>;

/// A class folder as it was written.
pub struct Written {
    /// Which of [`CLASSES`].
    pub class: usize,
    pub images: Images,
    /// Whether the folder of a training run lies directly in it.
    pub has_run: bool,
}

/// A part as it was written.
#[derive(Default)]
pub struct Part {
    /// By the name of the class folder, in byte order.
    pub classes: BTreeMap<&'static [u8], Written>,
    /// Images next to the class folders, or those of a part without.
    pub loose: Images,
    /// Files of other formats.
    pub foreign: usize,
    /// Pipes and sockets with an image's name.
    pub special: usize,
    /// Links with an image's name that lead nowhere.
    pub dangling: usize,
    /// Folders of training runs.
    pub runs: usize,
}

impl Written {
    /// Whether the folder is none of a class, but kept for training runs.
    pub fn is_for_runs(&self) -> bool {
        self.images.is_empty() && (self.has_run || CLASSES[self.class].printed == "runs")
    }
}

impl Part {
    /// Folders that are not read because of a training run.
    pub fn runs_passed(&self) -> usize {
        self.runs + self.classes.values().filter(|written| written.is_for_runs()).count()
    }
}

/// Draws numbers.
pub struct Draw(pub Philox);

impl Draw {
    pub fn new(i: u32) -> Self {
        Self(Philox::new(16, Purpose::Test, i, 0))
    }

    pub fn below(&mut self, n: usize) -> usize {
        self.0.below(n as u32) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

/// A name of any bytes.
pub fn name(bytes: &[u8]) -> OsString {
    std::os::unix::ffi::OsStringExt::from_vec(bytes.to_vec())
}

/// A PNG file, put together here: `kind` is its colour type, `data` its filtered rows.
fn png([width, height]: [u32; 2], depth: u8, kind: u8, palette: &[u8], data: &[u8]) -> Vec<u8> {
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut chunk = |name: &[u8], data: &[u8]| {
        file.extend((data.len() as u32).to_be_bytes());
        let body = [name, data].concat();
        file.extend(&body);
        file.extend(crc32fast::hash(&body).to_be_bytes());
    };
    let sides = [width.to_be_bytes(), height.to_be_bytes()].concat();
    chunk(b"IHDR", &[&sides[..], &[depth, kind, 0, 0, 0]].concat());
    if !palette.is_empty() {
        chunk(b"PLTE", palette);
    }
    let mut packed = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(data).unwrap();
    chunk(b"IDAT", &packed.finish().unwrap());
    chunk(b"IEND", b"");
    file
}

/// Files of one colour, of every kind of PNG and JPEG that a camera or a program may write.
fn pictures(colour: [u8; 3]) -> Vec<Vec<u8>> {
    let sides @ [width, height] = [3, 2];
    let rows = |pixel: &[u8]| {
        let row = [&[0][..], &pixel.repeat(width as usize)].concat();
        row.repeat(height as usize)
    };
    let [r, g, b] = colour;
    let mut files = vec![
        png([1, 1], 8, 2, &[], &[0, r, g, b]),
        png(sides, 8, 2, &[], &rows(&colour)),
        png(sides, 8, 6, &[], &rows(&[r, g, b, 7])),
        png(sides, 16, 2, &[], &rows(&[r, r, g, g, b, b])),
        png(sides, 16, 6, &[], &rows(&[r, r, g, g, b, b, 0, 9])),
        png(sides, 8, 3, &[9, 9, 9, r, g, b], &rows(&[1])),
        png(sides, 4, 3, &[9, 9, 9, r, g, b], &[0, 0x11, 0x10, 0, 0x11, 0x10]),
    ];
    if r == g && g == b {
        files.push(png(sides, 8, 0, &[], &rows(&[r])));
        files.push(png(sides, 16, 4, &[], &rows(&[r, r, 0, 0])));
    }
    for sampling in [jpeg_encoder::SamplingFactor::F_1_1, jpeg_encoder::SamplingFactor::F_2_2] {
        for progressive in [false, true] {
            let mut bytes = Vec::new();
            let mut encoder = jpeg_encoder::Encoder::new(&mut bytes, 100);
            encoder.set_sampling_factor(sampling);
            encoder.set_progressive(progressive);
            let pixels = colour.repeat(17 * 9);
            encoder.encode(&pixels, 17, 9, jpeg_encoder::ColorType::Rgb).unwrap();
            files.push(bytes);
        }
    }
    files
}

/// The files that folders are filled with.
pub struct Stock {
    /// By class.
    pictures: Vec<Vec<Vec<u8>>>,
    /// Files that are no picture, or half a one.
    broken: Vec<Vec<u8>>,
}

impl Stock {
    pub fn new() -> Self {
        let pictures: Vec<_> = COLOURS.into_iter().map(pictures).collect();
        let mut broken: Vec<Vec<u8>> =
            [&b""[..], b"no image", b"GIF89a", b"RIFF\x10\0\0\0WEBPVP8 ", b"\xff\xd8", b"\x89PNG"]
                .iter()
                .map(|bytes| bytes.to_vec())
                .collect();
        for file in &pictures[3] {
            broken.push(file[..file.len() / 2].to_vec());
        }
        // Flipped bits in the middle of a PNG file, whose checksums tell.
        let mut flipped = pictures[4][1].clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 0x55;
        broken.push(flipped);
        Self { pictures, broken }
    }
}

/// One folder being written.
pub struct Writer<'a> {
    pub stock: &'a Stock,
    pub draw: &'a mut Draw,
    /// Where the targets of links lie.
    pub elsewhere: PathBuf,
}

impl Writer<'_> {
    /// Writes files into a folder of a class: `below` is the folder's path below that of the class.
    fn fill(
        &mut self,
        folder: &Path,
        below: &[u8],
        depth: usize,
        class: usize,
        part: &mut Part,
    ) -> Images {
        std::fs::create_dir_all(folder).unwrap();
        let mut images = Images::new();
        for i in 0..self.draw.below(4) {
            let mut file = self.draw.of(&STEMS).to_vec();
            if self.draw.one_in(40) {
                file.extend([b'n'; 200]);
            }
            write!(file, "{i}.{}", self.draw.of(&IMAGES)).unwrap();
            let is_broken = self.draw.one_in(6);
            let stock = if is_broken { &self.stock.broken } else { &self.stock.pictures[class] };
            let bytes = &stock[self.draw.below(stock.len())];
            std::fs::write(folder.join(name(&file)), bytes).unwrap();
            images.insert((below.to_vec(), file), (!is_broken).then_some(COLOURS[class]));
        }
        self.litter(folder, class, part);
        // A folder called `runs` that holds a run is no class.
        if self.draw.one_in(16) && !(depth == 0 && CLASSES[class].printed == "runs") {
            let run = folder.join("run-of-mine");
            std::fs::create_dir_all(&run).unwrap();
            let picture = &self.stock.pictures[class][0];
            for (file, bytes) in
                [("recipe.toml", &b""[..]), ("metrics.jsonl", b""), ("views.png", picture)]
            {
                std::fs::write(run.join(file), bytes).unwrap();
            }
            part.runs += 1;
        }
        if self.draw.one_in(24) {
            let pack = folder.join("a-pack");
            std::fs::create_dir_all(&pack).unwrap();
            std::fs::write(pack.join("pack.json"), "{}").unwrap();
            std::fs::write(pack.join("x.png"), &self.stock.pictures[class][0]).unwrap();
            part.runs += 1;
        }
        let mut nested = BTreeSet::new();
        for _ in 0..if depth < 3 { self.draw.below(3) } else { 0 } {
            nested.insert(self.draw.of(&NESTED));
        }
        for inner in nested {
            let at = folder.join(name(inner));
            let below = [below, b"/", inner].concat();
            if self.draw.one_in(8) {
                // A link to a folder elsewhere.
                let real = self.fresh();
                link(&real, &at);
                images.extend(self.fill(&real, &below, depth + 1, class, part));
            } else {
                images.extend(self.fill(&at, &below, depth + 1, class, part));
            }
        }
        if self.draw.one_in(6) {
            let real = self.fresh();
            std::fs::write(&real, &self.stock.pictures[class][0]).unwrap();
            link(&real, &folder.join("link.png"));
            images.insert((below.to_vec(), b"link.png".to_vec()), Some(COLOURS[class]));
        }
        images
    }

    /// Writes what is no image of the set.
    fn litter(&mut self, folder: &Path, class: usize, part: &mut Part) {
        let picture = &self.stock.pictures[class][0];
        if self.draw.one_in(3) {
            for i in 0..1 + self.draw.below(2) {
                let file = format!("f{i}.{}", self.draw.of(&FOREIGN));
                std::fs::write(folder.join(file), "x").unwrap();
                part.foreign += 1;
            }
        }
        if self.draw.one_in(3) {
            for file in [
                ".DS_Store",
                "._0.jpg",
                ".hidden.png",
                "Thumbs.db",
                "notes.txt",
                "jpg",
                "0.jpg~",
                "0.png.part",
                "labels.csv",
            ] {
                std::fs::write(folder.join(file), picture).unwrap();
            }
            for inner in [".git", "__MACOSX", "@eaDir"] {
                std::fs::create_dir_all(folder.join(inner)).unwrap();
                std::fs::write(folder.join(inner).join("x.png"), picture).unwrap();
            }
        }
        if self.draw.one_in(8) {
            let file = self.draw.of(&["dangling.png", "dangling"]);
            let to = self.draw.of(&["nowhere", file]); // the second leads to itself
            link(Path::new(to), &folder.join(file));
            link(Path::new("nowhere"), &folder.join("dangling.txt"));
            part.dangling += 1;
        }
        if self.draw.one_in(8) {
            link(folder, &folder.join("circle"));
            link(Path::new(".."), &folder.join("up.png"));
        }
        if self.draw.one_in(12) {
            special(&folder.join("pipe.jpg"), self.draw.one_in(8));
            part.special += 1;
        }
    }

    /// A path in no folder of the set.
    fn fresh(&self) -> PathBuf {
        let count = std::fs::read_dir(&self.elsewhere).unwrap().count();
        let path = self.elsewhere.join(count.to_string());
        std::fs::write(self.elsewhere.join(format!("{count}.used")), "").unwrap();
        path
    }

    /// Writes a part with class folders.
    pub fn part(&mut self, folder: &Path, among: &[usize]) -> Part {
        std::fs::create_dir_all(folder).unwrap();
        let mut part = Part::default();
        for &class in among {
            let bytes = CLASSES[class].folder;
            let mut at = folder.join(name(bytes));
            if self.draw.one_in(8) {
                // The class folder is a link.
                let real = self.fresh();
                link(&real, &at);
                at = real;
            }
            let images = self.fill(&at, b"", 0, class, &mut part);
            let has_run = at.join("run-of-mine").exists();
            part.classes.insert(bytes, Written { class, images, has_run });
        }
        if self.draw.one_in(3) {
            std::fs::create_dir_all(folder.join(".hidden")).unwrap();
            std::fs::write(folder.join("classes.txt"), "").unwrap();
            std::fs::write(folder.join("poster.gif"), "").unwrap();
            part.foreign += 1;
        }
        if self.draw.one_in(25) {
            self.loose(folder, &mut part);
        }
        part
    }

    /// Writes a part of images without classes.
    pub fn flat(&mut self, folder: &Path) -> Part {
        std::fs::create_dir_all(folder).unwrap();
        let mut part = Part::default();
        (0..1 + self.draw.below(3)).for_each(|_| self.loose(folder, &mut part));
        part
    }

    fn loose(&mut self, folder: &Path, part: &mut Part) {
        let class = self.draw.below(CLASSES.len());
        let file = format!("{class}.{}", self.draw.of(&IMAGES)).into_bytes();
        let pictures = &self.stock.pictures[class];
        let bytes = &pictures[self.draw.below(pictures.len())];
        std::fs::write(folder.join(name(&file)), bytes).unwrap();
        part.loose.insert((Vec::new(), file), Some(COLOURS[class]));
    }
}

pub fn link(to: &Path, from: &Path) {
    std::os::unix::fs::symlink(to, from).unwrap();
}

/// A socket or a pipe with an image's name: whoever opens a pipe waits for ever.
fn special(path: &Path, pipe: bool) {
    if pipe && std::process::Command::new("mkfifo").arg(path).status().is_ok_and(|s| s.success()) {
        return;
    }
    // The path of a socket has at most 108 bytes, so it is made elsewhere and moved.
    let short = tempfile::tempdir().unwrap();
    std::os::unix::net::UnixListener::bind(short.path().join("s")).unwrap();
    std::fs::rename(short.path().join("s"), path).unwrap();
}

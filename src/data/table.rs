//! Label tables: the class of each file of a folder, from a file of comma-separated values. `images` finds the rows' images.

mod images;

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::listing::is_image_name;
use super::open::{folders, not_used};
use super::source::Split;
use crate::error::{Error, Result, printable};
pub(super) use images::Labelled;

/// Names, in lower case, that the column of files has in tables of others, the likeliest first.
const FILES: [&str; 16] = [
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "path",
    "image",
    "image_name",
    "image_path",
    "image_file",
    "image_id",
    "img",
    "img_path",
    "img_name",
    "id",
    "name",
];

/// Names of the column of classes.
const LABELS: [&str; 11] = [
    "label",
    "labels",
    "class",
    "class_name",
    "class_id",
    "category",
    "species",
    "breed",
    "target",
    "diagnosis",
    "y",
];

/// Names of the column of splits.
const SPLITS: [&str; 3] = ["split", "subset", "set"];

/// The classes of files, as a table has them.
#[derive(Clone, Debug, PartialEq)]
pub struct LabelTable {
    file: PathBuf,
    /// Each row that has a class.
    rows: Vec<Row>,
    classes: Vec<String>,
    has_splits: bool,
    /// A sentence on rows of splits that are not read.
    not_read: Option<String>,
    /// Whether the first row names the columns.
    has_header: bool,
}

/// A row of a table.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    line: u64,
    name: String,
    class: u32,
    /// The training split if nothing is said; `None` for `val` beside `test`, of which one is held out.
    split: Option<Split>,
}

/// Places of the columns.
#[derive(Clone, Copy)]
struct Columns {
    file: usize,
    class: usize,
    split: Option<usize>,
}

/// The table of classes that a value of `data.labels` names, if it does, and the part of the images that it asks for, if it does:
/// `labels.csv`, `labels.csv 10%`, `10%`, or the name of a list.
pub fn table_and_part(labels: &str) -> (Option<&str>, Option<&str>) {
    let labels = labels.trim();
    let (file, share) = match labels.rsplit_once(char::is_whitespace) {
        Some((file, share)) if share.ends_with('%') => (file.trim_end(), Some(share)),
        _ => (labels, None),
    };
    let extension = Path::new(file).extension().and_then(OsStr::to_str);
    match extension {
        Some(e) if e.eq_ignore_ascii_case("csv") || e.eq_ignore_ascii_case("tsv") => {
            (Some(file), share)
        }
        _ => (None, Some(labels).filter(|labels| !labels.is_empty())),
    }
}

/// What separates the columns: the first of these that the first line has. Spreadsheets write semicolons where commas are decimal.
fn separator(file: &Path, bytes: &[u8]) -> u8 {
    let line = bytes.split(|byte| *byte == b'\n').find(|line| !line.trim_ascii().is_empty());
    let is_tsv = file.extension().is_some_and(|e| e.eq_ignore_ascii_case("tsv"));
    let all = if is_tsv { *b"\t,;" } else { *b",;\t" };
    all.into_iter().find(|one| line.unwrap_or_default().contains(one)).unwrap_or(all[0])
}

impl LabelTable {
    /// Reads a table: one row for each file, with columns separated by commas, semicolons or tabs. A first row that
    /// names a column of files (`file`, `filename`, `image`, `id` and so on) and one of classes (`label`, `class` and so on) says
    /// which they are, and may name one of splits (`split`: `train`, `test` or `val`); without it the first column is the file and the
    /// second the class. Fields may be quoted; a byte order mark is skipped. Rows without a class are passed over. Classes are
    /// numbered in the order of their names, of their values if all are whole numbers.
    ///
    /// # Errors
    /// If the file cannot be read, is not UTF-8, a row has no such columns or an unknown split, or no row has a class.
    pub fn read(file: &Path) -> Result<Self> {
        let bytes = std::fs::read(file).map_err(Error::io(file))?;
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
        if std::str::from_utf8(bytes).is_err() {
            return Err(Error::format(
                file,
                "is not UTF-8 text: save it as \"CSV UTF-8\", or convert it (iconv -t UTF-8)",
            ));
        }
        let mut reader = csv::ReaderBuilder::new()
            .has_headers(false)
            .flexible(true)
            .delimiter(separator(file, bytes))
            .from_reader(bytes);
        let (mut columns, mut rows, mut names) = (None, Vec::new(), Vec::new());
        let (mut has_header, mut splits) = (false, Vec::new());
        for record in reader.records() {
            let record = record.map_err(|error| Error::format(file, error.to_string()))?;
            if columns.is_none() {
                let named = Columns::named(&record);
                columns = Some(named.unwrap_or(Columns { file: 0, class: 1, split: None }));
                has_header = named.is_some();
                if has_header {
                    continue;
                }
            }
            let columns = columns.expect("set by the first record");
            if let Some((row, class)) = columns.row(file, &record)? {
                rows.push(row);
                names.push(class);
                splits.push(columns.split_of(&record));
            }
        }
        let not_read = one_held_out(&mut rows, &splits);
        let mut classes: Vec<String> =
            names.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect();
        if classes.is_empty() {
            return Err(Error::format(file, "has no row with a file and a class"));
        }
        if let Some((row, class)) =
            rows.iter().zip(&names).find(|(_, class)| is_image_name(Path::new(class)))
        {
            let class = printable(OsStr::new(class));
            return Err(Error::format(
                file,
                format!(
                    "line {}: the class would be {class}, which is called like an image: name the columns of files and of classes `file` and \
                     `label` in the first row, and leave a column of numbers in front of them out (pandas: index=False)",
                    row.line
                ),
            ));
        }
        if classes.iter().all(|class| class.parse::<i64>().is_ok()) {
            classes.sort_by_key(|class| class.parse::<i64>().unwrap_or(0));
        }
        let numbers: HashMap<&String, u32> = classes.iter().zip(0..).collect();
        rows.iter_mut().zip(&names).for_each(|(row, name)| row.class = numbers[name]);
        let classes = classes.iter().map(|class| printable(OsStr::new(class))).collect();
        let has_splits = columns.is_some_and(|columns| columns.split.is_some());
        Ok(Self { file: file.to_path_buf(), rows, classes, has_splits, not_read, has_header })
    }

    /// The file that it was read from.
    pub(super) fn file(&self) -> &Path {
        &self.file
    }

    /// Whether it says which split a file belongs to.
    pub(super) fn has_splits(&self) -> bool {
        self.has_splits
    }

    /// Whether it says of a file that it belongs to a split.
    pub(super) fn names(&self, split: Split) -> bool {
        self.has_splits && self.rows.iter().any(|row| row.split == Some(split))
    }

    /// A sentence on rows of splits that are not read.
    pub(super) fn not_read(&self) -> Option<String> {
        self.not_read.as_ref().map(|what| format!("{}: {what}", self.file.display()))
    }

    /// Returns the names of the classes, printable.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }
}

impl Columns {
    /// The columns, if a row names those of files and classes.
    fn named(record: &csv::StringRecord) -> Option<Self> {
        let names: Vec<String> = record.iter().map(|name| name.trim().to_lowercase()).collect();
        // `y` beside `x` is a place, not a class.
        let is_place = |known: &str| known == "y" && names.iter().any(|name| name == "x");
        let column = |known: &[&str]| {
            let mut known = known.iter().filter(|known| !is_place(known));
            known.find_map(|known| names.iter().position(|name| name == known))
        };
        let [file, class] = [column(&FILES)?, column(&LABELS)?];
        Some(Self { file, class, split: column(&SPLITS) })
    }

    /// A row, whose class is not numbered yet, and its class; `None` if it has none.
    fn row(self, table: &Path, record: &csv::StringRecord) -> Result<Option<(Row, String)>> {
        let line = record.position().map_or(0, csv::Position::line);
        let wrong = |what: String| Error::format(table, format!("line {line}: {what}"));
        let (Some(name), Some(class)) = (record.get(self.file), record.get(self.class)) else {
            return Err(wrong(format!(
                "a table of labels has a file and a class in each row, as in `a.jpg,cat`, and here is {}",
                match record.len() {
                    1 => "one column".to_owned(),
                    count => format!("a row of {count} columns"),
                }
            )));
        };
        let (name, class) = (name.trim(), class.trim());
        if name.is_empty() || class.is_empty() {
            return Ok(None);
        }
        let unclosed = |text: &str| text.contains(['\n', '\r']);
        if unclosed(name)
            || unclosed(class)
            || record.iter().any(|field| self.has_rows(field, record.len()))
        {
            return Err(wrong("a quote begins here that is not closed in the same line".into()));
        }
        let split = match &*self.split_of(record) {
            "" => Split::Train,
            split => split.parse().map_err(|e: Error| wrong(e.to_string()))?,
        };
        let row = Row { line, name: name.to_owned(), class: 0, split: Some(split) };
        Ok(Some((row, class.to_owned())))
    }

    /// Whether later lines of a field, such as a note in quotes, look like rows of `count` columns: its quote is not closed.
    fn has_rows(self, field: &str, count: usize) -> bool {
        let is_row = |line: &str, separator| {
            let fields: Vec<&str> = line.split(separator).collect();
            let is_name = |name: &&str| !name.is_empty() && !name.contains(char::is_whitespace);
            fields.len() >= count
                && fields.get(self.file).map(|name| name.trim()).is_some_and(|name| is_name(&name))
        };
        count > 1
            && field.lines().skip(1).any(|line| [',', ';', '\t'].iter().any(|&by| is_row(line, by)))
    }

    /// What a row says of its split; nothing if it says nothing.
    fn split_of(self, record: &csv::StringRecord) -> String {
        let split = self.split.and_then(|column| record.get(column)).unwrap_or_default();
        split.trim().to_lowercase()
    }
}

/// Of several splits that could be the held-out one takes the one that would be among folders of these names, and the rows of the
/// others out of all; returns a sentence on them. `splits` are the words of the rows.
fn one_held_out(rows: &mut [Row], splits: &[String]) -> Option<String> {
    let named = |split: &&str| splits.iter().any(|word| word == split);
    let held_out: Vec<&str> = folders(Split::Test).iter().copied().filter(named).collect();
    let sentence = not_used(held_out.iter().map(|split| (*split).to_owned()))?;
    for (row, word) in rows.iter_mut().zip(splits) {
        if held_out[1..].contains(&word.as_str()) {
            row.split = None;
        }
    }
    Some(sentence)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Reading, open_labelled};

    /// A folder of images `a.png` to `d.png`, and what a table says of a split of it: names and classes, then the notes.
    pub(super) fn labelled(
        table: &str,
        split: Split,
    ) -> Result<(Vec<String>, Vec<String>), String> {
        let root = tempfile::tempdir().unwrap();
        let photos = root.path().join("photos");
        std::fs::create_dir(&photos).unwrap();
        for name in ["a", "b", "c", "d"] {
            image::GrayImage::new(2, 2).save(photos.join(format!("{name}.png"))).unwrap();
        }
        let file = root.path().join("labels.csv");
        std::fs::write(&file, table).unwrap();
        let table = LabelTable::read(&file).map_err(|e| e.to_string())?;
        let set = open_labelled(&photos, split, &Reading::default(), Some(&table))
            .map_err(|e| e.to_string())?;
        let said = |i: usize| {
            let name = set.name(i);
            let class = &set.classes()[set.label(i).unwrap() as usize];
            format!("{} {class}", &name[name.len() - 5..])
        };
        Ok(((0..set.len()).map(said).collect(), set.notes().to_vec()))
    }

    fn rows(table: &str) -> Vec<String> {
        let (rows, notes) = labelled(table, Split::Train).unwrap();
        assert_eq!(notes, [""; 0], "{table}");
        rows
    }

    #[test]
    fn columns_are_found_with_a_header_and_without() {
        let all = ["a.png cat", "b.png dog", "c.png cat", "d.png dog"];
        assert_eq!(rows("a.png,cat\nb.png,dog\nc.png,cat\nd.png,dog\n"), all);
        assert_eq!(
            rows("\u{feff}file,label\r\na.png,cat\r\nb.png,dog\r\nc.png,cat\r\nd.png,dog"),
            all
        );
        assert_eq!(rows("Species,n,ID\ncat,1,a\ndog,2,b\ncat,3,c\n\"dog\",4,\"d\"\n"), all);
        assert_eq!(
            rows(
                "file,class\n/x/photos/a.png,\"cat, wild\"\nb.png,\"a \"\"b\"\"\"\nphotos/c.png,1\nd,1"
            ),
            ["a.png cat, wild", "b.png a \"b\"", "c.png 1", "d.png 1"]
        );
        assert_eq!(rows("file;label\na;cat\nb;dog\nc;cat\nd;dog\n"), all);
        assert_eq!(rows("file\tlabel\na\tcat\nb\tdog\nc\tcat\nd\tdog\n"), all);
        assert_eq!(rows("file,x,y,label\na,1,2,cat\nb,1,2,dog\nc,3,4,cat\nd,5,6,dog\n"), all);
        assert_eq!(rows("id,y\na,cat\nb,dog\nc,cat\nd,dog\n"), all);
        let said = labelled("file,x,y\na,1,2\n", Split::Train).unwrap_err();
        assert!(said.contains("names no image"), "{said}"); // of its columns none holds classes
        // Whole numbers in the order of their values.
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("numbers.tsv");
        std::fs::write(&file, "a\t10\nb\t9\nc\t-1\n").unwrap();
        assert_eq!(LabelTable::read(&file).unwrap().classes(), ["-1", "9", "10"]);
    }

    #[test]
    fn a_column_of_splits_holds_images_out() {
        let table = "file,label,split\na.png,cat,train\nb.png,dog,VAL\nc.png,dog,\nd.png,cat,val\n";
        assert_eq!(rows(table), ["a.png cat", "c.png dog"]);
        let (held_out, notes) = labelled(table, Split::Test).unwrap();
        assert_eq!((held_out, notes.len()), (vec!["b.png dog".into(), "d.png cat".into()], 0));
        // As of folders, one of two is held out.
        let both = table.replace(",val", ",test");
        let (training, notes) = labelled(&both, Split::Train).unwrap();
        assert_eq!(training, ["a.png cat", "c.png dog"]);
        assert!(
            notes.len() == 1
                && notes[0]
                    .ends_with("labels.csv: test is the held-out split, and val is not read"),
            "{notes:?}"
        );
        assert_eq!(labelled(&both, Split::Test).unwrap().0, ["d.png cat"]);
    }

    #[test]
    fn classes_of_held_out_rows_are_compared_with_those_of_training_rows() {
        let table = |class: &str| {
            format!("file,label,split\na,1,train\nb,2,train\nc,{class},test\nd,2,test\n")
        };
        for (class, what) in [("01", "1"), ("1.0", "1"), ("+2", "2")] {
            let said = labelled(&table(class), Split::Test).unwrap_err();
            let expected = format!(
                "labels.csv: has class {class}, and the train split has class {what}, which differs in how the number is written"
            );
            assert!(said.contains(&expected), "{said}");
            assert!(labelled(&table(class), Split::Train).is_ok()); // the training split stands alone
        }
        let (rows, notes) = labelled(&table("3"), Split::Test).unwrap();
        assert_eq!(rows, ["c.png 3", "d.png 2"]);
        assert!(
            notes[0].ends_with(
                "labels.csv: class 3 has no training images: 1 images count as never right"
            ),
            "{notes:?}"
        );
        let said =
            labelled("file,label,split\na,cat,train\nb,Cat,test\n", Split::Test).unwrap_err();
        assert!(
            said.contains(
                "has class Cat, and the train split has class cat, which differs in case"
            ),
            "{said}"
        );
        // Nothing to compare with: the held-out rows alone are read.
        let (rows, notes) = labelled("file,label,split\na,cat,test\n", Split::Test).unwrap();
        assert_eq!((rows, notes.len()), (vec!["a.png cat".into()], 0));
    }

    #[test]
    fn mistakes_of_a_table_are_reported_by_line() {
        for (table, split, message) in [
            (
                "a.png,cat\nb.png,dog\na.png,dog\n",
                Split::Train,
                "a.png is dog here and cat in line 1",
            ),
            (
                "file,label,split\na.png,cat,test\na.png,cat,train\n",
                Split::Train,
                "a.png is cat (train) here and cat (test) in line 2",
            ),
            (
                "a.png\nb.png\n",
                Split::Train,
                "line 1: a table of labels has a file and a class in each row, as in `a.jpg,cat`, and here is one column",
            ),
            ("file,label,split\na.png,cat,last\n", Split::Train, "line 2: unknown split `last`"),
            ("file,label\n", Split::Train, "has no row with a file and a class"),
            ("x.png,cat\n", Split::Train, "no row names an image of "),
            ("a.png,cat\n", Split::Test, "and the table of labels no column `split`"),
            (
                "file,label,split\na.png,cat,train\n",
                Split::Test,
                "has no images of the test split by the table of labels",
            ),
            ("a.png,cat\nb.png,\"dog\n", Split::Train, ""), // an open quote ends with the file
            ("a.png,cat\nb.png,\"dog\nc.png,cat\n", Split::Train, "line 2: a quote begins here"),
            (
                "file,label,size\na.png,cat,\"12 inch\nb.png,dog,5\nc.png,dog,\"9\n",
                Split::Train,
                "line 2: a quote begins here",
            ),
            (
                "file,label,note\na.png,cat,\"two lines\nof a note, which, is long\"\nb.png,dog,\n",
                Split::Train,
                "",
            ),
            (
                "image_path,breed_name\na.png,cat\nb.png,dog\n",
                Split::Train,
                "line 1: names no image and has a class that no other row has: if it names the columns",
            ),
        ] {
            match (labelled(table, split), message) {
                (Ok((rows, _)), "") => assert_eq!(rows, ["a.png cat", "b.png dog"]),
                (found, message) => {
                    let error = found.unwrap_err();
                    assert!(error.contains(message), "`{message}` in `{error}`");
                }
            }
        }
        assert!(labelled("a.png,cat\na.png,cat\nb,dog\nc,dog\nd,dog", Split::Train).is_ok());
        let not_text = labelled("", Split::Train).unwrap_err();
        assert!(not_text.contains("has no row"), "{not_text}");
    }
}

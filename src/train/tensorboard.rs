//! TensorBoard event files with the numbers of `metrics.jsonl`.
//!
//! A file holds TFRecords (tensorflow/core/lib/io/record_writer.h: length, masked CRC-32C of the length, bytes, masked CRC-32C of
//! the bytes) of `Event` messages (tensorflow/core/util/event.proto), of which three fields are enough here. A resumed run starts a
//! new file, whose first event tells TensorBoard to drop what earlier files hold from that step on.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::error::{Error, Result};

/// An event file, created with its first number.
#[derive(Debug)]
pub(super) struct Events {
    folder: PathBuf,
    file: Option<(PathBuf, BufWriter<File>)>,
}

impl Events {
    pub(super) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_path_buf(), file: None }
    }

    /// Writes every number of a record; numbers in nested objects get names with slashes, and histograms are left out. The record
    /// of an epoch flushes the file.
    pub(super) fn write(&mut self, record: &Value) -> Result<()> {
        let Some(step) = record["step"].as_i64() else { return Ok(()) };
        let mut values = Vec::new();
        // An epoch's mean loss and a step's loss are different curves.
        let is_epoch = record.get("epoch").is_some();
        scalars(if is_epoch { "epoch" } else { "" }, record, &mut values);
        let (path, file) = match &mut self.file {
            Some(open) => open,
            empty => empty.insert(begin(&self.folder, step)?),
        };
        let written = file
            .write_all(&framed(&event(step, Some(&values))))
            .and_then(|()| if is_epoch { file.flush() } else { Ok(()) });
        written.map_err(Error::io(&*path))
    }
}

/// Creates a file whose name sorts after all earlier ones.
fn begin(folder: &Path, step: i64) -> Result<(PathBuf, BufWriter<File>)> {
    let since = now();
    let path = folder.join(format!(
        "events.out.tfevents.{:010}.{:09}.selfsup",
        since.as_secs(),
        since.subsec_nanos()
    ));
    let mut file = BufWriter::new(File::create(&path).map_err(Error::io(&path))?);
    // Wall time and `file_version`.
    let mut version = double(1, since.as_secs_f64());
    version.extend(bytes(3, b"brain.Event:2"));
    // `session_log { status: START }`
    let written = file
        .write_all(&framed(&version))
        .and_then(|()| file.write_all(&framed(&event(step, None))));
    written.map_err(Error::io(&path))?;
    Ok((path, file))
}

fn now() -> std::time::Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn scalars(name: &str, value: &Value, into: &mut Vec<(String, f32)>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields.iter().filter(|(key, _)| *key != "step" && *key != "epoch") {
                let name = if name.is_empty() { key.clone() } else { format!("{name}/{key}") };
                scalars(&name, value, into);
            }
        }
        Value::Number(number) => {
            into.push((name.to_owned(), number.as_f64().unwrap_or(f64::NAN) as f32));
        }
        _ => {}
    }
}

/// Encodes an event: a summary of values, or the start of a session.
fn event(step: i64, values: Option<&[(String, f32)]>) -> Vec<u8> {
    let mut event = double(1, now().as_secs_f64());
    event.extend(varint(2, step as u64));
    match values {
        Some(values) => {
            let of = |(tag, value): &(String, f32)| {
                let mut inner = bytes(1, tag.as_bytes());
                inner.push(2 << 3 | 5); // a fixed 32-bit field
                inner.extend(value.to_le_bytes());
                bytes(1, &inner)
            };
            event.extend(bytes(5, &values.iter().flat_map(of).collect::<Vec<u8>>()));
        }
        None => event.extend(bytes(7, &varint(1, 1))),
    }
    event
}

/// Encodes a protobuf field: a 64-bit number; the functions below encode bytes with their length and a variable-length number.
fn double(field: u8, value: f64) -> Vec<u8> {
    [&[field << 3 | 1], &value.to_le_bytes()[..]].concat()
}

fn bytes(field: u8, value: &[u8]) -> Vec<u8> {
    let mut all = vec![field << 3 | 2];
    number(value.len() as u64, &mut all);
    all.extend(value);
    all
}

fn varint(field: u8, value: u64) -> Vec<u8> {
    let mut all = vec![field << 3];
    number(value, &mut all);
    all
}

/// Appends a number as seven bits per byte, lowest first; the top bit says that more bytes follow.
fn number(mut value: u64, into: &mut Vec<u8>) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

fn framed(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let masked = |data: &[u8]| {
        let crc = crc32c::crc32c(data);
        crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
    };
    [&length[..], &masked(&length), data, &masked(data)].concat()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn each_number_is_written_with_its_name_in_a_framed_record() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = Events::new(folder.path());
        events.write(&json!({ "stopped": "Ctrl-C" })).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        events.write(&json!({ "step": 300, "loss": 2.5, "lr": 0.5 })).unwrap();
        let record = json!({
            "epoch": 1, "step": 300, "knn": null,
            "monitors": { "alignment": 0.25, "positive_histogram": [1, 2] },
        });
        events.write(&record).unwrap();
        let path = std::fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        let all = std::fs::read(path).unwrap();
        let (mut rest, mut records) = (&all[..], Vec::new());
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            let (record, more) = rest[12..].split_at(length);
            assert_eq!(framed(record), rest[..length + 16]);
            records.push(record.to_vec());
            rest = &more[4..];
        }
        assert_eq!(records.len(), 4);
        assert!(records[0].ends_with(b"brain.Event:2"));
        // After the wall time: step 300 and the session's start.
        assert_eq!(records[1][9..], [0x10, 0xac, 0x02, 0x3a, 2, 8, 1]);
        let loss =
            [&[0x10, 0xac, 0x02, 0x2a, 24, 10, 11, 10, 4], &b"loss"[..], &[0x15, 0, 0, 0x20, 0x40]];
        assert!(records[2][9..].starts_with(&loss.concat()), "{:?}", &records[2][9..]);
        let name = b"epoch/monitors/alignment";
        assert!(records[3].windows(name.len()).any(|part| part == name));
        assert!(!records[3].windows(9).any(|part| part == b"histogram"));
    }

    /// RFC 3720, B.4: 32 zero bytes have the checksum 8a9136aa.
    #[test]
    fn checksums_use_the_castagnoli_polynomial() {
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
    }
}

//! What a file is that is no safetensors file, and what to do about it.

use std::path::Path;

/// Bytes from which a file's format is recognised.
pub(super) const START: u64 = 1024;

/// Says what a file is, and what to do about it, if its first bytes are those of a format that weights often come in.
pub(super) fn other_format(path: &Path, start: &[u8]) -> Option<String> {
    if start.get(8) == Some(&b'{') {
        return None; // as every safetensors file
    }
    let begins = |part: &[u8]| start.starts_with(part);
    let text = String::from_utf8_lossy(start).trim_start().to_ascii_lowercase();
    let holds = |part: &[u8]| start.windows(part.len()).any(|window| window == part);
    // The second byte of a pickle is its protocol, 2 to 5; a legacy PyTorch file is a chain of pickles.
    let is_pickle = matches!(start, [0x80, 2..=5, ..]);
    let is_zip = start.starts_with(b"PK\x03\x04");
    if is_pickle || is_zip && (holds(b"/data.pkl") || holds(b"/version") || holds(b"/byteorder")) {
        Some(format!("a PyTorch file (pickle), and only safetensors is read: {}", conversion(path)))
    } else if is_zip {
        Some("a zip archive, not a safetensors file: unpack it first".into())
    } else if start.starts_with(b"\x1f\x8b") {
        Some("a gzip file, not a safetensors file: unpack it first (gunzip)".into())
    } else if text.starts_with("version https://git-lfs") {
        Some("a Git LFS pointer, not the weights themselves: fetch them with `git lfs pull`".into())
    } else if begins(b"\x89HDF\r\n") {
        Some("an HDF5 file (Keras), and only safetensors with PyTorch's names is read".into())
    } else if begins(b"GGUF") {
        Some("a GGUF file, and only safetensors is read".into())
    } else if begins(b"\x93NUMPY") {
        Some("an array of NumPy, and only safetensors is read".into())
    } else if start.get(257..262) == Some(b"ustar") {
        Some("a tar archive, not a safetensors file: unpack it first".into())
    } else if holds(b"\"weight_map\"") {
        Some("an index of weights in several files: join the files that it names into one".into())
    } else if text.starts_with(['{', '[']) {
        Some("JSON text, not a safetensors file".into())
    } else if is_onnx(path, start) {
        Some("an ONNX file, and only safetensors is read".into())
    } else if text.starts_with("<!doctype html") || text.starts_with("<html") {
        Some("a web page (HTML), not a safetensors file: download the file itself".into())
    } else {
        None
    }
}

/// Whether a file is an ONNX model: a protobuf message of IR version and producer, whatever its name; or named like one.
fn is_onnx(path: &Path, start: &[u8]) -> bool {
    let named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("onnx"));
    named || matches!(start, [0x08, 1..=20, 0x12, length, ..] if (1..64).contains(length))
}

/// The line of Python that converts a PyTorch file.
fn conversion(path: &Path) -> String {
    let from = path.display().to_string();
    let plain = |c: char| c.is_alphanumeric() || "/._-+ ".contains(c);
    let from = if from.chars().all(plain) { from } else { "FILE.pth".into() };
    let to = Path::new(&from).with_extension("safetensors").display().to_string();
    format!(
        "convert it with python3 -c \"import torch, safetensors.torch as s; m = torch.load('{from}', map_location='cpu', weights_only=True); \
         m = m.get('state_dict', m.get('model', m)); \
         s.save_file({{k: v.clone().contiguous() for k, v in m.items() if torch.is_tensor(v)}}, '{to}')\""
    )
}

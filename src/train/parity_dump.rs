//! Dumps the beginning of a run so that another program can repeat it: its first weights and the views of its first steps.
//!
//! `benches/peers/parity.py` trains PyTorch on them and plots both loss curves on top of each other.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};

use crate::data::Batch;
use crate::error::Result;
use crate::files::write_file;

/// The folder of a dump, inside the run's folder.
pub(super) const FOLDER: &str = "parity";

/// Writes the views and classes of a step to `folder/views-NNNNNNNN.safetensors`: `crops.I [views * n, s, s, 3]`, f32, view after
/// view, for each resolution, and `labels [n]`, i32.
pub(super) fn write_views(folder: &Path, step: u64, batch: &Batch) -> Result<()> {
    let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for (i, crops) in batch.crops.iter().enumerate() {
        let [rows, height, width] = [0, 1, 2].map(|axis| crops.shape()[axis]);
        // The fourth channel is padding for alignment.
        let pixels = crops.to_f64();
        let bytes = pixels.chunks_exact(4).flat_map(|pixel| &pixel[..3]);
        let bytes = bytes.flat_map(|&v| (v as f32).to_le_bytes()).collect();
        tensors.push((format!("crops.{i}"), Dtype::F32, vec![rows, height, width, 3], bytes));
    }
    let labels = batch.labels.iter().flat_map(|label| label.to_le_bytes()).collect();
    tensors.push(("labels".into(), Dtype::I32, vec![batch.labels.len()], labels));
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view = TensorView::new(*dtype, shape.clone(), bytes);
        (name.as_str(), view.expect("the bytes match the shape"))
    });
    let data = safetensors::serialize(views, None).expect("names are unique");
    write_file(&folder.join(format!("views-{step:08}.safetensors")), &data)
}

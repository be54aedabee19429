//! Pooling of images `[n, h, w, c]`.
//!
//! Max pooling takes the maximum of each `size x size` window, padding excluded. Its gradient goes to the first maximum in row
//! order, as in PyTorch; the CPU finds it again from `x` and `y`, a GPU saves one byte per output. Mean pooling is global, as at
//! the end of a ResNet: `[n, h, w, c]` to `[n, c]`. Average pooling of small windows is for the shortcuts of ResNet-D.

mod average;
mod cuda;
mod max;
mod mean;

pub use average::avg_pool;
pub use max::max_pool;
pub use mean::mean_pool;

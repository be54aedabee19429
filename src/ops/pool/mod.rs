//! Pooling of images `[n, h, w, c]`.
//!
//! Max pooling takes the largest of each `size x size` window, padding excluded; its gradient goes to the first largest
//! in row order, as in PyTorch, found again from `x` and `y` instead of saved (a GPU saves a byte for each output). Mean
//! pooling here is the global one that ends a ResNet: `[n, h, w, c]` to `[n, c]`. Average pooling of small windows is for
//! shortcuts of ResNet-D.

mod average;
mod cuda;
mod max;
mod mean;

pub use average::avg_pool;
pub use max::max_pool;
pub use mean::mean_pool;

//! selfsup
pub mod arena;
pub mod cli;
pub mod data;
pub mod device;
pub mod error;
pub mod eval;
pub mod methods;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod tape;
pub mod tensor;
pub mod train;
pub use error::{Error, Result};

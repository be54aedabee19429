//! selfsup
pub mod arena;
pub mod data;
pub mod device;
pub mod error;
pub mod methods;
pub mod nn;
pub mod ops;
pub mod optim;
pub mod tape;
pub mod tensor;
pub use error::{Error, Result};

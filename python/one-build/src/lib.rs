//! Nothing: the features in `Cargo.toml` are all that this crate is.

//! Images in, batches of augmented crops out.
//!
//! A [`Source`] gives `index -> (image, label)`, images of one [`Format`]; a [`Policy`] draws the parameters of one augmentation and applies
//! them; a [`Loader`] runs both on threads and hands out [`Batch`]es that are a pure function of seed, epoch and position.
//! Evaluation has one transform, [`center`], and one way to read a set in order, [`center_batch`]. On a GPU the threads only
//! draw parameters, and a kernel makes the crops of images that lie there, or that are copied beside its other work. Nothing here
//! depends on networks or methods.

pub mod augment;
mod batch;
mod cache;
mod cifar;
mod classes;
mod decode;
mod evaluation;
mod folder;
mod idx;
mod labels;
mod listing;
mod loader;
mod native;
mod open;
mod pack;
mod rows;
mod source;
mod survey;
mod table;

pub use augment::{Policy, Transform, center};
pub use batch::{Batch, Skipped};
pub use cifar::Cifar;
pub use decode::{Axes, Pages, Reading, Samples, Values};
pub(crate) use evaluation::each_batch;
pub use evaluation::{center_batch, transformed_batch};
pub use folder::Folder;
pub use idx::{Idx, fashion_scattered};
pub use labels::{labelled, labels_of, of_each_class};
pub(crate) use listing::is_image_name;
pub use loader::Loader;
pub(crate) use native::{extent, native_format};
pub use open::{open, open_as, open_labelled};
pub use pack::{Pack, PackSettings, Packed, Stored, pack, pack_if};
pub use source::{Format, Image, OnGpu, Source, Split, Subset};
pub use survey::{Survey, survey};
pub use table::{LabelTable, table_and_part};

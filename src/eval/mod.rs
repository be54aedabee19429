//! Evaluation of frozen features (floor 6): weighted kNN, a linear probe on few labels, and the collapse monitor.

mod embed;
mod features;
mod knn;
mod linear;
mod monitor;

pub use embed::{Embedded, embed};
pub use features::{Features, classifier_accuracy, pixel_features, trunk_features};
pub use knn::{Knn, accuracy as knn_accuracy};
pub use linear::few_label_accuracy;
pub use monitor::{Spread, spread};

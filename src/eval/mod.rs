//! Evaluation of frozen features: weighted kNN, linear probes by published protocols and on few labels, the collapse
//! monitor, what features are worth without labels, and a two-dimensional map (t-SNE).

mod embed;
mod features;
mod head;
mod knn;
mod linear;
mod map;
mod monitor;
mod probe;
mod protocol;
mod rank;
mod rows;
mod spectrum;
mod views;

pub use embed::{Embedded, embed};
pub(crate) use features::count_correct;
pub use features::{Features, backbone_features, classifier_accuracy, pixel_features, unreadable};
pub use knn::{
    Answer, Knn, accuracies as knn_accuracies, accuracy as knn_accuracy, answers as knn_answers,
};
pub use linear::few_label_accuracy;
pub use map::map;
pub use monitor::{Spread, spread};
pub use probe::{Frozen, Probed, RATES, linear_accuracy};
pub use protocol::{PROTOCOLS, Protocol};
pub use rank::{lidar, rank_me};
pub(crate) use views::{FEATURES, RANKED};
pub use views::{IMAGES, Quality, VIEWS, quality};

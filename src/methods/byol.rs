//! BYOL (Grill et al. 2020, arXiv:2006.07733), as google-deepmind/deepmind-research trains it.
//!
//! The online network sees one view of an image and predicts what a target network makes of the other. The target is a slow
//! average of the online network and gets no gradient. There are no negatives: that all images could have one
//! embedding is prevented by the predictor, by the target's lag, and, by later accounts, by batch norm. The two views come
//! from different distributions. The average slows down along a cosine until the target stands still.
//!
//! `L = mean_i (|p̂_i - ẑ'_i|² + |p̂'_i - ẑ_i|²) = 4 + 2 (D(p1, z2) + D(p2, z1))` (eq. 2), `D` the negative cosine, `p`
//! predictions of the online network, `z` projections of the target.
//!
//! The **sum** of both directions, not their mean: biases and batch norm are outside LARS and feel the factor (lightly
//! lost 11 points by it, lightly-ai/lightly#1286). Each view goes through either network alone, so that batch norm sees
//! one view; the target normalises by its batch, too, with running statistics of its own. After the update
//! `target = tau target + (1 - tau) online` with `tau = 1 - (1 - base) (cos(pi k / K) + 1) / 2`, step by step.
//!
//! What to expect: the loss starts near 4, falls fast below 1 and says little after; the embeddings' deviation dips in the
//! first epochs and comes back. Near 0 it has collapsed: check warm-up, weight decay and batch size.
//! `selfsup train byol-cifar10-small`.
//!
//! Deviations: no online classifier beside the loss (its gradient is stopped in the reference); heads start normal, not
//! truncated normal.

use std::sync::Arc;

use serde::Deserialize;

use crate::arena::{Arena, Layout};
use crate::error::Result;
use crate::methods::{Course, Method, State, above_zero, momentum_in_range, view, widths};
use crate::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig};
use crate::ops::{add, l2_normalize, neg_cosine, scale};
use crate::optim::ema;
use crate::tape::{Tape, Var, forward_in_step};
use crate::tensor::{Numbers, Tensor};

/// The method's own settings.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// tau's base: 0.996 for 1000 epochs, 0.99 for 300 and 100, 0.97 for 40.
    pub momentum: f64,
    /// Width of the hidden layers of projector and predictor: 4096.
    pub hidden: usize,
    /// Width of the embedding: 256.
    pub embedding: usize,
    /// Whether the target starts from weights of its own, as in the reference code, or from the online network's: "no
    /// significant difference".
    #[serde(default)]
    pub fresh_target: bool,
    /// Whether there is a predictor. Without one it collapses.
    #[serde(default = "yes")]
    pub predictor: bool,
    /// Whether batch norm is in the heads.
    #[serde(default = "yes")]
    pub head_norm: bool,
}

fn yes() -> bool {
    true
}

/// The description and the target network.
pub struct Byol {
    layout: Arc<Layout>,
    backbone: ResNet,
    projector: Mlp,
    predictor: Mlp,
    settings: Settings,
    target: Option<Arena>,
    total: u64,
    /// Of this step; made by `start`.
    tau: Option<Numbers<f64>>,
    embeddings: Option<Tensor>,
}

pub(super) fn build(network: &ResNetConfig, table: &toml::Table) -> Result<Box<dyn Method>> {
    let settings: Settings = super::recipe::table(table, "method")?;
    momentum_in_range(settings.momentum, "momentum")?;
    above_zero(settings.hidden as f64, "hidden")?;
    widths(&[(settings.hidden, "hidden"), (settings.embedding, "embedding")])?;
    Ok(Box::new(Byol::new(network, &settings)))
}

impl Byol {
    /// The trunk under `backbone.`, then `projector.` and `predictor.`.
    pub fn new(network: &ResNetConfig, settings: &Settings) -> Self {
        let Settings { hidden, embedding, .. } = *settings;
        let mut layout = Layout::new();
        let backbone = ResNet::new(&mut layout, "backbone.", network);
        let norm = if settings.head_norm { NormKind::Affine } else { NormKind::None };
        let mut head = |name: &str, inputs: usize| {
            let std = |inputs: usize| Some(1.0 / (inputs as f64).sqrt());
            let layers = [
                MlpLayer { width: hidden, bias: true, norm, relu: true, std: std(inputs) },
                MlpLayer {
                    width: embedding,
                    bias: false,
                    norm: NormKind::None,
                    relu: false,
                    std: std(hidden),
                },
            ];
            let layers = if inputs > 0 { &layers[..] } else { &[] };
            Mlp::new(&mut layout, name, inputs, layers, network.norm_groups)
        };
        let projector = head("projector", backbone.features());
        let predictor = head("predictor", if settings.predictor { embedding } else { 0 });
        let (layout, settings) = (Arc::new(layout), *settings);
        let (target, total, tau, embeddings) = (None, 1, None, None);
        Self { layout, backbone, projector, predictor, settings, target, total, tau, embeddings }
    }

    fn project<'t>(&self, x: &Var<'t>) -> Var<'t> {
        self.projector.forward(self.backbone.forward(x))
    }

    /// The target's projections of images; no gradient.
    fn project_target(&mut self, images: &Tensor) -> Tensor {
        let mut target = self.target.take().expect("byol: start comes before the first step");
        let z = forward_in_step(&mut target, |tape| self.project(&tape.input(images)));
        self.target = Some(target);
        z
    }
}

impl Method for Byol {
    fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    fn backbone(&self) -> &ResNet {
        &self.backbone
    }

    fn start(&mut self, online: &Arena, course: &Course) -> Result<()> {
        self.total = course.total.max(1);
        self.tau = Some(Numbers::new(online.device(), &[self.settings.momentum]));
        self.target = Some(if self.settings.fresh_target {
            Arena::new(&self.layout, online.device(), course.seed ^ (1 << 63))
        } else {
            online.twin()
        });
        Ok(())
    }

    fn prepare(&mut self, iteration: u64) {
        let done = iteration as f64 / self.total as f64;
        let half_cosine = ((std::f64::consts::PI * done).cos() + 1.0) / 2.0;
        if let Some(tau) = &mut self.tau {
            tau.set(&[1.0 - (1.0 - self.settings.momentum) * half_cosine]);
        }
    }

    fn loss<'t>(&mut self, tape: &'t Tape<'t>, views: &[Tensor]) -> Var<'t> {
        let [x1, x2] = [0, 1].map(|i| view(&views[0], i, 2));
        let z1 = self.project(&tape.input(&x1)); // [n, embedding]
        let z2 = self.project(&tape.input(&x2));
        let p1 = self.predictor.forward(z1.clone());
        let p2 = self.predictor.forward(z2);
        let t1 = tape.input(&self.project_target(&x1));
        let t2 = tape.input(&self.project_target(&x2));
        self.embeddings = Some(l2_normalize(&z1.detach()).value().clone());
        // |a - b|² = 2 - 2 cos(a, b) of unit rows, once for each direction.
        let cosines = add(&neg_cosine(&p1, &t2), &neg_cosine(&p2, &t1));
        add(&scale(&cosines, 2.0), &tape.constant(4.0))
    }

    fn take_embeddings(&mut self) -> Option<Tensor> {
        self.embeddings.take()
    }

    fn after_update(&mut self, online: &mut Arena, _: f64) {
        let (target, tau) = (self.target.as_mut(), self.tau.as_ref());
        let (target, tau) = target.zip(tau).expect("byol: start comes before the first step");
        ema(target, online, tau);
    }

    fn state(&mut self) -> Vec<(&'static str, State<'_>)> {
        self.target.as_mut().map(|target| ("target", State::Network(target))).into_iter().collect()
    }
}

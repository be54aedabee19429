//! selfsup embedded in another program: a network, a custom loss and an optimizer step.
//!
//! A ResNet learns to map two noisy copies of an image to the same features, and different images to different ones.

use std::sync::Arc;

use selfsup::arena::{Arena, Layout};
use selfsup::device::{Device, Philox, Purpose};
use selfsup::nn::{Mlp, MlpLayer, NormKind, ResNet, ResNetConfig, Stem};
use selfsup::ops::{l2_normalize, mean_of, nt_xent, scale};
use selfsup::optim::{Exclude, Optimizer, Rule, Sgd};
use selfsup::tape::step;
use selfsup::tensor::Tensor;

const IMAGES: usize = 16;
const SIZE: usize = 16;

/// Two views of each image, `[2 IMAGES, SIZE, SIZE, 4]`, the fourth channel zero.
fn views(device: &Device, round: u32) -> Tensor {
    let mut values = Vec::new();
    for row in 0..2 * IMAGES as u32 {
        let mut image = Philox::new(1, Purpose::Test, 0, row % IMAGES as u32);
        let mut noise = Philox::new(1, Purpose::Test, 1 + round, row);
        for _pixel in 0..SIZE * SIZE {
            values.extend([0; 3].map(|_| image.uniform() + 0.2 * noise.uniform()));
            values.push(0.0);
        }
    }
    Tensor::from_slice(device, [2 * IMAGES, SIZE, SIZE, 4], &values)
}

/// Trains for ten steps.
pub fn main() {
    let device = Device::cpu(0).expect("threads");
    let mut layout = Layout::new();
    let published = ResNetConfig::named("resnet18").expect("a known name");
    let config =
        ResNetConfig { width: 8, stem: Stem::Small, zero_init_residual: true, ..published };
    let backbone = ResNet::new(&mut layout, "", &config);
    let layer = MlpLayer { width: 32, bias: true, norm: NormKind::None, relu: false, std: None };
    let head = Mlp::new(&mut layout, "head", backbone.features(), &[layer], 1);
    let mut arena = Arena::new(&Arc::new(layout), &device, 1);
    let exclude = Exclude::Nothing;
    let sgd = Sgd { momentum: 0.9, nesterov: false, weight_decay: 1e-4, exclude };
    let mut optimizer = Optimizer::new(Rule::Sgd(sgd), &arena);
    let mut losses = Vec::new();
    for round in 0..10 {
        let views = views(&device, round);
        let loss = step(&mut arena, |tape| {
            let z = l2_normalize(&head.forward(backbone.forward(&tape.input(&views))));
            mean_of(&[nt_xent(&z, 0.1), scale(&nt_xent(&z, 0.5), 2.0)]) // any graph will do
        });
        losses.push(loss.expect("the CPU does not fail").scalar());
        optimizer.step(&mut arena, 0.05);
    }
    println!("loss {:.3} -> {:.3}", losses[0], losses[9]);
    assert!(losses[9] < losses[0]);
}

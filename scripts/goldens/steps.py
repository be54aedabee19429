"""Ten steps of SimCLR on a tiny ResNet, as google-research/simclr does them; tests/suite/steps.rs has the settings too."""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import seeded
from .record import record, save, table
from .backbones import Backbone, fill, kinked, outside, slots

BATCH, SIDE, HIDDEN, EMBEDDING, STEPS = 8, 16, 64, 24, 10


class Layer(nn.Linear):
    """A linear layer without bias, and its batch norm."""

    def __init__(self, inputs, outputs, shift):
        super().__init__(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs)
        if not shift:
            self.norm.bias = None

    def forward(self, x):
        return self.norm(super().forward(x))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Backbone(18, 8, "small")
        self.head = nn.ModuleList([Layer(64, HIDDEN, True), Layer(HIDDEN, EMBEDDING, False)])
        self.relu = nn.ReLU()
        self.double()

    def forward(self, x):
        return self.head[1](self.relu(self.head[0](self.backbone(x))))


def contrastive_loss(hidden, temperature):
    """objective.py: `add_contrastive_loss`."""
    hidden1, hidden2 = F.normalize(hidden, dim=1).chunk(2)
    batch = hidden1.shape[0]
    labels = torch.arange(batch)
    masks = torch.eye(batch, dtype=hidden.dtype) * 1e9
    logits_aa = hidden1 @ hidden1.T / temperature - masks
    logits_bb = hidden2 @ hidden2.T / temperature - masks
    logits_ab = hidden1 @ hidden2.T / temperature
    logits_ba = hidden2 @ hidden1.T / temperature
    loss_a = F.cross_entropy(torch.cat([logits_ab, logits_aa], 1), labels)
    loss_b = F.cross_entropy(torch.cat([logits_ba, logits_bb], 1), labels)
    return loss_a + loss_b


def rate(step, peak, warmup):
    """model_util.py: `WarmUpAndCosineDecay`."""
    if step < warmup:
        return step / warmup * peak
    return peak * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup))) / 2


class Lars:
    """lars_optimizer.py with `classic_momentum`; weight decay and trust for all but batch norm and biases."""

    def __init__(self, network, decay=1e-4, momentum=0.9):
        self.weights, self.decay, self.momentum = list(network.parameters()), decay, momentum
        self.velocity = [torch.zeros_like(w) for w in self.weights]

    def step(self, lr):
        for w, v in zip(self.weights, self.velocity):
            gradient, trust = w.grad, 1.0
            if w.dim() > 1:
                gradient = gradient + self.decay * w.data
                if w.data.norm() > 0 and gradient.norm() > 0:
                    trust = 1e-3 * w.data.norm() / gradient.norm()
            v.copy_(self.momentum * v + lr * trust * gradient)
            w.data -= v


class Sgd:
    def __init__(self, network, nesterov, decay, spare):
        weights = [w for w in network.parameters() if w.dim() > 1 or not spare]
        rest = [w for w in network.parameters() if w.dim() == 1 and spare]
        groups = [{"params": weights, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
        self.inner = torch.optim.SGD([g for g in groups if g["params"]], lr=0.0, momentum=0.9, nesterov=nesterov)

    def step(self, lr):
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()


# Name: temperature, peak of the learning rate, steps of warm-up, optimiser.
RUNS = {
    "simclr lars": (0.1, 0.3, 3, Lars),
    "simclr sgd": (0.5, 0.05, 0, lambda network: Sgd(network, False, 1e-3, spare=False)),
    "simclr nesterov": (0.5, 0.05, 2, lambda network: Sgd(network, True, 1e-3, spare=True)),
}


def gradients(network, images, temperature):
    network.zero_grad()
    loss = contrastive_loss(network(images.to(next(network.parameters()).dtype)), temperature)
    loss.backward()
    return loss, {name: outside(w.grad) for name, w in network.named_parameters()}


def draws(name, step):
    """Candidates for the images of a step."""
    for draw in range(1000):
        shape = (2 * BATCH, SIDE, SIDE, 3)
        images = seeded.unit(seeded.seed(f"{name}|images {step}|draw {draw}"), math.prod(shape))
        yield draw, torch.from_numpy(images.reshape(shape))


def run(name):
    """The records of a run, by name."""
    temperature, peak, warmup, optimizer = RUNS[name]
    network, tensors, chosen = Network(), {}, []
    fill(network, name)
    optimizer = optimizer(network)
    for step in range(STEPS):
        draw, images = next((d, x) for d, x in draws(name, step) if not kinked(network, x))
        chosen.append(draw)
        own_loss, own = gradients(copy.deepcopy(network).float(), images, temperature)
        loss, truth = gradients(network, images, temperature)
        optimizer.step(rate(step, peak, warmup))
        tensors[f"{name}|{step}|loss"] = record(loss, own_loss)
        tensors[f"{name}|{step}|gradients"] = table(truth, own)
        tensors[f"{name}|{step}|slots"] = table({k: outside(v) for k, v in slots(network).items()})
    return tensors | {f"{name}|draws": np.array(chosen)}


def make(path, root):
    tensors = {}
    for name in RUNS:
        tensors |= run(name)
    save(tensors, path)

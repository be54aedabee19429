"""SGD, Adam, AdamW and the five published forms of LARS on seeded gradients; tests/suite/optimizers.rs has the slots too."""

import math

import numpy as np
import torch

from . import seeded
from .record import save

MOMENTUM, DECAY = 0.9, 0.01
RATES = [0.0, 0.1, 0.5, 0.3, 0.05, 0.4]
SLOTS = {
    "filter": (3, 2, 2, 4),
    "matrix": (5, 7),
    "zero": (4, 6),  # weights start at zero
    "still": (6, 3),  # gradients are always zero
    "flicker": (3, 3),  # gradients are zero at odd steps
    "bias": (5,),
    "gain": (7,),
    "shift": (7,),  # starts at zero
}


def weights():
    return {name: start(name, shape) for name, shape in SLOTS.items()}


def start(name, shape):
    if name in ("zero", "shift"):
        return torch.zeros(shape, dtype=torch.float64)
    return numbers(name, shape, 1.0)


def gradient(name, step):
    if name == "still" or (name == "flicker" and step % 2 == 1):
        return torch.zeros(SLOTS[name], dtype=torch.float64)
    return numbers(f"{name}|{step}", SLOTS[name], 0.125)


def numbers(what, shape, size):
    values = size * seeded.unit(seeded.seed(f"optimizers|{what}"), math.prod(shape))
    return torch.from_numpy(values.reshape(shape))


def spared(w):
    return w.dim() == 1


def simclr(w, g, state, lr):
    """google-research/simclr, lars_optimizer.py: `apply_gradients` with classic momentum."""
    trust = 1.0
    if not spared(w):
        g = g + DECAY * w
        w_norm, g_norm = torch.linalg.norm(w), torch.linalg.norm(g)
        trust = torch.where(w_norm > 0, torch.where(g_norm > 0, 1e-3 * w_norm / g_norm, 1.0), 1.0)
    state["v"] = MOMENTUM * state.get("v", 0.0) + lr * trust * g
    return w - state["v"]


def byol(w, g, state, lr):
    """deepmind-research, byol/utils/optimizers.py: add_weight_decay, scale_by_lars, scale."""
    if not spared(w):
        g = g + DECAY * w
        w_norm, g_norm = torch.linalg.norm(w), torch.linalg.norm(g)
        g = g * torch.where(w_norm > 0, torch.where(g_norm > 0, 1e-3 * w_norm / g_norm, 1.0), 1.0)
    state["mu"] = MOMENTUM * state.get("mu", 0.0) + g
    return w - lr * state["mu"]


def larc_gradient(w, g, lr, trust, decay, clip):
    """apex/parallel/LARC.py `step`; lightly's and solo-learn's `lars.py` have the same lines."""
    w_norm, g_norm = torch.norm(w), torch.norm(g)
    if w_norm != 0 and g_norm != 0:
        adaptive = trust * w_norm / (g_norm + w_norm * decay + 1e-8)
        if clip:
            adaptive = torch.clamp(adaptive / lr, max=1)
        g = (g + decay * w) * adaptive
    return g


def larc(w, g, state, lr):
    return sgd(w, larc_gradient(w, g, lr, 1e-3, DECAY, False), state, lr, 0.0)


def lightly(w, g, state, lr):
    # Biases and batch norm lie in a parameter group whose weight decay is 0.
    return sgd(w, g if spared(w) else larc_gradient(w, g, lr, 1e-3, DECAY, False), state, lr, 0.0)


def solo_learn(w, g, state, lr):
    return sgd(w, g if spared(w) else larc_gradient(w, g, lr, 0.02, DECAY, True), state, lr, 0.0)


def sgd(w, g, state, lr, decay=DECAY, nesterov=False):
    """torch.optim.SGD."""
    if not state:
        state["w"] = torch.nn.Parameter(w.clone())
        state["inner"] = torch.optim.SGD([state["w"]], lr=lr, momentum=MOMENTUM, weight_decay=decay, nesterov=nesterov)
    state["inner"].param_groups[0]["lr"] = lr
    state["w"].data.copy_(w)  # the caller may have changed it
    state["w"].grad = g.clone()
    state["inner"].step()
    return state["w"].detach().clone()


def nesterov(w, g, state, lr):
    return sgd(w, g, state, lr, nesterov=True)


def adam(w, g, state, lr, decay=DECAY, rule=torch.optim.Adam):
    """torch.optim.Adam and AdamW with their defaults."""
    if not state:
        state["w"] = torch.nn.Parameter(w.clone())
        state["inner"] = rule([state["w"]], lr=lr, weight_decay=decay)
    state["inner"].param_groups[0]["lr"] = lr
    state["w"].data.copy_(w)
    state["w"].grad = g.clone()
    state["inner"].step()
    return state["w"].detach().clone()


def adamw(w, g, state, lr):
    return adam(w, g, state, lr, rule=torch.optim.AdamW)


def spare_adam(w, g, state, lr):
    return adam(w, g, state, lr, 0.0 if spared(w) else DECAY)


def spare(w, g, state, lr):
    return sgd(w, g, state, lr, 0.0 if spared(w) else DECAY)


RULES = (sgd, nesterov, spare, adam, adamw, spare_adam, simclr, byol, larc, lightly, solo_learn)


def make(path, root):
    tensors = {}
    for rule in RULES:
        slots, states = weights(), {name: {} for name in SLOTS}
        for step, lr in enumerate(RATES):
            slots = {name: rule(w, gradient(name, step), states[name], lr) for name, w in slots.items()}
            flat = [slots[name].numpy().ravel() for name in SLOTS]
            tensors[f"{rule.__name__}|{step}"] = np.concatenate(flat)
    save(tensors, path)

#!/usr/bin/env python3
"""Repeats the first steps of a selfsup run in PyTorch and compares the two loss curves.

    selfsup train byol-cifar10-small --set train.dump_views=20 --set train.epochs=1 --out runs/parity
    pip install torch==2.9.1 torchvision==0.24.1 safetensors
    python benches/peers/parity.py runs/parity              # in f32; --double for f64

The run's folder holds the resolved recipe, the initial weights, the views of each dumped step and the losses. Networks and losses
come from scripts/goldens, which also makes selfsup's ten golden steps; optimiser and schedule follow the recipe. Two f32 runs drift
apart by rounding: a few percent of the loss within tens of steps, and two f32 runs of PyTorch do the same. The first step must
agree to rounding; after it, the shape of the curve must agree.
"""

import argparse
import copy
import json
import math
import sys
import tomllib
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
sys.dont_write_bytecode = True

from goldens import methods as peers  # noqa: E402
from goldens.heads import Mlp  # noqa: E402
from goldens.methods import Network  # noqa: E402
from goldens.selective import SelectiveBackbone  # noqa: E402
from goldens.backbones import Backbone  # noqa: E402


def backbone_of(network):
    ratio = network.get("sk_ratio", 0.0)
    if ratio > 0:
        if network["depth"] != 50:
            sys.exit("parity: selective kernels of depth 50 only")
        return SelectiveBackbone(network["width"], network["stem"], ratio), 32 * network["width"]
    backbone = Backbone(network["depth"], network["width"], network["stem"], network.get("norm_groups", 1))
    return backbone, network["width"] * (8 if network["depth"] < 50 else 32)


def bare(kind, online):
    """A method of scripts/goldens, without its constructor, around a network of the recipe's sizes."""
    method = kind.__new__(kind)
    torch.nn.Module.__init__(method)
    method.line, method.online = "parity", online
    return method


def refuse(settings, **published):
    """Exits if a setting differs from the only value that scripts/goldens has."""
    for name, value in published.items():
        if settings.get(name, value) != value:
            sys.exit(f"parity: method.{name} = {settings[name]} has no counterpart here")


def layers(*rows):
    return [tuple(row) for row in rows]


def simclr(recipe):
    m = recipe["method"]
    refuse(m, head_layers=2, normalise=True, loss="nt-xent")
    backbone, d = backbone_of(recipe["network"])
    head = layers((m["hidden"], False, "affine", True), (m["embedding"], False, "scale", False))
    method = bare(peers.SimClrV2, Network(backbone=backbone, head=Mlp(d, head)))
    method.temperature = m["temperature"]
    return method


def simclr_v2(recipe):
    m = recipe["method"]
    backbone, d = backbone_of(recipe["network"])
    middle = (m["hidden"], False, "affine", True)
    head = layers(middle, middle, (m["embedding"], False, "scale", False))
    memory = m.get("memory", 0) > 0
    method = bare(peers.SimClrV2Memory if memory else peers.SimClrV2, Network(backbone=backbone, head=Mlp(d, head)))
    method.temperature = m["temperature"]
    if memory:
        method.key, method.momentum, method.oldest = copy.deepcopy(method.online), m.get("momentum", 0.999), 0
        method.register_buffer("memory", torch.zeros(m["memory"], m["embedding"], dtype=torch.float64))
    return method


def moco(recipe):
    m = recipe["method"]
    refuse(m, dictionary="queue", shuffle=True)
    backbone, d = backbone_of(recipe["network"])
    head = layers((m["embedding"], True, None, False))
    if m["hidden"]:
        head.insert(0, (m["hidden"], True, None, True))
    method = bare(peers.MoCo, Network(backbone=backbone, head=Mlp(d, head)))
    method.temperature, method.symmetric, method.momentum = m["temperature"], m.get("symmetric", False), m["momentum"]
    method.key, method.oldest, method.keys = copy.deepcopy(method.online), 0, []
    method.register_buffer("queue", torch.zeros(m["queue"], m["embedding"], dtype=torch.float64))
    return method


def byol(recipe):
    m = recipe["method"]
    refuse(m, predictor=True, head_norm=True, constant_momentum=False)
    backbone, d = backbone_of(recipe["network"])
    head = layers((m["hidden"], True, "affine", True), (m["embedding"], False, None, False))
    network = Network(backbone=backbone, projector=Mlp(d, head), predictor=Mlp(m["embedding"], head))
    method = bare(peers.Byol, network)
    method.base, method.target = m["momentum"], copy.deepcopy(network)
    return method


def simsiam(recipe):
    m = recipe["method"]
    refuse(m, stop_gradient=True, predictor=True, target_every=0)
    backbone, d = backbone_of(recipe["network"])
    e = m["embedding"]
    projector = [(e, False, "affine", True)] * (m["projector_layers"] - 1) + [(e, False, "plain", False)]
    predictor = layers((m["hidden"], False, "affine", True), (e, True, None, False))
    method = bare(peers.SimSiam, Network(backbone=backbone, projector=Mlp(d, projector), predictor=Mlp(e, predictor)))
    method.fixed = ("predictor.",) if m.get("fix_predictor_lr", True) else ()
    return method


class SwavNetwork(peers.SwavNetwork):
    def __init__(self, **parts):
        Network.__init__(self, **parts)


class Swav(peers.Swav):
    """Of any number of crops."""

    def loss(self, views, step):
        if self.crops != 4:
            sys.exit("parity: SwAV of four crops only")
        return super().loss(views, step)


def swav(recipe):
    m = recipe["method"]
    refuse(m, sinkhorn_iterations=3, hard_codes=False)
    backbone, d = backbone_of(recipe["network"])
    head = layers((m["hidden"], True, "affine", True), (m["embedding"], True, None, False))
    prototypes = torch.nn.Linear(m["embedding"], m["prototypes"], bias=False)
    method = bare(Swav, SwavNetwork(backbone=backbone, head=Mlp(d, head), prototypes=prototypes))
    batch = recipe["train"]["batch"]
    rows = m.get("queue", 0) // batch * batch
    method.crops, method.epsilon, method.temperature = m["crops"], m["epsilon"], m["temperature"]
    method.freeze = m.get("freeze_steps", 0)
    method.start = m.get("queue_from", 0) * peers.PER_EPOCH if rows else math.inf
    method.register_buffer("queue", torch.zeros(2, max(rows, 1), m["embedding"], dtype=torch.float64))
    method.fresh, method.assignments = None, []
    return method


BUILDS = {"simclr": simclr, "simclr-v2": simclr_v2, "moco": moco, "byol": byol, "simsiam": simsiam, "swav": swav}


def load(module, tensors, prefix):
    own = module.state_dict()
    for name, value in own.items():
        if "num_batches" not in name:
            value.copy_(tensors[prefix + name])


def fill(method, tensors):
    load(method.online, tensors, "")
    for part in ("key", "target"):
        if hasattr(method, part):
            load(getattr(method, part), tensors, f"method.{part}.")
    for part in ("queue", "memory"):
        if f"method.{part}" in tensors:
            getattr(method, part).copy_(tensors[f"method.{part}"])


def rate(recipe, images, step):
    """src/optim/schedule.rs."""
    o, t = recipe["optim"], recipe["train"]
    batch, per_epoch = t["batch"], images // t["batch"]
    peak = o["lr"] * {"linear": batch / 256, "sqrt": math.sqrt(batch), "fixed": 1.0}[o["lr_rule"]]
    warmup, total = round(o["warmup_epochs"] * per_epoch), per_epoch * t["epochs"]
    if step < warmup:
        start = o.get("warmup_from")
        return peak, peak * step / warmup if start is None else start + (peak - start) * step / max(warmup - 1, 1)
    decay, end = o.get("decay", "cosine"), o.get("end_lr", 0.0)
    if isinstance(decay, dict):
        passed = sum(step // per_epoch >= epoch for epoch in decay["steps"]["epochs"])
        return peak, peak * decay["steps"]["factor"] ** passed
    if decay == "constant":
        return peak, peak
    at = max(step - step % per_epoch, warmup) if decay == "cosine-per-epoch" else step
    done = min((at - warmup) / max(total - warmup, 1), 1.0)
    return peak, end + (peak - end) * (1 + math.cos(math.pi * done)) / 2


def update(method, rule, momenta, step, peak, lr):
    (kind, s), = rule.items()
    with torch.no_grad():
        for name, w in method.online.named_parameters():
            if name.startswith(method.frozen(step)) or w.grad is None:
                continue
            own = peak if method.fixed and name.startswith(method.fixed) else lr
            spared = s["exclude"] == "bias-and-norm" and w.dim() == 1
            g, decay = w.grad, 0.0 if spared else s["weight_decay"]
            if kind == "lars" and not spared:
                wn, gn, dn = w.norm().item(), g.norm().item(), (g + decay * w).norm().item()
                if s["norm"] == "of-decayed":
                    ratio, known = (s["trust"] * wn / dn, True) if wn > 0 and dn > 0 else (1.0, False)
                elif wn > 0 and gn > 0:
                    ratio, known = s["trust"] * wn / (gn + decay * wn + 1e-8), True
                else:
                    ratio, known, decay = 1.0, False, 0.0
                g = (g + decay * w) * (min(ratio / own, 1.0) if s["clip"] and known else ratio)
            else:
                g = g + decay * w
            inside = kind == "lars" and s["lr_in_momentum"]
            v = momenta[name] = s["momentum"] * momenta.get(name, 0.0) + (own * g if inside else g)
            if inside:
                w -= v
            else:
                w -= own * (g + s["momentum"] * v if s.get("nesterov") else v)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder")
    parser.add_argument("--double", action="store_true", help="compute in f64")
    arguments = parser.parse_args()
    run, dtype = arguments.run, torch.float64 if arguments.double else torch.float32

    recipe = tomllib.loads((run / "recipe.toml").read_text())
    name, batch = recipe["method"]["name"], recipe["train"]["batch"]
    if name not in BUILDS:
        sys.exit(f"parity: {name} has no counterpart here; methods with one: {', '.join(BUILDS)}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {r["step"]: r for r in records if "epoch" not in r}
    per_epoch = next((r["step"] // r["epoch"] for r in records if "epoch" in r), None)
    if per_epoch is None:
        sys.exit("parity: the run finished no epoch, so the steps per epoch are unknown")
    total = per_epoch * recipe["train"]["epochs"]
    peers.BATCH, peers.SEED, peers.STEPS, peers.PER_EPOCH = batch, recipe["seed"], total, per_epoch

    method = BUILDS[name](recipe)
    fill(method, load_file(run / "parity/step-00000000.safetensors"))
    method.to(dtype).train()
    momenta, worst = {}, 0.0
    print(f"{'step':>6} {'selfsup':>12} {'PyTorch':>12} {'difference':>11}")
    for file in sorted((run / "parity").glob("views-*.safetensors")):
        step = int(file.stem.split("-")[1])
        tensors = load_file(file)
        views = [tensors[f"crops.{i}"].to(dtype) for i in range(len(tensors) - 1)]
        method.before(step)
        method.online.zero_grad()
        loss = method.loss(views, step)
        loss.backward()
        peak, lr = rate(recipe, per_epoch * batch, step)
        update(method, recipe["optim"]["rule"], momenta, step, peak, lr)
        method.after(step)
        own = steps[step + 1]["loss"]
        difference = loss.item() / own - 1
        worst = max(worst, abs(difference))
        print(f"{step:6} {own:12.6f} {loss.item():12.6f} {difference:11.2e}")
    print(f"largest difference: {worst:.2e}")


if __name__ == "__main__":
    main()

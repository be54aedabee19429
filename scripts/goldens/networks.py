"""The rows of tests/suite/networks.txt: features, gradients, running statistics, features in evaluation."""

import math

import torch

from . import seeded
from .record import record, save, table
from .trunk import Trunk, fill, outside, slots


def run(line, dtype):
    words = dict(word.split("=", 1) for word in line.split(" ")[1:])
    depth, width, groups, n, h, w = (int(words[key]) for key in ("depth", "width", "groups", "n", "h", "w"))
    trunk = Trunk(depth, width, words["stem"], groups)
    fill(trunk, line)
    trunk = trunk.to(dtype)
    numbers = lambda what, *shape: torch.from_numpy(  # noqa: E731
        seeded.unit(seeded.seed(f"{line}|{what}"), math.prod(shape)).reshape(shape)
    ).to(dtype)
    images = numbers("images", n, h, w, 3)
    y = trunk(images)
    (y * numbers("w", *y.shape)).sum().backward()
    parameters = dict(trunk.named_parameters())
    result = {
        "features": y,
        "gradients": {name: outside(p.grad) for name, p in parameters.items()},
        "statistics": {name: outside(s) for name, s in slots(trunk).items() if name not in parameters},
    }
    with torch.no_grad():
        result["evaluation"] = trunk.eval()(images)
    return result


def make(path, root):
    tensors = {}
    for line in (root / "tests/suite/networks.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            truth, own = run(line, torch.float64), run(line, torch.float32)
            for part in truth:
                keep = table if isinstance(truth[part], dict) else record
                tensors[f"{line}|{part}"] = keep(truth[part], own[part])
    save(tensors, path)

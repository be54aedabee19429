"""The rows of tests/suite/networks.txt: features, gradients, running statistics, features in evaluation."""

import math

import torch

from . import seeded
from .record import record, save, table
from .trunk import MARGIN, Trunk, fill, margin, outside, slots


class Network:
    """A row."""

    def __init__(self, line, dtype=torch.float64):
        self.line, self.dtype = line, dtype
        words = dict(word.split("=", 1) for word in line.split(" ")[1:])
        depth, width, groups, n, h, w = (int(words[key]) for key in ("depth", "width", "groups", "n", "h", "w"))
        self.trunk = Trunk(depth, width, words["stem"], groups)
        fill(self.trunk, line)
        self.trunk.to(dtype)
        self.images = self.numbers("images", n, h, w, 3)

    def numbers(self, what, *shape):
        values = seeded.unit(seeded.seed(f"{self.line}|{what}"), math.prod(shape))
        return torch.from_numpy(values.reshape(shape)).to(self.dtype)

    def train(self, images):
        """Features, and the gradient of every parameter."""
        self.trunk.zero_grad()
        y = self.trunk(images)
        (y * self.numbers("w", *y.shape)).sum().backward()
        return y, {name: outside(p.grad) for name, p in self.trunk.named_parameters()}

    def run(self):
        features, gradients = self.train(self.images)
        result = {"features": features, "gradients": gradients}
        result["statistics"] = {k: outside(s) for k, s in slots(self.trunk).items() if k not in gradients}
        with torch.no_grad():
            result["evaluation"] = self.trunk.eval()(self.images)
        return result


def steady(line):
    network = Network(line)
    return margin(network.trunk, network.images) > 5 * MARGIN  # few rows and many layers add to the error


def make(path, root):
    tensors = {}
    for line in (root / "tests/suite/networks.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            assert steady(line), f"{line}: lies on a kink; take another draw"
            truth, own = Network(line).run(), Network(line, torch.float32).run()
            for part in truth:
                keep = table if isinstance(truth[part], dict) else record
                tensors[f"{line}|{part}"] = keep(truth[part], own[part])
    save(tensors, path)

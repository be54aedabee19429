"""The rows of tests/suite/networks.txt: features, gradients, running statistics, features in evaluation."""

import math

import numpy as np
import torch

from . import seeded
from .record import record, save, table
from .selective import SelectiveBackbone
from .backbones import Backbone, fill, kinked, outside, slots


class Network:
    """A row of networks.txt."""

    def __init__(self, line, dtype=torch.float64):
        self.line, self.dtype = line, dtype
        words = dict(word.split("=", 1) for word in line.split(" ")[1:])
        depth, width, groups, n, h, w = (int(words[key]) for key in ("depth", "width", "groups", "n", "h", "w"))
        if "sk" in words:
            self.backbone = SelectiveBackbone(width, words["stem"], float(words["sk"]))
        else:
            self.backbone = Backbone(depth, width, words["stem"], groups)
        fill(self.backbone, line)
        self.backbone.to(dtype)
        self.size = (n, h, w, 3)

    def numbers(self, what, *shape):
        values = seeded.unit(seeded.seed(f"{self.line}|{what}"), math.prod(shape))
        return torch.from_numpy(values.reshape(shape)).to(self.dtype)

    def train(self, images):
        """Features, and the gradient of every parameter."""
        self.backbone.zero_grad()
        y = self.backbone(images)
        (y * self.numbers("w", *y.shape)).sum().backward()
        return y, {name: outside(p.grad) for name, p in self.backbone.named_parameters()}

    def images(self, draw):
        return self.numbers(f"images {draw}", *self.size)

    def run(self, draw):
        images = self.images(draw)
        features, gradients = self.train(images)
        result = {"features": features, "gradients": gradients}
        result["statistics"] = {k: outside(s) for k, s in slots(self.backbone).items() if k not in gradients}
        with torch.no_grad():
            result["evaluation"] = self.backbone.eval()(images)
        return result


def make(path, root):
    tensors = {}
    for line in (root / "tests/suite/networks.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            network = Network(line)
            free = lambda d: "kinked=1" in line or not kinked(network.backbone, network.images(d))  # noqa: E731
            draw = next(d for d in range(1000) if free(d))
            tensors[f"{line}|draw"] = np.array([draw])
            truth, own = network.run(draw), Network(line, torch.float32).run(draw)
            for part in truth:
                keep = table if isinstance(truth[part], dict) else record
                tensors[f"{line}|{part}"] = keep(truth[part], own[part])
    save(tensors, path)

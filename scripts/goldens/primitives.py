"""The rows of tests/suite/cases.txt in PyTorch. What each word means stands in tests/suite/cases.rs as well."""

import math

import torch
import torch.nn.functional as F

from . import seeded
from .record import record, save


class Row:
    """A row: a primitive and its settings; collects the differentiated inputs."""

    def __init__(self, line):
        self.line = " ".join(line.split())
        self.primitive, *words = self.line.split(" ")
        self.words = dict(word.split("=", 1) for word in words)
        self.inputs = {}

    def sizes(self, *keys):
        return [int(self.words[key]) for key in keys]

    def input(self, name, shape, values=seeded.unit):
        count = math.prod(shape)
        self.inputs[name] = torch.from_numpy(values(self.seed(name), count).reshape(shape))

    def seed(self, name):
        return seeded.seed(f"{self.line}|{name}")


def nchw(x):
    return x.permute(0, 3, 1, 2)


def nhwc(x):
    return x.permute(0, 2, 3, 1)


def conv2d(row):
    n, h, w, c, k, r, s, stride, pad = row.sizes("n", "h", "w", "c", "k", "r", "s", "stride", "pad")
    row.input("x", (n, h, w, c))
    row.input("w", (k, r, s, c))
    return lambda x, w: nhwc(F.conv2d(nchw(x), nchw(w), stride=stride, padding=pad))


def linear(row):
    n, d, k = row.sizes("n", "d", "k")
    row.input("x", (n, d))
    row.input("w", (k, d))
    if row.words["bias"] == "1":
        row.input("b", (k,))
    return lambda x, w, b=None: F.linear(x, w, b)


def batch_norm(row):
    rows, c, groups = row.sizes("rows", "c", "groups")
    parts = row.words.get("with", "").split("+")
    row.input("x", (rows, c), seeded.around(float(row.words.get("offset", 0)), 1.0))
    if "gain" in parts:
        row.input("gain", (c,), seeded.around(1.0, 0.5))
    if "shift" in parts:
        row.input("shift", (c,))
    if "residual" in parts:
        row.input("residual", (rows, c))

    def build(x, gain=None, shift=None, residual=None):
        runs = [F.batch_norm(run, None, None, gain, shift, training=True) for run in x.chunk(groups)]
        y = torch.cat(runs)
        y = y if residual is None else y + residual
        return y.relu() if "relu" in parts else y

    return build


def relu(row):
    row.input("x", row.sizes("n", "c"), seeded.off_zero)
    return lambda x: x.relu()


def add(row):
    row.input("a", row.sizes("n", "c"))
    row.input("b", row.sizes("n", "c"))
    return lambda a, b: a + b


def scale(row):
    row.input("x", row.sizes("n", "c"))
    factor = float(row.words["factor"])
    return lambda x: factor * x


def mean(row):
    for name in "abcde"[: int(row.words["terms"])]:
        row.input(name, ())
    return lambda **terms: torch.stack(list(terms.values())).mean()


def max_pool(row):
    size, stride, pad = row.sizes("size", "stride", "pad")
    values = seeded.tied if row.words.get("values") == "tied" else seeded.distinct
    row.input("x", row.sizes("n", "h", "w", "c"), values)
    # Contiguous first: PyTorch breaks ties in the order of memory.
    return lambda x: nhwc(F.max_pool2d(nchw(x).contiguous(), size, stride, pad))


def mean_pool(row):
    row.input("x", row.sizes("n", "h", "w", "c"))
    return lambda x: F.adaptive_avg_pool2d(nchw(x), 1).flatten(1)


def l2_normalize(row):
    row.input("x", row.sizes("n", "d"), seeded.around(0.0, float(row.words["scale"])))
    return lambda x: F.normalize(x, dim=1)


def nt_xent(row):
    rows, d = row.sizes("rows", "d")
    temperature = float(row.words["t"])
    row.input("z", (rows, d), seeded.unit_rows(rows, d))

    def build(z):
        logits = z @ z.T / temperature
        logits = logits.masked_fill(torch.eye(rows, dtype=torch.bool), float("-inf"))
        positive = (torch.arange(rows) + rows // 2) % rows
        return F.cross_entropy(logits, positive)

    return build


def cross_entropy(row):
    n, k = row.sizes("n", "k")
    labels = torch.from_numpy(seeded.indices(row.seed("labels"), n, k))
    row.input("x", (n, k), seeded.around(0.0, float(row.words["spread"])))
    return lambda x: F.cross_entropy(x, labels)


ALL = (conv2d, linear, batch_norm, relu, add, scale, mean, max_pool, mean_pool, l2_normalize, nt_xent, cross_entropy)
PRIMITIVES = {build.__name__: build for build in ALL}


def run(row, build, dtype):
    """Output, and the gradients of its dot product with seeded numbers."""
    inputs = {name: x.to(dtype, copy=True).requires_grad_() for name, x in row.inputs.items()}
    y = build(**inputs)
    w = torch.from_numpy(seeded.unit(row.seed("w"), y.numel()).reshape(y.shape)).to(dtype)
    (y * w).sum().backward()
    return {"y": y, **{f"d{name}": x.grad for name, x in inputs.items()}}


def make(path, root):
    tensors = {}
    for line in (root / "tests/suite/cases.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            row = Row(line)
            build = PRIMITIVES[row.primitive](row)
            truth, own = run(row, build, torch.float64), run(row, build, torch.float32)
            for part in truth:
                tensors[f"{row.line}|{part}"] = record(truth[part], own[part])
    save(tensors, path)

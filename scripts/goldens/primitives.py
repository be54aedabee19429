"""The rows of src/check/cases.txt in PyTorch; src/check/cases.rs is the other half."""

import math

import numpy as np
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

    def shape(self):
        return [int(size) for size in self.words["shape"].split("x")]

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


def mul(row):
    row.input("a", row.sizes("n", "c"))
    row.input("b", row.sizes("n", "c"))
    return lambda a, b: a * b


def square(row):
    row.input("x", row.sizes("n", "c"))
    return lambda x: x.square()


def sum(row):
    (axis,) = row.sizes("axis")
    row.input("x", row.shape())
    return lambda x: x.sum(axis)


def mean(row):
    (axis,) = row.sizes("axis")
    row.input("x", row.shape())
    return lambda x: x.mean(axis)


def transpose(row):
    row.input("x", row.sizes("n", "d"))
    return lambda x: x.T


def mean_of(row):
    for name in "abcde"[: int(row.words["terms"])]:
        row.input(name, ())
    return lambda **terms: torch.stack(list(terms.values())).mean()


def max_pool(row):
    size, stride, pad = row.sizes("size", "stride", "pad")
    values = seeded.tied if row.words.get("values") == "tied" else seeded.distinct
    row.input("x", row.sizes("n", "h", "w", "c"), values)
    # Contiguous first: PyTorch breaks ties in the order of memory.
    after = int(row.words.get("after", pad))
    sides = (pad, after, pad, after)
    return lambda x: nhwc(F.max_pool2d(F.pad(nchw(x).contiguous(), sides, value=-math.inf), size, stride))


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


def pair_loss(row):
    rows, d = row.sizes("rows", "d")
    t, margin = float(row.words["t"]), float(row.words.get("m", 0))
    row.input("z", (rows, d))

    def build(z):
        s = z @ z.T
        own, other = torch.arange(rows), (torch.arange(rows) + rows // 2) % rows
        apart = torch.ones(rows, rows, dtype=torch.bool)
        apart[own, own] = apart[own, other] = False
        positive = s[own, other][:, None]
        if row.words["loss"] == "xent":
            return F.cross_entropy((s / t).masked_fill(torch.eye(rows, dtype=torch.bool), float("-inf")), other)
        if row.words["loss"] == "logistic":
            near, far = F.softplus(-positive / t), F.softplus(s / t)
        else:
            near, far = torch.zeros_like(positive), (s - positive + margin).relu()
        if row.words["hard"] == "1":
            farther = apart & (s < positive)
            nearest = s.masked_fill(~farther, float("-inf")).argmax(1)
            kept = farther[own, nearest]
            return (near[:, 0] + far[own, nearest] * kept).mean()
        return (near[:, 0] + (far * apart).sum(1) / (rows - 2)).mean()

    return build


def cross_entropy(row):
    n, k = row.sizes("n", "k")
    labels = torch.from_numpy(seeded.indices(row.seed("labels"), n, k))
    row.input("x", (n, k), seeded.around(0.0, float(row.words["spread"])))
    return lambda x: F.cross_entropy(x, labels)


def neg_cosine(row):
    for name in "pz":
        row.input(name, row.sizes("n", "d"), seeded.around(0.0, float(row.words["scale"])))
    return lambda p, z: -(F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(1).mean()


def info_nce(row):
    n, m, d = row.sizes("n", "m", "d")
    row.input("q", (n, d), seeded.unit_rows(n, d))
    row.input("k", (n, d), seeded.unit_rows(n, d))
    queue = torch.from_numpy(seeded.unit_rows(m, d)(row.seed("queue"), m * d).reshape(m, d))
    left_out = torch.zeros(n, m, dtype=torch.bool)
    start, end = (int(word) for word in row.words.get("own", "0..0").split(".."))
    for j in range(start, end):
        left_out[(j - start) % n, j] = True

    def build(q, k):
        negatives = (q @ queue.to(q.dtype).T).masked_fill(left_out, float("-inf"))
        logits = torch.cat([(q * k).sum(1, keepdim=True), negatives], 1) / float(row.words["t"])
        return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long))

    return build


def soft_cross_entropy(row):
    n, k = row.sizes("n", "k")
    q = seeded.around(0.5, 0.5)(row.seed("targets"), n * k).reshape(n, k)
    if row.words["targets"] == "normal":
        q = seeded.rounded(q / np.cumsum(q, axis=1)[:, -1:])
    if row.words["targets"] == "hot":
        q = np.eye(k)[np.arange(n) % k]
    q = torch.from_numpy(q)
    row.input("x", (n, k), seeded.around(0.0, float(row.words["spread"])))
    return lambda x: -(q.to(x.dtype) * F.log_softmax(x / float(row.words["t"]), 1)).sum(1).mean()


def distillation(row):
    n, k = row.sizes("n", "k")
    t, values = float(row.words["t"]), seeded.around(0.0, float(row.words["spread"]))
    teacher = torch.from_numpy(values(row.seed("teacher"), n * k).reshape(n, k))
    row.input("x", (n, k), values)
    return lambda x: t * t * F.cross_entropy(x / t, F.softmax(teacher.to(x.dtype) / t, 1))


def stream_mean(row):
    n, h, w, c = row.sizes("n", "h", "w", "c")
    row.input("x", (n, h, w, 2 * c))
    return lambda x: torch.stack(x.chunk(2, -1)).sum(0).mean((1, 2))


def stream_select(row):
    n, h, w, c = row.sizes("n", "h", "w", "c")
    row.input("x", (n, h, w, 2 * c))
    row.input("logits", (n, 2 * c))

    def build(x, logits):
        weights = torch.stack(logits.chunk(2, -1)).softmax(0)[:, :, None, None]
        return (torch.stack(x.chunk(2, -1)) * weights).sum(0)

    return build


def avg_pool(row):
    size, stride = row.sizes("size", "stride")
    row.input("x", row.sizes("n", "h", "w", "c"))

    def build(x):
        pad = [0, size - 1, 0, size - 1]
        pooled = F.avg_pool2d(F.pad(nchw(x), pad), size, stride)
        if stride == 1:  # TensorFlow's SAME does not count what it pads
            pooled = pooled / F.avg_pool2d(F.pad(torch.ones_like(nchw(x)), pad), size, stride)
        h, w = (-(-side // stride) for side in x.shape[1:3])
        return nhwc(pooled[:, :, :h, :w])

    return build


def gather_rows(row):
    n, m, d = row.sizes("n", "m", "d")
    row.input("x", (m, d))
    return lambda x: x[torch.from_numpy(seeded.indices(row.seed("index"), n, m))]


def slice_rows(row):
    start, count = row.sizes("from", "count")
    row.input("x", row.sizes("n", "d"))
    return lambda x: x[start : start + count]


def concat_rows(row):
    a, b, d = row.sizes("a", "b", "d")
    row.input("a", (a, d))
    row.input("b", (b, d))
    return lambda a, b: torch.cat([a, b])


ALL = (conv2d, linear, batch_norm, relu, add, scale, mean_of, max_pool, mean_pool, l2_normalize, nt_xent, cross_entropy)
ALL += (mul, square, sum, mean, transpose)
ALL += (pair_loss,)
ALL += (neg_cosine, info_nce, soft_cross_entropy, distillation, stream_mean, stream_select, avg_pool)
ALL += (gather_rows, slice_rows, concat_rows)
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
    for line in (root / "src/check/cases.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            row = Row(line)
            build = PRIMITIVES[row.primitive](row)
            truth, own = run(row, build, torch.float64), run(row, build, torch.float32)
            for part in truth:
                tensors[f"{row.line}|{part}"] = record(truth[part], own[part])
    save(tensors, path)

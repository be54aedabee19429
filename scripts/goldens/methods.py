"""Ten steps of each method on a tiny ResNet, after its reference code; tests/suite/methods.rs has the settings too.

A method is a module: `online` is trained, other modules and buffers are its own. `loss(views, step)` changes nothing that a
second call would see but running statistics; `after(step)` moves what follows the weights.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import optimizers, seeded
from .heads import Mlp
from .philox import permutation
from .record import record, save, table
from .selective import SelectiveBackbone
from .backbones import Backbone, fill, kinked, outside, slots

BATCH, STEPS, PER_EPOCH, SEED, EMBEDDING = 8, 10, 4, 7, 16
FEATURES = 32
KEPT = (0, STEPS - 1)  # the steps whose state is stored


class Network(nn.Module):
    """Parts by name, one after another."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.order = list(parts)
        self.double()

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def small(groups=1, width=4):
    return Backbone(18, width, "small", groups)


def simclr_head(inputs, hidden, keep=3):
    layers = [(hidden, False, "affine", True), (hidden, False, "affine", True), (EMBEDDING, False, "scale", False)]
    return Mlp(inputs, layers[:keep])


def unit_rows(line, what, rows):
    values = seeded.unit_rows(rows, EMBEDDING)(seeded.seed(f"{line}|{what}"), rows * EMBEDDING)
    return torch.from_numpy(values.reshape(rows, EMBEDDING))


def ema(target, online, momentum):
    """Parameters only."""
    for t, o in zip(target.parameters(), online.parameters()):
        t.data = t.data * momentum + o.data * (1.0 - momentum)


class Method(nn.Module):
    sizes = (2, 8)  # views and side of each resolution
    fixed, spared = (), ()
    kinked = False  # whether ReLU inputs may lie near zero: such a run is compared in f64 only

    def __init__(self, line, network):
        super().__init__()
        self.line, self.online = line, network
        fill(self.online, line)

    def passes(self, module, views):
        """All forward passes of the online network, to find kinks."""
        for view in views[0].chunk(2):
            module(view)

    def before(self, step):
        pass

    def after(self, step):
        pass

    def frozen(self, step):
        return ()

    def state(self):
        return {}


class MoCo(Method):
    """moco/builder.py, with the notebook's groups and symmetric loss."""

    def __init__(self, line, temperature, symmetric, layers, momentum=0.9, queue=32):
        super().__init__(line, Network(backbone=small(groups=2), head=Mlp(FEATURES, layers)))
        self.temperature, self.symmetric, self.momentum = temperature, symmetric, momentum
        self.sizes = (2, 16)  # the last stage has 16 rows in a group: at 4, rounding grows too fast
        self.key, self.oldest, self.keys = copy.deepcopy(self.online), 0, []
        self.register_buffer("queue", unit_rows(line, "queue", queue))

    def before(self, step):
        ema(self.key, self.online, self.momentum)

    def half(self, x_q, x_k, step, half):
        q = F.normalize(self.online(x_q), dim=1)
        with torch.no_grad():
            order = torch.from_numpy(permutation(BATCH, SEED, step, half))
            k = F.normalize(self.key(x_k[order]), dim=1)[torch.argsort(order)]
        self.keys.append(k)
        positive = (q * k).sum(1, keepdim=True)
        logits = torch.cat([positive, q @ self.queue.T], 1) / self.temperature
        return F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))

    def loss(self, views, step):
        self.keys = []
        x1, x2 = views[0].chunk(2)
        loss = self.half(x1, x2, step, 0)
        return loss + self.half(x2, x1, step, 1) if self.symmetric else loss

    def after(self, step):
        for k in self.keys:
            self.queue[self.oldest : self.oldest + BATCH] = k
            self.oldest = (self.oldest + BATCH) % len(self.queue)

    def state(self):
        return {"key": self.key, "queue": self.queue}


class SimClrV2(Method):
    """model.py with three layers; objective.py."""

    def __init__(self, line, backbone, features, temperature, sizes=(2, 8)):
        super().__init__(line, Network(backbone=backbone, head=simclr_head(features, 32)))
        self.temperature, self.sizes = temperature, sizes
        self.kinked = isinstance(backbone, SelectiveBackbone)  # with fifty layers, some ReLU input always lies near zero

    def passes(self, module, views):
        module(views[0])

    def loss(self, views, step):
        z1, z2 = F.normalize(self.online(views[0]), dim=1).chunk(2)
        labels, masks = torch.arange(BATCH), torch.eye(BATCH, dtype=z1.dtype) * 1e9

        def one(a, b):
            logits = torch.cat([a @ b.T, a @ a.T - masks], 1) / self.temperature
            return F.cross_entropy(logits, labels)

        return one(z1, z2) + one(z2, z1)


class SimClrV2Memory(SimClrV2):
    """Keys of the current and of past batches from a momentum encoder (google-research/simclr#54)."""

    def __init__(self, line, memory=64, momentum=0.9):
        super().__init__(line, small(), FEATURES, 0.1)
        self.key, self.momentum, self.oldest = copy.deepcopy(self.online), momentum, 0
        self.register_buffer("memory", unit_rows(line, "queue", memory))

    def before(self, step):
        ema(self.key, self.online, self.momentum)

    def loss(self, views, step):
        z1, z2 = F.normalize(self.online(views[0]), dim=1).chunk(2)
        with torch.no_grad():
            keys = F.normalize(self.key(views[0]), dim=1)
        self.memory[self.oldest : self.oldest + 2 * BATCH] = keys
        k1, k2 = keys.chunk(2)
        left_out = torch.zeros(BATCH, len(self.memory), dtype=torch.bool)
        for i in range(BATCH):
            left_out[i, [self.oldest + i, self.oldest + BATCH + i]] = True

        def one(z, k):
            negatives = (z @ self.memory.T).masked_fill(left_out, float("-inf"))
            logits = torch.cat([(z * k).sum(1, keepdim=True), negatives], 1) / self.temperature
            return F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))

        return one(z1, k2) + one(z2, k1)

    def after(self, step):
        self.oldest = (self.oldest + 2 * BATCH) % len(self.memory)

    def state(self):
        return {"key": self.key, "memory": self.memory}


class Byol(Method):
    """byol_experiment.py: `loss_fn` and `_update_fn`."""

    def __init__(self, line, base=0.9):
        head = [(32, True, "affine", True), (EMBEDDING, False, None, False)]
        network = Network(backbone=small(), projector=Mlp(FEATURES, head), predictor=Mlp(EMBEDDING, head))
        super().__init__(line, network)
        self.base, self.target = base, copy.deepcopy(network)
        fill(self.target, f"{line}|target")

    def project(self, network, x):
        return network.projector(network.backbone(x))

    def loss(self, views, step):
        x1, x2 = views[0].chunk(2)
        z1, z2 = self.project(self.online, x1), self.project(self.online, x2)
        p1, p2 = self.online.predictor(z1), self.online.predictor(z2)
        with torch.no_grad():
            t1, t2 = self.project(self.target, x1), self.project(self.target, x2)

        def regression(p, t):
            return (F.normalize(p, dim=1) - F.normalize(t, dim=1)).square().sum(1)

        return (regression(p1, t2) + regression(p2, t1)).mean()

    def after(self, step):
        tau = 1.0 - (1.0 - self.base) * (math.cos(math.pi * step / STEPS) + 1.0) / 2.0
        ema(self.target, self.online, tau)

    def state(self):
        return {"target": self.target}


class SimSiam(Method):
    """simsiam/builder.py and main_simsiam.py, `--fix-pred-lr`."""

    fixed, sizes = ("predictor.",), (2, 16)

    def __init__(self, line):
        layers = [(24, False, "affine", True)] * 2 + [(24, False, "plain", False)]
        predictor = Mlp(24, [(16, False, "affine", True), (24, True, None, False)])
        super().__init__(line, Network(backbone=small(width=8), projector=Mlp(64, layers), predictor=predictor))

    def loss(self, views, step):
        n = self.online
        z1, z2 = (n.projector(n.backbone(x)) for x in views[0].chunk(2))
        p1, p2 = n.predictor(z1), n.predictor(z2)
        cosine = nn.CosineSimilarity(dim=1, eps=1e-12)
        return -(cosine(p1, z2.detach()).mean() + cosine(p2, z1.detach()).mean()) * 0.5


class SwavNetwork(Network):
    def __init__(self, prototypes):
        super().__init__(
            backbone=small(),
            head=Mlp(FEATURES, [(32, True, "affine", True), (EMBEDDING, True, None, False)]),
            prototypes=nn.Linear(EMBEDDING, prototypes, bias=False),
        )

    def forward(self, views):
        """src/resnet50.py: a pass for each resolution, one head call."""
        z = F.normalize(self.head(torch.cat([self.backbone(x) for x in views])), dim=1)
        return z, self.prototypes(z)


class Swav(Method):
    """main_swav.py: `train` and `distributed_sinkhorn`."""

    sizes = (2, 8), (2, 4)
    epsilon, temperature, freeze, start = 0.05, 0.1, 3, PER_EPOCH

    def __init__(self, line, prototypes=12, queue=16):
        super().__init__(line, SwavNetwork(prototypes))
        self.register_buffer("queue", torch.zeros(2, queue, EMBEDDING, dtype=torch.float64))
        self.fresh, self.assignments = None, []

    def passes(self, module, views):
        module(views)

    def before(self, step):
        w = self.online.prototypes.weight.data
        w.copy_(F.normalize(w, dim=1, p=2))

    def frozen(self, step):
        return ("prototypes.",) if step < self.freeze else ()

    def sinkhorn(self, scores):
        q = torch.exp(scores / self.epsilon).T
        k, b = q.shape
        q = q / q.sum()
        for _ in range(3):
            q = q / q.sum(1, keepdim=True) / k
            q = q / q.sum(0, keepdim=True) / b
        return (q * b).T

    def loss(self, views, step):
        z, scores = self.online(views)
        self.fresh, self.assignments, total = z.detach(), [], 0.0
        for i in range(2):
            with torch.no_grad():
                all_scores = scores[BATCH * i : BATCH * (i + 1)].detach()
                if step >= self.start and not torch.all(self.queue[i, -1] == 0):
                    all_scores = torch.cat([self.queue[i] @ self.online.prototypes.weight.T, all_scores])
                q = self.sinkhorn(all_scores)[-BATCH:]
            self.assignments.append(q)
            part = 0.0
            for v in (v for v in range(4) if v != i):
                x = scores[BATCH * v : BATCH * (v + 1)] / self.temperature
                part = part - (q * F.log_softmax(x, dim=1)).sum(1).mean()
            total = total + part / 3
        return total / 2

    def after(self, step):
        if step >= self.start:
            for i in range(2):
                self.queue[i, BATCH:] = self.queue[i, :-BATCH].clone()
                self.queue[i, :BATCH] = self.fresh[BATCH * i : BATCH * (i + 1)]

    def state(self):
        parts = {f"queue.{i}": self.queue[i] for i in range(2)}
        return parts | {f"assignments.{i}": q for i, q in enumerate(self.assignments)}


def classifier(keep, hidden=32, classes=5):
    d = hidden if keep else FEATURES
    return Network(backbone=small(), head=simclr_head(FEATURES, hidden, keep), fc=nn.Linear(d, classes))


class Supervised(Method):
    sizes = (1, 8)

    def __init__(self, line, smoothing=0.0, keep=0):
        super().__init__(line, classifier(keep))
        self.smoothing, self.spared = smoothing, ("fc.",) if keep else ()

    def passes(self, module, views):
        module(views[0])

    def loss(self, views, step):
        labels = torch.from_numpy(seeded.indices(seeded.seed(f"{self.line}|labels {step}"), BATCH, 5))
        return F.cross_entropy(self.online(views[0]), labels, label_smoothing=self.smoothing)


class Distill(Supervised):
    """colabs/distillation_self_training.ipynb."""

    def __init__(self, line, temperature=2.0):
        super().__init__(line)
        self.temperature, self.teacher = temperature, classifier(1)
        fill(self.teacher, f"{line}|teacher")

    def loss(self, views, step):
        with torch.no_grad():
            teacher = self.teacher.eval()(views[0])
        t = self.temperature
        student = self.online(views[0]) / t
        return -(F.softmax(teacher / t, 1) * F.log_softmax(student, 1)).sum(1).mean() * t * t


# Name: method, rule of optimizers.py, peak of the cosine.
LINEAR = [(EMBEDDING, True, None, False)]
TWO = [(32, True, None, True), (EMBEDDING, True, None, False)]
RUNS = {
    "moco v1": (lambda line: MoCo(line, 0.07, False, LINEAR), optimizers.sgd, 0.005),
    "moco v2": (lambda line: MoCo(line, 0.2, True, TWO), optimizers.sgd, 0.005),
    "simclr v2": (
        lambda line: SimClrV2(line, SelectiveBackbone(4, "small", 0.0625), 128, 0.5, (2, 16)),
        optimizers.simclr,
        1e-6,  # fifty layers: at larger rates rounding grows too fast
    ),
    "simclr v2 memory": (SimClrV2Memory, optimizers.simclr, 0.3),
    "byol": (Byol, optimizers.byol, 0.3),
    "simsiam": (SimSiam, optimizers.sgd, 0.01),
    "swav": (Swav, optimizers.larc, 0.1),
    "supervised": (lambda line: Supervised(line, smoothing=0.1), optimizers.nesterov, 0.05),
    "fine-tuning": (lambda line: Supervised(line, keep=1), optimizers.simclr, 0.3),
    "distillation": (Distill, optimizers.simclr, 0.3),
}


def views_of(method, step, draw):
    sizes = method.sizes if isinstance(method.sizes[0], tuple) else (method.sizes,)
    found = []
    for i, (count, side) in enumerate(sizes):
        shape = (count * BATCH, side, side, 3)
        values = seeded.unit(seeded.seed(f"{method.line}|images {step}.{i}|draw {draw}"), math.prod(shape))
        found.append(torch.from_numpy(values.reshape(shape)))
    return found


class Passes(nn.Module):
    """Only the online network's passes, with the hooks of `kinked`."""

    def __init__(self, method):
        super().__init__()
        self.module, self.passes = method.online, method.passes

    def forward(self, views):
        self.passes(self.module, views)


def gradients(method, views, step):
    method.online.zero_grad()
    loss = method.loss(views, step)
    loss.backward()
    return loss, {name: outside(w.grad) for name, w in method.online.named_parameters()}


def spared_rule(w, g, state, lr):
    state["v"] = optimizers.MOMENTUM * state.get("v", 0.0) + lr * g
    return w - state["v"]


def update(method, rule, states, step, peak):
    lr = peak * (1 + math.cos(math.pi * step / STEPS)) / 2
    for name, w in method.online.named_parameters():
        if name.startswith(method.frozen(step)):
            continue
        one = spared_rule if method.spared and name.startswith(method.spared) else rule
        rate = peak if method.fixed and name.startswith(method.fixed) else lr
        w.data = one(w.data, w.grad, states.setdefault(name, {}), rate)


def run(name):
    build, rule, peak = RUNS[name]
    method, states, chosen, tensors = build(name), {}, [], {}
    for step in range(STEPS):
        method.before(step)
        free = lambda d: method.kinked or not kinked(Passes(method), views_of(method, step, d))  # noqa: E731
        draw = next(d for d in range(1000) if free(d))
        chosen.append(draw)
        views = views_of(method, step, draw)
        own_loss, own = gradients(copy.deepcopy(method).float(), [x.float() for x in views], step)
        loss, truth = gradients(method, views, step)
        tensors[f"{name}|{step}|loss"] = record(loss, own_loss)
        tensors[f"{name}|{step}|gradients"] = table(truth, own)
        for part, value in method.state().items():
            if part.startswith("assignments"):
                tensors[f"{name}|{step}|{part}"] = record(value)
        update(method, rule, states, step, peak)
        method.after(step)
        if step in KEPT:
            tensors[f"{name}|{step}|slots"] = table({k: outside(v) for k, v in slots(method.online).items()})
            for part, value in method.state().items():
                if isinstance(value, nn.Module):
                    value = {k: outside(v) for k, v in slots(value).items()}
                    tensors[f"{name}|{step}|{part}"] = table(value)
                elif not part.startswith("assignments"):
                    tensors[f"{name}|{step}|{part}"] = record(value)
    print(f"  {name}: loss {loss.item():.4f}, draws {chosen}", flush=True)
    return tensors | {f"{name}|draws": np.array(chosen)}


def make(path, root):
    tensors = {}
    for name in RUNS:
        tensors |= run(name)
    save(tensors, path)

"""The seven methods in PyTorch, each after its reference code, with a recipe's settings.

`online` is trained, other modules and buffers are a method's own. Order of a step: `before`, `loss`, the update, `after`.
Views come one by one, `[n, 3, h, w]`.
"""

import copy
import hashlib
import inspect
import json
import math

import pytorch
import small_cifar
import torch
import torch.nn.functional as F
from goldens import backbones, heads
from goldens.heads import Mlp
from pytorch import Backbone
from torch import nn


class Parts(nn.Module):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def normal(mlp, std):
    """Weights of `std(inputs)`, biases of zero."""
    for layer in mlp:
        nn.init.normal_(layer.weight, std=std(layer.in_features))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return mlp


@torch.no_grad()
def ema(target, online, momentum):
    """Parameters only: running statistics are each network's own."""
    for t, o in zip(target.parameters(), online.parameters()):
        t.mul_(momentum).add_(o, alpha=1.0 - momentum)


class Method:
    fixed = ()  # names of parameters whose rate stays at the peak begin so

    def __init__(self, recipe):
        self.settings, self.backbone = recipe["method"], Backbone(recipe["network"])
        self.online = self.build(self.backbone.features, **self.settings)

    def start(self, batch, per_epoch, total):
        """Makes what the method owns, from the weights as they are."""
        self.batch, self.per_epoch, self.total = batch, per_epoch, total

    def before(self, step):
        pass

    def frozen(self, step):
        """Names of parameters that this step does not move begin so."""
        return ()

    def after(self, step):
        pass

    def permutation(self, step, half):
        return torch.randperm(self.batch)

    def unit_rows(self, rows, d):
        return F.normalize(torch.randn(rows, d))


class SimClr(Method):
    """google-research/simclr: objective.py; both views are one batch."""

    def build(self, features, hidden, embedding, layers=2, **_):
        inner, last = (hidden, False, "affine", True), (embedding, False, "scale", False)
        head = Mlp(features, [inner] * (layers - 1) + [last])
        return Parts(backbone=self.backbone, head=normal(head, lambda _: 0.01))

    def embed(self, network, x):
        return F.normalize(network.head(network.backbone(x)))

    def loss(self, views):
        z = self.embed(self.online, torch.cat(views))
        logits = (z @ z.T / self.settings["temperature"]).fill_diagonal_(-1e9)
        # The mean over each view, added.
        return 2 * F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


class SimClrV2(SimClr):
    """A third layer, and keys of this batch and past ones from a momentum encoder (google-research/simclr#54)."""

    def build(self, features, **settings):
        return super().build(features, layers=3, **settings)

    def start(self, *run):
        super().start(*run)
        self.key, self.oldest = copy.deepcopy(self.online), 0
        self.memory = self.unit_rows(self.settings["memory"], self.settings["embedding"])

    def before(self, step):
        ema(self.key, self.online, self.settings["momentum"])

    def loss(self, views):
        x, n = torch.cat(views), self.batch
        z1, z2 = self.embed(self.online, x).chunk(2)
        with torch.no_grad():
            keys = self.embed(self.key, x)
        self.memory[self.oldest : self.oldest + 2 * n] = keys
        k1, k2 = keys.chunk(2)
        image = torch.arange(n)
        own = torch.zeros(n, len(self.memory), dtype=torch.bool)
        own[image, self.oldest + image] = own[image, self.oldest + n + image] = True
        t = self.settings["temperature"]

        def one(z, k):
            negatives = (z @ self.memory.T).masked_fill(own, -torch.inf)
            logits = torch.cat([(z * k).sum(1, keepdim=True), negatives], 1) / t
            return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long))

        return one(z1, k2) + one(z2, k1)

    def after(self, step):
        self.oldest = (self.oldest + 2 * self.batch) % len(self.memory)


class MoCo(Method):
    """facebookresearch/moco: moco/builder.py, with the notebook's groups of batch norm and shuffle on one device."""

    def build(self, features, hidden, embedding, **_):
        last = (embedding, True, None, False)
        head = Mlp(features, [(hidden, True, None, True), last] if hidden else [last])
        return Parts(backbone=self.backbone, head=head)

    def start(self, *run):
        super().start(*run)
        self.key, self.oldest = copy.deepcopy(self.online), 0
        self.queue = self.unit_rows(self.settings["queue"], self.settings["embedding"])

    def before(self, step):
        self.step = step
        ema(self.key, self.online, self.settings["momentum"])

    def embed(self, network, x):
        return F.normalize(network.head(network.backbone(x)))

    def half(self, x_q, x_k, half):
        q = self.embed(self.online, x_q)
        with torch.no_grad():
            order = self.permutation(self.step, half)
            k = self.embed(self.key, x_k[order])[torch.argsort(order)]
        self.keys.append(k)
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue.T], 1)
        return F.cross_entropy(logits / self.settings["temperature"], torch.zeros(len(q), dtype=torch.long))

    def loss(self, views):
        self.keys, (x1, x2) = [], views
        loss = self.half(x1, x2, 0)
        return loss + self.half(x2, x1, 1) if self.settings["symmetric"] else loss

    def after(self, step):
        for k in self.keys:
            self.queue[self.oldest : self.oldest + len(k)] = k
            self.oldest = (self.oldest + len(k)) % len(self.queue)


class Swav(Method):
    """facebookresearch/swav: main_swav.py, `train` and `distributed_sinkhorn`."""

    def build(self, features, hidden, embedding, prototypes, **_):
        head = Mlp(features, [(hidden, True, "affine", True), (embedding, True, None, False)])
        return Parts(backbone=self.backbone, head=head, prototypes=nn.Linear(embedding, prototypes, bias=False))

    def start(self, *run):
        super().start(*run)
        rows = self.settings["queue"] - self.settings["queue"] % self.batch
        self.queue = torch.zeros(2, rows, self.settings["embedding"])

    def before(self, step):
        self.step, weight = step, self.online.prototypes.weight.data
        weight.copy_(F.normalize(weight))

    def frozen(self, step):
        return ("prototypes.",) if step < self.settings["freeze_steps"] else ()

    def queued(self, step):
        return step >= self.settings["queue_from"] * self.per_epoch

    @torch.no_grad()
    def sinkhorn(self, scores):
        q = (scores / self.settings["epsilon"]).exp().T
        (k, b), q = q.shape, q / q.sum()
        for _ in range(self.settings["sinkhorn_iterations"]):
            q = q / q.sum(1, keepdim=True) / k
            q = q / q.sum(0, keepdim=True) / b
        return (q * b).T

    def loss(self, views):
        sizes = {x.shape[-1]: [] for x in views}
        for x in views:
            sizes[x.shape[-1]].append(x)
        features = [self.online.backbone(torch.cat(group)) for group in sizes.values()]
        z = F.normalize(self.online.head(torch.cat(features)))
        scores, losses = self.online.prototypes(z).split(self.batch), []
        self.fresh = z.detach().split(self.batch)
        for i in range(2):
            known = scores[i].detach()
            if self.queued(self.step) and self.queue[i, -1].any():
                waiting = self.queue[i] @ self.online.prototypes.weight.detach().T
                known = torch.cat([waiting, known])
            q = self.sinkhorn(known)[-self.batch :]
            others = (s for v, s in enumerate(scores) if v != i)
            parts = [-(q * F.log_softmax(s / self.settings["temperature"], 1)).sum(1).mean() for s in others]
            losses.append(sum(parts) / len(parts))
        return sum(losses) / 2

    def after(self, step):
        if self.queued(step):
            for queue, z in zip(self.queue, self.fresh):
                queue.copy_(torch.cat([z, queue])[: len(queue)])


class Byol(Method):
    """deepmind-research: byol_experiment.py, `loss_fn` and `_update_fn`."""

    def build(self, features, hidden, embedding, **_):
        def head(inputs):
            layers = [(hidden, True, "affine", True), (embedding, False, None, False)]
            return normal(Mlp(inputs, layers), lambda inputs: inputs**-0.5)

        return Parts(backbone=self.backbone, projector=head(features), predictor=head(embedding))

    def start(self, *run):
        super().start(*run)
        assert not self.settings["fresh_target"]
        self.target = copy.deepcopy(self.online)

    def loss(self, views):
        def project(network):
            return [network.projector(network.backbone(x)) for x in views]

        p1, p2 = map(self.online.predictor, project(self.online))
        with torch.no_grad():
            t1, t2 = project(self.target)

        def regression(p, t):
            return (F.normalize(p) - F.normalize(t)).square().sum(1)

        return (regression(p1, t2) + regression(p2, t1)).mean()

    def after(self, step):
        tau = 1.0 - (1.0 - self.settings["momentum"]) * (math.cos(math.pi * step / self.total) + 1.0) / 2.0
        ema(self.target, self.online, tau)


class SimSiam(Method):
    """facebookresearch/simsiam: simsiam/builder.py, and main_simsiam.py with `--fix-pred-lr`."""

    fixed = ("predictor.",)

    def build(self, features, projector_layers, embedding, hidden, **_):
        inner, last = (embedding, False, "affine", True), (embedding, False, "plain", False)
        projector = Mlp(features, [inner] * (projector_layers - 1) + [last])
        predictor = Mlp(embedding, [(hidden, False, "affine", True), (embedding, True, None, False)])
        return Parts(backbone=self.backbone, projector=projector, predictor=predictor)

    def loss(self, views):
        z1, z2 = (self.online.projector(self.online.backbone(x)) for x in views)
        p1, p2 = self.online.predictor(z1), self.online.predictor(z2)
        cosine = F.cosine_similarity
        return -(cosine(p1, z2.detach()).mean() + cosine(p2, z1.detach()).mean()) / 2


METHODS = {"moco": MoCo, "simclr": SimClr, "simclr-v2": SimClrV2, "swav": Swav, "byol": Byol, "simsiam": SimSiam}


def method_of(recipe, seed):
    """A recipe's method with the weights that a seed draws."""
    torch.manual_seed(seed)
    settings = {key: value for key, value in recipe["method"].items() if key != "name"}
    return METHODS[recipe["method"]["name"]]({**recipe, "method": settings})


def digest(*parts):
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def version(recipe):
    """Of what decides a cell of PyTorch: this side's code, and the recipe."""
    family = [kind for kind in METHODS[recipe["method"]["name"]].__mro__ if kind is not object]
    shared = small_cifar.files_of, small_cifar.decoded, small_cifar.knn
    code = map(inspect.getsource, [pytorch, heads, backbones, *shared, *family])
    settings = [recipe, small_cifar.K, small_cifar.TEMPERATURE, small_cifar.WORKERS]
    return digest(json.dumps(settings, sort_keys=True), *code)

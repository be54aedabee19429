"""ResNets of any width with torchvision's blocks and names, weights from the formula, batch norm split in runs of rows."""

import copy
import math

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from . import seeded

BLOCKS = {18: (BasicBlock, [2, 2, 2, 2]), 34: (BasicBlock, [3, 4, 6, 3]), 50: (Bottleneck, [3, 4, 6, 3])}


class SplitBatchNorm(nn.BatchNorm2d):
    """facebookresearch/moco, colab notebook: each split moves a copy of the statistics, the mean of which stays.

    There the splits are every `groups`-th image, here they are runs.
    """

    groups = 1

    def forward(self, x):
        if not self.training or self.groups == 1:
            return super().forward(x)
        n, c, h, w = x.shape
        split = lambda t: t.repeat(self.groups)  # noqa: E731
        mean, variance = split(self.running_mean), split(self.running_var)
        runs = x.view(self.groups, n // self.groups, c, h, w).transpose(0, 1).reshape(-1, self.groups * c, h, w)
        y = F.batch_norm(runs, mean, variance, split(self.weight), split(self.bias), True, self.momentum, self.eps)
        self.running_mean.data.copy_(mean.view(self.groups, c).mean(0))
        self.running_var.data.copy_(variance.view(self.groups, c).mean(0))
        return y.view(-1, self.groups, c, h, w).transpose(0, 1).reshape(n, c, h, w)


class Backbone(torchvision.models.ResNet):
    """Images `[n, h, w, 3]` to features."""

    def __init__(self, depth, width, stem, groups=1):
        nn.Module.__init__(self)
        block, counts = BLOCKS[depth]
        self._norm_layer = type("Norm", (SplitBatchNorm,), {"groups": groups})
        self.inplanes, self.dilation, self.groups, self.base_width = width, 1, 1, 64
        size, stride = (7, 2) if stem == "image" else (3, 1)
        self.conv1 = nn.Conv2d(3, width, size, stride, padding=size // 2, bias=False)
        self.bn1 = self._norm_layer(width)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "image" else nn.Identity()
        for i, count in enumerate(counts):
            layer = self._make_layer(block, width << i, count, stride=2 if i else 1)
            setattr(self, f"layer{i + 1}", layer)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Identity()
        self.double()

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2).contiguous())


def slots(module):
    """Parameters and running statistics by name."""
    statistics = {k: v for k, v in module.named_buffers() if "running" in k}
    return {**dict(module.named_parameters()), **statistics}


def outside(tensor):
    """A parameter, a gradient or a statistic in the order that selfsup has it in."""
    return (tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor).detach().clone()


def fill(module, line):
    """Values from the formula; tests/suite/networks.rs has the same."""
    for name, tensor in slots(module).items():
        shape = outside(tensor).shape
        values = spread(name, shape)(seeded.seed(f"{line}|{name}"), math.prod(shape))
        values = torch.from_numpy(values.reshape(shape))
        tensor.data.copy_(values.permute(0, 3, 1, 2) if tensor.dim() == 4 else values)


def spread(name, shape):
    if len(shape) > 1:
        return seeded.around(0.0, math.sqrt(6.0 / math.prod(shape[1:])))
    if name.endswith("running_mean"):
        return seeded.around(0.0, 0.1)
    if name.endswith("running_var"):
        return seeded.around(1.0, 0.5)
    return seeded.around(1.0, 0.3) if name.endswith("weight") else seeded.around(0.0, 0.2)


def kinked(module, images):
    """Whether f32 may go another way than f64 at a ReLU, or in a pooling window: within six times its error there.

    At a kink rounding decides which way a whole gradient goes. What is compared in f32, on machines that round
    differently, must lie off kinks, so images are drawn until they do.
    """
    narrow = [x.float() for x in images] if isinstance(images, list) else images.float()
    truth, own = at_kinks(copy.deepcopy(module), images), at_kinks(copy.deepcopy(module).float(), narrow)
    for (gap, x), (_, y) in zip(truth, own):
        rest = [dim for dim in range(x.dim()) if dim != 1]
        error = (x - y).pow(2).mean(rest, keepdim=True).sqrt()  # of each channel
        if (gap < 6 * error).any():
            return True
    return False


def at_kinks(module, images):
    """For each ReLU and each pooling: how far each number is from a kink, and the numbers that go in."""
    found = []

    def relu(_, inputs):
        x = inputs[0].detach().double().clone()
        found.append((x.abs(), x))

    def pool(_, inputs):
        x = inputs[0].detach().double().clone()
        windows = F.unfold(F.pad(x, [1] * 4, value=-1.0).flatten(0, 1)[:, None], 3, stride=2)  # [n c, 9, windows]
        first, second = windows.topk(2, dim=1).values.unbind(1)
        # No gradient flows through a maximum of zero: a ReLU comes before.
        lead = torch.where(first > 0, first - second, math.inf).min(1).values
        found.append((lead.view(*x.shape[:2], 1, 1), x))

    kinds = {nn.ReLU: relu, nn.MaxPool2d: pool}
    for inner in module.modules():
        if type(inner) in kinds:
            inner.register_forward_pre_hook(kinds[type(inner)])
    with torch.no_grad():
        module(images)
    return found

"""SimCLR v2's ResNet-50 with selective kernels and ResNet-D, after google-research/simclr, resnet.py; names of selfsup."""

import torch
import torch.nn.functional as F
from torch import nn

from .heads import Mlp


def conv(c, k, size, stride=1):
    return nn.Conv2d(c, k, size, stride, padding=size // 2, bias=False)


class Block(nn.Module):
    def __init__(self, c, inner, stride, ratio):
        super().__init__()
        k = 4 * inner
        self.stride, self.relu = stride, nn.ReLU()
        self.conv1, self.bn1 = conv(c, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, 2 * inner, 3, stride), nn.BatchNorm2d(2 * inner)
        middle = max(int(inner * ratio), 32)
        self.select = Mlp(inner, [(middle, False, "affine", True), (2 * inner, False, None, False)])
        self.conv3, self.bn3 = conv(inner, k, 1), nn.BatchNorm2d(k)
        self.downsample = None
        if c != k or stride != 1:
            self.downsample = nn.Sequential(conv(c, k, 1), nn.BatchNorm2d(k))

    def forward(self, x):
        shortcut = x
        if self.downsample is not None:
            h, w = x.shape[2:]
            pooled = F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, self.stride)
            if self.stride == 1:  # SAME: what is padded does not count
                pooled = pooled / F.avg_pool2d(F.pad(torch.ones_like(x), (0, 1, 0, 1)), 2, 1)
            shortcut = self.downsample(pooled[:, :, : -(-h // self.stride), : -(-w // self.stride)])
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        streams = torch.stack(x.chunk(2, 1))
        weights = torch.stack(self.select(streams.sum(0).mean((2, 3))).chunk(2, 1)).softmax(0)
        x = (streams * weights[..., None, None]).sum(0)
        return self.relu(self.bn3(self.conv3(x)) + shortcut)


class SelectiveBackbone(nn.Module):
    def __init__(self, width, stem, ratio):
        super().__init__()
        half, norm = width // 2, nn.BatchNorm2d
        if stem == "image":
            self.conv1 = nn.ModuleList([conv(3, half, 3, 2), conv(half, half, 3), conv(half, width, 3)])
            self.bn1 = nn.ModuleList([norm(half), norm(half), norm(width)])
        else:
            self.conv1, self.bn1 = conv(3, width, 3), norm(width)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1) if stem == "image" else nn.Identity()
        c = width
        for stage, count in enumerate((3, 4, 6, 3)):
            layer = nn.Sequential()
            for i in range(count):
                layer.append(Block(c, width << stage, 2 if stage and i == 0 else 1, ratio))
                c = 4 * (width << stage)
            setattr(self, f"layer{stage + 1}", layer)
        self.double()

    def forward(self, x):
        x = x.permute(0, 3, 1, 2).contiguous()
        several = isinstance(self.conv1, nn.ModuleList)
        for layer, norm in zip(self.conv1, self.bn1) if several else [(self.conv1, self.bn1)]:
            x = self.relu(norm(layer(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.maxpool(x)))))
        return x.mean((2, 3))

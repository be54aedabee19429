"""Heads with the names of selfsup: layer `i` is `i`, its batch norm `i.norm`."""

from torch import nn


class Layer(nn.Linear):
    """`norm` is None, "affine", "scale" or "plain"."""

    def __init__(self, inputs, width, bias, norm, relu):
        super().__init__(inputs, width, bias=bias)
        self.norm = None if norm is None else nn.BatchNorm1d(width, affine=norm != "plain")
        if norm == "scale":
            self.norm.bias = None
        self.relu = nn.ReLU() if relu else None

    def forward(self, x):
        x = super().forward(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.relu is None else self.relu(x)


class Mlp(nn.ModuleList):
    def __init__(self, inputs, layers):
        super().__init__()
        for width, *rest in layers:
            self.append(Layer(inputs, width, *rest))
            inputs = width

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x

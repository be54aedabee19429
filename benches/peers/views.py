"""Loaders of the same views: `selfsup.Loader`'s policy, and lightly's transform with these settings."""

import time

import torch


def policy(size):
    """The views of benches/peers/loader_peers.py."""
    strength = 0.5 if size == 32 else 1.0
    table = {
        "size": size,
        "repeat": 2,
        "flip": 0.5,
        "jitter": {"p": 0.8, "brightness": 0.8 * strength, "contrast": 0.8 * strength, "saturation": 0.8 * strength, "hue": 0.2 * strength},
        "grey": 0.2,
        "normalise": {"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]},
    }
    if size != 32:
        table["blur"] = {"p": 0.5, "sigma": [0.1, 2.0], "kind": "gaussian"}
    return table


class Endless:
    """Batches of `selfsup.Loader`, epoch after epoch."""

    ahead = 3

    def __init__(self, loader):
        self.loader, self.batches = loader, iter(())

    def __next__(self):
        for batch in self.batches:
            return batch
        self.batches = iter(self.loader)
        return next(self.batches)

    def measure(self, seconds):
        for _ in range(self.ahead):
            next(self)
        start, views = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            views += sum(len(view) for view in next(self)[0])
        return views / (time.perf_counter() - start)


def lightly_loader(files, size, batch, workers):
    """lightly's SimCLR transform with the settings of `policy`, its data set and a DataLoader."""
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform

    strength = 0.5 if size == 32 else 1.0
    transform = SimCLRTransform(
        input_size=size,
        cj_prob=0.8,
        cj_strength=strength,
        cj_bright=0.8,
        cj_contrast=0.8,
        cj_sat=0.8,
        cj_hue=0.2,
        random_gray_scale=0.2,
        gaussian_blur=0.0 if size == 32 else 0.5,
        normalize={"mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010]},
    )
    data = LightlyDataset(str(files), transform=transform)
    return torch.utils.data.DataLoader(
        data, batch_size=batch, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True, prefetch_factor=4
    )

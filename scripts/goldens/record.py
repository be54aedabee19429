"""The record of a tensor that tests/suite/golden.rs reads, and the files of records."""

import numpy as np
import torch
import torchvision
from safetensors.numpy import save_file

from . import seeded

WHOLE, ENTRIES = 64, 32


def numbers(x):
    if isinstance(x, torch.Tensor):
        x = x.detach().double().numpy()
    return np.asarray(x, np.float64).ravel()


def error(got, want):
    """The relative L2 error."""
    difference = np.linalg.norm(numbers(got) - numbers(want))
    return 0.0 if difference == 0 else difference / np.linalg.norm(numbers(want))


def record(want, f32=None, entries=ENTRIES, whole=WHOLE):
    """The record of `want`, the result in f64; `f32` is PyTorch's result in f32."""
    x = numbers(want)
    own = 0.0 if f32 is None else error(f32, x)
    head = [x.size, own, np.linalg.norm(x), np.abs(x).max(initial=0)]
    head += [x @ seeded.unit(seeded.seed(f"projection {j}"), x.size) for j in range(4)]
    kept = x if x.size <= whole else x[seeded.indices(seeded.seed("entries"), entries, x.size)]
    return np.concatenate([head, kept])


def table(truth, f32=None):
    """Records of many tensors by name, as one table sorted by name: the name's hash, then a short record."""
    rows = []
    for name in sorted(truth):
        short = record(truth[name], None if f32 is None else f32[name], entries=8, whole=8)
        rows.append(np.concatenate([[seeded.seed(name) >> 11], short, np.zeros(16 - short.size)]))
    return np.stack(rows)


def save(tensors, path):
    # A single tensor: several would be written in random order, so equal results would not give equal files.
    versions = {"made_by": f"torch {torch.__version__}, torchvision {torchvision.__version__}"}
    path.parent.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(t, np.float64) for name, t in tensors.items()}, path, versions)
    path.chmod(0o644)
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1024:.0f} KiB")

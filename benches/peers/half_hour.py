#!/usr/bin/env python3
"""What two cores learn in half an hour: SimCLR on all of CIFAR-10, here and in PyTorch.

    pip install torch==2.9.1 torchvision==0.24.1 pillow==11.3.0 safetensors
    python benches/peers/half_hour.py CIFAR10 [--only pytorch|selfsup] [--epochs N]

CIFAR10 is a folder with `train` and `test` folders of class folders of image files. Both sides read the recipe
simclr-cifar10-cpu and start from the same weights; its number of epochs is what selfsup completes in half an hour. PyTorch's
number follows from the measured speed of its faster memory format, unless `--epochs` is given; its learning rate decays to zero
over these epochs. kNN (k 200, temperature 0.1) covers the complete set and its time is not counted. No test depends on this.
"""

import argparse
import tempfile
import time
import tomllib
from pathlib import Path

import PIL
import small_cifar as small
import torch
import torchvision
from torch.utils.data import DataLoader, RandomSampler

NAME, MINUTES, SEED = "simclr-cifar10-cpu", 30, 1


def loader_of(views, **order):
    batch = small.RECIPE["train"]["batch"]
    return DataLoader(views, batch, num_workers=small.WORKERS, prefetch_factor=4, drop_last=True, **order)


def pytorch(data, epochs):
    files = small.files_of(data / "train", 0)
    views = small.Views(files, "pillow")
    if not epochs:
        endless = loader_of(views, sampler=RandomSampler(views, num_samples=10**8))
        speed = small.pytorch_speed(endless, torch.channels_last, 20.0)
        epochs = max(1, int(60 * MINUTES * speed / (2 * len(files))))
        print(f"  pytorch: {speed:.0f} views/s, {epochs} epochs", flush=True)
    small.RECIPE["train"]["epochs"] = epochs
    network = small.SimClr(SEED).to(memory_format=torch.channels_last)
    optimizer = small.optimizer_of(network)
    loader = loader_of(views, shuffle=True, persistent_workers=True)
    start, done = time.perf_counter(), 0
    for epoch in range(epochs):
        for pair in loader:
            pair = [view.contiguous(memory_format=torch.channels_last) for view in pair]
            loss = small.step(network, optimizer, pair, small.rate(done, len(loader)))
            done += 1
        print(f"  pytorch, epoch {epoch + 1}: loss {loss:.3f}, {(time.perf_counter() - start) / 60:.1f} minutes", flush=True)
    minutes = (time.perf_counter() - start) / 60
    accuracy = small.knn(small.features(network, files), small.features(network, small.files_of(data / "test", 0)))
    return {"knn": accuracy, "minutes": minutes, "epochs": epochs}


def selfsup(data, epochs):
    settings = {"train.knn_every": 0} | ({"train.epochs": epochs} if epochs else {})
    with tempfile.TemporaryDirectory() as folder:
        records = small.ours(small.build(), data, Path(folder), SEED, **settings)
    views = 2 * len(small.files_of(data / "train", 0))
    minutes = sum(views / record["views_per_second"] for record in records) / 60
    return {"knn": records[-1]["knn"], "minutes": minutes, "epochs": len(records)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", choices=["pytorch", "selfsup"])
    parser.add_argument("--epochs", type=int, help="epochs of the sides that run")
    args = parser.parse_args()
    small.NAME, small.RECIPE = NAME, tomllib.loads((small.ROOT / f"recipes/{NAME}.toml").read_text())
    torch.set_num_threads(small.THREADS)
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}; {small.THREADS} threads, "
          f"{small.WORKERS} workers; {time.strftime('%Y-%m-%d')}", flush=True)
    for side in (selfsup, pytorch):
        if args.only in (None, side.__name__):
            cell = side(args.data, args.epochs)
            print(f"half an hour, {side.__name__}: kNN {100 * cell['knn']:.1f}% after {cell['epochs']} epochs, "
                  f"{cell['minutes']:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()

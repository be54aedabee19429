#!/usr/bin/env python3
"""Whether training here learns what training in PyTorch learns, and how fast: SimCLR on CIFAR-10, small.

    pip install torch==2.9.1 torchvision==0.24.1 pillow==11.3.0 safetensors
    python benches/peers/small_cifar.py CIFAR10                  # three seeds a side, kNN on the test images; hours if need be
    python benches/peers/small_cifar.py CIFAR10 --only pytorch   # only the cells of PyTorch that are missing
    python benches/peers/small_cifar.py CIFAR10 --speed          # only views a second, under two minutes

CIFAR10 is a folder with `train` and `test` folders of class folders of image files. The recipe is simclr-cifar10-small, read by
both sides: 10,000 images, a quarter of ResNet-18's width, 8 epochs. A seed's weights are drawn here and given to both; random
numbers of order and augmentation differ, augmentation itself is torchvision's on Pillow images, which selfsup's equals to the
bit. PyTorch's cells are made once and kept in benches/results/small-cifar-pytorch.json, with the versions that made them; they are
made again where PyTorch's side or the recipe changed. Tests never need this.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pytorch
import torch
from common import ROOT, THREADS, Cells, build, difference, recipe, trained
from methods import method_of, version
from torch.utils.data import DataLoader, RandomSampler

NAME = "simclr-cifar10-small"
RECIPE = recipe(NAME, {"data.test_limit": 0, "train.knn_every": 0})


def pytorch_cells(data, seeds):
    cells, by = Cells(ROOT / "benches/results/small-cifar-pytorch.json"), version(RECIPE)
    for seed in map(str, seeds):
        if not cells.made(seed, by):
            cells.keep(seed, {**pytorch.cell(RECIPE, method_of(RECIPE, int(seed)), data, f"seed {seed}"), "script": by})
    return {seed: cells.cells[str(seed)] for seed in seeds}


def pytorch_speed(loader, memory_format, seconds):
    """Views a second, after what was made before the clock started."""
    method = method_of(RECIPE, 1)
    method.online.to(memory_format=memory_format)
    optimizer, batches = pytorch.optimizer_of(RECIPE, method), iter(loader)

    def one():
        views = [view.contiguous(memory_format=memory_format) for view in next(batches)]
        pytorch.step(RECIPE, method, optimizer, views, 10, len(loader))
        return sum(map(len, views))

    for _ in range(pytorch.WORKERS * loader.prefetch_factor + 2):
        one()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += one()
    return done / (time.perf_counter() - start)


def ours(program, data, folder, seed, settings):
    """The records of the epochs of a run from the seed's weights."""
    settings = {"seed": seed, "data.path": str(data.resolve()), "train.knn_every": 0, **settings}
    records = trained(program, NAME, settings, method_of(RECIPE, seed).online, folder)
    return [record for record in records if "epoch" in record]


def our_cell(program, data, folder, seed):
    records = ours(program, data, folder, seed, {"data.test_limit": 0})
    for record in records:
        print(f"  selfsup, seed {seed}, epoch {record['epoch']}: loss {record['loss']:.3f}", flush=True)
    return {"knn": records[-1]["knn"], "losses": [record["loss"] for record in records]}


def our_speed(program, data, folder):
    """Views a second of the epochs after the first, in which files are decoded."""
    settings = {"data.limit": 40 * RECIPE["train"]["batch"], "data.test_limit": 64, "train.epochs": 4}
    return statistics.median(record["views_per_second"] for record in ours(program, data, folder, 1, settings)[1:])


def compare_speeds(data, folder, rounds, seconds):
    program, files = build(), pytorch.files_of(data / "train", 2560)
    peers, found = {}, []
    for kind in ("pillow", "tensor"):
        views = pytorch.Views(files, RECIPE, kind)
        sampler = RandomSampler(views, num_samples=10**8)
        loader = DataLoader(views, RECIPE["train"]["batch"], sampler=sampler, num_workers=pytorch.WORKERS, prefetch_factor=4)
        for name, memory_format in (("channels first", torch.contiguous_format), ("last", torch.channels_last)):
            peers[f"pytorch, {kind}, {name}"] = (loader, memory_format)
    for _ in range(rounds):
        one = {"selfsup": our_speed(program, data, folder)}
        for name, (loader, memory_format) in peers.items():
            one[name] = pytorch_speed(loader, memory_format, seconds)
        found.append(one)
        print(", ".join(f"{side} {speed:.0f}" for side, speed in one.items()), flush=True)
    ratio = statistics.median(one["selfsup"] / max(one[name] for name in peers) for one in found)
    print(f"small CIFAR-10 views/s ratio: {ratio:.2f}")


def compare_accuracies(data, folder, seeds, sides):
    cells = {}
    if "pytorch" in sides:
        cells["pytorch"] = pytorch_cells(data, seeds)
    if "selfsup" in sides:
        program = build()
        cells["selfsup"] = {seed: our_cell(program, data, folder, seed) for seed in seeds}
    print(f"\n{'seed':>4} " + " ".join(f"{side + ' kNN':>12} {'last loss':>10}" for side in cells))
    for seed in seeds:
        columns = (f"{100 * of[seed]['knn']:11.2f}% {of[seed]['losses'][-1]:10.3f}" for of in cells.values())
        print(f"{seed:>4} " + " ".join(columns))
    if len(cells) < 2 or len(seeds) < 2:
        return
    found = {side: [100 * cell["knn"] for cell in of.values()] for side, of in cells.items()}
    apart, error, bound = difference(found["selfsup"], found["pytorch"])
    print(f"standard error of the difference: {error:.2f} points")
    verdict = "within" if abs(apart) <= bound else "BEYOND"
    print(f"small CIFAR-10 kNN difference: {apart:+.2f} points, {verdict} {bound:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", choices=["pytorch", "selfsup"])
    parser.add_argument("--speed", action="store_true", help="measure views a second and nothing else")
    parser.add_argument("--rounds", type=int, default=3, help="of --speed")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each PyTorch variant in a round of --speed")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    print(f"{', '.join(f'{k} {v}' for k, v in pytorch.VERSIONS.items())}; {THREADS} threads, {pytorch.WORKERS} workers; "
          f"{time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as folder:
        if args.speed:
            compare_speeds(args.data, Path(folder), args.rounds, args.seconds)
        else:
            sides = [args.only] if args.only else ["pytorch", "selfsup"]
            compare_accuracies(args.data, Path(folder), args.seeds, sides)


if __name__ == "__main__":
    main()

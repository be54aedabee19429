#!/usr/bin/env python3
"""Compares selfsup's loader with torchvision's transforms (v2) under a DataLoader in one run: views per second.

    pip install torch==2.9.1 torchvision==0.24.1 pillow
    python benches/peers/loader.py CIFAR10 IMAGENETTE128 [--rounds 5] [--seconds 4] [--workers 2]

Both arguments are folders of class folders of JPEG files (or with such a folder `train`). Two pipelines, two views per
image, batches of 256:

  32   random crop, flip, jitter, grey, normalise; images are held decoded in memory on both sides
  112  the same plus blur (11 taps), from the files: reading and decoding count on both sides

The peer is as fast as we can make it: persistent worker processes that prefetch, one thread each, and an endless sampler, so that
no epoch ends. It runs on tensors and on Pillow images, and the faster one counts. Sides take turns, so that noise hits all;
ratios are medians over rounds, ours over the faster peer's (above 1: faster). CPU seconds of all threads and processes that make
views give the same comparison on a shared machine. No test depends on this.
"""

import argparse
import os
import statistics
import subprocess
import time
from pathlib import Path

import PIL
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import io
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[2]
BATCH, PREFETCH = 256, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def transform(size, on):
    strength = 0.5 if size == 32 else 1.0
    jitter = v2.ColorJitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    steps += [v2.RandomApply([jitter], 0.8), v2.RandomGrayscale(0.2)]
    if size != 32:
        steps.append(v2.RandomApply([v2.GaussianBlur(11, (0.1, 2.0))], 0.5))
    if on == "pillow":
        steps.append(v2.PILToTensor())
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


class Views(Dataset):
    """Two views of each image; images are paths, or decoded in memory."""

    def __init__(self, files, size, on):
        self.transform, self.on = transform(size, on), on
        self.images = [self.read(file) for file in files] if size == 32 else files
        self.in_memory = size == 32

    def read(self, file):
        if self.on == "tensor":
            return io.decode_image(str(file), io.ImageReadMode.RGB)
        with Image.open(file) as image:
            return image.convert("RGB")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i] if self.in_memory else self.read(self.images[i])
        return self.transform(image), self.transform(image)


def files_in(folder):
    folder = folder / "train" if (folder / "train").is_dir() else folder
    files = sorted(file for kind in folder.iterdir() if kind.is_dir() for file in kind.iterdir())
    return folder, [file for file in files if file.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".png")]


def ticks(pid):
    """CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Peer:
    def __init__(self, files, size, on, workers):
        data = Views(files, size, on)
        loader = DataLoader(
            data,
            batch_size=BATCH,
            sampler=RandomSampler(data, num_samples=10**8),
            num_workers=workers,
            persistent_workers=True,
            prefetch_factor=PREFETCH,
        )
        self.ahead = workers * PREFETCH + 1
        self.batches = iter(loader)
        self.pids = [worker.pid for worker in self.batches._workers] + [os.getpid()]

    def measure(self, seconds):
        """Views, seconds and CPU seconds; views prepared before the clock started do not count."""
        for _ in range(self.ahead):
            next(self.batches)
        start, cpu, views = time.perf_counter(), sum(map(ticks, self.pids)), 0
        while time.perf_counter() - start < seconds:
            views += sum(len(view) for view in next(self.batches))
        return views, time.perf_counter() - start, sum(map(ticks, self.pids)) - cpu


class Ours:
    def __init__(self):
        command = ["cargo", "bench", "--quiet", "--bench", "loader"]
        subprocess.run([*command, "--no-run"], cwd=ROOT, check=True)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, bufsize=1, **pipes)

    def measure(self, size, folder, seconds, workers):
        self.process.stdin.write(f"{size} {folder.resolve()} {seconds} {workers}\n")
        self.process.stdin.flush()
        views, wall, cpu = map(float, self.process.stdout.readline().split())
        return views, wall, cpu

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cifar", type=Path)
    parser.add_argument("imagenette", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}"
    print(f"{versions}; {args.workers} workers, prefetch {PREFETCH}; {time.strftime('%Y-%m-%d')}")
    ours, ratios = Ours(), {}
    for size, path in ((32, args.cifar), (112, args.imagenette)):
        folder, files = files_in(path)
        if size == 32:
            files = files[:: max(1, len(files) // 10000)]  # enough images to measure a speed
        peers = {on: Peer(files, size, on, args.workers) for on in ("tensor", "pillow")}
        rounds = []
        for _ in range(args.rounds):
            one = {"ours": ours.measure(size, folder, args.seconds, args.workers)}
            one |= {on: peer.measure(args.seconds) for on, peer in peers.items()}
            rounds.append(one)
        print(f"\n{size} px, {len(files)} images {'in memory' if size == 32 else 'in files'}:")
        for side in ("ours", *peers):
            wall = statistics.median(r[side][0] / r[side][1] for r in rounds)
            cpu = statistics.median(r[side][0] / r[side][2] for r in rounds)
            print(f"  {side:<7} {wall:8.0f} views/s, {cpu:8.0f} per CPU second", flush=True)
        for clock, name in ((1, "views/s"), (2, "views per CPU second")):
            speeds = [{side: m[0] / m[clock] for side, m in r.items()} for r in rounds]
            ratio = [s["ours"] / max(s[on] for on in peers) for s in speeds]
            ratios.setdefault(name, []).append(statistics.median(ratio))
            print(f"  ratio of {name}: " + " ".join(f"{r:.2f}" for r in ratio))
        del peers
    ours.end()
    print()
    for name in ("views per CPU second", "views/s"):
        print(f"loader {name} ratio (32, 112): " + " ".join(f"{r:.2f}" for r in ratios[name]))


if __name__ == "__main__":
    main()

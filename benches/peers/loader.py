#!/usr/bin/env python3
"""Compares selfsup's loader with those of torchvision, albumentations, kornia and DALI on the CPU in one run: views per second.

    pip install torch==2.9.1 torchvision==0.24.1 pillow albumentations==2.0.8 simplejpeg kornia nvidia-dali-cuda120
    python benches/peers/loader.py CIFAR10 IMAGENETTE128 [--rounds 5] [--seconds 4] [--workers 2]

Both arguments are folders of class folders of JPEG files (or with such a folder `train`). Two pipelines, two views per
image, batches of 256:

  32   random crop, flip, jitter, grey, normalise; images are held decoded in memory, all by ours and about 10,000 by a peer
  112  the same plus blur (11 taps), from the files: reading and decoding count on all sides

Each side is a process of its own with as many workers, and stands still while it is not its turn. loader_peers.py has the peers,
and says what differs in each. A peer whose packages are missing is left out, loudly. Sides take turns, so that noise hits all;
ratios are medians over rounds, ours over the fastest peer's (above 1: faster). CPU seconds of all threads and processes that make
views give the same comparison on a shared machine. No test depends on this.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

from loader_peers import BATCH, PEERS, PREFETCH, files_in, missing

ROOT = Path(__file__).resolve().parents[2]
OURS = ["cargo", "bench", "--quiet", "--bench", "loader"]
PACKAGES = r"torch|torchvision|pillow|albumentations|opencv-python.*|simplejpeg|kornia|nvidia-dali-.*"


class Side:
    """A process that answers each line by views, seconds and CPU seconds; it is stopped between its turns."""

    def __init__(self, command):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # A group of its own holds its workers, too. The kernel ends a stopped group when this process ends.
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, bufsize=1, process_group=0, **pipes)

    def measure(self, line):
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if not answer:
            sys.exit(f"no answer from {' '.join(self.process.args)}")
        os.killpg(self.process.pid, signal.SIGSTOP)
        return tuple(map(float, answer))

    def end(self):
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.close()
        self.process.wait()


def versions():
    """The installed packages that peers use."""
    found = {}
    for package in metadata.distributions():
        found.setdefault(package.metadata["Name"].lower(), package.version)
    return ", ".join(f"{name} {found[name]}" for name in sorted(found) if re.fullmatch(PACKAGES, name))


def present():
    """The names of the peers whose packages are there."""
    lacking = {name: missing(name) for name in PEERS}
    for name, modules in lacking.items():
        if modules:
            print(f"LEFT OUT: {name}, for want of {' and '.join(modules)}; the ratios are taken without it", flush=True)
    return [name for name, modules in lacking.items() if not modules]


def compare(size, path, names, args):
    """Prints the speeds at a size and returns the median ratios by the clock's name."""
    folder, files = files_in(path)
    ours, request = Side(OURS), f"{size} {folder.resolve()} {args.seconds} {args.workers}"
    program = Path(__file__).with_name("loader_peers.py")
    peers = {on: Side([sys.executable, str(program), on, str(size), str(folder.resolve()), str(args.workers)]) for on in names}
    rounds = []
    for _ in range(args.rounds):
        one = {"ours": ours.measure(request)}
        rounds.append(one | {on: peer.measure(args.seconds) for on, peer in peers.items()})
    for side in (ours, *peers.values()):
        side.end()
    print(f"\n{size} px, {len(files)} images {'in memory' if size == 32 else 'in files'}:")
    for side in ("ours", *peers):
        wall = statistics.median(r[side][0] / r[side][1] for r in rounds)
        cpu = statistics.median(r[side][0] / r[side][2] for r in rounds)
        print(f"  {side:<14} {wall:8.0f} views/s, {cpu:8.0f} per CPU second")
    ratios = {}
    for clock, name in ((1, "views/s"), (2, "views per CPU second")):
        speeds = [{side: m[0] / m[clock] for side, m in r.items()} for r in rounds]
        ratio = [s["ours"] / max(s[on] for on in peers) for s in speeds]
        ratios[name] = statistics.median(ratio)
        print(f"  ratio of {name}: " + " ".join(f"{r:.2f}" for r in ratio), flush=True)
    return ratios


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cifar", type=Path)
    parser.add_argument("imagenette", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()

    print(f"{versions()}; {args.workers} workers, batches of {BATCH}, prefetch {PREFETCH}; {time.strftime('%Y-%m-%d')}")
    names = present()
    if not names:
        sys.exit("no peer is installed")
    subprocess.run([*OURS, "--no-run"], cwd=ROOT, check=True)
    ratios = [compare(size, path, names, args) for size, path in ((32, args.cifar), (112, args.imagenette))]
    print()
    for name in ("views per CPU second", "views/s"):
        figures = " ".join(f"{ratio[name]:.2f}" for ratio in ratios)
        print(f"loader {name} ratio (32, 112): {figures} (to the fastest of {', '.join(names)})")


if __name__ == "__main__":
    main()

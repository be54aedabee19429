#!/usr/bin/env python3
"""Compares selfsup's Python package with PyTorch, torchvision and lightly in one run; no test depends on it.

    pip install torch==2.9.1 torchvision==0.24.1 pillow lightly target/wheels/selfsup-*.whl     # scripts/wheel
    python benches/peers/python.py loader CIFAR10 IMAGENETTE128 [--rounds 5] [--seconds 4] [--workers 2] [--batch 256] [--sizes 32 112]
    python benches/peers/python.py losses [--rounds 7]
    python benches/peers/python.py waiting CIFAR10 IMAGENETTE128 [--rounds 5] [--steps 8] [--batch 64]
    python benches/peers/python.py swap CIFAR10 [--steps 50] [--batch 64] [--rounds 5]

loader  views a second inside a torch loop, `selfsup.Loader` beside a `DataLoader` over torchvision's transforms (v2) on tensors and on Pillow
        images, and beside lightly's own transform and collation; the pipelines, and how the peers are measured, are those of
        benches/peers/loader_peers.py
losses  time of the loss with its gradient beside eager PyTorch; error of values and gradients against f64; peak memory of NT-Xent by the
        number of rows, each in a process of its own
waiting steps of ResNet-18 with NT-Xent that take their views from the same loaders: steps a second, and the share of a step that is spent
        waiting for views
swap    lightly's SimCLR example (ResNet-18, NTXentLoss, LARS) on CIFAR-10 with loader, loss and LARS exchanged one after the other: how far
        the losses of all steps are from the original's, in f32 and in f64, beside the original with weights that differ by a rounding;
        steps a second

Both folders hold class folders of JPEG files (or such a folder `train`). Sides take turns; ratios are medians over rounds, above 1: ours is
faster.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

import selfsup
import selfsup.torch as own

sys.path.insert(0, str(Path(__file__).parent))

from loops import swap, waiting  # noqa: E402
from views import Endless, lightly_loader, policy  # noqa: E402


def measure_lightly(loader, seconds, skip):
    batches = iter(loader)
    for _ in range(skip):
        next(batches)
    start, views = time.perf_counter(), 0
    for batch in batches:
        views += sum(len(view) for view in batch[0])
        if time.perf_counter() - start >= seconds:
            break
    return views / (time.perf_counter() - start)


def loader(args):
    import loader_peers as peers

    peers.BATCH = args.batch or 256
    print(f"{args.workers} workers, batches of {peers.BATCH}, {args.rounds} rounds of {args.seconds} s")
    for size, path in zip((32, 112), args.folders):
        if size not in args.sizes:
            continue
        folder, files = peers.files_in(Path(path))
        # Small images are held decoded on both sides, large ones are read and decoded each time.
        source = selfsup._native.Source.of_files([str(file) for file in files], size == 32, None)
        ours = Endless(selfsup.Loader(source, policy(size), peers.BATCH, threads=args.workers, framework="torch"))
        if size == 32:
            for _ in range(len(ours.loader) + 1):
                next(ours)
            files = files[:: max(1, len(files) // 10000)]
        others = {on: peers.Peer(files, size, on, args.workers) for on in ("tensor", "pillow")}
        rounds = []
        for _ in range(args.rounds):
            one = {"ours": ours.measure(args.seconds)}
            for on, peer in others.items():
                views, wall, _ = peer.measure(args.seconds)
                one[on] = views / wall
            rounds.append(one)
        del others
        lightly = lightly_loader(folder, size, peers.BATCH, args.workers)
        of_lightly = [measure_lightly(lightly, args.seconds, 9) for _ in range(2)]
        del lightly
        print(f"\n{size} px, {'images in memory' if size == 32 else 'from JPEG files'}:")
        for side in rounds[0]:
            print(f"  {side:<8} {statistics.median(r[side] for r in rounds):8.0f} views/s")
        print(f"  lightly  {max(of_lightly):8.0f} views/s (from files; best of two rounds)")
        ratios = [r["ours"] / max(r["tensor"], r["pillow"]) for r in rounds]
        print(f"  ratio to the faster peer: {statistics.median(ratios):.2f} ({' '.join(f'{r:.2f}' for r in ratios)})")
        print(f"  ratio to lightly: {statistics.median(r['ours'] for r in rounds) / max(of_lightly):.2f}", flush=True)


def eager_nt_xent(a, b, temperature=0.5):
    z = F.normalize(torch.cat([a, b]))
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-torch.inf)
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(a)))


def eager_info_nce(q, k, queue, temperature=0.07):
    q, k = F.normalize(q), F.normalize(k)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


def eager_sinkhorn(scores):
    from lightly.loss.swav_loss import sinkhorn

    return sinkhorn(scores, iterations=3, epsilon=0.05)


def seconds(loss, inputs):
    """Median time of a loss with its gradient."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        value = loss(*inputs)
        if value.requires_grad:
            torch.autograd.grad(value, [x for x in inputs if x.requires_grad])
        times.append(time.perf_counter() - start)
    return min(times)


def losses(args):
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads; time with the gradient, ratios are medians of {args.rounds} rounds, above 1: ours is faster")
    rows = lambda n, d, grad=True: torch.randn(n, d).requires_grad_(grad)
    queue = F.normalize(torch.randn(65536, 128))
    cases = {}
    for n in (256, 1024, 4096):
        cases[f"nt_xent 2 x [{n}, 128]"] = (own.nt_xent, eager_nt_xent, [rows(n, 128), rows(n, 128)])
    cases["info_nce [256, 128], queue [65536, 128]"] = (
        lambda q, k: own.info_nce(q, k, queue, 0.07),
        lambda q, k: eager_info_nce(q, k, queue, 0.07),
        [rows(256, 128), rows(256, 128, False)],
    )
    cases["neg_cosine [512, 2048]"] = (own.neg_cosine, lambda p, z: -F.cosine_similarity(p, z).mean(), [rows(512, 2048), rows(512, 2048, False)])
    assigned = torch.softmax(torch.randn(512, 3000), 1)
    cases["swapped_prediction [512, 3000]"] = (
        lambda s: own.swapped_prediction(s, assigned),
        lambda s: -(assigned * F.log_softmax(s / 0.1, 1)).sum(1).mean(),
        [rows(512, 3000)],
    )
    cases["sinkhorn [512, 3000]"] = (own.sinkhorn, eager_sinkhorn, [F.normalize(torch.randn(512, 3000))])
    for name, (ours, eager, inputs) in cases.items():
        pairs = [(seconds(ours, inputs), seconds(eager, inputs)) for _ in range(args.rounds)]
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"{name:<42} {1e3 * statistics.median(a for a, _ in pairs):8.2f} ms, eager {1e3 * statistics.median(b for _, b in pairs):8.2f} ms, ratio {ratio:.2f}", flush=True)
    accuracy()
    print("peak memory of nt_xent with its gradient, beyond that of the inputs:")
    for side, counts in (("ours", (4096, 8192, 16384)), ("eager", (4096, 8192, 16384))):
        for n in counts:
            out = subprocess.run([sys.executable, __file__, "peak", side, str(n)], capture_output=True, text=True, check=True).stdout
            print(f"  {side:<6} N = {n:5}: {float(out):8.1f} MB", flush=True)


def accuracy():
    """Error of values and gradients in f32 of an f64 reference, relative to the largest entry."""
    a, b = torch.randn(256, 128, dtype=torch.float64), torch.randn(256, 128, dtype=torch.float64)
    queue = F.normalize(torch.randn(4096, 128, dtype=torch.float64))
    for name, ours, eager in (
        ("nt_xent 0.1", lambda a, b: own.nt_xent(a, b, 0.1), lambda a, b: eager_nt_xent(a, b, 0.1)),
        ("info_nce 0.07", lambda a, b: own.info_nce(a, b, queue.to(a.dtype), 0.07), lambda a, b: eager_info_nce(a, b, queue.to(a.dtype), 0.07)),
        ("neg_cosine", own.neg_cosine, lambda a, b: -F.cosine_similarity(a, b).mean()),
    ):
        found = {}
        for side, loss, dtype in (("want", eager, torch.float64), ("ours", ours, torch.float32), ("eager", eager, torch.float32)):
            x, y = a.to(dtype).requires_grad_(), b.to(dtype).requires_grad_()
            value = loss(x, y)
            found[side] = [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, (x, y)))]
        error = lambda side: [((g - w).abs().max() / w.abs().max()).item() for g, w in zip(found[side], found["want"])]
        print(f"{name:<14} error of the value and both gradients: ours {[f'{e:.0e}' for e in error('ours')]}, eager f32 {[f'{e:.0e}' for e in error('eager')]}")


def peak(args):
    side, rows = args.folders[0], int(args.folders[1])
    loss = own.nt_xent if side == "ours" else eager_nt_xent
    small = [torch.randn(8, 128).requires_grad_() for _ in range(2)]
    loss(*small).backward()
    inputs = [torch.randn(rows // 2, 128).requires_grad_() for _ in range(2)]
    before = high_water()
    loss(*inputs).backward()
    print(high_water() - before)


def high_water():
    """The most memory that this process has had, in MB. (`ru_maxrss` counts that of the process that started it, too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=["loader", "losses", "waiting", "swap", "peak"])
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 112])
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    if args.part != "peak":
        print(f"selfsup {selfsup.__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores; {time.strftime('%Y-%m-%d')}")
    {"loader": loader, "losses": losses, "waiting": waiting, "swap": swap, "peak": peak}[args.part](args)


if __name__ == "__main__":
    main()

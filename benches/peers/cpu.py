#!/usr/bin/env python3
"""Compares selfsup with PyTorch on the CPU in one run: convolutions and complete SimCLR steps in f32 and bf16, peak
memory.

    pip install torch==2.9.1
    python benches/peers/cpu.py [--rounds 5] [--threads 2] [--steps]

Steps of PyTorch run in both memory formats, compiled (`torch.compile`, which needs g++), and in bf16 by autocast, by a network that is
bf16 throughout, and by a compiled one under autocast. All sides take turns, so that noise hits all; ratios are medians over rounds,
ours over PyTorch's fastest in speed (above 1: faster) and in memory (below 1: less). A reading during which other programs used the
processors is taken again; what stays disturbed is left out and named. Our forward convolutions in bf16 also compute the moments of a
batch norm. No test depends on this.
"""

import argparse
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from quiet import Readings

ROOT = Path(__file__).resolve().parents[2]
STEPS = {"resnet18-32": (18, 64, "small", 32, 64), "resnet50-128": (50, 64, "image", 128, 8)}

# PyTorch's ways to run a step, by the precision that they are compared in; names are words that `torch_step` reads.
WAYS = {
    "f32": ["channels_first", "channels_last", "channels_last compiled"],
    "bf16": ["channels_last autocast", "channels_last pure", "channels_last autocast compiled"],
}


def least(budget, f):
    f()
    start, best, runs = time.perf_counter(), math.inf, 0
    while runs < 3 or time.perf_counter() - start < budget:
        before = time.perf_counter()
        f()
        best = min(best, time.perf_counter() - before)
        runs += 1
    return best


def layers():
    """Every distinct convolution of ResNet-50 at 224 pixels: (size, c, k, filter, stride)."""
    found, c = [(224, 3, 64, 7, 2)], 64
    for stage, size in enumerate((56, 28, 14, 7)):
        inner, before = 64 << stage, size if stage == 0 else 2 * size
        stride = 1 if stage == 0 else 2
        found += [(before, c, inner, 1, 1), (before, inner, inner, 3, stride), (before, c, 4 * inner, 1, stride)]
        c = 4 * inner
        found += [(size, c, inner, 1, 1), (size, inner, inner, 3, 1), (size, inner, c, 1, 1)]
    return list(dict.fromkeys(found))


class Ours:
    def __init__(self, threads, precision="f32"):
        command = ["cargo", "bench", "--quiet", "--bench", "peer"]
        subprocess.run([*command, "--no-run"], cwd=ROOT, check=True)
        env = {**os.environ, "RAYON_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [*command, "--", precision], cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def ask(self, request):
        return self.ask_all(request)[0]

    def ask_all(self, request):
        self.process.stdin.write(request + "\n")
        self.process.stdin.flush()
        return [float(word) for word in self.process.stdout.readline().split()]

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def torch_conv(dtype, size, c, k, r, stride):
    """The three directions of a convolution of 8 images, channels last, by name."""
    import torch

    pad = r // 2
    last = {"memory_format": torch.channels_last}
    x = torch.randn(8, c, size, size).to(dtype).contiguous(**last)
    w = torch.randn(k, c, r, r).to(dtype).contiguous(**last)
    dy = torch.randn_like(torch.nn.functional.conv2d(x, w, None, stride, pad)).contiguous(**last)

    def backward(mask):
        return torch.ops.aten.convolution_backward(
            dy, x, w, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1, mask)

    return {
        "forward": lambda: torch.nn.functional.conv2d(x, w, None, stride, pad),
        "data": lambda: backward([True, False, False]),
        "weight": lambda: backward([False, True, False]),
    }


def torch_step(name, way):
    """A SimCLR step as a PyTorch user writes it: torchvision's ResNet, batch norms and all, SGD."""
    import torch
    from torch import nn

    depth, width, stem, size, batch = STEPS[name]

    class Block(nn.Module):
        def __init__(self, c, inner, stride, bottleneck):
            super().__init__()
            k = inner * (4 if bottleneck else 1)
            shapes = [(c, inner, 1, 1), (inner, inner, 3, stride), (inner, k, 1, 1)] if bottleneck else [
                (c, inner, 3, stride), (inner, k, 3, 1)]
            self.convs = nn.ModuleList(
                nn.Conv2d(a, b, r, s, r // 2, bias=False) for a, b, r, s in shapes)
            self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _, _ in shapes)
            self.down = None
            if c != k or stride != 1:
                self.down = nn.Sequential(nn.Conv2d(c, k, 1, stride, bias=False), nn.BatchNorm2d(k))

        def forward(self, x):
            shortcut = x if self.down is None else self.down(x)
            for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
                x = norm(conv(x))
                if i + 1 < len(self.convs):
                    x = torch.relu_(x)
            return torch.relu_(x + shortcut)

    counts, bottleneck = ([2, 2, 2, 2], False) if depth == 18 else ([3, 4, 6, 3], True)
    parts = [nn.Conv2d(3, width, 3, 1, 1, bias=False)] if stem == "small" else [
        nn.Conv2d(3, width, 7, 2, 3, bias=False)]
    parts += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    if stem != "small":
        parts.append(nn.MaxPool2d(3, 2, 1))
    c = width
    for stage, count in enumerate(counts):
        for i in range(count):
            inner = width << stage
            parts.append(Block(c, inner, 2 if stage and i == 0 else 1, bottleneck))
            c = inner * (4 if bottleneck else 1)
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, c, bias=False), nn.BatchNorm1d(c)]
    parts += [nn.ReLU(inplace=True), nn.Linear(c, 128, bias=False), nn.BatchNorm1d(128)]
    net = nn.Sequential(*parts)
    x = torch.rand(2 * batch, 3, size, size) * 2 - 1
    way = way.split()
    if "channels_last" in way:
        net, x = net.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    if "pure" in way:
        net, x = net.to(torch.bfloat16), x.to(torch.bfloat16)
    forward_pass = torch.compile(net) if "compiled" in way else net
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4)
    positives = torch.arange(2 * batch).roll(batch)

    def step():
        """Seconds of the forward pass, the backward pass and the update."""
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in way):
            z = forward_pass(x)
        z = nn.functional.normalize(z.float())
        logits = (z @ z.T / 0.5).fill_diagonal_(-1e9)
        loss = 2 * nn.functional.cross_entropy(logits, positives)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        return forward - start, backward - forward, time.perf_counter() - backward

    return step


# Classes of PyTorch's operators by a part of their name; the first match counts.
CLASSES = {
    "convolution": ("convolution", "mkldnn"),
    "batch norm": ("batch_norm",),
    "relu, add, pooling": ("relu", "threshold", "add_", "pool", "aten::add"),
    "GEMM, loss": ("mm", "softmax", "nll", "norm", "div", "mul"),
}


def torch_classes(step):
    """Share of a step's time in each class of operators, as PyTorch's own profiler tells it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    times = dict.fromkeys([*CLASSES, "other"], 0.0)
    for event in trace.key_averages():
        fits = (name for name, parts in CLASSES.items() if any(part in event.key for part in parts))
        times[next(fits, "other")] += event.self_cpu_time_total
    total = sum(times.values())
    return {name: t / total for name, t in times.items()}


def memory_of(name, threads, precision, side):
    """Peak resident bytes of a process of its own that makes three steps."""
    if side == "ours":
        ours = Ours(threads, precision)
        ours.ask("step " + " ".join(map(str, STEPS[name])))
        peak = ours.ask("memory")
        ours.end()
        return peak
    words = [sys.executable, __file__, "--threads", str(threads), "--memory-of", name, side]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", action="store_true", help="no convolutions, steps alone")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    if args.memory_of:
        step = torch_step(*args.memory_of)
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return

    print(f"PyTorch {torch.__version__}, {args.threads} threads; {time.strftime('%Y-%m-%d')}")
    ours = {precision: Ours(args.threads, precision) for precision in WAYS}
    readings = Readings()
    conv_ratios = {} if args.steps else convolutions(ours["f32"], args.rounds, readings)
    step_ratios, memory_ratios = {}, []
    for name in STEPS:
        for precision in WAYS:
            found = steps(ours[precision], name, precision, args, readings)
            if found:
                step_ratios[name, precision], memory = found
                memory_ratios.append(memory)
    for side in ours.values():
        side.end()

    print("\n" + readings.summary())
    for (name, precision), ratio in step_ratios.items():
        print(f"{name} {'' if precision == 'f32' else precision + ' '}step ratio: {ratio:.2f}")
    for dtype, ratios in conv_ratios.items():
        mean = math.exp(statistics.mean(map(math.log, ratios))) if ratios else math.nan
        print(f"conv{dtype.replace('_', ' ')} speed ratio (geometric mean, worst): {mean:.2f} {min(ratios, default=math.nan):.2f}")
    if memory_ratios:
        print(f"peak memory ratio: {max(memory_ratios):.2f}")


def convolutions(ours, rounds, readings):
    """Prints the speed of every convolution of ResNet-50 and returns the ratios by the suffix of the request."""
    import torch

    conv_ratios = {"": [], "_bf16": []}
    if not ours.ask("tiles"):
        print("no instructions for bf16: ours multiplies bf16 by the f32 kernels, which is for tests")
    print(f"\n{'conv2d, batch 8':<26} {'direction':<9} {'ours':>6} {'PyTorch':>8} {'ratio':>6} {'bf16: ours':>11} {'PyTorch':>8} {'ratio':>6}  GFLOP/s")
    for size, c, k, r, stride in layers():
        theirs = {"": torch_conv(torch.float32, size, c, k, r, stride)}
        theirs["_bf16"] = torch_conv(torch.bfloat16, size, c, k, r, stride)
        for direction in ("forward", "data", "weight"):
            if c == 3 and direction == "data":
                continue  # no gradient flows to images
            row = f"{size:>3} px {c:>4} -> {k:>4} {r}x{r}/{stride:<5} {direction:<9}"
            flop = 2 * 8 * ((size - 1) // stride + 1) ** 2 * k * c * r * r / 1e9
            for dtype, calls in theirs.items():
                request = f"conv{dtype} 8 {size} {size} {4 if c == 3 else c} {k} {r} {stride} {r // 2} {direction}"
                taken = [
                    readings.take(request, lambda: (ours.ask(request), least(0.25, calls[direction])))
                    for _ in range(max(1, rounds // 2))
                ]
                pairs = [pair for pair in taken if pair]
                if not pairs:
                    row += " " * (12 if dtype else 7) + "disturbed".rjust(15)
                    continue
                ratio = statistics.median(their / own for own, their in pairs)
                conv_ratios[dtype].append(ratio)
                own, their = (min(p[i] for p in pairs) for i in (0, 1))
                row += f" {flop / own:{11 if dtype else 6}.0f} {flop / their:8.0f} {ratio:6.2f}"
            print(row, flush=True)
    return conv_ratios


def steps(ours, name, precision, args, readings):
    """Prints the speed of a step in all ways of a precision; returns ours over the fastest, in speed and in memory, or None where
    no reading was undisturbed."""
    shape = STEPS[name]
    ways = {way: torch_step(name, way) for way in WAYS[precision]}
    ratios, best = [], {}
    for _ in range(args.rounds):
        # Each side apart: a round is long enough for a disturbance to meet every one.
        own = readings.take(f"{name} {precision}, ours", lambda: ours.ask("step " + " ".join(map(str, shape))))
        times = {way: readings.take(f"{name}, {way}", lambda: least(2.0, step)) for way, step in ways.items()}
        if None in (own, *times.values()):
            continue
        ratios.append(min(times.values()) / own)
        for key, value in {"ours": own, **times}.items():
            best[key] = min(value, best.get(key, math.inf))
    if not ratios:
        return None
    views = 2 * shape[4]
    print(f"\n{name} in {precision}, SimCLR step of {views} views: " + ", ".join(f"{k} {views / v:.1f} views/s" for k, v in best.items()))
    fastest = min(ways, key=lambda way: best[way])
    own = ours.ask_all("phases " + " ".join(map(str, shape)))
    their = [min(phase) for phase in zip(*(ways[fastest]() for _ in range(5)))]
    print(f"{'phase':<10} {'ours':>9} {'PyTorch':>9}  ({fastest})")
    for phase, a, b in zip(("forward", "backward", "update"), own, their):
        print(f"{phase:<10} {a * 1e3:6.1f} ms {b * 1e3:6.1f} ms  {b / a:5.2f}")
    shares = torch_classes(ways[fastest]).items()
    print("PyTorch's operators: " + ", ".join(f"{name} {share:.0%}" for name, share in shares))
    peaks = {side: memory_of(name, args.threads, precision, side) for side in ("ours", *ways)}
    print("peak memory: " + ", ".join(f"{k} {v / 2**20:.0f} MiB" for k, v in peaks.items()))
    return statistics.median(ratios), peaks["ours"] / min(v for k, v in peaks.items() if k != "ours")


if __name__ == "__main__":
    main()

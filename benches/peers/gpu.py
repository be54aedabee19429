#!/usr/bin/env python3
"""Measures the cases of `selfsup bench` in PyTorch on the same device in the same call, and prints one table.

    pip install torch==2.9.1
    python benches/peers/gpu.py [--device cuda] [--program target/release/selfsup] [--out benches/results/H200.md] [FILTER ...]
    python benches/peers/gpu.py --device cpu --tiny      # on any machine: checks that both sides run

Eager PyTorch, channels last, bf16 on a GPU and f32 on a CPU, cuDNN's own choice of algorithms (`--deterministic` for
bit-reproducible ones); with `--compile` the losses also compiled. Both sides run hot, with the same budget per case, on a GPU many runs
in one graph, so that neither is measured by how fast its host launches. A ratio is PyTorch's median over ours: above 1 we are faster. A share is that of the roofline of `selfsup bench`. With
`--steps FILE` complete SimCLR steps, too: eager, captured in a graph, and compiled; FILE is the bench `peer` as
`scripts/gpu-bundle` or `cargo bench --bench peer --no-run` builds it. `cpu.py` measures complete steps on a CPU.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]


def numbers(name):
    """The sizes in a case's name; the first word is skipped because it may contain a digit."""
    return [int(n) for n in re.findall(r"\d+", name.partition(" ")[2])]


# Cases that copy from or to the host, and that `selfsup bench` does not replay either.
LAUNCHED = ["augment", "knn"]


class Side:
    """PyTorch on a device: allocates operands and times closures."""

    def __init__(self, device, seconds):
        self.device, self.seconds = device, seconds
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def randn(self, *shape, dtype=None):
        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype)

    def images(self, n, h, w, c):
        return self.randn(n, c, h, w).to(memory_format=torch.channels_last)

    def once(self, f):
        if self.device == "cpu":
            start = time.perf_counter()
            f()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        f()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def time(self, f, replay=True):
        """The median seconds of a run; on a GPU, with `replay`, of one of many in a graph."""
        for _ in range(3):
            f()
        times = 1
        if self.device == "cuda":
            torch.cuda.synchronize()
            if replay:
                f, times = self.replayed(f)
        runs = min(1000, max(5, int(self.seconds / max(self.once(f), 1e-9))))
        return statistics.median(self.once(f) for _ in range(runs)) / times

    def replayed(self, f):
        """A graph of runs that take two milliseconds together, as `Bench::measure_replayed` makes it, and their number."""
        times = min(200, max(1, int(2e-3 / max(self.once(f), 1e-9))))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                f()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(times):
                f()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay, times


def convolution(side, name):
    way = name.split(" ")[1]
    n, h, w, c, k, r, _, stride = numbers(name)
    x, weight = side.images(n, h, w, c), side.randn(k, c, r, r).to(memory_format=torch.channels_last)
    pad, args = r // 2, ([r // 2] * 2, [1, 1], False, [0, 0], 1)
    if way == "forward":
        return lambda: F.conv2d(x, weight, stride=stride, padding=pad)
    dy = torch.randn_like(F.conv2d(x, weight, stride=stride, padding=pad))
    mask = [way == "data", way == "weight", False]
    return lambda: torch.ops.aten.convolution_backward(dy, x, weight, None, [stride] * 2, *args, mask)


def forward_and_backward(leaves, f, dy):
    def run():
        for leaf in leaves:
            leaf.grad = None
        f().backward(dy)

    return run


def batch_norm(side, name):
    n, h, w, c = numbers(name)[-4:]
    x, other = side.images(n, h, w, c), side.images(n, h, w, c)
    norm = torch.nn.BatchNorm2d(c, device=side.device).train()
    residual, backward = "+add" in name, "backward" in name

    def f():
        y = norm(x)
        return F.relu(y + other if residual else y)

    if not backward:
        def run():
            with torch.no_grad():
                f()

        return run
    x.requires_grad_(True)
    other.requires_grad_(residual)
    return forward_and_backward([x, other, *norm.parameters()], f, side.images(n, h, w, c))


def max_pool(side, name):
    n, h, w, c = numbers(name)[:4]
    x = side.images(n, h, w, c)
    if "backward" not in name:
        return lambda: F.max_pool2d(x, 3, 2, 1)
    x.requires_grad_(True)
    dy = torch.randn_like(F.max_pool2d(x, 3, 2, 1))
    return forward_and_backward([x], lambda: F.max_pool2d(x, 3, 2, 1), dy)


def mean_pool(side, name):
    n, h, w, c = numbers(name)
    x = side.images(n, h, w, c).requires_grad_(True)
    return forward_and_backward([x], lambda: x.mean((2, 3)), side.randn(n, c))


def add(side, name):
    a, b = (side.images(*numbers(name)) for _ in range(2))
    return lambda: a + b


def linear(side, name):
    m, k, n = numbers(name)
    x, weight = side.randn(m, k), side.randn(n, k)
    return lambda: F.linear(x, weight)


def nt_xent(side, name):
    n, d = numbers(name)
    z = F.normalize(side.randn(n, d, dtype=torch.float32))
    target = torch.arange(n, device=side.device).roll(n // 2)

    def f():
        similar = z @ z.T / 0.5
        similar.fill_diagonal_(-math.inf)
        return F.cross_entropy(similar, target)

    if "backward" not in name:
        return f
    z.requires_grad_(True)
    return forward_and_backward([z], f, None)


def info_nce(side, name):
    n, m, d = numbers(name)
    q, k, queue = (F.normalize(side.randn(rows, d, dtype=torch.float32)) for rows in (n, n, m))
    target = torch.zeros(n, dtype=torch.long, device=side.device)
    f = lambda: F.cross_entropy(torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.2, target)
    if "backward" not in name:
        return f
    q.requires_grad_(True)
    return forward_and_backward([q], f, None)


def l2_normalize(side, name):
    n, d = numbers(name)[-2:]
    x = side.randn(n, d).requires_grad_(True)
    return forward_and_backward([x], lambda: F.normalize(x), side.randn(n, d))


def neg_cosine(side, name):
    n, d = numbers(name)
    p, z = side.randn(n, d).requires_grad_(True), side.randn(n, d)
    return forward_and_backward([p], lambda: -F.cosine_similarity(p, z).mean(), None)


def sinkhorn(side, name):
    b, k = numbers(name)
    scores = side.randn(b, k) * 0.1

    def run():
        q = torch.exp(scores.float() / 0.05).T
        q /= q.sum()
        for _ in range(3):
            q /= q.sum(1, keepdim=True) * k
            q /= q.sum(0, keepdim=True) * b
        return (q * b).T

    return run


def soft_cross_entropy(side, name):
    b, k = numbers(name)
    x = side.randn(b, k).requires_grad_(True)
    q = torch.full((b, k), 1 / k, device=side.device)
    return forward_and_backward([x], lambda: -(q * F.log_softmax(x.float() / 0.1, 1)).sum(1).mean(), None)


def softmax(side, name):
    b, k = numbers(name)
    x = side.randn(b, k)
    return lambda: F.softmax(x.float(), 1)


def knn(side, name):
    n, m, d = numbers(name)
    queries, bank = (F.normalize(side.randn(rows, d, dtype=torch.float32)) for rows in (n, m))
    labels, k = torch.arange(m, device=side.device) % 10, min(200, m)

    def run():
        similar, index = (queries @ bank.T).topk(k, 1)
        votes = torch.zeros(n, 10, device=side.device)
        return votes.scatter_add_(1, labels[index], (similar / 0.1).exp()).argmax(1)

    return run


def weights(side, name):
    """161 tensors, as in ResNet-50, with its number of elements in total."""
    each = int(float(re.search(r"([\d.]+)M", name).group(1)) * 1e6 / 161) + 1
    return [torch.nn.Parameter(side.randn(each, dtype=torch.float32)) for _ in range(161)]


def sgd(side, name):
    params = weights(side, name)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.SGD(params, 1e-3, momentum=0.9, weight_decay=1e-4, foreach=True)
    return optimizer.step


def adam(side, name):
    params = weights(side, name)
    for p in params:
        p.grad = torch.randn_like(p)
    return torch.optim.Adam(params, 1e-3, weight_decay=1e-6, fused=True).step


def lars(side, name):
    params = weights(side, name)
    grads, momenta = ([torch.randn_like(p) for p in params] for _ in range(2))

    @torch.no_grad()
    def run():
        update = torch._foreach_add(grads, params, alpha=1e-6)
        trust = [1e-3 * w / u.clamp(min=1e-12) for w, u in zip(torch._foreach_norm(params), torch._foreach_norm(update))]
        torch._foreach_mul_(update, trust)
        torch._foreach_mul_(momenta, 0.9)
        torch._foreach_add_(momenta, update, alpha=1e-3)
        torch._foreach_sub_(params, momenta)

    return run


def ema(side, name):
    online, target = weights(side, name), weights(side, name)

    @torch.no_grad()
    def run():
        torch._foreach_lerp_(target, online, 0.01)

    return run


def augment(side, name):
    """torchvision's v2 transforms, image by image: each image has its own random parameters."""
    try:
        from torchvision.transforms import v2
    except ImportError:
        return None
    n, size, _ = numbers(name)
    jitter = v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8)
    view = v2.Compose([
        v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.GaussianBlur(size // 10 | 1, (0.1, 2.0))], 0.5), v2.ToDtype(side.dtype, scale=True)])  # fmt: skip
    images = torch.randint(0, 256, (n, 3, 375, 500), dtype=torch.uint8, device=side.device)
    return lambda: torch.stack([view(image) for image in images])


MAKERS = (convolution, batch_norm, max_pool, mean_pool, add, linear, nt_xent, info_nce, l2_normalize, neg_cosine, sinkhorn,
          soft_cross_entropy, softmax, knn, sgd, adam, lars, ema, augment)  # fmt: skip
MAKERS = {("conv2d" if maker is convolution else maker.__name__): maker for maker in MAKERS}
COMPILED = ("nt_xent", "info_nce", "sinkhorn", "soft_cross_entropy")


def ours(args):
    words = ["bench", *args.filter, "--json", "--device", args.device, "--seconds", str(args.seconds)]
    words += ["--tiny"] if args.tiny else []
    done = subprocess.run([args.program, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"`selfsup {' '.join(words)}` failed with {done.returncode}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("filter", nargs="*")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/selfsup")
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch on a CPU")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--steps", type=Path, help="the bench `peer`: measure complete steps, too")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.use_deterministic_algorithms(args.deterministic, warn_only=True)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = ours(args)
    side = Side(args.device, args.seconds)
    dtype = "bf16" if args.device == "cuda" else "f32"
    lines = [
        f"# The primitives compared with PyTorch {torch.__version__}: {rows[0]['device']}, {dtype}, {time.strftime('%Y-%m-%d')}",
        "",
        f"`benches/peers/gpu.py`; copy {rows[0]['copy'] / 1e9:.0f} GB/s, GEMM {rows[0]['gemm'] / 1e9:.0f} GFLOP/s; medians, hot.",
        "",
        "| what | ours us | peer us | ratio | share of roofline |",
        "|---|---:|---:|---:|---:|",
    ]
    groups = {}
    for row in rows:
        name = row["case"]
        group = re.split(r"[ +]", name)[0]
        ours_us = row["hot"][1] * 1e6
        makers = [("", MAKERS.get(group))]
        if args.compile and group in COMPILED:
            makers.append((" (compiled)", MAKERS[group]))
        for what, maker in makers:
            run = maker and maker(side, name)
            if run is None:
                lines.append(f"| {name} | {ours_us:.1f} | no peer | | {row['share']:.2f} |")
                continue
            replay = group not in LAUNCHED
            peer_us = side.time(torch.compile(run) if what else run, replay) * 1e6
            lines.append(f"| {name}{what} | {ours_us:.1f} | {peer_us:.1f} | {peer_us / ours_us:.2f} | {row['share']:.2f} |")
            if not what:
                words = " ".join(name.split(" ")[:2]) if group == "conv2d" else group
                groups.setdefault(words, []).append(math.log(peer_us / ours_us))
            print(lines[-1], file=sys.stderr, flush=True)
    if args.steps:
        import steps  # torchvision's ResNets

        lines += steps.rows(side, args.steps, args.tiny, args.compile)
    lines += ["", "| geometric mean | ratio |", "|---|---:|"]
    lines += [f"| {group} | {math.exp(statistics.fmean(logs)):.2f} |" for group, logs in groups.items()]
    text = "\n".join(lines) + "\n"
    if args.out:
        args.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

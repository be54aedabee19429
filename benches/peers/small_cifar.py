#!/usr/bin/env python3
"""Checks that training here learns what training in PyTorch learns, and how fast: SimCLR on CIFAR-10, small.

    pip install torch==2.9.1 torchvision==0.24.1 pillow==11.3.0 safetensors
    python benches/peers/small_cifar.py CIFAR10                  # three seeds per side, kNN on the test images; up to hours
    python benches/peers/small_cifar.py CIFAR10 --only pytorch   # only the missing cells of PyTorch
    python benches/peers/small_cifar.py CIFAR10 --speed          # only views per second, under two minutes

CIFAR10 is a folder with `train` and `test` folders of class folders of image files. Both sides read the recipe
simclr-cifar10-small: 10,000 images, a quarter of ResNet-18's width, 8 epochs. The weights of a seed are drawn here and given to
both; the random numbers of order and augmentation differ. Augmentation is torchvision's on Pillow images, which selfsup matches bit
for bit. PyTorch's cells are measured once and saved to benches/results/small-cifar-pytorch.json with the library versions; they
are measured again if this script's PyTorch side or the recipe changes. No test depends on this.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import statistics
import subprocess
import tempfile
import time
import tomllib
from pathlib import Path

import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import v2

ROOT = Path(__file__).resolve().parents[2]
CELLS = ROOT / "benches/results/small-cifar-pytorch.json"
NAME = "simclr-cifar10-small"
RECIPE = tomllib.loads((ROOT / f"recipes/{NAME}.toml").read_text())
RECIPE.pop("source", None)  # describes the settings and is none
K, TEMPERATURE, WORKERS, THREADS = 200, 0.1, 2, 2


# ---- PyTorch's side


class Backbone(ResNet):
    """torchvision's ResNet-18 of any width, with a 3x3 stem and without pooling after it."""

    def __init__(self, width):
        nn.Module.__init__(self)
        self._norm_layer = nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = width, 1, 1, 64
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1, self.relu, self.maxpool = nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Identity()
        for i in range(4):
            setattr(self, f"layer{i + 1}", self._make_layer(BasicBlock, width << i, 2, stride=2 if i else 1))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Identity()


class Layer(nn.Linear):
    def __init__(self, inputs, outputs, shift):
        super().__init__(inputs, outputs, bias=False)
        self.norm = nn.BatchNorm1d(outputs)
        if not shift:
            self.norm.bias = None

    def forward(self, x):
        return self.norm(super().forward(x))


class SimClr(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        method, width = RECIPE["method"], RECIPE["network"]["width"]
        self.backbone = Backbone(width)
        layers = [Layer(8 * width, method["hidden"], True), Layer(method["hidden"], method["embedding"], False)]
        self.head = nn.ModuleList(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif isinstance(module, Layer):
                nn.init.normal_(module.weight, std=0.01)

    def forward(self, x):
        return self.head[1](F.relu(self.head[0](self.backbone(x))))


def loss_of(z, temperature):
    """google-research/simclr: the mean over each view, added."""
    z = F.normalize(z)
    logits = (z @ z.T / temperature).fill_diagonal_(-1e9)
    return 2 * F.cross_entropy(logits, torch.arange(len(z)).roll(len(z) // 2))


def rate(step, steps_an_epoch):
    optim, train = RECIPE["optim"], RECIPE["train"]
    peak, warmup = optim["lr"] * train["batch"] / 256, round(optim["warmup_epochs"] * steps_an_epoch)
    if step < warmup:
        return peak * step / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (train["epochs"] * steps_an_epoch - warmup))) / 2


def optimizer_of(network):
    rule = RECIPE["optim"]["rule"]["sgd"]
    return torch.optim.SGD(network.parameters(), 0.0, momentum=rule["momentum"], weight_decay=rule["weight_decay"])


def transform_on(kind):
    """torchvision's transforms on Pillow images, or its second version on tensors, which may be faster."""
    (policy,) = RECIPE["augment"]
    jitter, norm = policy["jitter"], policy["normalise"]
    of = transforms if kind == "pillow" else v2
    colours = of.ColorJitter(jitter["brightness"], jitter["contrast"], jitter["saturation"], jitter["hue"])
    steps = [of.RandomResizedCrop(policy["size"]), of.RandomHorizontalFlip(policy["flip"])]
    steps += [of.RandomApply([colours], jitter["p"]), of.RandomGrayscale(policy["grey"])]
    steps.append(of.ToTensor() if kind == "pillow" else of.ToDtype(torch.float32, scale=True))
    return of.Compose([*steps, of.Normalize(norm["mean"], norm["std"])])


def files_of(folder, limit):
    """Files and classes, in order of their names; `limit` spread over them as selfsup's `Subset::spread` has it."""
    kinds = sorted(kind for kind in folder.iterdir() if kind.is_dir())
    files = [(file, i) for i, kind in enumerate(kinds) for file in sorted(kind.iterdir())]
    return [files[i * len(files) // limit] for i in range(limit)] if limit else files


def decoded(file):
    with Image.open(file) as image:
        return image.convert("RGB")


class Views(Dataset):
    """Two views of each image; images lie decoded in memory."""

    def __init__(self, files, kind):
        self.transform = transform_on(kind)
        self.images = [decoded(file) for file, _ in files]
        if kind == "tensor":
            self.images = [v2.functional.pil_to_tensor(image) for image in self.images]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(self.images[i]), self.transform(self.images[i])


def step(network, optimizer, views, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    loss = loss_of(network(torch.cat(views)), RECIPE["method"]["temperature"])
    loss.backward()
    optimizer.step()
    return loss.item()


@torch.no_grad()
def features(network, files):
    network.eval()
    norm = RECIPE["augment"][0]["normalise"]
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize(norm["mean"], norm["std"])])
    rows = []
    for first in range(0, len(files), 256):
        images = torch.stack([prepare(decoded(file)) for file, _ in files[first : first + 256]])
        rows.append(F.normalize(network.backbone(images)))
    return torch.cat(rows), torch.tensor([kind for _, kind in files])


def knn(bank, queries):
    (bank, classes), (queries, truth) = bank, queries
    right = 0
    for rows, labels in zip(queries.split(256), truth.split(256)):
        similar, nearest = (rows @ bank.T).topk(K)
        votes = torch.zeros(len(rows), int(classes.max()) + 1, dtype=torch.float64)
        votes.scatter_add_(1, classes[nearest], (similar.double() / TEMPERATURE).exp())
        right += (votes.argmax(1) == labels).sum().item()
    return right / len(truth)


def pytorch_cell(data, seed):
    train, settings = files_of(data / "train", RECIPE["data"]["limit"]), RECIPE["train"]
    network = SimClr(seed)
    optimizer = optimizer_of(network)
    loader = DataLoader(
        Views(train, "pillow"), settings["batch"], shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True)
    losses, start = [], time.perf_counter()
    for epoch in range(settings["epochs"]):
        found = [
            step(network, optimizer, views, rate(epoch * len(loader) + i, len(loader))) for i, views in enumerate(loader)]
        losses.append(statistics.mean(found))
        print(f"  pytorch, seed {seed}, epoch {epoch + 1}: loss {losses[-1]:.3f}", flush=True)
    seconds = time.perf_counter() - start
    accuracy = knn(features(network, train), features(network, files_of(data / "test", 0)))
    return {"knn": accuracy, "losses": losses, "seconds": seconds}


PEER = (Backbone, Layer, SimClr, loss_of, rate, optimizer_of, transform_on, files_of, decoded, Views, step, features, knn, pytorch_cell)


def version():
    """Of what decides a cell of PyTorch: this side's code, and the recipe."""
    settings = json.dumps([RECIPE, K, TEMPERATURE], sort_keys=True)
    return hashlib.sha256("".join([settings, *map(inspect.getsource, PEER)]).encode()).hexdigest()[:16]


def pytorch_cells(data, seeds):
    made_by = {"script": version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    made_by["pillow"] = PIL.__version__
    cells = json.loads(CELLS.read_text()) if CELLS.exists() else {}
    for seed in map(str, seeds):
        if cells.get(seed, {}).get("script") != made_by["script"]:
            cell = pytorch_cell(data, int(seed))
            cells[seed] = {**cell, **made_by, "date": time.strftime("%Y-%m-%d")}
            partial = CELLS.with_suffix(".partial")
            partial.write_text(json.dumps(cells, indent=1, sort_keys=True) + "\n")
            partial.replace(CELLS)
    return {seed: cells[str(seed)] for seed in seeds}


def pytorch_speed(loader, memory_format, seconds):
    """Views a second, after what was made before the clock started."""
    network = SimClr(1).train().to(memory_format=memory_format)
    optimizer, batches = optimizer_of(network), iter(loader)

    def one():
        views = [view.contiguous(memory_format=memory_format) for view in next(batches)]
        step(network, optimizer, views, 1e-3)
        return sum(map(len, views))

    for _ in range(WORKERS * loader.prefetch_factor + 2):
        one()
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        done += one()
    return done / (time.perf_counter() - start)


# ---- selfsup's side


def build():
    subprocess.run(["cargo", "build", "--release", "--quiet"], cwd=ROOT, check=True)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return target / "release/selfsup"


def ours(program, data, folder, seed, **settings):
    """Trains from the seed's weights; the records of its epochs."""
    init, out = folder / f"init-{seed}.safetensors", folder / f"run-{time.time_ns()}"
    state = {k: v.contiguous() for k, v in SimClr(seed).state_dict().items() if "num_batches" not in k}
    save_file(state, init)
    settings = {"seed": seed, "data.path": data.resolve(), "train.init": init, "train.threads": THREADS, **settings}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    subprocess.run([program, "train", NAME, "--out", out, *words], check=True, stdout=subprocess.DEVNULL)
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if "epoch" in record]


def our_cell(program, data, folder, seed):
    records = ours(program, data, folder, seed, **{"data.test_limit": 0, "train.knn_every": 0})
    for record in records:
        print(f"  selfsup, seed {seed}, epoch {record['epoch']}: loss {record['loss']:.3f}", flush=True)
    return {"knn": records[-1]["knn"], "losses": [record["loss"] for record in records]}


def our_speed(program, data, folder):
    """Views a second of the epochs after the first, in which files are decoded."""
    limit, epochs = 40 * RECIPE["train"]["batch"], 4
    settings = {"data.limit": limit, "data.test_limit": 64, "train.epochs": epochs, "train.knn_every": 0}
    return statistics.median(record["views_per_second"] for record in ours(program, data, folder, 1, **settings)[1:])


# ---- side by side


def compare_speeds(data, folder, rounds, seconds):
    program, files = build(), files_of(data / "train", 2560)
    peers, found = {}, []
    for kind in ("pillow", "tensor"):
        views = Views(files, kind)
        sampler = RandomSampler(views, num_samples=10**8)
        loader = DataLoader(views, RECIPE["train"]["batch"], sampler=sampler, num_workers=WORKERS, prefetch_factor=4)
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
    difference = statistics.mean(found["selfsup"]) - statistics.mean(found["pytorch"])
    error = math.sqrt(sum(statistics.variance(values) / len(values) for values in found.values()))
    bound = max(1.5, 2 * error)
    print(f"standard error of the difference: {error:.2f} points")
    verdict = "within" if abs(difference) <= bound else "BEYOND"
    print(f"small CIFAR-10 kNN difference: {difference:+.2f} points, {verdict} {bound:.2f}")


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
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, Pillow {PIL.__version__}; {THREADS} threads, "
          f"{WORKERS} workers; {time.strftime('%Y-%m-%d')}")
    with tempfile.TemporaryDirectory() as folder:
        if args.speed:
            compare_speeds(args.data, Path(folder), args.rounds, args.seconds)
        else:
            sides = [args.only] if args.only else ["pytorch", "selfsup"]
            compare_accuracies(args.data, Path(folder), args.seeds, sides)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Checks that the seven methods learn here what they learn in PyTorch: kNN on CIFAR-10 (JPEG), at a budget for two cores.

    pip install torch==2.9.1 torchvision==0.24.1 pillow==11.3.0 safetensors
    python benches/peers/seven.py CIFAR10                               # the missing cells of three seeds per side; an hour
    python benches/peers/seven.py CIFAR10 --side pytorch --only BYOL    # some of them
    python benches/peers/seven.py CIFAR10 --check                       # losses of the first steps on the same images; a minute

CIFAR10 is a folder with `train` and `test` folders of class folders of image files. Both sides read the small recipes with
the changes below: 5,000 images, 4 epochs, an eighth of ResNet-18's width. The weights of a seed are drawn here and given to both;
the random numbers of order and augmentation differ. Each cell is saved to benches/results/seven-SIDE.json as soon as it is
measured, with a digest of its inputs, and measured again if these change: for PyTorch the code of its side and the recipe, for
selfsup the program and the recipe. The table goes to benches/results/DATE-seven.md. No test depends on this.
"""

import argparse
import hashlib
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pytorch
import torch
from common import Cells, difference, recipe, trained
from goldens import philox
from methods import digest, method_of, version
from small_cifar import ROOT, THREADS, build, files_of

SMALLER = {
    "data.limit": 5000, "data.test_limit": 0, "network.width": 8,
    "train.epochs": 4, "train.knn_every": 0,
}
# Changes that turn the recipe of the authors' notebook into the published methods: v1's colour order and step decay; v2's head,
# blur and cosine decay.
V1 = {
    "method.temperature": 0.07, "method.symmetric": False, "augment.grey_first": True,
    "augment.jitter": {"p": 1.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4},
    "optim.decay": {"steps": {"epochs": [3], "factor": 0.1}},
}
V2 = {
    "method.temperature": 0.2, "method.symmetric": False, "method.hidden": 64,
    "augment.blur": {"p": 0.5, "sigma": [0.1, 2.0], "kind": "pillow_box"},
    "optim.decay": "cosine-per-epoch",
}
SEVEN = {
    "MoCo v1": ("moco-v2-cifar10-small", V1),
    "SimCLR": ("simclr-cifar10-small", {}),
    "MoCo v2": ("moco-v2-cifar10-small", V2),
    "SimCLR v2": ("simclr-v2-cifar10-small", {}),
    "SwAV": ("swav-cifar10-small", {"method.freeze_steps": 78}),
    "BYOL": ("byol-cifar10-small", {}),
    "SimSiam": ("simsiam-cifar10-small", {"optim.decay": "cosine-per-epoch"}),
}


def settings_of(title):
    name, changes = SEVEN[title]
    return name, {**SMALLER, **changes}


def pytorch_cell(data, title, seed):
    made_of = recipe(*settings_of(title))
    return pytorch.cell(made_of, method_of(made_of, seed), data, f"{title}, seed {seed}")


def our_cell(program, data, title, seed):
    name, settings = settings_of(title)
    settings = {**settings, "seed": seed, "data.path": str(data.resolve())}
    with tempfile.TemporaryDirectory() as folder:
        records = trained(program, name, settings, method_of(recipe(name, settings), seed).online, Path(folder))
    records = [record for record in records if "epoch" in record]
    losses = [record["loss"] for record in records]
    print(f"  selfsup, {title}, seed {seed}: losses {', '.join(f'{loss:.3f}' for loss in losses)}", flush=True)
    return {"knn": records[-1]["knn"], "losses": losses}


# ---- the first steps, on the same images


STEPS, SEED, ORDER, QUEUE = 8, 1, 2, 7
PLAIN = {
    "augment.area": [1.0, 1.0], "augment.aspect": [1.0, 1.0], "augment.flip": 0.0, "augment.grey": 0.0, "augment.jitter.p": 0.0,
}
PER_METHOD = {"MoCo v2": {"augment.blur.p": 0.0}, "BYOL": {"augment.1.solarise.p": 1.0}}


def unit_rows(rows, d):
    """The rows with which src/methods/moco.rs fills a queue."""
    counter = np.arange(d // 2, dtype=np.uint64)[None], np.arange(rows, dtype=np.uint64)[:, None], 0, QUEUE
    words = np.stack(np.broadcast_arrays(*philox.block((SEED, 0), counter)), 2).reshape(rows, d, 2)
    u, v = (words[..., 0] + 1.0) / 2**32, words[..., 1] / 2**32
    normal = np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)
    return torch.nn.functional.normalize(torch.from_numpy(normal)).float()


def in_png(data, folder):
    """Converts the first images to PNG: JPEG decoders differ by a level or two."""
    for part, count in (("train", 64 * STEPS), ("test", 64)):
        for file, kind in files_of(data / part, count):
            to = folder / part / str(kind) / f"{file.stem}.png"
            to.parent.mkdir(parents=True, exist_ok=True)
            pytorch.decoded(file).save(to)


def check(program, data, title):
    """Compares the losses of the first steps on unaugmented images, in selfsup's order, with its shuffles and its queue."""
    name, settings = settings_of(title)
    changes = {**PLAIN, **PER_METHOD.get(title, {}), "optim.warmup_epochs": 0}
    if title == "SwAV":  # so that the queue and the end of the freeze fall within these steps
        changes |= {"method.freeze_steps": 2, "method.queue_from": 0, "method.queue": 128}
    settings = {**settings, **changes, "seed": SEED, "data.limit": 0, "train.epochs": 1}
    made_of = recipe(name, settings)
    method, batch = method_of(made_of, SEED), made_of["train"]["batch"]
    records = trained(program, name, {**settings, "data.path": str(data)}, method.online, data)
    ours = [record["loss"] for record in records if "epoch" not in record]
    views = pytorch.Views(pytorch.sets_of(made_of, data)[0], made_of)
    order = philox.permutation(len(views), SEED, 0, 0, ORDER).tolist()
    method.permutation = lambda step, half: torch.from_numpy(philox.permutation(batch, SEED, step, half))
    method.unit_rows = unit_rows
    method.start(batch, STEPS, STEPS)
    optimizer, theirs = pytorch.optimizer_of(made_of, method), []
    for i in range(STEPS):
        images = [torch.stack(x) for x in zip(*(views[j] for j in order[i * batch : (i + 1) * batch]))]
        theirs.append(pytorch.step(made_of, method, optimizer, images, i, STEPS))
    apart = [abs(a - b) / max(abs(b), 1) for a, b in zip(ours, theirs)]
    # From equal weights, only rounding differs at first; then it grows.
    agree = apart[0] < 1e-5 and max(apart) < 1e-2
    print(f"{title:9} first loss {ours[0]:.6f} and {theirs[0]:.6f}, apart by " + " ".join(f"{x:.0e}" for x in apart)
          + ("" if agree else "  DIFFERENT"), flush=True)
    return agree


# ---- the table


def spread(values):
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def table(cells, seeds, titles):
    """Lines of the table, and the number of methods whose sides are equal."""
    lines = ["| method | random | PyTorch | selfsup | difference | may be | last loss: PyTorch, selfsup | |", "|---|" + "---:|" * 6 + "---|"]
    equal = 0
    for title in titles:
        of = {side: [of.cells[f"{title} {seed}"] for seed in seeds if f"{title} {seed}" in of.cells] for side, of in cells.items()}
        found = {side: [100 * cell["knn"] for cell in of] for side, of in of.items()}
        columns = [title, spread([100 * cell["random"] for cell in of["pytorch"]]) if of["pytorch"] else "missing"]
        columns += [spread(values) if values else "missing" for values in (found["pytorch"], found["selfsup"])]
        if all(len(values) == len(seeds) > 1 for values in found.values()):
            apart, _, bound = difference(found["selfsup"], found["pytorch"])
            losses = (statistics.mean(cell["losses"][-1] for cell in of[side]) for side in ("pytorch", "selfsup"))
            equal += abs(apart) <= bound
            columns += [f"{apart:+.2f}", f"{bound:.2f}", "{:.3f}, {:.3f}".format(*losses)]
            columns.append("equal" if abs(apart) <= bound else "DIFFERENT")
        else:
            have = ", ".join(f"{len(values)} of {len(seeds)} {side}" for side, values in found.items())
            columns += ["", "", "", f"seeds: {have}"]
        lines.append("| " + " | ".join(columns) + " |")
    return lines, equal


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", choices=SEVEN, metavar="METHOD", nargs="+", default=list(SEVEN), help=", ".join(SEVEN))
    parser.add_argument("--side", choices=["pytorch", "selfsup"], help="measure one side only")
    parser.add_argument("--program", type=Path, help="a selfsup binary, instead of building one")
    parser.add_argument("--check", action="store_true", help="compare the losses of the first steps and do nothing else")
    parser.add_argument("--table", action="store_true", help="measure nothing: print the table of the saved cells")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    sides = [] if args.table else [args.side] if args.side else ["pytorch", "selfsup"]
    program = (args.program or build()) if args.check or "selfsup" in sides else None
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            in_png(args.data, Path(folder))
            agreeing = sum([check(program, Path(folder), title) for title in args.only])
        return print(f"methods that start as PyTorch does: {agreeing} of {len(args.only)}")
    results = ROOT / "benches/results"
    cells = {side: Cells(results / f"seven-{side}.json") for side in ("pytorch", "selfsup")}
    of_program = hashlib.sha256(program.read_bytes()).hexdigest()[:16] if program else ""
    for side in sides:
        for seed in args.seeds:  # all methods of a seed first: a partial table is useful
            for title in args.only:
                by = version(recipe(*settings_of(title))) if side == "pytorch" else digest(of_program, json.dumps(settings_of(title)))
                if not cells[side].made(f"{title} {seed}", by):
                    made = pytorch_cell(args.data, title, seed) if side == "pytorch" else our_cell(program, args.data, title, seed)
                    cells[side].keep(f"{title} {seed}", {**made, "script": by})
    write(results, cells, args.seeds, args.only)


def write(results, cells, seeds, titles):
    lines, equal = table(cells, seeds, titles)
    end = f"methods equal to PyTorch: {equal} of {len(titles)}"
    print("\n" + "\n".join(lines) + f"\n\n{end}")
    if titles != list(SEVEN):
        return
    versions = sorted({", ".join(f"{k} {cell[k]}" for k in pytorch.VERSIONS) for cell in cells["pytorch"].cells.values()})
    text = [
        f"# The seven methods here and in PyTorch, {time.strftime('%Y-%m-%d')}", "",
        "CIFAR-10 (JPEG), 5,000 images, 4 epochs, batches of 64, ResNet-18 of width 8, two cores, f32. Weighted kNN (k 200, T 0.1) on the",
        "backbone's features of 10,000 held-out images, in percent: means and deviations over "
        f"{len(seeds)} seeds, for each of which both sides", "start from the same weights. A difference of means may be 1.5 points or two standard errors,",
        f"whichever is larger. PyTorch's side: {'; '.join(versions)}.", "Made by `benches/peers/seven.py`, which has the settings.", "",
        *lines, "", end]
    (results / f"{time.strftime('%Y-%m-%d')}-seven.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()

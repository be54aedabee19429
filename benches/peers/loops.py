"""Training loops of PyTorch in which selfsup takes the place of parts; run by benches/peers/python.py."""

import copy
import statistics
import time
from pathlib import Path

import loader_peers as peers
import torch
import torchvision
from views import Endless, lightly_loader, policy

import selfsup
import selfsup.torch as own


def waiting(args):
    """The share of a training step of ResNet-18 that is spent waiting for views, and steps a second."""
    batch = args.batch or 64
    peers.BATCH = batch
    print(f"{args.workers} workers, batches of {batch}, {args.rounds} rounds of {args.steps} steps, {torch.get_num_threads()} threads")
    for size, path in zip((32, 112), args.folders):
        if size not in args.sizes:
            continue
        folder, files = peers.files_in(Path(path))
        source = selfsup._native.Source.of_files([str(file) for file in files], False, None)
        lightly = endless(lightly_loader(folder, size, batch, args.workers))
        torchvisions = peers.Peer(files[:: max(1, len(files) // 10000)], size, "tensor", args.workers).batches
        ours = Endless(selfsup.Loader(source, policy(size), batch, threads=args.workers, framework="torch"))
        sides = {
            "selfsup": lambda: next(ours)[0],
            "torchvision": lambda: next(torchvisions),
            "lightly": lambda: next(lightly)[0],
        }
        fixed = [view.clone() for view in sides["selfsup"]()]
        sides["no loader"] = lambda: fixed
        model = torchvision.models.resnet18(num_classes=128)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        rounds = [{side: share(take, model, optimizer, args.steps) for side, take in sides.items()} for _ in range(args.rounds)]
        held = "torchvision's images in memory, the others' from JPEG files" if size == 32 else "all from JPEG files"
        print(f"\n{size} px, {held}; a step of ResNet-18 with 2 x {batch} views:")
        for side in sides:
            waits, seconds = (statistics.median(r[side][i] for r in rounds) for i in (0, 1))
            beside = statistics.median(r[side][1] / r["no loader"][1] for r in rounds)
            print(f"  {side:<12} {1 / seconds:6.3f} steps/s, {100 * waits:5.1f}% of a step waiting, step {beside:.2f} of one without a loader", flush=True)
        del lightly, torchvisions, ours


def endless(loader):
    while True:
        yield from loader


def share(take, model, optimizer, steps):
    """The share of the time of some steps that is spent waiting, and the seconds of a step."""
    # What was prepared while the other sides had their turn does not count.
    for _ in range(10):
        take()
    waited, start = 0.0, time.perf_counter()
    for _ in range(steps):
        begin = time.perf_counter()
        a, b = take()
        waited += time.perf_counter() - begin
        optimizer.zero_grad()
        own.nt_xent(model(a), model(b)).backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    return waited / seconds, seconds / steps


class SimCLR(torch.nn.Module):
    """lightly's examples/pytorch/simclr.py."""

    def __init__(self):
        from lightly.models.modules import SimCLRProjectionHead

        super().__init__()
        backbone = torchvision.models.resnet18()
        self.backbone = torch.nn.Sequential(*list(backbone.children())[:-1])
        self.projection_head = SimCLRProjectionHead(512, 512, 128)

    def forward(self, x):
        return self.projection_head(self.backbone(x).flatten(start_dim=1))


class Stored(torch.utils.data.Dataset):
    """The views of batches as a data set of single images."""

    def __init__(self, batches):
        self.items = [(views, target) for *views, target in (item for batch in batches for item in zip(*batch[0], batch[1]))]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def train(first, batches, loss, make_optimizer, steps, dtype=torch.float32):
    """The losses of the example's loop, and steps a second."""
    model = copy.deepcopy(first).to(dtype)
    optimizer, curve = make_optimizer(model.parameters()), []
    batches, start = iter(batches), time.perf_counter()
    for _ in range(steps):
        (x0, x1), _ = next(batches)
        value = loss(model(x0.to(dtype)), model(x1.to(dtype)))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(value.item())
    return curve, steps / (time.perf_counter() - start)


def nudged(model):
    """The model with weights that differ by one unit in the last place."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.nextafter(p, torch.full_like(p, torch.inf)))
    return model


def swap(args):
    """lightly's examples/pytorch/simclr.py with smaller batches, on the CPU."""
    from lightly.loss import NTXentLoss
    from lightly.utils.lars import LARS

    folder, files = peers.files_in(Path(args.folders[0]))
    batch = args.batch or 64
    # In the layout that a DataLoader stacks views in: PyTorch's convolutions round otherwise in another.
    fresh = lambda: selfsup.Loader(files, policy(32), batch, threads=args.workers, framework="torch", contiguous=True)
    torch.manual_seed(0)
    first = SimCLR()
    # The loop of the original takes the views of our loader from a DataLoader, so that the curves can be compared.
    taken = fresh()
    fixed = [([view.clone() for view in b[0]], b[1]) for _, b in zip(range(args.steps), endless(taken))]
    stored = lambda: torch.utils.data.DataLoader(Stored(fixed), batch_size=batch)
    theirs, their_lars = NTXentLoss(temperature=0.5), lambda p: LARS(p, lr=0.3, momentum=0.9, weight_decay=1e-4)
    our_loss = lambda a, b: own.nt_xent(a, b, 0.5)
    our_lars = lambda p: own.LARS(p, lr=0.3, momentum=0.9, weight_decay=1e-4, variant="larc")
    print(f"lightly's SimCLR example, ResNet-18 at 32 px, batches of {batch}, {args.steps} steps, {torch.get_num_threads()} threads")
    print("largest difference of a step's loss from the original's, of the first ten steps and of all; first and last loss:")
    for dtype, name in ((torch.float32, "f32"), (torch.float64, "f64")):
        original, _ = train(first, stored(), theirs, their_lars, args.steps, dtype)
        print(f"  {name}, the original{'':<29} {original[0]:.4f} {original[-1]:.4f}", flush=True)
        sides = [
            ("our loader and loss", first, fresh(), our_loss, their_lars),
            ("our loader, loss and LARS", first, fresh(), our_loss, our_lars),
        ]
        if dtype == torch.float32:
            sides = [
                ("our loader", first, fresh(), theirs, their_lars),
                *sides,
                ("the original, weights nudged by a rounding", nudged(first), stored(), theirs, their_lars),
            ]
        for what, model, batches, loss, optimizer in sides:
            curve, _ = train(model, endless(batches), loss, optimizer, args.steps, dtype)
            gap = [abs(a - b) for a, b in zip(curve, original)]
            print(f"  {name}, {what:<42} {max(gap[:10]):.1e} {max(gap):.1e} {curve[0]:.4f} {curve[-1]:.4f}", flush=True)
    if args.rounds > 0:
        speeds(args, first, folder, fresh, theirs, their_lars, our_loss, our_lars)


def speeds(args, first, folder, fresh, theirs, their_lars, our_loss, our_lars):
    """Steps a second with each part exchanged; sides take turns."""
    of_lightly, of_ours = endless(lightly_loader(folder, 32, args.batch or 64, args.workers)), endless(fresh())
    pairs = ((batch[0], batch[1]) for batch in of_lightly)
    sides = {
        "lightly": (pairs, theirs, their_lars),
        "+ our loader": (of_ours, theirs, their_lars),
        "+ our loss": (of_ours, our_loss, their_lars),
        "+ our LARS": (of_ours, our_loss, our_lars),
    }
    rounds = []
    for _ in range(args.rounds):
        one = {}
        for side, (batches, loss, optimizer) in sides.items():
            # What was prepared while the other sides had their turn does not count.
            for _ in range(10):
                next(batches)
            _, one[side] = train(first, batches, loss, optimizer, 10)
        rounds.append(one)
    print(f"steps a second, medians of {args.rounds} rounds of 10 steps in turns, beside lightly's in the same round:")
    for side in sides:
        speed = statistics.median(r[side] for r in rounds)
        print(f"  {side:<14} {speed:6.3f}, {statistics.median(r[side] / r['lightly'] for r in rounds):.2f} times", flush=True)

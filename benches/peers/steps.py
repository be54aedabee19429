"""Complete SimCLR steps for `gpu.py`: ours by `benches/peer.rs`, PyTorch's eager, compiled and captured in a graph."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
from goldens import backbones  # noqa: E402

# Depth, width, stem, size, images; two views per image.
STEPS = {"ResNet-50 at 224": (50, 64, "image", 224, 128), "ResNet-18 at 32": (18, 64, "small", 32, 512)}
TINY = {"ResNet-18 at 16": (18, 8, "small", 16, 4)}


class Network(backbones.Backbone):
    def __init__(self, depth, width, stem):
        super().__init__(depth, width, stem)
        features = width * (8 if depth < 50 else 32)
        self.head = nn.Sequential(
            nn.Linear(features, features, bias=False), nn.BatchNorm1d(features), nn.ReLU(inplace=True),
            nn.Linear(features, 128, bias=False), nn.BatchNorm1d(128))  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True
        self.float()

    def forward(self, x):
        return self.head(self._forward_impl(x))


class Step:
    """A SimCLR step as a PyTorch user writes it: channels last, bf16 by autocast on a GPU, SGD over lists."""

    def __init__(self, device, sizes, how):
        depth, width, stem, size, batch = sizes
        self.device, self.batch = device, batch
        self.network = Network(depth, width, stem).to(device, memory_format=torch.channels_last)
        x = torch.rand(2 * batch, 3, size, size, device=device) * 2 - 1
        self.x = x.contiguous(memory_format=torch.channels_last)
        parameters = self.network.parameters()
        self.optimizer = torch.optim.SGD(parameters, 1e-3, momentum=0.9, weight_decay=1e-4, foreach=True)
        self.target = torch.arange(2 * batch, device=device).roll(batch)
        self.loss_of = torch.compile(self.loss) if how == "compiled" else self.loss
        self.graph = self.captured() if how == "captured" else None

    def loss(self):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            z = F.normalize(self.network(self.x).float())
            similar = (z @ z.T / 0.5).fill_diagonal_(-1e9)
            return 2 * F.cross_entropy(similar.float(), self.target)

    def launched(self):
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_of().backward()
        self.optimizer.step()

    def captured(self):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.launched()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.launched()
        return graph

    def __call__(self):
        self.graph.replay() if self.graph else self.launched()


def ours(program, device, sizes):
    """Median seconds per step, on a GPU replayed."""
    request = "median " + " ".join(map(str, sizes)) + "\n"
    words = [program, *(["cuda"] if device == "cuda" else [])]
    env = {**os.environ, "RAYON_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(words, input=request, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode != 0 or not done.stdout.strip():
        sys.exit(f"`{' '.join(map(str, words))}` failed with {done.returncode}")
    return float(done.stdout.split()[0])


def rows(side, program, tiny, with_compile):
    """Rows of the table: `what | ours us | peer us | ratio | views/s of both`."""
    ways = ["eager", *(["compiled"] if with_compile else []), *(["captured"] if side.device == "cuda" else [])]
    for name, sizes in (TINY if tiny else STEPS).items():
        own, views = ours(program, side.device, sizes), 2 * sizes[4]
        for how in ways:
            step = Step(side.device, sizes, how)
            peer = side.time(step, replay=False)  # eager and compiled steps are launched, captured ones replayed
            del step
            yield (f"| SimCLR step, {name}, {views} views ({how}) | {own * 1e6:.0f} | {peer * 1e6:.0f} | {peer / own:.2f} "
                   f"| {views / own:.0f} and {views / peer:.0f} views/s |")  # fmt: skip

#!/usr/bin/env python3
"""Peers of loader.py: SimCLR's views by torchvision, albumentations, kornia and DALI, all on the CPU.

    python benches/peers/loader_peers.py PEER SIZE FOLDER WORKERS

A process makes the views of one peer. It reads seconds from each line of its input, and answers it by views, seconds and CPU
seconds. All peers but DALI work in a DataLoader: persistent worker processes that prefetch, one thread each, and an endless
sampler, so that no epoch ends. Each is as fast as we can make it, and differs from torchvision's pipeline as its library does:

tensor, pillow  torchvision's transforms (v2) on tensors and on Pillow images. Ours gives the pixels of the latter.
albumentations  OpenCV works on images, and PyTorch normalises batches. simplejpeg decodes. Crops are not smoothed where they
                shrink, and hue has 180 steps.
kornia          Its augmentations run on batches, in f32. The crop is torchvision's at 112 px, where files differ in size, and
                kornia's at 32 px, not smoothed. The jitter's four operations come in one order per batch. Jitter and blur are
                computed for all images, and kept for those that draw them.
DALI            A pipeline with a thread per worker. An image is decoded once for both views. Jitter and grey are one linear
                map of colours, in one order, with contrast about mid-grey; the flip is part of normalising. Files are
                shuffled in a window of 1024. No copy of its output is made.

Decoders and crops keep the quality that is their default.
"""

import importlib.util
import os
import sys
import time
from pathlib import Path

BATCH, PREFETCH = 256, 4
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)

# The modules that a peer needs, by the peer's name.
PEERS = {
    "tensor": ("torch", "torchvision"),
    "pillow": ("torch", "torchvision", "PIL"),
    "albumentations": ("torch", "albumentations", "simplejpeg"),
    "kornia": ("torch", "torchvision", "kornia"),
    "DALI": ("nvidia.dali", "PIL"),
}


def missing(peer):
    """The modules that a peer needs and this Python lacks."""

    def lacks(module):
        try:
            return importlib.util.find_spec(module) is None
        except ModuleNotFoundError:  # the package that should hold it
            return True

    return [module for module in PEERS[peer] if lacks(module)]


def files_in(folder):
    folder = folder / "train" if (folder / "train").is_dir() else folder
    files = sorted(file for kind in folder.iterdir() if kind.is_dir() for file in kind.iterdir())
    return folder, [file for file in files if file.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".png")]


def jitter(size):
    """Widths of brightness, contrast, saturation and hue."""
    strength = 0.5 if size == 32 else 1.0
    return 0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength


def pixels(file):
    """An image as an array of height, width and channels."""
    import numpy as np
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


class Views:
    """Two views of each image by torchvision; images are paths, or decoded in memory."""

    def __init__(self, files, size, on):
        self.on, self.in_memory = on, size == 32
        self.transform = self.pipeline(size)
        self.images = [self.read(file) for file in files] if self.in_memory else files

    def pipeline(self, size):
        import torch
        from torchvision.transforms import v2

        steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        steps += [v2.RandomApply([v2.ColorJitter(*jitter(size))], 0.8), v2.RandomGrayscale(0.2)]
        if size != 32:
            steps.append(v2.RandomApply([v2.GaussianBlur(11, (0.1, 2.0))], 0.5))
        if self.on == "pillow":
            steps.append(v2.PILToTensor())
        return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])

    def read(self, file):
        if self.on == "pillow":
            from PIL import Image

            with Image.open(file) as image:
                return image.convert("RGB")
        from torchvision import io

        return io.decode_image(str(file), io.ImageReadMode.RGB)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = self.images[i] if self.in_memory else self.read(self.images[i])
        return self.view(image), self.view(image)

    def view(self, image):
        return self.transform(image)


class Albumentations(Views):
    """Items are pixels; `collate` normalises a batch, which takes less than albumentations' way, image by image."""

    def pipeline(self, size):
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # else it asks a server for its newest version
        import albumentations as A
        import cv2

        cv2.setNumThreads(0)  # the workers inherit it
        steps = [A.RandomResizedCrop((size, size)), A.HorizontalFlip(), A.ColorJitter(*jitter(size), p=0.8), A.ToGray(p=0.2)]
        if size != 32:
            steps.append(A.GaussianBlur((11, 11), (0.1, 2.0), p=0.5))
        return A.Compose(steps)

    def read(self, file):
        import simplejpeg

        return simplejpeg.decode_jpeg(file.read_bytes())

    def view(self, image):
        return self.transform(image=image)["image"]

    def collate(self, items):
        import numpy as np
        import torch

        mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        batches = (torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2) for views in zip(*items))
        layout = {"memory_format": torch.contiguous_format}
        return [batch.to(torch.float32, **layout).sub_(mean).div_(std) for batch in batches]


class Kornia(Views):
    """Items are images in memory, or two crops of an image from a file; `collate` makes the views of a batch."""

    def pipeline(self, size):
        import kornia.augmentation as K
        from torch import nn
        from torchvision.transforms import v2

        self.crop = v2.RandomResizedCrop(size)
        steps = [K.RandomResizedCrop((size, size))] if self.in_memory else []
        steps += [K.RandomHorizontalFlip(), K.ColorJitter(*jitter(size), p=0.8), K.RandomGrayscale(p=0.2)]
        if not self.in_memory:
            steps.append(K.RandomGaussianBlur((11, 11), (0.1, 2.0), p=0.5))
        return nn.Sequential(*steps, K.Normalize(MEAN, STD))

    def __getitem__(self, i):
        if self.in_memory:
            return self.images[i]
        image = self.read(self.images[i])
        return self.crop(image), self.crop(image)

    def collate(self, images):
        import torch

        views = [torch.stack(images)] * 2 if self.in_memory else map(torch.stack, zip(*images))
        return [self.transform(view / 255) for view in views]


def dali(files, size, workers):
    """A pipeline of DALI, built."""
    from nvidia.dali import fn, pipeline_def, types

    def images():
        if size != 32:
            encoded, _ = fn.readers.file(files=[str(file) for file in files], random_shuffle=True, initial_fill=1024)
            return fn.decoders.image(encoded, device="cpu")
        import numpy as np

        held, rng = np.stack([pixels(file) for file in files]), np.random.default_rng()
        return fn.external_source(lambda: held[rng.integers(len(held), size=BATCH)], batch=True, layout="HWC")

    def view(image):
        def drawn(width, about):
            """Uniform within a width for those that draw the jitter, else neutral."""
            return about + jitters * fn.random.uniform(range=[-width, width])

        jitters, colour = fn.random.coin_flip(probability=0.8), fn.random.coin_flip(probability=0.8)
        brightness, contrast, saturation, hue = jitter(size)
        image = fn.random_resized_crop(image, size=[size, size], random_aspect_ratio=[3 / 4, 4 / 3], random_area=[0.08, 1.0])
        image = fn.color_twist(
            image,
            brightness=drawn(brightness, 1.0),
            contrast=drawn(contrast, 1.0),
            saturation=colour * drawn(saturation, 1.0),
            hue=drawn(360 * hue, 0.0),
        )
        if size != 32:  # a window of one pixel changes nothing
            window = 1 + 10 * fn.random.coin_flip()
            image = fn.gaussian_blur(image, window_size=window, sigma=fn.random.uniform(range=[0.1, 2.0]))
        mean, std = ([255 * value for value in values] for values in (MEAN, STD))
        flip = fn.random.coin_flip()
        return fn.crop_mirror_normalize(image, dtype=types.FLOAT, output_layout="CHW", mirror=flip, mean=mean, std=std)

    @pipeline_def(batch_size=BATCH, num_threads=workers, device_id=None)
    def pipeline():
        image = images()
        return view(image), view(image)

    built = pipeline()
    built.build()
    return built


def ticks(pid):
    """CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Peer:
    """Endless batches of a peer's views."""

    def __init__(self, files, size, on, workers):
        self.workers, self.pids = workers, [os.getpid()]
        if on == "DALI":
            pipeline = dali(files, size, workers)
            self.ahead, self.batches = pipeline.prefetch_queue_depth + 1, iter(pipeline.run, None)
            return
        from torch.utils.data import DataLoader, RandomSampler

        data = {"albumentations": Albumentations, "kornia": Kornia}.get(on, Views)(files, size, on)
        loader = DataLoader(
            data,
            batch_size=BATCH,
            sampler=RandomSampler(data, num_samples=10**8),
            collate_fn=getattr(data, "collate", None),
            num_workers=workers,
            persistent_workers=True,
            prefetch_factor=PREFETCH,
        )
        self.ahead, self.batches = workers * PREFETCH + 1, iter(loader)
        self.pids += [worker.pid for worker in self.batches._workers]

    def measure(self, seconds, skip=None):
        """Views, seconds and CPU seconds; views prepared before the clock started do not count."""
        for _ in range(self.ahead if skip is None else skip):
            next(self.batches)
        start, cpu, views, batches = time.perf_counter(), sum(map(ticks, self.pids)), 0, 0
        # Workers end their batches at about the same time, so that whole turns of them count.
        while time.perf_counter() - start < seconds or batches % self.workers:
            views += sum(map(len, next(self.batches)))
            batches += 1
        return views, time.perf_counter() - start, sum(map(ticks, self.pids)) - cpu


def main():
    on, size, folder, workers = sys.argv[1:]
    _, files = files_in(Path(folder))
    if size == "32":
        files = files[:: max(1, len(files) // 10000)]  # enough images to measure a speed
    peer = Peer(files, int(size), on, int(workers))
    skip = None
    for line in sys.stdin:
        print(*peer.measure(float(line), skip), flush=True)
        skip = 1  # between its turns the process stands still and prepares nothing


if __name__ == "__main__":
    main()

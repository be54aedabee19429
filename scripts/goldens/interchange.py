"""Features of torchvision's ResNets for images of odd sizes, with torchvision's resize, crop and normalisation."""

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms

from . import seeded
from .record import record, save
from .backbones import fill

SIZE = 64
# Width, height: smaller and larger than the crop, odd, and the crop's own size.
IMAGES = [(75, 61), (97, 130), (64, 64), (50, 41)]
TRANSFORM = transforms.Compose(
    [
        transforms.Resize(round(SIZE * 8 / 7)),
        transforms.CenterCrop(SIZE),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)


def image(index, width, height):
    values = seeded.bits(seeded.seed(f"image {index}"), width * height * 3) >> np.uint64(56)
    return Image.fromarray(values.astype(np.uint8).reshape(height, width, 3))


def make(path, root):
    images = torch.stack([TRANSFORM(image(i, *size)) for i, size in enumerate(IMAGES)])
    tensors = {}
    for name in ("resnet18", "resnet50"):
        holder = nn.Module()
        holder.backbone = getattr(torchvision.models, name)()
        holder.backbone.fc = nn.Identity()
        fill(holder, name)  # slots have the names of a run
        with torch.no_grad():
            own = holder.backbone.eval()(images)
            truth = holder.double().backbone(images.double())
        tensors[name] = record(truth, own)
    save(tensors, path)

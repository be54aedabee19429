"""PyTorch's side of a run: what a recipe says, in torch and torchvision."""

import itertools
import math
import random
import statistics
import sys
import time

import PIL
import torch
import torch.nn.functional as F
import torchvision
from PIL import ImageFilter
from small_cifar import ROOT, WORKERS, decoded, files_of, knn
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models.resnet import BasicBlock
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pixels

sys.path.insert(0, str(ROOT / "scripts"))
from goldens import backbones  # noqa: E402

FILTERS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
VERSIONS = {"torch": torch.__version__, "torchvision": torchvision.__version__, "pillow": PIL.__version__}


class Backbone(backbones.Backbone):
    """Images `[n, 3, h, w]` to features."""

    def __init__(self, network):
        super().__init__(network["depth"], network["width"], network["stem"], network.get("norm_groups", 1))
        self.features, self.relu.inplace = 8 * network["width"], True
        self.float()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock) and network["zero_init_residual"]:
                nn.init.zeros_(module.bn2.weight)

    forward = torchvision.models.ResNet.forward


# ---- views


class FloatView:
    """A view in floats, clipped after each operation: byol/utils/augmentations.py."""

    def __init__(self, policy):
        self.policy, self.grey = policy, torch.tensor([0.2989, 0.5870, 0.1140])
        self.crop = transforms.RandomResizedCrop(policy["size"], policy.get("area", (0.08, 1.0)))

    def __call__(self, image):
        p, x = self.policy, pixels.to_tensor(image)
        top, left, height, width = self.crop.get_params(x, self.crop.scale, self.crop.ratio)
        x = x[None, :, top : top + height, left : left + width]
        x = F.interpolate(x, (p["size"],) * 2, mode=p["filter"], antialias=True)[0].clamp(0, 1)
        if random.random() < p["flip"]:
            x = x.flip(2)
        if random.random() < p["jitter"]["p"]:
            for change in random.sample((self.brightness, self.contrast, self.saturation, self.hue), 4):
                x = change(x, p["jitter"]).clamp(0, 1)
        if random.random() < p["grey"]:
            x = (self.grey @ x.flatten(1)).view(1, *x.shape[1:]).expand(3, -1, -1)
        if "solarise" in p and random.random() < p["solarise"]["p"]:
            x = torch.where(x < p["solarise"]["threshold"], x, 1 - x)
        return pixels.normalize(x, **p["normalise"])

    def brightness(self, x, jitter):
        assert jitter["additive_brightness"]
        return x + random.uniform(-jitter["brightness"], jitter["brightness"])

    def contrast(self, x, jitter):
        mean = x.mean((1, 2), keepdim=True)
        return (x - mean) * random.uniform(1 - jitter["contrast"], 1 + jitter["contrast"]) + mean

    def saturation(self, x, jitter):
        """In HSV: each channel's distance from the value grows alike, until the saturation is 1."""
        value = x.amax(0)
        most = value / (value - x.amin(0)).clamp_min(1e-12)
        factor = random.uniform(1 - jitter["saturation"], 1 + jitter["saturation"])
        return value - (value - x) * most.clamp_max(factor)

    def hue(self, x, jitter):
        return pixels.adjust_hue(x, random.uniform(-jitter["hue"], jitter["hue"]))


class PillowBlur:
    def __init__(self, blur):
        assert blur["kind"] == "pillow_box"
        self.sigma = blur["sigma"]

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def view_on(policy):
    """torchvision's transforms on Pillow images."""
    if policy.get("pixels") == "float":
        return FloatView(policy)
    jitter = policy["jitter"]
    colours = transforms.ColorJitter(*(jitter.get(key, 0) for key in ("brightness", "contrast", "saturation", "hue")))
    colours, grey = [transforms.RandomApply([colours], jitter["p"])], [transforms.RandomGrayscale(policy["grey"])]
    crop = policy.get("area", (0.08, 1.0)), policy.get("aspect", (3 / 4, 4 / 3))
    steps = [transforms.RandomResizedCrop(policy["size"], *crop, FILTERS[policy.get("filter", "bilinear")])]
    steps.append(transforms.RandomHorizontalFlip(policy["flip"]))
    steps += grey + colours if policy.get("grey_first") else colours + grey
    if "blur" in policy:
        steps.append(transforms.RandomApply([PillowBlur(policy["blur"])], policy["blur"]["p"]))
    if "solarise" in policy:
        steps.append(transforms.RandomSolarize(256 * policy["solarise"]["threshold"], policy["solarise"]["p"]))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(**policy["normalise"])])


class Views(Dataset):
    """The views of each image, two where a recipe has one policy; images lie decoded in memory."""

    def __init__(self, files, recipe):
        policies = [p for policy in recipe["augment"] for p in [policy] * policy.get("repeat", 1)]
        self.views = [view_on(policy) for policy in (policies * 2 if len(policies) == 1 else policies)]
        self.images = [decoded(file) for file, _ in files]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return [view(self.images[i]) for view in self.views]


# ---- steps


def rate(recipe, step, per_epoch):
    optim, train = recipe["optim"], recipe["train"]
    assert optim["lr_rule"] == "linear"
    peak, warmup = optim["lr"] * train["batch"] / 256, round(optim["warmup_epochs"] * per_epoch)
    if step < warmup:
        return peak * step / warmup
    decay = optim.get("decay", "cosine")
    if isinstance(decay, dict):
        passed = sum(step // per_epoch >= epoch for epoch in decay["steps"]["epochs"])
        return peak * decay["steps"]["factor"] ** passed
    if decay == "cosine-per-epoch":
        step = max(step - step % per_epoch, warmup)
    return peak * (1 + math.cos(math.pi * (step - warmup) / (train["epochs"] * per_epoch - warmup))) / 2


def optimizer_of(recipe, method):
    """SGD; parameters whose rate stays at the peak are a group of their own."""
    (name, rule), = recipe["optim"]["rule"].items()
    assert name == "sgd" and rule["exclude"] == "nothing"
    named = list(method.online.named_parameters())
    groups = [
        {"params": [w for name, w in named if name.startswith(method.fixed) == fixed], "fixed": fixed}
        for fixed in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, 0.0, rule["momentum"], nesterov=rule["nesterov"], weight_decay=rule["weight_decay"])


def step(recipe, method, optimizer, views, number, per_epoch):
    """One step of training; its loss."""
    for group in optimizer.param_groups:
        group["lr"] = recipe["optim"]["lr"] * recipe["train"]["batch"] / 256 if group["fixed"] else rate(recipe, number, per_epoch)
    method.before(number)
    optimizer.zero_grad(set_to_none=True)
    loss = method.loss(views)
    loss.backward()
    for name, weight in method.online.named_parameters():
        if name.startswith(method.frozen(number)):
            weight.grad = None
    optimizer.step()
    method.after(number)
    return loss.item()


@torch.no_grad()
def features(recipe, backbone, files):
    backbone.eval()
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize(**recipe["augment"][0]["normalise"])])
    rows = []
    for first in range(0, len(files), 256):
        images = torch.stack([prepare(decoded(file)) for file, _ in files[first : first + 256]])
        rows.append(F.normalize(backbone(images)))
    backbone.train()
    return torch.cat(rows), torch.tensor([kind for _, kind in files])


def accuracy(recipe, backbone, sets):
    """kNN on a backbone's features."""
    return knn(*(features(recipe, backbone, files) for files in sets))


def sets_of(recipe, data):
    limits = recipe["data"]
    return files_of(data / "train", limits.get("limit", 0)), files_of(data / "test", limits.get("test_limit", 0))


def cell(recipe, method, data, title):
    """Trains a fresh method and measures it, before and after."""
    sets, settings = sets_of(recipe, data), recipe["train"]
    untrained = accuracy(recipe, method.online.backbone, sets)
    loader = DataLoader(
        Views(sets[0], recipe), settings["batch"], shuffle=True, drop_last=True, num_workers=WORKERS, persistent_workers=True)
    method.start(settings["batch"], len(loader), settings["epochs"] * len(loader))
    optimizer, losses, count, start = optimizer_of(recipe, method), [], itertools.count(), time.perf_counter()
    for epoch in range(settings["epochs"]):
        losses.append(statistics.mean(step(recipe, method, optimizer, x, next(count), len(loader)) for x in loader))
        print(f"  pytorch, {title}, epoch {epoch + 1}: loss {losses[-1]:.3f}", flush=True)
    seconds = time.perf_counter() - start
    return {"knn": accuracy(recipe, method.online.backbone, sets), "random": untrained, "losses": losses, "seconds": seconds, **VERSIONS}

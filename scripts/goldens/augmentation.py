"""Augmentation by Pillow and torchvision, bit for bit, and by TensorFlow's definitions in numpy's f64.

The name of a tensor is its case, in JSON: the image (a formula that tests/suite/augmentation.rs has too), the policy as a
recipe has it, and the numbers that the policy would draw. 8-bit results are kept as they are, float ones as f32.
"""

import colorsys
import itertools
import json

import numpy as np
import PIL
import torchvision
from PIL import Image, ImageFilter
from safetensors.numpy import save_file
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pil

from . import seeded

# Pillow 12 and later resize tall shapes down first, which differs by a level or two.
PILLOW = "11.3."
COLOURS = ("brightness", "contrast", "saturation", "hue")
JITTER = {"p": 1.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}
LEVELS = (0, 1, 36, 73, 109, 127, 128, 146, 182, 219, 254, 255)
FILTERS = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def image(kind, width, height):
    """`[height, width, 3]`, 8 bits."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    if kind == "levels":  # colours of twelve levels a channel, all of them from 42 x 42 on
        colour = (y * width + x) * 37 % 12**3
        return np.array(LEVELS, np.uint8)[colour // 12**c % 12]
    columns = width // 8 + 2
    noise = seeded.bits(seeded.seed(f"{kind} {width} {height}"), max(height * width, (height // 8 + 2) * columns) * 3)
    noise = (noise >> np.uint64(56)).astype(np.int64)
    if kind == "noise":
        return noise[: height * width * 3].reshape(height, width, 3).astype(np.uint8)
    total = 0  # "clouds": noise every eight pixels, and straight lines between
    for down, across in itertools.product((0, 1), repeat=2):
        weight = (y % 8 if down else 8 - y % 8) * (x % 8 if across else 8 - x % 8)
        total = total + weight * noise[((y // 8 + down) * columns + x // 8 + across) * 3 + c]
    return (total // 64).astype(np.uint8)


class Draws:
    """Numbers for the cases, the nearest f32 of each."""

    def __init__(self, text):
        self.seed, self.count = seeded.seed(text), 0

    def unit(self):
        self.count += 1
        return seeded.bits(self.seed, self.count)[-1] / 2.0**64

    def within(self, low, high):
        return float(np.float32(low + (high - low) * self.unit()))

    def below(self, n):
        return int(self.unit() * n)

    def crop(self, width, height):
        w, h = 1 + self.below(width), 1 + self.below(height)
        return [self.below(width - w + 1), self.below(height - h + 1), w, h]


def case(kind, shape, size, crop=None, policy=None, **params):
    policy = {"size": size, **(policy or {})}
    return {"image": [kind, *shape], "policy": policy, "crop": crop or [0, 0, *shape], **params}


def square(kind, side, policy=None, **params):
    return case(kind, (side, side), side, policy=policy, **params)


def changes(kind, side, policy=None, **factors):
    """One colour operation alone. Without a range of hue there is no turn of it, not even by nothing."""
    hue = 0.5 if "hue" in factors else 0.0
    neutral = {"order": [0, 1, 2, 3], "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    return square(kind, side, {"jitter": {**JITTER, "hue": hue}, **(policy or {})}, jitter={**neutral, **factors})


def jitter(draw, brightness):
    order = list(range(4))
    for i in range(3):
        j = i + draw.below(4 - i)
        order[i], order[j] = order[j], order[i]
    factors = {"brightness": draw.within(*brightness), "contrast": draw.within(0.2, 1.8)}
    return {"order": order, **factors, "saturation": draw.within(0.2, 1.8), "hue": draw.within(-0.2, 0.2)}


# ---- 8 bits: torchvision's transforms on Pillow images


def on_pillow(c):
    x, p = Image.fromarray(image(*c["image"])), c["policy"]
    if c.get("center"):
        side = p["size"]
        return np.asarray(x if x.size == (side, side) else pil.center_crop(pil.resize(x, round(side * 8 / 7)), side))
    left, top, width, height = c["crop"]
    x = pil.resized_crop(x, top, left, height, width, [p["size"]] * 2, FILTERS[p.get("filter", "bilinear")])
    if c.get("flip"):
        x = pil.hflip(x)
    for op in c.get("jitter", {}).get("order", []):
        name = COLOURS[op]
        if p["jitter"][name] > 0:
            x = getattr(pil, f"adjust_{name}")(x, c["jitter"][name])
    if c.get("grey"):
        x = pil.to_grayscale(x, 3)
    if "sigma" in c:
        x = x.filter(ImageFilter.GaussianBlur(c["sigma"]))
    if c.get("solarise"):
        x = pil.solarize(x, 128)
    return np.asarray(x)


def eight_bit_cases():
    draw, box = Draws("augmentation"), {"blur": {"p": 1.0, "kind": "pillow_box"}}
    for i in range(60):  # the published range at twice its width, then far beyond the image
        sigma = float(np.float32(0.1 + 3.9 * i / 48 if i < 48 else 4.0 + 3.0 * (i - 48)))
        yield square(("noise", "clouds")[i % 2], (19, 8, 24, 13, 21)[i % 5], box, sigma=sigma)
    shapes = [(32, 32), (17, 50), (61, 23), (3, 2), (40, 47)]
    for i in range(40):
        shape, size = shapes[i % 5], (7, 16, 24, 31)[i // 5 % 4]
        policy = {"filter": ("bilinear", "bicubic")[i % 2]}
        kind = ("noise", "clouds")[i // 2 % 2]
        yield case(kind, shape, size, draw.crop(*shape), policy, flip=i % 3 == 0)
    yield case("noise", (1, 1), 5)
    yield case("noise", (64, 64), 1)
    yield square("noise", 11, flip=True)
    for shape, size in [((32, 32), 32), ((40, 33), 24), ((23, 50), 13), ((9, 9), 21)]:
        yield case("clouds", shape, size, center=True)
    for kind, side in [("levels", 30), ("clouds", 15)]:
        for factor in (0.0, 1.0, draw.within(0, 1), draw.within(1, 2)):
            for name in COLOURS[:3]:
                yield changes(kind, side, **{name: factor})
        for turn in (0.0, -0.5, 0.5, draw.within(-0.1, 0), draw.within(0, 0.1)):
            yield changes(kind, side, hue=turn)
        yield square(kind, side, grey=True)
        yield square(kind, side, {"solarise": {"p": 1.0}}, solarise=True)
    for i in range(12):
        shape = shapes[i % 5]
        policy = {"jitter": JITTER, "solarise": {"p": 1.0}, **box}
        params = {"flip": i % 2 == 0, "grey": i % 4 == 3, "sigma": draw.within(0.1, 2), "solarise": i % 3 == 0}
        yield case("clouds", shape, 24, draw.crop(*shape), policy, jitter=jitter(draw, (0.2, 1.8)), **params)


# ---- float: tf.image and BYOL's utils/augmentations.py, in f64


def cubic(x):
    """Keys' kernel with a = -1/2."""
    x = np.abs(x)
    return np.where(x < 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0))


def resampling(count, size, filter, antialias):
    """`[size, count]`: pixel centres at half, weights outside left out and the rest brought to a sum of one."""
    scale = count / size
    stretch = max(scale, 1.0) if antialias else 1.0
    distance = (np.arange(count)[None] + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / stretch
    weights = cubic(distance) if filter == "bicubic" else np.maximum(1 - np.abs(distance), 0)
    return weights / weights.sum(1, keepdims=True)


def gaussian(size, sigma):
    """`[size, size]`: int(size / 10 / 2) taps to either side, zeros outside (padding SAME)."""
    radius = int(size / 10 / 2)
    taps = np.exp(-(np.arange(-radius, radius + 1.0) ** 2) / (2.0 * sigma**2))
    taps /= taps.sum()
    return sum(np.eye(size, k=k) * taps[k + radius] for k in range(-radius, radius + 1))


def in_hsv(x, change):
    pixels = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*p))) for p in x.reshape(-1, 3).tolist()]
    return np.array(pixels).reshape(x.shape)


def in_float(c):
    p = c["policy"]
    left, top, width, height = c["crop"]
    x = image(*c["image"]).astype(np.float64)[top : top + height, left : left + width] / 255
    how = p["size"], p.get("filter", "bilinear"), p.get("antialias", True)
    x = np.einsum("yh,xw,hwc->yxc", resampling(height, *how), resampling(width, *how), x).clip(0, 1)
    if c.get("flip"):
        x = x[:, ::-1]
    for op in c.get("jitter", {}).get("order", []):
        name, by = COLOURS[op], c["jitter"][COLOURS[op]]
        if name == "brightness":
            x = x + by if p["jitter"].get("additive_brightness") else x * by
        elif name == "contrast":
            mean = x.mean((0, 1), keepdims=True)
            x = (x - mean) * by + mean
        elif name == "saturation":
            x = in_hsv(x, lambda h, s, v: (h, min(s * by, 1.0), v))
        else:
            x = in_hsv(x, lambda h, s, v: ((h + by) % 1.0, s, v))
        x = x.clip(0, 1)
    if c.get("grey"):
        x = np.repeat((x @ [0.2989, 0.5870, 0.1140])[..., None], 3, -1).clip(0, 1)
    if "sigma" in c:
        taps = gaussian(p["size"], c["sigma"])
        x = np.einsum("yh,xw,hwc->yxc", taps, taps, x)
    if c.get("solarise"):
        assert np.abs(x - 0.5).min() > 1e-5, "a value at the threshold: rounding would decide"
        x = np.where(x < 0.5, x, 1 - x)
    return x


def float_cases():
    draw = Draws("float augmentation")
    for i in range(8):
        shape, size = [(32, 32), (17, 50), (61, 23), (3, 2)][i % 4], (9, 20)[i // 4]
        policy = {"filter": "bilinear" if i == 5 else "bicubic", "antialias": i % 4 == 1}
        yield case("noise", shape, size, draw.crop(*shape), policy, flip=i % 3 == 0)
    for side, sigma in [(21, 0.1), (21, 0.7), (41, 2.0), (19, 2.0)]:
        yield square("noise", side, {"blur": {"p": 1.0}}, sigma=float(np.float32(sigma)))
    added = {"jitter": {**JITTER, "additive_brightness": True, "hue": 0.5}}
    for delta in (-0.4, 0.3):
        yield changes("clouds", 15, added, brightness=float(np.float32(delta)))
    for factor in (0.0, draw.within(0, 1), draw.within(1, 2)):
        for name in COLOURS[:3]:
            yield changes("clouds", 15, **{name: factor})
    yield changes("levels", 20, saturation=draw.within(1, 2))
    for turn in (-0.5, draw.within(-0.1, 0.1)):
        yield changes("levels", 20, hue=turn)
    yield square("levels", 20, grey=True)
    yield square("levels", 20, {"solarise": {"p": 1.0}}, solarise=True)
    for i in range(8):
        shape, additive = [(32, 32), (40, 47)][i % 2], i % 4 < 2
        policy = {"filter": "bicubic", "antialias": False, "jitter": {**JITTER, "additive_brightness": additive}}
        policy |= {"blur": {"p": 1.0}, "solarise": {"p": 1.0}}
        params = {"flip": i % 2 == 0, "grey": i == 3, "sigma": draw.within(0.1, 2), "solarise": i % 4 == 1}
        drawn = jitter(draw, (-0.4, 0.4) if additive else (0.2, 1.8))
        yield case("clouds", shape, 20, draw.crop(*shape), policy, jitter=drawn, **params)


def make(path, root):
    if not PIL.__version__.startswith(PILLOW):
        raise SystemExit(f"augmentation needs Pillow {PILLOW}x, not {PIL.__version__}: pip install pillow==11.3.0")
    tensors = {}
    for cases, result, dtype in [(eight_bit_cases(), on_pillow, np.uint8), (float_cases(), in_float, np.float32)]:
        for c in cases:
            if dtype == np.float32:
                c["policy"]["pixels"] = "float"
            tensors[json.dumps(c, sort_keys=True)] = np.ascontiguousarray(result(c), dtype)
    versions = f"Pillow {PIL.__version__}, torchvision {torchvision.__version__}, numpy {np.__version__}"
    save_file(tensors, path, {"made_by": versions})
    path.chmod(0o644)
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1024:.0f} KiB")

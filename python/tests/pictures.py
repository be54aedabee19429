"""Images for tests, with NumPy alone."""

import struct
import zlib
from pathlib import Path

import numpy as np


def pixels(count, size=24, seed=1):
    """Noise on a gradient, `[count, size, size, 3]`; images of a class share the gradient's direction."""
    draw = np.random.default_rng(seed)
    ramp = np.linspace(0, 160, size)
    images = []
    for i in range(count):
        base = ramp[None, :, None] if i % 2 else ramp[:, None, None]
        noise = draw.integers(0, 60, (size, size, 3))
        images.append(np.clip(base + noise, 0, 255).astype(np.uint8))
    return np.stack(images)


def png(image):
    """A PNG file of an image `[h, w, 3]`."""
    height, width, _ = image.shape

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + row.tobytes() for row in image)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def folder(root, train=48, test=16):
    """A data set of two classes with a held-out split."""
    for split, count, seed in (("train", train, 1), ("test", test, 2)):
        for i, image in enumerate(pixels(count, seed=seed)):
            file = Path(root) / split / ("across" if i % 2 else "down") / f"{i:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(image))
    return str(root)

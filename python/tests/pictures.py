"""Images and signals for tests, with NumPy alone."""

import signal
import struct
import zlib
from pathlib import Path

import numpy as np


def hear_ctrl_c(test):
    """Makes SIGINT an exception for a test, as in a terminal: a shell starts programs in the background deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    test.addCleanup(signal.signal, signal.SIGINT, before)


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
    """A PNG file of an image `[h, w, c]` of one, three or four channels, of 8 or 16 bits."""
    height, width, channels = image.shape
    kind = {1: 0, 3: 2, 4: 6}[channels]
    image = image.astype(image.dtype.newbyteorder(">"))

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    rows = b"".join(b"\0" + row.tobytes() for row in image)
    header = struct.pack(">IIBBBBB", width, height, 8 * image.itemsize, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(image):
    """A TIFF file of an image `[h, w, c]` of integers or floats, uncompressed."""
    height, width, channels = image.shape
    image = image.astype(image.dtype.newbyteorder("<"))
    bits, floats = 8 * image.itemsize, image.dtype.kind == "f"
    pixels, wide = image.tobytes(), 8 + 12 * 10 + 6
    after = wide + 4 * channels
    shorts = lambda value: struct.pack(f"<{channels}H", *[value] * channels)
    # One value of two bytes stands in the entry itself; more stand behind the entries.
    of_channels = lambda value, at: (channels, value if channels < 2 else value | value << 16 if channels == 2 else at)
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, *of_channels(bits, wide)),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, after),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(pixels)),
        (339, 3, *of_channels(3 if floats else 1, wide + 2 * channels)),
    ]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + struct.pack("<I", 0)
    return head + shorts(bits) + shorts(3 if floats else 1) + pixels


def folder(root, train=48, test=16):
    """A data set of two classes with a held-out split."""
    for split, count, seed in (("train", train, 1), ("test", test, 2)):
        for i, image in enumerate(pixels(count, seed=seed)):
            file = Path(root) / split / ("across" if i % 2 else "down") / f"{i:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(image))
    return str(root)

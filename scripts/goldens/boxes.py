#!/usr/bin/env python3
"""Moments of crops drawn by TensorFlow's `sample_distorted_bounding_box` as SimCLR calls it, and of BYOL's clamped boxes.

    pip install tensorflow==2.15.0 safetensors
    python scripts/goldens/boxes.py                  # a minute

TensorFlow's own random numbers differ from selfsup's, so the tests compare moments. A tensor holds, of DRAWS crops of an image:
means, then standard deviations, of the share of the area, width, height, left, top and width over height; then the shares of
crops that cover less than a tenth, two tenths, … nine tenths of the image.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf
from safetensors.numpy import save_file

DRAWS = 40_000
IMAGES = [(500, 375), (375, 500), (32, 32), (160, 213), (90, 30)]  # width, height


def moments(boxes, width, height):
    left, top, w, h = boxes.T
    area = w * h / (width * height)
    columns = np.stack([area, w, h, left, top, w / h], 1).astype(np.float64)
    below = [(area < tenth / 10).mean() for tenth in range(1, 10)]
    return np.concatenate([columns.mean(0), columns.std(0), below])


def distorted(width, height):
    """google-research/simclr, data_util.py: `crop_and_resize` to a square."""
    tf.random.set_seed(1)
    whole = tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4])

    @tf.function
    def draw(number):
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            [height, width, 3], whole, min_object_covered=0.1, aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0), max_attempts=100, use_image_if_no_bounding_boxes=True)  # fmt: skip
        return tf.stack([begin[1], begin[0], size[1], size[0]])

    return tf.map_fn(draw, tf.range(DRAWS)).numpy()


def clamped(width, height):
    """deepmind-research, byol/utils/dataset.py: one box of uniform area and log-uniform aspect, cut to the image."""
    random = np.random.default_rng(1)
    area = width * height * random.uniform(0.08, 1.0, DRAWS)
    aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3), DRAWS))
    w = np.minimum(np.round(np.sqrt(area * aspect)).astype(int), width)
    h = np.minimum(np.round(np.sqrt(area / aspect)).astype(int), height)
    return np.stack([random.integers(0, width - w + 1), random.integers(0, height - h + 1), w, h], 1)


def main():
    path = Path(__file__).resolve().parents[2] / "tests/goldens/boxes.safetensors"
    tensors = {}
    for width, height in IMAGES:
        for name, draw in (("tensorflow", distorted), ("clamped", clamped)):
            tensors[f"{name} {width}x{height}"] = moments(draw(width, height), width, height)
    # One note: several would be written in random order.
    save_file(tensors, path, {"made_by": f"tensorflow {tf.__version__}"})
    path.chmod(0o644)
    for name, numbers in tensors.items():
        print(f"{name}: mean area {numbers[0]:.3f}, below a fifth {numbers[13]:.3f}")


if __name__ == "__main__":
    main()

"""Images in all the forms in which callers have them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from selfsup import _native

Images = Any
"""The path of a data set or an image; an array ``[n, h, w, 3]`` of uint8; or a sequence of paths, of arrays ``[h, w, 3]`` of uint8, or of
Pillow images. Arrays are not copied if they are contiguous."""


def source(
    images: Images, labels: Sequence[int] | None = None, split: str = "train", keep: bool = True
) -> _native.Source:
    """A set of images; ``keep`` says whether images of files stay in memory once they are decoded."""
    if isinstance(images, _native.Source):
        return images
    if isinstance(images, (str, os.PathLike)):
        if labels is not None:
            raise TypeError("labels are those of arrays; a data set at a path has its own")
        path = os.fspath(images)
        return _native.Source.of_files([path], keep) if os.path.isfile(path) else _native.Source.open(path, split)
    if isinstance(images, Sequence) and images and all(isinstance(i, (str, os.PathLike)) for i in images):
        if labels is not None:
            raise TypeError("labels are those of arrays; files are read without")
        return _native.Source.of_files([os.fspath(i) for i in images], keep)
    if hasattr(images, "convert"):
        raise TypeError("one image is given where a sequence of images is needed: write [image]")
    if isinstance(images, np.ndarray) or hasattr(images, "__array__"):
        array = np.asarray(images)
        if array.ndim != 4 or array.shape[-1] != 3:
            raise ValueError(f"an array of images is [n, height, width, 3], not {list(array.shape)}")
        rows: list[NDArray[np.uint8]] = list(pixels(array))
    else:
        rows = [image(i) for i in images]
    if not rows:
        raise ValueError("there are no images")
    return _native.Source.of_arrays(rows, None if labels is None else numbers(labels))


def image(given: Any) -> NDArray[np.uint8]:
    """One image as a contiguous array ``[h, w, 3]``."""
    if hasattr(given, "convert"):
        given = given.convert("RGB")  # Pillow's
    array = np.asarray(given)
    if array.ndim != 3 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"an image is [height, width, 3], not {list(array.shape)}")
    return pixels(array)


def pixels(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The array if it holds contiguous bytes, or a contiguous copy."""
    if array.dtype != np.uint8:
        raise TypeError(f"images are uint8, 0 to 255, not {array.dtype}")
    return cast("NDArray[np.uint8]", np.ascontiguousarray(array))


def numbers(labels: Sequence[int]) -> list[int]:
    """Classes from 0 as a list."""
    array = np.asarray(labels)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and array.min() < 0):
        raise ValueError("labels are one row of integers from 0")
    return cast("list[int]", array.tolist())

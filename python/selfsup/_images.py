"""Images in all the forms in which callers have them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Optional, Union, cast

import numpy as np
from numpy.typing import NDArray

from selfsup import _native

Images = Any
"""The path of a data set or an image; an array ``[n, h, w, c]``, or ``[n, h, w]`` of one channel; or a sequence of paths, of arrays
``[h, w, c]`` or ``[h, w]``, or of Pillow images. Arrays are uint8, uint16 or floats, of which float32 ones are not copied if they are
contiguous, nor are the integers."""

Reading = Union[Mapping[str, Any], Literal["native"], None]
"""How images are read: the keys ``channels``, ``bits``, ``range``, ``pages`` and ``axes`` of a recipe's ``data`` (docs/channels.md)."""

KEYS = ("channels", "bits", "range", "pages", "axes")
"""The keys of a reading."""

FEW = 4
"""An axis of at most so many elements may be that of the channels."""


def source(
    images: Images,
    labels: Sequence[int] | None = None,
    split: str = "train",
    keep: bool = True,
    reading: Reading = None,
    classes: int = 0,
) -> _native.Source:
    """A set of images; ``keep`` says whether images of files stay in memory once they are decoded."""
    if isinstance(images, _native.Source):
        return images
    keys = None if reading is None or reading == "native" else dict(reading)
    if isinstance(images, (str, os.PathLike)):
        if labels is not None:
            raise TypeError("labels are those of arrays; a data set at a path has its own")
        path = os.fspath(images)
        if os.path.isfile(path):
            return _native.Source.of_files([path], keep, keys)
        return _native.Source.open(path, split, _native.native_reading(path) if reading == "native" else keys)
    if are_files(images):
        if labels is not None:
            raise TypeError("labels are those of arrays; files are read without")
        return _native.Source.of_files([os.fspath(i) for i in images], keep, keys)
    arrays = _arrays(images, keys or {})
    if not arrays:
        raise ValueError("there are no images")
    check_floats(arrays, keys)
    return _native.Source.of_arrays(arrays, None if labels is None else numbers(labels), classes, keys)


def are_files(images: Images) -> bool:
    """Whether these are paths."""
    if isinstance(images, (str, os.PathLike)):
        return True
    return isinstance(images, Sequence) and bool(images) and all(isinstance(i, (str, os.PathLike)) for i in images)


def given(data: Images, held_out: Images, reading: Reading) -> tuple[_native.Source, Optional[_native.Source]]:
    """The training and the held-out images of a caller, each alone or with labels, ``(images, labels)``."""
    (images, labels), (others, other_labels) = _pair(data), _pair(held_out)
    if others is not None and (labels is None or other_labels is None):
        raise ValueError(
            "held-out images are compared with labelled training images by their labels: give both as (images, labels)"
        )
    known = [*numbers(labels if labels is not None else []), *numbers(other_labels if other_labels is not None else [])]
    classes = 1 + max(known, default=-1)
    train = source(images, labels, reading=reading, classes=classes)
    return train, None if others is None else source(others, other_labels, reading=reading, classes=classes)


def _pair(given: Images) -> tuple[Images, Optional[Sequence[int]]]:
    return (given[0], given[1]) if isinstance(given, tuple) and len(given) == 2 else (given, None)


def image(given: Any, keys: Mapping[str, Any] | None) -> NDArray[Any]:
    """One image as a contiguous array ``[h, w, c]``."""
    keys = keys or {}
    if hasattr(given, "convert"):
        return _samples(_pillow(given, keys.get("channels")))
    return _one(np.asarray(given), _axes(keys))


def check_floats(arrays: Sequence[NDArray[Any]], keys: Mapping[str, Any] | None) -> None:
    """Fails if floats have no range. A reading that is whole without one is the engine's to refuse."""
    if "range" not in (keys or {}) and any(array.dtype.kind == "f" for array in arrays):
        raise ValueError(
            'images are floats: say which values become black and white with reading={"range": (LOW, HIGH)}, '
            'or where a run is trained with set={"data.range": (LOW, HIGH)}'
        )


def numbers(labels: Sequence[int]) -> list[int]:
    """Classes from 0 as a list."""
    array = np.asarray(labels)
    if array.size == 0 and array.ndim == 1:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError("labels are one row of integers from 0")
    return cast("list[int]", array.tolist())


def _arrays(images: Images, keys: Mapping[str, Any]) -> list[NDArray[Any]]:
    """Contiguous arrays ``[h, w, c]``."""
    if hasattr(images, "convert"):
        raise TypeError("one image is given where a sequence of images is needed: write [image]")
    if not isinstance(images, np.ndarray) and not hasattr(images, "__array__"):
        return [image(i, keys) for i in images]
    array, axes = np.asarray(images), _axes(keys)
    shape = list(array.shape)
    if array.ndim not in (3, 4) or (axes and array.ndim != 1 + len(axes)):
        wanted = f"n{axes}" if axes else "[n, height, width, channels] or [n, height, width]"
        raise ValueError(f"an array of images is {wanted}, not {shape}")
    if not axes and array.ndim == 3 and shape[-1] <= FEW:
        raise ValueError(
            f"an array {shape} may be one image, or {shape[0]} of one channel: write [image], or say reading={{'axes': 'nhw'}}"
        )
    if not axes and array.ndim == 4:
        _check_channels_last(shape[1:], f"an array {shape}", "n")
    if axes == "chw":
        array = np.moveaxis(array, 1, -1)
    # Of all at once, so that a copy is one.
    return list(_samples(array if array.ndim == 4 else array[..., None]))


def _one(array: NDArray[Any], axes: str | None) -> NDArray[Any]:
    shape = list(array.shape)
    if array.ndim not in (2, 3) or 0 in shape or (axes and array.ndim != len(axes)):
        raise ValueError(f"an image is {axes or '[height, width, channels] or [height, width]'}, not {shape}")
    if not axes and array.ndim == 3:
        _check_channels_last(shape, f"an image {shape}", "")
    if axes == "chw":
        array = np.moveaxis(array, 0, -1)
    return _samples(array if array.ndim == 3 else array[..., None])


def _check_channels_last(shape: list[int], what: str, number: str) -> None:
    """Fails if the first of three axes seems to be that of the channels; it is never taken for it unasked."""
    if shape[0] <= FEW < shape[-1]:
        first, last = f"{number}chw", f"{number}hwc"
        raise ValueError(f"{what} seems to have its channels first: say reading={{'axes': '{first}'}}, or '{last}' if not")


def _axes(keys: Mapping[str, Any]) -> str | None:
    """The axes of one image."""
    axes = keys.get("axes")
    known = ("hw", "hwc", "chw")
    if axes is None:
        return None
    if not isinstance(axes, str) or axes.removeprefix("n") not in known:
        raise ValueError(f"axes is {axes!r}; it is one of {', '.join(map(repr, known))}, or of these with an n before it")
    return axes.removeprefix("n")


def _pillow(given: Any, channels: int | None) -> NDArray[Any]:
    """A Pillow image as ``[h, w, c]``: photos in RGB unless other channels are asked for, 16 bits and floats as they are."""
    if given.mode in ("I", "F") or given.mode.startswith("I;16"):
        array = np.asarray(given)
        if array.dtype.kind == "i":
            if array.min() < 0 or array.max() > 65535:
                raise ValueError("a Pillow image of 32 bits has samples that are not within 0 to 65535")
            array = array.astype(np.uint16)
    else:
        array = np.asarray(given.convert({1: "L", 4: "RGBA"}.get(channels or 3, "RGB")))
    return array if array.ndim == 3 else array[..., None]


def _samples(array: NDArray[Any]) -> NDArray[Any]:
    """The array if its samples are contiguous and of a type that the engine reads, or a contiguous copy that is."""
    if array.dtype.kind == "f":
        return np.ascontiguousarray(array, dtype=np.float32)
    if array.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint16).newbyteorder()):
        raise TypeError(f"images are uint8, uint16 or floats, not {array.dtype}")
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))

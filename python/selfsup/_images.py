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

Where = Literal["reading", "set", "run"]
"""Where the caller says how images are read: in ``reading=``, in ``set=``, or nowhere, since they are read as a run's are."""

LABELS = 1 << 24
"""Labels are below it: each may get a name and a count."""

FEW = 4
"""An axis of at most so many elements may be that of the channels."""


def source(
    images: Images,
    labels: Sequence[int] | None = None,
    split: str = "train",
    keep: bool = True,
    reading: Reading = None,
    classes: int = 0,
    where: Where = "reading",
) -> _native.Source:
    """A set of images; ``keep`` says whether images of files stay in memory once they are decoded."""
    if isinstance(images, _native.Source):
        return images
    keys = None if reading is None or reading == "native" else dict(reading)
    if isinstance(images, (str, os.PathLike)):
        if labels is not None:
            raise TypeError("labels are those of arrays and of lists of files; a data set at a path has its own")
        path = os.fspath(images)
        if os.path.isfile(path):
            return _native.Source.of_files([path], None, 0, keep, keys)
        return _native.Source.open(path, split, _native.native_reading(path) if reading == "native" else keys)
    known = None if labels is None else numbers(labels)
    if are_files(images):
        return _native.Source.of_files([os.fspath(i) for i in images], known, classes, keep, keys)
    arrays = _arrays(images, keys or {}, where)
    if not arrays:
        raise ValueError("there are no images")
    check_floats(arrays, keys, where)
    return _native.Source.of_arrays(arrays, known, classes, keys)


def are_files(images: Images) -> bool:
    """Whether these are paths."""
    if isinstance(images, (str, os.PathLike)):
        return True
    return isinstance(images, Sequence) and bool(images) and all(isinstance(i, (str, os.PathLike)) for i in images)


def given(data: Images, held_out: Images, reading: Reading, where: Where) -> tuple[_native.Source, Optional[_native.Source]]:
    """The training and the held-out images of a caller, each alone or with labels, ``(images, labels)``."""
    (images, labels), (others, other_labels) = _pair(data), _pair(held_out)
    if others is not None and (labels is None or other_labels is None):
        raise ValueError(
            "held-out images are compared with labelled training images by their labels: give both as (images, labels)"
        )
    known = [*numbers(labels if labels is not None else []), *numbers(other_labels if other_labels is not None else [])]
    classes = 1 + max(known, default=-1)
    made = [
        None if images is None else source(images, labels, reading=reading, classes=classes, where=where)
        for images, labels in ((images, labels), (others, other_labels))
    ]
    return cast("tuple[_native.Source, Optional[_native.Source]]", tuple(made))


def _pair(given: Images) -> tuple[Images, Optional[Sequence[int]]]:
    return (given[0], given[1]) if isinstance(given, tuple) and len(given) == 2 else (given, None)


def image(given: Any, keys: Mapping[str, Any] | None, where: Where) -> NDArray[Any]:
    """One image as a contiguous array ``[h, w, c]``."""
    keys = keys or {}
    if hasattr(given, "convert"):
        return _samples(_pillow(given, keys.get("channels")))
    return _one(np.asarray(given), _axes(keys), where)


def check_floats(arrays: Sequence[NDArray[Any]], keys: Mapping[str, Any] | None, where: Where) -> None:
    """Fails if floats have no range."""
    if (keys or {}).get("range") is None and any(array.dtype.kind == "f" for array in arrays):
        if where == "run":
            raise ValueError("images are floats, and the run read none: give them with its channels and bits, as uint8 or uint16")
        raise ValueError(f"images are floats: say which values become black and white with {_said(where, 'range', '(LOW, HIGH)')}")


def _said(where: Where, key: str, value: str) -> str:
    """What the caller writes for a key of a reading."""
    return f'set={{"data.{key}": {value}}}' if where == "set" else f'reading={{"{key}": {value}}}'


def plain(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's; all else as it is."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def numbers(labels: Sequence[int]) -> list[int]:
    """Classes from 0 as a list."""
    array = np.asarray(labels)
    if array.size == 0 and array.ndim == 1:
        return []
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError("labels are one row of integers from 0")
    if array.max() >= LABELS:
        raise ValueError(f"a label is {array.max()}; labels count classes, and are below {LABELS}")
    return cast("list[int]", array.tolist())


def _arrays(images: Images, keys: Mapping[str, Any], where: Where) -> list[NDArray[Any]]:
    """Contiguous arrays ``[h, w, c]``."""
    if hasattr(images, "convert"):
        raise TypeError("one image is given where a sequence of images is needed: write [image]")
    if not isinstance(images, np.ndarray) and not hasattr(images, "__array__"):
        return [image(i, keys, where) for i in images]
    array, axes = np.asarray(images), _axes(keys)
    shape = list(array.shape)
    if array.ndim not in (3, 4) or (axes and array.ndim != 1 + len(axes)):
        wanted = f"n{axes}" if axes else "[n, height, width, channels] or [n, height, width]"
        raise ValueError(f"an array of images is {wanted}, not {shape}")
    if not axes and array.ndim == 3 and shape[-1] <= FEW:
        said = "images[..., None]" if where == "run" else "say " + _said(where, "axes", '"nhw"')
        raise ValueError(f"an array {shape} may be one image, or {shape[0]} of one channel: write [image], or {said}")
    if not axes and array.ndim == 4:
        _check_channels_last(shape[1:], f"an array {shape}", "n", where)
    if axes == "chw":
        array = np.moveaxis(array, 1, -1)
    # Of all at once, so that a copy is one.
    return list(_samples(array if array.ndim == 4 else array[..., None]))


def _one(array: NDArray[Any], axes: str | None, where: Where) -> NDArray[Any]:
    shape = list(array.shape)
    if array.ndim not in (2, 3) or 0 in shape or (axes and array.ndim != len(axes)):
        raise ValueError(f"an image is {axes or '[height, width, channels] or [height, width]'}, not {shape}")
    if not axes and array.ndim == 3:
        _check_channels_last(shape, f"an image {shape}", "", where)
    if axes == "chw":
        array = np.moveaxis(array, 0, -1)
    return _samples(array if array.ndim == 3 else array[..., None])


def _check_channels_last(shape: list[int], what: str, number: str, where: Where) -> None:
    """Fails if the first of three axes seems to be that of the channels; it is never taken for it unasked."""
    if shape[0] <= FEW < shape[-1]:
        seems = f"{what} seems to have its channels first"
        if where == "run":
            raise ValueError(f"{seems}: move them last, numpy.moveaxis(images, -3, -1)")
        said = _said(where, "axes", f'"{number}chw"')
        raise ValueError(f'{seems}: say {said}, or "{number}hwc" if not')


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

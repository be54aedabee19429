"""What features are worth."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfsup import _images, _native
from selfsup._recipes import settings
from selfsup._runs import given


def embed(
    weights: str | os.PathLike[str],
    images: _images.Images,
    *,
    arch: str | None = None,
    size: int | None = None,
    split: str = "train",
    device: str | None = None,
    on_images: Callable[[int], object] | None = None,
) -> NDArray[np.float32]:
    """The features of images, ``[n, d]``, one row per image in their order.

    Args:
        weights: a run, the folder of one, or one of its checkpoints; or, with ``arch``, a safetensors file with torchvision's or timm's
            names.
        images: the path of a data set or an image; an array ``[n, h, w, c]`` or ``[n, h, w]`` of uint8, uint16 or floats; or a sequence
            of paths, arrays or Pillow images. They are read as the run reads its own (channels, bits, range); with ``arch`` as RGB of 8
            bits.
        arch: the network of foreign weights: ``"resnet18"`` to ``"resnet152"``, ``"wide_resnet50_2"``, ``"wide_resnet101_2"``.
        size: side of the centre crop in pixels; the recipe's, or 224, without it.
        split: ``"train"`` or ``"test"``, where ``images`` is the path of a data set.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; without it a GPU if there is one, else the CPU.
        on_images: gets the number of images done, from time to time.

    Raises:
        Error: the weights do not fit, an image cannot be read, or features are not finite.
    """
    encoder = _native.Encoder(os.fspath(weights), arch, device)
    reading = encoder.reading
    if not _images.are_files(images):
        del reading["axes"]  # those of the run's files
    source = _images.source(images, split=split, keep=False, reading=reading, where="run")
    return encoder.embed(source, size, on_images or (lambda _: None))


def knn(
    run: str | os.PathLike[str],
    *,
    data: _images.Images = None,
    held_out: _images.Images = None,
    k: int = 200,
    temperature: float = 0.1,
    set: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> dict[str, float]:
    """The accuracy on a run's held-out images of a weighted vote of ``k`` neighbours among its training images, in 0 to 1.

    Returns it for ``"raw pixels"``, for the network at ``"random init"``, and ``"trained"``: a figure means nothing without the two that
    need no training. ``set`` overrides settings of the recipe, such as ``data.path``. ``data`` and ``held_out``, each ``(images, labels)``
    as for :func:`selfsup.train`, take the place of the images at that path.

    Raises:
        Error: the run has no checkpoint, or there are no labelled held-out images.
    """
    return dict(_native.run_knn(os.fspath(run), settings(set), given(run, data, held_out), k, temperature, device))


def linear_probe(
    run: str | os.PathLike[str],
    *,
    data: _images.Images = None,
    held_out: _images.Images = None,
    protocol: str = "cached",
    epochs: int | None = None,
    sweep: bool = False,
    labels: str | None = None,
    set: Mapping[str, Any] | None = None,
    device: str | None = None,
) -> dict[str, float]:
    """The accuracy on a run's held-out images of a linear classifier on its frozen features, in 0 to 1.

    Returns it for the network at ``"random init"``, and ``"trained"``.

    Args:
        run: a run, the folder of one, or one of its checkpoints.
        data, held_out: as for :func:`knn`.
        protocol: how the classifier is trained: ``"cached"`` (quick, on standardised features of centre crops), or as in the published
            code of ``"moco"``, ``"simclr"``, ``"swav"``, ``"byol"``, ``"simsiam"`` or ``"lightly"``.
        epochs: the protocol's without it.
        sweep: choose the learning rate on a tenth of the training images.
        labels: learn from these training images only: ``"10%"`` of each class, or a file that lists them.
        set: settings of the recipe, such as ``data.path``.
        device: as for :func:`embed`.

    Raises:
        Error: the run has no checkpoint, or there are no labelled held-out images.
    """
    images = given(run, data, held_out)
    return dict(_native.run_linear(os.fspath(run), settings(set), images, protocol, epochs, sweep, labels, device))


def knn_accuracy(
    features: Any,
    labels: Sequence[int],
    held_out: Any,
    held_out_labels: Sequence[int],
    *,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """The accuracy, in 0 to 1, of a weighted vote of ``k`` neighbours, from features of any origin (Wu et al. 2018).

    ``features`` is ``[n, d]`` with ``labels`` ``[n]``, ``held_out`` is ``[m, d]``; classes count from 0.
    """
    return _native.knn(_pair(features, labels), _pair(held_out, held_out_labels), k, temperature)


def probe_accuracy(
    features: Any,
    labels: Sequence[int],
    held_out: Any,
    held_out_labels: Sequence[int],
    *,
    per_class: int = 10,
    seed: int = 0,
) -> float:
    """The accuracy, in 0 to 1, of a linear classifier trained to convergence on ``per_class`` rows of each class of standardised features,
    the mean over five draws.

    ``features`` is ``[n, d]`` with ``labels`` ``[n]``, ``held_out`` is ``[m, d]``; classes count from 0.
    """
    return _native.few_label_probe(_pair(features, labels), _pair(held_out, held_out_labels), per_class, seed)


def _pair(features: Any, labels: Sequence[int]) -> tuple[NDArray[np.float32], list[int]]:
    array = np.ascontiguousarray(np.asarray(features), dtype=np.float32)
    if array.ndim != 2:
        raise ValueError(f"features are [n, d], not {list(array.shape)}")
    return array, _images.numbers(labels)

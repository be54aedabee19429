"""Augmented views of images, batch after batch or one image at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from selfsup import _images, _native
from selfsup._recipes import Policies, RecipeLike, policies_of


class Batch(tuple[list[Any], Any]):
    """The views and labels of a batch: ``views, labels = batch``.

    ``views`` is a list with one array ``[batch, 3, s, s]`` (or ``[batch, s, s, 3]``) per view. ``labels`` is ``[batch]`` of int64, -1 for
    images without a class.
    """

    indices: NDArray[np.int64]
    """``[batch]``: the index of each image in the set."""
    epoch: int
    """From 0."""
    position: int
    """The batch's position in its epoch, from 0."""

    @property
    def views(self) -> list[Any]:
        """One array per view."""
        return self[0]

    @property
    def labels(self) -> Any:
        """The class of each image, -1 without one."""
        return self[1]


class Loader:
    """Batches of augmented views, made on threads ahead of their use, without the interpreter's lock.

    Each ``for views, labels in loader`` goes through one epoch, or through the rest of an epoch that was left with ``break`` or that
    :meth:`load_state_dict` went to. The views are a function of seed, epoch, image and view alone, whatever the number of threads. The last
    images of an epoch that do not fill a batch are left out; images that cannot be read are replaced by the next ones and listed in
    :attr:`skipped`.

    Args:
        images: the path of a data set (folders of images, with classes or without; CIFAR's binary files; idx files; what
            ``selfsup pack`` wrote), an array ``[n, h, w, 3]`` of uint8, or a sequence of paths, arrays or Pillow images. Arrays are not
            copied: do not write to them meanwhile.
        recipe: what the views are like: a recipe's name, file or dictionary, which gives the views of its method; or one policy or a list
            of them, dictionaries such as ``{"size": 32, "flip": 0.5, "repeat": 2}`` (``selfsup.recipe(name)["augment"]`` shows the
            keys). Each policy makes one view, or ``repeat`` views.
        batch: images per batch.
        labels: the class of each image, from 0, where ``images`` are arrays.
        split: ``"train"`` or ``"test"``, where ``images`` is a path.
        seed: of the order and of the views.
        threads: that make the views; 0 for one per core.
        channels: ``"first"`` for views ``[batch, 3, s, s]``, ``"last"`` for ``[batch, s, s, 3]``.
        dtype: ``"float32"``, or ``"uint8"`` for views that are not normalised.
        normalise: whether views are normalised as the policy says; if not, they lie in 0 to 1.
        contiguous: whether the channels lie without gaps. The engine makes views of four channels, of which float32 views are strided
            windows, without a copy; PyTorch takes them as they are. ``True`` packs them, in the threads of the call. uint8 views are
            always packed.
        framework: ``"numpy"``, or ``"torch"`` for tensors on the CPU that share the arrays' memory. NumPy's arrays are DLPack too.

    Raises:
        Error: the images cannot be opened, a recipe is unknown, a setting is out of range, or the set holds less than a batch.
        TypeError, ValueError: arguments of another type or shape.
    """

    def __init__(
        self,
        images: _images.Images,
        recipe: RecipeLike | Policies,
        batch: int,
        *,
        labels: Sequence[int] | None = None,
        split: str = "train",
        seed: int = 0,
        threads: int = 0,
        channels: Literal["first", "last"] = "first",
        dtype: Literal["float32", "uint8"] = "float32",
        normalise: bool = True,
        contiguous: bool = False,
        framework: Literal["numpy", "torch"] = "numpy",
    ) -> None:
        _one_of("channels", channels, ("first", "last"))
        _one_of("dtype", dtype, ("float32", "uint8"))
        self._framework = _framework(framework)
        self._source = _images.source(images, labels, split)
        self._native = _native.Loader(
            self._source,
            policies_of(recipe, normalise),
            batch=batch,
            seed=seed,
            threads=threads,
            channels_first=channels == "first",
            bytes=dtype == "uint8",
            contiguous=contiguous,
        )
        self._batches = self._native.batches_per_epoch()
        self._batch, self._seed = batch, seed
        self._next = (0, 0)

    def __len__(self) -> int:
        """Batches per epoch."""
        return self._batches

    @property
    def images(self) -> int:
        """The number of images in the set."""
        return len(self._source)

    @property
    def classes(self) -> list[str]:
        """The names of the classes; empty without labels."""
        return self._source.classes

    @property
    def skipped(self) -> list[tuple[int, str]]:
        """Index and reason of each image so far that could not be read."""
        return self._native.skipped()

    def __iter__(self) -> Iterator[Batch]:
        """The batches of an epoch that have not been taken yet.

        Raises :class:`selfsup.Error` if a file cannot be read for another reason than that it is broken, or the process was forked after
        the loader was made.
        """
        epoch = self._next[0]
        while self._next[0] == epoch:
            yield self._take()

    def _take(self) -> Batch:
        views, labels, indices, epoch, position = self._native.next()
        last = position + 1 == self._batches
        self._next = (epoch + 1, 0) if last else (epoch, position + 1)
        batch = Batch((self._made(views), self._made([np.array(labels, dtype=np.int64)])[0]))
        batch.indices = np.array(indices, dtype=np.int64)
        batch.epoch, batch.position = epoch, position
        return batch

    def _made(self, arrays: list[NDArray[Any]]) -> list[Any]:
        return [self._framework(array) for array in arrays] if self._framework else arrays

    def seek(self, epoch: int, position: int = 0) -> None:
        """Makes a batch of an epoch, both from 0, the next one."""
        self._native.seek(epoch, position)
        self._next = (epoch, position)

    def state_dict(self) -> dict[str, int]:
        """Where the loader is, for a checkpoint: a loader of the same set goes on there with :meth:`load_state_dict`."""
        epoch, position = self._next
        return {"epoch": epoch, "position": position, "seed": self._seed, "batch": self._batch, "images": self.images}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on where another loader was, to the same bits.

        Raises ``ValueError`` if that loader had another seed, batch or number of images.
        """
        for key, own in (("seed", self._seed), ("batch", self._batch), ("images", self.images)):
            if state[key] != own:
                raise ValueError(f"the state is of a loader with {key} {state[key]}, and this one has {own}")
        self.seek(state["epoch"], state["position"])


class Views:
    """The augmented views of one image: the transform of a ``torch.utils.data.Dataset`` of your own.

    ``ImageFolder("photos", transform=selfsup.Views("simclr-imagenet", framework="torch"))`` gives a list of views for each image. It has no
    threads and can be sent to the workers of a ``DataLoader``. Its random numbers come from Python's ``random``, which ``DataLoader`` seeds
    in each worker.

    Args:
        recipe, channels, normalise, framework: as for :class:`Loader`.
    """

    def __init__(
        self,
        recipe: RecipeLike | Policies,
        *,
        channels: Literal["first", "last"] = "first",
        normalise: bool = True,
        framework: Literal["numpy", "torch"] = "numpy",
    ) -> None:
        _one_of("channels", channels, ("first", "last"))
        self._policies = policies_of(recipe, normalise)
        self._first, self._name = channels == "first", framework
        self._start()

    def _start(self) -> None:
        self._native, self._framework = _native.Augmentation(self._policies), _framework(self._name)

    def __call__(self, image: Any, seed: int | None = None) -> list[Any]:
        """The views ``[3, s, s]`` (or ``[s, s, 3]``) of a Pillow image or an array ``[h, w, 3]`` of uint8; of the random numbers of a seed,
        if one is given."""
        seed = random.getrandbits(64) if seed is None else seed
        views = self._native.apply(_images.image(image), seed, self._first)
        return [self._framework(view) for view in views] if self._framework else list(views)

    def __getstate__(self) -> dict[str, Any]:
        return {"_policies": self._policies, "_first": self._first, "_name": self._name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _framework(name: str) -> Any:
    """What makes the framework's arrays of NumPy's; ``None`` for NumPy."""
    _one_of("framework", name, ("numpy", "torch"))
    if name == "numpy":
        return None
    import torch

    return torch.from_numpy


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(map(repr, known))}")

"""Augmented views of images, batch after batch or one image at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from selfsup import _images, _native
from selfsup._recipes import Policies, RecipeLike, policies_of, reading_of, without_none


class Batch(tuple[list[Any], Any]):
    """The views and labels of a batch: ``views, labels = batch``.

    ``views`` is a list with one array ``[batch, c, s, s]`` (or ``[batch, s, s, c]``) per view; c is 3 for photos. ``labels`` is ``[batch]`` of int64, -1 for
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
            ``selfsup pack`` wrote); an array ``[n, h, w, c]`` or ``[n, h, w]`` of uint8, uint16 or floats; or a sequence of paths,
            arrays or Pillow images. Arrays of uint8, uint16 and float32 are not copied: do not write to them meanwhile.
        recipe: what the views are like: a recipe's name, file or dictionary, which gives the views of its method; or one policy or a list
            of them, dictionaries such as ``{"size": 32, "flip": 0.5, "repeat": 2}`` (``selfsup.recipe(name)["augment"]`` shows the
            keys). Each policy makes one view, or ``repeat`` views.
        batch: images per batch.
        labels: the class of each image, from 0 and below 2**24, where ``images`` is no path of a data set.
        split: ``"train"`` or ``"test"``, where ``images`` is a path.
        seed: of the order and of the views.
        threads: that make the views; 0 for one per core.
        channels: ``"first"`` for views ``[batch, c, s, s]``, ``"last"`` for ``[batch, s, s, c]``.
        dtype: ``"float32"``, or ``"uint8"`` for views of 8-bit images that are not normalised.
        normalise: whether views are normalised as the policy says; if not, they lie in 0 to 1.
        contiguous: whether the channels lie without gaps. The engine makes views of four channels (of a multiple of eight for images of
            more than three), of which float32 views are strided windows, without a copy; PyTorch takes them as they are. ``True``
            packs them, in the threads of the call. uint8 views are always packed.
        framework: ``"numpy"``, or ``"torch"`` for tensors that share the arrays' memory. NumPy's arrays are DLPack too. On a GPU
            ``"torch"``, or ``"dlpack"`` for objects of which any library's ``from_dlpack`` makes arrays.
        device: ``"cpu"``, or an NVIDIA GPU, ``"cuda"`` or ``"cuda:1"``, where kernels make the views: to the bit those of the CPU for
            8-bit policies. Threads read the images and draw what happens to them. The views are float32 in the engine's memory on that
            GPU, ready in the consumer's stream without a wait (with ``"torch"`` its current stream at ``next``, which must be the one
            that uses them, or be waited for), strided windows as on the CPU. PyTorch's labels are on the GPU too, ``indices`` never.
        gpu_memory: the most bytes of images that stay on the GPU; half of what is free there without it. A larger set is uploaded
            batch by batch.
        reading: how images that are not RGB of 8 bits are read: a dictionary with any of ``channels`` (1 to 256), ``bits`` (8 or 16),
            ``range`` (``(LOW, HIGH)``, the values that become 0 and the largest sample of 16 bits; floats need it), ``pages``
            (``"channels"`` or ``"images"``, of TIFF files) and ``axes`` (such as ``"nchw"``, of NumPy arrays and files); or
            ``"native"``, as the files of a folder are. Without it as the recipe's ``data`` says; else files are read as RGB of 8 bits,
            and arrays with the channels and bits that they have. Views of other images than RGB of 8 bits need policies with
            ``pixels="float"``.

    Raises:
        Error: the images cannot be opened, a recipe is unknown, a setting is out of range, the set holds less than a batch, or there is
            no such GPU or no driver.
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
        framework: Literal["numpy", "torch", "dlpack"] = "numpy",
        reading: _images.Reading = None,
        device: str = "cpu",
        gpu_memory: int | None = None,
    ) -> None:
        _one_of("channels", channels, ("first", "last"))
        _one_of("dtype", dtype, ("float32", "uint8"))
        on_gpu = device != "cpu"
        if on_gpu and framework == "numpy":
            raise ValueError(f"NumPy has no arrays on {device}: say framework=\"torch\", or \"dlpack\" for other libraries")
        if not on_gpu and (framework == "dlpack" or gpu_memory is not None):
            raise ValueError("framework=\"dlpack\" and gpu_memory are for a GPU: say which with device=\"cuda:0\"")
        self._framework = _framework_on_gpu(framework) if on_gpu else _framework(framework)
        self._labels_on = device if on_gpu and framework == "torch" else None
        self._source = _images.source(images, labels, split, reading=_reading(reading, recipe))
        self._native = _native.Loader(
            self._source,
            policies_of(recipe, normalise),
            batch=batch,
            seed=seed,
            threads=threads,
            channels_first=channels == "first",
            bytes=dtype == "uint8",
            contiguous=contiguous,
            device=device,
            gpu_memory=gpu_memory,
        )
        self._batches = self._native.batches_per_epoch()
        self._batch, self._seed = batch, seed
        self._next = (0, 0)
        # Whether the engine may be elsewhere.
        self._lost = False

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
            try:
                batch, after = self._take()
                self._next = after
            except _native.Error:
                raise
            except BaseException:
                # That of a signal, say: the engine may have handed out a batch that nobody got.
                self._lost = True
                raise
            # Python looks for signals nowhere between the assignment above and the caller's loop.
            yield batch

    def _take(self) -> tuple[Batch, tuple[int, int]]:
        """The next batch, and where the one after it is."""
        made = self._native.next()
        if self._lost and made[3:] != self._next:
            self._native.seek(*self._next)
            made = self._native.next()
        self._lost = False
        views, labels, indices, epoch, position = made
        last = position + 1 == self._batches
        batch = Batch((self._made(views), self._made_labels(np.array(labels, dtype=np.int64))))
        batch.indices = np.array(indices, dtype=np.int64)
        batch.epoch, batch.position = epoch, position
        return batch, (epoch + 1, 0) if last else (epoch, position + 1)

    def _made(self, arrays: list[Any]) -> list[Any]:
        return [self._framework(array) for array in arrays] if self._framework else arrays

    def _made_labels(self, labels: NDArray[np.int64]) -> Any:
        if self._labels_on is None:
            # An array of the host, which "dlpack" leaves as it is.
            return self._framework(labels) if self._framework else labels
        import torch

        return torch.from_numpy(labels).to(self._labels_on)

    def seek(self, epoch: int, position: int = 0) -> None:
        """Makes a batch of an epoch, both from 0, the next one.

        Raises ``ValueError`` if an epoch has no such batch, or the epoch is not below 2**31.
        """
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
        recipe, channels, normalise, framework, reading: as for :class:`Loader`.
    """

    def __init__(
        self,
        recipe: RecipeLike | Policies,
        *,
        channels: Literal["first", "last"] = "first",
        normalise: bool = True,
        framework: Literal["numpy", "torch"] = "numpy",
        reading: Mapping[str, Any] | None = None,
    ) -> None:
        _one_of("channels", channels, ("first", "last"))
        self._policies = policies_of(recipe, normalise)
        self._reading = reading_of(recipe) if reading is None else without_none(reading)
        self._first, self._name = channels == "first", framework
        self._start()

    def _start(self) -> None:
        self._native, self._framework = _native.Augmentation(self._policies, self._reading), _framework(self._name)

    def __call__(self, image: Any, seed: int | None = None) -> list[Any]:
        """The views ``[c, s, s]`` (or ``[s, s, c]``) of a Pillow image or an array ``[h, w, c]`` or ``[h, w]`` of uint8, uint16 or floats; of
        the random numbers of a seed, if one is given."""
        seed = random.getrandbits(64) if seed is None else seed
        array = _images.image(image, self._reading, "reading")
        _images.check_floats([array], self._reading, "reading")
        views = self._native.apply(array, seed, self._first)
        return [self._framework(view) for view in views] if self._framework else list(views)

    def __getstate__(self) -> dict[str, Any]:
        return {"_policies": self._policies, "_reading": self._reading, "_first": self._first, "_name": self._name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _reading(asked: _images.Reading, recipe: RecipeLike | Policies) -> _images.Reading:
    """How images are read: as asked, or else as a recipe says."""
    if asked is None:
        return reading_of(recipe) or None
    return "native" if asked == "native" else without_none(asked)


def _framework(name: str) -> Any:
    """What makes the framework's arrays of NumPy's; ``None`` for NumPy."""
    _one_of("framework", name, ("numpy", "torch"))
    if name == "numpy":
        return None
    import torch

    return torch.from_numpy


def _framework_on_gpu(name: str) -> Any:
    """What makes the framework's arrays of the engine's on a GPU; ``None`` to leave them."""
    _one_of("framework", name, ("torch", "dlpack"))
    if name == "dlpack":
        return None
    from torch.utils.dlpack import from_dlpack

    return from_dlpack


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; it is one of {', '.join(map(repr, known))}")

"""Training runs."""

from __future__ import annotations

import contextlib
import html
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from selfsup import _images, _native
from selfsup._progress import Progress
from selfsup._recipes import RecipeLike, reading_of, settings, text_of

Callback = Callable[[dict[str, Any]], object]
"""Gets a plain dictionary."""

# The types of safetensors that the engine writes.
_TYPES = {"F32": np.float32, "F64": np.float64, "I32": np.int32, "I64": np.int64}


class Run:
    """The folder of a training run: its recipe, metrics, report and checkpoints."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        """The folder."""
        if not (self.path / "recipe.toml").is_file():
            raise _native.Error(f"{self.path}: is not the folder of a run (it has no recipe.toml)")

    def __repr__(self) -> str:
        return f"selfsup.Run({str(self.path)!r})"

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def recipe(self) -> dict[str, Any]:
        """The run's settings."""
        return _native.recipe_dict(text_of(self.path / "recipe.toml"))

    def metrics(self) -> list[dict[str, Any]]:
        """What the run logged, one dictionary per step and per epoch."""
        lines = (self.path / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def report(self, out: str | os.PathLike[str] | None = None) -> Report:
        """The run's report, which a notebook shows; written to the file ``out`` too, if one is named."""
        return Report(_native.report([str(self.path)], None if out is None else os.fspath(out)))

    def backbone(self, framework: Literal["numpy", "torch"] = "numpy") -> dict[str, Any]:
        """The newest weights of the backbone under torchvision's names, as arrays or as tensors: a ``state_dict`` for
        ``load_state_dict`` of torchvision's ResNet whose ``fc`` is ``torch.nn.Identity()``, where the recipe's ``network`` has width 64,
        the stem ``"image"``, and neither ``project`` nor ``sk_ratio`` (docs/python.md says how one with the stem ``"small"`` is taken)."""
        if framework not in ("numpy", "torch"):
            raise ValueError(f"framework is {framework!r}; it is one of 'numpy', 'torch'")
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "backbone.safetensors")
            _native.export(str(self.path), file, False)
            weights = _tensors(file)
        if framework == "numpy":
            return weights
        import torch

        return {name: torch.from_numpy(values) for name, values in weights.items()}

    def export_onnx(self, out: str | os.PathLike[str]) -> None:
        """Writes the newest weights of the backbone as an ONNX model of operator set 17, in evaluation mode with batch norm folded into
        the convolutions: ``input`` ``[batch, 3, height, width]``, normalised as in training, to ``output`` ``[batch, features]``.

        Raises :class:`selfsup.Error` for networks with selective kernels.
        """
        _native.export(str(self.path), os.fspath(out), True)

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()


class Report:
    """A report as one HTML page."""

    def __init__(self, page: str) -> None:
        self.html = page
        """The page."""

    def __repr__(self) -> str:
        return f"selfsup.Report of {len(self.html)} characters; .html is the page"

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.html)}" width="100%" height="800" style="border:0"></iframe>'


def train(
    recipe: RecipeLike,
    data: _images.Images = None,
    out: str | os.PathLike[str] | None = None,
    *,
    held_out: _images.Images = None,
    set: Mapping[str, Any] | None = None,
    device: str | None = None,
    on_step: Callback | None = None,
    on_epoch: Callback | None = None,
    progress: bool = True,
) -> Run:
    """Trains a recipe to its end and returns the run.

    Ctrl-C writes a checkpoint and raises ``KeyboardInterrupt``; so does an exception in a callback, which is raised afterwards.
    :func:`resume` goes on from there, to the bits of a run that was never stopped.

    Args:
        recipe: a built-in recipe's name (:func:`selfsup.recipes`), a recipe file, or a complete recipe as a dictionary.
        data: the path of the data set, as for :class:`selfsup.Loader`; or images in memory, ``images`` or ``(images, labels)``: an array
            ``[n, h, w, c]`` or ``[n, h, w]`` of uint8, uint16 or floats, or a list of paths, arrays or Pillow images. The run reads the
            channels and bits that arrays have; floats need ``data.range`` in ``set``. Without it the recipe's own path.
        held_out: labelled images ``(images, labels)`` that accuracy is measured on, where ``data`` is ``(images, labels)``; a data set at
            a path has its own.
        out: the folder of the run, which must not exist or be empty; ``runs/NAME`` without it.
        set: settings by their path, on top of the recipe: ``{"train.epochs": 20}``.
        device: ``"cpu"``, ``"cuda"`` or ``"cuda:N"``; without it a GPU if there is one, else the CPU.
        on_step: gets ``step``, ``total``, ``loss``, ``lr`` and ``views_per_second`` after each step.
        on_epoch: gets ``epoch``, ``epochs``, ``loss``, ``embedding_std``, ``effective_rank``, ``uniformity``, ``knn``, ``validation``,
            ``accuracy``, ``views_per_second``, ``waiting`` and ``monitors`` after each epoch; what was not measured is ``None``.
        progress: whether to print the run's progress on stderr.

    Raises:
        Error: recipe, data and device do not fit together, the folder is in use, or the run diverged or collapsed.
    """
    changed = dict(set or {})
    if isinstance(data, (str, os.PathLike)):
        changed["data.path"] = os.fspath(data)
        data = None
    reading = {**reading_of(recipe), **{key: changed[f"data.{key}"] for key in _images.KEYS if f"data.{key}" in changed}}
    sources = _given(data, held_out, reading, "set")
    if sources and sources[0].format != (3, 8):
        changed["data.channels"], changed["data.bits"] = sources[0].format
    text = text_of(recipe, changed)
    if out is None:
        name = Path(recipe).stem if isinstance(recipe, (str, os.PathLike)) else "run"
        out = Path("runs") / name
    told = _told(on_step, on_epoch, progress)
    _interruptible(lambda: _native.train(text, os.fspath(out), sources, device, told), out)
    return Run(out)


def resume(
    run: str | os.PathLike[str],
    *,
    data: _images.Images = None,
    held_out: _images.Images = None,
    set: Mapping[str, Any] | None = None,
    device: str | None = None,
    on_step: Callback | None = None,
    on_epoch: Callback | None = None,
    progress: bool = True,
) -> Run:
    """Continues a run from its last checkpoint to its end.

    ``set`` may change settings that do not change results, such as ``train.threads``. A run whose images were in memory needs them again,
    ``data`` and ``held_out``. The other arguments are those of :func:`train`.

    Raises:
        Error: the folder holds no run, another process works in it, or a setting would change the results.
    """
    told = _told(on_step, on_epoch, progress)
    sources = given(run, data, held_out)
    _interruptible(lambda: _native.resume(os.fspath(run), settings(set), sources, device, told), run)
    return Run(run)


def given(run: str | os.PathLike[str], data: _images.Images, held_out: _images.Images) -> _native.Given | None:
    """Images in place of those at the path of a run's recipe, read as the recipe says."""
    folder = Path(run)
    # One of its checkpoints stands for the run.
    recipe = (folder.parent if folder.is_file() else folder) / "recipe.toml"
    if data is None or not recipe.is_file():
        return _given(data, held_out, None, "run")
    return _given(data, held_out, reading_of(recipe), "run")


def _given(
    data: _images.Images, held_out: _images.Images, reading: _images.Reading, where: _images.Where
) -> _native.Given | None:
    if data is not None:
        return _images.given(data, held_out, reading or None, where)
    if held_out is not None:
        raise TypeError("held_out goes with images in memory, data=(images, labels); a data set at a path has a held-out split of its own")
    return None


def _told(on_step: Callback | None, on_epoch: Callback | None, progress: bool) -> _native.Report:
    show = Progress() if progress else None
    callbacks = {"step": on_step, "epoch": on_epoch}

    def told(kind: str, what: dict[str, Any]) -> None:
        if show:
            show(kind, what)
        callback = callbacks.get(kind)
        if callback:
            callback(what)

    return told


def _interruptible(work: Callable[[], None], run: str | os.PathLike[str]) -> None:
    """Runs ``work``; an exception that stopped the run says how the run goes on."""
    try:
        work()
    except BaseException as error:
        stopped = vars(error).get("_selfsup_stopped")
        if stopped is None:
            raise
        sentence = f"{stopped}; selfsup.resume({os.fspath(run)!r}) goes on"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(sentence) from None
        # The caller's exception may take none, and Python 3.10 has none.
        with contextlib.suppress(Exception):
            error.add_note(sentence)  # type: ignore[attr-defined,unused-ignore]
        raise


def _tensors(file: str) -> dict[str, Any]:
    """The tensors of a safetensors file."""
    content = Path(file).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, about in header.items():
        first, last = about["data_offsets"]
        values = np.frombuffer(content[start + first : start + last], dtype=_TYPES[about["dtype"]])
        tensors[name] = values.reshape(about["shape"]).copy()
    return tensors

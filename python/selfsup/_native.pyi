from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION: str

class Error(Exception): ...
class Bug(Error): ...

class Source:
    @staticmethod
    def open(path: str, split: str, reading: Mapping[str, Any] | None) -> Source: ...
    @staticmethod
    def of_files(
        files: Sequence[str],
        labels: Sequence[int] | None,
        classes: int,
        keep: bool,
        reading: Mapping[str, Any] | None,
    ) -> Source: ...
    @staticmethod
    def of_arrays(
        arrays: Sequence[NDArray[Any]],
        labels: Sequence[int] | None,
        classes: int,
        reading: Mapping[str, Any] | None,
    ) -> Source: ...
    def __len__(self) -> int: ...
    @property
    def classes(self) -> list[str]: ...
    @property
    def format(self) -> tuple[int, int]: ...

class GpuArray:
    """Float32 values in the engine's memory on a GPU."""

    @property
    def shape(self) -> list[int]: ...
    def __dlpack__(
        self,
        stream: int | None = None,
        *,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[Any, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

Given = tuple[Source, Source | None]

class Loader:
    def __new__(
        cls,
        source: Source,
        policies: Sequence[Mapping[str, Any]],
        *,
        batch: int,
        seed: int,
        threads: int,
        channels_first: bool,
        bytes: bool,
        contiguous: bool,
        device: str | None,
        gpu_memory: int | None,
    ) -> Loader: ...
    def batches_per_epoch(self) -> int: ...
    def seek(self, epoch: int, position: int) -> None: ...
    def next(self) -> tuple[list[NDArray[Any]] | list[GpuArray], list[int], list[int], int, int]: ...
    def skipped(self) -> list[tuple[int, str]]: ...

class Augmentation:
    def __new__(cls, policies: Sequence[Mapping[str, Any]], reading: Mapping[str, Any] | None) -> Augmentation: ...
    def apply(self, image: NDArray[Any], seed: int, channels_first: bool) -> list[NDArray[np.float32]]: ...

class Encoder:
    def __new__(cls, path: str, arch: str | None, device: str | None) -> Encoder: ...
    @property
    def reading(self) -> dict[str, Any]: ...
    def embed(
        self, source: Source, size: int | None, on_images: Callable[[int], object]
    ) -> NDArray[np.float32]: ...

Report = Callable[[str, dict[str, Any]], object]

def main(words: Sequence[str]) -> int: ...
def recipe_names() -> list[str]: ...
def load_recipe(name: str, settings: Sequence[str]) -> str: ...
def recipe_of_dict(dict: Mapping[str, Any], settings: Sequence[str]) -> str: ...
def recipe_dict(text: str) -> dict[str, Any]: ...
def recipe_policies(text: str) -> list[dict[str, Any]]: ...
def native_reading(folder: str) -> dict[str, Any]: ...
def train(recipe: str, out: str | None, given: Given | None, device: str | None, on_report: Report) -> None: ...
def resume(
    folder: str, settings: Sequence[str], given: Given | None, device: str | None, on_report: Report
) -> None: ...
def run_knn(
    run: str,
    settings: Sequence[str],
    given: Given | None,
    k: int,
    temperature: float,
    device: str | None,
) -> list[tuple[str, float]]: ...
def run_linear(
    run: str,
    settings: Sequence[str],
    given: Given | None,
    protocol: str,
    epochs: int | None,
    sweep: bool,
    labels: str | None,
    device: str | None,
) -> list[tuple[str, float]]: ...
def knn(
    bank: tuple[NDArray[np.float32], Sequence[int]],
    queries: tuple[NDArray[np.float32], Sequence[int]],
    k: int,
    temperature: float,
) -> float: ...
def few_label_probe(
    bank: tuple[NDArray[np.float32], Sequence[int]],
    queries: tuple[NDArray[np.float32], Sequence[int]],
    per_class: int,
    seed: int,
) -> float: ...
def export(run: str, out: str, onnx: bool) -> None: ...
def report(runs: Sequence[str], out: str | None) -> str: ...
def loss_and_gradients(
    name: str,
    inputs: Sequence[NDArray[Any]],
    wanted: Sequence[bool],
    temperature: float,
    threads: int,
) -> tuple[float, list[NDArray[Any] | None]]: ...
def sinkhorn(
    scores: NDArray[Any], epsilon: float, iterations: int, threads: int
) -> NDArray[Any]: ...
def loss_and_gradients_on_gpu(
    name: str,
    inputs: Sequence[Any],
    wanted: Sequence[bool],
    temperature: float,
    stream: int,
) -> tuple[GpuArray, list[GpuArray | None]]: ...
def sinkhorn_on_gpu(scores: Any, epsilon: float, iterations: int, stream: int) -> GpuArray: ...

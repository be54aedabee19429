"""Recipes, selfsup's side of a run, saved cells, and the test of equality of two sides."""

import json
import math
import statistics
import subprocess
import time
import tomllib

from safetensors.torch import save_file
from small_cifar import ROOT, THREADS


def recipe(name, settings):
    """A recipe of the program with `{"key.path": value}` applied as `--set` does."""
    found = tomllib.loads((ROOT / f"recipes/{name}.toml").read_text())
    found.pop("source", None)  # describes the settings and is none
    for path, value in settings.items():
        *parents, last = path.split(".")
        for table in tables(found, parents):
            table[last] = value
    return found


def tables(at, path):
    """The tables at a path; of an array all tables, or one by its index."""
    if isinstance(at, list):
        if path and path[0].isdigit():
            return tables(at[int(path[0])], path[1:])
        return [table for item in at for table in tables(item, path)]
    return tables(at.setdefault(path[0], {}), path[1:]) if path else [at]


def toml(value):
    """A value as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def trained(program, name, settings, network, folder):
    """Trains by a recipe from the weights of a PyTorch module; returns the lines of its metrics."""
    init, out = folder / "init.safetensors", folder / f"run-{time.time_ns()}"
    save_file({k: v.contiguous() for k, v in network.state_dict().items() if "num_batches" not in k}, init)
    settings = {**settings, "train.init": str(init), "train.threads": THREADS}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={toml(value)}")]
    subprocess.run([program, "train", name, "--device", "cpu", "--out", out, *words], check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Cells:
    """Results by name in a file, each with a digest of its inputs; the file is replaced atomically."""

    def __init__(self, path):
        self.path = path
        self.cells = json.loads(path.read_text()) if path.exists() else {}

    def made(self, name, by):
        """The cell if it was measured from the same inputs, else None."""
        cell = self.cells.get(name)
        return cell if cell and cell["script"] == by else None

    def keep(self, name, cell):
        self.cells[name] = {**cell, "date": time.strftime("%Y-%m-%d")}
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.cells, indent=1, sort_keys=True) + "\n")
        partial.replace(self.path)
        return self.cells[name]


def difference(ours, theirs):
    """Two sides' percentages: the difference of means, its standard error, and its bound."""
    error = math.sqrt(sum(statistics.variance(side) / len(side) for side in (ours, theirs)))
    return statistics.mean(ours) - statistics.mean(theirs), error, max(1.5, 2 * error)

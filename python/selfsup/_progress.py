"""A run's progress on a terminal, in a notebook, or as lines in a log."""

from __future__ import annotations

import sys
import time
from typing import Any

PLAIN_EVERY = 10.0
"""Seconds between two lines where a line cannot be replaced."""


def in_notebook() -> bool:
    """Whether a notebook shows the output."""
    shell = sys.modules.get("IPython")
    return shell is not None and "IPKernelApp" in getattr(shell.get_ipython(), "config", {})


class Progress:
    """Prints reports on stderr."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty() or in_notebook()
        self._last = 0.0 if self._live else time.monotonic()
        self._width = 0
        self._start = time.monotonic()

    def __call__(self, kind: str, what: dict[str, Any]) -> None:
        """Shows a report."""
        if kind == "start":
            line = "{method} on {images} images; batch {batch}, {total} steps".format(**what)
            self._line(line if what["step"] == 0 else f"{line}, going on after step {what['step']}")
        elif kind == "note":
            self._line(what["sentence"])
        elif kind == "step":
            self._step(what)
        elif kind == "epoch":
            self._line(_epoch(what))

    def _step(self, what: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last < (0.1 if self._live else PLAIN_EVERY):
            return
        self._last = now
        figures = "loss {loss:.3f}, lr {lr:.4f}, {views_per_second:.0f} views/s".format(**what)
        if not self._live:
            self._line(f"step {what['step']}/{what['total']}: {figures}")
            return
        done = what["step"] / max(what["total"], 1)
        bar = "=" * int(30 * done)
        line = f"[{bar:30}] {what['step']}/{what['total']} steps, {now - self._start:.0f} s, {figures}"
        sys.stderr.write(f"\r{line:{self._width}}")
        sys.stderr.flush()
        self._width = len(line)

    def _line(self, line: str) -> None:
        start = f"\r{' ' * self._width}\r" if self._width else ""
        self._width = 0
        print(f"{start}{line}", file=sys.stderr, flush=True)


def _epoch(what: dict[str, Any]) -> str:
    line = "epoch {epoch}/{epochs}: loss {loss:.3f}, {views_per_second:.0f} views/s".format(**what)
    if what["embedding_std"] is not None:
        line += ", embedding std {embedding_std:.2f}/sqrt(d), effective rank {effective_rank:.1f}".format(**what)
    for key, name in (("knn", "kNN"), ("validation", "validation kNN"), ("accuracy", "top-1")):
        if what[key] is not None:
            line += f", {name} {100 * what[key]:.1f}%"
    return line

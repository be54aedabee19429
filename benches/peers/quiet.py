"""Tells how much of the processors other programs took during a reading, so that only undisturbed readings are kept."""

import os
import time
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
ALLOWED = 0.04  # share of all processors; two ticks, the kernel's own rounding, are always allowed
TRIES = 6


def busy():
    """Seconds that all processors have worked for anyone, or were withheld by the host of this machine ("steal")."""
    user, nice, system, _idle, _wait, interrupts, soft, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / TICKS


def own():
    """Seconds of this process and of all that it started, ended ones included."""
    parents, used = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name in brackets may hold blanks.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile
        parents[int(folder.name)] = int(fields[1])
        used[int(folder.name)] = sum(map(int, fields[11:15])) / TICKS
    family = {os.getpid()}
    while True:
        more = {child for child, parent in parents.items() if parent in family} - family
        if not more:
            return sum(used[one] for one in family if one in used)
        family |= more


class Readings:
    """Takes readings anew while other programs work beside them, and counts what was dropped."""

    def __init__(self):
        self.kept, self.dropped, self.given_up = 0, 0, []

    def take(self, what, reading):
        """The result of `reading`, or None (and `what` is remembered) if each of some tries was disturbed."""
        for _ in range(TRIES):
            start, others = time.perf_counter(), busy() - own()
            result = reading()
            others = busy() - own() - others
            room = ALLOWED * (time.perf_counter() - start) * os.cpu_count()
            if others <= max(room, 2 / TICKS):
                self.kept += 1
                return result
            self.dropped += 1
            time.sleep(0.5)
        self.given_up.append(what)
        return None

    def summary(self):
        text = f"readings kept: {self.kept}, dropped because others used the processors meanwhile: {self.dropped}"
        if self.given_up:
            text += f"\nLEFT OUT, disturbed in each of {TRIES} tries: " + ", ".join(dict.fromkeys(self.given_up))
        return text

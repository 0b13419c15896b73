"""Clocks and memory, the same for both sides of a comparison. Standard library only."""

import os
import re
import time
from pathlib import Path


class Stopwatch:
    """Wall and CPU seconds (user and system, with the children's) since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def read(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self._wall, "cpu": _cpu_seconds() - self._cpu}


def _cpu_seconds() -> float:
    ticks = sum(map(int, Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[11:15]))
    for child in _children():
        ticks += sum(map(int, Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_memory() -> float:
    """GB: the largest resident set of this process, and what its living children hold for themselves."""
    total = _kilobytes(f"/proc/{os.getpid()}/status", "VmHWM")
    for child in _children():
        total += _kilobytes(f"/proc/{child}/smaps_rollup", "Private_Clean", "Private_Dirty")
    return total * 1024 / 1e9


def _children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _kilobytes(path: str, *names: str) -> int:
    text = Path(path).read_text()
    return sum(int(match[1]) for name in names if (match := re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)))

"""Batches of other processes: in order, in memory that is used again, and never while anyone can see it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest

from ssljax.data.workers import Workers

ROWS, WIDTH = 4, 1 << 16


@dataclass
class Numbered:
    """Batch t is full of t, and longer by `growth` with every step. Module-level, so that workers can unpickle it."""

    steps: int
    growth: int = 0
    sleep: float = 0.0

    def __len__(self):
        return self.steps

    def batch(self, step, memory):
        time.sleep(self.sleep)
        rows = np.arange(ROWS)
        whole = {"label": rows, "index": rows + ROWS * step, "process": np.array(os.getpid())}
        width, int32 = WIDTH + step * self.growth, np.dtype(np.int32)
        batch = memory({"x": ((ROWS, width), int32)} | {name: (x.shape, x.dtype) for name, x in whole.items()})
        for name, x in {"x": step, **whole}.items():
            batch[name][...] = x
        return batch


def check(batch, step, width=WIDTH):
    assert batch["x"].shape == (ROWS, width)
    assert (batch["x"] == step).all()
    np.testing.assert_array_equal(batch["label"], np.arange(ROWS))
    np.testing.assert_array_equal(batch["index"], ROWS * step + np.arange(ROWS))


def test_in_order_and_memory_comes_again():
    workers = Workers(Numbered(41), 3, 2)
    places, processes, kept = set(), set(), {}
    for step, batch in enumerate(workers):
        check(batch, step)
        places.add(batch["x"].ctypes.data)
        processes.add(int(batch["process"]))
        assert batch["x"].ctypes.data % 64 == 0
        if step in (3, 17):
            kept[step] = batch["x"][1:, ::3]
    assert step == 40
    assert len(processes) == 3
    assert len(places) <= 3 * (2 + 2) + 2  # beside two that are kept
    workers.close()
    for step, part in kept.items():
        assert (part == step).all()


def test_whoever_keeps_all_batches_has_all_batches():
    workers = Workers(Numbered(20), 2, 2)
    batches = list(workers)
    workers.close()
    for step, batch in enumerate(batches):
        check(batch, step)


def test_batches_may_grow():
    workers = Workers(Numbered(9, growth=5_000), 2, 1)
    for step, batch in enumerate(workers):
        check(batch, step, WIDTH + 5_000 * step)
    workers.close()


def test_a_signal_for_the_parent_does_not_end_its_workers():
    workers = Workers(Numbered(30, sleep=0.02), 2, 1)
    for step, batch in enumerate(workers):
        check(batch, step)
        if step < 2:
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(int(batch["process"]), number)
    assert step == 29
    workers.close()


def test_closing_ends_the_processes_and_so_does_an_abandoned_parent(tmp_path):
    workers = Workers(Numbered(1_000, sleep=0.01), 2, 2)
    processes = [psutil.Process(int(next(workers)["process"])) for _ in range(2)]
    workers.close()
    assert not any(process.is_running() for process in processes)
    with pytest.raises(StopIteration):
        next(workers)
    script = tmp_path / "parent.py"
    script.write_text(
        "import os\nfrom test_workers import Numbered, Workers\n"
        "if __name__ == '__main__':\n"
        "    workers = Workers(Numbered(10_000, sleep=0.01), 2, 2)\n"
        "    print(*(int(next(workers)['process']) for _ in range(2)), flush=True)\n"
        "    os._exit(0)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    numbers = list(map(int, done.stdout.split()))
    assert len(numbers) == 2
    end = time.monotonic() + 30
    while any(map(psutil.pid_exists, numbers)):
        assert time.monotonic() < end
        time.sleep(0.05)

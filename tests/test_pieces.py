"""Batches put together by many: in order, in memory that is used again, and never while anyone can see it."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from ssljax.data.pieces import Pieces
from ssljax.data.stream import Batches, Loader

ROWS, WIDTH = 40, 1 << 13
LOADERS = {
    "inline": Loader(threads=0),
    "threads": Loader(threads=4, prefetch=2),
    "processes": Loader(workers=3, prefetch=2),
}


@dataclass
class Numbered:
    """Batch t is full of t. Module-level, so that workers can unpickle it."""

    steps: int
    sleep: float = 0.0

    @property
    def rows(self):
        return np.arange(ROWS)

    def __len__(self):
        return self.steps

    def kinds(self):
        int32 = np.dtype(np.int32)
        return {"x": ((ROWS, WIDTH), int32), "process": ((ROWS,), int32), "row": ((ROWS,), np.dtype(np.int64))}

    def fill(self, step, rows, batch):
        for row in range(rows.start, rows.stop):
            time.sleep(self.sleep)
            batch["x"][row], batch["process"][row], batch["row"][row] = step, os.getpid(), row


def check(batch, step):
    assert (batch["x"] == step).all()
    np.testing.assert_array_equal(batch["row"], np.arange(ROWS))


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_in_order_and_memory_comes_again(loader):
    batches = Batches(Numbered(41), loader)
    places, processes, kept = set(), set(), {}
    for step, batch in enumerate(batches):
        check(batch, step)
        places.add(batch["x"].ctypes.data)
        processes |= set(batch["process"].tolist())
        assert all(x.ctypes.data % 64 == 0 for x in batch.values())
        if step in (3, 17):
            kept[step] = batch["x"][1:, ::3]
    assert step == 40
    assert (processes == {os.getpid()}) == (not loader.workers)
    assert len(places) <= loader.held + 2  # beside two that are kept
    for step, part in kept.items():
        assert (part == step).all()


@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_whoever_keeps_all_batches_has_all_batches(loader):
    for step, batch in enumerate(list(Batches(Numbered(20), loader))):
        check(batch, step)


@pytest.mark.parametrize(("rows", "hands", "parts"), [(256, 4, 4), (256, 64, 32), (7, 4, 1), (1, 0, 1), (41, 3, 3)])
def test_every_row_is_in_one_piece(rows, hands, parts):
    class Counted(Numbered):
        def fill(self, step, rows, batch):
            counts[rows] += 1

    counts = np.zeros(rows, int)
    pieces = Pieces(Counted(1), rows, hands, 0)
    assert pieces.parts == len(pieces) == parts
    assert len({pieces[i]["x"].ctypes.data for i in range(parts)}) == 1
    assert (counts == 1).all()


def test_a_signal_for_the_parent_does_not_end_its_workers():
    batches = Batches(Numbered(12, sleep=0.001), LOADERS["processes"])
    for step, batch in enumerate(batches):
        check(batch, step)
        for number in (signal.SIGTERM, signal.SIGINT) if step < 2 else ():
            for process in set(batch["process"].tolist()):
                os.kill(process, number)
    assert step == 11


def test_closing_ends_the_processes_and_so_does_an_abandoned_parent(tmp_path):
    batches = Batches(Numbered(1_000, sleep=0.001), LOADERS["processes"])
    processes = [psutil.Process(number) for batch in islice(batches, 3) for number in set(batch["process"].tolist())]
    batches.close()
    assert not any(process.is_running() for process in processes)
    assert list(batches) == []
    script = tmp_path / "parent.py"
    script.write_text(
        "import os\nfrom test_pieces import LOADERS, Batches, Numbered\n"
        "if __name__ == '__main__':\n"
        "    batch = next(Batches(Numbered(10_000, sleep=0.001), LOADERS['processes']))\n"
        "    print(*set(batch['process'].tolist()), flush=True)\n"
        "    os._exit(0)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    numbers = list(map(int, done.stdout.split()))
    assert numbers
    end = time.monotonic() + 30
    while any(map(psutil.pid_exists, numbers)):
        assert time.monotonic() < end
        time.sleep(0.05)

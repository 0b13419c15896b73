"""Batches that many put together: each thread, or each worker process, fills some rows of every batch.

Threads are enough where codecs do the work. But what is Python's, one process does by one core, however many there are:
`python -m bench.loader` compares threads and processes.
"""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property
from multiprocessing import connection
from typing import ClassVar, Protocol

from ssljax.data.buffers import Batch, Buffers, Kinds, opened

_LEAST = 8  # rows of a piece: to hand one over costs as much as a tenth of a picture


class Steps(Protocol):
    """Rows of batches. Travels to worker processes."""

    def __len__(self) -> int:
        """How many batches there are."""
        ...

    def kinds(self) -> Kinds:
        """Of a whole batch."""
        ...

    def fill(self, step: int, rows: slice, batch: Batch, /) -> None:
        """Makes these rows of this batch."""
        ...


class Pieces:
    """Item i fills a part of batch `i // parts`, and is that batch. A source for grain, which keeps them in order.

    Args:
        rows: of a batch.
        hands: parts of a batch at most.
        workers: processes that do the work; 0: who asks for an item does.
    """

    def __init__(self, steps: Steps, rows: int, hands: int, workers: int):
        self.parts = max(1, min(hands, rows // _LEAST))
        self._steps, self._rows = steps, rows
        self._lock = threading.Lock()
        self._begun: dict[int, tuple[str, Batch, set[int]]] = {}  # step -> its memory, parts that are still to come
        self._pool = None
        if workers:
            spawn = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
            self._pool = ProcessPoolExecutor(workers, spawn, _begin, (steps,))

    def __len__(self) -> int:
        return len(self._steps) * self.parts

    def __getitem__(self, index: int) -> Batch:
        step, part = divmod(index, self.parts)
        name, batch = self._memory(step, part)
        rows = slice(part * self._rows // self.parts, (part + 1) * self._rows // self.parts)
        if self._pool is None:
            self._steps.fill(step, rows, batch)
            return batch
        try:
            self._pool.submit(_fill, step, rows, name, self._kinds).result()
        except BrokenProcessPool:
            raise RuntimeError(
                "a worker process of the loader was killed, mostly for want of memory (lower data.loader.workers), or "
                "did not start: then it has said why, and a script needs `if __name__ == '__main__':`"
            ) from None
        return batch

    def close(self) -> None:
        """Ends the processes. Batches that were handed out stay as they are."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        with self._lock:
            self._begun.clear()
            if "_buffers" in self.__dict__:
                self._buffers.close()

    def _memory(self, step: int, part: int) -> tuple[str, Batch]:
        with self._lock:
            if step not in self._begun:
                self._begun[step] = *self._buffers.take(), set(range(self.parts))
            name, batch, awaited = self._begun[step]
            awaited.discard(part)
            if not awaited:
                del self._begun[step]
            return name, batch

    @cached_property
    def _kinds(self) -> Kinds:
        return self._steps.kinds()

    @cached_property
    def _buffers(self) -> Buffers:
        return Buffers(self._kinds, shared=self._pool is not None)


# ------------------------------------------------------------------------------------------------------- in the worker


class _Worker:
    steps: Steps
    blocks: ClassVar[dict[str, Batch]] = {}


def _begin(steps: Steps) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are for the parent, who may still need batches
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _Worker.steps = steps


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _fill(step: int, rows: slice, name: str, kinds: Kinds) -> None:
    if name not in _Worker.blocks:
        _Worker.blocks[name] = opened(name, kinds)
    _Worker.steps.fill(step, rows, _Worker.blocks[name])

"""Batches made by other processes, in memory that they share and use again: `Workers`.

Threads are enough where codecs do the work. Python's lock lets one process make some ten thousand pictures a second,
however many cores there are, and fewer where the host does the colours.
"""

import math
import mmap
import multiprocessing
import os
import pickle
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, reduction
from typing import Any, Protocol

import numpy as np

from ssljax.data.buffers import Batch, Kinds, Memory, unused

Layout = tuple[tuple[str, str, tuple[int, ...], int], ...]  # name, type, shape, offset of each array

_ALIGNED = 64  # bytes: jax shares the memory of such arrays on a CPU
_SPAWN = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang


class Steps(Protocol):
    """Step -> batch. Travels to the workers."""

    def __len__(self) -> int: ...
    def batch(self, step: int, memory: Memory, /) -> Batch:
        """Makes a batch, all of it in arrays that `memory` gives."""
        ...


@dataclass(frozen=True)
class _Made:
    """What a worker says of a batch."""

    slot: int
    size: int | None  # bytes of the slot's memory if it is new; its descriptor follows
    layout: Layout


class Workers(Iterator[Batch]):
    """Batches in order; step t is made by process t modulo `processes`.

    Each process is up to `ahead` batches ahead. The arrays of a batch lie in a slot of shared memory, which is used
    again when nobody holds any of them; whoever keeps batches makes new slots necessary.

    Raises:
        RuntimeError: a worker was killed. What is raised in one is raised here.
    """

    def __init__(self, steps: Steps, processes: int, ahead: int):
        self._length, self._next = len(steps), 0
        self._peers = [_Peer(steps, i, processes) for i in range(processes)]
        for peer in self._peers:
            for _ in range(ahead):
                peer.grant()

    def __next__(self) -> Batch:
        if self._next >= self._length:
            raise StopIteration
        batch = self._peers[self._next % len(self._peers)].receive()
        self._next += 1
        return batch

    def close(self) -> None:
        """Ends the processes. Batches that were handed out stay as they are."""
        for peer in self._peers:
            peer.process.kill()
            peer.connection.close()
        for peer in self._peers:
            peer.process.join()
            peer.process.close()
        self._peers, self._next = [], self._length


class _Peer:
    """A worker process, as its parent sees it."""

    def __init__(self, steps: Steps, first: int, every: int):
        self.connection, theirs = _SPAWN.Pipe()
        arguments = steps, range(first, len(steps), every), theirs
        self.process = _SPAWN.Process(target=_work, args=arguments, daemon=True, name=f"batches-{first}")
        self.process.start()
        theirs.close()
        self._slots: list[np.ndarray] = []  # all bytes of each; empty where nothing is known of it yet
        self._there: set[int] = set()  # slots that the worker has

    def grant(self) -> None:
        """Gives the worker a slot for one more batch: one that nobody holds, or a new one."""
        free = (slot for slot in unused(self._slots) if slot not in self._there)
        slot = next(free, len(self._slots))
        if slot == len(self._slots):
            self._slots.append(np.empty(0, np.uint8))
        self._there.add(slot)
        with suppress(OSError):  # it is dead: `receive` says why
            self.connection.send(slot)

    def receive(self) -> Batch:
        connection.wait([self.connection, self.process.sentinel])
        try:
            made = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise RuntimeError(
                f"a worker of the loader ended with exit code {self.process.exitcode}; -9 is mostly for want of memory "
                "(data.loader.workers, prefetch)"
            ) from None
        if isinstance(made, BaseException):
            raise made
        if made.size is not None:
            descriptor = reduction.recv_handle(self.connection)
            self._slots[made.slot] = np.frombuffer(mmap.mmap(descriptor, made.size), np.uint8)
            os.close(descriptor)
        self._there.discard(made.slot)
        batch = _views(self._slots[made.slot], made.layout)
        self.grant()
        return batch


# ------------------------------------------------------------------------------------------------------- in the worker


def _work(steps: Steps, mine: range, parent: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # they are for the parent, who may still need batches
    slots: dict[int, _Slot] = {}
    try:
        for step in mine:
            number = parent.recv()
            slot = slots.setdefault(number, _Slot())
            steps.batch(step, slot.arrays)
            parent.send(_Made(number, slot.size if slot.descriptor is not None else None, slot.layout))
            if slot.descriptor is not None:
                reduction.send_handle(parent, slot.descriptor, multiprocessing.parent_process().pid)  # type: ignore
                os.close(slot.descriptor)
                slot.descriptor = None
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has closed, or died
    except BaseException as error:
        parent.send(_portable(error))


class _Slot:
    """Shared memory for a batch, made when it is first needed, and again where a batch is larger."""

    def __init__(self) -> None:
        self.layout: Layout = ()
        self.descriptor: int | None = None  # of memory that the parent does not know yet
        self._memory: mmap.mmap | None = None

    @property
    def size(self) -> int:
        return len(self._memory or ())

    def arrays(self, kinds: Kinds) -> Batch:
        """Each where the one before ends."""
        layout, size = [], 0
        for name, (shape, dtype) in kinds.items():
            layout.append((name, dtype.str, shape, size))
            size += -(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED
        self.layout = tuple(layout)
        if self._memory is None or self.size < size:
            self.descriptor, self._memory = _shared(size)
        return _views(np.frombuffer(self._memory, np.uint8), self.layout)


def _views(memory: np.ndarray, layout: Layout) -> Batch:
    ends = {name: at + math.prod(shape) * np.dtype(dtype).itemsize for name, dtype, shape, at in layout}
    return {name: memory[at : ends[name]].view(dtype).reshape(shape) for name, dtype, shape, at in layout}


def _shared(size: int) -> tuple[int, mmap.mmap]:
    """Memory that another process can map by its descriptor, and that ends with its last holder."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("batch")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, max(1, size))
    return descriptor, mmap.mmap(descriptor, max(1, size))


def _portable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error

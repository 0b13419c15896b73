"""Memory for batches that is used again: fresh pages can cost as much time as decoding what goes into them."""

import math
import mmap
import os
import sys
from collections.abc import Iterator, Mapping

import numpy as np

Batch = dict[str, np.ndarray]
Kinds = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # shape and type of each array

_ALIGNED = 64  # bytes: jax shares the memory of such arrays on a CPU, instead of copying it


class Buffers:
    """Batches in memory that nobody holds any more: no array in it, no view of one. One thread at a time may `take`.

    As much memory is kept as was ever in use at the same time. Where it is `shared`, other processes reach it by
    `opened`.
    """

    def __init__(self, kinds: Kinds, shared: bool = False):
        self._kinds, self._shared = kinds, shared
        self._blocks: list[np.ndarray] = []  # all bytes of each batch
        self._files: list[int] = []

    def take(self) -> tuple[str, Batch]:
        """A batch to be filled, with anything in it, and the name under which others may open it."""
        place = next(unused(self._blocks), len(self._blocks))
        if place == len(self._blocks):
            file, memory = _memory(_size(self._kinds), self._shared)
            self._blocks.append(np.frombuffer(memory, np.uint8))
            self._files.append(file)
        name = f"/proc/{os.getpid()}/fd/{self._files[place]}" if self._shared else ""
        return name, _arrays(self._blocks[place], self._kinds)

    def close(self) -> None:
        """Batches that are in use stay as they are; nobody can open them any more."""
        for file in self._files if self._shared else ():
            os.close(file)
        self._blocks, self._files = [], []


def opened(name: str, kinds: Kinds) -> Batch:
    """A batch of another process's `Buffers`."""
    with open(name, "r+b") as file:
        return _arrays(np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8), kinds)


def unused(arrays: list[np.ndarray]) -> Iterator[int]:
    """Places in a list of arrays that nothing but the list holds. A view of an array holds it, and so does a jax array
    that shares its memory."""
    return (place for place, count in enumerate(_references(arrays)) if count == _ALONE)


def _references(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


_ALONE = _references([np.empty(1)])[0]  # what it counts, itself included, for an array in a list


def _memory(size: int, shared: bool) -> tuple[int, mmap.mmap]:
    """A file without a name, which ends with its last holder, and its bytes; not in /dev/shm, which is often small."""
    if not shared:
        return -1, mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not hasattr(os, "memfd_create"):
        raise OSError("worker processes of the loader need Linux; set data.loader.threads instead")
    file = os.memfd_create("batch")
    os.ftruncate(file, size)
    return file, mmap.mmap(file, size)


def _arrays(block: np.ndarray, kinds: Kinds) -> Batch:
    batch, start = {}, 0
    for name, (shape, dtype) in kinds.items():
        end = start + math.prod(shape) * dtype.itemsize
        batch[name] = block[start:end].view(dtype).reshape(shape)
        start = -(-end // _ALIGNED) * _ALIGNED
    return batch


def _size(kinds: Kinds) -> int:
    sizes = (math.prod(shape) * dtype.itemsize for shape, dtype in kinds.values())
    return sum(-(-size // _ALIGNED) * _ALIGNED for size in sizes) or 1

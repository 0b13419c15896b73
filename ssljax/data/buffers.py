"""Memory for batches that is used again: fresh pages can cost as much time as decoding what goes into them."""

import math
import sys
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np

Batch = dict[str, np.ndarray]
Kinds = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # shape and type of each array
Memory = Callable[[Kinds], Batch]  # arrays to be filled

_SMALL = 2**20  # bytes; less than that malloc keeps by itself


class Buffers:
    """Arrays that nobody holds any more, neither they nor views of them. Safe for threads.

    As many arrays are kept as were ever in use at the same time. A copy in another process starts without any.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = {}

    def __reduce__(self):
        return Buffers, ()

    def arrays(self, kinds: Kinds) -> Batch:
        """Arrays to be filled."""
        return {name: self._array(*kind) for name, kind in kinds.items()}

    def _array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        if math.prod(shape) * dtype.itemsize < _SMALL:
            return np.empty(shape, dtype)
        with self._lock:
            arrays = self._arrays.setdefault((shape, dtype), [])
            if (place := next(unused(arrays), None)) is None:
                place = len(arrays)
                arrays.append(np.empty(shape, dtype))
            return arrays[place]


def unused(arrays: list[np.ndarray]) -> Iterator[int]:
    """Places in a list of arrays that nothing but the list holds. A view of an array holds it, and so does a jax array
    that shares its memory."""
    return (place for place, count in enumerate(_references(arrays)) if count == _ALONE)


def _references(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


_ALONE = _references([np.empty(1)])[0]  # what it counts, itself included, for an array in a list

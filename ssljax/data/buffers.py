"""Memory for batches that is used again: fresh pages can cost as much time as decoding what goes into them."""

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

_SMALL = 2**20  # bytes; less than that malloc keeps by itself


class Buffers:
    """Stacks samples into arrays that nobody holds any more, neither they nor views of them. Safe for threads.

    As many arrays are kept as were ever in use at the same time. A copy in another process starts without any.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrays: dict[tuple[object, ...], list[np.ndarray]] = {}

    def __reduce__(self):
        return Buffers, ()

    def stack(self, samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Arrays of the same shapes and types, by name, each as one array with a new first axis."""
        return {name: self._stack([sample[name] for sample in samples]) for name in samples[0]}

    def _stack(self, rows: list[np.ndarray]) -> np.ndarray:
        first = rows[0]
        if len(rows) * first.nbytes < _SMALL:
            return np.stack(rows)
        with self._lock:
            arrays = self._arrays.setdefault((len(rows), first.shape, first.dtype), [])
            if (place := next(unused(arrays), None)) is None:
                place = len(arrays)
                arrays.append(np.empty((len(rows), *first.shape), first.dtype))
            out = arrays[place]
        return np.stack(rows, out=out)


def unused(arrays: list[np.ndarray]) -> Iterator[int]:
    """Places in a list of arrays that nothing but the list holds. A view of an array holds it, and so does a jax array
    that shares its memory."""
    return (place for place, count in enumerate(_references(arrays)) if count == _ALONE)


def _references(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


_ALONE = _references([np.empty(1)])[0]  # what it counts, itself included, for an array in a list

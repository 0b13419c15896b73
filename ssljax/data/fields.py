"""Values of a record as arrays: each function returns what a batch can hold, or raises `BadSample`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssljax.data.errors import BadSample


@dataclass(frozen=True)
class Prepared:
    """What a reader's `prepare` gives: nothing is left to do but what is drawn at random."""

    array: np.ndarray


def entry(record: Mapping[str, Any], name: str) -> Any:
    """`record[name]`."""
    if name not in record:
        raise BadSample(f"the transform needs {name!r}, but this record has {sorted(record)}")
    return record[name]


def caption(text: str | tuple[str, ...] | list[str], rng: np.random.Generator | None) -> str:
    """One text of a text or several: a random one, or the first without an `rng`."""
    if isinstance(text, str):
        return text
    if not isinstance(text, tuple | list | np.ndarray) or not all(isinstance(one, str) for one in text):
        raise BadSample(f"'text' is {shown(text)}; expected a str, or several")
    if not len(text):
        raise BadSample("no caption")
    return text[0 if rng is None else int(rng.integers(len(text)))]


def numbers(name: str, value: Any) -> np.ndarray:
    """A finite array of numbers."""
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of unequal length
        raise BadSample(f"{name!r} is {shown(value)}: {error}") from error
    if array.dtype.kind not in "biufc":
        raise BadSample(f"{name!r} is {shown(value)}; a batch can only hold numbers")
    if array.dtype.kind in "fc" and not (finite := np.isfinite(array)).all():
        raise BadSample(f"{array.size - finite.sum()} of the {array.size} values of {name!r} are NaN or infinite")
    return array


def integers(name: str, value: Any) -> np.ndarray:
    """An int32 array."""
    array = numbers(name, value)
    if array.dtype.kind in "biu":
        narrow = array.astype(np.int32)
        if narrow.tolist() == array.tolist():
            return narrow
    raise BadSample(f"{name!r} is {shown(value)}; expected an integer of 32 bits")


def shown(value: Any) -> str:
    """A value in a message: its type, and itself where it is short."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value) if isinstance(value, str | int | float) else ""
    return f"{text[:40]} ({type(value).__name__})" if text else f"a {type(value).__name__}"

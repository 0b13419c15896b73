"""Which sample comes at which position of the training stream: `Sampling` (what a config says) and `Order`.

Everything is computed place by place from (seed, position), so a stream may start anywhere, on any number of
processes. Samples belong to *groups* (all of a source; the sources of a mixture; classes). Positions come in blocks
that hold each group a fixed number of times, its quota, in an order shuffled anew for each block; and each group
walks through its own samples in epochs, shuffled anew for each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from ssljax.data.shuffle import shuffled

BLOCK = 1_024  # positions within which weights hold exactly, and so the finest weight

_KEPT = 3  # blocks, beside the latest one

Weights = Sequence[float]
History = Sequence[tuple[int, Weights]]
"""(position, weights that hold from there on), in order: what a checkpoint keeps of a mixture."""


@dataclass(frozen=True)
class Sampling:
    """How often the samples of the training source come, and in which order.

    Whatever it says, batches are a function of (seed, position), and the weights may be changed when a run is
    continued: each source then goes on where it was.
    """

    repeats: int = 1  # each sample so many times in a row, drawn anew each time (Hoffer et al. 2020, "repeated augm.")
    weights: tuple[float, ...] | None = None  # of the sources of a `Concat`: their shares of the stream
    balance: float = 0.0  # classes come in proportion to n^(1 - balance): 0 as they are, 1 equally, 0.5 square root

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, got {self.repeats}")
        if not 0 <= self.balance <= 1:
            raise ValueError(
                f"balance is between 0 (as they are) and 1 (all classes equally often), not {self.balance}"
            )
        if self.weights is not None:
            if self.balance:
                raise ValueError("weights (of sources) and balance (of classes) exclude each other; set one of them")
            _quotas(self.weights)

    def continued(self, history: History, position: int) -> list[tuple[int, list[float]]]:
        """The history of a run that goes on from `position` with these weights."""
        past = [(start, list(weights)) for start, weights in history]
        if self.weights is None or (past and past[-1][1] == list(self.weights)):
            return past
        return [*(entry for entry in past if entry[0] < position), (position, list(self.weights))]

    def order(self, source: Any, seed: int, history: History = ()) -> "Order":
        """The order of the samples of `source`; `history` as `continued` gives it, for a run that was continued.

        Raises:
            ValueError: the weights are not those of the sources of a `Concat`; the labels are not known in advance.
        """
        if self.weights is not None:
            parts = getattr(source, "sources", None)
            if parts is None or len(parts) != len(self.weights):
                what = f"a Concat of {len(parts)}" if parts is not None else f"a {type(source).__name__}"
                raise ValueError(
                    f"sampling.weights has {len(self.weights)} values, one for each source of a Concat; data.train is "
                    f"{what}"
                )
            history = history or [(0, self.weights)]
            return Order(np.array([len(part) for part in parts]), None, history, self.repeats, seed)
        if self.balance:
            labels = getattr(source, "labels", None)
            if labels is None:
                raise ValueError(
                    f"sampling.balance needs the labels in advance, and a {type(source).__name__} has to read every "
                    "sample to know its label; `ssljax data pack` it first"
                )
            members = np.argsort(labels, kind="stable").astype(np.int32)
            members = members[int((np.asarray(labels) < 0).sum()) :]  # -1: no label
            sizes = np.bincount(np.asarray(labels)[members])
            sizes = sizes[sizes > 0]
            if not len(sizes):
                raise ValueError("sampling.balance: no sample has a label")
            return Order(sizes, members, [(0, list(sizes ** (1 - self.balance)))], self.repeats, seed)
        return Order(np.array([len(source)]), None, [(0, [1.0])], self.repeats, seed)


class Draws(NamedTuple):
    """What comes at some positions."""

    index: Int64[np.ndarray, " b"]  # of the sample in its source
    visit: Int64[np.ndarray, " b"]  # how many times this sample came before
    group: Int64[np.ndarray, " b"]


class Order:
    """The samples at positions of the stream.

    Args:
        sizes: samples of each group.
        members: indices of the samples, group after group; None: as they are numbered.
        history: see `History`.
        repeats: see `Sampling`.
    """

    def __init__(
        self, sizes: np.ndarray, members: np.ndarray | None, history: History, repeats: int = 1, seed: int = 0
    ):
        self._sizes, self._members, self._repeats, self._seed = sizes.astype(np.int64), members, repeats, seed
        self._first = np.concatenate([[0], np.cumsum(self._sizes)])
        groups, taken = len(sizes), np.zeros(len(sizes), np.int64)
        self._stretches: list[_Stretch] = []
        for i, (start, weights) in enumerate(history):
            quotas = _quotas([*weights, *[0.0] * (groups - len(weights))])  # sources may be added at the end
            stretch = _Stretch(start // repeats, i, quotas, taken, seed)
            self._stretches.append(stretch)
            if i + 1 < len(history):
                taken = stretch.taken_before(history[i + 1][0] // repeats)

    def __call__(self, position: Int64[np.ndarray, " b"]) -> Draws:
        """What comes at each position."""
        place, repeat = np.divmod(position, self._repeats)
        group, turn = np.zeros_like(place), place.copy()
        if len(self._sizes) > 1:
            for i, stretch in enumerate(self._stretches):
                end = self._stretches[i + 1].start if i + 1 < len(self._stretches) else math.inf
                inside = (place >= stretch.start) & (place < end)
                group[inside], turn[inside] = stretch.turns(place[inside])
        size = self._sizes[group]
        index = self._first[group] + shuffled(turn, size, self._seed, group)
        if self._members is not None:
            index = self._members[index].astype(np.int64)
        return Draws(index, turn // size * self._repeats + repeat, group)

    def another(self, group: int, rng: np.random.Generator) -> int:
        """Any sample of a group."""
        index = int(self._first[group] + rng.integers(self._sizes[group]))
        return index if self._members is None else int(self._members[index])


class _Stretch:
    """Positions over which the weights stay the same: blocks that hold each group its quota of times."""

    def __init__(self, start: int, number: int, quotas: np.ndarray, taken: np.ndarray, seed: int):
        self.start, self._number, self._quotas, self._taken, self._seed = start, number, quotas, taken, seed
        self._length = int(quotas.sum())
        self._latest: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def turns(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each place: whose turn it is, and how many turns that group has had."""
        block, slot = np.divmod(place - self.start, self._length)
        if self._quotas.max() == 1:
            group = self._groups(place - self.start)
            return group, self._taken[group] + block
        group, turn = np.empty_like(place), np.empty_like(place)
        for number in np.unique(block).tolist():
            inside = block == number
            groups, ranks = self._block(number)
            group[inside], turn[inside] = groups[slot[inside]], ranks[slot[inside]]
        return group, turn + self._taken[group] + block * self._quotas[group]

    def taken_before(self, place: int) -> np.ndarray:
        """Turns that each group has had before `place`."""
        blocks, rest = divmod(place - self.start, self._length)
        last = self._groups(blocks * self._length + np.arange(rest))
        return self._taken + blocks * self._quotas + np.bincount(last, minlength=len(self._quotas))

    def _groups(self, place: np.ndarray) -> np.ndarray:
        """Whose turn it is, places counted from the start of the stretch."""
        # Each block is an epoch of a stream; those below 2^32 are the groups'.
        slot = shuffled(place, self._length, self._seed, 2**32 + self._number)
        return np.searchsorted(np.cumsum(self._quotas), slot, side="right")

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The group at each place of a block, and how often it came before within the block."""
        if (found := self._latest.get(number)) is not None:
            return found
        group = self._groups(number * self._length + np.arange(self._length))
        by_group = np.argsort(group, kind="stable")
        rank = np.empty_like(group)
        rank[by_group] = np.arange(self._length) - np.repeat(np.cumsum(self._quotas) - self._quotas, self._quotas)
        latest = dict(list(self._latest.items())[-_KEPT:])  # a new dict: other threads may be reading the old one
        self._latest = {**latest, number: (group, rank)}
        return group, rank


def _quotas(weights: Weights) -> np.ndarray:
    """How often each group comes in a block: its share by largest remainders, at least once if its weight is not 0."""
    if not weights or any(not math.isfinite(w) or w < 0 for w in weights) or not sum(weights):
        raise ValueError(f"weights must be numbers of at least 0, one of them above, not {tuple(weights)}")
    shares = np.asarray(weights, np.float64) / sum(weights)
    present = shares > 0
    if len(set(shares[present])) == 1:
        return present.astype(np.int64)  # in turn: the shortest block there is
    length = max(BLOCK, 16 * int(present.sum()))
    quotas = np.where(present, np.maximum(1, np.floor(shares * length)), 0).astype(np.int64)
    missing = length - int(quotas.sum())
    if missing > 0:
        quotas[np.argsort(quotas - shares * length, kind="stable")[:missing]] += 1
    return quotas

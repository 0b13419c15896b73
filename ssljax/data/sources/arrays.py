"""Samples held in memory: `Arrays`, `Npz`; and a part of any source: `Subset`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ssljax.bounded import read_npz
from ssljax.data.sources.base import Record, Source, check_index, expand, int32


@dataclass(frozen=True, eq=False)
class Arrays:
    """Your own arrays: `Arrays({"image": images, "label": labels}, classes=("cat", "dog"))`.

    `columns` maps a record's keys to sequences of one length; row i of each is record i.
    """

    columns: Mapping[str, Sequence[Any] | np.ndarray]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.columns:
            raise ValueError("columns is empty; give at least {'image': ...}")
        lengths = {key: len(column) for key, column in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all columns need one length, got {lengths}")
        if self.labels is not None:
            check_labels(self.labels, self.classes, "columns['label']")

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int32 `[n]`, or None without labels."""
        return np.asarray(self.columns["label"], np.int32) if "label" in self.columns else None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> Record:
        i = check_index(index, len(self))
        record = {key: _plain(column[i]) for key, column in self.columns.items()}
        return record if "key" in record else {**record, "key": str(i)}


def check_labels(labels: np.ndarray, classes: tuple[str, ...], where: str) -> None:
    """Raises ValueError unless every label names a class (when there are names)."""
    if classes and len(labels) and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(
            f"{where} has labels from {labels.min()} to {labels.max()}, but there are {len(classes)} classes; "
            f"labels count from 0 to {len(classes) - 1}"
        )


def _plain(value: Any) -> Any:
    """numpy scalars become Python's int, float, bool and str."""
    return value.item() if isinstance(value, np.generic) else value


# Members of an archive that must be one row of a kind of numpy type: integers, text.
_ROWS = {"label": "iu", "text": "U"}


@dataclass(frozen=True)
class Npz:
    """A numpy archive, read into memory. Pickled objects inside are refused, as they could run code, and so is an
    archive that unpacks to far more than its size (`ssljax.bounded.read_npz`).

    Either `images` (uint8 `[n,H,W]` or `[n,H,W,C]`), or encoded pictures one after the other: `jpeg` (uint8 `[bytes]`)
    and `offsets` (int `[n+1]`), picture i being `jpeg[offsets[i]:offsets[i+1]]`. Optional: `labels` (int `[n]`),
    `class_names` (str). Every other member whose first axis is n becomes a field of the record under its own name.
    """

    path: str
    start: int = 0
    limit: int | None = None  # at most this many samples, from `start` on

    def __post_init__(self) -> None:
        _ = self._arrays

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes read the file again rather than receive it through a pipe.
        return {"path": self.path, "start": self.start, "limit": self.limit}

    @cached_property
    def _arrays(self) -> Arrays:
        path = expand(self.path)
        members = _load(path)
        names = members.pop("class_names", np.array((), str))
        if "images" in members:
            images: Sequence[Any] | np.ndarray = members.pop("images")
            if images.ndim not in (3, 4) or not images.size:
                raise ValueError(f"{path}: 'images' has the shape {images.shape}; expected [n, H, W] or [n, H, W, C]")
        elif "jpeg" in members and "offsets" in members:
            images = _Slices(members.pop("jpeg"), members.pop("offsets"), str(path))
        else:
            raise ValueError(f"{path} has the members {sorted(members)}; it needs 'images', or 'jpeg' and 'offsets'")
        n = len(images)
        if "labels" in members and members["labels"].shape != (n,):
            raise ValueError(f"{path} has {n} images but {len(np.atleast_1d(members['labels']))} labels")
        fields = {"label" if name == "labels" else name: array for name, array in members.items()}
        columns = {name: array for name, array in fields.items() if array.ndim and len(array) == n}
        for name, array, kinds in (("class_names", names, "US"), *((k, columns.get(k), v) for k, v in _ROWS.items())):
            if array is not None and (array.ndim != 1 or array.dtype.kind not in kinds):
                what = "strings" if "U" in kinds else "integers"
                raise ValueError(f"{path}: {name!r} should be one row of {what}, not {array.dtype}{list(array.shape)}")
        chosen = range(n)[self.start :][: self.limit]
        if not chosen:
            raise ValueError(f"start={self.start}, limit={self.limit} leave nothing of the {n} samples in {path}")
        columns = {k: v[chosen.start : chosen.stop] for k, v in {**columns, "image": images}.items()}
        columns["key"] = _Keys(path.name, chosen)
        classes = tuple(map(str, names))
        if "label" in columns:
            columns["label"] = int32(columns["label"])
            check_labels(columns["label"], classes, str(path))
        return Arrays(columns, classes)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._arrays.classes

    @property
    def labels(self) -> np.ndarray | None:
        """int32 `[n]`, or None without labels."""
        return self._arrays.labels

    def __len__(self) -> int:
        return len(self._arrays)

    def __getitem__(self, index: int) -> Record:
        return self._arrays[index]


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with open(path, "rb") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            raise ValueError(f"{path} is a single .npy array; save it with np.savez(path, images=...)")
    try:
        return read_npz(path)
    except ValueError as error:
        raise ValueError(f"{path} is {error}; copy or download it again, or save it anew with np.savez") from error


class _Keys(Sequence[str]):
    """`a.npz[0]`, `a.npz[1]`, ..., made when asked for: an archive may hold millions of tiny pictures."""

    def __init__(self, name: str, chosen: range):
        self._name, self._chosen = name, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index):
        return f"{self._name}[{self._chosen[index]}]"


class _Slices(Sequence[bytes]):
    """Pieces of one long uint8 array: item i is `data[offsets[i]:offsets[i+1]]`."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray, where: str):
        if data.dtype != np.uint8 or data.ndim != 1:
            raise ValueError(f"{where}: 'jpeg' must be one row of uint8, not {data.dtype}{list(data.shape)}")
        if (
            offsets.dtype.kind not in "iu"
            or offsets.ndim != 1
            or len(offsets) < 2
            or (offsets[1:] < offsets[:-1]).any()
        ):
            raise ValueError(f"{where}: 'offsets' must be one rising row of n+1 numbers")
        if offsets[0] < 0 or offsets[-1] > len(data):
            raise ValueError(f"{where}: 'offsets' reach byte {offsets[-1]}, but 'jpeg' has {len(data)} bytes")
        self._data, self._offsets, self._where = data, offsets, where

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return _Slices(self._data, self._offsets[start : stop + 1], self._where)
        return self._data[self._offsets[index] : self._offsets[index + 1]].tobytes()


@dataclass(frozen=True)
class Subset:
    """`source[start:stop:step]`, with Python's rules for slices. Records keep their labels, keys and classes."""

    source: Source
    start: int = 0
    stop: int | None = None
    step: int = 1

    def __post_init__(self) -> None:
        if not self._chosen:
            raise ValueError(f"[{self.start}:{self.stop}:{self.step}] leaves nothing of the {len(self.source)} samples")

    @cached_property
    def _chosen(self) -> range:
        return range(len(self.source))[self.start : self.stop : self.step]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int32 `[n]`, or None if the source does not know its labels in advance."""
        labels = getattr(self.source, "labels", None)
        return None if labels is None else labels[np.asarray(self._chosen)]

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: int) -> Record:
        return self.source[self._chosen[check_index(index, len(self))]]


@dataclass(frozen=True)
class Concat:
    """Several sources one after another, as one. Their classes must agree, unless their labels are left out.

    How often each of them comes in training says `Sampling.weights`.
    """

    sources: tuple[Source, ...]
    labelled: bool = True

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("Concat needs at least one source")
        if self.labelled and len({source.classes for source in self.sources}) > 1:
            named = [source.classes for source in self.sources]
            raise ValueError(
                f"the sources name different classes, so their labels mean different things: {named}; set "
                "labelled=False to use them without labels"
            )

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(source) for source in self.sources])

    @property
    def classes(self) -> tuple[str, ...]:
        return self.sources[0].classes if self.labelled else ()

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int32 `[n]`, or None if a source does not know its labels in advance."""
        if not self.labelled:
            return None
        parts = [getattr(source, "labels", None) for source in self.sources]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        index = check_index(index, len(self))
        which = int(np.searchsorted(self._ends, index, side="right"))
        record = self.sources[which][index - int(self._ends[which - 1] if which else 0)]
        return record if self.labelled else {name: value for name, value in record.items() if name != "label"}

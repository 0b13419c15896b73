"""ArrayRecord shards as `ssljax.data.pack` writes them: `ArrayRecord`, and the encoding of one record.

A record is one safetensors blob: its arrays and byte strings as tensors, everything else as JSON in the metadata.
Nothing in it can be executed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from ssljax.bounded import parse_json, read_json
from ssljax.data.errors import BadSample
from ssljax.data.media import read_media
from ssljax.data.sources.base import Missing, Record, check_index, expand, expand_files

INDEX = "dataset.json"
_PLAIN = (str, int, float, bool)  # themselves, not their numpy subclasses


def encode_record(record: Mapping[str, Any]) -> bytes:
    """A record as bytes. Raises TypeError for a value that is no numeric array, bytes, path, str, number or tuple;
    BadSample for an empty file, or one too large."""
    tensors: dict[str, np.ndarray] = {}
    raw: list[str] = []
    fields: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            tensors[key] = np.ascontiguousarray(value).reshape(value.shape)
        elif isinstance(value, bytes | Path):
            tensors[key] = np.frombuffer(read_media(value, key), np.uint8)
            raw.append(key)
        elif type(value) in _PLAIN or _is_plain_tuple(value):
            fields[key] = value
        else:
            what = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise TypeError(
                f"the entry {key!r} is {what}; a record holds numeric arrays, bytes, paths, str, int, float, "
                "tuples of str"
            )
    header = {"fields": json.dumps(fields), "bytes": json.dumps(raw), "order": json.dumps(list(record))}
    return safetensors.numpy.save(tensors, metadata=header)


def _is_plain_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(v) in _PLAIN for v in value)


def decode_record(blob: bytes) -> Record:
    """The inverse of `encode_record`. Raises BadSample for a damaged blob."""
    try:
        header = parse_json(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
        fields, raw, order = (parse_json(header[name]) for name in ("fields", "bytes", "order"))
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        if not all(type(value) in _PLAIN or _is_plain_tuple(value) for value in values.values()):
            raise ValueError("its fields are no plain values")
        for key, tensor in safetensors.numpy.load(blob).items():
            values[key] = tensor.tobytes() if key in raw else tensor
        return {key: values[key] for key in order}
    except (ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise BadSample(f"the record is not one that ssljax.data.pack wrote ({error})") from error


@dataclass(frozen=True)
class ArrayRecord:
    """Shards written by `ssljax.data.pack`: their folder, or a glob of `.array_record` files.

    Every record is read on its own, whatever it holds. Records are those of the packed source, in its order.
    """

    path: str
    missing: Missing = "error"  # of whole shards: one that is cut cannot be opened; drop: see `base.Missing`

    def __post_init__(self) -> None:
        _ = self._opened

    @cached_property
    def _files(self) -> tuple[Path, ...]:
        path = expand(self.path)
        pattern = str(path / "*.array_record") if path.is_dir() else self.path
        return expand_files(pattern, "ArrayRecord shard", self.missing)

    @cached_property
    def _index(self) -> dict[str, Any]:
        path = self._files[0].parent / INDEX
        try:
            index = read_json(path) if path.exists() else {}
            if not isinstance(index, dict) or not isinstance(index.get("classes", []), list):
                raise ValueError("not an index of ssljax.data.pack")
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); pack the set again") from error
        return index

    @cached_property
    def _opened(self) -> tuple[Any, tuple[tuple[str, str], ...]]:
        """(the records, (why, name) of shards that are missing or damaged)"""
        files, lost = list(self._files), []
        for file in self._files if self.missing == "drop" else ():
            try:
                _open(file)
            except (OSError, ValueError) as error:
                files.remove(file)
                lost.append((f"the shard {file} is missing or damaged: {error}", file.name))
        if not files:
            raise ValueError(f"no record is left: {lost[0][0]}")
        reader = _open(*files)
        count = self._index.get("count")
        if expand(self.path).is_dir() and not lost and count is not None and count != len(reader):
            reason = (
                f"{expand(self.path)} holds {len(reader)} records, but its {INDEX} says {count}: a shard is missing"
            )
            if self.missing == "error":
                raise ValueError(f"{reason}; to go on without it, set missing='drop'")
            lost.append((reason, expand(self.path).name))
        return reader, tuple(lost)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        return tuple(map(str, self._index.get("classes", ())))

    def __len__(self) -> int:
        reader, lost = self._opened
        return len(reader) + len(lost)

    def __getitem__(self, index: int) -> Record:
        i = check_index(index, len(self))
        reader, lost = self._opened
        if i >= len(reader):
            raise BadSample(*lost[i - len(reader)])
        try:
            return decode_record(reader[i])
        except (BadSample, RuntimeError) as error:  # a damaged record, a damaged block
            raise BadSample(f"{self.path}[{i}]: {error}", i) from error


def _open(*files: Path) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource  # slow to import

    for file in files:
        if not file.stat().st_size:
            raise ValueError(f"{file} is empty (0 bytes); the copy did not finish")
    try:
        return ArrayRecordDataSource([str(file) for file in files])
    except (ValueError, RuntimeError) as error:
        for file in files[1:] and files:
            _open(file)  # which one it is
        raise ValueError(
            f"{files[0]} is truncated or not ArrayRecord ({error}); copy it again, or set missing='drop' to go on "
            "without it"
        ) from error

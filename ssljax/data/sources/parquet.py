"""Parquet files and Hugging Face data sets on disk: `Parquet`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ssljax.bounded import parse_json
from ssljax.data.errors import BadSample
from ssljax.data.sources.arrays import check_labels
from ssljax.data.sources.base import Missing, Record, check_index, expand, expand_files, int32, nearest
from ssljax.data.sources.row_groups import RowGroups

Role = Literal["image", "label", "text"]

# Column names taken for a role when none is given and the schema does not say.
_USUAL: Mapping[Role, tuple[str, ...]] = {
    "image": ("image", "img", "picture", "jpg", "png", "jpeg"),
    "label": ("label", "labels", "class", "fine_label", "cls"),
    "text": ("text", "caption", "captions", "txt", "sentence"),
}


@dataclass(frozen=True)
class Parquet:
    """Parquet shards, or the Arrow files that `datasets.save_to_disk` writes: a file, a glob, or a folder of them.

    Pictures are binary columns or Hugging Face's struct of `bytes` and `path`; labels are integers (with the class
    names of the Hugging Face schema, if any) or strings (classes are then the sorted strings); texts are strings or
    lists of strings. Columns not given are found by the schema or by their usual names.

    A parquet row is read with its whole row group, so shuffled training wants small groups; `ssljax.data.pack`
    rewrites a set for random access. Arrow files are memory-mapped.

    Record: `image` (bytes), `label` (int), `text` (str or tuple of str), `key`.
    """

    path: str
    image: str | None = None
    label: str | None = None
    text: str | None = None
    cache_mib: int = 256  # row groups kept in memory, shared by the threads of a process
    missing: Missing = "error"  # of whole files: one that is cut cannot be opened; drop: see `base.Missing`

    def __post_init__(self) -> None:
        if not self._columns:
            raise ValueError(
                f"cannot tell which column of {self._files[0][0]} is the picture or the text; its columns are "
                f"{self._schema.names}. Set image=..., label=..., text=..."
            )
        _ = self.classes

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps and caches stay behind; the worker opens its own.
        return {k: v for k, v in self.__dict__.items() if k not in ("_groups", "_label_values")}

    @cached_property
    def _files(self) -> tuple[tuple[Path, ...], tuple[tuple[str, str], ...]]:
        """(files to read, (why, name) of those that are missing or damaged)"""
        files, lost = list(self._named_files()), []
        for file in tuple(files) if self.missing == "drop" else ():
            try:
                RowGroups((file,), 0)
            except ValueError as error:
                files.remove(file)
                lost.append((f"the shard {file} is missing or damaged: {error}", file.name))
        if not files:
            raise ValueError(f"no row is left: {lost[0][0]}")
        return tuple(files), tuple(lost)

    def _named_files(self) -> tuple[Path, ...]:
        path = expand(self.path)
        if not path.is_dir():
            return expand_files(self.path, "parquet file", self.missing)
        files = sorted(path.glob("*.parquet")) or sorted(path.glob("*.arrow"))
        if not files:
            below = sorted({str(f.parent) for f in [*path.glob("*/*.parquet"), *path.glob("*/*.arrow")]})
            raise FileNotFoundError(
                f"no .parquet or .arrow file in {path}" + (f"; there are some in {below}" if below else "")
            )
        return tuple(files)

    @cached_property
    def _groups(self) -> RowGroups:
        return RowGroups(self._files[0], self.cache_mib << 20)

    @property
    def _schema(self) -> pa.Schema:
        return self._groups.schema

    @cached_property
    def _features(self) -> dict[str, Any]:
        """Hugging Face's description of the columns, or {}."""
        try:
            features = parse_json((self._schema.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, TypeError, ValueError):
            return {}
        return features if isinstance(features, dict) else {}

    @cached_property
    def _columns(self) -> dict[Role, str]:
        names = self._schema.names
        columns: dict[Role, str] = {}
        declared = {"Image": "image", "ClassLabel": "label"}
        by_schema = {
            declared[feature["_type"]]: name
            for name, feature in reversed(self._features.items())
            if isinstance(feature, dict) and feature.get("_type") in declared
        }
        given: dict[Role, str | None] = {"image": self.image, "label": self.label, "text": self.text}
        for role, name in given.items():
            if name is not None and name not in names:
                raise ValueError(
                    f"{self._files[0][0]} has no column {name!r}{nearest(name, names)} Its columns are {names}"
                )
            usual = (usual for usual in _USUAL[role] if usual in names)
            if chosen := name or by_schema.get(role) or next(usual, None):
                columns[role] = chosen
                _check_type(role, self._schema.field(chosen), self._files[0][0])
        return columns if "image" in columns or "text" in columns else {}

    @cached_property
    def _label_values(self) -> pa.ChunkedArray | None:
        """Integers, or a dictionary of strings."""
        return self._groups.column(self._columns["label"]) if "label" in self._columns else None

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        if (values := self._label_values) is None:
            return ()
        if pa.types.is_dictionary(values.type):
            return tuple(sorted({str(v) for v in values.unique().to_pylist() if v is not None}))
        feature = self._features.get(self._columns["label"], {})
        names = feature.get("names") if isinstance(feature, dict) else None
        classes = tuple(map(str, names)) if isinstance(names, list) else ()
        # -1 is Hugging Face's "no label", as in hidden test sets
        assert self.labels is not None
        check_labels(self.labels[self.labels >= 0], classes, f"the column {self._columns['label']!r} of {self.path}")
        return classes

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int32 `[n]`, -1 where a row has none; None without a label column."""
        if (values := self._label_values) is None:
            return None
        if pa.types.is_dictionary(values.type):
            number = {name: i for i, name in enumerate(self.classes)}
            numbers = [number.get(name, -1) for name in values.chunk(0).dictionary.to_pylist()]
            place = pa.chunked_array([chunk.indices for chunk in values.chunks]).fill_null(len(numbers)).to_numpy()
            known = np.array([*numbers, -1], np.int32)[place]
        else:
            known = int32(values.fill_null(-1).to_numpy())
        return np.concatenate([known, np.full(len(self._files[1]), -1, np.int32)])

    def __len__(self) -> int:
        return len(self._groups) + len(self._files[1])

    def __getitem__(self, index: int) -> Record:
        i = check_index(index, len(self))
        if i >= len(self._groups):
            raise BadSample(*self._files[1][i - len(self._groups)])
        record: Record = {"key": f"{Path(self.path).name}[{i}]"}
        try:
            row = self._groups.row(i, list(self._columns.values()))
        except BadSample as error:
            raise BadSample(f"row {i} of {self.path} cannot be read: {error}", record["key"]) from error
        for role, column in self._columns.items():
            value = row[column]
            if role == "label":
                assert self.labels is not None
                record["label"] = int(self.labels[i])
            elif role == "text":
                record["text"] = tuple(map(str, value)) if isinstance(value, list) else str(value or "")
            else:
                if isinstance(value, dict):
                    record["key"] = str(value.get("path") or record["key"])
                    value = value.get("bytes")
                if not isinstance(value, bytes):
                    raise BadSample(
                        f"the column {column!r} holds no picture bytes (row {i} of {self.path})", record["key"]
                    )
                record["image"] = value
        return record


def _check_type(role: Role, column: pa.Field, file: Path) -> None:
    """Raises ValueError if a column cannot play its role."""
    kind = column.type
    inner = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    has_bytes = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    fits = {
        "image": _is(kind.field("bytes").type if has_bytes else kind, pa.types.is_binary, pa.types.is_large_binary),
        "label": _is(kind, pa.types.is_integer, pa.types.is_string, pa.types.is_large_string),
        "text": _is(inner, pa.types.is_string, pa.types.is_large_string),
    }
    if not fits[role]:
        wanted = {
            "image": "binary, or a struct with binary 'bytes'",
            "label": "integers or strings",
            "text": "strings or lists of strings",
        }
        raise ValueError(
            f"{file}: the column {column.name!r} is to be the {role}; it holds {str(kind)[:200]}, not {wanted[role]}"
        )


def _is(kind: pa.DataType, *tests: Callable[[pa.DataType], bool]) -> bool:
    return any(test(kind.value_type if pa.types.is_dictionary(kind) else kind) for test in tests)

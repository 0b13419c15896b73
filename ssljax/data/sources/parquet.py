"""Parquet files and Hugging Face data sets on disk: `Parquet`."""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssljax.data.errors import BadSample
from ssljax.data.sources.arrays import check_labels
from ssljax.data.sources.base import Missing, Record, check_index, expand, expand_files, nearest

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
                _Groups((file,), 0)
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
    def _groups(self) -> "_Groups":
        return _Groups(self._files[0], self.cache_mib << 20)

    @property
    def _schema(self) -> pa.Schema:
        return self._groups.schema

    @cached_property
    def _features(self) -> dict[str, Any]:
        """Hugging Face's description of the columns, or {}."""
        try:
            features = json.loads((self._schema.metadata or {})[b"huggingface"])["info"]["features"]
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
        return columns if "image" in columns or "text" in columns else {}

    @cached_property
    def _label_values(self) -> pa.ChunkedArray | None:
        if "label" not in self._columns:
            return None
        return self._groups.column(self._columns["label"])

    @property
    def classes(self) -> tuple[str, ...]:
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        if (values := self._label_values) is None:
            return ()
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            return tuple(sorted({str(v) for v in values.unique().to_pylist()}))
        feature = self._features.get(self._columns["label"], {})
        classes = tuple(map(str, feature.get("names") or ())) if isinstance(feature, dict) else ()
        # -1 is Hugging Face's "no label", as in hidden test sets
        known = values.drop_null().to_numpy()
        check_labels(known[known >= 0], classes, f"the column {self._columns['label']!r} of {self.path}")
        return classes

    @cached_property
    def labels(self) -> np.ndarray | None:
        """int32 `[n]`, -1 where a row has none; None without a label column."""
        if (values := self._label_values) is None:
            return None
        number = {name: i for i, name in enumerate(self.classes)}
        plain = values.to_pylist()
        known = [-1 if v is None else number[v] if isinstance(v, str) else v for v in plain]
        return np.array(known + [-1] * len(self._files[1]), np.int32)

    def __len__(self) -> int:
        return len(self._groups) + len(self._files[1])

    def __getitem__(self, index: int) -> Record:
        i = check_index(index, len(self))
        if i >= len(self._groups):
            raise BadSample(*self._files[1][i - len(self._groups)])
        record: Record = {"key": f"{Path(self.path).name}[{i}]"}
        try:
            row = self._groups.row(i, list(self._columns.values()))
        except pa.ArrowException as error:
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
                    record["key"] = value.get("path") or record["key"]
                    value = value.get("bytes")
                if not isinstance(value, bytes):
                    raise BadSample(
                        f"the column {column!r} holds no picture bytes (row {i} of {self.path})", record["key"]
                    )
                record["image"] = value
        return record


class _Groups:
    """The row groups (parquet) or record batches (Arrow) of all files, with the last used ones in memory."""

    def __init__(self, files: tuple[Path, ...], budget: int):
        self._budget, self._held = budget, 0
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        self._places: list[tuple[Path, int]] = []
        self._parquet: dict[Path, pq.FileMetaData] = {}
        self._arrow: dict[Path, list[pa.RecordBatch]] = {}
        rows: list[int] = []
        schemas: list[pa.Schema] = []
        for file in files:
            try:
                if file.suffix == ".arrow":
                    stream = pa.ipc.open_stream(pa.memory_map(str(file)))
                    self._arrow[file] = list(stream)
                    counts = [batch.num_rows for batch in self._arrow[file]]
                    schemas.append(stream.schema)
                else:
                    with pq.ParquetFile(file) as opened:
                        self._parquet[file] = opened.metadata
                        schemas.append(opened.schema_arrow)
                    counts = [opened.metadata.row_group(g).num_rows for g in range(opened.metadata.num_row_groups)]
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(
                    f"{file} is not a complete parquet or Arrow file ({error}); copy or download it again, or set "
                    "missing='drop' to go on without it"
                ) from error
            if schemas[-1].names != schemas[0].names:
                raise ValueError(f"{file} has the columns {schemas[-1].names}, but {files[0]} has {schemas[0].names}")
            self._places += [(file, g) for g in range(len(counts))]
            rows += counts
        self.schema = schemas[0]
        self._ends = np.cumsum(rows, dtype=np.int64)
        if not len(self):
            raise ValueError(f"{files[0]} has no rows")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def column(self, name: str) -> pa.ChunkedArray:
        """One whole column; only its bytes are read."""
        tables = [pq.read_table(file, columns=[name], use_threads=False) for file in self._parquet]
        tables += [pa.Table.from_batches(batches).select([name]) for batches in self._arrow.values()]
        return pa.concat_tables([table.replace_schema_metadata() for table in tables]).column(0)

    def row(self, i: int, columns: list[str]) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, i, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        table = self._group(group, columns)
        return {name: table.column(name)[i - first].as_py() for name in columns}

    def _group(self, group: int, columns: list[str]) -> pa.Table | pa.RecordBatch:
        file, number = self._places[group]
        if file in self._arrow:
            return self._arrow[file][number]
        with self._lock:
            if (table := self._cache.get(group)) is not None:
                self._cache.move_to_end(group)
                return table
        with pq.ParquetFile(file, metadata=self._parquet[file]) as opened:
            table = opened.read_row_group(number, columns=columns, use_threads=False)
        with self._lock:
            if group not in self._cache:
                self._cache[group] = table
                self._held += table.nbytes
            while self._held > self._budget and len(self._cache) > 1:
                self._held -= self._cache.popitem(last=False)[1].nbytes
        return table

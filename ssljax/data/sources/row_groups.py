"""The row groups of parquet files and record batches of Arrow files, checked before they are believed: `RowGroups`."""

import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssljax.bounded import FREE_UNPACKED, UNPACKED_PER_BYTE
from ssljax.data.errors import BadSample
from ssljax.data.sources.parquet_pages import check_footer, check_histograms, pages


class RowGroups:
    """The row groups (parquet) or record batches (Arrow) of all files, with the last used ones in memory.

    Raises:
        ValueError: a file is damaged, announces more rows than it has bytes, or has other columns than the first.
    """

    def __init__(self, files: tuple[Path, ...], budget: int):
        self._budget, self._held = budget, 0
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()
        self._places: list[tuple[Path, int]] = []
        self._parquet: dict[Path, pq.FileMetaData] = {}
        self._arrow: dict[Path, list[pa.RecordBatch]] = {}
        self._known: set[Path] = set()  # parquet files whose column chunks can be looked at
        self._checked: set[int] = set()  # record batches whose offsets were seen to be in order
        rows: list[int] = []
        schemas: list[pa.Schema] = []
        for file in files:
            try:
                counts = self._open_arrow(file, schemas) if file.suffix == ".arrow" else self._open(file, schemas)
                if any(count < 0 for count in counts) or sum(counts) > file.stat().st_size:
                    raise ValueError(f"it announces {sum(counts):,} rows, and has fewer bytes")
            except (pa.ArrowException, ValueError, OSError) as error:
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

    def _open(self, file: Path, schemas: list[pa.Schema]) -> list[int]:
        check_footer(file)
        with pq.ParquetFile(file) as opened:
            metadata = self._parquet[file] = opened.metadata
            schemas.append(opened.schema_arrow)
        return [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]

    def _open_arrow(self, file: Path, schemas: list[pa.Schema]) -> list[int]:
        source = pa.memory_map(str(file))
        for message in pa.ipc.MessageReader.open_stream(source):
            _refuse_compressed(message)
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        self._arrow[file] = list(stream)
        schemas.append(stream.schema)
        return [batch.num_rows for batch in self._arrow[file]]

    def column(self, name: str) -> pa.ChunkedArray:
        """One whole column; only its bytes are read. Strings come as a dictionary of them.

        Raises:
            ValueError: a row group cannot be read.
        """
        chunks: list[pa.Array] = []
        for group, (file, number) in enumerate(self._places):
            try:
                array = self._read(group, [name]).column(name)
                for chunk in array.chunks if isinstance(array, pa.ChunkedArray) else [array]:
                    if pa.types.is_integer(chunk.type):
                        chunks.append(chunk.cast(pa.int64()))
                    else:
                        if pa.types.is_dictionary(chunk.type):
                            chunk.validate(full=True)  # its numbers may lie outside of it
                        text = chunk.cast(pa.string()) if pa.types.is_large_string(chunk.type) else chunk
                        chunks.append(text.dictionary_encode())
            except (BadSample, pa.ArrowException) as error:
                raise ValueError(f"row group {number} of {file}: {error}") from error
        return pa.chunked_array(chunks).unify_dictionaries()

    def row(self, i: int, columns: list[str]) -> dict[str, Any]:
        """The values of one row as Python objects.

        Raises:
            BadSample: its row group is damaged, or unpacks to far more than its size.
        """
        group = int(np.searchsorted(self._ends, i, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        table = self._group(group, columns)
        try:
            return {name: table.column(name)[i - first].as_py() for name in columns}
        except (pa.ArrowException, ValueError) as error:  # a number outside of a dictionary; text that is not UTF-8
            raise BadSample(str(error)) from error

    def _group(self, group: int, columns: list[str]) -> pa.Table | pa.RecordBatch:
        if self._places[group][0] in self._arrow:
            return self._read(group, columns)
        with self._lock:
            if (table := self._cache.get(group)) is not None:
                self._cache.move_to_end(group)
                return table
        table = self._read(group, columns)
        with self._lock:
            if group not in self._cache:
                self._cache[group] = table
                self._held += table.nbytes
            while self._held > self._budget and len(self._cache) > 1:
                self._held -= self._cache.popitem(last=False)[1].nbytes
        return table

    def _read(self, group: int, columns: list[str]) -> pa.Table | pa.RecordBatch:
        file, number = self._places[group]
        try:
            if file in self._arrow:
                batch = self._arrow[file][number].select(columns)
                if group not in self._checked:
                    batch.validate(full=True)  # Arrow follows the offsets inside of a file without looking
                    self._checked.add(group)
                return batch
            metadata = self._parquet[file]
            if file not in self._known:  # not when it is opened: it takes 0.2 s for each MB of footer
                check_histograms(file, metadata.schema)
                self._known.add(file)
            listed = _dictionaries(file, metadata, number, columns)
            with pq.ParquetFile(file, metadata=metadata, read_dictionary=listed) as opened:
                table = opened.read_row_group(number, columns=columns, use_threads=False)
            if table.num_rows != metadata.row_group(number).num_rows:
                raise ValueError(
                    f"it announces {metadata.row_group(number).num_rows:,} rows, and has {table.num_rows:,}"
                )
            return table
        except (pa.ArrowException, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # a disk that fails; Arrow's own have no number
                raise
            raise BadSample(f"row group {number} of {file} cannot be read: {error}") from error


def _dictionaries(file: Path, metadata: pq.FileMetaData, number: int, columns: Sequence[str]) -> list[str]:
    """The columns that are to be read as dictionaries, because their values repeat without taking space in the file.

    Raises:
        ValueError: the row group unpacks to too much.
    """
    group, listed, unpacked = metadata.row_group(number), [], 0
    size = file.stat().st_size
    with open(file, "rb") as opened:
        for i in range(group.num_columns):
            column, name = group.column(i), metadata.schema.column(i).path
            if column.path_in_schema != name:  # pyarrow reads by position, whatever the name
                raise ValueError(f"the column {name!r} is called {column.path_in_schema!r} in its row group")
            if name.partition(".")[0] not in columns:
                continue
            found = pages(opened, column)
            unpacked += found.unpacked + found.values * max(0, metadata.schema.column(i).length)
            if column.num_values > size or found.values > size:
                raise ValueError(f"the column {name!r} has more values than the file has bytes")
            if found.dictionary and column.physical_type == "BYTE_ARRAY":
                listed.append(name)
    if unpacked > (most := max(FREE_UNPACKED, UNPACKED_PER_BYTE * size)):
        raise ValueError(f"it unpacks to {unpacked:,} bytes, over the limit of {most:,} for a file of this size")
    return listed


def _refuse_compressed(message: pa.ipc.Message) -> None:
    """Raises ValueError for a compressed record batch: Arrow unpacks it to whatever length it names.

    A batch says so in the field `compression` (the fourth) of its header, a flatbuffer (arrow/format/Message.fbs).
    """
    if message.type not in ("record batch", "dictionary"):
        return
    data = message.metadata.to_pybytes()
    try:
        header = _field(data, struct.unpack_from("<I", data)[0], 2)
        batch = _field(data, header, 1) if message.type == "dictionary" else header
        compressed = batch and _field(data, batch, 3)
    except struct.error as error:
        raise ValueError("the header of a record batch is damaged") from error
    if compressed:
        raise ValueError("it is compressed; save it with datasets.save_to_disk, or without compression")


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a flatbuffer's table points to; 0 if it is not there."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    size, _ = struct.unpack_from("<HH", data, vtable)
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0] if 4 + 2 * number < size else 0
    return table + offset + struct.unpack_from("<I", data, table + offset)[0] if offset else 0

"""What a parquet file will unpack to, read from its page headers before pyarrow allocates it: `check_footer`, `pages`.

pyarrow trusts these headers: a few kilobytes of Zstandard, or of one value repeated, make it fill the memory.
(Layout: the Parquet format's README and parquet.thrift; Thrift's compact protocol.)
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ssljax.data.headers import MAX_BLOCKS

_FREE_FOOTER = 2**18  # bytes; pyarrow makes a kilobyte of some four bytes of a footer
_FOOTER_SHARE = 16  # a larger footer is at most this part of its file
_LONGEST_HEADER = 2**20  # bytes of a page header, which holds the smallest and largest value of the page
_DICTIONARY, _DELTA_BYTES = 2, 7  # a type of page; an encoding by shared beginnings, whose values grow without bound
_DATA = {0: (5, 2), 3: (8, 4)}  # type of data page -> its header's field; the encoding's


@dataclass(frozen=True)
class Pages:
    """Those of one column in one row group, added up."""

    unpacked: int  # bytes
    values: int
    dictionary: bool  # some values are given by their number in a list of values


def check_footer(path: Path) -> None:
    """Raises ValueError if the description of a parquet file, at its end, is out of proportion to the file."""
    size, length = path.stat().st_size, _footer_length(path)
    if length > max(_FREE_FOOTER, size // _FOOTER_SHARE):
        raise ValueError(f"its footer has {length:,} of {size:,} bytes; more than {_FREE_FOOTER:,} may be a sixteenth")


def check_histograms(path: Path, schema: Any) -> None:
    """Raises ValueError for a column chunk whose histograms of levels do not fit its column (`ParquetSchema`).

    `pyarrow.parquet.RowGroupMetaData.column` ends the process there.
    """
    length = _footer_length(path)
    with open(path, "rb") as file:
        file.seek(-8 - length, os.SEEK_END)
        footer = file.read(length)
    try:
        groups = _struct(footer, 0, depth=10)[0].get(4, [])
        for group in groups:
            for i, chunk in enumerate(group[1]):
                sizes, column = chunk.get(3, {}).get(16, {}), schema.column(i)
                for field, level in ((2, column.max_repetition_level), (3, column.max_definition_level)):
                    if len(sizes.get(field, [])) not in (0, level + 1):
                        raise ValueError(f"the column {column.path!r} has a histogram of another length than it needs")
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError("its footer is damaged") from error


def pages(file: BinaryIO, column: Any) -> Pages:
    """Adds up the pages of a column chunk (`pyarrow.parquet.ColumnChunkMetaData`).

    Raises:
        ValueError: a damaged page header, or an encoding that is not read.
    """
    offsets = [column.data_page_offset]
    if column.dictionary_page_offset is not None:
        offsets.append(column.dictionary_page_offset)
    at = max(0, min(offset for offset in offsets if offset > 0 or len(offsets) == 1))
    end, unpacked, values, dictionary, count = at + column.total_compressed_size, 0, 0, False, 0
    while at < end and values < column.num_values:
        header, start = _header(file, at)
        kind, size, packed = (_count(header, field) for field in (1, 2, 3))
        where, encoding = _DATA.get(kind, (0, 0))
        data: Any = header.get(where) if where else {1: 0}
        counted = _count(data, 1)
        count += 1
        if min(kind, size, packed, counted) < 0:
            raise ValueError(f"the page header at byte {at:,} is damaged")
        if count > MAX_BLOCKS + (end - at) // 1024:
            raise ValueError(f"it has more than {MAX_BLOCKS:,} pages, and less than a KiB in each")
        if where and data.get(encoding) == _DELTA_BYTES and column.physical_type == "BYTE_ARRAY":
            raise ValueError("it has the encoding DELTA_BYTE_ARRAY, which is not read; write it without")
        dictionary |= kind == _DICTIONARY
        unpacked, values, at = unpacked + size, values + counted, start + packed
    return Pages(unpacked, values, dictionary)


def _footer_length(path: Path) -> int:
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 8))
        return int.from_bytes(file.read(4), "little")


def _count(fields: Any, number: int) -> int:
    """A field that must be a number of things; -1 if it is not there, or not such a number."""
    value = fields.get(number) if isinstance(fields, dict) else None
    return value if type(value) is int and value >= 0 else -1


def _header(file: BinaryIO, at: int) -> tuple[dict[int, Any], int]:
    """(fields, where the page itself begins)."""
    for length in (2**12, _LONGEST_HEADER):
        file.seek(at)
        data = file.read(length)
        try:
            fields, used = _struct(data, 0, depth=4)
        except IndexError:
            continue
        return fields, at + used
    raise ValueError(f"the page header at byte {at:,} is damaged")


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, Any], int]:
    """(field number -> value, the byte behind). IndexError where the data end."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        step, kind, at = head >> 4, head & 15, at + 1
        if step:
            number += step
        else:
            number, at = _integer(data, at)
        if kind in (1, 2):
            fields[number] = kind == 1
        else:
            fields[number], at = _value(data, at, kind, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """(a value, the byte behind); None for text and for numbers that nobody asks for."""
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 3:
        return None, at + 1
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind == 12 and depth:
        return _struct(data, at, depth - 1)
    if kind == 9 and depth:
        count, of, at = data[at] >> 4, data[at] & 15, at + 1
        if count == 15:
            count, at = _varint(data, at)
        values = []
        for _ in range(count):
            value, at = _value(data, at, 3 if of in (1, 2) else of, depth - 1)
            values.append(value)
        return values, at
    raise ValueError("a header is damaged")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    number, at = _varint(data, at)
    return number >> 1 ^ -(number & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while data[at] & 0x80:
        number |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if shift > 63:
            raise ValueError("a header is damaged")
    return number | data[at] << shift, at + 1

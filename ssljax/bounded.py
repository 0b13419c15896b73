"""Reading what somebody else wrote: files, lines, JSON, npz archives. Every length is bounded, nothing is executed.

A file may lie about its size, unpack to a thousand times it, or nest brackets until Python gives up. All of that ends
in ValueError here, before it costs memory or time.
"""

import io
import json
import math
import os
import stat
import zipfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from etils import epath

LARGEST_RECORD = 128 * 2**20  # bytes of one picture, text or other member of a sample
LARGEST_JSON = 4 * 2**20  # bytes; as Python objects `[{},{},...` takes 30 times that
LARGEST_LINE = 2**20  # characters of a line in a table or a log
FREE_UNPACKED = 64 * 2**20  # bytes an archive may unpack to, whatever its size
UNPACKED_PER_BYTE = 128  # of a larger archive, at most; deflate reaches 1,032, real arrays rarely 100
_LARGEST_LIST = 2**20  # bytes of an archive's list of members: about 10,000 of them
# How much of a member is read at a time, by its compression: zipfile bounds the output of deflate, but unpacks all of
# so many bytes of bzip2 and LZMA, which can be 20,000 times as much.
_PIECES = {zipfile.ZIP_STORED: 2**18, zipfile.ZIP_DEFLATED: 2**18, zipfile.ZIP_BZIP2: 2**12, zipfile.ZIP_LZMA: 2**12}
_ARRAY_KINDS = "biufcSU"  # numbers and text; not objects (pickles) and not structures
_ARRAY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_file(path: str | os.PathLike[str], most: int = LARGEST_RECORD) -> bytes:
    """The content of a plain file of at most `most` bytes.

    Raises:
        ValueError: larger, or a pipe or device (behind a link), which could block or never end.
        OSError: missing or unreadable.
    """
    size = plain_size(path)
    if size > most:
        raise ValueError(f"{os.fspath(path)} has {size:,} bytes, over the limit of {most:,}")
    with open(path, "rb") as file:
        return file.read(most)


def is_plain(path: epath.Path) -> bool:
    """Whether `path`, local or remote, is a file that ends: no folder, and no pipe or device."""
    name = os.fspath(path)
    return path.is_file() and ("://" in name or os.path.isfile(name))  # epath calls everything but folders a file


def check_small(path: epath.Path, most: int = LARGEST_JSON) -> None:
    """Raises ValueError unless `path`, local or remote, is a plain file of at most `most` bytes; OSError without it."""
    size = path.stat().length
    if not is_plain(path):
        raise ValueError(f"{path} is not a plain file")
    if size > most:
        raise ValueError(f"{path} has {size:,} bytes, over the limit of {most:,}")


def read_json(path: epath.PathLike) -> Any:
    """The value in a JSON file, local or remote, of at most `LARGEST_JSON` bytes.

    Raises:
        ValueError: larger, damaged, nested endlessly, or no plain file.
        OSError: missing or unreadable.
    """
    path = epath.Path(path)
    check_small(path)
    return parse_json(path.read_bytes())


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text of at most `LARGEST_JSON` characters. Raises ValueError, also for endless nesting."""
    if len(text) > LARGEST_JSON:
        raise ValueError(f"JSON of {len(text):,} bytes is over the limit of {LARGEST_JSON:,}")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("the JSON is nested too deeply") from None


def read_lines(file: IO[str]) -> Iterator[str]:
    """The lines of a file. Raises ValueError for one of more than `LARGEST_LINE` characters."""
    while line := file.readline(LARGEST_LINE + 1):
        if len(line) > LARGEST_LINE:
            raise ValueError(f"a line is longer than the limit of {LARGEST_LINE:,} characters")
        yield line


def read_npz(path: str | os.PathLike[str], most: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of a numpy archive, by name.

    Args:
        most: bytes they may unpack to; by default `FREE_UNPACKED`, or `UNPACKED_PER_BYTE` for each byte of the file.

    Raises:
        ValueError: damaged; an array without a plain type (pickles could run code); members that are encrypted, share a
        name, lie about their shape or unpack to far more than the file.
        OSError: missing or unreadable.
    """
    size = plain_size(path)
    with _SmallReads(io.FileIO(path)) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check_unpacked(members, size, max(FREE_UNPACKED, UNPACKED_PER_BYTE * size) if most is None else most)
                return {member.filename.removesuffix(".npy"): _read_array(archive, member) for member in members}
        except Exception as error:  # zipfile and numpy raise a dozen types for damaged files
            raise ValueError(
                f"not a complete .npz archive of plain arrays, without pickled objects ({error})"
            ) from error


class _SmallReads(io.BufferedReader):
    """zipfile reads a list of members of any length in one piece, and spends 10 us on each."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(_LARGEST_LIST + 1 if size is None or size < 0 else min(size, _LARGEST_LIST + 1))
        if len(data) > _LARGEST_LIST:
            raise ValueError(f"its list of members has more than {_LARGEST_LIST:,} bytes")
        return data


def plain_size(path: str | os.PathLike[str]) -> int:
    """Bytes of a plain file. Raises ValueError for pipes and devices; OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.fspath(path)} is not a plain file")
    return status.st_size


def _check_unpacked(members: list[zipfile.ZipInfo], size: int, most: int) -> None:
    if len({member.filename.removesuffix(".npy") for member in members}) < len(members):
        raise ValueError("two members share a name")
    unpacked = sum(member.file_size for member in members)
    if unpacked > most:
        raise ValueError(f"its {size:,} bytes unpack to {unpacked:,}, over the limit of {most:,}")


def read_array_header(file: Any, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and type of an array in numpy's format; `file` stands at its data afterwards.

    Raises:
        ValueError: no such header; an array of anything but numbers and text; `name` says in messages whose it is.
    """
    version = np.lib.format.read_magic(file)
    if version not in _ARRAY_HEADERS:
        raise ValueError(f"{name!r} is in version {version} of the .npy format, which is not read")
    shape, columns_first, dtype = _ARRAY_HEADERS[version](file)
    if dtype.kind not in _ARRAY_KINDS or not dtype.itemsize:
        kind = "pickled objects, which are refused because they can run code" if dtype.hasobject else str(dtype)[:80]
        raise ValueError(f"{name!r} holds {kind}; text goes into np.array(texts, dtype=str)")
    if any(side < 0 for side in shape):
        raise ValueError(f"{name!r} announces {dtype}{list(shape)}")
    return shape, columns_first, dtype


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    name, piece = member.filename, _PIECES.get(member.compress_type)
    if piece is None:
        raise ValueError(f"{name!r} is compressed by method {member.compress_type}, which is not read")
    with archive.open(member) as file:
        shape, columns_first, dtype = read_array_header(file, name)
        size = member.file_size - file.tell()
        if math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"{name!r} announces {dtype}{list(shape)}, but has {size:,} bytes")
        content = np.empty(size, np.uint8)
        for start in range(0, size, piece):
            part = file.read(piece)
            if len(part) != min(piece, size - start):
                raise ValueError(f"{name!r} ends after {start + len(part):,} of {size:,} bytes")
            content[start : start + len(part)] = np.frombuffer(part, np.uint8)
    if dtype.kind == "U":
        points = content.view(np.dtype(np.uint32).newbyteorder(dtype.byteorder))
        if ((points > 0x10FFFF) | (points >> 11 == 0xD800 >> 11)).any():
            raise ValueError(f"{name!r} holds text that is no Unicode")
    array = content.view(dtype) if size else np.empty(shape, dtype)
    return array.reshape(shape[::-1]).T if columns_first else array.reshape(shape)

"""TIFF of any number of channels, pages and bits: `Tiff` (TIFF 6.0, BigTIFF, stacks of ImageJ).

The file is in memory and not trusted: what it announces is held against its size before anything is unpacked, and no
strip or tile unpacks to more than it has room for. (tifffile unpacks deflate without a limit, and needs imagecodecs,
which is not among our dependencies, for LZW.)
"""

import dataclasses
import io
import math
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import TiffImagePlugin

from ssljax.bounded import FREE_UNPACKED, UNPACKED_PER_BYTE
from ssljax.data.errors import BadSample
from ssljax.data.headers import MAX_BLOCKS

_TYPES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}  # of tags that hold integers
_TEXT = 2
_SIZES = {_TEXT: 1, **{kind: struct.calcsize(code) for kind, code in _TYPES.items()}}
_FORMATS = {1: "u", 2: "i", 3: "f"}
_NONE, _LZW, _DEFLATE, _PACKBITS = 1, 5, (8, 32946), 32773
_MOST_PAGES = 4096
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _DESCRIPTION, _SAMPLES, _ROWS = 256, 257, 258, 259, 270, 277, 278
_PLANAR, _PREDICTOR, _FORMAT, _KIND = 284, 317, 339, 254


@dataclass(frozen=True)
class _Page:
    """Where the pixels of a picture lie, in blocks: tiles, or strips as wide as the picture."""

    height: int
    width: int
    samples: int
    dtype: np.dtype
    planar: bool  # a block holds one sample
    block: tuple[int, int]  # height, width
    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    compression: int
    predictor: int

    @property
    def kind(self) -> tuple:
        return self.height, self.width, self.samples, self.dtype

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks down and across."""
        return -(-self.height // self.block[0]), -(-self.width // self.block[1])

    @property
    def block_bytes(self) -> int:
        return math.prod(self.block) * (1 if self.planar else self.samples) * self.dtype.itemsize


class Tiff:
    """A TIFF of which only the tags were read: `height`, `width`, `channels` (`samples` of them in the first page), and
    the pixels by `read`.

    The channels are those of the first picture, then those of each further page that resembles it. Reduced copies and
    masks do not count.

    Raises:
        BadSample: no TIFF; cut or damaged; a compression other than none, deflate, LZW and PackBits; more bits or
            pixels than are read.
    """

    def __init__(self, data: bytes, max_pixels: int):
        self._data = data
        try:
            pages = _pages(data)
        except (struct.error, IndexError, ZeroDivisionError, OverflowError) as error:
            raise BadSample(f"truncated or corrupt TIFF: {error}") from error
        if not pages:
            raise BadSample("a TIFF without a picture")
        first = pages[0]
        self._pages = [page for page in pages if page.kind == first.kind]
        self.height, self.width, self.samples = first.height, first.width, first.samples
        self.channels = first.samples * len(self._pages)
        self._max_pixels = max_pixels

    def read(self, channels: Sequence[int]) -> np.ndarray:
        """`[H, W, len(channels)]`, of the file's type. Raises BadSample, also for a channel that is not there."""
        if wrong := [channel for channel in channels if not 0 <= channel < self.channels]:
            raise BadSample(f"there is no channel {wrong[0]}: the TIFF has {self.channels}, counted from 0")
        first = self._pages[0]
        chosen = {channel // first.samples: self._pages[channel // first.samples] for channel in channels}
        unpacked = sum(math.prod(page.grid) * page.block_bytes for page in chosen.values())
        unpacked *= first.samples if first.planar else 1
        most = max(FREE_UNPACKED, UNPACKED_PER_BYTE * len(self._data))
        if unpacked > most:
            raise BadSample(f"{unpacked:,} bytes of pixels in {len(self._data):,} are over the limit of {most:,}")
        if (pixels := self.height * self.width * len(chosen)) > self._max_pixels:
            raise BadSample(f"{pixels:,} pixels are over the limit of {self._max_pixels:,}")
        try:
            pictures = {index: self._picture(page) for index, page in chosen.items()}
        except (BadSample, MemoryError):
            raise
        except Exception as error:  # zlib's and Pillow's many types
            raise BadSample(f"corrupt TIFF: {error}") from error
        return np.stack([pictures[c // first.samples][..., c % first.samples] for c in channels], -1)

    def _picture(self, page: _Page) -> np.ndarray:
        found = np.empty((page.height, page.width, page.samples), page.dtype.newbyteorder("="))
        down, across = page.grid
        for number in range(down * across * (page.samples if page.planar else 1)):
            sample, place = divmod(number, down * across)
            row, column = (at * side for at, side in zip(divmod(place, across), page.block, strict=True))
            target = found[row : row + page.block[0], column : column + page.block[1]]
            target = target[..., sample : sample + 1] if page.planar else target
            # The last strip ends with the picture, the last tile is whole.
            rows = target.shape[0] if page.block[1] == page.width else page.block[0]
            block = _block(self._data, page, number, rows)
            target[:] = block[: target.shape[0], : target.shape[1]]
        return found


def _block(data: bytes, page: _Page, number: int, rows: int) -> np.ndarray:
    """`[rows, width of a block, samples]`."""
    shape = (rows, page.block[1], 1 if page.planar else page.samples)
    size = math.prod(shape) * page.dtype.itemsize
    start = page.starts[number]
    packed = data[start : start + page.sizes[number]]
    if page.compression == _NONE:
        content = packed[:size]
    elif page.compression in _DEFLATE:
        content = zlib.decompressobj().decompress(packed, size)
    else:
        content = _by_libtiff(packed, rows, size // rows, page.compression)
    if len(content) < size:
        raise BadSample(f"truncated TIFF: block {number} has {len(content):,} of {size:,} bytes")
    if page.predictor == 3:
        return _floats(content, shape, page.dtype)
    block = np.frombuffer(content, page.dtype, math.prod(shape)).reshape(shape).astype(page.dtype.newbyteorder("="))
    return np.cumsum(block, 1, block.dtype) if page.predictor == 2 else block


def _by_libtiff(packed: bytes, rows: int, row: int, compression: int) -> bytes:
    """Bytes packed by LZW or PackBits, as the one strip of a grey picture that Pillow gives to libtiff."""
    tags = [(_WIDTH, row), (_HEIGHT, rows), (_BITS, 8), (_COMPRESSION, compression), (262, 1), (273, 8), (_SAMPLES, 1)]
    tags += [(_ROWS, rows), (279, len(packed))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    file = b"II*\0" + struct.pack("<I", 8 + len(packed)) + packed + struct.pack("<H", len(tags)) + directory + bytes(4)
    with TiffImagePlugin.TiffImageFile(io.BytesIO(file)) as picture:
        return picture.tobytes()


def _floats(content: bytes, shape: tuple[int, int, int], dtype: np.dtype) -> np.ndarray:
    """Undoes the predictor for floats: of each row all first bytes, then all second ones; and differences of them."""
    rows, width, samples = shape
    planes = np.frombuffer(content, np.uint8, math.prod(shape) * dtype.itemsize).reshape(rows, -1, samples)
    planes = np.cumsum(planes, 1, np.uint8).reshape(rows, dtype.itemsize, width * samples)
    words = np.ascontiguousarray(planes.transpose(0, 2, 1)).view(dtype.newbyteorder(">"))
    return words.reshape(shape).astype(dtype.newbyteorder("="))


def _pages(data: bytes) -> list[_Page]:
    if data[:2] not in (b"II", b"MM"):
        raise BadSample(f"not a TIFF (starts with {data[:8]!r})")
    order = {b"II": "<", b"MM": ">"}[data[:2]]
    (version,) = struct.unpack_from(order + "H", data, 2)
    if version not in (42, 43):
        raise BadSample(f"not a TIFF (version {version})")
    big = version == 43
    (at,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    pages, seen = [], set()
    while at:
        if at in seen or len(seen) == _MOST_PAGES:
            raise BadSample(f"corrupt TIFF: its pages go round in a circle, or are more than {_MOST_PAGES}")
        seen.add(at)
        tags, at = _directory(data, order, big, at)
        if not tags.get(_KIND, (0,))[0] & 0b101:
            pages.append(_page(tags, order, len(data)))
            if len(pages) == 1 and len(stack := _stack(pages[0], tags.get(_DESCRIPTION, (b"",)), len(data))) > 1:
                return stack
    return pages


def _directory(data: bytes, order: str, big: bool, at: int) -> tuple[dict[int, tuple], int]:
    """Tag -> its integers (a text: its bytes), and where the next directory lies."""
    count, offset, head = ("Q", "Q", 8) if big else ("H", "I", 2)
    entry, room = (20, 8) if big else (12, 4)
    (entries,) = struct.unpack_from(order + count, data, at)
    _check_blocks(entries, len(data), "tags")
    tags: dict[int, tuple] = {}
    for place in range(at + head, at + head + entry * entries, entry):
        tag, kind, values = struct.unpack_from(order + "HH" + offset, data, place)
        where = place + entry - room
        size = _SIZES.get(kind, 0) * values
        if size > room:
            (where,) = struct.unpack_from(order + offset, data, where)
        if not size or tag in tags:
            continue
        if where + size > len(data):
            raise BadSample(f"truncated or corrupt TIFF: the tag {tag} lies beyond its end")
        if tag == _DESCRIPTION and kind == _TEXT:
            tags[tag] = (data[where : where + min(size, 2**16)],)
        elif tag in _USED and kind in _TYPES:
            _check_blocks(values, len(data), "strips or tiles")
            tags[tag] = struct.unpack_from(f"{order}{values}{_TYPES[kind]}", data, where)
    (following,) = struct.unpack_from(order + offset, data, at + head + entry * entries)
    return tags, following


_USED = {_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _ROWS, _PLANAR, _PREDICTOR, _FORMAT, _KIND}
_USED |= {273, 279, 322, 323, 324, 325}  # strips: starts, sizes; tiles: width, height, starts, sizes


def _check_blocks(count: int, size: int, what: str) -> None:
    if count > MAX_BLOCKS + size // 1024:
        raise BadSample(f"more than {MAX_BLOCKS + size // 1024:,} {what} in {size:,} bytes")


def _page(tags: dict[int, tuple], order: str, size: int) -> _Page:
    def one(tag: int, default: int = 0) -> int:
        return tags.get(tag, (default,))[0]

    height, width, samples = one(_HEIGHT), one(_WIDTH), one(_SAMPLES, 1)
    bits, formats = set(tags.get(_BITS, (1,))), set(tags.get(_FORMAT, (1,)))
    if len(bits) > 1 or len(formats) > 1 or (kind := _FORMATS.get(min(formats))) is None:
        raise BadSample(f"a TIFF whose channels have {sorted(bits)} bits and the formats {sorted(formats)} is not read")
    if (depth := min(bits)) not in ((32, 64) if kind == "f" else (8, 16, 32)):
        raise BadSample(f"a TIFF with {depth} bits a sample is not read; it must have 8, 16, 32 (floats: 32, 64)")
    compression, predictor = one(_COMPRESSION, 1), one(_PREDICTOR, 1)
    if compression not in (_NONE, _LZW, *_DEFLATE, _PACKBITS):
        raise BadSample(
            f"a TIFF with compression {compression} is not read; save it without any, or with deflate or LZW"
        )
    if predictor not in (1, 2, 3) or (predictor == 2) > (kind != "f") or (predictor == 3) > (kind == "f"):
        raise BadSample(f"a TIFF with the predictor {predictor} for {depth} bits ({kind}) is not read")
    tiled = 324 in tags
    block = (one(323), one(322)) if tiled else (min(one(_ROWS, height), height), width)
    starts, sizes = (tags.get(tag, ()) for tag in ((324, 325) if tiled else (273, 279)))
    planar = one(_PLANAR, 1) == 2 and samples > 1
    dtype = np.dtype(f"{order}{kind}{depth // 8}")
    if min(height, width, samples, *block) < 1 or max(height, width, samples, *block) >= 2**31:
        raise BadSample(f"corrupt TIFF: {height}x{width} pixels, {samples} samples, in blocks of {block}")
    page = _Page(height, width, samples, dtype, planar, block, starts, sizes, compression, predictor)
    blocks = math.prod(page.grid) * (samples if planar else 1)
    if len(starts) < blocks or len(sizes) < blocks:
        raise BadSample(f"corrupt TIFF: {len(starts):,} starts and {len(sizes):,} sizes of {blocks:,} strips or tiles")
    if compression == _NONE and sum(sizes[:blocks]) > UNPACKED_PER_BYTE * size:
        raise BadSample("corrupt TIFF: its strips or tiles overlap")
    return page


def _stack(page: _Page, description: tuple, size: int) -> list[_Page]:
    """The pages of a stack of ImageJ, which may describe the first only: the others follow it without a gap."""
    found = re.match(rb"ImageJ=.*?\bimages=(\d{1,6})\b", description[0], re.DOTALL)
    count, whole = int(found[1]) if found else 1, page.height * page.width * page.samples * page.dtype.itemsize
    first, *others = page.starts
    if page.compression != _NONE or others or first + count * whole > size:
        return [page]
    starts = [first + i * whole for i in range(min(count, _MOST_PAGES))]
    return [dataclasses.replace(page, starts=(start,), sizes=(whole,)) for start in starts]

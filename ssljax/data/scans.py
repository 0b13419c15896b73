"""Volumes as files hold them, NIfTI and npy, of which only what is asked for is read: `open_volume`."""

import gzip
import io
import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np

from ssljax.bounded import FREE_UNPACKED, UNPACKED_PER_BYTE, read_array_header
from ssljax.data.errors import BadSample
from ssljax.data.media import open_media

Triple = tuple[int, int, int]
Range = tuple[float, float]
Read = Callable[[int, int], Any]  # (offset, size) -> bytes, fewer at the end

_PERCENTILES = (0.5, 99.5)
_RUNS, _RUN = 64, 1024  # a volume is looked at in so many places, so many voxels each, to find its percentiles
_GOLDEN = (math.sqrt(5) - 1) / 2
_GZIP = b"\x1f\x8b"
_PIECE = 2**20  # bytes unpacked at a time
_LARGEST_HEADER = 2**16  # bytes of an npy header; numpy itself stops at 10,000


class Scan:
    """An opened volume: `shape` (D, H, W), `spacing` in millimetres (None if unknown), and its voxels by `box`.

    `scale` (slope, intercept) makes intensities of what is stored.
    """

    def __init__(self, read: Callable[[int, int], Any], offset: int, dtype: np.dtype, shape: tuple[int, ...]):
        """`read(start, size)` gives bytes; the array `shape` lies at `offset` in C order."""
        self._read, self._offset, self.dtype, self._stored = read, offset, dtype, shape
        self._axes, self._mirrored = tuple(range(len(shape))), (False,) * len(shape)
        self.spacing: np.ndarray | None = None
        self.scale: Range = (1.0, 0.0)

    @property
    def shape_and_channels(self) -> tuple[int, ...]:
        return tuple(self._stored[axis] for axis in self._axes)

    @property
    def shape(self) -> Triple:
        depth, height, width = self.shape_and_channels[:3]
        return depth, height, width

    @property
    def end(self) -> int:
        """Bytes of the file up to the last voxel."""
        return self._offset + math.prod(self._stored) * self.dtype.itemsize

    def turn(self, axes: Sequence[int], mirrored: Sequence[bool]) -> None:
        """Axis i of what `box` gives is the stored axis `axes[i]`, backwards if `mirrored[i]`."""
        self._axes, self._mirrored = tuple(axes), (*mirrored, *([False] * (len(axes) - len(mirrored))))

    def box(self, start: Sequence[int], stop: Sequence[int]) -> np.ndarray:
        """`[d, h, w, c]`, as stored."""
        first, last = [0] * len(self._stored), list(self._stored)
        for axis, mirror, a, b in zip(self._axes, self._mirrored, start, stop, strict=False):
            side = self._stored[axis]
            first[axis], last[axis] = (side - int(b), side - int(a)) if mirror else (int(a), int(b))
        backwards = tuple(slice(None, None, -1 if mirror else 1) for mirror in self._mirrored)
        voxels = self._box(first, last).transpose(self._axes)[backwards]
        return voxels if voxels.ndim == 4 else voxels[..., None]

    def _box(self, start: list[int], stop: list[int]) -> np.ndarray:
        """One read for each place on the axes before the last two (three, where C is the last); channels are few."""
        whole = len(self._stored) - (3 if len(self._stored) == 4 and self._axes[3] == 3 else 2)
        sides = [b - a for a, b in zip(start, stop, strict=True)]
        row = math.prod(self._stored[whole + 1 :])
        inner = tuple(slice(a, b) for a, b in zip(start[whole + 1 :], stop[whole + 1 :], strict=True))
        found = np.empty(sides, self.dtype)
        for place in np.ndindex(*sides[:whole]):
            at = 0
            for i, side in enumerate(self._stored[:whole]):
                at = at * side + start[i] + place[i]
            rows = self._voxels((at * self._stored[whole] + start[whole]) * row, sides[whole] * row)
            found[place] = rows.reshape(sides[whole], *self._stored[whole + 1 :])[(slice(None), *inner)]
        return found

    def _voxels(self, start: int, count: int) -> np.ndarray:
        size = self.dtype.itemsize
        content = self._read(self._offset + start * size, count * size)
        if len(content) < count * size:
            raise BadSample(f"truncated: {shown_as(self)} are more than the file holds")
        return np.frombuffer(content, self.dtype)

    def window(self) -> Range:
        """The range of intensities where nobody gave one: see `Volume.window`."""
        if self.dtype.kind == "b" or (self.dtype.itemsize == 1 and self.scale == (1, 0)):
            whole = np.iinfo(self.dtype) if self.dtype.kind != "b" else None
            return (0.0, 1.0) if whole is None else (float(whole.min), float(whole.max))
        voxels = math.prod(self._stored)
        run = min(_RUN, voxels)
        # Places that no period of rows and planes can share.
        places = [int(i * _GOLDEN % 1 * (voxels - run + 1)) for i in range(_RUNS)] if voxels > _RUNS * _RUN else None
        seen = self._voxels(0, voxels) if places is None else np.concatenate([self._voxels(p, run) for p in places])
        with np.errstate(all="ignore"):
            return typical_range(seen.astype(np.float64) * self.scale[0] + self.scale[1])


def typical_range(values: np.ndarray) -> Range:
    """The 0.5th and 99.5th percentile of float64 values; NaN and infinite ones do not count."""
    values = values[np.abs(values) < 1e300]  # twice that is infinite
    if not len(values):
        return 0.0, 1.0
    low, high = np.percentile(values, _PERCENTILES)
    if not low < high:  # hardly anything but background
        low, high = values.min(), values.max()
    return float(low), float(high if low < high else low + max(1.0, abs(low)))


def to_unit(raw: np.ndarray, window: Range, scale: Range = (1.0, 0.0)) -> np.ndarray:
    """float32: the intensities `raw * slope + intercept` with `window` at 0 and 1, clipped. NaN becomes 0."""
    low, high = window
    wide = raw.dtype.itemsize > 2  # only 8 and 16 bits leave float32 enough digits
    with np.errstate(all="ignore"):
        unit = raw.astype(np.float64 if wide else np.float32)
        unit *= scale[0] / (high - low)
        unit += (scale[1] - low) / (high - low)
        unit = np.fmax(unit, 0, out=unit)  # of NaN and 0, it takes 0
        return np.minimum(unit, 1, out=unit).astype(np.float32, copy=False)


@contextmanager
def open_volume(value: Any, channels: int | None = 1) -> Iterator[Scan]:
    """`value` as in `Volume`; of any number of channels with None. Raises BadSample, also later, by `Scan.box`."""
    if isinstance(value, np.ndarray):
        _check(value.shape, value.dtype, channels)
        content = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
        yield Scan(lambda start, size: content[start : start + size], 0, value.dtype, value.shape)
        return
    with open_media(value, "volume") as file:
        read, size = _reading(file)
        try:
            scan = _from_npy(read) if read(0, 6) == np.lib.format.MAGIC_PREFIX else _from_nifti(read)
        except (BadSample, MemoryError, OSError):
            raise
        except Exception as error:  # nibabel and numpy raise many types on headers that lie
            raise BadSample(f"corrupt volume: {error}") from error
        _check(scan.shape_and_channels, scan.dtype, channels)
        if size is not None and scan.end > size:
            raise BadSample(f"truncated: {shown_as(scan)} need {scan.end:,} bytes, the file has {size:,}")
        yield scan


def _reading(file: BinaryIO) -> tuple[Read, int | None]:
    """How to read from a file that may be compressed, and how many bytes it has, where that is known."""
    if file.read(2) == _GZIP:
        return _Unpacked(file).read, None
    if isinstance(file, io.BytesIO):
        content = memoryview(file.getvalue())
        return lambda start, size: content[start : start + size], len(content)
    descriptor = file.fileno()
    return lambda start, size: os.pread(descriptor, size, start), os.fstat(descriptor).st_size


class _Unpacked:
    """What a gzip file holds, as far as it was asked for."""

    def __init__(self, file: BinaryIO):
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        self._file = gzip.GzipFile(fileobj=file)
        self._size, self._most = size, max(FREE_UNPACKED, UNPACKED_PER_BYTE * size)
        self._content = bytearray()

    def read(self, start: int, size: int) -> bytearray:
        stop = start + size
        if stop > self._most:
            raise BadSample(f"its {self._size:,} bytes unpack to {stop:,}, over the limit of {self._most:,}")
        try:
            while len(self._content) < stop:
                piece = self._file.read(min(_PIECE, stop - len(self._content)))
                if not piece:
                    break
                self._content += piece
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BadSample(f"truncated or corrupt gzip: {error}") from error
        return self._content[start:stop]


def _check(shape: tuple[int, ...], dtype: np.dtype, channels: int | None) -> None:
    what = f"a volume of {str(dtype)[:40]}{list(shape)}"
    if len(shape) not in (3, 4) or min(shape) < 1:
        raise BadSample(f"{what}; expected [D, H, W] or [D, H, W, C]")
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise BadSample(f"{what}; expected integers or floats of at most 64 bits")
    if channels is not None and (found := shape[3] if len(shape) == 4 else 1) != channels:
        raise BadSample(f"{what} has {found} channels (or frames), but Volume.channels is {channels}")


def _from_npy(read: Read) -> Scan:
    file = io.BytesIO(read(0, _LARGEST_HEADER))
    shape, columns_first, dtype = read_array_header(file, "volume")
    if not columns_first:
        return Scan(read, file.tell(), dtype, shape)
    scan = Scan(read, file.tell(), dtype, shape[::-1])
    scan.turn(range(len(shape))[::-1], [False] * len(shape))
    return scan


def _from_nifti(read: Read) -> Scan:
    block = bytes(read(0, 540))
    sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")} & {348, 540}
    if not sizes:
        raise BadSample(f"not a volume (starts with {block[:8]!r}); NIfTI and npy are read")
    import nibabel  # slow to import
    from nibabel.affines import voxel_sizes

    (size,) = sizes
    if len(block) < size:
        raise BadSample("truncated within its header")
    header = (nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header)(block[:size], check=False)
    if not bytes(header["magic"]).startswith((b"n+1", b"n+2")):
        raise BadSample("a NIfTI header whose voxels lie in a file of their own (.img); write them into one .nii file")
    sides = [int(side) for side in header.get_data_shape()]
    sides += [1] * (3 - len(sides))
    shape = (*sides[:3], *(side for side in sides[3:] if side != 1))
    if len(shape) > 4 or min(shape) < 1:
        raise BadSample(f"a volume of {sides}; expected three sides above 0, and at most one more axis, of channels")
    offset = int(header["vox_offset"]) or size + 4
    if offset < size:
        raise BadSample(f"corrupt NIfTI: its voxels start at byte {offset}, within the header")
    slope, intercept = header.get_slope_inter()
    affine = header.get_best_affine()
    orientation = nibabel.io_orientation(affine)
    lengths = voxel_sizes(affine)
    if not np.isfinite(orientation).all() or not (np.isfinite(lengths) & (lengths > 0)).all():
        raise BadSample("corrupt NIfTI: its affine does not say where the axes point")
    scan = Scan(read, offset, header.get_data_dtype(), shape[::-1])
    order = np.argsort(orientation[:, 0])
    scan.turn([*(len(shape) - 1 - order), *([0] if len(shape) == 4 else [])], [*(orientation[order, 1] < 0)])
    scan.spacing = lengths[order]
    scan.scale = (1.0, 0.0) if slope is None else (float(slope), float(intercept or 0.0))
    return scan


def shown_as(scan: Scan) -> str:
    """For messages: `int16[91, 109, 91]`."""
    return f"{scan.dtype}{list(scan.shape_and_channels)}"

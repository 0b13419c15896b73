"""Point clouds on the host: so many points of a cloud. `Points` is what `HostTransform.readers` takes."""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssljax.bounded import read_array_header
from ssljax.data.errors import BadSample
from ssljax.data.fields import Prepared, shown
from ssljax.data.media import read_media

_TYPES = {
    **{"char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4"},
    **{"int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4"},
    **{"float": "f4", "float32": "f4", "double": "f8", "float64": "f8"},
}
_ORDERS = {b"binary_little_endian": "<", b"binary_big_endian": ">", b"ascii": "="}
_HEADER, _LINES = 2**16, 512  # bytes and lines of a ply header, at most
_WORD = 64  # characters of a number in an ascii file, at most
_CHUNK = 2**16  # lines of an ascii file that are read at a time
_MOST = 2**24  # points of a file
_PLACE = ("x", "y", "z")


@dataclass(frozen=True)
class Points:
    """`size` points of a cloud: `{"points": float32 [size, 3 + F]}`.

    Values: a ply file (ascii, or binary of either byte order), or a `.npy`, as bytes or a `Path`; arrays
    `[N, 3 or more]`. The points are drawn without replacement; a smaller cloud gives each point, and random ones
    again. Without an `rng` they are taken in even steps through the cloud. NaN and infinite points are left out.

    Raises:
        BadSample: no such file; cut or damaged; without a feature that is asked for; no points.
    """

    size: int
    features: tuple[str, ...] = ()  # properties of a ply, such as nx, red (8 and 16 bits become 0 to 1); or columns
    unit_sphere: bool = False  # the centroid of the whole cloud to the origin, its farthest point to radius 1

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"Points.size must be at least 1, got {self.size}")

    def __call__(self, value: Any, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        cloud = self.prepare(value).array
        n, size = len(cloud), self.size
        if rng is None:
            chosen = np.arange(size) * n // size if n >= size else np.arange(size) % n
        else:
            chosen = rng.choice(n, min(n, size), replace=False)
            chosen = np.concatenate([chosen, rng.integers(n, size=max(0, size - n))])
        return {"points": cloud[chosen]}

    def prepare(self, value: Any) -> Prepared:
        """The whole cloud, float32 `[N, 3 + F]`."""
        if isinstance(value, Prepared):
            return value
        cloud = value if isinstance(value, np.ndarray) else _read(read_media(value, "points"), self.features)
        width = 3 + len(self.features)
        if cloud.ndim != 2 or cloud.shape[1] < width or cloud.dtype.kind not in "iuf":
            raise BadSample(f"'points' is {shown(cloud)}; expected numbers [N, {width}]")
        cloud = cloud[:, :width]
        with np.errstate(all="ignore"):
            if not np.isfinite(cloud).all():
                cloud = cloud[np.isfinite(cloud).all(1)]
            if not len(cloud):
                raise BadSample("a cloud without a point")
            if self.unit_sphere:
                cloud = _in_unit_sphere(cloud)
            cloud = cloud.astype(np.float32, copy=False)
        if not np.isfinite(cloud).all():
            raise BadSample("coordinates that do not fit into 32 bits")
        return Prepared(cloud)

    def blank(self) -> dict[str, np.ndarray]:
        """Zeros of the same shape and type."""
        return {"points": np.zeros((self.size, 3 + len(self.features)), np.float32)}


def _in_unit_sphere(cloud: np.ndarray) -> np.ndarray:
    place = cloud[:, :3].astype(np.float64)  # of coordinates on the earth, float32 keeps metres only
    place -= place.mean(0)
    radius = np.sqrt((place**2).sum(1).max())
    place /= radius if radius > 0 else 1
    return np.concatenate([place, cloud[:, 3:]], 1)


def _read(data: bytes, features: tuple[str, ...]) -> np.ndarray:
    try:
        if data.startswith(np.lib.format.MAGIC_PREFIX):
            return _from_npy(data)
        if data.startswith(b"ply"):
            return _from_ply(data, features)
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # numbers that are none, headers that lie
        raise BadSample(f"corrupt points: {error}") from error
    raise BadSample(f"not a point cloud (starts with {data[:8]!r}); ply and npy are read")


def _from_npy(data: bytes) -> np.ndarray:
    file = io.BytesIO(data)
    shape, columns_first, dtype = read_array_header(file, "points")
    count = int(np.prod(shape, dtype=object))
    if count * dtype.itemsize != len(data) - file.tell():
        raise BadSample(f"truncated: {dtype}{list(shape)}, but {len(data) - file.tell():,} bytes")
    array = np.frombuffer(data, dtype, count, file.tell())
    return array.reshape(shape[::-1]).T if columns_first else array.reshape(shape)


# PLY (Turk 1994) -----------------------------------------------------------------------------------------------------


@dataclass
class _Element:
    name: bytes
    count: int
    properties: list[tuple[str, str]]  # name, numpy type; "" for a list


def _from_ply(data: bytes, features: tuple[str, ...]) -> np.ndarray:
    order, elements, at = _ply_header(data)
    wanted = (*_PLACE, *features)
    for element in elements:
        if element.name == b"vertex":
            names = [name for name, _ in element.properties]
            if missing := [name for name in wanted if name not in names]:
                raise BadSample(f"the ply's vertices have no {missing[0]!r}, only {', '.join(names)[:200]}")
            if len(set(names)) < len(names) or not all(kind for _, kind in element.properties):
                raise BadSample("vertices with lists, or two properties of one name, are not read")
            if element.count > _MOST:
                raise BadSample(f"{element.count:,} points are over the limit of {_MOST:,}")
            return (_ascii if order == "=" else _binary)(data, at, order, element, wanted)
        at = _after(data, at, order, element)
    raise BadSample("the ply has no element 'vertex'")


def _ply_header(data: bytes) -> tuple[str, list[_Element], int]:
    """Byte order (`=`: ascii), elements, and where the header ends."""
    end = data.find(b"end_header", 0, _HEADER)
    at = data.find(b"\n", end, end + 12) + 1
    if end < 0 or not at:
        raise BadSample("truncated ply: its header does not end")
    order, elements = "", []
    lines = data[:end].splitlines()
    if len(lines) > _LINES:
        raise BadSample(f"a ply header of more than {_LINES} lines")
    for line in lines:
        match line.split():
            case [b"format", name, _] if name in _ORDERS:
                order = _ORDERS[name]
            case [b"element", name, count]:
                elements.append(_Element(name, int(count), []))
                if elements[-1].count < 0:
                    raise BadSample(f"corrupt ply: {elements[-1].count} of an element")
            case [b"property", b"list", _, _, name]:
                elements[-1].properties.append((name.decode(), ""))
            case [b"property", kind, name]:
                elements[-1].properties.append((name.decode(), _TYPES[kind.decode()]))
    if not order:
        raise BadSample("corrupt ply: no known format")
    return order, elements, at


def _after(data: bytes, at: int, order: str, element: _Element) -> int:
    """Where the element after this one starts."""
    if order == "=":
        if element.count > len(data) - at:
            raise BadSample(f"truncated ply: {element.count:,} of an element in {len(data) - at:,} bytes")
        for _ in range(element.count):
            at = data.index(b"\n", at) + 1
        return at
    if not all(kind for _, kind in element.properties):
        raise BadSample(f"the lists of {element.name[:40]!r} come before the vertices, which is not read")
    return at + element.count * sum(np.dtype(kind).itemsize for _, kind in element.properties)


def _binary(data: bytes, at: int, order: str, element: _Element, wanted: tuple[str, ...]) -> np.ndarray:
    dtype = np.dtype([(name, order + kind) for name, kind in element.properties])
    if element.count * dtype.itemsize > len(data) - at:
        raise BadSample(f"truncated ply: {element.count:,} vertices in {len(data) - at:,} bytes")
    vertices = np.frombuffer(data, dtype, element.count, at)
    return np.stack([_scaled(vertices[name], name) for name in wanted], 1)


def _ascii(data: bytes, at: int, order: str, element: _Element, wanted: tuple[str, ...]) -> np.ndarray:
    width = len(element.properties)
    if element.count * 2 * width > len(data) - at + 1:
        raise BadSample(f"truncated ply: {element.count:,} vertices in {len(data) - at:,} bytes")
    columns = [[name for name, _ in element.properties].index(name) for name in wanted]
    file, left, parts = io.BytesIO(data), element.count, []
    file.seek(at)
    while left:
        lines = list(itertools.islice(_lines(file, _WORD * width), min(left, _CHUNK)))
        if not lines:
            raise BadSample(f"truncated ply: {element.count - left:,} of {element.count:,} vertices")
        parts.append(np.loadtxt(lines, np.float64, comments=None, usecols=columns, ndmin=2))
        left -= len(lines)
    table = np.concatenate(parts) if parts else np.zeros((0, len(wanted)))
    kinds = dict(element.properties)
    return np.stack([_scaled(table[:, i], name, kinds[name]) for i, name in enumerate(wanted)], 1)


def _lines(file: io.BytesIO, most: int) -> Iterator[str]:
    """Those that are not empty."""
    while line := file.readline(most):
        if len(line) == most and not line.endswith(b"\n"):
            raise BadSample(f"corrupt ply: a line of more than {most} characters")
        if not line.isspace():
            yield line.decode("ascii")


def _scaled(column: np.ndarray, name: str, kind: str = "") -> np.ndarray:
    """Colours of 8 and 16 bits to [0, 1]; the rest as it is."""
    most = {"u1": 255.0, "u2": 65_535.0}.get(kind or column.dtype.str[1:])
    column = column.astype(np.float64 if column.dtype.itemsize > 4 or column.dtype.kind in "iu" else np.float32)
    return column / most if most and name not in _PLACE else column

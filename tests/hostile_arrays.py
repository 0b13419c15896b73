"""Hostile volumes, point clouds, TIFFs of many channels and graphs, built by code: name -> (files, refusal)."""

import gzip
import io
import struct
import zlib
from collections.abc import Mapping

import numpy as np

Files = Mapping[str, bytes]


def nifti(sides: tuple[int, ...], voxels: bytes, spacing: float = 1.0) -> bytes:
    """int16, of any sides."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into(f"<{1 + len(sides)}h", header, 40, len(sides), *sides)
    struct.pack_into("<hh", header, 70, 4, 16)
    struct.pack_into("<8f", header, 76, 1.0, *[spacing] * 7)
    struct.pack_into("<f", header, 108, 352.0)
    header[344:348] = b"n+1\0"
    return bytes(header) + voxels


def tiff(side: int, pixels: bytes, compression: int) -> bytes:
    """A grey square in one strip."""
    tags = {256: side, 257: side, 258: 8, 259: compression, 273: 8, 277: 1, 278: side, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def ply(kind: str, count: int, body: bytes) -> bytes:
    places = "".join(f"property float {axis}\n" for axis in "xyz")
    return f"ply\nformat {kind} 1.0\nelement vertex {count}\n{places}end_header\n".encode() + body


def npz(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def graph(nodes: int, columns: int) -> dict[str, np.ndarray]:
    none, shape = np.zeros(0, int), np.array([nodes, columns])
    features = {"feat_data": none, "feat_indices": none, "feat_indptr": np.zeros(nodes + 1, int), "feat_shape": shape}
    return {**features, "labels": np.zeros(nodes, int), "edges": np.zeros((0, 2), int)}


ZEROS = bytes(2**28)
VOLUMES = {
    "gzip bomb": (lambda: {"a.nii.gz": gzip.compress(nifti((2000, 2000, 2000), ZEROS), 6)}, "over the limit"),
    "sides of nothing": (lambda: {"a.nii": nifti((32767,) * 7, bytes(99))}, "expected three sides|truncated"),
    "voxels of a nanometre": (lambda: {"a.nii": nifti((8, 8, 8), bytes(1024), 1e-6)}, None),
    "voxels of the earth": (lambda: {"a.nii": nifti((8, 8, 8), bytes(1024), 1e30)}, None),
}
POINTS = {
    "a billion vertices": (lambda: {"a.ply": ply("ascii", 10**9, b"1 2 3\n")}, "over the limit"),
    "a line without end": (lambda: {"a.ply": ply("ascii", 10**6, ZEROS[: 2**25])}, "more than 192 characters"),
    "empty lines": (lambda: {"a.ply": ply("ascii", 10**5, b"\n" * 2**22)}, "truncated"),
}
BANDS = {
    "deflate bomb": (lambda: {"a.tif": tiff(2**14, zlib.compress(ZEROS, 9), 8)}, "over the limit"),
    "deflate bomb behind a small picture": (lambda: {"a.tif": tiff(8, zlib.compress(ZEROS, 9), 8)}, None),
    "lzw of nothing": (lambda: {"a.tif": tiff(8000, bytes(2**12), 5)}, "corrupt|truncated"),
    "packbits bomb": (lambda: {"a.tif": tiff(8000, b"\x81\0" * 2**15, 32773)}, "corrupt|truncated"),
}
GRAPHS = {
    "dense features": (lambda: {"g.npz": npz(**graph(2**16, 2**16))}, "over 268,435,456 numbers"),
}

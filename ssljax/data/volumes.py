"""Volumes on the host: crops of CT, MR, microscopy, voxel grids. `Volume` is what `HostTransform.readers` takes."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ssljax.data.errors import BadSample
from ssljax.data.fields import Prepared
from ssljax.data.scans import Range, Scan, Triple, open_volume, to_unit

_SCALES = {"uint8": 255, "uint16": 65_535, "float32": 1}


@dataclass(frozen=True)
class Volume:
    """Crops of a volume: `{"volume": [D, H, W, C]}`, `[count, D, H, W, C]` for more than one, all from one opening.

    Values: NIfTI (`.nii`, `.nii.gz`) or `.npy`, as bytes or a `Path`; arrays `[D, H, W]` or `[D, H, W, C]`. A crop has
    a random place, or the central one without an `rng`; where the volume is smaller than `size`, it lies in the middle
    of zeros. Of a file no more is read than the crops need, except that gzip has to be unpacked up to their end, which
    takes some fifty times as long: unpack such files once.

    - Axes: those of an array as they are. NIfTI is turned and mirrored to RAS+: axis 0 runs to the right of the
      patient, 1 to the front, 2 to the head, as `nibabel.as_closest_canonical` does it. Its fourth axis is C.
    - `spacing`: linear interpolation, the kernel stretched over all voxels that it skips where there are fewer.
    - `window`: these intensities become 0 and 1; what lies outside is clipped. None: the range of the type for bool and
      8 bits, else the 0.5th and 99.5th percentile of the whole volume, from 65,536 of its voxels. NaN becomes 0.
    - `dtype`: an integer type holds 0 to 1 across its whole range (`VolumeView` divides by it). Eight bits are the
      default: a crop of 96 x 96 x 96 then costs 0.8 MiB on its way to the device, and an 8-bit volume stays as it is.

    Raises:
        BadSample: no such file; cut, damaged, or announcing what it does not hold; another number of channels; no
            voxel size where there is a `spacing`; a crop of more than `max_voxels`.
    """

    size: Triple
    count: int = 1  # crops
    channels: int = 1
    spacing: tuple[float, float, float] | None = None  # millimetres a voxel, which the file must know
    window: Range | None = None
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    max_voxels: int = 2**27  # read at once: for a crop, or for the whole where volumes are cached

    def __post_init__(self):
        if min(*self.size, self.count, self.channels) < 1:
            raise ValueError(f"size {self.size}, count {self.count} and channels {self.channels} must be at least 1")
        if self.window is not None and not -math.inf < self.window[0] < self.window[1] < math.inf:
            raise ValueError(f"window must be (low, high) with low < high, got {self.window}")
        if self.spacing is not None and not all(0 < side < math.inf for side in self.spacing):
            raise ValueError(f"spacing is in millimetres, above 0; got {self.spacing}")

    def __call__(self, value: Any, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        if isinstance(value, Prepared):
            boxes = self._boxes(value.array.shape[:3], rng)
            return self._sample([_padded(value.array, box) for box in boxes])
        with open_volume(value, self.channels) as scan:
            steps, shape = self._grid(scan)
            window = self.window or scan.window()
            crops = []
            for start, stop in self._boxes(shape, rng):
                inside = np.maximum(start, 0), np.minimum(stop, shape)
                part = self._read(scan, window, steps, *inside)
                crops.append(_padded(part, (start - inside[0], stop - inside[0])))
        return self._sample(crops)

    def prepare(self, value: Any) -> Any:
        """The whole volume, turned, resampled and windowed."""
        if isinstance(value, Prepared):
            return value
        with open_volume(value, self.channels) as scan:
            steps, shape = self._grid(scan)
            start, stop = np.zeros(3, int), np.array(shape)
            return Prepared(self._read(scan, self.window or scan.window(), steps, start, stop))

    def blank(self) -> dict[str, np.ndarray]:
        """Zeros of the same shape and type."""
        return self._sample([np.zeros((*self.size, self.channels), self.dtype)] * self.count)

    def _grid(self, scan: Scan) -> tuple[np.ndarray | None, Triple]:
        """Voxels of the file for each of ours, along each axis, and how many of ours there are."""
        if self.spacing is None:
            return None, scan.shape
        if scan.spacing is None:
            raise BadSample("the volume does not say how large its voxels are, so it has no 'spacing' to change")
        steps = np.array(self.spacing) / scan.spacing
        sides = [max(1, round(min(n / step, 2.0**31))) for n, step in zip(scan.shape, steps, strict=True)]
        return steps, (sides[0], sides[1], sides[2])

    def _boxes(self, shape: Sequence[int], rng: np.random.Generator | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        room = np.array(shape) - self.size
        starts = np.repeat((room // 2)[None], self.count, 0)
        if rng is not None:
            starts = np.where(room > 0, rng.integers(0, np.maximum(room, 0) + 1, (self.count, 3)), starts)
        return ((start, start + self.size) for start in starts)

    def _read(self, scan: Scan, window: Range, steps: np.ndarray | None, start, stop) -> np.ndarray:
        """Our voxels from `start` to `stop`, none of them outside: `[d, h, w, c]` of our type."""
        ours = [int(n) for n in stop - start]
        reach = [(int(a), int(b)) for a, b in zip(start, stop, strict=True)]
        if steps is not None:
            reach = [_reach(*one) for one in zip(start, stop, steps, scan.shape, strict=True)]
        theirs = [b - a for a, b in reach]
        most = max(math.prod(ours) * self.channels, math.prod(theirs) * self.channels)
        if steps is not None:  # what the matrices of `_weights` hold
            most = max(most, *(a * b for a, b in zip(ours, theirs, strict=True)))
        if most > self.max_voxels:
            raise BadSample(f"{most:,} voxels at once are over the limit of {self.max_voxels:,} (max_voxels)")
        raw = scan.box(*zip(*reach, strict=True))
        if steps is None and raw.dtype == np.uint8 == self.dtype and window == (0, 255) and scan.scale == (1, 0):
            return np.ascontiguousarray(raw)
        unit = to_unit(raw, window, scan.scale)
        if steps is not None:
            for axis, (first, count, step, (a, b)) in enumerate(zip(start, ours, steps, reach, strict=True)):
                weights = _weights((first + np.arange(count) + 0.5) * step, a, b, max(step, 1.0))
                unit = np.moveaxis(np.tensordot(weights, unit, (1, axis)), 0, axis)
        if self.dtype != "float32":
            unit = np.rint(unit * np.float32(_SCALES[self.dtype])).astype(self.dtype)
        return np.ascontiguousarray(unit)

    def _sample(self, crops: list[np.ndarray]) -> dict[str, np.ndarray]:
        return {"volume": crops[0] if len(crops) == 1 else np.stack(crops)}


def _padded(voxels: np.ndarray, box: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """`voxels` from `start` to `stop`, which may lie outside: zeros are there."""
    start, stop = box
    inside = np.maximum(start, 0), np.minimum(stop, voxels.shape[:3])
    part = voxels[tuple(slice(a, b) for a, b in zip(*inside, strict=True))]
    if part.shape[:3] == tuple(stop - start):
        return part
    around = zip(inside[0] - start, stop - inside[1], strict=True)
    return np.pad(part, (*((int(a), int(b)) for a, b in around), (0, 0)))


def _reach(start, stop, step: float, side: int) -> tuple[int, int]:
    """The voxels of the file that ours from `start` to `stop` are made of."""
    width = max(step, 1.0)
    first, last = (start + 0.5) * step - width, (stop - 0.5) * step + width
    return max(0, math.floor(min(first, side - 1))), min(side, max(1, math.ceil(min(last, side))))


def _weights(centres: np.ndarray, start: int, stop: int, width: float) -> np.ndarray:
    """`[ours, theirs]` of the voxels from `start` to `stop`: triangles of half `width` around `centres`; rows sum to 1.

    Positions count in voxels of the file, the first from 0 to 1.
    """
    distance = np.abs(np.arange(start, stop) + 0.5 - centres[:, None])
    weights = np.maximum(1 - distance / width, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)

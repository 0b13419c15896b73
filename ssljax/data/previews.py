"""Pictures of what is no picture, for contact sheets: uint8 `[H, W, 3]` of a value of a record. All raise BadSample."""

import math
from typing import Any

import numpy as np

from ssljax.data.bands import channels_last
from ssljax.data.errors import BadSample
from ssljax.data.pictures import decode
from ssljax.data.points import Points
from ssljax.data.scans import open_volume, to_unit, typical_range
from ssljax.data.tiff import Tiff

_SIDE = 256  # pixels of what is drawn
_LARGEST = 2**26  # voxels of a slice
_POINTS = 4096


def image(value: Any, max_pixels: int = 64_000_000) -> np.ndarray:
    """The picture, or false colours of one with other channels than a screen has: the first, middle and last."""
    try:
        return decode(value, max_pixels=max_pixels)
    except BadSample:
        if isinstance(value, bytes) and value[:2] in (b"II", b"MM"):
            tiff = Tiff(value, max_pixels)
            shown = tiff.read(_three(tiff.channels))
        elif isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] not in (1, 3, 4):
            array = channels_last(value)
            shown = array[..., _three(array.shape[-1])]
        else:
            raise
    ranges = [typical_range(channel.astype(np.float64).ravel()) for channel in np.moveaxis(shown, -1, 0)]
    return _bytes(np.stack([to_unit(shown[..., i], window) for i, window in enumerate(ranges)], -1))


def volume(value: Any) -> np.ndarray:
    """The three slices through the middle, in grey: above from the front and the side, below from the top."""
    with open_volume(value, channels=None) as scan:
        window, slices = scan.window(), []
        for axis in (1, 0, 2):
            start, stop = [0, 0, 0], list(scan.shape)
            start[axis], stop[axis] = stop[axis] // 2, stop[axis] // 2 + 1
            if math.prod(scan.shape) // scan.shape[axis] > _LARGEST:
                raise BadSample(f"{scan.shape} voxels are too many to show")
            slices.append(to_unit(scan.box(start, stop).squeeze(axis)[..., 0], window, scan.scale).T[::-1])
    front, side, top = slices
    sheet = np.zeros((front.shape[0] + top.shape[0], front.shape[1] + side.shape[1]), np.float32)
    sheet[: front.shape[0], : front.shape[1]] = front
    sheet[: front.shape[0], front.shape[1] :] = side
    sheet[front.shape[0] :, : front.shape[1]] = top
    return np.repeat(_bytes(sheet)[..., None], 3, -1)


def points(value: Any) -> np.ndarray:
    """Seen from the front and, turned by 60 degrees, from above; the third axis is up, near points are dark."""
    cloud = Points(_POINTS, unit_sphere=True)(value, None)["points"]
    sheet = np.full((_SIDE // 2, _SIDE, 3), 255, np.uint8)
    for pane, (turn, tilt) in enumerate(((0.0, 0.0), (60.0, 30.0))):
        across, away, up = _turned(cloud, math.radians(turn), math.radians(tilt)).T
        order = np.argsort(-away)  # far ones first, so that near ones lie over them
        half = _SIDE // 4
        x, y = (np.rint(half * (1 + 0.92 * at[order])).astype(int) for at in (across, -up))
        shade = np.clip((away[order] + 1) / 2, 0, 1)[:, None]
        colour = np.rint((1 - shade) * (20, 40, 110) + shade * (190, 205, 235)).astype(np.uint8)
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            rows, columns = np.clip(y + down, 0, 2 * half - 1), np.clip(x + right, 0, 2 * half - 1)
            sheet[rows, pane * 2 * half + columns] = colour
    return sheet


def _turned(cloud: np.ndarray, turn: float, tilt: float) -> np.ndarray:
    """About the third axis, then about the first, towards the onlooker."""
    x, y, z = cloud.T
    x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
    return np.stack([x, y * math.cos(tilt) - z * math.sin(tilt), y * math.sin(tilt) + z * math.cos(tilt)], 1)


def _three(channels: int) -> list[int]:
    """Two become magenta and green, which are told apart by every eye."""
    return [0, 1, 0] if channels == 2 else [0, (channels - 1) // 2, channels - 1]


def _bytes(unit: np.ndarray) -> np.ndarray:
    return np.rint(unit * 255).astype(np.uint8)

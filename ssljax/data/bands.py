"""Pictures of any number of channels on the host: satellites, microscopes. `Bands` reads the `image` of a record."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ssljax.data.errors import BadSample
from ssljax.data.fields import Prepared, shown
from ssljax.data.media import read_media
from ssljax.data.pictures import fit
from ssljax.data.scans import Range, to_unit, typical_range
from ssljax.data.tiff import Tiff

_LOOK = 2**16  # values of a channel from which its range is told
_AT_ONCE = 4  # channels that OpenCV averages at once


@dataclass(frozen=True)
class Bands:
    """Chosen channels of a picture, fitted to a square: `{"image": [size, size, C]}`, uint8, so that the views of
    `Views` cut it, or float32 in [0, 1].

    Values: a TIFF (see `ssljax.data.tiff`; pages count as channels), as bytes or a `Path`; arrays `[H, W]`, `[C, H, W]`
    or `[H, W, C]`. The shorter side is resized to `size` and the centre cropped, as for other pictures.

    `window`: the intensities that become 0 and 1, (low, high); what lies outside is clipped.
    None: the range of the type for bool and 8 bits, else each channel's own 0.5th and 99.5th percentile. NaN is 0.

    Raises:
        BadSample: no such file; cut, damaged, too large; another format; a channel that is not there.
    """

    size: int
    channels: tuple[int, ...]  # counted from 0, in the order they shall have
    window: tuple[Range, ...] | None = None  # one for all channels, or one for each
    dtype: Literal["uint8", "float32"] = "uint8"
    layout: Literal["guess", "CHW", "HWC"] = "guess"  # of arrays; guess: the shorter of the first and last axis is C
    max_pixels: int = 64_000_000  # of a channel, times the pages that are read

    def __post_init__(self):
        if self.size < 1 or not self.channels or min(self.channels) < 0:
            raise ValueError(f"Bands needs a size above 0 and channels from 0, got {self.size} and {self.channels}")
        windows = self._windows
        if len(windows) != len(self.channels) or not all(
            window is None or -math.inf < window[0] < window[1] < math.inf for window in windows
        ):
            raise ValueError(
                f"Bands.window must be one (low, high) for all, low < high, or one for each of the "
                f"{len(self.channels)} channels, as in ((0, 4000),); got {self.window}"
            )

    def __call__(self, value: Any, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        return {"image": self.prepare(value).array}

    def prepare(self, value: Any) -> Prepared:
        """All of it: nothing is drawn at random."""
        if isinstance(value, Prepared):
            return value
        channels = zip(np.moveaxis(self._raw(value), -1, 0), self._windows, strict=True)
        picture = np.stack([self._scaled(channel, window) for channel, window in channels], -1)
        starts = range(0, picture.shape[-1], _AT_ONCE)
        parts = [fit(picture[..., start : start + _AT_ONCE], self.size) for start in starts]
        fitted = np.concatenate([part.reshape(self.size, self.size, -1) for part in parts], -1)
        return Prepared(fitted if self.dtype == "uint8" else np.clip(fitted, 0, 1))

    def blank(self) -> dict[str, np.ndarray]:
        """Zeros of the same shape and type."""
        return {"image": np.zeros((self.size, self.size, len(self.channels)), self.dtype)}

    @property
    def _windows(self) -> tuple[Range | None, ...]:
        windows = self.window or (None,)
        return windows * len(self.channels) if len(windows) == 1 else windows

    def _raw(self, value: Any) -> np.ndarray:
        if isinstance(value, bytes | Path):
            return Tiff(read_media(value, "image"), self.max_pixels).read(self.channels)
        array = channels_last(value, self.layout)
        if max(self.channels) >= array.shape[-1]:
            raise BadSample(f"there is no channel {max(self.channels)}: 'image' is {shown(value)}")
        return array[..., list(self.channels)]

    def _scaled(self, channel: np.ndarray, window: Range | None) -> np.ndarray:
        window = window or channel_range(channel)
        if channel.dtype == np.uint8 == self.dtype and window == (0, 255):
            return channel
        unit = to_unit(channel, window)
        return unit if self.dtype == "float32" else np.rint(unit * np.float32(255)).astype(np.uint8)


def channels_last(image: Any, layout: str = "guess") -> np.ndarray:
    """`[H, W, C]` of an array of two or three axes. Raises BadSample."""
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or not image.size:
        raise BadSample(f"'image' is {shown(image)}; expected a TIFF, or an array [H, W], [C, H, W] or [H, W, C]")
    if image.dtype.kind not in "biuf" or image.dtype.itemsize > 8:
        raise BadSample(f"'image' is {shown(image)}; expected integers or floats of at most 64 bits")
    if image.ndim == 2:
        return image[..., None]
    first = layout == "CHW" or (layout == "guess" and image.shape[0] < image.shape[2])
    return np.moveaxis(image, 0, -1) if first else image


def channel_range(channel: np.ndarray) -> Range:
    """See `Bands.window`."""
    if channel.dtype.kind == "b":
        return 0.0, 1.0
    if channel.dtype.itemsize == 1:
        whole = np.iinfo(channel.dtype)
        return float(whole.min), float(whole.max)
    step = max(1, math.isqrt(channel.size // _LOOK))
    with np.errstate(all="ignore"):
        return typical_range(channel[::step, ::step].astype(np.float64).ravel())

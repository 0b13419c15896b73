"""What happens to the pixels of a view, on the host and for one picture at a time: as `ssljax.views.ops`, by OpenCV.

Between uint8 and uint8 everything is float32, so the result is that of the device to within rounding.
"""

import math
import threading
from typing import Any, Protocol

import cv2
import numpy as np
from jaxtyping import UInt8

_GRAY = np.array([0.2989, 0.587, 0.114], np.float32)  # ITU-R 601, as torchvision rounds it
_TO_GRAY = np.tile(_GRAY, (3, 1))
_SOLARIZED = np.array([value if value < 128 else 255 - value for value in range(256)], np.uint8)
_SIGMAS = 3  # a Gaussian has 0.3 % of its mass beyond: less than one of 255


class Changes(Protocol):
    """One picture's `ssljax.views.PixelChanges`."""

    flip: Any
    jitter: Any
    order: Any
    brightness: Any
    contrast: Any
    saturation: Any
    hue: Any
    grayscale: Any
    blur: Any
    sigma: Any
    solarize: Any


class _Scratch(threading.local):
    """Memory of each thread: new pages for every picture would take longer than what happens to it."""

    def __init__(self) -> None:
        self._numbers = np.zeros(0, np.float32)

    def pair(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Two float32 arrays of this shape, valid until the next call in this thread."""
        size = math.prod(shape)
        if len(self._numbers) < 2 * size:
            self._numbers = np.zeros(2 * size, np.float32)
        return self._numbers[:size].reshape(shape), self._numbers[size : 2 * size].reshape(shape)


_scratch = _Scratch()


def change_pixels(image: UInt8[np.ndarray, "h w 3"], do: Changes, radius: int) -> UInt8[np.ndarray, "h w 3"]:
    """Flip, colour jitter, grayscale, blur (cut at `radius` pixels), solarise: those that are chosen."""
    if do.flip:
        image = cv2.flip(image, 1)
    if do.jitter or do.grayscale or do.blur:
        x, spare = _scratch.pair(image.shape)
        np.copyto(x, image)
        if do.jitter:
            for number in do.order:
                _ADJUSTMENTS[number](x, do, spare)
        if do.grayscale:
            cv2.transform(x, _TO_GRAY, dst=x)
        if do.blur:
            _blur(x, float(do.sigma), radius)
        image = cv2.convertScaleAbs(x)  # rounded
    return cv2.LUT(image, _SOLARIZED) if do.solarize else image


# All of these change `x`, float32 from 0 to 255, in place.


def _brightness(x: np.ndarray, do: Changes, _: np.ndarray) -> None:
    x *= np.float32(do.brightness)
    cv2.threshold(x, 255, 255, cv2.THRESH_TRUNC, dst=x)


def _contrast(x: np.ndarray, do: Changes, _: np.ndarray) -> None:
    factor = float(do.contrast)
    mean = float(_GRAY @ np.array(cv2.mean(x)[:3]))
    cv2.addWeighted(x, factor, x, 0, (1 - factor) * mean, dst=x)
    _clip(x)


def _saturation(x: np.ndarray, do: Changes, _: np.ndarray) -> None:
    factor = np.float32(do.saturation)
    cv2.transform(x, factor * np.eye(3, dtype=np.float32) + (1 - factor) * _TO_GRAY, dst=x)
    _clip(x)


def _hue(x: np.ndarray, do: Changes, spare: np.ndarray) -> None:
    if do.hue:
        cv2.cvtColor(x, cv2.COLOR_RGB2HSV, dst=spare)
        spare[..., 0] += np.float32(360 * float(do.hue) % 360)  # OpenCV reads 400 degrees as 40, but not -40 as 320
        cv2.cvtColor(spare, cv2.COLOR_HSV2RGB, dst=x)


_ADJUSTMENTS = (_brightness, _contrast, _saturation, _hue)  # by their numbers in `views.ops`


def _clip(x: np.ndarray) -> None:
    cv2.threshold(x, 0, 255, cv2.THRESH_TOZERO, dst=x)  # several times faster than np.clip
    cv2.threshold(x, 255, 255, cv2.THRESH_TRUNC, dst=x)


def _blur(x: np.ndarray, sigma: float, radius: int) -> None:
    if radius >= min(x.shape[:2]):
        raise ValueError(f"a blur of radius {radius} needs more than {radius} pixels a side, not {x.shape[:2]}")
    radius = min(radius, max(1, math.ceil(_SIGMAS * sigma)))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    cv2.sepFilter2D(x, -1, taps, taps, dst=x, borderType=cv2.BORDER_REFLECT_101)

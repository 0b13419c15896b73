"""What happens to the pixels of a view, on the host and for one picture at a time: as `ssljax.views.ops`, by OpenCV.

Between uint8 and uint8 everything is float32, so the result is that of the device to within rounding.
"""

import math
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


def change_pixels(image: UInt8[np.ndarray, "h w 3"], do: Changes, radius: int) -> UInt8[np.ndarray, "h w 3"]:
    """Flip, colour jitter, grayscale, blur (cut at `radius` pixels), solarise: those that are chosen."""
    if do.flip:
        image = cv2.flip(image, 1)
    if do.jitter or do.grayscale or do.blur:
        x = image.astype(np.float32)
        if do.jitter:
            for number in do.order:
                x = _ADJUSTMENTS[number](x, do)
        if do.grayscale:
            x = cv2.transform(x, _TO_GRAY)
        if do.blur:
            x = _blur(x, float(do.sigma), radius)
        image = cv2.convertScaleAbs(x)  # rounded
    return cv2.LUT(image, _SOLARIZED) if do.solarize else image


def _brightness(x: np.ndarray, do: Changes) -> np.ndarray:
    x *= np.float32(do.brightness)
    return np.minimum(x, 255, out=x)


def _contrast(x: np.ndarray, do: Changes) -> np.ndarray:
    factor = float(do.contrast)
    mean = float(_GRAY @ np.array(cv2.mean(x)[:3]))
    x *= np.float32(factor)
    x += np.float32((1 - factor) * mean)
    return np.clip(x, 0, 255, out=x)


def _saturation(x: np.ndarray, do: Changes) -> np.ndarray:
    factor = np.float32(do.saturation)
    x = cv2.transform(x, factor * np.eye(3, dtype=np.float32) + (1 - factor) * _TO_GRAY)
    return np.clip(x, 0, 255, out=x)


def _hue(x: np.ndarray, do: Changes) -> np.ndarray:
    if not do.hue:
        return x
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
    hue = hsv[..., 0]
    hue += np.float32(360 * do.hue)
    hue -= 360 * np.floor(hue / 360)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


_ADJUSTMENTS = (_brightness, _contrast, _saturation, _hue)  # by their numbers in `views.ops`


def _blur(x: np.ndarray, sigma: float, radius: int) -> np.ndarray:
    if radius >= min(x.shape[:2]):
        raise ValueError(f"a blur of radius {radius} needs more than {radius} pixels a side, not {x.shape[:2]}")
    radius = min(radius, max(1, math.ceil(_SIGMAS * sigma)))
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    taps /= taps.sum()
    return cv2.sepFilter2D(x, -1, taps, taps, borderType=cv2.BORDER_REFLECT_101)

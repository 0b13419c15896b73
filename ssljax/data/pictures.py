"""Pictures on the host: decode, crop, resize. Every function is pure; randomness comes in as `rng`.

Images leave as uint8 RGB `[H, W, 3]`. Whatever cannot be decoded in full raises `BadSample`: the libraries disagree on
half a JPEG (one returns nothing, one a grey lower half, one raises), training must not.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from ssljax.data.errors import BadSample
from ssljax.data.fields import shown
from ssljax.data.headers import Announced, announced

Picture = UInt8[np.ndarray, "h w 3"]

cv2.setNumThreads(0)  # the stream runs one thread a batch; OpenCV's own pool would only fight with those

# Pillow's readers are called directly: `Image.open` tries forty formats on hostile bytes, one of them by Ghostscript.
_READERS: Mapping[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}
_SHRINKS = (8, 4, 2)  # libjpeg-turbo can leave out frequencies; these it does quickly
_STRIPE = 2**20  # pixels converted at a time


class Opened:
    """A picture of which only the header was read: `height` and `width` as it will stand, and its pixels by `decode`.

    Raises:
        BadSample: as `decode`, for what the header tells.
    """

    def __init__(self, image: bytes | np.ndarray, max_pixels: int = 64_000_000):
        self._array, self._header = None, None
        if isinstance(image, np.ndarray):
            self._array = _from_array(image)
            self.height, self.width = self._array.shape[:2]
            return
        if not isinstance(image, bytes):
            raise BadSample(f"'image' is {shown(image)}; expected the bytes of a picture, or an array")
        if not image:
            raise BadSample("0 bytes")
        header = self._header = announced(image, max_pixels)
        lying = header.orientation in range(5, 9)
        self.height, self.width = (header.width, header.height) if lying else (header.height, header.width)

    def decode(self, shrink: int = 1) -> Picture:
        """The pixels. A plain JPEG may come out `shrink` (1, 2, 4, 8) times smaller, which takes less time."""
        header = self._header
        if header is None:
            assert self._array is not None
            return self._array
        try:
            # libjpeg-turbo leaves CMYK to us; Pillow knows Adobe's inverted inks
            if header.format == "JPEG" and header.channels != 4:
                height, width = (-(-side // shrink) if shrink > 1 else 0 for side in (header.height, header.width))
                picture = simplejpeg.decode_jpeg(header.data, "RGB", min_height=height, min_width=width, strict=True)
            else:
                picture = _decode_with_pillow(header)
        except (BadSample, MemoryError):
            raise
        except Exception as error:  # corrupt bytes make decoders raise anything: OSError, SyntaxError, struct.error
            text, name = str(error).lower(), header.format
            cut = "truncated" in text or "premature end" in text
            cut |= name == "JPEG" and b"\xff\xd9" not in header.data[-512:]
            raise BadSample(f"truncated {name}" if cut else f"corrupt {name}: {error}") from error
        return _orient(picture, header.orientation)


def decode(image: bytes | np.ndarray, *, max_pixels: int = 64_000_000) -> Picture:
    """The picture as uint8 RGB `[H, W, 3]`.

    Encoded bytes may be JPEG, PNG, WebP, GIF, BMP or TIFF, the first frame of each: grey, palette, 16-bit and CMYK are
    converted, transparency is laid on white, the EXIF orientation is applied. The size in the header is held against
    `max_pixels`, and against the caps of `ssljax.data.headers`, before a pixel is decoded. Arrays may be `[H, W]` or
    `[H, W, 1 | 3 | 4]` of uint8, uint16, bool or floats in [0, 1].

    Raises:
        BadSample: empty, truncated, corrupt or too large; not an image; an array of another shape, type or range.
    """
    return Opened(image, max_pixels).decode()


def fit(image: Picture, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """The shorter side resized to `size`, then the centre cropped (in the other order, which costs less)."""
    height, width, _ = image.shape
    return _resize(image, center_box(height, width, 1.0), size)


Box = tuple[int, int, int, int]  # top, left, height, width, in whole pixels


def center_box(height: int, width: int, fraction: float) -> Box:
    """The largest central square times `fraction`."""
    side = max(1, round(min(height, width) * fraction))
    return (height - side) // 2, (width - side) // 2, side, side


def crop_box(
    height: int, width: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """A random crop (Szegedy et al. 2014, section 6, with torchvision's details).

    Its share of the area is uniform in `scale`, its aspect ratio (width / height) log-uniform in `ratio`. After ten
    boxes that do not fit into the picture: the largest central box whose ratio lies within `ratio`.
    """
    low, high = map(math.log, ratio)
    for _ in range(10):
        share, aspect, top, left = rng.random(4).tolist()
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = math.exp(low + aspect * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    h, w = max(1, min(height, round(width / aspect))), max(1, min(width, round(height * aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def cut(opened: Opened, boxes: Sequence[Box], sizes: Sequence[int]) -> list[np.ndarray]:
    """Each box resized to its size, all from one decoding, as small as they allow."""
    room = min(min(box[2:]) / size for box, size in zip(boxes, sizes, strict=True))
    image = opened.decode(next((shrink for shrink in _SHRINKS if shrink <= room), 1))
    height, width = image.shape[:2]
    if (height, width) != (opened.height, opened.width):
        down, across = height / opened.height, width / opened.width
        boxes = [tuple(map(round, (t * down, l * across, h * down, w * across))) for t, l, h, w in boxes]  # noqa: E741
    return [_resize(image, box, size) for box, size in zip(boxes, sizes, strict=True)]


def _resize(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """A box of the picture at `size`: enlarged by cubic interpolation, or averaged.

    Below half the size OpenCV's `INTER_AREA` does that. Above, it takes three times as long as linear interpolation
    after a blur of three taps, with which both together have the variance of the triangle that Pillow's bilinear filter
    would use, and are as near to it.
    """
    top, left, height, width = box
    part = image[top : top + height, left : left + width]
    height, width = part.shape[:2]
    if height == width == size:
        return np.ascontiguousarray(part)
    if max(height, width) <= size:
        return cv2.resize(part, (size, size), interpolation=cv2.INTER_CUBIC)
    if max(height, width) >= 2 * size:
        return cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA)
    part = cv2.sepFilter2D(part, -1, _taps(width / size), _taps(height / size), borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)


def _taps(scale: float) -> np.ndarray:
    side = max(0.0, scale**2 - 1) / 12  # a triangle of half-width s has the variance s^2 / 6
    return np.array([side, 1 - 2 * side, side])


def _decode_with_pillow(header: Announced) -> np.ndarray:
    with _READERS[header.format](io.BytesIO(header.data)) as picture:
        picture.load()
        width, height = picture.size
        image = np.empty((height, width, 3), np.uint8)
        rows = max(1, _STRIPE // width)
        for top in range(0, height, rows):  # conversions take several times the memory of what they convert
            stripe = picture.crop((0, top, width, min(height, top + rows)))
            image[top : top + rows] = _rgb(stripe)
    return image


def _rgb(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith(("I", "F")):  # 16 bits, 32 bits, floats: Pillow's own conversion clips at 255
        return _from_array(np.asarray(picture))
    if picture.has_transparency_data:
        return _on_white(np.asarray(picture.convert("RGBA")))
    return np.asarray(picture.convert("RGB"))


def _from_array(image: np.ndarray) -> np.ndarray:
    shape, kind = image.shape, image.dtype
    if len(shape) not in (2, 3) or 0 in shape or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        raise BadSample(f"an image of shape {shape}; expected [H, W] or [H, W, 1 | 3 | 4]")
    if kind == np.uint16:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257
    elif kind == np.bool_:
        image = image * np.uint8(255)
    elif kind.kind == "f":
        low, high = image.min(), image.max()
        if not (low >= 0 and high <= 1):  # also true of NaN
            raise BadSample(f"float pixels must lie in [0, 1]; these run from {low} to {high}")
        image = np.rint(image * np.float32(255)).astype(np.uint8)
    elif kind != np.uint8:
        raise BadSample(f"pixels of type {kind}; expected uint8, uint16, bool, or floats in [0, 1]")
    if len(shape) == 2 or shape[2] == 1:
        return np.repeat(image.reshape(*shape[:2], 1), 3, axis=2)
    return _on_white(image) if shape[2] == 4 else image


def _on_white(rgba: np.ndarray) -> np.ndarray:
    colour, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:].astype(np.uint16)
    mixed = colour * alpha
    mixed += 255 * (255 - alpha) + 128
    mixed += mixed >> 8  # with the shift below: division by 255, rounded
    return (mixed >> 8).astype(np.uint8)


def _orient(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo EXIF orientations 2 to 8 (tag 0x0112): 5 to 8 lie on their side."""
    if orientation not in range(2, 9):
        return image
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    vertical, horizontal = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(image[:: -1 if vertical else 1, :: -1 if horizontal else 1])

"""Record to sample, on the host: `HostTransform`."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from ssljax.data.fields import caption, entry, integers, numbers
from ssljax.data.pictures import Box, Opened, center_box, crop_box, cut
from ssljax.data.pixels import change_pixels
from ssljax.data.tokenize import Tokenizer


class ViewSpec(Protocol):
    """What the host needs to know of a view (`ssljax.views.View`)."""

    size: int
    crop: Literal["random", "center", "none"]
    scale: tuple[float, float]
    ratio: tuple[float, float]
    fraction: float
    count: int

    @property
    def numbers(self) -> int: ...
    @property
    def blur_radius(self) -> int: ...
    def changes(self, uniforms: Any) -> Any: ...


@runtime_checkable
class Reader(Protocol):
    """What `HostTransform.readers` holds: one entry of a record (a video, a volume, ...) to arrays.

    `reader(value, rng)` gives arrays by the name they have in the batch; their shapes and types are the same for every
    value. Without an `rng` nothing is random. `value` is bytes or the `Path` of a file, or an array; what cannot be
    read raises `BadSample`. An optional method `prepare(value) -> value` is the costly part that needs no `rng` and
    changes nothing when done twice: `Loader.cache` keeps its result.
    """

    def __call__(self, value: Any, rng: np.random.Generator | None, /) -> dict[str, np.ndarray]: ...
    def blank(self) -> dict[str, np.ndarray]:
        """Zeros of the same shapes and types."""
        ...


@dataclass(frozen=True)
class HostTransform:
    """`transform(record, rng) -> sample`: a record becomes arrays of fixed shape. Without an `rng` nothing is random.

    - `image`: decoded and fitted to `size` (the device cuts its own views), or left as large as it is without `size`.
      With `crops` the host cuts them instead: one uint8 `[size, size, 3]` (`[count, size, size, 3]` for count > 1)
      under each name, all from one decoding; `image` itself is then not in the sample. What is random in the pixels
      of a view is drawn here too: with `augment` it is done here, else `<name>/uniforms`, float32 `[(count,) 14]`, tell
      the device.
    - `text`: int32 `[L]` by `tokenizer`, if the record has a text. Of several captions, one is drawn; evaluation takes
      the first.
    - `readers`: each reads the entry of the record that it is named after, where there is one. An `image` with a reader
      of its own is not treated as a picture.
    - `label`: int32. Arrays named in `keep` pass as they are. Everything else (`key`, ...) stays behind.

    Where all that is cut is at least twice as large as what becomes of it, a JPEG is decoded at 1/2, 1/4 or 1/8.

    Raises:
        BadSample: the picture cannot be decoded; there is no caption; a label is no integer; a kept array holds NaN,
            infinity or no numbers; the record lacks what the transform was told to read.
    """

    size: int | None = None
    crops: Mapping[str, Any] | None = None  # name -> ViewSpec
    augment: bool = False
    tokenizer: Tokenizer | None = None
    readers: Mapping[str, Reader] = field(default_factory=dict)  # entry of the record -> how it is read
    keep: tuple[str, ...] = ()
    max_pixels: int = 64_000_000

    def __post_init__(self):
        if self.crops is not None and "image" in self.readers:
            raise ValueError("an 'image' with a reader of its own cannot be cut into views on the host")
        if self.size is not None and self.crops is not None:
            raise ValueError("size fits every image for the device to cut, crops cut on the host: set one of them")

    def prepare(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """The costly part, the same every time: decode, fit. Done twice it changes nothing, so it may be cached."""
        prepared = dict(record)
        for name, reader in self.readers.items():
            if name in record and (prepare := getattr(reader, "prepare", None)):
                prepared[name] = prepare(record[name])
        if self._has_picture(record):
            prepared["image"] = self._prepared(record["image"])
        return prepared

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        sample: dict[str, Any] = {}
        if self.crops is not None:
            sample |= self._views(entry(record, "image"), rng)
        elif self._has_picture(record):
            sample["image"] = self._prepared(record["image"])
        for name, reader in self.readers.items():
            if name in record:
                sample |= reader(record[name], rng)
        if self.tokenizer is not None and "text" in record:
            sample["text"] = self.tokenizer(caption(record["text"], rng))
        if "label" in record:
            sample["label"] = integers("label", record["label"])
        for name in self.keep:
            sample[name] = numbers(name, entry(record, name))
        return sample

    def blank(self) -> dict[str, np.ndarray]:
        """Zeros of the shapes and types of a sample with a picture (if it has no reader), all that `readers` read, a
        label and, given a tokeniser, a text. Reads no record and no vocabulary.

        Raises:
            ValueError: the pictures keep their own sizes.
        """
        sample: dict[str, Any] = {}
        if self.crops is not None:
            for name, spec in self.crops.items():
                draws = (spec.count,) if spec.count > 1 else ()
                sample[name] = np.zeros((*draws, spec.size, spec.size, 3), np.uint8)
                if spec.numbers and not self.augment:
                    sample[f"{name}/uniforms"] = np.zeros((*draws, spec.numbers), np.float32)
        elif self.size is not None:
            sample["image"] = np.zeros((self.size, self.size, 3), np.uint8)
        elif not self.readers:
            raise ValueError("the pictures have no fixed size: set data.size, or cut the views on the host")
        for reader in self.readers.values():
            sample |= reader.blank()
        if self.tokenizer is not None:
            sample["text"] = np.zeros(self.tokenizer.length, np.int32)
        return {**sample, "label": np.zeros((), np.int32)}

    def _has_picture(self, record: Mapping[str, Any]) -> bool:
        return "image" in record and "image" not in self.readers

    def _prepared(self, image: bytes | np.ndarray) -> bytes | np.ndarray:
        opened = Opened(image, self.max_pixels)
        if self.size is not None:
            return cut(opened, [center_box(opened.height, opened.width, 1.0)], [self.size])[0]
        largest = max((spec.size for spec in (self.crops or {}).values()), default=math.inf)
        if min(opened.height, opened.width) >= 2 * largest:  # how large it is to be decoded depends on the draws
            return image
        return opened.decode()

    def _views(self, image: bytes | np.ndarray, rng: np.random.Generator | None) -> dict[str, np.ndarray]:
        assert self.crops is not None
        opened = Opened(image, self.max_pixels)
        specs = [spec for spec in self.crops.values() for _ in range(spec.count)]
        boxes = [_box(spec, opened.height, opened.width, rng) for spec in specs]
        pictures = iter(cut(opened, boxes, [spec.size for spec in specs]))
        sample: dict[str, np.ndarray] = {}
        for name, spec in self.crops.items():
            views = [next(pictures) for _ in range(spec.count)]
            if rng is not None and spec.numbers:
                uniforms = rng.random((spec.count, spec.numbers), np.float32)
                if self.augment:
                    changes = spec.changes(uniforms)
                    each = map(type(changes)._make, zip(*changes, strict=True))
                    views = [change_pixels(view, do, spec.blur_radius) for view, do in zip(views, each, strict=True)]
                else:
                    sample[f"{name}/uniforms"] = uniforms if spec.count > 1 else uniforms[0]
            sample[name] = views[0] if spec.count == 1 else np.stack(views)
        return sample


def _box(spec: ViewSpec, height: int, width: int, rng: np.random.Generator | None) -> Box:
    if spec.crop == "random" and rng is not None:
        return crop_box(height, width, rng, spec.scale, spec.ratio)
    return center_box(height, width, spec.fraction if spec.crop == "center" else 1.0)

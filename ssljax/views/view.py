"""What a method sees of an image, or of the frames of a clip: `View` (one recipe) and `Views` (all of a batch)."""

import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float, Key, UInt8

from ssljax.views import ops
from ssljax.views.per_example import row_keys

# What one draw of a view needs: uniform numbers in [0, 1). All are drawn at once, used or not: one call compiles
# several times faster than many, and switching an operation off leaves the draws of the others as they were.
_CROP = 2 * ops.ATTEMPTS + 2
_PIXELS = {
    "flip": 1,
    "jitter": 1,
    "order": 4,
    "brightness": 1,
    "contrast": 1,
    "saturation": 1,
    "hue": 1,
    "grayscale": 1,
    "blur": 1,
    "sigma": 1,
    "solarize": 1,
}
_NUMBERS = sum(_PIXELS.values())
_AT = dict(zip(_PIXELS, itertools.accumulate(_PIXELS.values(), initial=0), strict=False))
_FACTORS = ("brightness", "contrast", "saturation")
_CHANCES = ("flip", "jitter", "grayscale", "blur", "solarize")


class PixelChanges(NamedTuple):
    """What happens to the pixels of r crops; numpy or jax arrays [r], `order` [r, 4]. See `View` and `views.ops`."""

    flip: Any  # bool: is it done? So are jitter, grayscale, blur and solarize
    jitter: Any
    order: Any  # of the four adjustments, as in `ops.color_jitter`
    brightness: Any  # factor; so are contrast and saturation
    contrast: Any
    saturation: Any
    hue: Any  # turns
    grayscale: Any
    blur: Any
    sigma: Any  # pixels
    solarize: Any


@dataclass(frozen=True)
class View:
    """One view of an image: where it is cut, then what happens to its pixels, in the order
    crop, flip, colour jitter, grayscale, blur, solarise, normalise.

    Pixels are float32 in [0, 1] until they are normalised. An operation whose probability is 0 is not computed.
    """

    size: int  # side of the square view, in pixels
    crop: Literal["random", "center", "none"] = "random"  # center: the largest square times `fraction`; none: as it is
    scale: tuple[float, float] = (0.08, 1.0)  # share of the image's area, random crop
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, random crop
    interpolation: ops.Interpolation = "bicubic"  # always antialiased
    fraction: float = 0.875  # side of the center crop
    count: int = 1  # independent draws; the output is [b, count, size, size, c] if more than one
    flip: float = 0.0  # probability, like jitter, grayscale, blur and solarize
    jitter: float = 0.0
    brightness: float = 0.0  # factor in [1 - x, 1 + x], not below 0; so are contrast and saturation
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # shift in [-x, x] turns
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels; the kernel is a tenth of `size` wide (`ops.blur_radius`)
    solarize: float = 0.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    def __post_init__(self):
        for name in _CHANCES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"View.{name} is a probability; {getattr(self, name)} is not between 0 and 1")
        for name in _FACTORS:
            if getattr(self, name) < 0:
                raise ValueError(f"View.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"View.hue is in turns, between 0 and 0.5; got {self.hue}")
        for name, most in (("scale", 1), ("ratio", math.inf), ("blur_sigma", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= most:
                raise ValueError(f"View.{name} must be (low, high) with 0 < low <= high <= {most}, got {(low, high)}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"View.fraction must be above 0 and at most 1, got {self.fraction}")
        if self.size < 1 or self.count < 1:
            raise ValueError(f"View.size and View.count must be at least 1, got {self.size} and {self.count}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"View.mean and View.std differ in length: {self.mean} and {self.std}")

    @property
    def random_pixels(self) -> bool:
        """Whether anything after the crop is drawn at random."""
        return any((self.flip, self.jitter, self.grayscale, self.blur, self.solarize))

    def cut(self, uniforms: Any, images: UInt8[Array, "b h w c"]) -> Float[Array, "r s s c"]:
        """Crop and resize, `count` rows per image; float32 in [0, 1].

        `uniforms` [r, 22] are those of `ops.random_boxes`; only random crops read them.
        """
        height, width = images.shape[1:3]
        if self.crop == "none":
            if (height, width) != (self.size, self.size):
                raise ValueError(
                    f"crop='none' takes images of {self.size} x {self.size} pixels, got {height} x {width}; "
                    "use crop='center' or set the view's size"
                )
            return repeat(_unit(images), "b h w c -> (b n) h w c", n=self.count)
        if self.crop == "center":
            box = jnp.asarray(ops.center_box(height, width, self.fraction), jnp.float32)
            boxes = jnp.broadcast_to(box, (len(images), 1, 4))
            crops = ops.resize_crop(images, boxes, self.size, self.interpolation)
            return repeat(crops, "b 1 h w c -> (b n) h w c", n=self.count)
        boxes = ops.random_boxes(uniforms, height, width, self.scale, self.ratio)
        boxes = rearrange(boxes, "(b n) box -> b n box", n=self.count)
        return rearrange(ops.resize_crop(images, boxes, self.size, self.interpolation), "b n h w c -> (b n) h w c")

    def changes(self, uniforms: Any) -> PixelChanges:
        """From uniform numbers [r, 14] in [0, 1), of numpy or jax."""
        low, span, chances = _ranges(self)
        values, chosen = low + uniforms * span, uniforms < chances
        first = _AT["order"]
        order = uniforms[:, first : first + 4].argsort(axis=1)  # a random permutation
        found = {name: (chosen if name in _CHANCES else values)[:, at] for name, at in _AT.items()}
        return PixelChanges(**{**found, "order": order})

    @property
    def numbers(self) -> int:
        """How many uniform numbers `changes` needs for a draw; 0 if nothing is drawn."""
        return _NUMBERS if self.random_pixels else 0

    @property
    def blur_radius(self) -> int:
        """At which the blur's kernel ends, in pixels."""
        return ops.blur_radius(self.size)

    def augment(self, uniforms: Any, x: Float[Array, "r s s c"]) -> Float[Array, "r s s c"]:
        """Everything between crop and normalisation. `uniforms`, of `changes`, are not read unless `random_pixels`."""
        if not self.random_pixels:
            return x
        channels = x.shape[-1]
        if channels != 3 and (self.jitter or self.grayscale):
            raise ValueError(
                f"colour jitter and grayscale need 3 channels, got {channels}; set View.jitter and View.grayscale to 0"
            )
        do = self.changes(uniforms)
        if self.flip:
            x = ops.choose(do.flip, ops.hflip(x), x)
        if self.jitter:
            hue = do.hue if self.hue else None
            jittered = ops.color_jitter(x, do.order, do.brightness, do.contrast, do.saturation, hue)
            x = ops.choose(do.jitter, jittered, x)
        if self.grayscale:
            x = ops.choose(do.grayscale, ops.grayscale(x), x)
        if self.blur:
            x = ops.choose(do.blur, ops.gaussian_blur(x, do.sigma, self.blur_radius), x)
        if self.solarize:
            x = ops.choose(do.solarize, ops.solarize(x), x)
        return x

    def normalize(self, x: Float[Array, "r s s c"]) -> Float[Array, "r s s c"]:
        """By `mean` and `std`."""
        if not any(self.mean) and set(self.std) == {1.0}:
            return x
        if len(self.mean) not in (1, x.shape[-1]):
            raise ValueError(f"View.mean and View.std have {len(self.mean)} channels, the images {x.shape[-1]}")
        return ops.normalize(x, self.mean, self.std)


@functools.lru_cache(64)
def _ranges(view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each number: the least value, the range of values, and the probability, float32 [14]."""
    ends = {
        **{name: (max(0.0, 1 - getattr(view, name)), 1 + getattr(view, name)) for name in _FACTORS},
        "hue": (-view.hue, view.hue),
        "sigma": view.blur_sigma,
    }
    low, span, chances = np.zeros((3, _NUMBERS), np.float32)
    for name, (least, most) in ends.items():
        low[_AT[name]], span[_AT[name]] = least, most - least
    for name in _CHANCES:
        chances[_AT[name]] = getattr(view, name)
    return low, span, chances


@dataclass(frozen=True)
class Views:
    """All views of a batch: `views(key, batch) -> batch`, pure, to be called inside `jit`.

    `host` says how far the host goes (`ssljax.data.HostTransform` does it), and what is left for the device:

    - "fit": all images have one size. Every view is cut from `batch[image]`, uint8 [b, h, w, c], which is dropped
      unless a view has its name.
    - "crop": the views are cut, and `batch[name]` is uint8 [b, size, size, c] or [b, count, size, size, c]. What
      follows the crop runs here.
    - "augment": the same, and only the normalisation is left. For hosts with idle cores beside a busy accelerator; the
      pictures are those of "crop" to within 2 of 255.

    Either way `batch[name]` becomes float32 of that shape, and all other keys pass unchanged.

    Clips, uint8 [b, t, h, w, c] under `image` (host "fit" only), are cut and changed as one picture: all frames of a
    clip share its draws, and a view is [b, (count,) t, size, size, c]. Of several clips a video, [b, k, t, h, w, c],
    each has draws of its own: [b, k, (count,) t, size, size, c].

    A row's draws depend on (`key`, row, view, draw) alone: on no other row, and on no mesh. Where the host has drawn
    them, `batch["<name>/uniforms"]`, float32 [b, (count,) 14], are used and dropped. Evaluation recipes draw nothing
    and take key=None.
    """

    views: Mapping[str, View]  # name in the output batch -> recipe
    host: Literal["fit", "crop", "augment"] = "fit"
    image: str = "image"  # batch key that is cut on the device

    @property
    def host_crops(self) -> Mapping[str, View] | None:
        """The views that the host has to cut; None if the device does."""
        return None if self.host == "fit" else self.views

    @property
    def inputs(self) -> tuple[str, ...]:
        """The entries of the batch that the views read."""
        return (self.image,) if self.host == "fit" else tuple(self.views)

    def __hash__(self):  # a dict has none, and `jax.jit(views)` asks for one
        return hash((tuple(sorted(self.views.items(), key=lambda item: item[0])), self.host, self.image))

    def __call__(self, key: Key[Array, ""] | None, batch: Mapping[str, Any]) -> dict[str, Any]:
        dropped = {f"{name}/uniforms" for name in self.views} | ({self.image} if self.host == "fit" else set())
        output = {name: value for name, value in batch.items() if name not in dropped}
        # By name, not by position in the dict: configs do not keep the order.
        for position, (name, view) in enumerate(sorted(self.views.items(), key=lambda item: item[0])):
            images = self._uint8(batch, self.image if self.host == "fit" else name)
            if self.host == "fit" and images.ndim > 4:
                output[name] = self._clips(key, batch, name, images, position)
                continue
            crop, pixels = self._uniforms(key, batch, name, len(images), position)
            crops = view.cut(crop, images) if self.host == "fit" else _host_crops(name, view, images)
            crops = view.normalize(crops if self.host == "augment" else view.augment(pixels, crops))
            output[name] = rearrange(crops, "(b n) h w c -> b n h w c", n=view.count) if view.count > 1 else crops
        return output

    def _clips(self, key, batch, name: str, clips: UInt8[Array, "b *k t h w c"], position: int):
        """The view of clips: cut with the frames as channels, then frame by frame, each with the draws of its clip."""
        if clips.ndim not in (5, 6):
            raise ValueError(f"clips are [b, t, h, w, c] or [b, k, t, h, w, c], got {list(clips.shape)}")
        view, frames, channels = self.views[name], clips.shape[-4], clips.shape[-1]
        each = clips.shape[1] if clips.ndim == 6 else 1
        crop, pixels = self._uniforms(key, batch, name, len(clips), position, each)
        flat = rearrange(clips.reshape(-1, *clips.shape[-4:]), "r t h w c -> r h w (t c)")
        crops = rearrange(view.cut(crop, flat), "r h w (t c) -> (r t) h w c", t=frames)
        crops = view.normalize(view.augment(None if pixels is None else jnp.repeat(pixels, frames, 0), crops))
        draws = (each,) * (clips.ndim == 6) + (view.count,) * (view.count > 1)
        return crops.reshape(len(clips), *draws, frames, view.size, view.size, channels)

    def _uint8(self, batch, name: str):
        if name not in batch:
            hint = "Views.image names the key to cut" if self.host == "fit" else f"host={self.host!r}: one key per view"
            raise KeyError(f"the batch has no {name!r}, only {sorted(batch)}; {hint}")
        if batch[name].dtype != jnp.uint8:
            raise TypeError(f"batch[{name!r}] must be uint8 (0 to 255) before the views, got {batch[name].dtype}")
        return batch[name]

    def _uniforms(self, key, batch, name: str, rows: int, position: int, clips: int = 1):
        """The numbers of a view's crops and of their pixels, [r, _] each; None where nobody reads them."""
        view = self.views[name]
        crops, pixels = self.host == "fit" and view.crop == "random", self.host != "augment" and view.random_pixels
        if not crops and (drawn := batch.get(f"{name}/uniforms")) is not None:
            return None, drawn.reshape(-1, _NUMBERS)
        if not crops and not pixels:
            return None, None
        if key is None:
            raise ValueError(f"view {name!r} is random: give Views a key, or use an evaluation recipe")

        def of_row(row_key):
            return jax.random.uniform(jax.random.fold_in(row_key, position), (clips * view.count, _CROP + _NUMBERS))

        numbers = rearrange(jax.vmap(of_row)(row_keys(key, rows)), "b n u -> (b n) u")
        return numbers[:, :_CROP], numbers[:, _CROP:]


def _host_crops(name: str, view: View, images):
    draws = (view.count,) if view.count > 1 else ()
    if images.shape[1:-1] != (*draws, view.size, view.size):
        expected = ", ".join(map(str, ("b", *draws, view.size, view.size, "c")))
        raise ValueError(f"the host was to cut batch[{name!r}] to the shape [{expected}], got {list(images.shape)}")
    return _unit(images.reshape(-1, *images.shape[-3:]))


def _unit(images):
    return images.astype(jnp.float32) / 255

"""What a method sees of an image: `View` (one recipe), `Views` (all of a batch) and the published recipes.

A published recipe is a function that returns a plain dict, view name -> fields of `View`, to put in a config and to
change there, or to build at once:

    config.data.views = {"type": "Views", "views": simclr(32, strength=0.5, blur=False)}
    views = Views({name: View(**fields) for name, fields in simclr(224).items()})
    batch = jax.jit(views)(key, {"image": images, "label": labels})       # "x1", "x2", "label"
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array, Float, Key, UInt8

from ssljax.views import ops

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# What one draw of a view needs: uniform numbers in [0, 1), in this order. All are drawn at once, used or not: one call
# compiles several times faster than many, and switching an operation off leaves the draws of the others as they were.
_NUMBERS = {
    "crop": 2 * ops.ATTEMPTS + 2,
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
_ENDS = list(itertools.accumulate(_NUMBERS.values()))
Draws = Mapping[str, Float[Array, "r _"]]


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
        for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"View.{name} is a probability; {getattr(self, name)} is not between 0 and 1")
        for name in ("brightness", "contrast", "saturation"):
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

    def cut(self, draws: Draws, images: UInt8[Array, "b h w c"]) -> Float[Array, "r s s c"]:
        """Crop and resize, `count` rows per image; float32 in [0, 1]. Only random crops read `draws`."""
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
        boxes = ops.random_boxes(draws["crop"], height, width, self.scale, self.ratio)
        boxes = rearrange(boxes, "(b n) box -> b n box", n=self.count)
        return rearrange(ops.resize_crop(images, boxes, self.size, self.interpolation), "b n h w c -> (b n) h w c")

    def augment(self, draws: Draws, x: Float[Array, "r s s c"]) -> Float[Array, "r s s c"]:
        """Everything after the crop. Nothing of `draws` is read unless `random_pixels`."""
        channels = x.shape[-1]
        if channels != 3 and (self.jitter or self.grayscale):
            raise ValueError(
                f"colour jitter and grayscale need 3 channels, got {channels}; set View.jitter and View.grayscale to 0"
            )

        def chosen(name):
            return draws[name][:, 0] < getattr(self, name)

        def uniform(name, low, high):
            return low + draws[name][:, 0] * (high - low)

        if self.flip:
            x = ops.choose(chosen("flip"), ops.hflip(x), x)
        if self.jitter:
            jittered = ops.color_jitter(
                x,
                jnp.argsort(draws["order"], axis=1),  # a random permutation
                uniform("brightness", max(0.0, 1 - self.brightness), 1 + self.brightness),
                uniform("contrast", max(0.0, 1 - self.contrast), 1 + self.contrast),
                uniform("saturation", max(0.0, 1 - self.saturation), 1 + self.saturation),
                uniform("hue", -self.hue, self.hue) if self.hue else None,
            )
            x = ops.choose(chosen("jitter"), jittered, x)
        if self.grayscale:
            x = ops.choose(chosen("grayscale"), ops.grayscale(x), x)
        if self.blur:
            blurred = ops.gaussian_blur(x, uniform("sigma", *self.blur_sigma), ops.blur_radius(self.size))
            x = ops.choose(chosen("blur"), blurred, x)
        if self.solarize:
            x = ops.choose(chosen("solarize"), ops.solarize(x), x)
        if any(self.mean) or set(self.std) != {1.0}:
            if len(self.mean) not in (1, channels):
                raise ValueError(f"View.mean and View.std have {len(self.mean)} channels, the images {channels}")
            x = ops.normalize(x, self.mean, self.std)
        return x


@dataclass(frozen=True)
class Views:
    """All views of a batch: `views(key, batch) -> batch`, pure, to be called inside `jit`.

    crop_on="device": every view is cut from `batch[image]`, uint8 [b, h, w, c], which is dropped unless a view has its
    name. crop_on="host": the host has cut `batch[name]` already, uint8 [b, size, size, c] or [b, count, size, size, c],
    and only what follows the crop runs here. Either way `batch[name]` becomes float32 of that shape, and all other
    keys pass unchanged.

    A row's draws depend on (`key`, row, view, draw) alone: on no other row, and on no mesh. Evaluation recipes draw
    nothing and take key=None.
    """

    views: Mapping[str, View]  # name in the output batch -> recipe
    crop_on: Literal["device", "host"] = "device"
    image: str = "image"  # batch key that is cut on the device

    @property
    def host_crops(self) -> Mapping[str, View] | None:
        """The views that the host has to cut; None if the device does."""
        return self.views if self.crop_on == "host" else None

    def __hash__(self):  # a dict has none, and `jax.jit(views)` asks for one
        return hash((tuple(sorted(self.views.items(), key=lambda item: item[0])), self.crop_on, self.image))

    def __call__(self, key: Key[Array, ""] | None, batch: Mapping[str, Any]) -> dict[str, Any]:
        on_device = self.crop_on == "device"
        output = {name: value for name, value in batch.items() if not (on_device and name == self.image)}
        # By name, not by position in the dict: configs do not keep the order.
        for position, (name, view) in enumerate(sorted(self.views.items(), key=lambda item: item[0])):
            images = self._uint8(batch, self.image if on_device else name)
            draws = {}
            if view.random_pixels or (on_device and view.crop == "random"):
                if key is None:
                    raise ValueError(f"view {name!r} is random: give Views a key, or use an evaluation recipe")
                draws = _draws(key, len(images), position, view.count)
            crops = view.cut(draws, images) if on_device else _host_crops(name, view, images)
            crops = view.augment(draws, crops)
            output[name] = rearrange(crops, "(b n) h w c -> b n h w c", n=view.count) if view.count > 1 else crops
        return output

    def _uint8(self, batch, name: str):
        if name not in batch:
            on_device = self.crop_on == "device"
            hint = "Views.image names the key to cut" if on_device else "crop_on='host' reads one key per view"
            raise KeyError(f"the batch has no {name!r}, only {sorted(batch)}; {hint}")
        if batch[name].dtype != jnp.uint8:
            raise TypeError(f"batch[{name!r}] must be uint8 (0 to 255) before the views, got {batch[name].dtype}")
        return batch[name]


def _host_crops(name: str, view: View, images):
    draws = (view.count,) if view.count > 1 else ()
    if images.shape[1:-1] != (*draws, view.size, view.size):
        expected = ", ".join(map(str, ("b", *draws, view.size, view.size, "c")))
        raise ValueError(f"crop_on='host' expects batch[{name!r}] of shape [{expected}], got {list(images.shape)}")
    return _unit(images.reshape(-1, *images.shape[-3:]))


def _unit(images):
    return images.astype(jnp.float32) / 255


def _draws(key, rows: int, position: int, count: int) -> Draws:
    """The numbers of a view's draws, `count` rows per image, from a key of the batch's row and the view."""

    def of_row(row_key):
        return jax.random.uniform(jax.random.fold_in(row_key, position), (count, _ENDS[-1]))

    numbers = rearrange(jax.vmap(of_row)(key if key.ndim else jax.random.split(key, rows)), "b n u -> (b n) u")
    return dict(zip(_NUMBERS, jnp.split(numbers, _ENDS[:-1], axis=1), strict=True))


# -------------------------------------------------------------------------------------------------------------- recipes


def simclr(size: int, strength: float = 1.0, blur: bool = True) -> dict[str, dict[str, Any]]:
    """SimCLR (Chen et al. 2020, appendix A): views "x1" and "x2", in [0, 1]. CIFAR: strength 0.5, no blur.

    Brightness is multiplicative, as in the v2 code and torchvision (the v1 code adds it).
    """
    view = {
        "size": size,
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.8 * strength,
        "contrast": 0.8 * strength,
        "saturation": 0.8 * strength,
        "hue": 0.2 * strength,
        "grayscale": 0.2,
        "blur": 0.5 if blur else 0.0,
    }
    return {"x1": view, "x2": dict(view)}


def moco_v2(size: int) -> dict[str, dict[str, Any]]:
    """MoCo v2 (Chen et al. 2020, the official `--aug-plus`): views "query" and "key"."""
    view = {
        "size": size,
        "scale": (0.2, 1.0),
        "interpolation": "bilinear",
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.4,
        "hue": 0.1,
        "grayscale": 0.2,
        "blur": 0.5,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }
    return {"query": view, "key": dict(view)}


def byol(size: int) -> dict[str, dict[str, Any]]:
    """BYOL (Grill et al. 2020, appendix B): views "x1" (always blurred) and "x2" (rarely; solarised at times).

    Brightness is multiplicative, as in torchvision (the official code adds it).
    """
    view = _byol_colors(size, scale=(0.08, 1.0))
    return {"x1": view | {"blur": 1.0}, "x2": view | {"blur": 0.1, "solarize": 0.2}}


def multi_crop(
    global_size: int = 224,
    local_size: int = 96,
    local_count: int = 8,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
) -> dict[str, dict[str, Any]]:
    """DINO (Caron et al. 2021, the official defaults): views "global1", "global2" and `local_count` draws of "local".

    Without local crops the authors advise global_scale=(0.14, 1.0). Colours are BYOL's. The official blur is Pillow's
    approximation; here it is `ops.gaussian_blur`.
    """
    crop = _byol_colors(global_size, global_scale)
    views = {"global1": crop | {"blur": 1.0}, "global2": crop | {"blur": 0.1, "solarize": 0.2}}
    if local_count:
        views["local"] = _byol_colors(local_size, local_scale) | {"count": local_count, "blur": 0.5}
    return views


def mae(size: int) -> dict[str, dict[str, Any]]:
    """MAE (He et al. 2022, appendix A.1): view "image", random crop and flip only."""
    return {"image": {"size": size, "scale": (0.2, 1.0), "flip": 0.5, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}}


def clip(size: int) -> dict[str, dict[str, Any]]:
    """CLIP (Radford et al. 2021, section 2.4): view "image", a random crop of 90-100 % of the image's area.

    The paper's is a random square of the resized image; this is open_clip's, which also fits pictures that are not
    square: they are cut to a ratio of at least 3:4 and at most 4:3.
    """
    return {"image": {"size": size, "scale": (0.9, 1.0), "mean": CLIP_MEAN, "std": CLIP_STD}}


def evaluation(
    size: int,
    fraction: float = 0.875,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
) -> dict[str, dict[str, Any]]:
    """View "image", deterministic: the largest central square times `fraction` (224 / 256), resized."""
    return {"image": {"size": size, "crop": "center", "fraction": fraction, "mean": mean, "std": std}}


def _byol_colors(size: int, scale: tuple[float, float]) -> dict[str, Any]:
    return {
        "size": size,
        "scale": scale,
        "flip": 0.5,
        "jitter": 0.8,
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "grayscale": 0.2,
        "mean": IMAGENET_MEAN,
        "std": IMAGENET_STD,
    }

"""Views of volumes: `VolumeView`, for `PerExample`; and what published methods make of it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ssljax.views import ops

Voxels = Float[Array, "d h w c"]


@dataclass(frozen=True)
class VolumeView:
    """One view of a volume `[D, H, W, C]`, or of one of the crops `[n, D, H, W, C]` that the host has cut, in the order
    crop, flips, quarter turns, cutout, intensity, blur, noise, normalise.

    Integers become float32 in [0, 1] first. What is 0 (False) is not computed. Without a key: the central crop,
    normalised.
    """

    size: tuple[int, int, int] | None = None  # of a random crop, in voxels; None: the whole
    crop: int = 0  # which of several crops of the host
    flip: tuple[float, float, float] = (0.0, 0.0, 0.0)  # probability along each axis
    turn: float = 0.0  # probability of 1, 2 or 3 quarter turns about the third axis
    cutout: float = 0.0  # share of the volume that a box of zeros takes, with the volume's proportions
    scale: float = 0.0  # intensities times a factor in [1 - x, 1 + x]
    shift: float = 0.0  # plus an offset in [-x, x]
    noise: float = 0.0  # Gaussian, its standard deviation in [0, x]
    blur: float = 0.0  # probability
    blur_sigma: tuple[float, float] = (0.5, 1.0)  # voxels; the kernel ends after three sigma
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    input: str = "volume"  # entry of the batch

    def __post_init__(self):
        for name in ("turn", "cutout", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"VolumeView.{name} must lie between 0 and 1, got {getattr(self, name)}")
        if not all(0 <= chance <= 1 for chance in self.flip):
            raise ValueError(f"VolumeView.flip are probabilities, got {self.flip}")
        if min(self.scale, self.shift, self.noise) < 0:
            raise ValueError("VolumeView.scale, shift and noise must not be negative")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise ValueError(f"VolumeView.blur_sigma must be (low, high) with 0 < low <= high, got {self.blur_sigma}")

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)

    def __call__(self, key: Key[Array, ""] | None, volume: Array) -> Voxels:
        x = volume[self.crop] if volume.ndim == 5 else volume
        if jnp.issubdtype(x.dtype, jnp.integer):
            x = x / jnp.float32(jnp.iinfo(x.dtype).max)
        keys = None if key is None else jax.random.split(key, 8)
        x = self._cropped(None if keys is None else keys[0], x)
        return self._normalized(x if keys is None else self._augmented(keys[1:], x))

    def _cropped(self, key, x: Voxels) -> Voxels:
        if self.size is None:
            return x
        room = jnp.array([side - size for side, size in zip(x.shape, self.size, strict=False)])
        if any(size > side for side, size in zip(x.shape, self.size, strict=False)):
            raise ValueError(f"VolumeView.size is {self.size}, but the host's crops have {x.shape[:3]} voxels")
        start = room // 2 if key is None else jax.random.randint(key, (3,), 0, room + 1)
        return jax.lax.dynamic_slice(x, (*start, 0), (*self.size, x.shape[3]))

    def _augmented(self, keys, x: Voxels) -> Voxels:
        flips, turns, boxes, levels, blurs, amount, noises = keys
        for axis, (chance, drawn) in enumerate(zip(self.flip, jax.random.uniform(flips, (3,)), strict=True)):
            if chance:
                x = jnp.where(drawn < chance, jnp.flip(x, axis), x)
        if self.turn:
            x = _turned(x, jax.random.uniform(turns), self.turn)
        if self.cutout:
            x = _cut_out(x, jax.random.uniform(boxes, (3,)), self.cutout)
        if self.scale or self.shift:
            factor, offset = jax.random.uniform(levels, (2,), minval=-1)
            x = x * (1 + self.scale * factor) + self.shift * offset
        if self.blur:
            x = self._blurred(jax.random.uniform(blurs, (2,)), x)
        if self.noise:
            x = x + self.noise * jax.random.uniform(amount) * jax.random.normal(noises, x.shape)
        return x

    def _blurred(self, uniforms, x: Voxels) -> Voxels:
        low, high = self.blur_sigma
        sigma = (low + uniforms[1] * (high - low))[None]
        radius, blurred = max(1, round(3 * high)), x
        if radius >= min(x.shape[:3]):
            raise ValueError(f"a blur of radius {radius} needs more than {radius} voxels a side, got {x.shape[:3]}")
        for axis in range(3):
            weights = ops.blur_weights(sigma, radius, x.shape[axis])[0]
            product = jnp.tensordot(weights, blurred, (1, axis), precision=jax.lax.Precision.HIGHEST)
            blurred = jnp.moveaxis(product, 0, axis)
        return jnp.where(uniforms[0] < self.blur, blurred, x)

    def _normalized(self, x: Voxels) -> Voxels:
        if any(len(values) not in (1, x.shape[-1]) for values in (self.mean, self.std)):
            raise ValueError(f"VolumeView.mean and std need 1 or {x.shape[-1]} numbers, one a channel")
        return ops.normalize(x, self.mean, self.std)


def _turned(x: Voxels, uniform, chance: float) -> Voxels:
    """With the probability `chance` by 90, 180 or 270 degrees, equally often, in the plane of the first two axes."""
    if x.shape[0] != x.shape[1]:
        raise ValueError(f"quarter turns need as many voxels along axis 0 as along axis 1, got {x.shape[:3]}")
    quarters = jnp.where(uniform < chance, 1 + jnp.floor(3 * uniform / chance), 0)
    x = jnp.where(quarters % 2 == 1, jnp.rot90(x), x)
    return jnp.where(quarters >= 2, x[::-1, ::-1], x)


def _cut_out(x: Voxels, uniforms, share: float) -> Voxels:
    inside = jnp.ones((), bool)
    for axis, uniform in enumerate(uniforms):
        side = round(x.shape[axis] * share ** (1 / 3))
        start = jnp.floor(uniform * (x.shape[axis] - side + 1))
        place = jnp.arange(x.shape[axis]).reshape([-1 if i == axis else 1 for i in range(4)])
        inside = inside & (place >= start) & (place < start + side)
    return jnp.where(inside, 0, x)


def swin_unetr(size: int = 96, cutout: float = 0.3) -> dict[str, dict[str, Any]]:
    """Swin UNETR's pretraining (Tang et al. 2022): views "x1" and "x2" of one crop of the host, each
    turned about the patient's long axis and with a box cut out; `PerExample(views=...)` in a config.

    The reader gives crops of 96 voxels a side. The official code cuts several boxes and fills some with noise.
    """
    view = {"type": "VolumeView", "size": (size,) * 3, "turn": 0.75, "cutout": cutout}
    return {"x1": view, "x2": dict(view)}

"""Views of point clouds: `PointView`, for `PerExample`; and what published methods make of it."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Cloud = Float[Array, "n f"]


@dataclass(frozen=True)
class PointView:
    """One view of a point cloud `[N, 3 + F]`, in the order draw, rotate, scale, move, jitter, drop.

    What is off is not computed. Without a key: the first `size` points, unchanged.
    """

    size: int | None = None  # points drawn without replacement; None: all, in their order
    rotate: Literal["none", "axis", "each", "all"] = "none"  # about `axis`, about all three in turn, or anyhow
    axis: int = 2  # 0, 1, 2
    angle: float = 180.0  # degrees, the largest either way, about an axis
    scale: tuple[float, float] = (1.0, 1.0)  # one factor for all axes
    move: float = 0.0  # offset in [-x, x] on each axis
    jitter: float = 0.0  # standard deviation of Gaussian noise on every coordinate
    jitter_limit: float = math.inf  # at which it is clipped
    drop: float = 0.0  # up to this share of the points fall on the first (PointNet++): as if they were not there
    normals: int | None = None  # first of three columns that hold directions, which are rotated as well
    input: str = "points"  # entry of the batch

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"PointView.scale must be (low, high) with 0 < low <= high, got {self.scale}")
        if not 0 <= self.drop < 1 or self.axis not in (0, 1, 2) or min(self.move, self.jitter, self.jitter_limit) < 0:
            raise ValueError("PointView: drop is a share below 1, axis 0, 1 or 2; move and jitter are not negative")

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.input,)

    def __call__(self, key: Key[Array, ""] | None, points: Cloud) -> Cloud:
        if self.size is not None and self.size > len(points):
            raise ValueError(f"PointView.size is {self.size}, but the host gives {len(points)} points")
        if key is None:
            return points[: self.size]
        order, turn, size, offset, noise, amount, dropped = jax.random.split(key, 7)
        if self.size is not None:
            points = points[jax.random.permutation(order, len(points))[: self.size]]
        place, others = points[:, :3], points[:, 3:]
        if self.rotate != "none":
            matrix = self._rotation(turn)
            place = _times(place, matrix)
            if self.normals is not None:
                at = self.normals - 3
                others = others.at[:, at : at + 3].set(_times(others[:, at : at + 3], matrix))
        if self.scale != (1.0, 1.0):
            place = place * jax.random.uniform(size, minval=self.scale[0], maxval=self.scale[1])
        if self.move:
            place = place + self.move * jax.random.uniform(offset, (3,), minval=-1)
        if self.jitter:
            drawn = self.jitter * jax.random.normal(noise, place.shape)
            place = place + jnp.clip(drawn, -self.jitter_limit, self.jitter_limit)
        points = jnp.concatenate([place, others], 1)
        if self.drop:
            gone = jax.random.uniform(dropped, (len(points), 1)) < self.drop * jax.random.uniform(amount)
            points = jnp.where(gone, points[:1], points)
        return points

    def _rotation(self, key) -> Float[Array, "3 3"]:
        if self.rotate == "all":
            return random_rotation(key)
        angles = math.radians(self.angle) * jax.random.uniform(key, (3,), minval=-1)
        if self.rotate == "axis":
            return _about(self.axis, angles[0])
        return _about(2, angles[2]) @ _about(1, angles[1]) @ _about(0, angles[0])


def _about(axis: int, angle) -> Float[Array, "3 3"]:
    cos, sin, first, second = jnp.cos(angle), jnp.sin(angle), (axis + 1) % 3, (axis + 2) % 3
    matrix = jnp.zeros((3, 3)).at[axis, axis].set(1).at[first, first].set(cos).at[second, second].set(cos)
    return matrix.at[first, second].set(-sin).at[second, first].set(sin)


def random_rotation(key: Key[Array, ""]) -> Float[Array, "3 3"]:
    """Uniform over all rotations: a unit quaternion with Gaussian direction (Shoemake 1992)."""
    w, x, y, z = _unit(jax.random.normal(key, (4,)))
    return jnp.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _unit(x):
    return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


def _times(points, matrix):
    return jnp.matmul(points, matrix.T, precision=jax.lax.Precision.HIGHEST)


def strl(size: int | None = None) -> dict[str, dict[str, Any]]:
    """STRL (Huang et al. 2021, section 3.2): views "x1" and "x2" of a cloud in the unit sphere, each rotated by up to
    15 degrees about each axis, scaled, moved, jittered, and with points dropped; `PerExample(views=...)` in a config.

    Their cropping and their cutout of boxes are left out. The jitter is PointNet++'s.
    """
    view = {
        "type": "PointView",
        "size": size,
        "rotate": "each",
        "angle": 15.0,
        "scale": (0.8, 1.25),
        "move": 0.1,
        "jitter": 0.01,
        "jitter_limit": 0.05,
        "drop": 0.7,
    }
    return {"x1": view, "x2": dict(view)}


def point_contrast(size: int | None = None) -> dict[str, dict[str, Any]]:
    """PointContrast (Xie et al. 2020): views "x1" and "x2", any rotation in space and a factor of 0.8 to 1.2;
    `PerExample(views=...)` in a config."""
    view = {"type": "PointView", "size": size, "rotate": "all", "scale": (0.8, 1.2)}
    return {"x1": view, "x2": dict(view)}
